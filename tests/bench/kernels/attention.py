"""Attention over a paged cache against torch's, and against reading the cache once, in turns (a bench).

Usage: python tests/bench/kernels/attention.py [--dtype bfloat16|float32] [--rounds N]. One thread, processor time: load
disturbs little.

    chunk    a prompt of so many tokens: torch's scaled_dot_product_attention over keys and values that lie in order already
    decode   64 requests of so many tokens each, in blocks of 16 anywhere: the largest of as many bytes in order, by torch

Prints the median time of both, torch's over ours (above 1: ours is faster), and the lowest and highest of that ratio.
"""

import argparse
from collections.abc import Callable

import torch
from turns import in_turns

from antiphon.models.native.library import available

BLOCK, BATCH = 16, 64
HEADS = ((9, 3, 64), (32, 8, 128))  # of queries, of keys and values, dimensions
CHUNKS, CONTEXTS = (256, 1024), (192, 1024)
ROUND_S = 0.05


def chunk(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, length: int) -> tuple[Callable[[], torch.Tensor], ...]:
    """Torch's and ours for a prompt of ``length`` tokens."""
    num_blocks = 2 * length // BLOCK
    caches = [torch.randn(num_blocks * BLOCK, kv_heads, dim).to(dtype) for _ in range(2)]
    slots = (torch.randperm(num_blocks)[: length // BLOCK, None] * BLOCK + torch.arange(BLOCK)).view(-1)
    rows = torch.randn(length, heads * dim).to(dtype)
    queries = rows.view(length, heads, dim).transpose(0, 1)[None]
    keys, values = (cache[slots].transpose(0, 1).repeat_interleave(heads // kv_heads, 0)[None] for cache in caches)
    return (
        lambda: torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True),
        lambda: torch.ops.antiphon.paged_attention(rows, *caches, None, None, BLOCK, [slots], [length], heads, dim**-0.5, 0),
    )


def decode(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, context: int) -> tuple[Callable[[], torch.Tensor], ...]:
    """The largest of the words that a step of ``BATCH`` requests reads, and ours for that step."""
    num_blocks = BATCH * context // BLOCK
    caches = [torch.randn(num_blocks * BLOCK, kv_heads, dim).to(dtype) for _ in range(2)]
    tables = torch.randperm(num_blocks).view(BATCH, -1).to(torch.int32)
    lens = torch.full((BATCH,), context)
    rows = torch.randn(BATCH, heads * dim).to(dtype)
    words = [cache.view(torch.int32).view(-1) for cache in caches]
    return (
        lambda: words[0].max() + words[1].max(),
        lambda: torch.ops.antiphon.paged_attention(rows, *caches, tables, lens, BLOCK, [], [], heads, dim**-0.5, 0),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not available():
        raise SystemExit("no kernels of ours serve on this processor")
    print("what      heads      tokens    torch us     ours us   torch / ours")
    for make, lengths in ((chunk, CHUNKS), (decode, CONTEXTS)):
        for heads, kv_heads, dim in HEADS:
            for length in lengths:
                theirs, ours = make(getattr(torch, arguments.dtype), heads, kv_heads, dim, length)
                compared = in_turns(theirs, ours, rounds=arguments.rounds, round_s=ROUND_S)
                print(f"{make.__name__:7} {f'{heads}/{kv_heads} x {dim}':>11} {length:>7} {compared}", flush=True)


if __name__ == "__main__":
    main()
