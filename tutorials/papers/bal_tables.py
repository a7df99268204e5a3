"""What :mod:`tutorials.papers.bal_mnist` shows: its table and its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

from pyro_advbayes import diagnostics as dg

EPS = tuple(round(0.15 * i / 9, 4) for i in range(10))
LARGEST = EPS[-1]


def picture(rows: dict[str, Any], path: Path) -> None:
    """Accuracy under FGSM against its size, the trade of clean for robust accuracy, and accuracy after the one step of a C-W loss."""
    figure, (left, right, step) = plt.subplots(1, 3, figsize=(20, 9), layout="constrained", width_ratios=(3, 3, 2))
    colours = matplotlib.colormaps["tab20"].colors
    left.set_prop_cycle(color=colours)
    curves = {}
    for name, row in rows.items():
        if not name.startswith("settings"):
            values, errors = zip(*(row["FGSM"][str(eps)] for eps in EPS), strict=True)
            curves[name] = dg.AccuracyCurve(*(torch.tensor(column) for column in (EPS, values, errors)))
    dg.plot_accuracy_curves(curves, xlabel="FGSM's eps", ax=left)
    for i, (name, row) in enumerate(rows.items()):
        (clean, clean_error), (robust, robust_error) = row["FGSM"]["0.0"], row["PGD"][str(LARGEST)]
        look = {"color": colours[i % 20], "fmt": "os"[i // 20 % 2]}  # the curves' colours
        right.errorbar(clean, robust, robust_error, clean_error, **look, label=f"{name} ({clean:.3f}, {robust:.3f})")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)  # points lie in all corners
    right.set(xlabel="clean accuracy", ylabel=f"accuracy under PGD, eps = {LARGEST}")
    values, errors = zip(*(row["one-step C-W"] for row in rows.values()), strict=True)
    step.barh([f"{name} ({value:.3f})" for name, value in zip(rows, values, strict=True)], values, xerr=errors)
    step.invert_yaxis()
    step.set(xlabel="accuracy after one C-W step")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def table(rows: dict[str, Any]) -> str:
    """A line for each method."""
    lines = [f"{'':34}{'clean':>14}{'FGSM .15':>14}{'PGD .15':>14}{'Square .15':>14}{'C-W step':>14}{'size L2':>9}{'seconds':>9}"]
    for name, row in rows.items():
        numbers = (row["FGSM"]["0.0"], *(row[attack][str(LARGEST)] for attack in ("FGSM", "PGD", "Square")), row["one-step C-W"])
        size = f"{row['size']['l2']:9.2f}" if row["size"] else " " * 9
        lines.append(f"{name:34}" + "".join(f"{value:>8.4f}±{error:.3f}" for value, error in numbers) + f"{size}{row['seconds']:9.0f}")
    return "\n".join(lines)
