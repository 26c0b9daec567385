"""KV blocks of one engine: who holds which, and which still carry a reusable prefix (step speed).

A block is *held* (ref_count > 0) or *free*. Free blocks stay in the prefix cache until they are handed out again, oldest first:

    free, blank ──allocate──► held ──release──► free, cached (its hash still finds it) ──allocate──► held (hash dropped)
                                ▲                    │
                                └──── prefix hit ────┘

A full block is identified by the chain of token ids up to its end (a 128-bit digest, salted), so equal prefixes share blocks.
Must not know: requests, tensors.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NewType

from antiphon.core.errors import InternalError

BlockHash = NewType("BlockHash", bytes)


def hash_blocks(
    token_ids: Sequence[int], block_size_tokens: int, *, salt: str = "", parent: BlockHash | None = None
) -> list[BlockHash]:
    """Digests of the full blocks of ``token_ids``, each chained to its predecessor (``parent`` precedes the first)."""
    digest = parent if parent is not None else BlockHash(hashlib.blake2b(salt.encode(), digest_size=16).digest())
    hashes = []
    for start in range(0, len(token_ids) - block_size_tokens + 1, block_size_tokens):
        block = array("I", token_ids[start : start + block_size_tokens])
        digest = BlockHash(hashlib.blake2b(digest + block.tobytes(), digest_size=16).digest())
        hashes.append(digest)
    return hashes


class KVBlockManager:
    """Hands out KV block ids. Long-lived; only the scheduler touches it."""

    def __init__(self, num_blocks: int, block_size_tokens: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size_tokens = block_size_tokens
        self.prefix_caching = prefix_caching
        self._ref_counts = [0] * num_blocks
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._block_of: dict[BlockHash, int] = {}
        # Insertion order is the order of reuse; ascending at first, so that a request's blocks lie next to each other.
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(num_blocks))

    @property
    def num_free_blocks(self) -> int:
        """Blocks nobody holds, cached ones included."""
        return len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks, held or free, that a prefix lookup can find."""
        return len(self._block_of)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size_tokens)

    def find_prefix(self, hashes: Sequence[BlockHash], max_tokens: int) -> list[int]:
        """Blocks of the longest cached prefix of at most ``max_tokens`` tokens; they are not held yet."""
        if not self.prefix_caching:
            return []
        blocks: list[int] = []
        for digest in hashes[: max_tokens // self.block_size_tokens]:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def find(self, digest: BlockHash) -> int | None:
        """The block that is cached under ``digest``; it is not held yet."""
        return self._block_of.get(digest) if self.prefix_caching else None

    def num_free_after(self, prefix: Sequence[int]) -> int:
        """Free blocks that would remain if ``prefix`` were held."""
        return len(self._free) - sum(1 for block in prefix if self._ref_counts[block] == 0)

    def hold(self, blocks: Sequence[int]) -> None:
        """Hold blocks found by ``find_prefix``."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Hold ``num_blocks`` blank blocks, or None (and nothing held) when there are not enough."""
        if num_blocks > len(self._free):
            return None
        blocks = []
        for _ in range(num_blocks):
            block, _unused = self._free.popitem(last=False)
            self._forget(block)
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def cache(self, block: int, digest: BlockHash) -> None:
        """Let later requests find a held, full block by its digest."""
        if not self.prefix_caching or digest in self._block_of:
            return
        self._forget(block)
        self._hash_of[block] = digest
        self._block_of[digest] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Give blocks back. A chain's tail is reused before its head, since the head serves more prefixes."""
        for block in reversed(blocks):
            count = self._ref_counts[block] - 1
            if count < 0:
                raise InternalError(f"KV block {block} released more often than held")
            self._ref_counts[block] = count
            if count == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def _forget(self, block: int) -> None:
        digest = self._hash_of[block]
        if digest is not None:
            del self._block_of[digest]
            self._hash_of[block] = None
