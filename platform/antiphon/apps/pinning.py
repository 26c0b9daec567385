"""Which processors the threads of a worker process run on (control speed).

The worker loop and its compute threads stay on the worker's own cores; every other thread starts unpinned, so that control traffic
does not take time from a layer. Must not know: what runs.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from antiphon.core.errors import InvalidInput

_ALL = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def pin(cores: Collection[int]) -> None:
    """Pin this thread, and those that it starts from now on, to ``cores``; empty = leave it.

    Raises:
        InvalidInput: this machine has no such processors.
    """
    if not cores or not _ALL:
        return
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        raise InvalidInput(
            f"can't pin to processors {sorted(cores)}, here are {sorted(_ALL)}: {error}", "spec.pools.cores"
        ) from error


@contextmanager
def unpinned() -> Iterator[None]:
    """Threads started in the block may run anywhere."""
    if not _ALL:
        yield
        return
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, _ALL)
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)
