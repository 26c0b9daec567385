"""What int8 FFN weights change in the logits of a dense model, beside what bfloat16 does: a JSON line per choice.

    python tests/bench/dense_int8.py CHECKPOINT [--prompts 8] [--length 96]

Prompts are pieces of a plain text that counts bridges. The yardstick is the same model in fp32: the mean and the largest absolute
difference of logits over their standard deviation, the mean divergence of the next token's distribution (nats), and the share of
greedy tokens that agree.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer

from antiphon.models.source import resolve
from antiphon.testing import LocalCluster, wiring

CHOICES: dict[str, tuple[str, dict[str, str], dict[str, list[str]]]] = {
    "float32": ("float32", {}, {}),
    "bfloat16": ("bfloat16", {}, {}),
    "int8": ("bfloat16", {"quantization": "int8"}, {}),
    "int8, down kept": ("bfloat16", {"quantization": "int8"}, {"keep": ["down"]}),
}


def logits_of(path: Path, choice: str, prompts: list[list[int]]) -> tuple[torch.Tensor, int]:
    """Logits after every prompt, fp32 [prompts, V], and the bytes of weights held."""
    dtype, model, experts = CHOICES[choice]
    sections = {"model": {"uri": str(path), "dtype": dtype, "maxModelLen": 512, **model}, "cache": {"numBlocks": 64}}
    if experts:
        sections["experts"] = experts
    with LocalCluster(wiring(path, "monolith", dtype=dtype, **sections), path) as cluster:
        part, seen = cluster.generating[0], []
        compute = part.worker.halves.logits
        part.worker.halves.logits = lambda x_RD: seen.append(compute(x_RD)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
        for prompt in prompts:
            cluster.generate(prompt, max_tokens=1, num_logprobs=0)
        return torch.cat(seen).float(), sum(part.resident_bytes.values())


def main() -> None:
    """Print a line per choice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=96)
    args = parser.parse_args()
    path = resolve(args.checkpoint)
    text = " ".join(
        f"In {1000 + 7 * n} the town of Ely built its {n}th bridge, {n * 3} feet long." for n in range(40 * args.prompts)
    )
    tokens = Tokenizer.from_file(str(path / "tokenizer.json")).encode(text).ids
    prompts = [tokens[i * args.length + i : (i + 1) * args.length + i] for i in range(args.prompts)]
    base, _ = logits_of(path, "float32", prompts)
    for choice in list(CHOICES)[1:]:
        logits, num_bytes = logits_of(path, choice, prompts)
        error = (logits - base).abs() / base.std()
        expected = torch.log_softmax(base, dim=-1)
        divergence = (expected.exp() * (expected - torch.log_softmax(logits, dim=-1))).sum(dim=-1)
        line = {
            "bench": "dense_int8",
            "weights": choice,
            "mean_error": float(error.mean()),
            "max_error": float(error.max()),
            "mean_divergence_nats": float(divergence.mean()),
            "greedy_agreement": float((logits.argmax(dim=-1) == base.argmax(dim=-1)).float().mean()),
            "weight_bytes": num_bytes,
        }
        print(json.dumps(line))


if __name__ == "__main__":
    main()
