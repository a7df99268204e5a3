"""
Damages files of every kind, and reads them: ``make attack-files``. What is read must be what was written, or be refused by a ValueError
that names the file, within a second and in bounded memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_advbayes.infer.autoguide.implicit import AutoImplicit
from pyro_advbayes.infer.distill.apd import APD
from pyro_advbayes.storage import files
from pyro_advbayes.storage.draws import read_draws
from tests.infer.mcmc.test_checkpoints import SAMPLES, WRITERS, guide, sample
from tests.small_models import logistic

SECONDS, MEGABYTES = 1.0, 200
REFUSED, SAME, SILENT, OBSCURE, SLOW, WENT_ON = "refused", "read as it was", "silent", "obscure", "slow", "went on"
WRONG = (SILENT, OBSCURE, SLOW)
HUGE = 10**12
JUNK = (None, True, -1, 0, 1, HUGE, -HUGE, 0.5, float("nan"), float("inf"), "", "x", "../x", [], {}, [1], {"a": 1})


class Kind(NamedTuple):
    """
    A kind of file.

    :param write: writes one.
    :param read: reads one whole.
    :param use: what a user does with it, of a file whose digest is right; None where that is ``read``.
    :param name: what :func:`files.save` calls it; None for a file that it does not write.
    """

    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    use: Callable[[Path], Any] | None
    name: str | None


def _write_draws(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sample(Path(folder) / "run")
        path.write_bytes((Path(folder) / "run.draws.safetensors").read_bytes())


def _write_guide(path: Path) -> None:
    made = guide()
    APD(made, batch_size=40, num_steps=2, check_every=None).fit(SAMPLES)
    made.save(path)


def _read_guide(path: Path) -> dict[str, Tensor]:
    return dict(AutoImplicit.load(path, logistic).network.state_dict())


KINDS = {
    **{
        writer: Kind(begin, lambda path, kind=kind: files.load(path, kind), resume, kind)
        for writer, (begin, resume, kind) in WRITERS.items()
    },
    "guide": Kind(_write_guide, _read_guide, _read_guide, "file of AutoImplicit"),
    "draws": Kind(_write_draws, lambda path: read_draws(path, check=True), None, None),
}


def damaged(whole: bytes, generator: random.Random) -> tuple[str, bytes]:
    """The bytes of a file with a fault, and what was done to it."""
    size = struct.unpack("<Q", whole[:8])[0]
    header = whole[8 : 8 + size]
    place, length = generator.randrange(len(whole)), 1 + generator.randrange(64)

    def entry(change: Callable[[dict[str, Any], str], None]) -> bytes:
        """Another header: the library's own checks are attacked, too."""
        parsed = json.loads(header)
        change(parsed, generator.choice([name for name in parsed if name != "__metadata__"] or ["none"]))
        text = json.dumps(parsed).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + size :]

    def metadata(parsed: dict[str, Any], name: str) -> None:
        fields = parsed["__metadata__"]
        fields[generator.choice(list(fields))] = generator.choice(["", "x", "9" * 300, "[" * 10_000, "{}"])

    def lacking(parsed: dict[str, Any], name: str) -> None:
        del parsed["__metadata__"][generator.choice(list(parsed["__metadata__"]))]

    def shaped(parsed: dict[str, Any], name: str) -> None:
        parsed[name]["shape"] = generator.choice([[], [0], [HUGE], [HUGE, HUGE], [-1], "x", [1.5], [1] * 100])

    def typed(parsed: dict[str, Any], name: str) -> None:
        parsed[name]["dtype"] = generator.choice(["F64", "F32", "I64", "U8", "BOOL", "F8_E4M3", "x", None])

    def moved(parsed: dict[str, Any], name: str) -> None:
        parsed[name]["data_offsets"] = generator.choice([[0, 0], [0, HUGE], [HUGE, 0], [-8, 0], [0, 2**64], None, []])

    def renamed(parsed: dict[str, Any], name: str) -> None:
        parsed[generator.choice(["x", "t0", "__metadata__", ""])] = parsed.pop(name)

    def bits(count: int) -> bytes:
        corrupt = bytearray(whole)
        for _ in range(count):
            corrupt[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        return bytes(corrupt)

    changes: dict[str, Callable[[], bytes]] = {
        "cut": lambda: whole[:place],
        "one bit": lambda: bits(1),
        "some bits": lambda: bits(length),
        "zeros": lambda: whole[:place] + bytes(len(whole[place : place + length])) + whole[place + length :],
        "a part missing": lambda: whole[:place] + whole[place + length :],
        "a part twice": lambda: whole[: place + length] + whole[place:],
        "more at the end": lambda: whole + generator.randbytes(length),
        "parts exchanged": lambda: whole[:8] + whole[place:] + whole[8:place],
        "another length of the header": lambda: struct.pack("<Q", generator.choice([0, 1, size - 1, size + 1, HUGE, 2**63])) + whole[8:],
        "metadata": lambda: entry(metadata),
        "no such metadata": lambda: entry(lacking),
        "shape": lambda: entry(shaped),
        "dtype": lambda: entry(typed),
        "offsets": lambda: entry(moved),
        "name": lambda: entry(renamed),
        "random": lambda: generator.randbytes(len(whole)),
    }
    what = generator.choice(list(changes))
    return what, changes[what]()


def senseless(content: Any, generator: random.Random) -> tuple[str, Any]:
    """Content with something else in one place, and where."""
    places = list(_places(content))
    place = generator.choice(places)
    junk = generator.choice([*JUNK, torch.tensor(float("nan")), torch.zeros(3, 3), torch.full((2,), HUGE)])
    return ".".join(map(str, place)), _placed(content, place, junk)


def _places(content: Any, place: tuple = ()) -> Iterator[tuple]:
    if isinstance(content, (dict, list, tuple)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content[:3]):
            yield (*place, key)
            yield from _places(value, (*place, key))


def _placed(content: Any, place: tuple, value: Any) -> Any:
    if not place:
        return value
    if isinstance(content, dict):
        return {key: _placed(each, place[1:], value) if key == place[0] else each for key, each in content.items()}
    return type(content)(_placed(each, place[1:], value) if i == place[0] else each for i, each in enumerate(content))


def same(one: Any, other: Any) -> bool:
    """Whether two contents are the same, to the last bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or one != one


class _Late(BaseException):
    pass


def _late(*_: Any) -> None:
    raise _Late


def _outcome(read: Callable[[Path], Any], path: Path, expected: Any) -> tuple[str, str]:
    """:param expected: what it must be; None where anything may be made of it."""
    start = time.process_time()
    before = signal.signal(signal.SIGALRM, _late)
    signal.setitimer(signal.ITIMER_REAL, 5.0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = read(path)
        if expected is None:
            return WENT_ON, ""
        return (SAME, "") if same(found, expected) else (SILENT, "")
    except _Late:
        return (WENT_ON if expected is None else SLOW), ""
    except ValueError as error:
        taken = time.process_time() - start
        if taken > SECONDS:
            return SLOW, f"{taken:.1f} s: {error}"
        return (REFUSED, "") if path.name in str(error) else (OBSCURE, str(error))
    except Exception as error:
        return OBSCURE, f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def attack(name: str, count: int, seed: int) -> Counter[str]:
    """
    Attacks a file of this kind, and prints what is wrong.

    :param count: of damaged ones; a fifth as many are whole and senseless.
    """
    kind, generator, counts = KINDS[name], random.Random(f"{name} {seed}"), Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "attacked"
        pyro.set_rng_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind.write(path)
            expected = {key: value.clone() for key, value in kind.read(path).items()} if kind.use is None else kind.read(path)
        whole = path.read_bytes()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in range(count):
            what, corrupt = damaged(whole, generator)
            path.write_bytes(corrupt)
            _note(counts, name, i, what, _outcome(kind.read, path, expected))
        for i in range(count // 5 if kind.name is not None and kind.use is not None else 0):
            path.write_bytes(whole)
            what, content = senseless(files.load(path, kind.name), generator)
            files.save(path, content, kind.name)
            _note(counts, name, i, what, _outcome(kind.use, path, None))
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
        if grown > MEGABYTES:
            _note(counts, name, count, f"{grown:.0f} MB more memory", (SLOW, ""))
    return counts


def _note(counts: Counter[str], name: str, number: int, what: str, outcome: tuple[str, str]) -> None:
    counts[outcome[0]] += 1
    if outcome[0] in WRONG:
        print(f"{name}, {number}, {what}: {outcome[0]} {outcome[1][:200]}", flush=True)


def main() -> None:
    """Prints how many of each kind were refused, and fails if one was read as something else."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attacks", type=int, default=500, help="of each kind of file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, failed = time.monotonic(), False
    for name in KINDS:
        counts = attack(name, options.attacks, options.seed)
        failed |= any(counts[kind] for kind in WRONG)
        print(f"{name}: {dict(counts)}", flush=True)
    print(f"{len(KINDS)} kinds of file in {time.monotonic() - start:.0f} s")
    sys.exit(failed)


if __name__ == "__main__":
    main()
