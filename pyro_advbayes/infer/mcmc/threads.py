"""One thread of a process samples at a time, since threads share Pyro's effect handlers."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

_lock = threading.RLock()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """
    No other thread may enter while one is inside; the same thread may.

    :raises RuntimeError: if another thread is inside.
    """
    lock = _lock
    if not lock.acquire(blocking=False):
        raise RuntimeError(
            "another thread of this process samples, and threads share Pyro's effect handlers: wait for it, or sample in separate "
            "processes; chains run side by side in one thread (num_chains=)"
        )
    try:
        yield
    finally:
        lock.release()


def _renew() -> None:
    """A forked process has one thread, and no thread in it would release a lock that another one held."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
