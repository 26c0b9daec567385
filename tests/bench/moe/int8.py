"""Experts in int8 against the same in bf16: bytes that FFN workers hold, how far logits move, and how often the best token changes.

    python tests/bench/moe/random_moe.py DIR && python tests/bench/moe/int8.py DIR [--prompts 8] [--length 48]

A JSON line for each choice of what stays as it is. Errors are over every prompt's last position, relative to the spread (standard
deviation) of the bf16 logits; ``float32`` says how far bf16 itself is from fp32, to compare with.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

from antiphon.models.loading.source import resolve
from antiphon.testing import LocalCluster, wiring

CHOICES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "bfloat16": ("bfloat16", {}, {}),
    "float32": ("float32", {}, {}),
    "int8": ("bfloat16", {"quantization": "int8"}, {}),
    "int8, down kept": ("bfloat16", {"quantization": "int8"}, {"keep": ["down"]}),
}


def run(path: Path, choice: str, prompts: list[list[int]]) -> tuple[torch.Tensor, int]:
    """Logits after every prompt, and the bytes that the FFN worker holds."""
    dtype, model, experts = CHOICES[choice]
    sections = {"model": {"uri": str(path), "dtype": dtype, "maxModelLen": 512, **model}, "cache": {"numBlocks": 64}}
    if experts:
        sections["experts"] = experts
    with LocalCluster(wiring(path, "afd", dtype=dtype, **sections), path) as cluster:
        halves, seen = cluster.generating[0].worker.halves, []
        compute = halves.logits
        halves.logits = lambda x_RD: seen.append(compute(x_RD)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
        for prompt in prompts:
            cluster.generate(prompt, max_tokens=1, num_logprobs=0)
        return torch.cat(seen).float(), sum(sum(worker.halves.resident_bytes.values()) for worker in cluster.ffns)


def main() -> None:
    """Print a line per choice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=48)
    args = parser.parse_args()
    path, chance = resolve(args.checkpoint), random.Random(0)
    prompts = [[chance.randrange(3, 30_000) for _ in range(args.length)] for _ in range(args.prompts)]
    base, base_bytes = run(path, "bfloat16", prompts)
    for choice in CHOICES:
        logits, num_bytes = (base, base_bytes) if choice == "bfloat16" else run(path, choice, prompts)
        error = (logits - base).abs() / base.std()
        line = {
            "bench": "moe_int8",
            "experts": choice,
            "ffn_bytes": num_bytes,
            "ffn_bytes_of_bf16": num_bytes / base_bytes,
            "max_error": float(error.max()),
            "mean_error": float(error.mean()),
            "best_token_equal": float((logits.argmax(-1) == base.argmax(-1)).float().mean()),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
