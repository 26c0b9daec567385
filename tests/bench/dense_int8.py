"""What int8 FFN weights change in a dense model along a text, beside what bfloat16 does: a JSON line per choice.

    python tests/bench/dense_int8.py CHECKPOINT [--length 320] [--four-bit DIRECTORY]

``--four-bit``: a directory that ``antiphon convert FILE.gguf DIRECTORY --dtype four-bit`` made of the same file; its line says what
keeping four bits in memory takes and changes.

The yardstick is the same model in fp32: perplexity of the text, the share of greedy tokens that agree, the mean divergence of the
next token's distribution (nats), the largest and the mean absolute difference of logits, and the bytes that all weights take.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from along_text import against, logits_along, tokens_of

from antiphon.models.loading.source import resolve
from antiphon.testing import LocalCluster, wiring

CHOICES: dict[str, tuple[str, dict[str, str], dict[str, list[str]]]] = {
    "float32": ("float32", {}, {}),
    "bfloat16": ("bfloat16", {}, {}),
    "int8": ("bfloat16", {"quantization": "int8"}, {}),
    "four bits": ("bfloat16", {}, {}),
    "int8, down kept": ("bfloat16", {"quantization": "int8"}, {"keep": ["down"]}),
}
FIRST = 16  # tokens before the first place


def logits_of(path: Path, choice: str, tokens: list[int]) -> tuple[torch.Tensor, int]:
    """Logits along the text, fp32 [places, V], and the bytes of weights held."""
    dtype, model, experts = CHOICES[choice]
    sections = {"model": {"uri": str(path), "dtype": dtype, "maxModelLen": 1024, **model}, "cache": {"numBlocks": 128}}
    if experts:
        sections["experts"] = experts
    with LocalCluster(wiring(path, "monolith", dtype=dtype, **sections), path) as cluster:
        return logits_along(cluster, tokens, FIRST), sum(cluster.generating[0].resident_bytes.values())


def main() -> None:
    """Print a line per choice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--length", type=int, default=320)
    parser.add_argument("--four-bit", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = resolve(args.checkpoint)
    tokens = tokens_of(path, args.length)
    base, _ = logits_of(path, "float32", tokens)
    for choice in list(CHOICES)[1:]:
        if choice == "four bits" and args.four_bit is None:
            continue
        logits, num_bytes = logits_of(args.four_bit if choice == "four bits" else path, choice, tokens)
        line = {"bench": "dense_int8", "weights": choice, "weight_bytes": num_bytes, **against(logits, base, tokens, FIRST)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
