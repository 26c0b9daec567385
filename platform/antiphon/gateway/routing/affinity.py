"""Remembers which worker last served a prompt with the same beginning (request speed).

Prompts are cut into blocks of ``BLOCK_TOKENS``; a block's key is the hash of everything up to its end. Must not know: how
workers cache, or their load.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from antiphon.core.ids import WorkerId

BLOCK_TOKENS = 32
MAX_BLOCKS = 128  # of one prompt; longer shared beginnings don't change the choice


def prefix_keys(token_ids: Sequence[int], salt: str) -> tuple[int, ...]:
    """Keys of the prompt's leading whole blocks; ``salt`` separates models and tenants."""
    keys = []
    key = hash(salt)
    for end in range(BLOCK_TOKENS, min(len(token_ids), BLOCK_TOKENS * MAX_BLOCKS) + 1, BLOCK_TOKENS):
        key = hash((key, tuple(token_ids[end - BLOCK_TOKENS : end])))
        keys.append(key)
    return tuple(keys)


class PrefixAffinity:
    """The last worker by key, least recently used first out. Belongs to one event loop.

    Args:
        max_keys: keys remembered.
    """

    def __init__(self, max_keys: int = 65_536) -> None:
        self._max_keys = max_keys
        self._workers: OrderedDict[int, WorkerId] = OrderedDict()

    def record(self, keys: Sequence[int], worker_id: WorkerId) -> None:
        """A prompt with these keys went to the worker."""
        for key in keys:
            self._workers[key] = worker_id
            self._workers.move_to_end(key)
        while len(self._workers) > self._max_keys:
            self._workers.popitem(last=False)

    def match(self, keys: Sequence[int]) -> dict[WorkerId, int]:
        """By worker, the number of leading tokens it has likely cached."""
        found: dict[WorkerId, int] = {}
        for index, key in enumerate(keys):
            worker_id = self._workers.get(key)
            if worker_id is None:
                break
            found[worker_id] = (index + 1) * BLOCK_TOKENS
        return found
