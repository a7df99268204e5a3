"""Sphinx: ``make docs`` builds the pages here, the notebooks of ``tutorials/`` with their stored outputs, and the docstrings."""

from __future__ import annotations

import pydoc
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that a checkout need not be installed

import pyro_advbayes

project = "pyro_advbayes"
author = copyright = "the pyro_advbayes authors"
version = release = pyro_advbayes.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.viewcode", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"pyro_advbayes {version}"
exclude_patterns = ["_build", "tutorials/papers", "tutorials/results"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests execute them, and compare what they print with the outputs stored here

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"

# Links to names of this package must lead somewhere. The inventories of PyTorch, Pyro and ArviZ would need a network.
nitpicky = True
nitpick_ignore = [("py:class", "Axes"), ("py:class", "torch.optim.optimizer.Optimizer")]  # imported for types alone; deleted by torch.optim
OWN = "pyro_advbayes"


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, contents: nodes.Element) -> nodes.Element | None:
    """
    Links a name to where it is documented, which is not where it is defined: ``pyro_advbayes.infer.mcmc.sgld.SGLD``, or ``SGLD``. What
    exists and has no page, in this package or another, stays text; what does not exist is left to Sphinx, which warns.
    """
    target = node["reftarget"]
    if node.get("refdomain") != "py":
        return None
    for length in (2, 1):  # a method with its class, or a name by itself
        tail = target.split(".")[-length:]
        found = {entry.node_id: entry for name, entry in env.domaindata["py"]["objects"].items() if name.split(".")[-length:] == tail}
        if len(found) == 1:
            (entry,) = found.values()
            return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contents, target)
    own = (module for name, module in sys.modules.items() if name.startswith("pyro_advbayes"))
    exists = pydoc.locate(target) is not None or any(hasattr(module, target.split(".")[-1]) for module in own)
    return contents if exists else None


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True}
