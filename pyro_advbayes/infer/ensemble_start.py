"""Trained networks as the starts of chains: :func:`ensemble_start`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_advbayes.checked import checked
from pyro_advbayes.given import check_int, warn
from pyro_advbayes.infer.arviz import log_likelihoods
from pyro_advbayes.model.batches import Arguments
from pyro_advbayes.model.initialization import init_to_fan_in
from pyro_advbayes.model.loader import is_loader
from pyro_advbayes.model.potential import Potential

BATCH_SIZE = 32


@dataclass(frozen=True)
class EnsembleStart(Mapping[str, Tensor]):
    """
    Members of a deep ensemble, as ``initial_params`` of :class:`~pyro_advbayes.SGMCMC`: a mapping from sites to unconstrained values
    ``[chains, *shape]``. Scores are log predictive densities, in nats, means over the rows that were held out of training.

    :ivar samples: the same values in the model's own space, ``[chains, *site]``: the deep ensemble, as ``posterior_samples``.
    :ivar score: of the ensemble's mean predicted density.
    :ivar member_scores: of each member.
    :ivar epochs: passes over the training rows after which each member was best; 0 for one that has not trained.
    :ivar held_out: numbers of the rows that were held out.
    """

    samples: dict[str, Tensor]
    score: float
    member_scores: list[float]
    epochs: list[int]
    held_out: Tensor
    _params: dict[str, Tensor] = field(repr=False)

    @property
    def description(self) -> str:
        """The scores in a line, which ``SGMCMC.summary`` prints."""
        low, high = min(self.member_scores), max(self.member_scores)
        return (
            f"deep ensemble of {len(self.epochs)}: log density of held-out rows {self.score:.4g} nats, members {low:.4g} to {high:.4g}. "
            "Compare it with the posterior on test rows, since the chains have seen these"
        )

    def __getitem__(self, site: str) -> Tensor:
        return self._params[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


@checked
def ensemble_start(
    model: Callable,
    *args: Any,
    num_chains: int = 4,
    kwargs: Mapping[str, Any] | None = None,
    lr: float = 5e-3,
    num_epochs: int = 500,
    patience: int = 20,
    batch_size: int = BATCH_SIZE,
    validation_share: float = 0.15,
    backend: str = "graph",
    init_strategy: Callable = init_to_fan_in,
) -> EnsembleStart:
    r"""
    Trains a deep ensemble whose members are where the chains of a sampler start (Sommer et al., 2024, 2025). ::

        start = ab.ensemble_start(model, x, y, num_chains=8)
        mcmc = ab.SGMCMC(ab.SGHMC(model), 1000, 1000, num_chains=8, initial_params=start)

    Each member minimises :math:`U(\theta) / N` by Adam, from its own start and on its own shuffled minibatches; all members are rows of
    one state, whose gradients are computed in one call. A member's state is that of the epoch at whose end it predicts the held-out rows
    best. The chains then sample with all rows.

    :param model: a Pyro model with a data plate.
    :param args: its arguments with the data, as for ``SGMCMC.run``.
    :param int num_chains: number of members, >= 1.
    :param kwargs: keyword arguments of the model.
    :param float lr: Adam's learning rate, > 0.
    :param int num_epochs: most passes over the training rows, >= 1.
    :param int patience: epochs without an improvement after which a member is done, >= 1.
    :param int batch_size: rows of a minibatch, >= 1; at most all training rows are taken.
    :param float validation_share: share of rows that are held out, in (0, 1).
    :param str backend: as in :class:`~pyro_advbayes.Potential`.
    :param init_strategy: where members start: a per-site function as in ``pyro.infer.autoguide.initialization``.
    :raises ValueError: naming the argument, if one is out of range, the data come from a loader, there are fewer than two rows, or the
        model has no data plate.
    :raises RuntimeError: if no member predicts held-out rows better than at its start. A warning names those that do not, if some do.
    """
    for name, value in (("num_chains", num_chains), ("num_epochs", num_epochs), ("patience", patience), ("batch_size", batch_size)):
        check_int(value, name, 1)
    if not 0.0 < lr < math.inf:
        raise ValueError(f"lr={lr!r}: Adam's learning rate, > 0 and finite")
    if not 0.0 < validation_share < 1.0:
        raise ValueError(f"validation_share={validation_share!r}: a share of the rows, in (0, 1)")
    if is_loader(args, kwargs or {}):
        raise ValueError("ensemble_start holds rows out of training, which needs the data as tensors: give those behind the loader")
    arguments = Arguments(model, args, kwargs or {})
    rows, held_out = _split(arguments, validation_share)
    size = len(rows)
    potential = Potential(
        model,
        *_take(arguments, rows),
        num_chains=num_chains,
        batch_size=min(batch_size, size),
        backend=backend,
        init_strategy=init_strategy,
    )
    members = _Members(model, potential, _take(arguments, held_out), lr)
    steps = max(1, size // min(batch_size, size))
    with tqdm(total=num_epochs, desc=f"ensemble of {num_chains}", disable=None) as bar:
        for epoch in range(1, num_epochs + 1):
            for _ in range(steps):
                members.step(size)
            members.look(epoch)
            bar.update()
            bar.set_postfix({"held out": f"{float(members.best.mean()):.4g}"}, refresh=False)
            if all(epoch - best >= patience for best in members.epochs):
                break
    return members.finish(lr, held_out)


def _split(arguments: Arguments, share: float) -> tuple[Tensor, Tensor]:
    """Numbers of the rows to train on, and of those that are held out."""
    _, size = arguments.rows(None)
    if size < 2:
        raise ValueError(f"ensemble_start holds rows out of training: it needs at least 2, here is {size}")
    order, held_out = torch.randperm(size), min(max(1, round(share * size)), size - 1)
    return order[held_out:], order[:held_out]


def _take(arguments: Arguments, rows: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The model's ``(args, kwargs)`` with some rows of the data."""
    places, _ = arguments.rows(None)
    return arguments.replace([t[rows.to(t.device)] if i in places else t for i, t in enumerate(arguments.tensors)])


class _Members:
    """
    An ensemble in training.

    :param potential: of the training rows.
    :param held_out: the model's ``(args, kwargs)`` with the other rows.
    """

    def __init__(self, model: Callable, potential: Potential, held_out: tuple[Sequence[Any], Mapping[str, Any]], lr: float) -> None:
        self._model, self._potential, self._held_out = model, potential, held_out
        self._theta = potential.init().detach().clone()
        self._optim = torch.optim.Adam([self._theta], lr)
        self.kept, self.epochs = self._theta.clone(), [0] * len(self._theta)
        self.best = self._row_scores(self._theta).mean(-1)

    def step(self, size: int) -> None:
        """One update of every member."""
        self._theta.grad = self._potential.gradient(self._theta).div_(size)
        self._optim.step()

    def look(self, epoch: int) -> None:
        """Keeps the states that predict better than before."""
        scores = self._row_scores(self._theta).mean(-1)
        better = scores > self.best  # False for NaN
        self.best = torch.where(better, scores, self.best)
        self.kept[better.to(self.kept.device)] = self._theta[better.to(self._theta.device)]
        for chain in better.nonzero().flatten().tolist():
            self.epochs[chain] = epoch

    def finish(self, lr: float, held_out: Tensor) -> EnsembleStart:
        """The members where each was best."""
        untrained, count = [str(i) for i, epoch in enumerate(self.epochs) if epoch == 0], len(self.epochs)
        why = (
            f"at lr={lr:.3g} the held-out rows were never predicted better than at the start. Take another lr, or scale inputs and targets "
            "to about 1"
        )
        if len(untrained) == count:
            raise RuntimeError(f"no member has trained: {why}")
        if untrained:
            warn(f"members {', '.join(untrained)} of {count} have not trained: {why}")
        rows = self._row_scores(self.kept)
        score = float((rows.logsumexp(0) - math.log(len(rows))).mean())
        return EnsembleStart(
            {name: value.clone() for name, value in self._potential.constrain(self.kept).items()},
            score,
            self.best.tolist(),
            self.epochs,
            held_out,
            {name: value.clone() for name, value in self._potential.split(self.kept).items()},
        )

    def _row_scores(self, theta: Tensor) -> Tensor:
        """Log-likelihood of the held-out rows, ``[members, rows]``."""
        found = log_likelihoods(self._model, self._potential.constrain(theta), *self._held_out)
        return torch.stack([value.flatten(2).sum(-1) if value.dim() > 2 else value for value in found.values()]).sum(0).cpu().double()
