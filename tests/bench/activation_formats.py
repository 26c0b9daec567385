"""What the format of A2F rows costs in accuracy: 1A1F along a text, each format against fp32 rows in an fp32 model.

    python tests/bench/activation_formats.py CHECKPOINT [--length 256]

A JSON line per format, the text being the same: perplexity, the share of places with the reference's greedy token, the mean KL
divergence in nats, the largest and mean absolute error of logits, and bytes per row on the wire.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from along_text import against, logits_along, tokens_of

from antiphon.connectors.afd.rows import RowFormat
from antiphon.testing import LocalCluster, wiring

FORMATS = (  # compute format, rows out, rows back
    ("float32", "float32", "float32"),
    ("float32", "bfloat16", "float32"),
    ("float32", "int8", "float32"),
    ("bfloat16", "bfloat16", "bfloat16"),
    ("bfloat16", "int8", "bfloat16"),
)
FIRST = 16  # tokens before the first place


def cluster_of(path: Path, dtype: str, out: str, back: str) -> LocalCluster:
    """1A1F with rows in these formats."""
    spec = wiring(
        path,
        "afd",
        model={"uri": str(path), "dtype": dtype, "maxModelLen": 1024},
        cache={"numBlocks": 128},
        transport={"activationDtype": out, "returnDtype": back, "numUbatches": 1},
    )
    return LocalCluster(spec, path)


def main() -> None:
    """Print a line per format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    hidden = json.loads((args.checkpoint / "config.json").read_text())["hidden_size"]
    tokens = tokens_of(args.checkpoint, args.length)
    base: torch.Tensor | None = None
    for dtype, out, back in FORMATS:
        with cluster_of(args.checkpoint, dtype, out, back) as cluster:
            logits = logits_along(cluster, tokens, FIRST)
        base = logits if base is None else base
        line = {
            "bench": "activation_formats",
            "compute": dtype,
            "a2f": out,
            "f2a": back,
            "bytes_per_row_out": RowFormat(getattr(torch, out), hidden).num_bytes(1),
            **against(logits, base, tokens, FIRST),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
