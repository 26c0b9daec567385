"""What the format of A2F rows costs in accuracy: logits and greedy tokens of 1A1F, each format against fp32 rows in an fp32 model.

    python tests/bench/activation_formats.py CHECKPOINT [--prompts 8] [--positions 12]

Every format sees the same texts: the continuations that the reference chose, cut after each token. A JSON line per format:
the share of positions with the reference's greedy token, the mean KL divergence in nats, the largest and mean absolute error of
logits, and bytes per row on the wire.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch

from antiphon.connectors.rows import RowFormat
from antiphon.testing import LocalCluster, wiring

FORMATS = (  # compute format, rows out, rows back
    ("float32", "float32", "float32"),
    ("float32", "bfloat16", "float32"),
    ("float32", "int8", "float32"),
    ("bfloat16", "bfloat16", "bfloat16"),
    ("bfloat16", "int8", "bfloat16"),
)


def cluster_of(path: Path, dtype: str, out: str, back: str) -> LocalCluster:
    spec = wiring(
        path,
        "afd",
        model={"uri": str(path), "dtype": dtype, "maxModelLen": 512},
        cache={"numBlocks": 256, "prefixCaching": False},
        transport={"activationDtype": out, "returnDtype": back, "numUbatches": 1},
    )
    return LocalCluster(spec, path)


def logits_of(cluster: LocalCluster, texts: list[list[int]]) -> torch.Tensor:
    """fp32 [texts, V]: the logits after each text, one request at a time."""
    halves, seen = cluster.generating[0].worker.halves, []
    original = halves.logits
    halves.logits = lambda x: seen.append(original(x)) or seen[-1]  # type: ignore[method-assign, assignment, func-returns-value]
    for text in texts:
        cluster.generate(text, max_tokens=1)
    halves.logits = original  # type: ignore[method-assign]
    return torch.cat([logits[:1].float() for logits in seen])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--positions", type=int, default=12)
    args = parser.parse_args()
    config = json.loads((args.checkpoint / "config.json").read_text())
    chance = random.Random(0)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    starts = (
        "The town of Ely",
        "In physics, the",
        "def fibonacci(n):",
        "Dear Sir or Madam,",
        "The recipe needs",
        "Once upon a time",
    )
    prompts = [tokenizer.encode(f"{starts[n % len(starts)]} {chance.randrange(1900, 2000)}").ids for n in range(args.prompts)]
    texts: list[list[int]] = []
    reference: torch.Tensor | None = None
    for dtype, out, back in FORMATS:
        with cluster_of(args.checkpoint, dtype, out, back) as cluster:
            if reference is None:
                for prompt in prompts:
                    tokens = cluster.generate(prompt, max_tokens=args.positions)
                    texts += [prompt + tokens[:n] for n in range(args.positions)]
            logits = logits_of(cluster, texts)
        if reference is None:
            reference = logits
        log_p, log_q = torch.log_softmax(reference, -1), torch.log_softmax(logits, -1)
        error = (logits - reference).abs()
        print(
            json.dumps(
                {
                    "bench": "activation_formats",
                    "compute": dtype,
                    "a2f": out,
                    "f2a": back,
                    "bytes_per_row_out": RowFormat(getattr(torch, out), config["hidden_size"]).num_bytes(1),
                    "token_agreement": float((logits.argmax(-1) == reference.argmax(-1)).float().mean()),
                    "mean_kl_nats": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
                    "max_logit_error": float(error.max()),
                    "mean_logit_error": float(error.mean()),
                    "positions": len(texts),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
