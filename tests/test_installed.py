"""What is installed: an sdist that holds all of what it holds, and dependencies that are named and not hoped for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


SOURCES = pytest.mark.skipif(not (ROOT / "pyro_advbayes").is_dir(), reason="the package is installed, without its sources beside the tests")


USE = """
import warnings
import torch
import pyro_advbayes as ab

warnings.simplefilter("ignore")
torch.manual_seed(0)
x = torch.randn(40, 2)
model = ab.nn.Classifier(ab.nn.bayesianize(torch.nn.Linear(2, 3)))
mcmc = ab.SGMCMC(ab.SGLD(model, step_size=1e-3), num_samples=3, warmup_steps=1, disable_progbar=True)
mcmc.run(x, x.argmax(-1))
print(ab.__file__, ab.PosteriorClassifier(model, mcmc.get_samples())(x).shape)
"""


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """A source and a binary distribution, built from a copy without a repository around it."""
    for module in ("build", "twine"):
        pytest.importorskip(module)
    copy = tmp_path_factory.mktemp("distribution") / "copy"
    (copy / "tests").mkdir(parents=True)
    shutil.copytree(ROOT / "pyro_advbayes", copy / "pyro_advbayes", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "tests/test_installed.py", "tests/small_models.py"):
        shutil.copy(ROOT / name, copy / name)
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return copy / "dist"


@SOURCES
def test_an_sdist_holds_the_package_and_no_test_without_its_helpers(distributions):
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pyro_advbayes").rglob("*.py")}
    assert sources | {"pyproject.toml", "README.md", "LICENSE", "pyro_advbayes/py.typed"} <= names
    assert not [name for name in names if name.startswith("tests")]


@SOURCES
def test_an_index_would_take_both_distributions(distributions):
    files = [str(path) for path in distributions.iterdir()]
    assert len(files) == 2
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@SOURCES
def test_the_wheel_works_away_from_the_checkout(distributions, tmp_path):
    wheel = next(distributions.glob("*.whl"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path / "site"), str(wheel)]
    subprocess.run(install, check=True)
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == str(tmp_path / "site" / "pyro_advbayes" / "__init__.py") and "[40, 3]" in done.stdout


EXTRAS = {
    "images": ("torchvision", "PIL"),
    "plots": ("matplotlib",),
    "sklearn": ("sklearn",),
}
NEEDS = {
    "plots": ["ab.diagnostics.plot_scores({'own': torch.rand(5)})"],
    "sklearn": [
        "ab.datasets.digits()",
        "ab.datasets.two_moons()",
        *(f"ab.diagnostics.{name}(ONE, ONE)" for name in ("auroc", "aupr_out", "aupr_in")),
    ],
    "images": ["read_idx(Path('absent'), 3)", "_decode(Path('absent'), None, [], range(0))"],
}
SCRIPT = """
import sys
from pathlib import Path

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
import torch
import pyro_advbayes as ab
from pyro_advbayes.datasets.files import read_idx
from pyro_advbayes.datasets.images import _decode

ONE = torch.rand(5)
for call in {calls}:
    try:
        eval(call)
    except ModuleNotFoundError as error:
        print(error)
    else:
        print("no error", call)
"""


def test_without_its_extras_the_package_imports_and_names_the_extra_that_a_call_needs():
    """In a process in which the optional modules cannot be imported."""
    hidden = {module for modules in EXTRAS.values() for module in modules}
    calls = [call for extra in EXTRAS for call in NEEDS[extra]]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(hidden=hidden, calls=calls)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = [extra for extra in EXTRAS for _ in NEEDS[extra]]
    found = [re.fullmatch(r"(\w+) is not installed: pip install 'pyro_advbayes\[(\w+)\]'", line) for line in done.stdout.splitlines()]
    assert [match and match[2] for match in found] == expected, done.stdout
    assert all(match[1] in EXTRAS[match[2]] for match in found)


@SOURCES
def test_every_extra_that_an_error_names_is_one():
    text = (ROOT / "pyproject.toml").read_text()
    named = {
        match
        for path in (ROOT / "pyro_advbayes").rglob("*.py")
        for match in re.findall(r'need_extra\("[\w.]+", "(\w+)"\)', path.read_text())
    }
    assert named == set(EXTRAS)
    assert all(re.search(rf"^{extra} = \[", text, re.MULTILINE) for extra in EXTRAS)


def test_what_a_file_of_arviz_is_written_through_is_a_dependency():
    """ArviZ 1 and h5netcdf bring none of it."""
    text = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r'^  "([a-z0-9-]+)', text[text.index("\ndependencies") : text.index("[project.optional")], re.MULTILINE)
    import h5netcdf.legacyapi  # noqa: F401, what xarray writes through

    assert {"h5netcdf", "h5py"} <= set(named) and "h5py" in sys.modules
