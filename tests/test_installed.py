"""What is installed: an sdist that holds all of what it holds, and dependencies that are named and not hoped for."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_an_sdist_holds_the_package_and_no_test_without_its_helpers(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path / "copy"
    (copy / "tests").mkdir(parents=True)
    shutil.copytree(ROOT / "pyro_advbayes", copy / "pyro_advbayes", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "tests/test_installed.py", "tests/small_models.py"):
        shutil.copy(ROOT / name, copy / name)
    build = "from setuptools import build_meta; build_meta.build_sdist('.')"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(copy.glob("*.tar.gz"))) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pyro_advbayes").rglob("*.py")}
    assert sources | {"pyproject.toml", "README.md", "LICENSE", "pyro_advbayes/py.typed"} <= names
    assert not [name for name in names if name.startswith("tests")]


def test_what_a_file_of_arviz_is_written_through_is_a_dependency():
    """ArviZ 1 and h5netcdf bring none of it."""
    text = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r'^  "([a-z0-9-]+)', text[text.index("\ndependencies") : text.index("[project.optional")], re.MULTILINE)
    import h5netcdf.legacyapi  # noqa: F401, what xarray writes through

    assert {"h5netcdf", "h5py"} <= set(named) and "h5py" in sys.modules
