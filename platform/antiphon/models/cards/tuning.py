"""Tile sizes of the kernels by shape, as data: what a run on a card may change without touching a kernel (control speed).

None was measured on a card. They are chosen so that every shape of ``SHAPES`` compiles for compute capability 8.0 and 9.0 within
the card's shared memory and without spilled registers, which the compile suite checks. Must not know: tensors.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # what one program may use, by compute capability
# In Triton's interpreter matrix products of bfloat16 are wrong without a word: operands are raised to fp32 first. Triton reads the
# variable when kernels are decorated, so that it holds for a whole process.
RAISE = os.environ.get("TRITON_INTERPRET") == "1"
MIN_DOT = 16  # the smallest side of a tile that matrix units take


def power_of_two(number: int) -> int:
    """The next one, ``number`` itself included."""
    return 1 << max(0, number - 1).bit_length()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How one kernel cuts its work."""

    rows: int  # of the output tile
    columns: int  # of the output tile, or tokens of context at a time
    depth: int = 0  # of the sum, at a time
    warps: int = 4
    stages: int = 2


def split_dims(head_dim: int) -> tuple[int, int]:
    """A head's dimensions as a power of two and the rest: 576 is 512 and 64, so that a latent key does not cost 1024; the rest is 0
    where one padded power of two serves.
    """
    whole = power_of_two(head_dim)
    rest = head_dim - whole // 2
    if whole == head_dim or rest > whole // 4:
        return whole, 0
    return whole // 2, max(MIN_DOT, power_of_two(rest))


def decode_tiles(group: int, dim_k: int, dim_v: int, itemsize: int) -> Tiles:
    """Rows are query heads of one KV head."""
    if itemsize > 2:
        return Tiles(rows=16, columns=16, warps=4, stages=1)
    wide = max(dim_k, dim_v) > 256
    rows = min(max(MIN_DOT, power_of_two(group)), 16 if wide else 32)
    return Tiles(rows=rows, columns=32 if wide else 64, warps=4, stages=1 if wide else 2)


def prefill_tiles(dim_k: int, dim_v: int, itemsize: int) -> Tiles:
    """Rows are tokens of the chunk."""
    if itemsize > 2:
        return Tiles(rows=32, columns=32, warps=8, stages=1)
    wide = max(dim_k, dim_v) > 128
    return Tiles(rows=64, columns=32 if wide else 64, warps=8 if wide else 4, stages=2)


def expert_tiles(num_pairs: int, num_experts: int, itemsize: int) -> Tiles:
    """Few rows an expert is decode, where each weight is read once and little is computed; many is prefill."""
    if itemsize > 2:
        return Tiles(rows=16, columns=32, depth=32, warps=4, stages=2)
    if num_pairs <= 16 * num_experts:
        return Tiles(rows=16, columns=64, depth=64, warps=4, stages=3)
    return Tiles(rows=64, columns=64, depth=32, warps=4, stages=3)


def num_splits(num_rows: int, num_kv_heads: int, max_context: int) -> int:
    """How many parts a decode row's context is cut into: enough programs for a card's units, none shorter than 256 tokens.

    A function of a bucket's rows and of the longest context that is served, never of the lengths at hand: a captured graph must
    hold for all of them.
    """
    wanted = -(-264 // max(1, num_rows * num_kv_heads))
    return max(1, min(wanted, max_context // 256, 64))
