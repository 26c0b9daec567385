"""What holding an answer to a schema costs per token: a JSON line per vocabulary, microseconds of one thread.

    python tests/bench/mask_cost.py TOKENIZER.json [--repeat 20]

Per token: the mask (llguidance), putting it on the logits, and taking the token in. The first pass fills the automaton's cache and
is told apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer

from antiphon.core.request import OutputRules, SamplingParams
from antiphon.worker.sampler import SamplingState
from antiphon.worker.structure.enforcer import Enforcer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "count": {"type": "integer"},
    },
    "required": ["name", "tags", "count"],
}
ANSWER = '{"name": "A choir of two halves, and what each of them sings.", "tags": ["attention", "experts"], "count": 12345}'


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--repeat", type=int, default=20)
    asked = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(asked.tokenizer))
    vocab, ids = tokenizer.get_vocab_size(), tokenizer.encode(ANSWER, add_special_tokens=False).ids
    enforcer = Enforcer(asked.tokenizer.parent, vocab)
    rules = OutputRules(grammar=f"start: %json {json.dumps(SCHEMA)}")
    torch.set_num_threads(1)
    logits_V = torch.randn(vocab)
    first: list[float] = []
    later: list[float] = []
    free: list[float] = []
    for turn in range(asked.repeat):
        matcher, meter = enforcer.begin(rules, frozenset({0}), ())
        params = SamplingParams(max_tokens=len(ids), rules=rules)
        state = SamplingState(params, frozenset({0}), [1], [], vocab, matcher=matcher, meter=meter)
        for position, token_id in enumerate(ids):
            start_s = time.perf_counter()
            state.adjust(logits_V, position)
            state.append(token_id)
            (later if turn else first).append((time.perf_counter() - start_s) * 1e6)
            start_s = time.perf_counter()
            logits_V.clone()
            free.append((time.perf_counter() - start_s) * 1e6)
    line = {
        "vocabulary": vocab,
        "tokens": len(ids),
        "first_pass_median_us": round(statistics.median(first), 1),
        "p10_us": round(statistics.quantiles(later, n=10)[0], 1),
        "median_us": round(statistics.median(later), 1),
        "p90_us": round(statistics.quantiles(later, n=10)[-1], 1),
        "copy_of_logits_us": round(statistics.median(free), 1),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
