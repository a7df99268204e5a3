"""Rows about memory: each number is the peak of a process of its own, above what it held before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import Comparison, Missing, Result, Spread, Stopwatch, Target

ROOT = Path(__file__).resolve().parents[2]


def _probe(watch: Stopwatch, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.memory_probe", *arguments, "--device", watch.device.type]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    if "missing" in found:
        raise Missing(found["missing"])
    return found


def sampler_memory(watch: Stopwatch) -> list[Result]:
    """Peak of a run of 5 chains of 478 410 weights, draws on disk, in copies of the state: under 12, however many draws."""
    result = Result("5 chains of 784-400-400-10, draws on disk", "copies of the state")
    counts = (4, 8) if watch.quick else (20, 200)
    try:
        for draws in counts:
            found = _probe(watch, "sampler", str(draws))
            spread = Spread.of([found["peak"] / found["state"]])
            result.values[f"{draws} draws"] = spread
            result.comparisons.append(Comparison(f"peak, {draws} draws", spread, Target("<", 12.0)))
            result.notes[f"before the run, {draws} draws, MiB"] = found["before"] / 2**20
    except Missing as why:
        result.missing["peak"] = str(why)
    return [result]


def classifier_memory(watch: Stopwatch) -> list[Result]:
    """Peak of a foreign library's backward pass through ``PosteriorClassifier``, 10 to 1000 draws: flat."""
    result = Result("PosteriorClassifier of 784-100-100-10, 256 inputs: cross-entropy, backward to the inputs", "MiB")
    counts = (10, 20) if watch.quick else (10, 100, 1000)
    try:
        for draws in counts:
            found = _probe(watch, "classifier", str(draws))
            result.values[f"{draws} draws"] = Spread.of([found["peak"] / 2**20])
    except Missing as why:
        result.missing["peak"] = str(why)
        return [result]
    least, *_, most = result.values.values()
    growth = Spread.of([most.median / least.median])
    result.comparisons.append(Comparison(f"{counts[-1]} draws / {counts[0]} draws", growth, Target("<=", 1.1)))
    return [result]
