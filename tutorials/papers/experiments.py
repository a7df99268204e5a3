"""What the papers' scripts share: files that are written result by result, and read again by the next start."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pyro
import torch

import pyro_advbayes as ab


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
    Results by name in one JSON file, ``{"settings": ..., "results": {name: ...}}``.

    :param path: the file; what is in it is not computed again.
    :param wanted: the settings.
    :raises ValueError: if the file was written with other settings.
    """

    def __init__(self, path: Path, wanted: dict[str, Any]) -> None:
        self.path, self.settings, self.found = path, wanted, {}
        if path.exists():
            content = json.loads(path.read_text())
            differing = [name for name in wanted if content["settings"].get(name) != wanted[name]]
            if differing:
                raise ValueError(f"{path} was written with another {', '.join(differing)}: move it away, or give another --out")
            self.found = content["results"]

    def __contains__(self, name: str) -> bool:
        return name in self.found

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Keeps a result, in the file as well: whole, or not at all."""
        self.found[name] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({"settings": self.settings, "results": self.found}, indent=1) + "\n")
        part.replace(self.path)
