"""Base of the stochastic-gradient kernels: a Pyro ``MCMCKernel`` whose state is one flat row per chain."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_advbayes.checked import checked
from pyro_advbayes.given import WholeSignature, check_choice, check_int, refuse_unknown
from pyro_advbayes.infer.mcmc import noise_estimate, temperatures
from pyro_advbayes.infer.mcmc import step_size as auto_step
from pyro_advbayes.infer.mcmc.control_variate import ControlVariate
from pyro_advbayes.infer.mcmc.noise_estimate import EVALUATIONS, FRESH_EVALUATIONS
from pyro_advbayes.infer.mcmc.rule import Rule, Updates, has_own_steps, per_chain
from pyro_advbayes.infer.mcmc.schedules import PerChain, Schedule, as_schedule, check_value, keeps_sample, schedule_name
from pyro_advbayes.infer.mcmc.state import AutoStepSize, ChainState, Run
from pyro_advbayes.infer.mcmc.trajectory import watch_steepest
from pyro_advbayes.infer.mcmc.update import ChunkUpdates
from pyro_advbayes.model.batches import Batch
from pyro_advbayes.model.functions import BACKENDS
from pyro_advbayes.model.initialization import init_to_fan_in
from pyro_advbayes.model.loader import Loader
from pyro_advbayes.model.potential import Potential
from pyro_advbayes.storage import reference
from pyro_advbayes.storage.files import FileError, random_state, set_random_state
from pyro_advbayes.tracing.guard import KEPT, Kept


class SGMCMCKernel(MCMCKernel):
    r"""
    Base of the stochastic-gradient kernels. Works in :class:`pyro.infer.MCMC` and ``StreamingMCMC``, one chain at a time, and in
    :class:`~pyro_advbayes.SGMCMC`, where chains are rows of one state. :math:`U` is in nats over the whole data set. ``warmup_steps`` and
    ``num_samples`` of a driver count samples, each of ``num_steps_per_sample`` updates.

    :param model: a Pyro model with continuous latent sites.
    :param step_size: a number > 0, a number for each chain (MCLMC, SGHMC), a function of the update's number, or ``"auto"``: found in
        warm-up, so that discretisation and minibatch noise each change the temperature by at most ``auto_share``. Curvature (by power
        iteration on Hessian-vector products), the energy error of updates and of short trajectories, and noise bound it; in the first
        60 % of warm-up noise may double the temperature. A chain that is lost or runs away in warm-up starts again from its last good
        state with half the step, up to 10 times. ``diagnostics()`` reports the result.
    :param temperature: T, a number >= 0 or a function of the update's number; the law is :math:`p(\theta, D)^{1/T}`.
    :param int batch_size: rows of a minibatch, 1 to N; None for the full data, a plate that subsamples itself, or a loader.
    :param int num_steps_per_sample: updates between samples, >= 1.
    :param batch_args: names or positions of the arguments that hold a row per data point; guessed by default.
    :param int num_data: rows behind a loader without a known length.
    :param str backend: ``"graph"``, ``"handlers"`` or ``"compile"``; see :class:`~pyro_advbayes.Potential`.
    :param int chunk_size: chains in one call; a fixed rule by default.
    :param init_strategy: where chains start: a per-site function as in ``pyro.infer.autoguide.initialization``; use
        ``init_to_value(values=...)`` to start from trained weights.
    :param dict control_variate: site values, e.g. a MAP estimate, that anchor the gradient: the full-data gradient there plus the
        minibatch's difference from it. This has less noise near the anchor, at twice the cost of an update.
    :param float auto_share: share of T, in (0, 1), by which ``step_size="auto"`` lets discretisation and noise change it.
    :param bool batch_dependent: accepts a log-likelihood of minibatches that is not a sum over their rows; refused by default, since
        no factor takes it to the whole data set. See :class:`~pyro_advbayes.Potential`.
    :raises ValueError: naming the argument. ``setup`` raises errors of model and data, before any sampling.
    """

    rule_type: type[Rule]
    update_rule: Rule
    __signature__ = WholeSignature()
    mixes = True  # whether all chains sample one law, and must agree

    def __new__(cls, *args: Any, **options: Any) -> SGMCMCKernel:
        refuse_unknown(cls, options)
        return super().__new__(cls)

    @checked
    def __init__(
        self,
        model: Callable,
        step_size: float | str | Sequence[float] | Tensor | Schedule = "auto",
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
        check_int(num_steps_per_sample, "num_steps_per_sample", 1)
        check_choice(backend, "backend", BACKENDS)
        self.model = model
        self.temperature = as_schedule(temperature, "temperature")
        self._step_size = auto_step.as_step_size(step_size, self.update_rule, auto_share)
        self.batch_size, self.batch_args, self.num_data = batch_size, batch_args, num_data
        self.num_steps_per_sample = num_steps_per_sample
        self.backend, self.chunk_size, self.init_strategy = backend, chunk_size, init_strategy
        self.control_variate, self.batch_dependent = control_variate, batch_dependent
        self.transforms: dict[str, Any] | None = None
        self._save_params: list[str] | None = None
        self._initial_params: dict[str, Tensor] | None = None
        self._graphs: dict[Any, Callable] = Kept(KEPT)
        self._run: Run | None = None
        self._last: dict[str, Tensor] | None = None

    @classmethod
    def rule(cls, step_size: float | Schedule, num_steps: int = 1, **settings: Any) -> Updates:
        """
        The kernel's update rule by itself, for a kernel that alternates between several.

        :param step_size: a number > 0, or a function of the update's number.
        :param num_steps: updates in a row, >= 1.
        :param settings: the rule's settings, as in the kernel's own constructor.
        """
        check_int(num_steps, "num_steps", 1)
        refuse_unknown(cls.rule_type, settings)
        return Updates(cls.rule_type(**settings), as_schedule(step_size, "step_size"), num_steps)

    @property
    def step_size(self) -> Schedule:
        """The step size as a function of the update's number; for ``"auto"`` an :class:`AutoStepSize`, with what this run found."""
        auto = None if self._run is None else self._run.chains.auto
        return self._step_size if auto is None else auto

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
        return isinstance(self._step_size, AutoStepSize)

    # ------------------------------------------------------------------------------------------------------ the present run

    @property
    def run(self) -> Run:
        """
        The present run: potential, rule and state of the chains.

        :raises RuntimeError: before ``setup``, and in a copy by ``pickle``, which drops it.
        """
        if self._run is None:
            raise RuntimeError(f"{type(self).__name__} has no chains yet: call setup(...), or run(...) of a driver")
        return self._run

    @property
    def chains(self) -> ChainState:
        """The state of the chains."""
        return self.run.chains

    @property
    def potential(self) -> Potential:
        """U of the model on the data of this run."""
        return self.run.potential

    @property
    def theta(self) -> Tensor:
        """Where the chains are, ``[chains, size]``, in unconstrained space."""
        return self.chains.theta

    @property
    def variables(self) -> dict[str, Tensor]:
        """The update rule's own variables, ``[chains, size]``."""
        return self.chains.variables

    @property
    def alive(self) -> Tensor:
        """Which chains are not lost, ``[chains]``."""
        return self.chains.alive

    @property
    def steps(self) -> int:
        """Updates since the start of the run."""
        return self.chains.counts.updates

    @property
    def compile_seconds(self) -> float:
        """What ``backend="compile"`` took to compile in this run; 0 where all functions are those of an earlier one."""
        return self._updates.seconds

    @property
    def adapting(self) -> bool:
        """Whether warm-up is going on."""
        return self.run.adapting

    def __getstate__(self) -> dict[str, Any]:
        # transforms too: PyTorch's inverse transforms lose what they invert when they are pickled
        dropped = {"transforms": None, "_run": None, "_updates": None, "_last": None, "_graphs": Kept(KEPT)}
        return {**self.__dict__, **dropped}

    # ------------------------------------------------------------------------------------------------------ Pyro's protocol

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """
        Checks model and data, and finds a start, for one chain.

        :raises ValueError: naming site, plate, layer or argument, if they cannot be sampled as asked.
        """
        self.setup_chains(None, warmup_steps, args, kwargs)

    def setup_chains(
        self, num_chains: int | None, warmup_steps: int, args: Sequence[Any], kwargs: Mapping[str, Any], find_start: bool = True
    ) -> None:
        """
        :meth:`setup` for many chains: parameters then have a leading dimension ``[chains]``; None means one without it.

        :param find_start: False where :meth:`load` follows, which says where the chains are.
        """
        given = self._initial_params
        self._run = self._last = None
        self._single, self.num_chains = num_chains is None, num_chains or 1
        potential = Potential(
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
        if isinstance(potential.batches, Loader):
            potential.batches.check_lengths()  # now, and not in the middle of the run
        self.transforms = potential.transforms
        if not self.automatic:
            self.refuse_vanishing(self.step_size(0), potential.dtype)
        if not find_start:
            theta = torch.zeros(self.num_chains, potential.size, dtype=potential.dtype, device=potential.device)
        else:
            theta = potential.init() if given is None else potential.join(self._with_chains(given))
        if theta.shape != (self.num_chains, potential.size):
            raise ValueError(f"initial_params hold {len(theta)} chains: {self.num_chains} are needed")
        if given is not None:
            potential.check_start(theta)
        self._start(potential, theta, warmup_steps)
        self._initial_params = self._split(theta.clone())

    def refuse_vanishing(self, step_size: float, dtype: torch.dtype) -> None:
        """:raises ValueError: if a step size is so small that in the state's dtype nothing would move."""
        if float(torch.tensor(self.update_rule.leapfrog_step(step_size, 1.0, {}) ** 2 / 2.0, dtype=dtype)) == 0.0:
            raise ValueError(f"step_size={step_size:.3g}: updates so small are 0 in {dtype}: take a larger one")

    def _potential_options(self) -> dict[str, Any]:
        """Further arguments of the potential."""
        return {}

    def _start(self, potential: Potential, theta: Tensor, warmup_samples: int) -> None:
        auto = AutoStepSize(self._step_size.share) if isinstance(self._step_size, AutoStepSize) else None
        chains = self._start_state(theta, auto)
        if isinstance(self._step_size, PerChain) or (auto is not None and has_own_steps(self.update_rule)):
            chains.variables |= per_chain(theta)
        if isinstance(self._step_size, PerChain):
            self._step_size.write(chains.variables["relative_step"])
        anchor = None if self.control_variate is None else ControlVariate(potential, self.control_variate)
        self._updates = ChunkUpdates(self._step_size if auto is None else auto, self.num_steps_per_sample - 1, anchor, self._graphs)
        updates = warmup_samples * self.updates_per_sample
        self._run = Run(
            potential, self.update_rule, self.temperature, chains, self.gradient, warmup_samples, updates, self.updates_per_batch
        )

    def _start_state(self, theta: Tensor, auto: AutoStepSize | None) -> ChainState:
        return ChainState.start(theta, self.update_rule, auto)

    def cleanup(self) -> None:
        """Forgets the start, so that the next chain finds its own. May be called twice."""
        self._initial_params = None

    @property
    def initial_params(self) -> dict[str, Tensor] | None:
        """Where the chains start, by site, in unconstrained space."""
        return self._initial_params

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor] | None) -> None:
        self._initial_params = params

    @property
    def save_params(self) -> list[str]:
        """
        Sites that Pyro's driver saves. Sorted, whatever was given: Pyro 1.9 writes them in the given order and reads them in
        sorted order, and would swap samples between sites.
        """
        return sorted(self._initial_params or ()) if self._save_params is None else self._save_params

    @save_params.setter
    def save_params(self, names: Sequence[str]) -> None:
        self._save_params = sorted(names)

    def logging(self) -> dict[str, str]:
        """Text for the progress bar."""
        info, alive = self.chains.info, self.alive
        energy = float(info["energy"][alive].mean()) if "energy" in info else math.nan
        lost = {} if bool(alive.all()) else {"divergences": str(int((~alive).sum()))}
        return {"step size": f"{info.get('step_size', math.nan):.2e}", "energy": f"{energy:.4e}", **lost}

    def diagnostics(self) -> dict[str, Any]:
        """
        :return: ``"divergences"``, numbers of the samples at which the chain was lost (a list per chain in
            :class:`~pyro_advbayes.SGMCMC`); ``"step size"``; ``"T_eff"``, the predicted temperature per site with minibatch noise at the
            end of warm-up, mean over its coordinates, of the worst chain: an upper bound with shuffled epochs, which take back the
            noise along all slow directions; ``"T_eff epochs"``, the temperature if nothing is left of that noise; ``"T_eff direction"``,
            that along the direction in which noise heats most, of the worst of up to four chains; ``"clamped"``, the share of coordinates
            where the rule was clamped; ``"restarts"``, of each chain in warm-up; ``"step fell"``, by what factor ``"auto"`` made the step
            smaller when noise was held to its share; of each chain ``"step sizes"``, where it has its own, and ``"energy error"``.
        """
        chains, step = self.chains, self.chains.info.get("step_size")
        ratios, error = (chains.variables.get(name) for name in ("relative_step", "energy_error"))
        return {
            "divergences": chains.divergences[0] if self._single else chains.divergences,
            "step size": step,
            "step sizes": None if ratios is None or step is None else (step * ratios).flatten().tolist(),
            "T_eff": self.effective_temperatures(),
            "T_eff direction": chains.hottest,
            "T_eff epochs": chains.coldest,
            "clamped": chains.clamped,
            "restarts": chains.restarts.counts[0] if self._single else list(chains.restarts.counts),
            "step fell": None if chains.auto is None else chains.auto.fell,
            "energy error": None if error is None or not bool(error.any()) else error.flatten().tolist(),
        }

    # ------------------------------------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """
        The next sample: ``num_steps_per_sample`` updates, and more where a schedule keeps none in the hot part of its cycle.

        :param params: unconstrained values by site; only the last sample's may be a part of a larger run.
        :return: unconstrained values by site, detached.
        :raises RuntimeError: if every chain is lost.
        """
        run, chains, counts, rule = self.run, self.chains, self.chains.counts, self.update_rule
        if params is not self._last:
            chains.theta.copy_(run.potential.join(self._with_chains(params)))
        if counts.samples == run.warmup_samples:
            self._end_warmup()
        elif not chains.settled and 2 * counts.samples >= run.warmup_samples:
            chains.settled = True
            if "moment" in rule.learns:
                rule.settle(chains.variables, noise_estimate.fresh(run).second_moment, FRESH_EVALUATIONS)
        schedules = (self.step_size, self.temperature)
        left = self.num_steps_per_sample - 1
        while left > 0:
            left -= self._iterations(left)
        self._iterate("both")
        while not (self.adapting or keeps_sample(schedules, counts.updates - 1)):
            self._iterate("both")
        counts.samples += 1
        kept = counts.samples - run.warmup_samples - 1
        if kept >= 0:
            for chain in (~chains.alive).nonzero().flatten().tolist():
                chains.divergences[chain].append(kept)
            if self.mixes:  # the buffer holds where the last update started, and its gradient was taken
                watch_steepest(chains.steepest, chains.buffer, chains.info["gradient_norm"])
        self._last = self._split(chains.theta.clone())
        return self._last

    @property
    def info(self) -> dict[str, Tensor | float]:
        """
        Of the last update: ``"energy"`` ``[chains]`` (the minibatch estimate of U, in nats, where the update started),
        ``"gradient_norm"`` and ``"diverging"`` ``[chains]``, ``"step_size"``, ``"temperature"``.
        """
        return {**self.chains.info, "diverging": ~self.alive}

    def extra_shapes(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shapes, of one chain, and dtypes of :meth:`extras`."""
        return {}

    def extras(self) -> dict[str, Tensor]:
        """Further values to keep with a sample, ``[chains, ...]``."""
        return {}

    def _iterations(self, most: int) -> int:
        """Up to ``most`` steps of a sample, without a report; how many they were."""
        done = self._updates.updates(self.run, most)
        if done == 0:
            self._iterate("gradient")
        return done or 1

    def _iterate(self, kind: str) -> None:
        """One of the ``num_steps_per_sample`` steps of a sample."""
        self._updates.update(self.run, kind, self._next_batch())

    def _next_batch(self) -> Batch:
        return self.potential.batches.next()

    def gradient(self) -> Tensor:
        """A fresh stochastic gradient where the chains are, ``[chains, size]``."""
        batch, T = self._next_batch(), check_value(self.run.T, "temperature", self.steps)
        gradient, _ = self.potential.evaluate("both", self.theta, batch, T)  # the graph that every run has
        anchor = self._updates.anchor
        return gradient if anchor is None else gradient + anchor.evaluate(self.theta, batch)

    def _end_warmup(self) -> None:
        run, chains, rule = self.run, self.chains, self.update_rule
        noise_estimate.finish(run)
        if run.warmup_samples == 0:
            rule.settle(chains.variables, chains.noise.second_moment, EVALUATIONS)
        if chains.auto is not None:
            auto_step.finish(run, chains.auto)
        temperatures.predict(run, self.step_size(self.steps))

    def effective_temperatures(self) -> dict[str, float] | None:
        """
        The predicted temperature per site, mean over its coordinates, of the worst chain; None before the end of warm-up, and where the
        rule does not predict it.
        """
        effective = self.chains.effective
        return None if effective is None else temperatures.by_site(self.run, effective, worst=torch.amax)

    # ------------------------------------------------------------------------------------------------- for a checkpoint

    def settings(self) -> dict[str, Any]:
        """The arguments that a run depends on, as plain values."""
        return {
            "rule": named(self.update_rule),
            "step_size": repr(self._step_size) if self.automatic else schedule_name(self._step_size),
            "temperature": schedule_name(self.temperature),
            "batch_size": self.batch_size,
            "num_steps_per_sample": self.num_steps_per_sample,
            "control_variate": self.control_variate is not None,
            **({"batch_dependent": True} if self.batch_dependent else {}),  # files from before the option stay readable
        }

    def reference_energy(self) -> Tensor:
        """U on a fixed minibatch at chain 0 and at theta = 0, ``[2]``. Detects a checkpoint of another model."""
        theta = self.theta[0]
        return torch.stack([self.potential.reference_energy(row) for row in (theta, torch.zeros_like(theta))])

    def reference(self) -> dict[str, Tensor]:
        """Values of the model's distributions and the user's functions there, for :func:`pyro_advbayes.storage.reference.check`."""
        theta = self.theta[0]
        traces = [self.potential.reference_trace(row) for row in (theta, torch.zeros_like(theta))]
        return reference.of_sites(traces, {site.name for site in self.potential.sites})

    def state(self) -> dict[str, Any]:
        """Everything that the next sample depends on, random generators included: tensors and plain values."""
        anchor, potential = self._updates.anchor, self.potential
        return {
            **self.chains.content(),
            "anchor": None if anchor is None else [anchor.anchor, anchor.full],
            "batches": potential.batches.state(),
            "probes": potential.probe_batches,
            "random": random_state(self.theta.device),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """
        Continues from a :meth:`state`, after :meth:`setup_chains` with the same settings and data.

        :raises LookupError, TypeError, ValueError: if it is not that of chains like these.
        """
        self.chains.load(state)
        anchor = self._updates.anchor
        if anchor is not None:
            values, full = state["anchor"]
            if not torch.equal(anchor.anchor, values):
                raise FileError("control_variate holds other values than those that the run was started with")
            anchor.full = full
        self.potential.probe_batches = tuple(state["probes"])
        self.potential.batches.load(state["batches"])
        self._initial_params = self._split(self.theta.clone())
        set_random_state(state["random"], self.theta.device)

    # ----------------------------------------------------------------------------------------------------- rows and sites

    def _split(self, theta: Tensor) -> dict[str, Tensor]:
        params = self.potential.split(theta)
        return {name: value[0] for name, value in params.items()} if self._single else params

    def _with_chains(self, params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: value.unsqueeze(0) for name, value in params.items()} if self._single else params


def named(value: Any) -> str:
    """A setting as a checkpoint names it: without addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
