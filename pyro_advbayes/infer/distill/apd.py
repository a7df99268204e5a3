"""Adversarial Posterior Distillation of draws into a generator: :class:`APD`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_advbayes.checked import checked
from pyro_advbayes.given import check_choice, check_int, warn
from pyro_advbayes.infer.autoguide.factored import FactoredGenerator
from pyro_advbayes.infer.autoguide.generators import RowGenerator, mlp_numbers
from pyro_advbayes.infer.autoguide.implicit import AutoImplicit
from pyro_advbayes.infer.autoguide.model_sites import same_sites
from pyro_advbayes.infer.autoguide.rows import READY, Rows, SampleRows, read_samples, row_dtype, site_at
from pyro_advbayes.infer.distill.energy import EnergyDistance
from pyro_advbayes.infer.distill.noise import fit_noise
from pyro_advbayes.infer.distill.stopping import Stopping
from pyro_advbayes.infer.distill.training import Settings, Training
from pyro_advbayes.infer.distill.wgan import WGAN
from pyro_advbayes.infer.mcmc.fingerprint import differ
from pyro_advbayes.model.potential import Potential
from pyro_advbayes.storage import files, reference
from pyro_advbayes.storage.digests import hash_of, tensor_digest

PRESETS = {
    "fast": Settings(),
    # gan1.yaml and gan.py of the authors' code
    "paper": Settings(
        objective="wgan-gp",
        batch_size=100,
        critic_steps=5,
        penalty=10.0,
        learning_rate=1e-4,
        critic_hidden=(100, 100, 100),
        ema=0.0,
        num_steps=100_000,
        check_every=None,
    ),
}


FEWEST_DRAWS = 20  # that are fitted without a word about their number: chains, taken for draws, are fewer


class Fit(NamedTuple):
    """
    The end of a fit. ``steps``: of the generator; ``distance``: two-sample distance of the kept generator from the draws, in standardised
    units; ``floor``: the same between two halves of the draws; ``converged``: whether the distance came down to the floor. None where no
    distance was measured.
    """

    steps: int
    distance: float | None
    floor: float | None
    converged: bool | None
    noise_scale: float | None = None


@checked
class APD:
    """
    Adversarial Posterior Distillation (Wang et al., ICML 2018): a generator learns from draws of a posterior and replaces them. The paper
    trains a WGAN with gradient penalty, see :mod:`pyro_advbayes.infer.distill.wgan`. ::

        guide = AutoImplicit(model, generator=distill.MLPGenerator(noise=100, hidden=(100, 100, 100)))
        distill.APD(guide).fit(mcmc.get_samples())

    Draws are standardised, weight by weight, in unconstrained space.

    :param AutoImplicit guide: the guide to train.
    :param str preset: ``"fast"`` minimises the energy distance, without a critic, and stops when the two-sample distance has come down to
        that between two halves of the draws. ``"paper"`` is the published method: 100 000 generator steps with 5 critic steps each,
        batches of 100, Adam at 1e-4.
    :param checkpoint: path of a file from which :meth:`resume` can go on.
    :param int checkpoint_every: steps between checkpoints, >= 1.
    :param bool overwrite: whether the checkpoint may replace an existing file.
    :param bool disable_progbar: no progress bar; there is none where the output is no terminal.
    :param changes: changes of the preset's settings, see :class:`~pyro_advbayes.infer.distill.training.Settings`. Where they do not name a
        ``batch_size``, that of the preset is the number of draws at most.
    :raises ValueError: naming an argument out of range.
    """

    def __init__(
        self,
        guide: AutoImplicit,
        preset: str = "fast",
        *,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 1000,
        overwrite: bool = False,
        disable_progbar: bool = False,
        **changes: Any,
    ) -> None:
        if not isinstance(guide, AutoImplicit):
            raise ValueError(f"guide={type(guide).__name__}: an AutoImplicit is needed")
        self.settings = settings_of(preset, changes)
        self._fewest = self.settings.batch_size if "batch_size" in changes else FEWEST_DRAWS
        self.guide, self.disable_progbar, self.overwrite = guide, disable_progbar, overwrite
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.checkpoint_every = check_int(checkpoint_every, "checkpoint_every", 1)
        self.held = files.Held(self.checkpoint)

    @checked
    def fit(self, samples: Mapping[str, Tensor] | str | Path, *args: Any, **kwargs: Any) -> Fit:
        """
        Trains the guide on draws.

        :param samples: site -> ``[draws, *shape]`` in the model's own space, ``mcmc.get_samples()``; or the path of a file of draws.
        :param args: the model's arguments, observations included, of all data or a few hundred rows. They are needed for a constrained site
            whose prior the model does not declare (as a ``PyroSample`` of a distribution), since draws do not tell the support, and for
            the noise of a :class:`FactoredGenerator`.
        :param kwargs: its keyword arguments.
        :raises ValueError: naming the site, if draws are missing, fewer than 20 or than the ``batch_size`` that was asked for, not finite,
            or constant in an element; or if the generator does not fit.
        :raises FileExistsError: if there is a checkpoint already.
        :raises RuntimeError: if another run writes to the checkpoint.
        """
        if self.checkpoint is not None:
            files.refuse_existing(self.checkpoint, self.overwrite)
        with self.held:
            return self._fit(samples, args, kwargs)

    def _fit(self, samples: Mapping[str, Tensor] | str | Path, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Fit:
        rows, potential = self._prepare(samples, args, kwargs)
        if not self.guide.network.trainable:  # the draws determine all of it
            return Fit(0, None, None, None, self._finish(rows, len(rows), potential))
        fingerprint = None if self.checkpoint is None else _fingerprint(self.guide, rows, potential)
        codes = Codes(self.guide.network, rows)
        return self._train_offline(rows, self.training(codes), self.stopping(codes), potential, fingerprint)

    @classmethod
    def resume(
        cls,
        path: str | Path,
        guide: AutoImplicit,
        samples: Mapping[str, Tensor] | str | Path,
        *args: Any,
        disable_progbar: bool = False,
        **kwargs: Any,
    ) -> Fit:
        """
        Resumes from a checkpoint and runs to the end, with the bits of an uninterrupted fit.

        :param path: the checkpoint.
        :param guide: a new guide with the same model and a generator of the same kind.
        :param samples: the same draws as given to :meth:`fit`.
        :param args: the same arguments.
        :raises FileNotFoundError: if there is no such file.
        :raises ValueError: if it is truncated, or belongs to other draws, other data or another generator.
        """
        with files.Held(Path(path), existing=True) as held:
            content = files.load(Path(path), "checkpoint of APD")
            dicts = dict.fromkeys(("settings", "fingerprint", "reference", "training", "random"), dict)
            kinds = {**dicts, "every": int, "stopping": object}
            files.check_fields(Path(path), content, kinds)
            with files.reading(Path(path)):
                apd = cls(guide, checkpoint=path, checkpoint_every=content["every"], disable_progbar=disable_progbar, **content["settings"])
            apd.held = held
            count = content["fingerprint"].get("number of draws")
            if not isinstance(count, int) or count < apd.settings.batch_size:
                raise files.FileError(f"{path}: its batch_size is {apd.settings.batch_size}, and it is of {count} draws: it is corrupt")
            rows, potential = apd._prepare(samples, args, kwargs)
            fingerprint = _fingerprint(guide, rows, potential)
            for what, here in fingerprint.items():
                if differ(here, content["fingerprint"].get(what)):
                    raise ValueError(f"{path} is of another fit: its {what} is {content['fingerprint'].get(what)}, here it is {here}")
            with files.reading(Path(path)):
                guide.network.restore(content["training"]["generator"])  # which determines the codes
            reference.check(guide.network.reference(), content["reference"], Path(path))
            with files.reading(Path(path)):
                codes = Codes(guide.network, rows)
                training = apd.loaded(codes, content["training"], apd.settings.num_steps)
                stopping = apd.stopping(codes)
                if stopping is not None:
                    stopping.load(content["stopping"])
                files.set_random_state(content["random"], rows.device)
            return apd._train_offline(rows, training, stopping, potential, fingerprint)

    def _prepare(self, samples: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Rows, Potential | None]:
        """The draws as rows, for which the guide's generator is prepared."""
        guide = self.guide
        values, source = read_samples(samples)
        potential = Potential(guide.model, args, kwargs) if args or kwargs else None
        if potential is None:
            sites, device = guide.sites or guide.sites_of(values, source), next(iter(values.values())).device
        else:
            sites, device = potential.sites, potential.device
        rows = SampleRows(values, sites, row_dtype(sites), device, source)
        if len(rows) < self._fewest:
            raise ValueError(
                f"{source}: {len(rows)} draws are fewer than batch_size={self._fewest}: take a smaller batch, or more draws; of "
                "several chains, get_samples() without group_by_chain=True"
            )
        self.settings = dataclasses.replace(self.settings, batch_size=min(self.settings.batch_size, len(rows)))
        mean, sd = rows.moments()
        refuse_constant(rows, mean, sd)
        if not same_sites(guide.sites, sites):
            guide.set_sites(sites, device)
        guide.network.prepare(rows, mean, sd)
        return rows, potential

    def training(self, codes: Codes) -> Training:
        """The training of the guide's generator, which is prepared for the draws, on their codes."""
        kind = WGAN if self.settings.objective == "wgan-gp" else EnergyDistance
        return kind(self.guide.network, codes.size, self.settings, codes.random)

    def loaded(self, codes: Codes, state: dict[str, Any], last: int) -> Training:
        """
        :meth:`training` in a saved state.

        :param last: the number of its last step.
        :raises ValueError: if the state is inconsistent, before memory is allocated for it.
        """
        if self.settings.objective == "wgan-gp":
            held = sum(value.numel() for value in state["critic"].values())
            if mlp_numbers((codes.size, *self.settings.critic_hidden, 1)) > held:
                raise ValueError(f"critic_hidden={self.settings.critic_hidden} is of a critic of more than its {held} numbers")
        training = self.training(codes)
        training.load(state)
        if not isinstance(training.steps, int) or not 0 <= training.steps <= last:
            raise ValueError(f"it is at step {str(training.steps)[:100]} of {last}")
        return training

    def stopping(self, codes: Codes) -> Stopping | None:
        """The stopping rule of the training on these codes, if there is one."""
        return None if self.settings.check_every is None else Stopping(codes, len(codes), codes.size)

    def _train_offline(
        self,
        rows: Rows,
        training: Training,
        stopping: Stopping | None,
        potential: Potential | None,
        fingerprint: dict[str, Any] | None,
    ) -> Fit:
        save = partial(self._save_checkpoint, rows.device, training, stopping, fingerprint)
        return self.train(rows, training, stopping, self.settings.num_steps, len(rows), potential, save)

    def train(
        self,
        rows: Rows,
        training: Training,
        stopping: Stopping | None,
        last: int,
        num_draws: int,
        potential: Potential | None,
        save: Callable[[], None],
    ) -> Fit:
        """
        Trains on fixed rows to the end, and finishes the guide.

        :param last: the number of the last step, unless the stopping rule ends the training earlier.
        :param num_draws: the number of draws that the rows represent.
        :param save: called every ``checkpoint_every`` steps, if there is a checkpoint.
        """
        # a checkpoint may be of the very step at which training stopped
        settings, over = self.settings, stopping is not None and stopping.over
        bar = tqdm(total=last, initial=training.steps, desc="APD", disable=True if self.disable_progbar else None, mininterval=0.5)
        with bar:
            while training.steps < last and not over:
                estimate = training.step()
                if stopping is not None and settings.check_every is not None and training.steps % settings.check_every == 0:
                    over = measure_average(training, stopping)
                if self.checkpoint is not None and training.steps % self.checkpoint_every == 0:
                    save()
                if not bar.disable:
                    shown = {"loss": estimate} if stopping is None else {"distance": stopping.distance, "floor": stopping.floor}
                    bar.set_postfix({name: f"{float(value):.3g}" for name, value in shown.items()}, refresh=False)
                bar.update()
        training.swap()
        distance = floor = converged = None
        if stopping is not None and stopping.distances:
            distance, floor, converged = stopping.distance, stopping.floor, stopping.arrived
            if not converged:
                distance = self._keep_best(training, stopping)
        elif stopping is not None:
            warn(
                f"APD has not measured its distance from the draws by step {training.steps}: judge the guide with distill.compare, or take "
                f"more num_steps or a check_every below {settings.check_every}",
            )
        scale = self._finish(rows, num_draws, potential)
        return Fit(training.steps, distance, floor, converged, scale)

    def _finish(self, rows: Rows, num_draws: int, potential: Potential | None) -> float | None:
        """Makes the guide ready to be drawn from; returns the scale of its noise."""
        network, scale = self.guide.network, None
        network.finish()
        if isinstance(network, FactoredGenerator) and potential is not None:
            scale = fit_noise(network, rows, potential)
        self.guide.num_draws = num_draws
        self.guide.storage()
        return scale

    def _keep_best(self, training: Training, stopping: Stopping) -> float:
        """Restores the best parameters, warns that they have not converged, and returns their distance."""
        distance = stopping.distance
        if stopping.best is not None:
            distance, parameters = stopping.best
            with torch.no_grad():
                for kept, new in zip(parameters, self.guide.network.parameters(), strict=True):
                    new.copy_(kept)
        warn(
            f"APD has not converged by step {training.steps}: its two-sample distance is {distance:.3g}, and that of two halves of the "
            f"draws {stopping.floor:.3g}. Judge it with distill.compare; more num_steps or a larger generator may help",
        )
        return distance

    def _save_checkpoint(
        self, device: torch.device, training: Training, stopping: Stopping | None, fingerprint: dict[str, Any] | None
    ) -> None:
        content = {
            "settings": dataclasses.asdict(self.settings),
            "every": self.checkpoint_every,
            "fingerprint": fingerprint,
            "reference": self.guide.network.reference(),
            "training": training.state(),
            "stopping": None if stopping is None else stopping.state(),
            "random": files.random_state(device),
        }
        self.held.save(content, "checkpoint of APD")


def settings_of(preset: str, changes: Mapping[str, Any]) -> Settings:
    """
    A preset with changes.

    :raises ValueError: naming what is unknown or out of range.
    """
    check_choice(preset, "preset", PRESETS)
    known = [field.name for field in dataclasses.fields(Settings)]
    for name in changes:
        if name not in known:
            raise ValueError(f"{name}= is no setting: there are {', '.join(known)}")
    return dataclasses.replace(PRESETS[preset], **changes)


def refuse_constant(rows: Rows, mean: Tensor, sd: Tensor) -> None:
    """:raises ValueError: naming a site with an element that is constant over draws."""
    same = (sd <= 1e-12 * mean.abs()).nonzero().flatten()
    if len(same):
        site = site_at(rows.sites, int(same[0]))
        raise ValueError(
            f"{rows.source}: element {int(same[0]) - site.start} of site {site.name!r} is the same in all {len(rows)} draws (as are "
            f"{len(same) - 1} more): nothing can be learned of it. Did the chain move? To fix the site, condition the model on it"
        )


class Codes:
    """
    Codes of draws by index, computed in advance if they fit into memory and the draws do not change.

    :param generator: prepared for the rows.
    """

    def __init__(self, generator: RowGenerator, rows: Rows) -> None:
        self._generator, self._rows = generator, rows
        self._ready: Tensor | None = None
        self.size = self(torch.zeros(1, dtype=torch.long)).shape[1]
        if not rows.changing and len(rows) * self.size <= READY:
            self._ready = torch.cat([generator.encode(part) for part in rows.chunks()])

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, index: Tensor) -> Tensor:
        """``[len(index), code]``."""
        if self._ready is None:
            return self._generator.encode(self._rows.take(index))
        return self._ready[index.to(self._ready.device)]

    def random(self, count: int) -> Tensor:
        """Codes of random draws, ``[count, code]``."""
        return self(torch.randint(len(self), (count,)))


def measure_average(training: Training, stopping: Stopping) -> bool:
    """Measures the distance of the averaged generator; returns whether training is to stop."""
    training.swap()
    found = stopping.measure(training.made, list(training.generator.parameters()))
    training.swap()
    return found


def _fingerprint(guide: AutoImplicit, rows: Rows, potential: Potential | None) -> dict[str, Any]:
    """What a fit depends on, as plain values. Computed once for all checkpoints, since it reads all draws."""
    return {
        "sites": [[site.name, list(site.shape)] for site in rows.sites],
        "generator": [type(guide.network).__name__, guide.network.settings()],
        "number of draws": len(rows),
        "draws": hash_of(rows.chunks()),
        "data": None if potential is None else [tensor_digest(value) for value in potential.arguments.tensors],
    }
