"""What the papers' scripts share: their arguments, and files that are written result by result and read again by the next start."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

import pyro_advbayes as ab

PICTURE_EVERY = 60.0  # seconds: a row takes hours at one scale and less than its picture at another


class Task(NamedTuple):
    """Inputs ``[N, ...]`` with their classes, to train and to test on."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def parser(description: str, scales: Iterable[str], about_scales: str = "", data: bool = True) -> argparse.ArgumentParser:
    """
    The arguments that the scripts share.

    :param scales: their names; the smallest, "smoke", is a test.
    :param about_scales: what is to be said of the others.
    :param data: whether data sets are read from files.
    """
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--scale", choices=list(scales), default="cpu", help="smoke: only to see that everything runs" + about_scales)
    found.add_argument("--seed", type=int, default=0, help="of all that is random, but for the data")
    if data:
        found.add_argument("--data", type=Path, help="folder of the data sets; by default PYRO_ADVBAYES_DATA")
    found.add_argument("--device", default="cpu")
    found.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results", help="folder for the files")
    return found


def settings(scale: str, seed: int, device: str, **others: Any) -> dict[str, Any]:
    """What the numbers depend on, as JSON has it."""
    values = {
        "scale": scale,
        "seed": seed,
        **others,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"cpu ({platform.machine()})",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "pyro_advbayes": ab.__version__,
        },
    }
    return json.loads(json.dumps(values))


class Results:
    """
    Results by name in one JSON file, ``{"settings": ..., "results": {name: ...}}``. The file is read again whenever it matters, so that
    several processes, each with rows of its own, may fill it.

    :param path: the file; what is in it is not computed again.
    :param wanted: the settings.
    :raises ValueError: if the file was written with other settings.
    """

    def __init__(self, path: Path, wanted: dict[str, Any]) -> None:
        self.path, self.settings = path, wanted
        self.found: dict[str, Any] = {}
        self._new, self._next_picture = False, time.monotonic() + PICTURE_EVERY
        self._read()

    @property
    def work(self) -> Path:
        """The folder of checkpoints and networks, beside the file."""
        folder = self.path.with_name(f"{self.path.stem}-work")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def in_order(self, names: Iterable[str]) -> dict[str, Any]:
        """The results that there are, in the order of ``names``."""
        self._read()
        return {name: self.found[name] for name in names if name in self.found}

    def __contains__(self, name: str) -> bool:
        self._read()
        return name in self.found

    def _read(self) -> None:
        if self.path.exists():
            content = json.loads(self.path.read_text())
            differing = [name for name in self.settings if content["settings"].get(name) != self.settings[name]]
            if differing:
                raise ValueError(f"{self.path} was written with another {', '.join(differing)}: move it away, or give another --out")
            self.found = content["results"]

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Keeps a result, in the file as well: whole, or not at all."""
        self._read()
        self.found[name], self._new = result, True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"settings": self.settings, "results": self.found}, indent=1) + "\n")
        part.replace(self.path)

    def show(self, picture: Callable[[dict[str, Any], Path], None], names: Iterable[str], last: bool = False) -> None:
        """
        Draws new results into a file beside theirs, once a minute.

        :param picture: draws results into a file.
        :param names: of the results, in order.
        :param last: whether to draw them in any case.
        """
        if self._new and (last or time.monotonic() >= self._next_picture):
            picture(self.in_order(names), self.path.with_suffix(".png"))
            self._new, self._next_picture = False, time.monotonic() + PICTURE_EVERY
