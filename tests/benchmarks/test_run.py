"""The benchmarks run, and say truly what they measured."""

from __future__ import annotations

import json

import pytest
import torch

from tests.benchmarks import run, samplers
from tests.benchmarks.measure import Comparison, Contender, Missing, Spread, Stopwatch, Target, machine, ratio
from tests.benchmarks.rows_sampling import compare
from tests.benchmarks.workloads import BATCH, SMALL

CPU = torch.device("cpu")


@pytest.fixture
def watch() -> Stopwatch:
    return Stopwatch(CPU, quick=True)


def test_a_quick_run_writes_every_number_beside_its_target(tmp_path):
    out = tmp_path / "quick.json"
    run.main(["--quick", "--only", "step_small", "predict_small", "--out", str(out)])
    report = json.loads(out.read_text())
    assert set(report["rows"]) == {"step_small", "predict_small"}
    (step,) = report["rows"]["step_small"]["results"]
    assert step["values"]["graph"]["count"] == 2 and step["values"]["hand-written loop"]["median"] > 0
    (graph,) = [c for c in step["comparisons"] if c["what"] == "graph / hand-written loop"]
    assert graph["target"] == "<= 1.6" and graph["met"] == (graph["median"] <= 1.6)
    assert step["missing"] == {"compile": "a quick run compiles nothing"}
    assert len(report["rows"]["predict_small"]["results"]) == 8


def test_a_partial_run_keeps_the_results_of_the_last_full_one(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "ROWS", {"nothing": _nothing, "else": _nothing})
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    run.main(["--only", "nothing"])
    assert not (tmp_path / "results").exists()
    run.main([])
    assert (tmp_path / "results" / "cpu.json").exists()


def test_rows_measured_later_take_their_places_in_the_file_unless_it_is_of_another_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "ROWS", {"nothing": _nothing, "else": _nothing})
    out = tmp_path / "kept.json"
    run.main(["--only", "else", "--out", str(out)])
    first = json.loads(out.read_text())["rows"]["else"]
    run.main(["--only", "nothing", "--out", str(out)])
    report = json.loads(out.read_text())
    assert set(report["rows"]) == {"nothing", "else"} and report["rows"]["else"] == first
    assert len(first["load"]) == 2 and first["started"]
    out.write_text(json.dumps({**report, "machine": {**report["machine"], "cpu": "abacus"}}))
    with pytest.raises(SystemExit, match="has rows of another machine: give another --out"):
        run.main(["--only", "nothing", "--out", str(out)])


def _nothing(watch: Stopwatch) -> list:
    """Measures nothing."""
    return []


def test_a_rival_that_is_not_installed_is_reported(watch):
    def absent() -> Contender:
        raise Missing("it is not installed")

    result = compare(watch, "x", {"ours": lambda: Contender(lambda: None), "theirs": absent}, [("ours", "theirs", Target("<", 1.0))])
    assert result.missing == {"theirs": "it is not installed"} and not result.comparisons
    assert result.as_json()["missing"] == result.missing


def test_ratios_are_taken_round_by_round():
    slow_afternoon = {"a": [1.0, 10.0, 3.0], "b": [2.0, 20.0, 6.0]}
    assert ratio(slow_afternoon, "a", "b") == Spread(0.5, 0.5, 0.5, 3)


def test_times_are_of_one_step_and_rounds_belong_together(watch):
    calls = []
    times = watch.race("x", {name: Contender(lambda name=name: calls.append(name), 1000) for name in "abc"})
    assert {len(values) for values in times.values()} == {2}
    assert calls[6:] == ["a", "b", "c", "b", "c", "a"]  # after a warm-up and a first look at the time, in turn
    assert max(map(max, times.values())) < 1e-2  # milliseconds, of a thousandth of a call


@pytest.mark.parametrize(
    ("relation", "value", "met"),
    [("<=", 1.0, True), ("<=", 1.01, False), ("<", 1.0, False), ("<", 0.99, True), (">=", 1.0, True), (">=", 0.99, False)],
)
def test_a_target_is_met_or_missed_by_the_median(relation, value, met):
    assert Comparison("x", Spread(value, 0.0, 2.0, 3), Target(relation, 1.0)).met is met
    assert Comparison("x", Spread(value, 0.0, 2.0, 3)).met is None


def test_the_machine_is_described():
    described = machine(CPU)
    assert described["versions"]["torch"] == torch.__version__.split("+")[0] and described["threads"] == torch.get_num_threads()
    assert described["cpu"] and described["cores"] >= 1


def test_minibatches_written_by_hand_visit_every_row_once_an_epoch():
    batches = samplers.Minibatches(10 * BATCH)
    epoch = torch.cat([batches.next() for _ in range(10)])
    assert epoch.sort().values.equal(torch.arange(10 * BATCH))
    assert not torch.cat([batches.next() for _ in range(10)]).equal(epoch)


def test_the_loop_written_by_hand_samples_the_same_law(monkeypatch):
    """Its gradient step, taken without noise, is the kernel's."""
    from pyro_advbayes import SGLD

    x, y = torch.rand(BATCH, 2), torch.randint(2, (BATCH,))
    net = SMALL.plain()
    kernel = SGLD(SMALL.model(), 1e-3, temperature=0.0, batch_size=BATCH)
    sites = {f"net.{name}": p.detach().clone() for name, p in net.named_parameters()}
    kernel.initial_params = sites
    monkeypatch.setattr(samplers, "data", lambda *_: (x, y))
    monkeypatch.setattr(samplers, "ROWS", BATCH)
    monkeypatch.setattr(samplers, "STEP_SIZE", 1e-3)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    kernel.setup(0, x, y)
    after = kernel.sample(kernel.initial_params)
    samplers._hand_written_loop(type(SMALL)("same", lambda: net, SMALL.model, SMALL.inputs, SMALL.classes), CPU)(1)
    for theirs, ours in zip(net.parameters(), (after[name] for name in sites), strict=True):
        torch.testing.assert_close(theirs.detach(), ours, rtol=1e-4, atol=1e-6)
