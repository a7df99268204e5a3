"""Adversarial Posterior Distillation while the chains run: :class:`OnlineAPD`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from pyro_advbayes.checked import checked
from pyro_advbayes.given import check_int
from pyro_advbayes.infer.autoguide.implicit import AutoImplicit
from pyro_advbayes.infer.autoguide.rows import row_dtype
from pyro_advbayes.infer.distill.apd import APD, Codes, Fit, refuse_constant
from pyro_advbayes.infer.distill.reservoir import Reservoir
from pyro_advbayes.infer.distill.stopping import Stopping, refuse_few
from pyro_advbayes.infer.distill.training import Training
from pyro_advbayes.infer.mcmc.fingerprint import (
    KERNEL_FIELDS,
    check_fingerprint,
    data_digests,
    fingerprint,
    kernel_content,
    load_kernel,
    model_name,
    schedule_values,
)
from pyro_advbayes.infer.mcmc.kernel import SGMCMCKernel
from pyro_advbayes.infer.mcmc.threads import one_thread
from pyro_advbayes.model.loader import is_loader
from pyro_advbayes.storage import files, reference


@checked
class OnlineAPD:
    """
    Samples and distils in turn: chains feed a buffer, which is a uniform sample of all draws so far, and the generator takes a training
    step after each of their samples. Only the buffer is kept, so that memory does not grow with the length of the chains. ::

        guide = AutoImplicit(model, generator=distill.MLPGenerator(noise=100, hidden=(100, 100, 100)))
        distill.OnlineAPD(guide, SGLD(model, batch_size=100), buffer=1000).run(x, y)

    Training starts when the buffer is full. Whenever the number of draws has doubled, mean and scale (or the basis) are computed again, and
    training continues from the averaged generator with a new optimiser and critic. After the chains have ended, the preset ``"fast"``
    continues on the buffer until its distance has come down to that between two halves of the buffer; ``"paper"`` ends with the chains, or
    ``num_steps`` later.

    :param AutoImplicit guide: the guide to train.
    :param SGMCMCKernel kernel: the sampler, with the same model.
    :param int buffer: number of draws that are kept, >= the batch size.
    :param int num_samples: samples of each chain, >= 1, each of the kernel's ``num_steps_per_sample`` updates.
    :param int warmup_steps: samples to throw away first; by default ``num_samples``, as in Pyro.
    :param int num_chains: number of chains, >= 1.
    :param str preset: as in :class:`APD`.
    :param checkpoint: path of a file from which :meth:`resume` can go on; it holds the buffer, too.
    :param int checkpoint_every: samples of a chain (those of warm-up count) between checkpoints, >= 1; generator steps, once the chains
        have ended.
    :param bool overwrite: whether the checkpoint may replace an existing file.
    :param bool disable_progbar: no progress bar; there is none where the output is no terminal.
    :param changes: changes of the preset's settings; ``num_steps`` counts the steps after the chains have ended.
    :raises ValueError: naming an argument out of range.
    """

    def __init__(
        self,
        guide: AutoImplicit,
        kernel: SGMCMCKernel,
        buffer: int = 1000,
        num_samples: int = 2000,
        warmup_steps: int | None = None,
        num_chains: int = 4,
        preset: str = "fast",
        *,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 1000,
        overwrite: bool = False,
        disable_progbar: bool = False,
        **changes: Any,
    ) -> None:
        if not isinstance(kernel, SGMCMCKernel):
            raise ValueError(
                f"kernel={type(kernel).__name__}: SGLD, SGAdaLD, SGHMC, MCLMC or BAL; draws of others go to APD(guide).fit(...)"
            )
        warmup_steps = num_samples if warmup_steps is None else warmup_steps
        for name, value in {"num_samples": num_samples, "num_chains": num_chains, "buffer": buffer}.items():
            check_int(value, name, 1)
        check_int(warmup_steps, "warmup_steps", 0)
        self._fitter = APD(
            guide,
            preset,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            overwrite=overwrite,
            disable_progbar=disable_progbar,
            **changes,
        )
        guided, sampled = model_name(guide.model), model_name(kernel.model)
        if guided != sampled:
            raise ValueError(f"guide: its model is {guided!r}, and the kernel samples {sampled!r}: give both the same model")
        if buffer < self._fitter.settings.batch_size:
            raise ValueError(f"buffer={buffer}: fewer draws than batch_size={self._fitter.settings.batch_size}")
        if self._fitter.settings.check_every is not None:
            refuse_few(buffer)
        if num_samples * num_chains < buffer:
            raise ValueError(
                f"buffer={buffer}: {num_chains} chains of num_samples={num_samples} do not fill it, so that nothing would be trained"
            )
        self.guide, self.kernel, self.buffer = guide, kernel, buffer
        self.num_samples, self.warmup_steps, self.num_chains = num_samples, warmup_steps, num_chains
        self.disable_progbar = disable_progbar
        # without a stopping rule, the preset's num_steps are for draws that are complete
        self._goes_on = self._fitter.settings.check_every is not None or "num_steps" in changes

    def run(self, *args: Any, **kwargs: Any) -> Fit:
        """
        Samples and distils.

        :param args: the model's arguments, or one loader of them.
        :param kwargs: the model's keyword arguments.
        :raises ValueError: naming what in model, data or draws cannot be sampled or learned.
        :raises FileExistsError: if there is a checkpoint already.
        :raises RuntimeError: if another run writes to it, or another thread samples.
        """
        if self._fitter.checkpoint is not None:
            files.refuse_existing(self._fitter.checkpoint, self._fitter.overwrite)
        with self._fitter.held, one_thread(), poutine.block(), pyro.validation_enabled(False):
            self._set_up(args, kwargs)
            return self._go_on(_Progress(self.buffer), None, None)

    @classmethod
    def resume(
        cls, path: str | Path, guide: AutoImplicit, kernel: SGMCMCKernel, *args: Any, disable_progbar: bool = False, **kwargs: Any
    ) -> Fit:
        """
        Resumes from a checkpoint and runs to the end, with the bits of an uninterrupted run.

        :param path: the checkpoint.
        :param guide: a new guide with the same model and a generator of the same kind.
        :param kernel: a kernel with the same model and settings.
        :param args: the same data, as given to :meth:`run`.
        :raises FileNotFoundError: if there is no such file.
        :raises ValueError: if it is truncated or no checkpoint of this class, or if generator, model, kernel or data are others.
        """
        with files.Held(Path(path), existing=True) as held:
            content = files.load(Path(path), "checkpoint of OnlineAPD")
            names = ("run", "settings", "fingerprint", "reservoir", "progress", "generator reference", "random")
            kinds = {**dict.fromkeys(names, dict), **KERNEL_FIELDS}
            files.check_fields(Path(path), content, {**kinds, "training": object, "stopping": object, "generator": object})
            files.check_fields(Path(path), content["kernel"], {"theta": Tensor}, "kernel")
            files.check_fields(Path(path), content["run"], {"num_chains": int}, "run")
            theta = content["kernel"]["theta"]
            if theta.dim() != 2 or content["run"]["num_chains"] != len(theta):  # before chains are set up
                raise files.FileError(f"{path}: its number of chains is not that of its state: it is corrupt")
            with files.reading(Path(path)):
                online = cls(guide, kernel, **content["run"], **content["settings"], checkpoint=path, disable_progbar=disable_progbar)
            online._fitter.held = held
            with one_thread(), poutine.block(), pyro.validation_enabled(False):
                return online._resume_from(Path(path), content, args, kwargs)

    def _resume_from(self, path: Path, content: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Fit:
        self._set_up(args, kwargs, find_start=False)
        check_fingerprint(self._fingerprint, content["fingerprint"], path)
        load_kernel(self.kernel, content, path)
        training = stopping = None
        with files.reading(path):
            self._reservoir.load(content["reservoir"])
            at = _Progress(**content["progress"])
            self._check(at, content)
            self.guide.network.restore((content["training"] or content)["generator"])  # which determines the codes
        reference.check(self.guide.network.reference(), content["generator reference"], path)
        with files.reading(path):
            if content["training"] is not None:
                training = self._fitter.loaded(self._codes(), content["training"], self.num_samples if at.last is None else at.last)
            if at.last is not None and content["stopping"] is not None:
                stopping = self._fitter.stopping(self._codes())
                if stopping is None:
                    raise ValueError("its settings have no check_every, and it holds what decides when to stop")
                stopping.load(content["stopping"])
            files.set_random_state(content["random"], self.guide.network.like.device)
        return self._go_on(at, training, stopping)

    def _check(self, at: _Progress, content: Mapping[str, Any]) -> None:
        """:raises ValueError: if the saved progress is impossible."""
        counts = [at.next_look, at.samples, at.steps, *([] if at.last is None else [at.last])]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"its progress is {str(counts)[:100]}")
        total, seen = self.warmup_steps + self.num_samples, self._reservoir.seen
        room = self.num_samples + self._fitter.settings.num_steps
        given = self.kernel.chains.counts.samples
        if at.samples != given or given > total or (at.last or 0) > room or seen > self.num_samples * self.num_chains:
            raise ValueError(f"its progress is {str(counts)[:100]}, where its kernel has given {given} of {total} samples")
        if (content["training"] is None) != (seen < self.buffer):
            raise ValueError(f"it has seen {seen} draws of the {self.buffer} from which on it learns")

    def _set_up(self, args: Sequence[Any], kwargs: Mapping[str, Any], find_start: bool = True) -> None:
        kernel, loader = self.kernel, is_loader(args, dict(kwargs))
        scheduled = schedule_values(kernel, self.warmup_steps + self.num_samples)
        args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        kernel.setup_chains(self.num_chains, self.warmup_steps, args, kwargs, find_start)
        sites, device = self.kernel.potential.sites, self.kernel.potential.device
        self.guide.set_sites(sites, device)
        network = self.guide.network
        if not network.trainable:
            raise ValueError(f"{type(network).__name__} has nothing to train: sample first, then APD(guide).fit(samples)")
        self._reservoir = Reservoir(sites, row_dtype(sites), device, self.buffer)
        digests = None if self._fitter.checkpoint is None else data_digests(kernel, loader)
        generator = {"name": type(network).__name__, **network.settings()}
        self._fingerprint = {**fingerprint(kernel, scheduled, digests), "generator": generator, "run": self._lengths}

    @property
    def _lengths(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("buffer", "num_samples", "warmup_steps", "num_chains")}

    def _go_on(self, at: _Progress, training: Training | None, stopping: Stopping | None) -> Fit:
        """Runs to the end, from the start or from a checkpoint."""
        try:
            training = self._alternate(at, training)
        finally:
            self.kernel.cleanup()
        if at.last is None:
            stopping = self._fitter.stopping(self._codes())
            at.last = training.steps + (self._fitter.settings.num_steps if self._goes_on else 0)
        save = partial(self._save_checkpoint, at, training, stopping)
        fit = self._fitter.train(self._reservoir, training, stopping, at.last, self._reservoir.seen, self.kernel.potential, save)
        return fit._replace(steps=at.steps + fit.steps)

    def _alternate(self, at: _Progress, training: Training | None) -> Training:
        kernel, params, reservoir, fitter = self.kernel, self.kernel.initial_params, self._reservoir, self._fitter
        assert params is not None  # since the chains are set up
        total = self.warmup_steps + self.num_samples
        bar = tqdm(total=total, initial=at.samples, desc="OnlineAPD", disable=True if self.disable_progbar else None, mininterval=0.5)
        with bar:
            for i in range(at.samples, total):
                params = kernel.sample(params)
                if i >= self.warmup_steps:
                    reservoir.add(self.kernel.potential.join(params)[~torch.as_tensor(kernel.info["diverging"])])
                if reservoir.seen >= at.next_look:
                    at.steps += 0 if training is None else training.steps
                    training, at.next_look = self._restart(training), 2 * reservoir.seen
                if training is not None:
                    training.step()
                at.samples = i + 1
                if fitter.checkpoint is not None and at.samples % fitter.checkpoint_every == 0:
                    self._save_checkpoint(at, training, None)
                if not bar.disable:
                    bar.set_postfix({**kernel.logging(), "draws": reservoir.seen}, refresh=False)
                bar.update()
        if training is None:
            raise RuntimeError(f"chains were lost before they had filled the buffer: {reservoir.seen} draws of {self.buffer}")
        return training

    def _restart(self, training: Training | None) -> Training:
        """Takes mean and scale of the draws so far, and starts to train in these units."""
        if training is not None:
            training.swap()
        mean, sd = self._reservoir.moments()
        refuse_constant(self._reservoir, mean, sd)
        self.guide.network.prepare(self._reservoir, mean, sd)
        return self._fitter.training(self._codes())

    def _codes(self) -> Codes:
        return Codes(self.guide.network, self._reservoir)

    def _save_checkpoint(self, at: _Progress, training: Training | None, stopping: Stopping | None) -> None:
        kernel, fitter = self.kernel, self._fitter
        content = {
            "run": {**self._lengths, "checkpoint_every": fitter.checkpoint_every},
            "settings": {name: value for name, value in asdict(fitter.settings).items() if name != "num_steps" or self._goes_on},
            "fingerprint": self._fingerprint,
            **kernel_content(kernel),
            "reservoir": self._reservoir.state(),
            "progress": asdict(at),
            "generator": dict(self.guide.network.state_dict()) if training is None else None,
            "generator reference": self.guide.network.reference(),
            "training": None if training is None else training.state(),
            "stopping": None if stopping is None else stopping.state(),
            "random": files.random_state(self.kernel.potential.device),
        }
        fitter.held.save(content, "checkpoint of OnlineAPD")


@dataclass
class _Progress:
    """
    The progress of a run: number of draws at which mean and scale are next computed, samples of each chain, generator steps before mean and
    scale were last computed, and the number of the last step, once the chains have ended.
    """

    next_look: int
    samples: int = 0
    steps: int = 0
    last: int | None = None
