"""What :mod:`tutorials.papers.apd_mnist` shows: its table, its picture, and how far a row's detection is from another's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

SCALES_OF_INPUTS = (1.0, 5.0)
RANK, PACKED_RANK = 8, 32  # 10 and 9.25 times a draw: a tenth of the published generator's 101
SHOWN = (f"APD, rank {RANK}", f"APD, rank {PACKED_RANK}, kept codes, packed")  # among the generators


def auroc(row: dict[str, Any], s: str, name: str, score: str = "variation ratio") -> float:
    """The mean over repeats, in percent."""
    return row["ood"][s][name][score]["auroc"][0]


def gap(row: dict[str, Any], reference: dict[str, Any]) -> float:
    """The largest difference of AUROC from a reference's, over scales, sets and the four scores, in percentage points."""
    return max(
        abs(auroc(row, s, name, score) - auroc(reference, s, name, score))
        for s, sets in reference["ood"].items()
        for name in sets
        for score in row["ood"][s][name]
    )


def picture(rows: dict[str, Any], path: Path) -> None:
    """AUROC by set, what a generator loses against its storage, and attacked inputs found."""
    figure, axes = plt.subplots(2, 2, figsize=(16, 11), layout="constrained")
    ood = {name.removeprefix("OOD: "): row for name, row in rows.items() if name.startswith("OOD: ")}
    shown = {name: row for name, row in ood.items() if name in SHOWN or "rank" not in name}
    for ax, s in zip(axes[0], (f"s = {s:g}" for s in SCALES_OF_INPUTS), strict=True):
        for i, (name, row) in enumerate(shown.items()):
            sets = list(row["ood"][s])
            values, errors = zip(*(row["ood"][s][other]["variation ratio"]["auroc"] for other in sets), strict=True)
            places = torch.arange(len(sets)) + 0.8 * (i / len(shown) - 0.5)
            ax.errorbar(places, values, [error or 0.0 for error in errors], fmt="o", markersize=4, label=name)
        ax.set_xticks(range(len(sets)), sets, rotation=15)
        ax.set(ylabel="AUROC of the variation ratio, %", title=f"inputs multiplied by {s[4:]}")
    axes[0, 1].legend(fontsize=8)
    if "SGLD" in ood:
        draw = ood["SGLD"]["bytes"] / ood["SGLD"]["about"]["kept"]
        kinds: dict[str, list[tuple[float, float]]] = {}
        for name, row in ood.items():
            kind, number = re.subn(r" ?(rank )?\d+,?", "", name)
            if number:
                kinds.setdefault(kind.strip(" ,"), []).append((row["bytes"] / draw, gap(row, ood["SGLD"])))
        for kind, points in kinds.items():
            axes[1, 0].plot(*zip(*sorted(points), strict=True), marker="o", label=kind)
        axes[1, 0].axhline(0.5, color="0.6", linestyle="--", linewidth=1)
        axes[1, 0].set(xscale="log", yscale="log", xlabel="storage, in draws", ylabel="largest difference of AUROC from SGLD, points")
        if kinds:
            axes[1, 0].legend()
    found = {name.removeprefix("detection: "): row for name, row in rows.items() if name.startswith("detection: ")}
    for i, detector in enumerate(("MC dropout", "SGLD", "APD")):
        values = [row["detectors"][detector]["all"]["model variance"]["auroc"] for row in found.values()]
        axes[1, 1].barh(torch.arange(len(found)) + 0.25 * (i - 1), values, height=0.25, label=f"{detector} as detector")
    axes[1, 1].set_yticks(range(len(found)), list(found), fontsize=8)
    axes[1, 1].axvline(50.0, color="0.6", linestyle="--", linewidth=1)
    axes[1, 1].set(xlabel="AUROC of U(x), attacked against clean, %")
    if found:
        axes[1, 1].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def table(rows: dict[str, Any]) -> str:
    """AUROC of the variation ratio, and detection by U(x)."""
    lines = []
    for name, row in rows.items():
        if name.startswith("OOD"):
            cells = [f"{auroc(row, s, other):7.2f}" for s, sets in row["ood"].items() for other in sets]
            lines.append(f"{name:34}{100 * row['accuracy'][0]:7.2f}{row['bytes'] / 2**20:9.1f} MiB" + "".join(cells))
        else:
            cells = [f"{found['all']['model variance']['auroc']:7.2f}" for found in row["detectors"].values()]
            lines.append(f"{name:44}{100 * row['hit_share']:7.1f}" + "".join(cells))
    return "\n".join(lines)
