"""Bayesian Adversarial Learning: weights and perturbed inputs, sampled in turn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_advbayes.checked import checked
from pyro_advbayes.given import check_choice
from pyro_advbayes.infer.mcmc.adversary import L2, Adversary, Box, Cost, Pixels, as_cost, check_one_a_row
from pyro_advbayes.infer.mcmc.kernel import SGMCMCKernel, named
from pyro_advbayes.infer.mcmc.rule import Updates
from pyro_advbayes.infer.mcmc.schedules import Schedule, as_schedule, check_value
from pyro_advbayes.infer.mcmc.sgadald import SGAdaLD
from pyro_advbayes.infer.mcmc.sgld import SGLD
from pyro_advbayes.infer.mcmc.state import AutoStepSize, ChainState
from pyro_advbayes.model.batches import Batch
from pyro_advbayes.model.initialization import init_to_fan_in
from pyro_advbayes.model.potential import Potential
from pyro_advbayes.storage import reference

LEARNERS = ("mean", "sum", "independent")
Loss = Callable[[Callable, Tensor, Sequence[Any], Mapping[str, Any]], Tensor]


@dataclass
class InputState:
    """The state of the input chains. Their own random generator leaves the weights' random numbers unchanged."""

    random: torch.Generator
    lasting: Tensor | None = None  # z of a lasting adversary
    sizes: dict[str, Tensor] = field(default_factory=dict)  # mean distances by which the last minibatch was moved


@dataclass
class BALState(ChainState):
    """The state of weights and inputs."""

    inputs: InputState = field(kw_only=True)


@checked
class BAL(SGMCMCKernel):
    r"""
    Bayesian Adversarial Learning, Ye and Zhu (2018). For every minibatch it samples perturbed inputs, then weights,

    .. math::
        \tilde x_i &\sim p(\tilde x_i \mid \theta, x_i) \propto \exp\{(\ell(\tilde x_i; \theta) - c(\tilde x_i, x_i)) / T_x\}, \qquad
            \ell = -\log p(y_i \mid \tilde x_i, \theta), \\
        \theta &\sim p(\theta \mid \tilde x) \propto \{p(\theta) \prod_i p(y_i \mid \tilde x_i, \theta)\}^{1/T},

    the first by ``inputs.num_steps`` updates from the clean minibatch, the second by ``weights.num_steps`` updates on the perturbed
    one. Both together are one iteration; ``num_steps_per_sample`` counts these. With SGLD an update of the inputs is

    .. math:: \tilde x \leftarrow \tilde x + \eta\, [\nabla \ell(\tilde x; \theta) - \nabla c(\tilde x, x)] + \sqrt{2 \eta T_x}\, n,

    with fresh :math:`n` at every update. (The paper's Eq. 8 has the cost with the sign that drives :math:`\tilde x` away from
    :math:`x`, and its Algorithm 1 draws :math:`n` once; its Eq. 9 has the weights climb.)

    The two conditionals belong to no joint law. BAL samples the stationary law of the alternation, a pseudo-Gibbs chain in which learner
    and adversary play against each other. At cold temperatures (the default, as in the paper) minibatch noise, not T, sets the spread of
    the weights: ``clamp=True`` lets the chain run, and ``diagnostics()`` reports its ``T_eff``. The noise of one minibatch has the same
    direction in all its updates, and heats that many times as much as in a sampler with a new minibatch for each. ``T_eff`` includes that;
    what SGAdaLD takes off does not.

    Several chains are the learners :math:`\theta_1, \ldots, \theta_S`. With ``learners="mean"`` they share minibatches and one adversary,
    which raises the mean of their losses. ``"sum"`` takes the sums of losses and costs, as the paper does; that is the law of ``"mean"`` at
    :math:`T_x / S`. ``"independent"`` gives each learner its own minibatches and adversary. In :class:`pyro.infer.MCMC`, which runs chains
    one by one, they are always independent.

    Example::

        mcmc = SGMCMC(BAL(model, perturb="x", batch_size=128, clip=(0.0, 1.0)), num_samples=100, warmup_steps=200, num_chains=5)
        mcmc.run(x, y)

    :param model: a Pyro model with continuous latent sites.
    :param str perturb: name of the model's argument that the adversary may move.
    :param int batch_size: rows of a minibatch; None where a loader cuts them.
    :param Updates inputs: how inputs are sampled, ``SGLD.rule(step_size, num_steps)``; its step size may be a function of the update's
        number within the minibatch. By default 15 updates, of the square of the range of ``clip``.
    :param cost: c: :class:`L2` (the paper's), :class:`Box`, or a function of ``(perturbed, clean)`` to ``[rows]``, in nats. The default,
        a box of a tenth of the range of ``clip``, also moves examples far from the decision boundary, which a penalty hardly does: on
        scikit-learn's digits it gave the better trade of clean for robust accuracy. A flow or a generator has its own energy, and no
        further cost by default.
    :param Updates weights: how weights are sampled, by any kernel's ``rule``; by default 15 updates of SGAdaLD at 0.015, clamped.
    :param temperature: T of the weights, a number >= 0 or a function of the update's number.
    :param float input_temperature: :math:`T_x` >= 0.
    :param clip: smallest and largest value of an input; None for no bounds, which requires ``inputs`` and ``cost``.
    :param str learners: ``"mean"``, ``"sum"`` or ``"independent"``.
    :param int copies: chains of inputs per example, >= 1 (the paper's :math:`S_x`).
    :param float clean_share: share of a minibatch's rows, 0 to 1, that stays clean.
    :param Adversary adversary: what is moved: :class:`Pixels` by default, a :class:`Flow` field, or the parameters of a
        :class:`Generator`.
    :param loss: the adversary raises this instead of :math:`\ell`: a function ``loss(model, clean, args, kwargs)`` to ``[rows]``, where
        ``model`` has its weights and ``args``, ``kwargs`` hold the perturbed inputs.
    :param keep: indices of rows whose perturbed inputs are kept with every sample; see ``SGMCMC.get_extras``.

    For other arguments and errors see :class:`~pyro_advbayes.infer.mcmc.kernel.SGMCMCKernel`.
    """

    mixes = False  # learners at the paper's cold temperatures are members, each in its own mode

    def __init__(
        self,
        model: Callable,
        perturb: str,
        batch_size: int | None = None,
        *,
        inputs: Updates | None = None,
        cost: Cost | Callable[[Tensor, Tensor], Tensor] | None = None,
        weights: Updates | None = None,
        temperature: float | Schedule = 1e-5,
        input_temperature: float = 1e-5,
        clip: tuple[float, float] | None = None,
        learners: str = "mean",
        copies: int = 1,
        clean_share: float = 0.0,
        adversary: Adversary | None = None,
        loss: Loss | None = None,
        keep: Sequence[int] = (),
        num_steps_per_sample: int = 1,
        batch_args: Sequence[int | str] | None = None,
        num_data: int | None = None,
        backend: str = "graph",
        chunk_size: int | None = None,
        init_strategy: Callable = init_to_fan_in,
        batch_dependent: bool = False,
    ) -> None:
        if clip is not None and not clip[0] < clip[1]:
            raise ValueError(f"clip={clip!r}: the smallest and the largest value of an input, or None")
        pixels = adversary is None or isinstance(adversary, Pixels)
        if clip is None and (inputs is None or (pixels and cost is None)):
            raise ValueError(
                "cost and inputs are in the units of the inputs: say how far those reach, clip=(0.0, 1.0), or give cost= and inputs="
            )
        extent = 1.0 if clip is None else clip[1] - clip[0]
        self.inputs = SGLD.rule(step_size=extent**2, num_steps=15) if inputs is None else inputs
        self.weights = SGAdaLD.rule(step_size=0.015, num_steps=15, clamp=True) if weights is None else weights
        for name in ("inputs", "weights"):
            if not isinstance(getattr(self, name), Updates):
                raise ValueError(f"{name}={getattr(self, name)!r}: a kernel's rule is needed, SGLD.rule(step_size=..., num_steps=...)")
        check_choice(learners, "learners", LEARNERS)
        if not 0.0 <= clean_share <= 1.0:
            raise ValueError(f"clean_share={clean_share!r}: a share of the rows, from 0 to 1")
        self.perturb, self.learners, self.copies, self.clip = perturb, learners, copies, clip
        self.cost = as_cost((Box(0.1 * extent) if pixels else L2(0.0)) if cost is None else cost)
        self.adversary = Pixels() if adversary is None else adversary
        self.input_temperature = check_value(as_schedule(input_temperature, "input_temperature")(0), "input_temperature", 0)
        self.clean_share, self.loss, self.keep = clean_share, loss, tuple(keep)
        if self.adversary.lasting and learners == "independent":
            raise ValueError(f"{self.adversary!r} is shared by all rows and chains: take learners='mean' or 'sum'")
        self.update_rule = self.weights.rule
        super().__init__(
            model,
            self.weights.step_size,
            temperature,
            batch_size,
            num_steps_per_sample,
            batch_args=batch_args,
            num_data=num_data,
            backend=backend,
            chunk_size=chunk_size,
            init_strategy=init_strategy,
            batch_dependent=batch_dependent,
        )

    @property
    def updates_per_sample(self) -> int:
        return self.num_steps_per_sample * self.weights.num_steps

    @property
    def updates_per_batch(self) -> int:
        return self.weights.num_steps

    # ------------------------------------------------------------------------------------------------------------- setting up

    def _potential_options(self) -> dict[str, Any]:
        return {"perturb": self.perturb, "copies": self.copies, "shared_batches": self.learners != "independent"}

    def _start_state(self, theta: Tensor, auto: AutoStepSize | None) -> BALState:
        return BALState.start(theta, self.update_rule, auto, inputs=InputState(torch.Generator(theta.device)))

    @property
    def chains(self) -> BALState:
        chains = self.run.chains
        assert isinstance(chains, BALState)
        return chains

    def _start(self, potential: Potential, theta: Tensor, warmup_samples: int) -> None:
        super()._start(potential, theta, warmup_samples)
        perturbed = potential.perturbed
        assert perturbed is not None  # since the potential was given perturb=
        self._place = potential.places.index(perturbed)
        if potential.from_loader and self.learners == "independent" and self.num_chains > 1:
            raise ValueError("learners='independent': all chains see a loader's batches; give the data as tensors, and batch_size=")
        self._check_range(potential.arguments.tensors[perturbed])
        self._kept = self._rows_to_keep()
        digest = hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=4).digest()
        self.chains.inputs.random.manual_seed(int.from_bytes(digest, "little"))

    def _check_range(self, x: Tensor) -> None:
        if self.clip is not None and (float(x.min()) < self.clip[0] or float(x.max()) > self.clip[1]):
            raise ValueError(
                f"argument {self.perturb!r} has values from {float(x.min()):.4g} to {float(x.max()):.4g}, outside clip={self.clip}: "
                "scale the inputs, or give their range"
            )

    def _rows_to_keep(self) -> Batch | None:
        if not self.keep:
            return None
        potential = self.potential
        tensors = [potential.arguments.tensors[i] for i in potential.places]
        if potential.from_loader or not all(isinstance(row, int) and 0 <= row < len(tensors[0]) for row in self.keep):
            raise ValueError(f"keep={list(self.keep)}: rows of the data, given as tensors, from 0 to {len(tensors[0]) - 1}")
        rows = tuple(t[list(self.keep)] for t in tensors)
        return tuple(t.expand(self.num_chains, *t.shape) for t in rows) if potential.batches.per_chain else rows

    # -------------------------------------------------------------------------------------------------------------- iterating

    def _iterations(self, most: int) -> int:
        self._iterate("gradient")  # its inputs depend on the weights
        return 1

    def _iterate(self, kind: str) -> None:
        batch = self._next_batch()
        for i in range(self.weights.num_steps):
            self._updates.update(self.run, kind if i == self.weights.num_steps - 1 else "gradient", batch)

    def _next_batch(self) -> Batch:
        return self._perturbed(super()._next_batch())

    @torch.no_grad()
    def _perturbed(self, batch: Batch) -> Batch:
        """The minibatch with its inputs perturbed."""
        batch = self.potential.repeat(batch)
        clean = batch[self._place]
        rows = clean.shape[: 1 + int(self.potential.batches.per_chain)].numel()
        flat = clean.reshape(rows, *clean.shape[1 + int(self.potential.batches.per_chain) :])
        if self.potential.from_loader:
            self._check_range(flat)
        perturbed = self._run_inputs(batch, flat)
        if self.clean_share > 0.0:
            unmoved = torch.rand(rows, generator=self.chains.inputs.random, device=flat.device) < self.clean_share
            perturbed[unmoved] = flat[unmoved]
        distance = (perturbed - flat).abs().reshape(rows, -1)
        self.chains.inputs.sizes = {"linf": distance.amax(1).mean(), "l2": torch.linalg.vector_norm(distance, dim=1).mean()}
        return self._replaced(batch, perturbed.view_as(clean))

    def _replaced(self, batch: Batch, inputs: Tensor) -> Batch:
        return (*batch[: self._place], inputs, *batch[self._place + 1 :])

    def _run_inputs(self, batch: Batch, clean: Tensor) -> Tensor:
        adversary, (rule, step_size, num_steps), state = self.adversary, self.inputs, self.chains.inputs
        shape = batch[self._place].shape

        def outward(perturbed: Tensor) -> Tensor:
            """The gradient of the input chains' energy, cost less loss."""
            ascent = self._loss_gradient(self._replaced(batch, perturbed.view(shape)), clean).reshape(clean.shape)
            return self.cost.gradient(perturbed, clean).sub_(ascent)

        def onto(perturbed: Tensor) -> Tensor:
            perturbed = self.cost.project(perturbed, clean)
            return perturbed if self.clip is None else perturbed.clamp(*self.clip)

        # a copy, because the two buffers of the rule change places
        z = adversary.start(clean) if state.lasting is None else state.lasting.clone()
        noise, variables = torch.empty_like(z), rule.variables(z)
        temperature = torch.tensor(self.input_temperature, dtype=z.dtype, device=z.device)
        for i in range(num_steps):
            size = torch.tensor(check_value(step_size(i), "inputs' step_size", i), dtype=z.dtype, device=z.device)
            gradient = adversary.gradient(z, clean, outward)
            if self.learners == "sum":
                gradient = gradient.mul_(self.num_chains)
            moved = rule.step(z, gradient, noise.normal_(generator=state.random), size, temperature, variables, "metric")
            noise, z = z, adversary.project(moved, onto)
        if adversary.lasting:
            state.lasting = z
        return onto(adversary.inputs(z, clean))

    def _loss_gradient(self, batch: Batch, clean: Tensor) -> Tensor:
        """The gradient of the learners' mean loss; for independent learners, of each one's loss."""
        mean, custom = not self.potential.batches.per_chain, self.loss
        if custom is None:
            return self.potential.input_gradient(self.theta, batch, mean)
        pieces = []
        for chain, theta in enumerate(self.theta):
            mine = tuple(t[chain] for t in batch) if not mean else batch
            unmoved = clean if mean else clean.view(self.num_chains, -1, *clean.shape[1:])[chain]
            pieces.append(self._custom_loss_gradient(custom, theta, mine, unmoved))
        return torch.stack(pieces).mean(0) if mean else torch.stack(pieces)

    def _custom_loss_gradient(self, custom: Loss, theta: Tensor, batch: Batch, clean: Tensor) -> Tensor:
        potential = self.potential
        values = {site: value[0] for site, value in potential.constrain(theta.unsqueeze(0)).items()}
        with torch.enable_grad(), pyro.validation_enabled(False), poutine.block(), poutine.condition(data=values):
            moved = batch[self._place].detach().requires_grad_()
            args, kwargs = potential.arguments_with(self._replaced(batch, moved))
            loss = custom(self.model, clean, args, kwargs)
            check_one_a_row(loss, "loss", len(clean))
            return torch.autograd.grad(loss.sum(), moved)[0]

    # ------------------------------------------------------------------------------------------------------- what is reported

    def extra_shapes(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        if self._kept is None:
            return {}
        rows = self._kept[self._place][0] if self.potential.batches.per_chain else self._kept[self._place]
        return {self.perturb: (torch.Size((self.copies * len(rows), *rows.shape[1:])), rows.dtype)}

    def extras(self) -> dict[str, Tensor]:
        """The inputs in ``keep``, perturbed against the present chains: ``{perturb: [chains, rows * copies, ...]}``."""
        if self._kept is None:
            return {}
        batch = self.potential.repeat(self._kept)
        clean = batch[self._place]
        per_chain = self.potential.batches.per_chain
        state = self.chains.inputs
        lasting = state.lasting
        perturbed = self._run_inputs(batch, clean.flatten(0, 1) if per_chain else clean).view_as(clean)
        state.lasting = lasting  # reporting must not change the state
        return {self.perturb: perturbed if per_chain else perturbed.expand(self.num_chains, *clean.shape)}

    def diagnostics(self) -> dict[str, Any]:
        """
        :return: as for every kernel; and ``"perturbation"``, the mean distance that the last minibatch's inputs were moved, in the
            maximum norm (``"linf"``) and the Euclidean norm (``"l2"``), in units of the input.
        """
        return {**super().diagnostics(), "perturbation": {name: float(value) for name, value in self.chains.inputs.sizes.items()}}

    def settings(self) -> dict[str, Any]:
        names = ("perturb", "clip", "learners", "copies", "clean_share", "keep", "input_temperature")
        parts = {name: repr(getattr(self, name)) for name in names}
        # functions are compared by value, see reference(), and not by name
        own = "ℓ" if self.loss is None else "a function"
        cost = named(self.cost) if type(self.cost) in (L2, Box) else "a function"
        updates = {f"{n}_updates": [named(u.rule), u.num_steps] for n, u in (("inputs", self.inputs), ("weights", self.weights))}
        updates["inputs_step_sizes"] = [self.inputs.step_size(i) for i in range(self.inputs.num_steps)]
        return {**super().settings(), **parts, **updates, "loss": own, "cost": cost, "adversary": named(self.adversary)}

    def reference(self) -> dict[str, Tensor]:
        probe = self.potential.probe_batches[0]
        batch = tuple(t[0] for t in probe) if self.potential.batches.per_chain else probe
        clean, random = batch[self._place], torch.Generator().manual_seed(0)
        extent = float(clean.abs().amax()) if self.clip is None else self.clip[1] - self.clip[0]

        def moved(value: Tensor, size: float) -> Tensor:
            return value + size * torch.randn(value.shape, dtype=value.dtype, generator=random).to(value.device)

        def cost() -> list[Tensor]:
            perturbed = [moved(clean, size * extent) for size in (0.01, 0.1, 1.0, 10.0)]
            return [f(x.clone(), clean) for f in (self.cost.gradient, self.cost.project) for x in perturbed]

        def adversary() -> list[Tensor]:
            start = self.adversary.start(clean)
            values = [start, moved(start, 0.1), moved(start, 1.0)]
            with torch.no_grad():
                return [start, *(f for z in values for f in (self.adversary.inputs(z, clean), self.adversary.energy(z)))]

        def loss(custom: Loss) -> list[Tensor]:
            values = [moved(clean, size * extent) for size in (0.01, 0.1, 1.0)]
            return [self._custom_loss_gradient(custom, self.theta[0], self._replaced(batch, x), clean) for x in values]

        functions = {"cost": cost, "adversary": adversary} | ({} if self.loss is None else {"loss": partial(loss, self.loss)})
        return {**super().reference(), **{name: reference.computed(f, clean.device) for name, f in functions.items()}}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": None}
