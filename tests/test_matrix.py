"""The test matrix installs what its rows say, tests what was installed, and says what could not be tried."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import matrix

OWN = f"{sys.version_info[0]}.{sys.version_info[1]}"
ROW = matrix.Row(OWN, ("torch==2.6.0",))


@pytest.fixture
def commands(monkeypatch):
    """The commands that would be run, and what they would see. Those with the word ``fail`` in them fail."""
    found = SimpleNamespace(run=[], fail="nothing", tree=[], env=[])

    def run(command, cwd=None, env=None, **options):
        found.run.append(command)
        if cwd is not None:
            found.tree, found.env = [path.name for path in Path(cwd).iterdir()], env
        failed = any(found.fail in word for word in command)
        return SimpleNamespace(returncode=int(failed), stdout="1 failed in 2 s\n\n", stderr="no such thing\n" if failed else "")

    monkeypatch.setattr(matrix, "interpreter", lambda version: sys.executable)
    monkeypatch.setattr(matrix.shutil, "which", lambda name: None)
    monkeypatch.setattr(subprocess, "run", run)
    return found


def test_an_interpreter_is_of_the_version_asked_for():
    told = subprocess.run([matrix.interpreter(OWN), "--version"], capture_output=True, text=True).stdout
    assert told.startswith(f"Python {OWN}.") and matrix.interpreter("2.9") is None


def test_a_row_is_installed_with_its_pins_and_tested_without_the_checkout(commands, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(matrix.ROOT))
    assert matrix.attempt(ROW, ["tests/storage"], ["--no-index"]) == "passed"
    make, install, test = commands.run
    assert make[:3] == [sys.executable, "-m", "venv"]
    assert {"--no-index", f"{matrix.ROOT}[dev]", "torch==2.6.0"} <= set(install) and test[1:] == ["-m", "pytest", "-q", "tests/storage"]
    assert install[0] == test[0] and "PYTHONPATH" not in commands.env
    assert set(commands.tree) == set(matrix.COPIED) and "pyro_advbayes" not in commands.tree


@pytest.mark.parametrize("fail,says", [("pip", "not tried: .* failed: no such thing"), ("pytest", "failed: 1 failed in 2 s")])
def test_what_goes_wrong_is_told(commands, fail, says):
    commands.fail = fail
    assert re.fullmatch(says, matrix.attempt(ROW, ["tests"], []))


def test_a_python_that_is_not_there_is_told(commands, monkeypatch):
    monkeypatch.setattr(matrix, "interpreter", lambda version: None)
    assert matrix.attempt(ROW, [], []) == f"not tried: neither uv nor a Python {OWN} was found" and not commands.run


@pytest.mark.parametrize(
    "outcomes,code",
    [
        (["passed", "not tried: x", "passed", "passed"], False),
        (["not tried: x"] * 4, True),
        (["passed", "failed: x", "passed", "passed"], True),
    ],
)
def test_the_matrix_fails_where_a_row_does_or_none_could_be_tried(monkeypatch, capsys, outcomes, code):
    left = iter(outcomes)
    monkeypatch.setattr(matrix, "attempt", lambda row, tests, index: next(left))
    monkeypatch.setattr(sys, "argv", ["matrix.py"])
    with pytest.raises(SystemExit) as caught:
        matrix.main()
    assert bool(caught.value.code) == code
    told = capsys.readouterr().out.splitlines()
    assert told[-4:] == [f"{row}: {outcome}" for row, outcome in zip(matrix.ROWS, outcomes, strict=True)]
