"""What all stochastic-gradient kernels share: a Pyro ``MCMCKernel`` whose state is one flat row per chain."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_advbayes.given import refuse_unknown
from pyro_advbayes.infer.mcmc.control_variate import ControlVariate
from pyro_advbayes.infer.mcmc.noise import NormalNoise
from pyro_advbayes.infer.mcmc.noise_estimate import ESTIMATE_FROM, EVALUATIONS, FRESH_EVALUATIONS, NoiseEstimate
from pyro_advbayes.infer.mcmc.restart import Restarts
from pyro_advbayes.infer.mcmc.rule import Rule, Updates, site_means
from pyro_advbayes.infer.mcmc.schedules import Constant, Cyclical, Polynomial, Schedule, as_schedule, check_value, keeps_sample
from pyro_advbayes.infer.mcmc.step_size import AutoStepSize
from pyro_advbayes.infer.mcmc.trajectory import SteepestStates
from pyro_advbayes.infer.mcmc.update import chunk_update, compile_update
from pyro_advbayes.model.batches import Batch
from pyro_advbayes.model.functions import BACKENDS, KEPT, Kept
from pyro_advbayes.model.initialization import init_to_fan_in
from pyro_advbayes.model.potential import Potential
from pyro_advbayes.storage import reference
from pyro_advbayes.storage.files import random_state, set_random_state
from pyro_advbayes.tracing.guard import autocast_state


class SGMCMCKernel(MCMCKernel):
    r"""
    Base of the stochastic-gradient kernels. Works in :class:`pyro.infer.MCMC` and ``StreamingMCMC``, one chain at a time, and in
    :class:`~pyro_advbayes.SGMCMC`, where chains are rows of one state.

    One convention holds for all: :math:`U` is in nats over the whole data set, and ``warmup_steps`` and ``num_samples`` of a
    driver count samples, each of ``num_steps_per_sample`` updates.

    :param model: a Pyro model with continuous latent sites.
    :param step_size: a number > 0, a function of the update's number, or ``"auto"``: found in warm-up, so that discretisation and
        minibatch noise each change the temperature by at most ``auto_share``. Curvature (by power iteration on Hessian-vector products),
        the energy error of short trajectories and noise bound it; in the first 60 % of warm-up noise may double the temperature. A chain
        that is lost or runs away in warm-up starts again from its last good state with half the step, up to 10 times. What was found is
        in ``diagnostics()``.
    :param temperature: T, a number >= 0 or a function of the update's number; the law is :math:`p(\theta, D)^{1/T}`.
    :param int batch_size: rows of a minibatch, 1 to N; None for the full data, a plate that subsamples itself, or a loader.
    :param int num_steps_per_sample: updates between samples, >= 1.
    :param batch_args: names or positions of the arguments that hold a row per data point; a guess by default.
    :param int num_data: rows behind a loader that does not tell.
    :param str backend: ``"graph"``, ``"handlers"`` or ``"compile"``; see :class:`~pyro_advbayes.Potential`.
    :param int chunk_size: chains in one call; a fixed rule by default.
    :param init_strategy: where chains start: a per-site function as in ``pyro.infer.autoguide.initialization``; use
        ``init_to_value(values=...)`` to start from trained weights.
    :param dict control_variate: site values, a MAP estimate, at which the gradient is anchored: the full-data gradient there plus
        the minibatch's difference from there, which has less noise near the anchor at twice the cost of an update.
    :param float auto_share: share of T, in (0, 1), by which ``step_size="auto"`` lets discretisation and noise change it.
    :param bool batch_dependent: accepts a log-likelihood of minibatches that is not a sum over their rows; refused by default, since
        no factor takes it to the whole data set. See :class:`~pyro_advbayes.Potential`.
    :raises ValueError: naming the argument; what is wrong with model or data is raised by ``setup``, before any sampling.
    """

    rule_type: type[Rule]
    update_rule: Rule
    # Whether its chains are draws of one law, which must agree with each other in the end.
    mixes = True

    def __new__(cls, *args: Any, **options: Any) -> SGMCMCKernel:
        refuse_unknown(cls, options)
        return super().__new__(cls)

    def __init__(
        self,
        model: Callable,
        step_size: float | str | Schedule = "auto",
        temperature: float | Schedule = 1.0,
        batch_size: int | None = None,
        num_steps_per_sample: int = 1,
        *,
        batch_args: Sequence[int | str] | None = None,
        num_data: int | None = None,
        backend: str = "graph",
        chunk_size: int | None = None,
        init_strategy: Callable = init_to_fan_in,
        control_variate: Mapping[str, Tensor] | None = None,
        auto_share: float = 0.1,
        batch_dependent: bool = False,
    ) -> None:
        if not callable(model):
            raise ValueError(f"model={model!r} is no Pyro model: a callable is needed")
        if isinstance(num_steps_per_sample, bool) or not isinstance(num_steps_per_sample, int) or num_steps_per_sample < 1:
            raise ValueError(f"num_steps_per_sample={num_steps_per_sample!r}: an int >= 1")
        if isinstance(step_size, str) and step_size != "auto":
            raise ValueError(f'step_size={step_size!r}: a number > 0, a function of the step, or "auto"')
        if not 0.0 < auto_share < 1.0:
            raise ValueError(f"auto_share={auto_share!r}: a share of the temperature, in (0, 1)")
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}: choose one of {', '.join(map(repr, BACKENDS))}")
        self.model = model
        self.temperature = as_schedule(temperature, "temperature")
        self.step_size = AutoStepSize(auto_share) if step_size == "auto" else as_schedule(step_size, "step_size")
        self.batch_size, self.batch_args, self.num_data = batch_size, batch_args, num_data
        self.num_steps_per_sample = num_steps_per_sample
        self.backend, self.chunk_size, self.init_strategy = backend, chunk_size, init_strategy
        self.control_variate, self.batch_dependent = control_variate, batch_dependent
        self.transforms: dict[str, Any] | None = None
        self._save_params: list[str] | None = None
        self._initial_params: dict[str, Tensor] | None = None
        self._graphs: dict[Any, Callable] = Kept(KEPT)
        self._clear()

    @classmethod
    def rule(cls, step_size: float | Schedule, num_steps: int = 1, **settings: Any) -> Updates:
        """
        The kernel's update rule by itself, for a kernel that alternates between several.

        :param step_size: a number > 0, or a function of the update's number.
        :param num_steps: updates in a row, >= 1.
        :param settings: what the kernel's own constructor takes for its rule.
        """
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"num_steps={num_steps!r}: an int >= 1")
        refuse_unknown(cls.rule_type, settings)
        return Updates(cls.rule_type(**settings), as_schedule(step_size, "step_size"), num_steps)

    @property
    def updates_per_sample(self) -> int:
        """Updates between two samples."""
        return self.num_steps_per_sample

    @property
    def updates_per_batch(self) -> int:
        """Updates in a row that see one minibatch."""
        return 1

    @property
    def automatic(self) -> bool:
        """Whether the step size is found from the model."""
        return isinstance(self.step_size, AutoStepSize)

    @property
    def warmup_updates(self) -> int:
        """Updates of the whole warm-up."""
        return self._warmup_samples * self.updates_per_sample

    def _clear(self) -> None:
        """Forgets one run; settings and traced graphs stay."""
        self.potential: Potential | None = None
        self._functions: dict[Any, list[Callable]] = {}
        self._last: dict[str, Tensor] | None = None
        self.steps = self._samples = self._warmup_samples = 0
        self._info: dict[str, Any] = {}
        self._effective: Tensor | None = None
        self._hottest: float | None = None
        self._coldest: dict[str, float] | None = None

    # ------------------------------------------------------------------------------------------------------ Pyro's protocol

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """
        Looks at model and data, finds a start, for one chain.

        :raises ValueError: naming site, plate, layer or argument, if they cannot be sampled as asked.
        """
        self.setup_chains(None, warmup_steps, args, kwargs)

    def setup_chains(
        self, num_chains: int | None, warmup_steps: int, args: Sequence[Any], kwargs: Mapping[str, Any], find_start: bool = True
    ) -> None:
        """
        :meth:`setup` for many chains: parameters then have a leading dimension ``[chains]``; None means one without it.

        :param find_start: False where :meth:`load` says next where the chains are.
        """
        given = self._initial_params
        self._clear()
        self._single, self.num_chains = num_chains is None, num_chains or 1
        self._warmup_samples = warmup_steps
        self.potential = Potential(
            self.model,
            args,
            kwargs,
            num_chains=self.num_chains,
            batch_size=self.batch_size,
            batch_args=self.batch_args,
            num_data=self.num_data,
            backend=self.backend,
            chunk_size=self.chunk_size,
            init_strategy=self.init_strategy,
            graphs=self._graphs,
            batch_dependent=self.batch_dependent,
            **self._potential_options(),
        )
        if self.potential.from_loader:
            self.potential.batches.check_lengths()  # now, and not when the run comes to it
        self.transforms = self.potential.transforms
        if not self.automatic:
            self.refuse_vanishing(self.step_size(0))
        self.names = [(site.name, slice(site.start, site.start + site.numel)) for site in self.potential.sites]
        if not find_start:
            theta = torch.zeros(self.num_chains, self.potential.size, dtype=self.potential.dtype, device=self.potential.device)
        else:
            theta = self.potential.init() if given is None else self._joined(given)
        if theta.shape != (self.num_chains, self.potential.size):
            raise ValueError(f"initial_params hold {len(theta)} chains: {self.num_chains} are needed")
        if given is not None:
            self.potential.check_start(theta)
        self._start(theta)
        self._initial_params = self._split(theta.clone())

    def refuse_vanishing(self, step_size: float) -> None:
        """:raises ValueError: if a step size is so small that in the state's dtype nothing would move."""
        if float(torch.tensor(self.update_rule.leapfrog_step(step_size) ** 2 / 2.0, dtype=self.potential.dtype)) == 0.0:
            raise ValueError(f"step_size={step_size:.3g}: updates so small are 0 in {self.potential.dtype}: take a larger one")

    def _potential_options(self) -> dict[str, Any]:
        """What else the potential is to offer."""
        return {}

    def _start(self, theta: Tensor) -> None:
        self.theta, self._noise = theta, torch.empty_like(theta)
        self._normal = NormalNoise(theta)
        self.variables = self.update_rule.variables(theta)
        self.alive = torch.ones(self.num_chains, dtype=torch.bool)
        self._some_lost = False
        self._divergences: list[list[int]] = [[] for _ in range(self.num_chains)]
        self._settled = False
        self.restarts = Restarts(self.num_chains)
        self.steepest = SteepestStates(self.num_chains, self.potential.size)
        self._anchor = None if self.control_variate is None else ControlVariate(self.potential, self.control_variate)
        self.noise_estimate = NoiseEstimate(self, every_step="noise" in self.variables)
        self._scalars: dict[float, Tensor] = {}
        self._clamped_share = 0.0
        if self.automatic:
            self.step_size.reset()

    def cleanup(self) -> None:
        """Forgets the start, so that the next chain finds its own. May be called twice."""
        self._initial_params = None

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """Where the chains start, by site, in unconstrained space."""
        return self._initial_params

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self._initial_params = params

    @property
    def save_params(self) -> list[str]:
        """
        Sites that Pyro's driver saves. Sorted, whatever was given: Pyro 1.9 writes them in the given order and reads them in
        sorted order, and would swap samples between sites.
        """
        return sorted(self._initial_params) if self._save_params is None else self._save_params

    @save_params.setter
    def save_params(self, names: Sequence[str]) -> None:
        self._save_params = sorted(names)

    def logging(self) -> dict[str, str]:
        """What a progress bar shows beside its count."""
        shown = {
            "step size": f"{self._info.get('step_size', math.nan):.2e}",
            "energy": f"{self._info.get('mean_energy', math.nan):.4e}",
        }
        lost = self.num_chains - int(self.alive.sum())
        if lost:
            shown["divergences"] = str(lost)
        return shown

    def diagnostics(self) -> dict[str, Any]:
        """
        :return: ``"divergences"``, the numbers of the samples at which the chain was lost (a list per chain in
            :class:`~pyro_advbayes.SGMCMC`); ``"step size"``; ``"T_eff"``, the temperature per site that the minibatch noise was
            predicted to lead to at the end of warm-up, mean over its coordinates, of the worst chain: an upper bound where batches are
            those of shuffled epochs, which take noise back from all that moves slowly; ``"T_eff epochs"``, the temperature per site if
            nothing is left of that noise, below T where the rule takes it off; ``"T_eff direction"``, the temperature along the
            direction in which noise heats most (None on full data), of the worst of up to four chains;
            ``"clamped"``, the share of coordinates where the rule was clamped; ``"restarts"``, how often each chain was started again
            in warm-up; ``"step fell"``, by what factor ``"auto"`` made the step smaller when noise was held to its share.
        """
        divergences = self._divergences[0] if self._single else self._divergences
        return {
            "divergences": divergences,
            "step size": self._info.get("step_size"),
            "T_eff": self.effective_temperatures(),
            "T_eff direction": self._hottest,
            "T_eff epochs": self._coldest,
            "clamped": self._clamped_share,
            "restarts": self.restarts.counts[0] if self._single else list(self.restarts.counts),
            "step fell": self._step_fell(),
        }

    def _step_fell(self) -> float | None:
        auto = self.step_size
        if not isinstance(auto, AutoStepSize) or auto.value is None or auto.warm_value is None:
            return None
        return auto.warm_value / auto.value

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        # transforms too: PyTorch's inverse transforms lose what they invert when they are pickled
        gone = ("potential", "theta", "_noise", "_normal", "variables", "_anchor", "noise_estimate", "_scalars", "_last", "steepest")
        for name in ("transforms", *gone):
            state[name] = None
        state["_graphs"], state["_functions"] = Kept(KEPT), {}
        if "restarts" in state:
            state["restarts"] = self.restarts.without_states()
        return state

    # ------------------------------------------------------------------------------------------------------------- sampling

    @property
    def adapting(self) -> bool:
        """Whether warm-up is going on."""
        return self._samples < self._warmup_samples

    @property
    def _learning(self) -> str | None:
        """
        What the rule learns from this update: its preconditioner in the first half of warm-up, and in the last 30 % the mean square of the
        gradients, where the chain has come to rest.
        """
        due = None
        if 2 * self._samples < self._warmup_samples:
            due = "metric"
        elif self.adapting and self.steps >= ESTIMATE_FROM * self.warmup_updates:
            due = "moment"
        return due if due in self.update_rule.learns else None

    @torch.no_grad()
    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """
        The next sample: ``num_steps_per_sample`` updates, and more where a schedule keeps none in the hot part of its cycle.

        :param params: unconstrained values by site; only the last sample's may be a part of a larger run.
        :return: unconstrained values by site, detached.
        :raises RuntimeError: if every chain is lost.
        """
        if params is not self._last:
            self.theta.copy_(self._joined(params))
        if self._samples == self._warmup_samples:
            self._end_warmup()
        elif not self._settled and 2 * self._samples >= self._warmup_samples:
            self._settled = True
            if "moment" in self.update_rule.learns:
                self.update_rule.settle(self.variables, self.noise_estimate.fresh(self).second_moment, FRESH_EVALUATIONS)
        schedules = (self.step_size, self.temperature)
        for i in range(self.num_steps_per_sample):
            self._iterate("both" if i == self.num_steps_per_sample - 1 else "gradient")
        while not (self.adapting or keeps_sample(schedules, self.steps - 1)):
            self._iterate("both")
        self._samples += 1
        kept = self._samples - self._warmup_samples - 1
        if kept >= 0:
            for chain in (~self.alive).nonzero().flatten().tolist():
                self._divergences[chain].append(kept)
            if self.mixes:  # the buffer holds where the last update started from, and its gradient was taken
                self.steepest.watch(self._noise, self._info["gradient_norm"])
        self._last = self._split(self.theta.clone())
        return self._last

    @property
    def info(self) -> dict[str, Tensor | float]:
        """
        Of the last update: ``"energy"`` ``[chains]`` (the minibatch estimate of U, in nats, where the update started),
        ``"gradient_norm"`` and ``"diverging"`` ``[chains]``, ``"step_size"``, ``"temperature"``.
        """
        return {**self._info, "diverging": ~self.alive}

    def extra_shapes(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shapes, of one chain, and dtypes of :meth:`extras`."""
        return {}

    def extras(self) -> dict[str, Tensor]:
        """What is to be kept with a sample beside the sites, ``[chains, ...]``."""
        return {}

    def _iterate(self, kind: str) -> None:
        """What ``num_steps_per_sample`` counts."""
        self._update(kind, self._next_batch())

    def _next_batch(self) -> Batch:
        return self.potential.batches.next()

    def _update(self, kind: str, batch: Batch) -> None:
        step, potential = self.steps, self.potential
        restartable = self.adapting and self.automatic
        if self.automatic:
            self.step_size.adapt(self)
        if restartable:
            self.restarts.watch(self)
        step_size = check_value(self.step_size(step), "step_size", step)
        temperature = check_value(self.temperature(step), "temperature", step)
        if self.adapting:
            self.noise_estimate.adapt(self)
        elif self.restarts.theta is not None:
            self.restarts.forget_states()
        self._normal.fill(self._noise)
        finite, reports = True, []
        chunks = potential.chunks(self.num_chains, batch)
        functions = self._resolve(kind, chunks)
        scalars = self._scalar(step_size), self._scalar(temperature)
        for (rows, tensors), function in zip(chunks, functions, strict=True):
            variables = {name: value[rows] for name, value in self.variables.items()}
            *report, total = function(self.theta[rows], self._noise[rows], *scalars, variables, *tensors)
            finite = finite and math.isfinite(total)
            reports.append(report)
        if not finite:
            self._find_lost_chains(step_size, [report[0] for report in reports] if kind == "both" else [], restartable)
        if self._some_lost:
            self._hold_lost_chains()
        self.theta, self._noise = self._noise, self.theta
        self.steps += 1
        self._info.update(step_size=step_size, temperature=temperature)
        if kind == "both":
            energy, norm = (torch.cat([r[i].reshape(-1) for r in reports]) for i in (0, 1))
            mean = float(energy[self.alive].mean()) if bool(self.alive.any()) else math.nan
            self._info.update(energy=energy, gradient_norm=norm, mean_energy=mean)

    def _find_lost_chains(self, step_size: float, energies: list[Tensor], restartable: bool) -> None:
        """:raises RuntimeError: if the new state, or the energy of the old one, is not finite in any chain."""
        finite = self._noise.isfinite().all(dim=-1)
        if energies:
            finite &= torch.cat([energy.reshape(-1) for energy in energies]).isfinite()
        lost = self.alive & ~finite.to(self.alive.device)
        if restartable:
            lost &= ~self.restarts.restart(self, lost, self._noise)
        self.alive &= ~lost
        self._some_lost = not bool(self.alive.all())
        if not bool(self.alive.any()):
            raise RuntimeError(self._why_lost(step_size))

    def _why_lost(self, step_size: float) -> str:
        what = f"every chain is lost: energy or gradient is not finite at update {self.steps} (step_size={step_size:.3g})"
        elsewhere = "check the data for values that are far out, or start elsewhere (init_strategy)"
        if not self.automatic:
            return f'{what}. Take a smaller step_size, or "auto"; {elsewhere}'
        return (
            f"{what}, after {sum(self.restarts.counts)} restarts, each with half the step. Give a smaller step_size, scale inputs and "
            f"targets to about 1, {elsewhere}"
        )

    def _hold_lost_chains(self) -> None:
        """Sets lost chains back to their last finite state, where they stay."""
        lost = (~self.alive).to(self._noise.device)
        self._noise[lost] = self.theta[lost]
        for value in self.variables.values():
            value[lost] = torch.nan_to_num(value[lost], 0.0, 0.0, 0.0)
        if "momentum" in self.variables:
            self.variables["momentum"][lost] = 0.0

    # ------------------------------------------------------------------------------------------- the update of one chunk

    def _resolve(self, kind: str, chunks: list[tuple[Any, tuple[Tensor, ...]]]) -> list[Callable]:
        key = (kind, self._learning, tuple(t.shape for t in chunks[0][1]), *autocast_state())
        if key not in self._functions:
            self._functions[key] = [self._chunk_function(kind, rows, tensors) for rows, tensors in chunks]
        return self._functions[key]

    def _chunk_function(self, kind: str, rows: Any, tensors: tuple[Tensor, ...]) -> Callable:
        theta = self.theta[rows]
        evaluate = self.potential.function(kind, theta, tensors)
        correction = None if self._anchor is None else self._anchor.correction(rows, tensors)
        update = chunk_update(kind, evaluate, correction, self.update_rule, self._learning)
        if self.potential.backend != "compile":
            return update
        key = (self.update_rule, evaluate, self._learning, theta.shape)
        compiled = None if correction is not None else self._graphs.get(key)
        if compiled is None:
            variables = {name: value[rows].clone() for name, value in self.variables.items()}
            example = (theta.clone(), torch.zeros_like(theta), self._scalar(1e-6), self._scalar(1.0), variables, *tensors)
            compiled = compile_update(update, example)
            if compiled is None:
                self.potential.backend = "graph"
                return update
            self._graphs[key] = compiled
        return compiled

    def gradient(self) -> Tensor:
        """A fresh stochastic gradient where the chains are, ``[chains, size]``."""
        batch, T = self._next_batch(), check_value(self.temperature(self.steps), "temperature", self.steps)
        gradient, _ = self.potential.evaluate("both", self.theta, batch, T)  # the graph that every run has
        return gradient if self._anchor is None else gradient + self._anchor.evaluate(self.theta, batch)

    def _scalar(self, value: float) -> Tensor:
        if value not in self._scalars:
            if len(self._scalars) > 64:  # a schedule gives a new number at every step
                self._scalars.clear()
            self._scalars[value] = torch.tensor(value, dtype=self.potential.dtype, device=self.potential.device)
        return self._scalars[value]

    # ------------------------------------------------------------------------------------------------------ end of warm-up

    def _end_warmup(self) -> None:
        noise, rule = self.noise_estimate, self.update_rule
        noise.finish(self)
        if self._warmup_samples == 0:
            rule.settle(self.variables, noise.mean().second_moment, EVALUATIONS)
        if self.automatic:
            self.step_size.finish(self)
        T, step_size = self.temperature(self.steps), self.step_size(self.steps)
        alive = {name: value[self.alive] for name, value in self.variables.items()}
        self._clamped_share = rule.check(step_size, T, alive, self.names)
        self._effective = rule.temperatures(noise.mean().variance, step_size, T, alive, self.updates_per_batch)
        self._hottest = noise.hottest(self, step_size, T)
        injected = rule.injected_temperature(noise.mean().variance, step_size, T, alive)
        self._coldest = self._by_site(injected, worst=torch.amin)

    def effective_temperatures(self) -> dict[str, float] | None:
        """The predicted temperature per site, mean over its coordinates, of the worst chain; None before the end of warm-up."""
        return None if self._effective is None else self._by_site(self._effective, worst=torch.amax)

    def _by_site(self, values: Tensor, worst: Callable[[Tensor, int], Tensor]) -> dict[str, float]:
        """Means over the coordinates of each site, of the worst chain."""
        means = site_means(values.expand(*values.shape[:-1], self.potential.size).float(), self.names)
        means = worst(means.reshape(-1, len(self.names)), 0).tolist()
        return {name: mean for (name, _), mean in zip(self.names, means, strict=True)}

    # ------------------------------------------------------------------------------------------------- for a checkpoint

    def settings(self) -> dict[str, Any]:
        """The arguments that a run depends on, as plain values."""
        schedules = {name: _schedule_name(value) for name, value in (("step_size", self.step_size), ("temperature", self.temperature))}
        return {
            "rule": named(self.update_rule),
            **schedules,
            "batch_size": self.batch_size,
            "num_steps_per_sample": self.num_steps_per_sample,
            "control_variate": self.control_variate is not None,
            **({"batch_dependent": True} if self.batch_dependent else {}),  # files from before the option go on
        }

    def reference_energy(self) -> Tensor:
        """U on a fixed minibatch, ``[2]``: where chain 0 is and at 0, since two models may agree at one point; tells one from another."""
        theta = self.theta[0]
        return torch.stack([self.potential.reference_energy(row) for row in (theta, torch.zeros_like(theta))])

    def reference(self) -> dict[str, Tensor]:
        """What the model's distributions and the user's functions are there, for :func:`pyro_advbayes.storage.reference.check`."""
        theta = self.theta[0]
        traces = [self.potential.reference_trace(row) for row in (theta, torch.zeros_like(theta))]
        return reference.of_sites(traces, {site.name for site in self.potential.sites})

    def state(self) -> dict[str, Any]:
        """Everything that the next sample depends on, random generators included: tensors and plain values."""
        auto = self.step_size if self.automatic else None
        return {
            "theta": self.theta,
            "variables": self.variables,
            "alive": self.alive,
            "divergences": self._divergences,
            "counts": [self.steps, self._samples],
            "info": self._info,
            "noise": self.noise_estimate.state(),
            "auto": None if auto is None else auto.state(),
            "restarts": self.restarts.state(),
            "steepest": self.steepest.state(),
            "settled": self._settled,
            "hottest": self._hottest,
            "coldest": self._coldest,
            "clamped": self._clamped_share,
            "effective": self._effective,
            "anchor": None if self._anchor is None else [self._anchor.anchor, self._anchor.full],
            "batches": self.potential.batches.state(),
            "probes": self.potential.probe_batches,
            "normal": self._normal.state(),
            "random": random_state(self.theta.device),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a :meth:`state`, after :meth:`setup_chains` with the same settings and data."""
        self.theta.copy_(state["theta"])
        self.variables = dict(state["variables"])
        self.alive, self._divergences = state["alive"], state["divergences"]
        self._some_lost = not bool(self.alive.all())
        self.steps, self._samples = state["counts"]
        self._info = dict(state["info"])
        self.noise_estimate.load(state["noise"])
        if state["auto"] is not None:
            self.step_size.load(state["auto"])
        self.restarts.load(state["restarts"])
        self.steepest.load(state["steepest"])
        self._settled, self._hottest, self._coldest = state["settled"], state["hottest"], state["coldest"]
        self._clamped_share = state["clamped"]
        self._effective = state["effective"]
        if self._anchor is not None:
            anchor, full = state["anchor"]
            if not torch.equal(self._anchor.anchor, anchor):
                raise ValueError("control_variate holds other values than those that the run was started with")
            self._anchor.full = full
        self.potential.probe_batches = tuple(state["probes"])
        self.potential.batches.load(state["batches"])
        self._initial_params = self._split(self.theta.clone())
        self._normal.load(state["normal"])
        set_random_state(state["random"], self.theta.device)

    # ----------------------------------------------------------------------------------------------------- rows and sites

    def _split(self, theta: Tensor) -> dict[str, Tensor]:
        params = self.potential.split(theta)
        return {name: value[0] for name, value in params.items()} if self._single else params

    def _joined(self, params: Mapping[str, Tensor]) -> Tensor:
        if self._single:
            params = {name: value.unsqueeze(0) for name, value in params.items()}
        return self.potential.join(params)


def named(value: Any) -> str:
    """A setting as a checkpoint names it: without addresses, which differ from process to process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _schedule_name(schedule: Schedule) -> str:
    """How a checkpoint names a schedule, whose values it holds too: a function or a user's object may show its address in its ``repr``."""
    while isinstance(schedule, partial):
        schedule = schedule.func
    if isinstance(schedule, (Constant, Polynomial, Cyclical, AutoStepSize)):
        return repr(schedule)
    return getattr(schedule, "__qualname__", type(schedule).__qualname__)
