"""
Breaks the code, one change at a time, and looks whether the named tests notice: ``make mutants``.

mutmut and cosmic-ray would make 21 000 and 26 000 mutants of this package, most of them without a meaning (``*`` to ``>>``); cosmic-ray
runs one command for all, and mutmut leaves out decorated functions. The table names those that matter, and the few tests that must fail.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.mutations.mutation import ROOT, Mutation, problems
from tests.mutations.table import MUTATIONS

COPIED = ("pyro_advbayes", "models", "tests", "pyproject.toml")
PRELOADED = [
    "torch",
    "torch.distributed.tensor",  # which torch.testing imports at its first comparison, with sympy
    "torch.fx.experimental.proxy_tensor",
    "pyro.infer",
    "pyro.optim",
    "pytest",
    "scipy.stats",
    "sklearn.metrics",
]
RESULTS = ROOT / "tests" / "mutations" / "results.json"


def run(mutations: Sequence[Mutation], root: Path, results: Path, limit: float = 300.0) -> bool:
    """
    Runs the tests of every mutation whose result is not known, in a copy of the tree, and keeps each result as soon as it is there.

    :param results: a JSON file; what it holds of unchanged mutations, files and tests stands.
    :param limit: seconds for the tests of one mutation; beyond, they count as broken.
    :return: whether all mutations were caught.
    :raises ValueError: if the table does not fit the tree, or a named test fails without any mutation.
    """
    if found := problems(mutations, root):
        raise ValueError("\n".join(found))
    known = json.loads(results.read_text()) if results.exists() else {}
    digests = {mutation.name: mutation.digest(root) for mutation in mutations}
    pending = [mutation for mutation in mutations if known.get(mutation.name, {}).get("digest") != digests[mutation.name]]
    print(f"{len(mutations)} mutations, {len(mutations) - len(pending)} of them known from {results.name}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            copy = shutil.copytree if (root / name).is_dir() else shutil.copy
            if (root / name).exists():
                copy(root / name, tree / name)
        tests = list(dict.fromkeys(test for mutation in pending for test in mutation.tests))
        if tests:
            outcome, output = _outcome(tests, tree, None)
            if outcome != "survived":
                raise ValueError(f"without any mutation the named tests do not pass:\n{output}")
        for mutation in pending:
            start, file = time.perf_counter(), tree / mutation.file
            text = file.read_text()
            file.write_text(mutation.applied(text))
            try:
                outcome, output = _outcome(mutation.tests, tree, limit)
            finally:
                file.write_text(text)
            known[mutation.name] = {"outcome": outcome, "digest": digests[mutation.name]}
            results.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
            print(f"{outcome:9} {time.perf_counter() - start:6.1f} s  {mutation.name}", flush=True)
            if outcome == "broken":
                print(output, flush=True)
    missed = [mutation for mutation in mutations if known[mutation.name]["outcome"] != "caught"]
    print(f"{len(mutations) - len(missed)} of {len(mutations)} caught")
    for mutation in missed:
        print(f"{known[mutation.name]['outcome']}: {mutation.name} ({mutation.file}: {mutation.old!r} to {mutation.new!r})")
    return not missed


def _outcome(tests: Sequence[str], tree: Path, limit: float | None) -> tuple[str, str]:
    """``"caught"`` if a test fails, ``"survived"`` if all pass, ``"broken"`` if they do not run to an end; and the end of the output."""
    # forked from a process that has imported what does not change, which takes longer than most tests
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    output = tree / "output.txt"
    process = context.Process(target=_pytest, args=(list(tests), tree, output))
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return "broken", f"not done after {limit:g} s"
    return {0: "survived", 1: "caught"}.get(process.exitcode, "broken"), output.read_text(errors="replace")[-2000:]


def _pytest(tests: list[str], tree: Path, output: Path) -> None:
    """In a process of its own."""
    with open(output, "w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.chdir(tree)
    os.environ["OMP_NUM_THREADS"] = "1"
    # no bytecode: two changes within one second, of the same length, would pass for one
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(tree))
    gc.freeze()  # what was there before the fork stays; pytest looks for garbage at its end, which takes longer than most tests
    code = int(pytest.main(["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:unraisableexception", *tests]))
    sys.stdout.flush()
    os._exit(code)  # without waiting for what the tests left


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="pattern for the names or the files of mutations: 'pyro_advbayes/attacks/*'")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are kept, to go on from; delete it to begin anew")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTATIONS if fnmatch.fnmatch(m.name, options.only) or fnmatch.fnmatch(m.file, options.only)]
    if not chosen:
        parser.error(f"--only {options.only!r} matches no mutation")
    try:
        return 0 if run(chosen, ROOT, options.results) else 1
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
