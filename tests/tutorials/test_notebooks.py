from __future__ import annotations

import re
import resource
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"  # numbers depend on the versions of the libraries, words do not
LIMIT = 180.0  # seconds that a notebook may take, from the start of its kernel to its last cell
NOTEBOOKS = sorted((ROOT / "tutorials").glob("[0-9]*.ipynb"))


def cpu_of_children() -> float:
    """Seconds that child processes which have ended kept cores busy."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def execute(path: Path):
    """Runs a notebook on the checkout's own code, installed or not, within its time."""
    notebook, start, before = nbformat.read(path, as_version=4), time.perf_counter(), cpu_of_children()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    # on a machine that others keep busy, the time that it had a core for
    took = min(time.perf_counter() - start, cpu_of_children() - before)
    assert took < LIMIT, f"{path.name} took {took:.0f} s"
    return notebook


def streams(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def as_told(stem: str) -> str:
    """What a notebook prints, once its words have been found to be those of the committed outputs."""
    path = ROOT / "tutorials" / f"{stem}.ipynb"
    shown, printed = streams(nbformat.read(path, as_version=4)), streams(execute(path))
    told = [re.sub(r"\s+", " ", re.sub(NUMBER, "#", text)) for text in (printed, shown)]
    assert told[0] == told[1]
    return printed


def test_the_first_posterior_is_as_told():
    path = ROOT / "tutorials" / "01-first-posterior.ipynb"
    shown, printed = streams(nbformat.read(path, as_version=4)), streams(execute(path))
    assert re.sub(NUMBER, "#", printed) == re.sub(NUMBER, "#", shown)  # the white space of its tables, too
    assert float(re.search(r"R-hat:.* largest (\S+)", printed).group(1)) < 1.1
    assert float(re.search(r"ESS:.* smallest (\S+)", printed).group(1)) > 100
    point, posterior = (float(value) for value in re.findall(r"AUROC (\S+)", printed))
    assert posterior > point > 0.9


def test_bayesian_adversarial_learning_is_as_told():
    printed = as_told("02-bayesian-adversarial-learning")
    rows = re.findall(r"^(plain posterior|adversarial training|BAL) +((?:[\d.]+ +)+)\(", printed, flags=re.M)
    curves = {name: [float(value) for value in values.split()] for name, values in rows}
    assert min(curve[0] for curve in curves.values()) > 0.9  # clean
    for name in ("adversarial training", "BAL"):
        assert curves[name][6] > curves["plain posterior"][6] + 0.08  # at 0.15, where each is good to 0.026


def test_adversarial_sampling_is_as_told():
    printed = as_told("03-adversarial-sampling")
    rows = re.findall(r"^(plain|plain, 7 x longer|AS) +(0\.\d+) +0\.\d+ +0\.\d+ +(0\.\d+) ±", printed, flags=re.M)
    lowest, ensembled = ({name: float(row[i]) for name, *row in rows} for i in range(2))
    assert lowest["AS"] > max(lowest["plain"], lowest["plain, 7 x longer"]) + 0.05  # where one draw is good to 0.02
    assert max(ensembled.values()) - min(ensembled.values()) < 0.04  # each good to 0.012
    for low, high, together in re.findall(r"^fine-tuned.*lowest (\S+), highest (\S+), ensembled (\S+)$", printed, flags=re.M):
        assert float(low) > 0.9 and float(high) > 0.95 and float(together) > 0.95


def test_distilling_a_posterior_is_as_told():
    printed = as_told("04-distilling-a-posterior")
    rows = re.findall(r"^(SGD|SGLD|APD) +" + r" +".join([r"(\d\.\d+)"] * 5) + "$", printed, flags=re.M)
    entropy = {name: dict(zip(("everywhere", "data", "boundary", "behind", "fits"), map(float, row), strict=True)) for name, *row in rows}
    assert entropy["SGD"]["boundary"] < 0.5 * min(entropy["SGLD"]["boundary"], entropy["APD"]["boundary"])
    assert abs(entropy["APD"]["boundary"] - entropy["SGLD"]["boundary"]) < 0.15
    for place in ("data", "behind"):  # where the chain is sure; the generator less so, as the text says
        assert entropy["SGLD"][place] < 0.05 and entropy["APD"][place] < 0.25
    assert entropy["SGLD"]["fits"] > 0.98 and entropy["APD"]["fits"] > 0.8
    # the bound is the chain's own Monte Carlo error: what its halves differ by, on the mean and where they differ most
    gaps = {name: (float(mean), float(most)) for name, mean, most in re.findall(r"^  (.+): +mean (\S+), largest (\S+)$", printed, re.M)}
    assert all(here < own for here, own in zip(gaps["APD and SGLD"], gaps["halves of the SGLD chain"], strict=True))
    stored = re.findall(r"^(\S.*?) +\d+ kB = +(\S+) draws +distance (\S+)$", printed, flags=re.M)
    draws, distance = ({name: float(row[i]) for name, *row in stored} for i in range(2))
    assert distance["factored, rank 8"] < distance["every 50th draw"] and draws["factored, rank 8"] < draws["every 50th draw"]
    assert distance["factored, rank 8"] < distance["factored, rank 2"]
    scores = re.findall(r"^(SGLD|APD|one draw of SGLD) +(0\.\d+) +(0\.\d+) +(0\.\d+)$", printed, flags=re.M)
    auroc = {name: [float(value) for value in row] for name, *row in scores}
    assert all(abs(ours - theirs) < 0.06 for ours, theirs in zip(auroc["APD"], auroc["SGLD"], strict=True))  # each good to 0.02
    assert all(ours > single for ours, single in zip(auroc["APD"], auroc["one draw of SGLD"], strict=True))
    files = re.findall(r"^torch\.float\S+ +(\d+) kB +distance (\S+)$", printed, flags=re.M)
    (full, apart), (half, rounded) = ([float(value) for value in row] for row in files)
    assert half < 0.55 * full and abs(rounded - apart) < 0.001


def test_a_notebook_that_takes_too_long_is_refused_though_none_of_its_cells_does(tmp_path, monkeypatch):
    busy = "import time; end = time.process_time() + 0.2\nwhile time.process_time() < end: pass"
    cells = [nbformat.v4.new_code_cell(busy) for _ in range(3)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "slow.ipynb")
    assert len(execute(tmp_path / "slow.ipynb").cells) == 3
    monkeypatch.setattr("tests.tutorials.test_notebooks.LIMIT", 0.6)
    with pytest.raises(AssertionError, match=r"slow.ipynb took \d+ s"):
        execute(tmp_path / "slow.ipynb")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_small_and_free_of_warnings(path):
    assert path.stat().st_size < 300_000
    for cell in nbformat.read(path, as_version=4).cells:
        assert not [output for output in cell.get("outputs", []) if output.get("name") == "stderr"]
        assert "execution" not in cell.metadata
