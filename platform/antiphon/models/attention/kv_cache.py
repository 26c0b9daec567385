"""The paged KV cache and the states of one worker: preallocated tensors and the reads and writes on them (hot).

Legend: P blocks, S slots per block, T tokens, K KV heads, H head dim. Block and slot arithmetic is core.kv's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from antiphon.core.kv import KVLayout
from antiphon.models.native.library import available

_LARGE_PAGE_BYTES = 2 << 20

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class KVCache:
    """One tensor [P*S, K, H] per plane of a layer that caches per token, and [slots + 1, ...] per plane of one that has a state.
    Owned by one worker loop.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device, num_state_slots: int = 0) -> None:
        self.layout = layout
        self._device = device
        self.num_state_slots = num_state_slots
        self.num_blocks = num_blocks
        num_slots = num_blocks * layout.block_size_tokens
        dtype = TORCH_DTYPES[layout.dtype]
        # Zeroed once, so that masked slots never hold NaN (0 x NaN would reach the result).
        self.planes: list[tuple[torch.Tensor, ...]] = [
            tuple(_zeros((num_slots, plane.num_heads, plane.head_dim), dtype, device) for plane in layout.planes)
            if layer not in layout.state_layers
            else ()
            for layer in range(layout.num_layers)
        ]
        self.states: list[tuple[torch.Tensor, ...]] = [
            tuple(_zeros((num_state_slots + 1, *plane.shape), TORCH_DTYPES[plane.dtype], device) for plane in layout.states)
            if layer in layout.state_layers
            else ()
            for layer in range(layout.num_layers)
        ]

    def populate(self, is_unwanted: Callable[[], bool]) -> None:
        """Take the memory of every block, a large page at a time, so that no request waits for it.

        For a thread beside the one that uses the cache: what lies in it stays. Ends early once ``is_unwanted``, and at once where
        memory came with the cache.
        """
        if not _comes_when_touched(self._device):
            return
        for planes in (*self.planes, *self.states):
            for plane in planes:
                num_bytes = plane.numel() * plane.element_size()
                for first in range(0, num_bytes, _LARGE_PAGE_BYTES):
                    if is_unwanted():
                        return
                    torch.ops.antiphon.populate(plane, first, min(_LARGE_PAGE_BYTES, num_bytes - first))

    @property
    def blank_state(self) -> int:
        """The slot that holds the state before the first token: zeros. It is never written."""
        return self.num_state_slots

    def write(self, layer: int, slots_T: torch.Tensor, values: Sequence[torch.Tensor]) -> None:
        """Store one [T, K, H] tensor per plane at slots_T (int64)."""
        for plane, value in zip(self.planes[layer], values, strict=True):
            plane.index_copy_(0, slots_T, value)

    def slots(self, block_ids: Sequence[int], first_token: int, num_tokens: int) -> torch.Tensor:
        """Slots, int64 [num_tokens], of a request's tokens [first_token, first_token + num_tokens)."""
        size = self.layout.block_size_tokens
        tokens = torch.arange(first_token, first_token + num_tokens)
        return torch.tensor(block_ids, dtype=torch.int64)[tokens // size] * size + tokens % size

    def scrub(self, block_ids: Sequence[int]) -> None:
        """Zero blocks that may hold NaN, before others get them: masked slots are multiplied by zero, not skipped."""
        self.scrub_slots(self.slots(block_ids, 0, len(block_ids) * self.layout.block_size_tokens))

    def scrub_slots(self, slots: torch.Tensor) -> None:
        """The same for single slots, int64 [T]."""
        for planes in self.planes:
            for plane in planes:
                plane.index_fill_(0, slots.to(plane.device), 0)

    def export(self, layer: int, slots_T: torch.Tensor, out: torch.Tensor) -> int:
        """Copy the planes of ``slots_T`` one after another into ``out`` (uint8); returns the bytes written."""
        at = 0
        for plane in self.planes[layer]:
            num_bytes = slots_T.numel() * plane[0].numel() * plane.element_size()
            target = out[at : at + num_bytes].view(plane.dtype).view(slots_T.numel(), *plane.shape[1:])
            if plane.device == target.device:
                torch.index_select(plane, 0, slots_T, out=target)
            else:  # into host memory; the copy ends before it returns
                target.copy_(plane.index_select(0, slots_T.to(plane.device)))
            at += num_bytes
        return at

    def load(self, layer: int, slots_T: torch.Tensor, data: torch.Tensor) -> None:
        """The inverse of ``export``: store what ``data`` (uint8) holds at slots_T."""
        at = 0
        for plane in self.planes[layer]:
            num_bytes = slots_T.numel() * plane[0].numel() * plane.element_size()
            source = data[at : at + num_bytes].view(plane.dtype).view(slots_T.numel(), *plane.shape[1:])
            plane.index_copy_(0, slots_T.to(plane.device), source.to(plane.device))
            at += num_bytes

    def export_state(self, layer: int, plane: int, slot: int, first_byte: int, out: torch.Tensor) -> int:
        """Copy a state's plane from ``first_byte`` on into ``out`` (uint8), as much as fits; returns the bytes written."""
        data = self.states[layer][plane][slot].view(-1).view(torch.uint8)[first_byte:]
        num_bytes = min(data.numel(), out.numel())
        out[:num_bytes].copy_(data[:num_bytes])
        return num_bytes

    def load_state(self, layer: int, plane: int, slot: int, first_byte: int, data: torch.Tensor) -> None:
        """The inverse of ``export_state``."""
        self.states[layer][plane][slot].view(-1).view(torch.uint8)[first_byte : first_byte + data.numel()].copy_(data)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, on large pages where our kernels read them: blocks lie anywhere, and small pages cost a walk each.

    A page takes memory once it is touched: a start does not wait for all of a cache.
    """
    if _comes_when_touched(device):
        plane: torch.Tensor = torch.ops.antiphon.large_zeros(shape, dtype)
        return plane
    return torch.zeros(shape, dtype=dtype, device=device)


def _comes_when_touched(device: torch.device) -> bool:
    return device.type == "cpu" and available()
