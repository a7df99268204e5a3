"""Adversarial Posterior Distillation while the chains run: :class:`OnlineAPD`."""

from __future__ import annotations

from typing import Any

import pyro
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from pyro_advbayes.infer.autoguide.implicit import AutoImplicit
from pyro_advbayes.infer.autoguide.rows import row_dtype
from pyro_advbayes.infer.distill.apd import APD, Codes, Fit, refuse_constant
from pyro_advbayes.infer.distill.reservoir import Reservoir
from pyro_advbayes.infer.distill.training import Training
from pyro_advbayes.infer.mcmc.kernel import SGMCMCKernel


class OnlineAPD:
    """
    Sampling and distilling in turn: chains give draws to a buffer, a uniform sample of all so far, and the generator learns from it
    between two samples of theirs. No draw is kept beside the buffer's, so that memory does not grow with the chains. ::

        guide = AutoImplicit(model, generator=distill.MLPGenerator(noise=100, hidden=(100, 100, 100)))
        distill.OnlineAPD(guide, SGLD(model, batch_size=100), buffer=1000).run(x, y)

    The generator begins to learn when the buffer is full, and takes mean and scale (or the basis) of the draws anew whenever twice as
    many have been seen; each time its training goes on from the averaged generator with a new optimiser and critic. When the chains have
    ended, the preset ``"fast"`` goes on with what is in the buffer, until it is as near to it as two halves of it to each other.

    :param AutoImplicit guide: what is trained.
    :param SGMCMCKernel kernel: what samples, with the same model.
    :param int buffer: draws that are kept, >= the batch size.
    :param int num_samples: samples of each chain, >= 1, each of the kernel's ``num_steps_per_sample`` updates.
    :param int warmup_steps: samples to throw away first; by default ``num_samples``, as in Pyro.
    :param int num_chains: number of chains, >= 1.
    :param int steps_per_sample: generator steps between two samples, >= 1.
    :param str preset: as in :class:`APD`.
    :param bool disable_progbar: no progress bar; there is none where the output is no terminal.
    :param changes: settings that differ from the preset's; ``num_steps`` counts those after the chains have ended.
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
        steps_per_sample: int = 1,
        preset: str = "fast",
        *,
        disable_progbar: bool = False,
        **changes: Any,
    ) -> None:
        if not isinstance(kernel, SGMCMCKernel):
            raise ValueError(f"kernel={type(kernel).__name__}: SGLD, SGAdaLD, SGHMC or BAL; draws of others go to APD(guide).fit(...)")
        warmup_steps = num_samples if warmup_steps is None else warmup_steps
        counts = {"num_samples": num_samples, "num_chains": num_chains, "steps_per_sample": steps_per_sample, "buffer": buffer}
        for name, value in {**counts, "warmup_steps": warmup_steps}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < (name != "warmup_steps"):
                raise ValueError(f"{name}={value!r}: an int >= {int(name != 'warmup_steps')}")
        self._fitter = APD(guide, preset, disable_progbar=disable_progbar, **changes)
        if buffer < self._fitter.settings.batch_size:
            raise ValueError(f"buffer={buffer}: fewer draws than batch_size={self._fitter.settings.batch_size}")
        if num_samples * num_chains < buffer:
            raise ValueError(
                f"buffer={buffer}: {num_chains} chains of num_samples={num_samples} do not fill it, and the generator never learns"
            )
        self.guide, self.kernel, self.buffer = guide, kernel, buffer
        self.num_samples, self.warmup_steps, self.num_chains = num_samples, warmup_steps, num_chains
        self.steps_per_sample, self.disable_progbar = steps_per_sample, disable_progbar

    def run(self, *args: Any, **kwargs: Any) -> Fit:
        """
        Samples and distils.

        :param args: the model's arguments, or one loader of them.
        :param kwargs: the model's keyword arguments.
        :raises ValueError: naming what in model, data or draws cannot be sampled or learned.
        """
        kernel = self.kernel
        with poutine.block(), pyro.validation_enabled(False):
            args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
            kernel.setup_chains(self.num_chains, self.warmup_steps, args, kwargs)
            sites, device = kernel.potential.sites, kernel.potential.device
            self.guide.set_sites(sites, device)
            if not self.guide.network.trainable:
                raise ValueError(f"{type(self.guide.network).__name__} has nothing to train: sample first, then APD(guide).fit(samples)")
            reservoir = Reservoir(sites, row_dtype(sites), device, self.buffer)
            try:
                training = self._alternate(reservoir)
            finally:
                kernel.cleanup()
        return self._fitter.polish(reservoir, training, reservoir.seen, kernel.potential)

    def _alternate(self, reservoir: Reservoir) -> Training:
        kernel, params, training, next_look = self.kernel, self.kernel.initial_params, None, self.buffer
        total = self.warmup_steps + self.num_samples
        with tqdm(total=total, desc="OnlineAPD", disable=True if self.disable_progbar else None, mininterval=0.5) as bar:
            for i in range(total):
                params = kernel.sample(params)
                if i >= self.warmup_steps:
                    reservoir.add(kernel.potential.join(params)[~kernel.info["diverging"]])
                if reservoir.seen >= next_look:
                    training, next_look = self._look(reservoir, training), 2 * reservoir.seen
                for _ in range(self.steps_per_sample if training is not None else 0):
                    training.step()
                if not bar.disable:
                    bar.set_postfix({**kernel.logging(), "draws": reservoir.seen}, refresh=False)
                bar.update()
        if training is None:
            raise RuntimeError(f"chains were lost before they had filled the buffer: {reservoir.seen} draws of {self.buffer}")
        return training

    def _look(self, reservoir: Reservoir, training: Training | None) -> Training:
        """Mean and scale of the draws so far, and training in these units."""
        if training is not None:
            training.swap()
        mean, sd = reservoir.moments()
        refuse_constant(reservoir, mean, sd)
        self.guide.network.prepare(reservoir, mean, sd)
        return self._fitter.training(Codes(self.guide.network, reservoir))
