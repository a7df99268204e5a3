"""
Rows about memory: each number is the peak of a process of its own, above what it held before.

Each is measured twice on a CPU. The resident memory of a process as it is holds also what malloc keeps of memory that was given back,
which depends on the order in which large and small pieces came and differs from run to run, so that there are several runs. Told to give
large pieces back to the system at once, it holds what is in use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import Comparison, Missing, Result, Spread, Stopwatch, Target

ROOT = Path(__file__).resolve().parents[2]


MODES = {"resident": {}, "in use": {"MALLOC_MMAP_THRESHOLD_": "65536"}}
RUNS = 5


def _probe(watch: Stopwatch, mode: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.memory_probe", *arguments, "--device", watch.device.type]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **MODES[mode]})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    if "missing" in found:
        raise Missing(found["missing"])
    return found


def _modes(watch: Stopwatch) -> list[str]:
    return list(MODES) if watch.device.type == "cpu" else ["in use"]


def sampler_memory(watch: Stopwatch) -> list[Result]:
    """Peak of a run of 5 chains of 478 410 weights, draws on disk, in copies of the state: under 12, however many draws."""
    result = Result("5 chains of 784-400-400-10, draws on disk", "copies of the state")
    counts = (4, 8) if watch.quick else (20, 200)
    try:
        for mode in _modes(watch):
            for draws in counts:
                found = _probe(watch, mode, "sampler", str(draws))
                spread = Spread.of([found["peak"] / found["state"]])
                result.values[f"{draws} draws, {mode}"] = spread
                result.comparisons.append(Comparison(f"peak, {draws} draws, {mode}", spread, Target("<", 12.0)))
    except Missing as why:
        result.missing["peak"] = str(why)
    return [result]


def classifier_memory(watch: Stopwatch) -> list[Result]:
    """Peak of a foreign library's backward pass through ``PosteriorClassifier``, 10 to 1000 draws: flat."""
    return [_growth(watch, "classifier", "PosteriorClassifier of 784-100-100-10, 2048 inputs: cross-entropy, backward to the inputs")]


def attack_memory(watch: Stopwatch) -> list[Result]:
    """Peak of an attack on a posterior, 10 to 1000 draws of which five are computed together: flat."""
    return [_growth(watch, "attack", "PGD on 784-100-100-10, 2048 inputs, chunk_size=5")]


def _growth(watch: Stopwatch, kind: str, what: str) -> Result:
    result = Result(what, "MiB")
    counts = (10, 20) if watch.quick else (10, 100, 1000)
    try:
        for mode in _modes(watch):
            runs = [[_probe(watch, mode, kind, str(draws))["peak"] / 2**20 for draws in counts] for _ in range(1 if watch.quick else RUNS)]
            result.values |= {f"{draws} draws, {mode}": Spread.of(peaks) for draws, *peaks in zip(counts, *runs, strict=True)}
            growth = Spread.of([peaks[-1] / peaks[0] for peaks in runs])
            result.comparisons.append(Comparison(f"{counts[-1]} draws / {counts[0]} draws, {mode}", growth, Target("<=", 1.1)))
    except Missing as why:
        result.missing["peak"] = str(why)
    return result
