"""Maps from unconstrained space onto the supports of priors, also for supports that PyTorch registers no map for."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, transform_to
from torch.distributions.constraints import Constraint


def map_onto(name: str, prior: Any) -> Transform:
    """
    The map from unconstrained space onto the support of a site's prior.

    :raises ValueError: naming the site, if there is none.
    """
    try:
        return biject_to(prior.support)
    except NotImplementedError as error:
        raise ValueError(
            f"site {name!r} ({type(prior).__name__}) has a support without a map from unconstrained space ({error}): give it a prior on "
            "another support (a Cholesky factor for a matrix, components of a mixture on one support), or sum it out"
        ) from None


def _onto_mixture(constraint: Any) -> Transform:
    return biject_to(_of_one_component(constraint.base_constraint, -1 - constraint.event_dim))


def _to_mixture(constraint: Any) -> Transform:
    return transform_to(_of_one_component(constraint.base_constraint, -1 - constraint.event_dim))


def _of_one_component(constraint: Constraint, dim: int) -> Constraint:
    """
    The support that all components share: the constraint without the dimension ``dim`` of components in its bounds.

    :raises NotImplementedError: if the components' bounds differ, so that the density jumps inside the support of the mixture.
    """
    constraint = copy.copy(constraint)
    for name, bound in vars(constraint).items():
        if isinstance(bound, Constraint):
            setattr(constraint, name, _of_one_component(bound, dim))
        elif isinstance(bound, Tensor) and bound.dim() >= -dim:
            first = bound.narrow(dim, 0, 1)
            if not bool((bound == first).all()):
                raise NotImplementedError("the components of the mixture have different supports")
            setattr(constraint, name, first.squeeze(dim))
    return constraint


# in PyTorch 2.6 a mixture's support is that of its components
if hasattr(constraints, "MixtureSameFamilyConstraint"):
    biject_to.register(constraints.MixtureSameFamilyConstraint, _onto_mixture)
    transform_to.register(constraints.MixtureSameFamilyConstraint, _to_mixture)
