"""The posteriors that the scripts on Adversarial Posterior Distillation compare: sampled, distilled, trained, with units left out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import SGD
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

import pyro_advbayes as ab
from models.mlp import mlp
from pyro_advbayes.infer import distill
from pyro_advbayes.infer.autoguide.generators import RowGenerator
from pyro_advbayes.nn import Classifier, dropout_guide, mc_dropout

LR, WEIGHT_DECAY, BATCH_SIZE = 0.05, 1e-3, 100
DROPOUT = 0.5
NOISE_ROWS = 500  # on which a factored generator's noise is measured
CHECKPOINT_EVERY = 25  # steps of a generator on whole rows of weights; the published one takes 12 s for one
Draws = dict[str, Tensor]


class Chain(NamedTuple):
    """How long a chain of SGLD is, in updates, and which of its states are kept."""

    updates: int
    every: int
    warmup: int = 500

    @property
    def kept(self) -> int:
        """How many states are kept."""
        return (self.updates - self.warmup) // self.every


class Posterior(NamedTuple):
    """Draws ``[draws, *site]`` of a model, the numbers and bytes that are kept to make them, and what is to be said of them."""

    model: nn.Module
    samples: Draws
    bytes: int
    about: dict[str, Any]


def new_model(sizes: Sequence[int], x: Tensor) -> Classifier:
    """The network, with the prior that the weight decay is."""
    return mlp(sizes, prior=ab.weight_decay_prior(WEIGHT_DECAY, len(x))).to(x.device)


def spread(count: int, num_draws: int, repeats: int) -> Tensor:
    """The numbers of ``repeats`` × ``num_draws`` of ``count`` draws, evenly spaced; those of each repeat follow each other."""
    places = torch.linspace(0, count - 1, num_draws * repeats).round().long()
    return places.view(num_draws, repeats).T.flatten()


def bytes_of(samples: Draws, num_draws: int) -> int:
    """What so many draws take."""
    return num_draws * sum(value[0].numel() * value.element_size() for value in samples.values())


# ------------------------------------------------------------------------------------------------------------------ sampled


def sgld(model: nn.Module, x: Tensor, y: Tensor, chain: Chain, path: Path, seed: int) -> tuple[Path, dict[str, Any]]:
    """
    A chain of SGLD at the paper's settings, which goes on from its checkpoint, if there is one. The authors' step is lr/2 along the mean
    loss, with noise of variance lr/N: in nats over all data, a step size of lr/(2N).

    :return: the file of draws, and what the sampler says of itself.
    """
    kernel = ab.SGLD(model, step_size=LR / (2 * len(x)), batch_size=BATCH_SIZE, num_steps_per_sample=chain.every)
    if path.exists():
        mcmc = ab.SGMCMC.resume(path, kernel, x, y)
    else:
        pyro.set_rng_seed(seed)
        warmup = chain.warmup // chain.every
        mcmc = ab.SGMCMC(kernel, chain.kept, warmup, checkpoint=path, checkpoint_every=100, overwrite=True)
        mcmc.run(x, y)
    found = mcmc.kernel.diagnostics()
    return path.with_suffix(".draws.safetensors"), {**chain._asdict(), "kept": chain.kept, "T_eff": found["T_eff"]}


def taken(path: Path, places: Tensor) -> Draws:
    """Draws of the first chain in a file, by number."""
    return {name: value[0][places] for name, value in ab.read_draws(path).items() if not name.startswith("sample_stats/")}


# ---------------------------------------------------------------------------------------------------------------- distilled


def distilled(
    model: nn.Module,
    generator: RowGenerator,
    draws: Path,
    kept: int,
    data: tuple[Tensor, Tensor],
    count: int,
    preset: str = "fast",
    checkpoint: Path | None = None,
    **changes: Any,
) -> Posterior:
    """
    A generator in the place of a file of draws, and ``count`` draws of it. What is said of it is how its training ended, and its seconds.

    :param kept: how many draws the file holds.
    :param data: inputs and labels that the chain has not seen, on which the noise of a factored generator is measured.
    :param checkpoint: of the training, which goes on from it, if there is one.
    :param changes: of the preset's settings.
    """
    guide, begin = ab.AutoImplicit(model, generator), time.perf_counter()
    if checkpoint is not None and checkpoint.exists():
        fit = distill.APD.resume(checkpoint, guide, draws, *data)
    else:
        changes["batch_size"] = min(changes.get("batch_size", distill.PRESETS[preset].batch_size), kept)
        fit = distill.APD(guide, preset, checkpoint=checkpoint, checkpoint_every=CHECKPOINT_EVERY, **changes).fit(draws, *data)
    about = {**fit._asdict(), "seconds": time.perf_counter() - begin}
    return Posterior(model, guide.sample(count), guide.storage().bytes, about)


# ------------------------------------------------------------------------------------------------------------------ trained


def trained(model: nn.Module, x: Tensor, y: Tensor, steps: int, members: int, path: Path, seed: int) -> Draws:
    """Networks trained apart by SGD, with SGLD's learning rate, weight decay and batches; kept in a file."""
    if not path.exists():
        pyro.set_rng_seed(seed)
        optim = SGD({"lr": LR / len(x)})  # of a loss in nats over all data
        save_file(ab.deep_ensemble(model, (x, y), num_members=members, num_steps=steps, optim=optim, batch_size=BATCH_SIZE), path)
    return {site: value.to(x.device) for site, value in load_file(path).items()}


def with_dropout(sizes: Sequence[int], x: Tensor, y: Tensor, steps: int, path: Path, seed: int) -> Classifier:
    """A network trained by SGD with half of its hidden units left out; kept in a file."""
    pyro.set_rng_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(DROPOUT)]
    model = Classifier(mc_dropout(nn.Sequential(*layers[:-2]))).to(x.device)
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    with pyro.get_param_store().scope():
        optim = SGD({"lr": LR / len(x), "weight_decay": WEIGHT_DECAY * len(x)})
        svi = SVI(ab.minibatch(model, size=len(x)), dropout_guide(model), optim, Trace_ELBO())
        epochs = -(-steps * BATCH_SIZE // len(x))
        rows = torch.cat([torch.randperm(len(x)) for _ in range(epochs)])[: steps * BATCH_SIZE].to(x.device)
        for batch in tqdm(rows.split(BATCH_SIZE), desc="MC dropout", disable=None):
            svi.step(x[batch], y[batch])
    save_file(model.state_dict(), path)
    return model.eval()


def masks(model: Classifier, x: Tensor, count: int) -> Draws:
    """Masks of all Dropout layers."""
    with torch.no_grad():
        drawn = ab.Predictive(dropout_guide(model), num_samples=count)(x[:1])
    return {name: value for name, value in drawn.items() if name.endswith(".mask")}
