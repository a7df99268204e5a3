from __future__ import annotations

import os

# Before torch is imported, and inherited by the processes that tests start: results must not depend on the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_state():
    """Every test starts from one seed, an empty parameter store, validation on and float32, and leaves no trace."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(True):
        yield
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def pytest_collection_modifyitems(items):
    """The longest files first, so that no process begins them when the others are done."""
    items.sort(key=lambda item: "tutorials" not in item.path.parts)
