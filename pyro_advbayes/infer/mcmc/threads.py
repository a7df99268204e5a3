"""One thread of a process samples at a time: Pyro's effect handlers are the process's."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

_lock = threading.RLock()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """
    Within it no other thread may enter; the same one may.

    :raises RuntimeError: if another thread is in it.
    """
    lock = _lock
    if not lock.acquire(blocking=False):
        raise RuntimeError(
            "another thread of this process samples, and Pyro's effect handlers are the process's: wait for it, or sample in processes "
            "of their own; chains run side by side in one thread (num_chains=)"
        )
    try:
        yield
    finally:
        lock.release()


def _renew() -> None:
    """A forked process has one thread, and nobody in it would release what another one held."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
