"""Many chains as rows of one state, in one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.mcmc.api import AbstractMCMC
from pyro.infer.mcmc.util import select_samples
from torch import Tensor
from tqdm.auto import tqdm

from pyro_advbayes.checked import checked
from pyro_advbayes.given import check_int, warn
from pyro_advbayes.infer.mcmc import summary
from pyro_advbayes.infer.mcmc.assessment import Assessment, Finished, SamplingWarning, assess
from pyro_advbayes.infer.mcmc.fingerprint import (
    KERNEL_FIELDS,
    check_fingerprint,
    data_digests,
    fingerprint,
    kernel_content,
    load_kernel,
    schedule_values,
)
from pyro_advbayes.infer.mcmc.kernel import SGMCMCKernel
from pyro_advbayes.infer.mcmc.threads import one_thread
from pyro_advbayes.model.loader import is_loader
from pyro_advbayes.storage import files
from pyro_advbayes.storage.draws import PREFIXES, Field, FileDraws, MemoryDraws, refuse_name

STATISTICS = ("energy", "step_size", "temperature", "gradient_norm", "diverging")
_PREFIX, _EXTRA = PREFIXES
_KIND = "checkpoint of SGMCMC"


@checked
class SGMCMC(AbstractMCMC):
    """
    Runs a stochastic-gradient kernel. Like :class:`pyro.infer.MCMC`, but chains are rows of one state instead of processes, and samples
    may go to a file.

    Example::

        mcmc = SGMCMC(SGLD(model, batch_size=100), num_samples=200, warmup_steps=1000, num_chains=4)
        mcmc.run(x, y)
        mcmc.summary(x_test)
        samples = mcmc.get_samples()

    Only one thread of a process may run at a time, since threads share Pyro's effect handlers; a second one is refused.

    :param SGMCMCKernel kernel: the kernel.
    :param int num_samples: samples to keep per chain, >= 1; each takes the kernel's ``num_steps_per_sample`` updates.
    :param int warmup_steps: samples to throw away first; by default ``num_samples``, as in Pyro.
    :param int num_chains: number of chains, >= 1.
    :param dict initial_params: where the chains start, ``[chains, *shape]`` by site, in unconstrained space.
    :param hook_fn: called as ``hook_fn(kernel, params, stage, i)`` after every sample, with ``stage`` ``"Warmup"`` or ``"Sample"`` and
        unconstrained, detached ``params`` ``[chains, *shape]``.
    :param bool disable_progbar: no progress bar; there is none if the output is no terminal.
    :param draws: path of a file for the samples; None keeps them in memory, or beside the checkpoint if there is one.
    :param draws_dtype: keep samples as ``torch.float16`` or ``torch.bfloat16``; None keeps the sites' own dtypes.
    :param checkpoint: path of a file from which :meth:`resume` can go on.
    :param int checkpoint_every: samples between checkpoints, >= 1; those of warm-up count.
    :param bool overwrite: whether the files may replace existing ones.
    :raises ValueError: naming an argument out of range.
    :raises FileExistsError: at ``run``, before any sampling, if a file exists. Other bad paths (no folder, a directory, a dangling link, a
        file in use by another run) are refused there, too.
    """

    def __init__(
        self,
        kernel: SGMCMCKernel,
        num_samples: int,
        warmup_steps: int | None = None,
        num_chains: int = 1,
        *,
        initial_params: Mapping[str, Tensor] | None = None,
        hook_fn: Callable | None = None,
        disable_progbar: bool = False,
        draws: str | Path | None = None,
        draws_dtype: torch.dtype | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 100,
        overwrite: bool = False,
    ) -> None:
        warmup_steps = num_samples if warmup_steps is None else warmup_steps
        counts = {"num_samples": (num_samples, 1), "warmup_steps": (warmup_steps, 0), "num_chains": (num_chains, 1)}
        counts["checkpoint_every"] = (checkpoint_every, 1)
        for name, (value, least) in counts.items():
            check_int(value, name, least)
        if not isinstance(kernel, SGMCMCKernel):
            raise ValueError(
                f"kernel={type(kernel).__name__}: SGLD, SGAdaLD, SGHMC, MCLMC or BAL; for Pyro's own kernels use pyro.infer.MCMC"
            )
        if draws_dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"draws_dtype={draws_dtype}: a floating-point dtype")
        self._left_out: list[int] = []
        self.from_loader = False  # whether the last run's data came from a loader
        super().__init__(kernel, num_chains, transforms=None)
        self.num_samples, self.warmup_steps = num_samples, warmup_steps
        self.hook_fn, self.disable_progbar = hook_fn, disable_progbar
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.checkpoint_every, self.overwrite, self.draws_dtype = checkpoint_every, overwrite, draws_dtype
        if draws is None and self.checkpoint is not None:
            # with_suffix would give the checkpoints lr0.1 and lr0.2 one file
            draws = self.checkpoint.with_name(self.checkpoint.name.removesuffix(".safetensors") + ".draws.safetensors")
        self.draws_path = None if draws is None else Path(draws)
        self._refuse_one_file()
        self._initial = initial_params
        self._draws: MemoryDraws | FileDraws | None = None
        self._assessment = Assessment()
        self._held = files.Held(self.checkpoint)
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}

    def _refuse_one_file(self) -> None:
        """Follows links: two names may be one file."""
        paths = self.draws_path, self.checkpoint
        if paths[0] is not None and paths[1] is not None and os.path.realpath(paths[0]) == os.path.realpath(paths[1]):
            raise ValueError(f"draws={str(self.draws_path)!r} is the path of the checkpoint too: they are two files")

    @property
    def num_chains(self) -> int:
        """Number of chains; after a run without the lost ones, which are in no result."""
        return self._asked_chains - len(self._left_out)

    @num_chains.setter
    def num_chains(self, value: int) -> None:
        self._asked_chains = value

    # ------------------------------------------------------------------------------------------------------------- running

    def run(self, *args: Any, **kwargs: Any) -> None:
        """
        Runs warm-up and sampling. Warns at the end (:class:`SamplingWarning`) if the draws are not from the posterior, or not yet.

        :param args: the model's arguments, or one loader of them.
        :param kwargs: the model's keyword arguments.
        :raises OSError: if the disk becomes full; says how many draws are safe.
        :raises RuntimeError: if another run writes to the files, or another thread samples.
        """
        self._left_out, self._draws = [], None
        if self.checkpoint is not None:
            files.refuse_existing(self.checkpoint, self.overwrite)
        if self.draws_path is not None:
            files.refuse_existing(self.draws_path, self.overwrite)
            self._refuse_one_file()
            with files.unused(self.draws_path):
                pass  # before the model is looked at
        with files.Held(self.checkpoint) as self._held, one_thread(), poutine.block(), pyro.validation_enabled(False):
            self._setup(args, kwargs)
            if self.draws_path is not None and self.checkpoint is not None:
                # an old checkpoint would be resumed with the draws of this run
                with files.unused(self.draws_path):
                    self._held.remove()
            self._sample(0)
        self._warn()

    @classmethod
    @checked
    def resume(
        cls,
        path: str | Path,
        kernel: SGMCMCKernel,
        *args: Any,
        hook_fn: Callable | None = None,
        disable_progbar: bool = False,
        **kwargs: Any,
    ) -> SGMCMC:
        """
        Continues from a checkpoint to the end. The samples are those of an uninterrupted run, bit for bit.

        :param path: the checkpoint.
        :param kernel: a kernel with the same model and settings.
        :param args: the same data, as given to :meth:`run`.
        :return: the finished runner.
        :raises FileNotFoundError: if checkpoint or draws are missing.
        :raises ValueError: if the file is truncated, corrupt, of another version or kind, or if model, kernel or data differ; says what
            differs. Priors, likelihoods and functions are compared by their values on fixed inputs, a loader by its first 16 batches (or
            16 MiB) from a fixed random state; the start of a run warns of a loader whose batches then differ every time.
        :raises RuntimeError: if another run writes to the files, or another thread samples.
        """
        with files.Held(Path(path), existing=True) as held:
            content = files.load(Path(path), _KIND)
            files.check_fields(Path(path), content, {"runner": dict, "fingerprint": dict, **KERNEL_FIELDS})
            settings = content["runner"]
            _check_content(Path(path), settings, content["kernel"])
            dtype = settings.pop("draws_dtype")
            draws = Path(path).parent / settings.pop("draws")
            mcmc = cls(
                kernel,
                **settings,
                hook_fn=hook_fn,
                disable_progbar=disable_progbar,
                checkpoint=path,
                draws=draws,
                draws_dtype=None if dtype is None else getattr(torch, dtype),
            )
            mcmc._held = held
            with one_thread(), poutine.block(), pyro.validation_enabled(False):
                mcmc._resume_from(Path(path), draws, content, args, kwargs)
        mcmc._warn()
        return mcmc

    def _resume_from(self, path: Path, draws: Path, content: dict[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._setup(args, kwargs, find_start=False)
        check_fingerprint(self._fingerprint(), content["fingerprint"], path)
        load_kernel(self.kernel, content, path)
        done = self.kernel.chains.counts.samples
        if not draws.is_file():
            raise FileNotFoundError(f"{draws}: the draws that belong to {path} are missing, or are no file")
        self._sample(done, resume=max(0, done - self.warmup_steps))

    def _setup(self, args: Sequence[Any], kwargs: Mapping[str, Any], find_start: bool = True) -> None:
        self.kernel.initial_params = None if self._initial is None else dict(self._initial)
        self._scheduled = schedule_values(self.kernel, self.warmup_steps + self.num_samples)
        args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        self.kernel.setup_chains(self._asked_chains, self.warmup_steps, args, kwargs, find_start)
        if "step_size" in self._scheduled:
            self.kernel.refuse_vanishing(min(self._scheduled["step_size"]), self.kernel.potential.dtype)
        for site in self._sites:
            refuse_name(site.name)
        # ArviZ runs the model on these; a loader's first batch stands for it
        self.from_loader = is_loader(args, dict(kwargs))
        self._args, self._kwargs = (self.kernel.potential.batches.example if self.from_loader else args), dict(kwargs)
        self._data = None if self.checkpoint is None else data_digests(self.kernel, self.from_loader)

    def _new_draws(self, resume: int | None = None) -> MemoryDraws | FileDraws:
        fields = {s.name: Field(s.shape, self.draws_dtype or s.dtype) for s in self.kernel.potential.sites}
        for name in STATISTICS:
            dtype = torch.bool if name == "diverging" else torch.float64
            fields[_PREFIX + name] = Field(torch.Size(), dtype)
        for name, (shape, dtype) in self.kernel.extra_shapes().items():
            fields[_EXTRA + name] = Field(shape, dtype)
        if self.draws_path is None:
            return MemoryDraws(fields, self._asked_chains, self.num_samples)
        return FileDraws(self.draws_path, fields, self._asked_chains, self.num_samples, self.overwrite, resume)

    def _sample(self, done: int, resume: int | None = None) -> None:
        """
        :param done: number of samples taken before, warm-up included.
        :param resume: number of draws to keep in their file; None makes a new one.
        """
        kernel = self.kernel
        try:
            self._draws = draws = self._new_draws(resume)
            self._loop(draws, kernel.initial_params, done)
        finally:  # an interrupted run can be inspected
            try:
                if self._draws is not None:
                    self._draws.close()
            finally:
                self._diagnostics = kernel.diagnostics()
                self._left_out = (~kernel.alive).nonzero().flatten().tolist() if bool(kernel.alive.any()) else []
                self.transforms = kernel.transforms
                kernel.cleanup()

    def _loop(self, draws: MemoryDraws | FileDraws, params: dict[str, Tensor], done: int) -> None:
        total, kernel = self.warmup_steps + self.num_samples, self.kernel
        with tqdm(total=total, initial=done, disable=True if self.disable_progbar else None, mininterval=0.5) as bar:
            for i in range(done, total):
                params = kernel.sample(params)
                warmup = i < self.warmup_steps
                stage, place = ("Warmup", i) if warmup else ("Sample", i - self.warmup_steps)
                if not warmup:
                    draws.append(self._sample_values())
                if self.hook_fn is not None:
                    self.hook_fn(kernel, params, stage, place)
                if (i + 1) % self.checkpoint_every == 0:
                    self._save_checkpoint()
                if not bar.disable:
                    self._show(bar, stage)
                bar.update()
        self._save_checkpoint()

    def _warn(self) -> None:
        """Assesses the draws, and says in one warning what is wrong with them."""
        self._assessment = assess(self.finished())
        if self._assessment.findings:
            warn(SamplingWarning(self._assessment.text()))

    def finished(self) -> Finished:
        """The finished run, to be assessed."""
        counts = self.num_samples, self.warmup_steps, self._asked_chains
        samples = partial(self.get_samples, group_by_chain=True)
        return Finished(self.kernel, *counts, self._left_out, self._diagnostics, self.sample_stats(), samples)

    def _show(self, bar: tqdm, stage: str) -> None:
        bar.set_description(stage, refresh=False)
        rate = bar.format_dict["rate"]
        speed = {} if rate is None else {"steps/s": f"{rate * self.kernel.updates_per_sample:.0f}"}
        bar.set_postfix({**self.kernel.logging(), **speed}, refresh=False)

    def _sample_values(self) -> dict[str, Tensor]:
        """The last sample in the model's own space, with its statistics and the kernel's extras."""
        kernel = self.kernel
        values = kernel.potential.constrain(kernel.theta)
        for name in STATISTICS:
            value = kernel.info[name]
            value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            values[_PREFIX + name] = value.expand(self._asked_chains) if value.dim() == 0 else value
        return values | {_EXTRA + name: value for name, value in kernel.extras().items()}

    # ------------------------------------------------------------------------------------------------- checkpoints

    def _save_checkpoint(self) -> None:
        """Writes a checkpoint, if there is a path for it."""
        if self.checkpoint is None or not isinstance(self._draws, FileDraws):
            return
        self._draws.flush()
        folder, draws = self.checkpoint.parent.resolve(), self._draws.path.resolve()
        content = {
            "runner": {
                "num_samples": self.num_samples,
                "warmup_steps": self.warmup_steps,
                "num_chains": self._asked_chains,
                "checkpoint_every": self.checkpoint_every,
                "draws": str(draws.relative_to(folder) if draws.is_relative_to(folder) else draws),
                "draws_dtype": None if self.draws_dtype is None else str(self.draws_dtype).removeprefix("torch."),
            },
            "fingerprint": self._fingerprint(),
            **kernel_content(self.kernel),
        }
        self._held.save(content, _KIND)

    def _fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.kernel, self._scheduled, self._data)

    # ------------------------------------------------------------------------------------------------------- what came out

    @checked
    def get_samples(self, num_samples: int | None = None, group_by_chain: bool = False, *, lost_chains: bool = False) -> dict[str, Tensor]:
        """
        Samples by site, in the model's own space and dtypes. Lost chains are left out, here and in all other results; the others keep
        their order.

        :param num_samples: as in Pyro, draw this many with replacement; None takes them all.
        :param group_by_chain: shape ``[chains, draws, *shape]`` instead of ``[chains * draws, *shape]``.
        :param lost_chains: whether to include lost chains, which stay at their last finite state.
        """
        samples = {name: value for name, value in self._kept(lost_chains).items() if not name.startswith((_PREFIX, _EXTRA))}
        if self.draws_dtype is not None:
            samples = {site.name: samples[site.name].to(site.dtype) for site in self._sites}
        return select_samples(samples, num_samples, group_by_chain)

    def sample_stats(self) -> dict[str, Tensor]:
        """
        ``[chains, draws]`` of ``"energy"`` (the minibatch estimate of U in nats, where the sample's last update started),
        ``"gradient_norm"``, ``"step_size"``, ``"temperature"`` and ``"diverging"``.
        """
        return {name.removeprefix(_PREFIX): value for name, value in self._kept().items() if name.startswith(_PREFIX)}

    @checked
    def get_extras(self, group_by_chain: bool = False) -> dict[str, Tensor]:
        """
        What the kernel keeps with every sample beside the sites. For :class:`~pyro_advbayes.BAL`: the perturbed inputs of the rows in
        ``keep``, ``{perturb: [chains * draws, rows * copies, ...]}``.

        :param group_by_chain: shape ``[chains, draws, ...]``.
        """
        extras = {name.removeprefix(_EXTRA): value for name, value in self._kept().items() if name.startswith(_EXTRA)}
        return select_samples(extras, None, group_by_chain)

    def _kept(self, lost_chains: bool = False) -> dict[str, Tensor]:
        if self._draws is None:
            raise RuntimeError("there are no samples yet: call run(...) first")
        draws = self._draws.get()
        if lost_chains or not self._left_out:
            return draws
        good = [chain for chain in range(self._asked_chains) if chain not in self._left_out]
        return {name: value[good] for name, value in draws.items()}

    @property
    def _sites(self) -> Sequence[Any]:
        return self.kernel.potential.sites

    @checked
    def diagnostics(self, *args: Any, max_elements: int = 100, **kwargs: Any) -> dict[str, Any]:
        """
        Diagnostics of the run and of its draws:

        - ``"sites"``: ``{site: {"n_eff", "r_hat"}}``, with rank-normalised split R-hat, NaN where nothing moved. ``diagnostics()[site]``
          is the same, as in Pyro.
        - ``"predictions"``: the same for the model's return values at the given inputs, if there are any.
        - ``"drift"``: whether the kept energies are stationary: ``"shift"``, how far the first of them lie above the last half, in
          standard deviations, ``"z"``, the same in standard errors, and the means ``"first"`` and ``"last"``; None for fewer than 20
          draws and for schedules.
        - ``"divergences"``: ``{chain: numbers of the samples at which it was lost}`` for the chains that are kept, as ArviZ reads it;
          ``"lost"``: the same for the chains that are left out.
        - those of the kernel: ``"T_eff"``, ``"T_eff direction"``, ``"T_eff epochs"``, ``"step size"``, ``"step fell"``, ``"restarts"``,
          ``"clamped"``.
        - ``"warnings"``: the run's warnings, a list of sentences.

        :param args: inputs, as the model takes them.
        :param kwargs: inputs by name.
        :param max_elements: number of evenly spaced elements to use from a larger site or output.
        """
        samples = self.get_samples(group_by_chain=True)
        result: dict[str, Any] = Diagnostics(sites=summary.by_site(samples, max_elements))
        if args or kwargs:
            values = summary.function_values(self.kernel.model, self.get_samples(), self.num_chains, args, kwargs)
            result["predictions"] = summary.by_site({"f": values}, max_elements)["f"]
        width = len(str(self._asked_chains - 1))  # ArviZ sorts these labels as strings
        chains = {f"chain {c:0{width}d}": rows for c, rows in enumerate(self._diagnostics["divergences"])}
        lost = {f"chain {c:0{width}d}" for c in self._left_out}
        result |= {**self._diagnostics, "drift": self._assessment.drift, "warnings": list(self._assessment.findings)}
        result["divergences"] = {name: rows for name, rows in chains.items() if name not in lost}
        result["lost"] = {name: rows for name, rows in chains.items() if name in lost}
        return result

    @checked
    def summary(self, *args: Any, sites: Sequence[str] | None = None, prob: float = 0.9, max_elements: int = 8, **kwargs: Any) -> None:
        """
        Prints a table of mean, standard deviation, median, an interval, ``n_eff`` and ``r_hat``; and the scores of the deep ensemble that
        the chains started from (:func:`~pyro_advbayes.ensemble_start`; not after a resume).

        :param args: inputs, as the model takes them. The table then shows the model's return values there, in which the chains of a
            network can be compared; without inputs it shows the sites' elements.
        :param sites: which sites; by default all.
        :param prob: probability of the central interval.
        :param max_elements: number of evenly spaced elements to show from a larger site or output.
        """
        samples = self.get_samples(group_by_chain=True)
        if args or kwargs:
            samples = {"f": summary.function_values(self.kernel.model, self.get_samples(), self.num_chains, args, kwargs)}
        elif sites is not None:
            unknown = sorted(set(sites) - set(samples))
            if unknown:
                raise ValueError(f"sites: {unknown[0]!r} is not among {sorted(samples)}")
            samples = {name: samples[name] for name in sites}
        print(summary.table(samples, prob, max_elements))
        drift = self._assessment.drift
        if drift is not None:
            print(f"\nenergy: first draws {drift['first']:.4g}, last half {drift['last']:.4g}, drift z {drift['z']:.1f}")
        if description := getattr(self._initial, "description", None):  # of an EnsembleStart
            print(f"\nstarted from: {description}")
        print(f"\nchains lost: {len(self._left_out)} of {self._asked_chains}")
        for finding in self._assessment.findings:
            print(f"warning: {finding}")


def _check_content(path: Path, settings: Any, kernel: Any) -> None:
    """:raises ValueError: naming a senseless value in a checkpoint, before chains are set up."""
    counts = {"num_samples": int, "warmup_steps": int, "num_chains": int, "checkpoint_every": int}
    files.check_fields(path, settings, {**counts, "draws": str, "draws_dtype": (str, type(None))}, "settings")
    files.check_fields(path, kernel, {"theta": Tensor, "counts": list}, "kernel")
    total, done = settings["warmup_steps"] + settings["num_samples"], kernel["counts"]
    if 0 in (settings["num_samples"], settings["num_chains"], settings["checkpoint_every"]):
        raise files.FileError(f"{path}: its settings have a count that is 0: it is corrupt")
    if settings["draws_dtype"] not in (None, "float16", "bfloat16", "float32", "float64"):
        raise files.FileError(f"{path}: its draws_dtype is {settings['draws_dtype'][:100]!r}: it is corrupt")
    if kernel["theta"].dim() != 2 or settings["num_chains"] != len(kernel["theta"]):
        raise files.FileError(f"{path}: its num_chains={settings['num_chains']} is not that of its state: it is corrupt")
    if len(done) != 2 or not all(type(count) is int and count >= 0 for count in done) or done[1] > total:
        raise files.FileError(f"{path}: the counts of its kernel are {str(done)[:100]}, of {total} samples: it is corrupt")


class Diagnostics(dict):
    """A dict where a site's name is short for ``["sites"][name]``, as in the diagnostics of Pyro's ``MCMC``."""

    def __missing__(self, name: str) -> Any:
        return self["sites"][name]
