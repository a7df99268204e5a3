"""The documentation: it builds without a warning, and every public name is on a page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pyro_advbayes as ab

InventoryFile = pytest.importorskip("sphinx.util.inventory", reason="the extra docs is not installed").InventoryFile

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built pages; warnings, such as links that lead nowhere, are errors."""
    out = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_every_public_name_is_on_a_page_with_its_source(site):
    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, uri: uri)
    documented = {name.split(".")[-1]: entry[2] for kind in inventory for name, entry in inventory[kind].items() if kind.startswith("py:")}
    modules = {"attacks", "datasets", "diagnostics", "distill", "nn", "adversary", "schedules"}
    public = set(ab.__all__) - modules
    for module in ("attacks", "datasets", "diagnostics", "distill", "nn"):
        public |= set(getattr(ab, module).__all__)
    missing = public - set(documented) - {"Prior", "PRESETS"}  # an alias of types, a table
    assert not missing
    page = (site / documented["SGHMC"].split("#")[0]).read_text()
    assert "viewcode-link" in page


def test_pages_show_mathematics_pictures_and_stored_outputs(site):
    assert "MathJax" in (site / "api" / "samplers.html").read_text()
    assert "front-page.png" in (site / "index.html").read_text()
    notebook = (site / "tutorials" / "01-first-posterior.html").read_text()
    assert "image/png" in notebook or "_images/" in notebook
