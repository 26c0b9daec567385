"""Weights that come next, fetched into the processor's cache while a worker waits for its peer (hot).

A layer's weights are larger than the cache that belongs to one core, so each layer begins with reads that wait for memory. A
worker that waits fetches the first part of what it reads next, piece by piece, until its wait is over.

Must not know: links, messages, which layer comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from antiphon.models.native.library import tiles_available

_PIECE_BYTES = 64 * 1024  # a few microseconds of reading: what a peer's answer may wait for at most
_MAX_BYTES = 10 * _PIECE_BYTES  # a third of the second-level cache: what the interpreter needs next stays in it too


class WeightPrefetch:
    """The weights that each layer reads first, by layer; None where a layer has none worth fetching."""

    def __init__(self, first_weights: Sequence[torch.Tensor | None]) -> None:
        self._weights = first_weights
        self._works = tiles_available()

    def warm(self, layer: int, is_over: Callable[[], bool]) -> None:
        """Fetch what ``layer`` reads first until ``is_over``, which is asked before every piece.

        Does nothing on more than one thread: each reads a share of the weights into a cache of its own.
        """
        weight = self._weights[layer]
        if weight is None or not self._works or torch.get_num_threads() != 1:
            return
        for start in range(0, min(weight.nbytes, _MAX_BYTES), _PIECE_BYTES):
            if is_over():
                return
            torch.ops.antiphon.warm(weight, start, min(_PIECE_BYTES, weight.nbytes - start))
