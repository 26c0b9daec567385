"""Which processors the threads of a worker process run on (control speed).

The worker loop and its compute threads stay on the worker's own cores; every other thread starts unpinned, so that control traffic
does not take time from a layer. Must not know: what runs.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch

from antiphon.core.errors import InvalidInput
from antiphon.models.native.library import available

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


def pin_each(cores: Sequence[int], *, share: bool = False) -> None:
    """Pin this thread and its compute threads to a processor each, where there are enough; else ``pin`` them together.

    Compute threads wait for each other many times a layer: two that share a processor for a while, as the system's scheduler has
    it, take several times as long. ``share``: other workers have these processors too. This thread then runs on the first of them
    like any program; its compute threads take only time that nobody else wants.

    Raises:
        InvalidInput: this machine has no such processors.
    """
    pin(cores)
    if 1 < torch.get_num_threads() <= len(cores) and available():
        torch.ops.antiphon.pin_threads(list(cores), share)


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
