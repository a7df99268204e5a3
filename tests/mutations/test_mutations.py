"""The table of mutations fits the code, and the script that runs it tells what it finds."""

from __future__ import annotations

import json

import pytest

from tests.mutations import run as script
from tests.mutations.mutation import ROOT, Mutation, problems
from tests.mutations.table import MUTATIONS

TEST = """
from package import double, half
def test_double(): assert double(3) == 6
def test_half(): assert half(4) < 4
"""
DOUBLED = Mutation("a double trebled", "pyro_advbayes/package.py", "x * 2", "x * 3", ("tests/test_package.py::test_double",))
HALVED = Mutation("a half that is a third", "pyro_advbayes/package.py", "x / 2", "x / 3", ("tests/test_package.py",))


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "PRELOADED", ["pytest"])
    (tmp_path / "pyro_advbayes").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["pyro_advbayes"]\n')
    (tmp_path / "pyro_advbayes" / "package.py").write_text("def double(x): return x * 2\ndef half(x): return x / 2\n")
    (tmp_path / "tests" / "test_package.py").write_text(TEST)
    return tmp_path


def test_every_entry_of_the_table_fits_the_code():
    assert not problems(MUTATIONS, ROOT)


def test_what_does_not_fit_is_refused_by_name(tree):
    found = problems(
        [
            DOUBLED,
            DOUBLED._replace(name="gone", old="x * 4"),
            DOUBLED._replace(name="twice", old="return"),
            DOUBLED._replace(name="no code", new="x *"),
            DOUBLED._replace(name="no change", new="x * 2"),
            DOUBLED._replace(name="no test", tests=("tests/test_package.py::test_treble", "tests/test_other.py")),
            DOUBLED._replace(name="none named", tests=()),
            DOUBLED,
        ],
        tree,
    )
    assert len(found) == 8 and [line.split(":")[0] for line in found[1:]] == [
        "gone",
        "twice",
        "no code",
        "no change",
        "no test",
        "no test",
        "none named",
    ]
    assert "occurs 0 times" in found[1] and "occurs 2 times" in found[2] and "two mutations" in found[0]


def test_what_tests_notice_is_caught_and_what_they_do_not_survives(tree, capsys):
    results = tree / "results.json"
    assert script.run([DOUBLED], tree, results)
    assert not script.run([DOUBLED, HALVED], tree, results)
    printed = capsys.readouterr().out
    assert "1 of them known" in printed and "survived: a half that is a third" in printed
    assert {name: kept["outcome"] for name, kept in json.loads(results.read_text()).items()} == {
        DOUBLED.name: "caught",
        HALVED.name: "survived",
    }
    assert (tree / "pyro_advbayes" / "package.py").read_text().count("x * 2") == 1  # the tree itself stays as it is


def test_a_result_stands_until_the_code_or_a_test_changes(tree, monkeypatch):
    results = tree / "results.json"
    assert not script.run([HALVED], tree, results)
    with monkeypatch.context() as patched:
        patched.setattr(script, "_outcome", lambda *_, **__: pytest.fail("it ran again"))
        assert not script.run([HALVED], tree, results)
    (tree / "tests" / "test_package.py").write_text(TEST.replace("< 4", "== 2"))
    assert script.run([HALVED], tree, results)


def test_tests_that_fail_anyway_or_do_not_run_catch_nothing(tree):
    broken = DOUBLED._replace(name="an import that fails", new="x * 2\nimport nothing_of_this_name")
    assert not script.run([broken], tree, tree / "results.json")
    assert json.loads((tree / "results.json").read_text())[broken.name]["outcome"] == "broken"
    (tree / "tests" / "test_package.py").write_text(TEST.replace("== 6", "== 7"))
    with pytest.raises(ValueError, match="without any mutation"):
        script.run([DOUBLED], tree, tree / "results.json")


def test_a_pattern_that_matches_nothing_is_refused(capsys):
    with pytest.raises(SystemExit):
        script.main(["--only", "no such mutation"])
    assert "matches no mutation" in capsys.readouterr().err
