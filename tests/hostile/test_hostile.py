"""A few of the attacks on files, and of the kills, that ``make attack-files`` and ``make kill-test`` make by the hundred."""

from __future__ import annotations

import random
import struct

import pytest
import torch

from tests.hostile import attack, kill

pytestmark = [pytest.mark.forks, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", attack.KINDS)
def test_a_damaged_file_of_any_kind_is_refused_or_read_as_it_was(name, capsys):
    counts = attack.attack(name, 15, seed=1)
    assert not any(counts[kind] for kind in attack.WRONG), capsys.readouterr().out
    assert counts[attack.REFUSED] >= 10


@pytest.mark.parametrize("name", ["APD", "active learning"])
def test_a_run_killed_at_a_random_moment_goes_on(name):
    for seed in range(3, 20):  # until one was killed between its first checkpoint and its end
        happened = kill.kill(name, random.Random(seed))
        assert "lost" not in happened
        if "killed" in happened:
            return
    pytest.fail("no run was killed in time")


def test_the_attacks_notice_what_is_read_as_something_else(tmp_path, monkeypatch):
    values = iter([torch.ones(2), *[torch.zeros(2)] * 20])
    kind = attack.Kind(lambda path: path.write_bytes(struct.pack("<Q", 2) + b"{}"), lambda path: {"w": next(values)}, None, None)
    monkeypatch.setitem(attack.KINDS, "it", kind)
    monkeypatch.setattr(attack, "damaged", lambda whole, generator: ("one bit", whole))
    assert attack.attack("it", 3, seed=0)[attack.SILENT] == 3


def test_the_kills_notice_what_ends_as_something_else(monkeypatch):
    monkeypatch.setitem(kill.CASES, "it", kill.Case(lambda path: {"w": torch.rand(2)}, lambda path: {"w": torch.rand(2)}))
    assert kill.kill("it", random.Random(0))[-1] != "lost", "the same seed gives the same"
    ends = iter([torch.ones(2), torch.zeros(2)])
    kill._whole.cache_clear()
    monkeypatch.setitem(kill.CASES, "it", kill.Case(lambda path: {"w": next(ends)}, lambda path: {"w": torch.ones(2)}))
    assert kill.kill("it", random.Random(0))[-1] == "lost"
