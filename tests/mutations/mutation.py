"""What a mutation is, and what a table of them must keep to."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Mutation(NamedTuple):
    """
    One meaningful change of the code, and the tests that must notice it.

    :ivar name: in words, unlike any other.
    :ivar file: the file that is changed, from the root of the repository.
    :ivar old: a text that occurs in it once.
    :ivar new: what takes its place.
    :ivar tests: files or single tests (``tests/test_x.py::test_y``), at least one of which must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, text: str) -> str:
        """:raises ValueError: unless the old text occurs once."""
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.name}: {self.old!r} occurs {count} times in {self.file}, not once: bring the entry up to date")
        return text.replace(self.old, self.new)

    def digest(self, root: Path) -> str:
        """Changes with the mutation, the mutated file and the test files: a result stands for as long as it stays."""
        files = dict.fromkeys([self.file, *(test.split("::")[0] for test in self.tests)])
        parts = [repr(self), *((root / file).read_text() for file in files)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def of(file: str, tests: str | tuple[str, ...], *changes: tuple[str, str, str]) -> list[Mutation]:
    """
    Mutations of one file that the same tests must notice.

    :param file: in ``pyro_advbayes/``.
    :param tests: in ``tests/``, as in :class:`Mutation`.
    :param changes: ``(name, old, new)`` of each.
    """
    tests = (tests,) if isinstance(tests, str) else tests
    paths = tuple(f"tests/{test}" for test in tests)
    return [Mutation(name, f"pyro_advbayes/{file}", old, new, paths) for name, old, new in changes]


def problems(mutations: Sequence[Mutation], root: Path) -> list[str]:
    """What is wrong with a table, an entry each: texts that are not there once, code that does not parse, tests that do not exist."""
    found = []
    names = [mutation.name for mutation in mutations]
    found += [f"{name}: two mutations have this name" for name in dict.fromkeys(names) if names.count(name) > 1]
    for mutation in mutations:
        try:
            text = (root / mutation.file).read_text()
            ast.parse(changed := mutation.applied(text))
            if changed == text:
                found.append(f"{mutation.name}: changes nothing")
        except (FileNotFoundError, ValueError, SyntaxError) as error:
            found.append(f"{mutation.name}: {error}" if isinstance(error, SyntaxError) else str(error))
        for test in mutation.tests:
            file, _, function = test.partition("::")
            if not (root / file).is_file() or (function and f"def {function}(" not in (root / file).read_text()):
                found.append(f"{mutation.name}: there is no test {test}")
        if not mutation.tests:
            found.append(f"{mutation.name}: names no test")
    return found
