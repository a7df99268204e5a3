"""
Installs the package with several Pythons and versions of PyTorch and Pyro, and runs tests on what was installed: ``make test-matrix``.

Needs ``uv``, or the interpreters (``python3.10`` and so on, on the path or of pyenv). Says what could not be tried.
"""

from __future__ import annotations

import argparse
import glob
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = (
    *("tests", "models", "tutorials", "docs", "pyproject.toml", "MANIFEST.in", "Makefile"),
    *("README.md", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff"),
)
# Files, chains, ArviZ, guides: what has broken between versions. --all runs everything.
QUICK = (
    "tests/storage",
    "tests/test_installed.py",
    "tests/infer/mcmc/test_runner.py",
    "tests/diagnostics/test_arviz.py",
    "tests/test_checked.py",
)


class Row(NamedTuple):
    """
    One installation.

    :param pins: what pip is told beside the package; nothing gives the newest that the package allows.
    """

    python: str
    pins: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"Python {self.python} with {' '.join(self.pins) or 'the newest of everything'}"


ROWS = (
    Row("3.10", ("torch==2.6.0", "torchvision==0.21.0", "pyro-ppl==1.9.0")),  # the lower bounds of pyproject.toml
    Row("3.11"),
    Row("3.12"),
    Row("3.13", ("arviz>=1",)),
)


def interpreter(version: str) -> str | None:
    """A Python of this version that starts."""
    found = [shutil.which(f"python{version}"), *sorted(glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python")))]
    for path in [sys.executable, *found]:
        if path is not None:
            told = subprocess.run([path, "-c", "import sys; print(*sys.version_info[:2], sep='.')"], capture_output=True, text=True)
            if told.stdout.strip() == version:
                return path
    return None


def attempt(row: Row, tests: list[str], index: list[str]) -> str:
    """
    Installs a row in a folder of its own, and tests it.

    :param index: further options of pip or uv, e.g. where to find packages.
    :return: ``"passed"``, or what went wrong.
    """
    uv, python = shutil.which("uv"), interpreter(row.python)
    if uv is None and python is None:
        return f"not tried: neither uv nor a Python {row.python} was found"
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "venv"
        make = [uv, "venv", "--python", row.python, str(environment)] if uv else [str(python), "-m", "venv", str(environment)]
        runner = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
        install = [uv, "pip", "install", "--python", str(runner)] if uv else [str(runner), "-m", "pip", "install", "--quiet"]
        for command in (make, [*install, *index, f"{ROOT}[dev]", *row.pins]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                return f"not tried: {' '.join(command[:4])} failed: {_last(done.stderr or done.stdout)}"
        # a copy without the package, so that the installed one is imported
        tree = Path(folder) / "tree"
        tree.mkdir()
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, tree / name)
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        environ.pop("PYTHONPATH", None)
        done = subprocess.run([str(runner), "-m", "pytest", "-q", *tests], cwd=tree, capture_output=True, text=True, env=environ)
        print(done.stdout[-3000:], flush=True)
        return "passed" if done.returncode == 0 else f"failed: {_last(done.stdout)}"


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def main() -> None:
    """Prints a line a row, and fails if a row that could be tried failed, or none could."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="a Python, e.g. 3.12")
    parser.add_argument("--all", action="store_true", help="all tests, not those that have broken between versions")
    parser.add_argument("--index", action="append", default=[], help="an option of pip, e.g. --index=--find-links=/wheels")
    options = parser.parse_args()
    results = {}
    for row in ROWS:
        if options.only in (None, row.python):
            results[row] = attempt(row, ["tests"] if options.all else list(QUICK), options.index)
            print(f"{row}: {results[row]}", flush=True)
    print("\n".join(f"{row}: {result}" for row, result in results.items()))
    sys.exit("passed" not in results.values() or any(result.startswith("failed") for result in results.values()))


if __name__ == "__main__":
    main()
