"""Checks of a finished run: are its draws stationary, mixed, and at the requested temperature?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_advbayes.infer.mcmc.kernel import SGMCMCKernel
from pyro_advbayes.infer.mcmc.state import AutoStepSize
from pyro_advbayes.infer.mcmc.step_size import hottest_allowed
from pyro_advbayes.infer.mcmc.summary import effective_size, function_values, normal_scores, shrink_factor, spaced, stands_still
from pyro_advbayes.infer.mcmc.trajectory import LEAPFROG_STEPS, TRAJECTORIES, unstable_share
from pyro_advbayes.model import program
from pyro_advbayes.model.batches import Arguments
from pyro_advbayes.model.outcomes import without_wrappers

LEAST_DRAWS = 20  # per chain; fewer are not assessed
LARGEST_Z, LARGEST_SHIFT = 5.0, 0.5
LEAST_ENERGIES = 5.0  # effective draws of a chain
LARGEST_R_HAT = 1.1
LEAST_EFFECTIVE = 50.0  # effective draws of all chains: fewer leave a mean uncertain by 0.14 posterior standard deviations or more
LARGEST_COLD = 0.88  # share of T; "auto" keeps to 0.9
LARGEST_HEAT = 1.12  # mean over a site; "auto" keeps to 1.1
DIRECTION_SHARE = 0.125  # along the direction in which noise heats most; "auto" keeps to 0.1 of it
LARGEST_FALL = 100.0
MOST_NATS, MOST_SPREADS = (
    20.0,
    4.0,
)  # a draw's energy above the chain's median; a spread is the distance from the median to the 95 % quantile
LARGEST_WIDENING = 1.1  # factor on a standard deviation by draws that were thrown out
LARGEST_SCALE = 30.0  # mean or standard deviation of a column of the data
LARGEST_UNSTABLE = 0.01  # share of short trajectories from the steepest states
FIRST_PARTS = (0.1, 0.2, 0.33)
# Predictions are compared on so many rows and draws, for at most this share of the run's own work.
ROWS, DRAWS, SHARE = 50, 250, 0.05


class SamplingWarning(UserWarning):
    """A run's draws are not, or not yet, draws from the posterior; says why, and the remedy."""


@dataclass(frozen=True)
class Finished:
    """A finished run, and its kept draws without lost chains."""

    kernel: SGMCMCKernel
    num_samples: int
    warmup_steps: int
    num_chains: int  # lost ones included
    lost: Sequence[int]  # numbers of the lost chains
    diagnostics: Mapping[str, Any]  # the kernel's
    stats: Mapping[str, Tensor]  # [chains, draws]
    samples: Callable[[], Mapping[str, Tensor]]  # gives [chains, draws, *site] by site


@dataclass(frozen=True)
class Assessment:
    """The result of :func:`assess`: findings as sentences, none for a good run, and the drift of the energies."""

    findings: list[str] = field(default_factory=list)
    drift: dict[str, float] | None = None

    def text(self) -> str:
        """All findings, as one message."""
        return "; ".join(self.findings) + " (mcmc.diagnostics() and mcmc.summary() have the numbers)"


def assess(run: Finished) -> Assessment:
    """Checks the draws of a finished run."""
    kernel, about, stats = run.kernel, run.diagnostics, run.stats
    findings = _lost(run)
    temperature = float(stats["temperature"][0, -1])
    found: dict[str, float] | None = None
    # where the rule was clamped, chains do not sample at T, and need not agree
    sampled = temperature > 0.0 and about["clamped"] == 0.0
    constant = all(bool((stats[name] == stats[name][0, 0]).all()) for name in ("step_size", "temperature"))
    if run.num_samples >= LEAST_DRAWS and temperature > 0.0:
        if constant:
            found = drift(stats["energy"])
            findings += _drifting(found)
        if sampled:
            findings += _mixing(run, stats["energy"], constant)
        if sampled and constant and kernel.mixes:
            findings += _unstable(run, float(stats["step_size"][0, -1]), temperature)
            if kernel.potential.batches.num_data is None:  # minibatches have outliers of their own
                findings += _thrown(stats["energy"], temperature, run.samples())
    if sampled:
        findings += _heat(kernel, about, temperature)
    fell = about["step fell"]
    if fell is not None and fell > LARGEST_FALL:
        findings.append(
            f"the step fell by a factor of {fell:.0f} when minibatch noise was held to its share, so that what was left of warm-up may "
            "not have brought the chains back: take a larger batch_size, more warmup_steps, or control_variate="
        )
    if findings:
        findings += _units(kernel.potential.arguments)
    return Assessment(findings, found)


def drift(energy: Tensor) -> dict[str, float]:
    r"""
    Whether energies are stationary: the first tenth, fifth and third of the draws against the last half,

    .. math:: \text{shift} = (\bar e_\text{first} - \bar e_\text{last}) / s, \qquad z = \text{shift} / \sqrt{\tau/n_\text{first} +
        \tau/n_\text{last}},

    with the standard deviation :math:`s` within chains and the autocorrelation time :math:`\tau` of the last half alone, which a trend at
    the start does not enlarge. Only means are compared, since chains of a network sit in modes of different energy. Chains that are wrong
    from start to end are not detected.

    :param energy: ``[chains, draws]``, of at least 20 draws.
    :return: of the part with the largest :math:`|z|`: ``"z"``, ``"shift"``, and the means ``"first"`` and ``"last"``.
    """
    energy = energy.double()
    draws = energy.shape[1]
    last = energy[:, draws // 2 :]
    sd = float(last.var(1).mean().sqrt().clamp_min(1e-300))
    tau = max(1.0, last.numel() / max(1.0, _effective(last)))
    worst: dict[str, float] = {}
    for part in FIRST_PARTS:
        first = energy[:, : max(1, int(part * draws))]
        shift = float(first.mean() - last.mean()) / sd
        z = shift / (tau / first.numel() + tau / last.numel()) ** 0.5
        if not worst or abs(z) > abs(worst["z"]):
            worst = {"z": z, "shift": shift, "first": float(first.mean()), "last": float(last.mean())}
    return worst


def _effective(energy: Tensor) -> float:
    """Effective draws of all chains together; the memory of Pyro's estimate grows with their square."""
    return float(effective_size(_thinned(energy).double().unsqueeze(-1)).nan_to_num(1.0))


def _thinned(values: Tensor, most: int = 1000) -> Tensor:
    """At most so many evenly spaced draws of values ``[chains, draws, ...]``, to save memory on a long run."""
    return values[:, :: -(-values.shape[1] // most)]


def _drifting(found: dict[str, float]) -> list[str]:
    if abs(found["z"]) <= LARGEST_Z or abs(found["shift"]) <= LARGEST_SHIFT:
        return []
    return [
        f"the kept energies are not stationary: {found['first']:.4g} in the first draws, {found['last']:.4g} in the last half (drift "
        f"z {found['z']:.1f}): take more warmup_steps"
    ]


def _lost(run: Finished) -> list[str]:
    if not run.lost:
        return []
    when = [run.diagnostics["divergences"][chain] for chain in run.lost]
    early = sum(rows[:1] == [0] for rows in when)
    late = sorted(rows[0] for rows in when if rows[:1] != [0])
    times = [f"{early} in warm-up"] if early else []
    times += [f"{len(late)} from sample {late[0]} on"] if late else []
    return [
        f"{len(run.lost)} of {run.num_chains} chains were lost ({', '.join(times)}) and are left out of all results: the step "
        "size is too large for where they went. Take a smaller step_size, scale inputs and targets to about 1, or a smaller auto_share"
    ]


def _heat(kernel: SGMCMCKernel, about: Mapping[str, Any], temperature: float) -> list[str]:
    if about["T_eff"] is None:  # the rule does not predict it
        return []
    remedy = "a larger batch_size" if kernel.automatic else 'a smaller step_size ("auto" keeps to 1.1), or a larger batch_size'
    site, hottest = max(about["T_eff"].items(), key=lambda item: item[1])
    if hottest > LARGEST_HEAT * temperature:
        return [f"minibatch noise heats site {site!r} to T_eff {hottest:.3g} where {temperature:.3g} was asked for: take {remedy}"]
    site, coldest = min(about["T_eff epochs"].items(), key=lambda item: item[1])
    shuffled = kernel.mixes and kernel.potential.batches.num_data is not None
    uncorrected = ", or noise_correction=False" if hasattr(kernel.update_rule, "noise_correction") else ""
    # not where the rule's own friction makes a site cold
    if shuffled and coldest < LARGEST_COLD * min(temperature, about["T_eff"][site]):
        return [
            f"minibatch noise is made up for that shuffled epochs take back themselves: T_eff of site {site!r} may be as low as "
            f"{max(0.0, coldest):.3g} where {temperature:.3g} was asked for, draws too narrow: take {remedy}{uncorrected}"
        ]
    along = about["T_eff direction"]
    if along is not None and along > (1.0 + hottest_allowed(DIRECTION_SHARE, kernel.potential.size)) * temperature:
        return [
            f"minibatch noise is correlated between weights, and heats the direction in which it is largest to T_eff {along:.3g} where "
            f"{temperature:.3g} was asked for: draws are too wide there. Take {remedy}, or a smaller auto_share"
        ]
    return []


def _units(arguments: Arguments) -> list[str]:
    """The largest column of the data, if it is far from 1 in size: the most frequent cause of other findings."""
    largest, found = LARGEST_SCALE, []
    for label, tensor in zip(arguments.labels, arguments.tensors, strict=True):
        if not tensor.is_floating_point() or tensor.dim() not in (1, 2) or len(tensor) < LEAST_DRAWS:
            continue
        columns = tensor.reshape(len(tensor), -1).double()
        mean, sd = columns.nanmean(0), (columns - columns.nanmean(0)).square().nanmean(0).sqrt()
        size = torch.maximum(mean.abs(), sd).nan_to_num(0.0)
        column = int(size.argmax())
        if float(size[column]) > largest:
            largest = float(size[column])
            where = f"column {column} of {label}" if tensor.dim() == 2 else label
            found = [
                f"{where} has mean {float(mean[column]):.3g} and standard deviation {float(sd[column]):.3g}, which makes a posterior that "
                "no one step size fits: standardise inputs and targets"
            ]
    return found


def _unstable(run: Finished, step_size: float, temperature: float) -> list[str]:
    kernel = run.kernel
    updates = (run.num_samples + run.warmup_steps) * kernel.updates_per_sample
    most = min(TRAJECTORIES, int(SHARE * updates / (LEAPFROG_STEPS + 1)))
    if most * run.num_chains < TRAJECTORIES:
        return []
    share = unstable_share(kernel.run, step_size, temperature, most)
    if share is None or share <= LARGEST_UNSTABLE:
        return []
    return [
        f"the step size, {step_size:.1e}, is too large for the steepest places that the chains came to: {100 * share:.0f} % of short "
        "trajectories from there gain energy without bound, so that this part of the posterior (the neck of a funnel, a scale near 0) is "
        "hardly sampled: write the model in another form (non-centred), or take a smaller "
        + ("auto_share, and more updates" if kernel.automatic else "step_size")
    ]


def _thrown(energy: Tensor, temperature: float, samples: Mapping[str, Tensor]) -> list[str]:
    """
    Whether a chain was thrown far out and came back, and whether that enlarges a site's standard deviation. One exact draw in e^20 has an
    energy so high.
    """
    middle, high = (_thinned(energy).double().quantile(q, dim=1, keepdim=True) for q in (0.5, 0.95))
    excess = energy - middle
    most = MOST_NATS * temperature + MOST_SPREADS * (high - middle)
    thrown = excess > most
    if not bool(thrown.any()):
        return []
    away = excess > 0.5 * most  # on the way back too
    chain, draw = thrown.nonzero()[0].tolist()
    for name, values in samples.items():
        draws = values.flatten(2).double() if values.dim() > 2 else values.unsqueeze(-1).double()
        wider = float((draws.flatten(0, 1).std(0) / draws[~away].std(0)).nan_to_num(1.0).max())
        if wider > LARGEST_WIDENING:
            return [
                f"chain {chain} was thrown out: at draw {draw} its energy is {float(excess[chain, draw]):.0f} nats above its median, and "
                f"{int(away.sum())} draws that far make site {name!r} {wider:.2f} times as wide. The step is too large for a part of the "
                "posterior (the neck of a funnel, a scale near 0): write the model in another form (non-centred), or take a smaller "
                "step_size (auto_share)"
            ]
    return []


def _mixing(run: Finished, energy: Tensor, constant: bool) -> list[str]:
    findings = []
    samples = run.samples()
    some = torch.linspace(0, run.num_samples - 1, min(DRAWS, run.num_samples)).round().long()  # draws in a file are read page by page
    for name, values in samples.items():
        picked, where = spaced(values[:, some], 20)
        still = stands_still(picked)
        if bool(still.any()):
            place = list(where[int(still.nonzero()[0])])
            findings.append(
                f"site {name!r} does not move (element {place}): no R-hat tells of it. The chain went where U is flat or its numbers "
                "are used up: start elsewhere (init_strategy), or write the site in another form (non-centred, another scale)"
            )
            break
    if not run.kernel.mixes:
        return findings
    slow = "take more samples, or more num_steps_per_sample"
    step_size = run.kernel.step_size
    if isinstance(step_size, AutoStepSize) and step_size.growing:
        found = f"the step size, {step_size.value:.1e}, was still growing at the end of warm-up"
        slow = f"{found}: take more warmup_steps, or another init_strategy"
    effective = _effective(energy) / len(energy)
    if constant and effective < LEAST_ENERGIES:
        findings.append(f"the kept energies hardly move: {effective:.1f} effective draws a chain: {slow}")
    # hidden units of a network may be permuted, and its weights with them; two matrices distinguish a network from a regression
    network = sum(value.dim() >= 4 for value in samples.values()) >= 2
    compared = {name: v for name, v in samples.items() if not network or (v.shape[2:].numel() == 1 and "." not in name)}
    looked = {f"site {name!r}": value for name, value in compared.items()}
    predictions = fitted_values(run)
    if predictions is not None:
        looked["the predicted means of the data"] = predictions
    elements = {name: spaced(_thinned(value), ROWS)[0] for name, value in looked.items()}
    if not elements:
        return findings
    shrink = {name: float(shrink_factor(v).nan_to_num(0.0).max()) for name, v in elements.items()}
    worst = max(shrink, key=lambda name: shrink[name])
    if shrink[worst] > LARGEST_R_HAT:
        findings.append(f"the chains have not mixed: R-hat of {worst} is {shrink[worst]:.3g}: {slow}")
    if not findings and constant:
        fewer = {name: _thinned(v, DRAWS) for name, v in elements.items()}
        sizes = {name: float(effective_size(normal_scores(v)).nan_to_num(math.inf).min()) for name, v in fewer.items()}
        few = [name for name, v in fewer.items() if sizes[name] < min(LEAST_EFFECTIVE, 0.5 * v.shape[:2].numel())]
        if few:
            worst = min(few, key=lambda name: sizes[name])
            findings.append(
                f"{sizes[worst]:.0f} effective draws of {worst} in all chains together: a mean is uncertain by {sizes[worst] ** -0.5:.2f} "
                f"posterior standard deviations, and what was not visited does not show: {slow}"
            )
    return findings


def fitted_values(run: Finished) -> Tensor | None:
    """
    Means of the model's observed sites at some rows of its data, ``[chains, draws, k]``: chains of a network can be compared in these.
    None for a model that draws its own rows, for laws without a finite mean, and for a run so short that this would take a large part of
    its time.
    """
    kernel = run.kernel
    potential = kernel.potential
    if potential.structure.scaling == "indices":
        return None
    rows = potential.structure.plate_batch or ROWS
    work = SHARE * run.num_chains * (run.num_samples + run.warmup_steps) * kernel.updates_per_sample * rows
    rows, left = min(ROWS, rows), run.num_chains - len(run.lost)
    draws = min(DRAWS, run.num_samples, int(work / (rows * left)))
    if draws < LEAST_DRAWS:
        return None
    args, kwargs = potential.some_rows(rows)
    kept = torch.linspace(0, run.num_samples - 1, draws).round().long()
    samples = {name: value[:, kept].flatten(0, 1) for name, value in run.samples().items()}
    values = function_values(_means(kernel.model, set(samples)), samples, left, args, kwargs)
    finite = values.isfinite().flatten(0, 1).all(0)
    return values[..., finite] if bool(finite.any()) else None


def _means(model: Callable, latent: set[str]) -> Callable[..., Tensor]:
    """A model that returns the means of its observed sites, for classes their probabilities, in one row ``[k]``."""

    def means(*args: Any, **kwargs: Any) -> Tensor:
        trace = program.run(model, (args, kwargs), hidden=False)
        parts: list[Tensor] = []
        for name in trace.observation_nodes:
            law = trace.nodes[name]["fn"]
            if name in latent or not isinstance(law, Distribution):  # latent sites are observed here, conditioned on a draw
                continue
            probs = getattr(without_wrappers(law), "probs", None)
            try:
                parts.append(law.mean.flatten() if probs is None else probs.flatten())
            except NotImplementedError:
                continue
        return torch.cat(parts) if parts else torch.full((1,), torch.nan)

    return means
