"""What :mod:`tutorials.papers.adversarial_sampling` shows: tables, pictures, and what AS gains over plain variational inference."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from pyro_advbayes import diagnostics as dg

MIX = 0.8
STEP_SIZE = 0.02  # of the adversary, in standard deviations
SHARES = (0.2, 0.4, 0.6, 0.8)
WEAK = f", KL times {1 - MIX:.1f}"  # the end of a row's name


def from_numbers(row: dict[str, Any]) -> dg.DrawQuality:
    """The accuracies of a row of the file, which keeps no probabilities."""
    return dg.DrawQuality(torch.tensor(row["accuracy"]), dg.Estimate(*row["ensembled"]), torch.empty(0))


def swept(rows: dict[str, Any], kl: str) -> list[dict[str, Any]]:
    """The rows of the sweep of mix, from 0 on."""
    found = [row for name, row in rows.items() if row["start"] == "scratch" and row["kl"] == kl and not name.endswith(WEAK)]
    found = [row for row in found if (row["mix"] == 0 and not row["longer"]) or (row["mix"] and row["step_size"] == STEP_SIZE)]
    return sorted(found, key=lambda row: row["mix"])


def picture(rows: dict[str, Any], path: Path) -> None:
    """Of one data set: for each start and divergence draws, training curves, and accuracy where certain; then the sweep of mix."""
    groups: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        if row["mix"] in (0.0, MIX):
            groups.setdefault(f"{row['start']}, {row['kl']}", {})[name.rsplit(": ", 1)[1]] = row
    figure, axes = plt.subplots(len(groups) + 1, 3, figsize=(18, 4.5 * (len(groups) + 1)), layout="constrained")
    for panels, (title, group) in zip(axes, groups.items(), strict=False):
        dg.plot_draw_quality({name: from_numbers(row) for name, row in group.items()}, ax=panels[0])
        panels[0].set(title=title, xticks=[])
        curves = {name: [from_numbers(point) for point in row["curve"]] for name, row in group.items() if row["curve"]}
        if curves:
            dg.plot_draw_curves(curves, xlabel="part of the training", ax=panels[1])
        else:
            panels[1].remove()
        dg.plot_retained_accuracy({name: kept(row) for name, row in group.items()}, ax=panels[2])
        for ax in panels:
            if ax.get_legend():
                ax.legend(fontsize=7, loc="best", framealpha=0.5)
    for kl, colour in (("proper", "tab:blue"), ("cold", "tab:orange")):
        sweep = swept(rows, kl)
        if sweep:
            mixes = [row["mix"] for row in sweep]
            axes[-1, 0].plot(mixes, [row["ensembled"][0] for row in sweep], "o-", color=colour, label=f"{kl}, ensembled")
            axes[-1, 0].plot(mixes, [row["lowest"] for row in sweep], "o--", color=colour, label=f"{kl}, lowest of the draws")
            axes[-1, 0].legend()
    axes[-1, 0].set(xlabel="mix", ylabel="accuracy", title="from scratch")
    for ax in axes[-1, 1:]:
        ax.remove()
    figure.savefig(path, dpi=70)
    plt.close(figure)


def kept(row: dict[str, Any]) -> dg.RetainedAccuracy:
    """Accuracies on the inputs that a mean prediction is certain of, and on all."""
    return dg.RetainedAccuracy(torch.tensor([*SHARES, 1.0]), torch.tensor([*row["retained"].values(), row["ensembled"][0]]))


def gains(*seeds: dict[str, Any]) -> list[dict[str, Any]]:
    """
    What AS has over plain variational inference, in percentage points, at equal epochs, at equal gradient evaluations, and, where AS has
    but a fifth of the divergence, at equal epochs and divergence: means over the seeds that have both rows. ``error`` is the standard
    error of ``ensembled`` over the test images, which all seeds share; ``each`` has both gains of every seed.

    :param seeds: the rows of each.
    """
    found = []
    for name in dict.fromkeys(name for rows in seeds for name, row in rows.items() if row["mix"] == MIX):
        same = [("plain", "epochs"), ("plain, longer", "gradients")]
        if name.endswith(WEAK) or "cold: " in name:
            same.append((f"plain{WEAK}", "epochs and divergence"))
        for other, budget in same:
            plain = name.rsplit(": ", 1)[0] + f": {other}"
            pairs = [(rows[name], rows[plain]) for rows in seeds if name in rows and plain in rows]
            if pairs:
                lowest = [100 * (row["lowest"] - against["lowest"]) for row, against in pairs]
                better = torch.stack([100 * (mistaken(against) - mistaken(row)) for row, against in pairs])  # [seeds, images]
                gain = {"row": name, "budget": budget, "lowest": statistics.fmean(lowest), "ensembled": better.mean().item()}
                gain["error"] = (better.mean(0).var(correction=0) / better.shape[1]).sqrt().item()
                found.append({**gain, "each": list(zip(lowest, better.mean(1).tolist(), strict=True))})
    return found


def mistaken(row: dict[str, Any]) -> Tensor:
    """1 for a test image of which the mean prediction is wrong, else 0."""
    return torch.zeros(row["images"], dtype=torch.double).index_fill(0, torch.tensor(row["mistakes"], dtype=torch.long), 1.0)


def picture_of_gains(found: list[dict[str, Any]], path: Path) -> None:
    """What the lowest draw gains, over what the mean prediction gains: means over seeds with an error, and lines to the seeds."""
    figure, ax = plt.subplots(figsize=(13, 7), layout="constrained")
    ax.axhline(2, color="grey", linestyle=":")
    ax.axvline(0, color="grey", linestyle=":")
    colours = {row: f"C{number}" for number, row in enumerate(dict.fromkeys(gain["row"] for gain in found))}
    for gain in found:
        count, marker = len(gain["each"]), {"epochs": "o", "gradients": "s", "epochs and divergence": "^"}[gain["budget"]]
        label = f"{gain['row']}, equal {gain['budget']}, {count} {'seed' if count == 1 else 'seeds'}"
        mean = (gain["ensembled"], gain["lowest"])
        colour = colours[gain["row"]]
        ax.errorbar(*mean, xerr=gain["error"], fmt=marker, color=colour, label=label)
        for lowest, ensembled in gain["each"]:
            ax.plot([mean[0], ensembled], [mean[1], lowest], color=colour, linewidth=0.7)
    ax.set(xscale="symlog", yscale="symlog", title="AS against plain variational inference; claimed: above and right of the dotted lines")
    ax.set(xlabel="gain of the mean prediction, points", ylabel="gain of the lowest draw, points")
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def table(rows: dict[str, Any]) -> str:
    """A line for each row of one seed."""
    width = max(map(len, rows)) + 2
    lines = [
        f"{'':{width}}lowest  highest  ensembled       " + "".join(f"{f'at {share:.0%}':>9}" for share in SHARES) + "  gradients  seconds"
    ]
    for name, row in rows.items():
        value, error = row["ensembled"]
        retained = "".join(f"{kept:9.4f}" for kept in row["retained"].values())
        numbers = f"{row['lowest']:.4f}  {row['highest']:.4f}   {value:.4f} ± {error:.4f}"
        lines.append(f"{name:{width}}{numbers}{retained}{row['gradient evaluations']:11}{row['seconds']:9.0f}")
    return "\n".join(lines)


def table_of_gains(found: list[dict[str, Any]]) -> str:
    """A line for each comparison."""
    return "\n".join(
        f"{gain['row']} against plain at equal {gain['budget']}: lowest {gain['lowest']:+.1f}, "
        f"ensembled {gain['ensembled']:+.1f} ± {gain['error']:.1f} points ({', '.join(f'{a:+.1f}/{b:+.1f}' for a, b in gain['each'])})"
        for gain in found
    )


def all_seeds(folder: Path, data: str, scale: str) -> list[dict[str, Any]]:
    """The rows of every seed that has a file, the smallest first."""
    files = [json.loads(path.read_text()) for path in folder.glob(f"adversarial_sampling-{data}-{scale}*.json")]
    return [content["results"] for content in sorted(files, key=lambda content: content["settings"]["seed"])]
