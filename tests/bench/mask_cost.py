"""What holding an answer to a schema costs per token: a JSON line per vocabulary, microseconds of one thread.

    python tests/bench/mask_cost.py TOKENIZER.json [TOKENIZER.json ...] [--vocabulary SIZE] [--repeat 20]

Per token, in processor time: the mask (llguidance) and putting it on the logits, apart and together, and taking the token in. The
first pass fills the automaton's cache and is told apart. Putting it on in torch, as without kernels, is measured beside it.
``--vocabulary`` pads what the model has: without it, a tokenizer's own size.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from tokenizers import Tokenizer

from antiphon.core.request import OutputRules, SamplingParams
from antiphon.models.native.library import available
from antiphon.worker import sampler
from antiphon.worker.sampler import SamplingState, keep_allowed
from antiphon.worker.structure.enforcer import Enforcer
from antiphon.worker.structure.grammar import Matcher

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


def measure(path: Path, size: int | None, repeat: int) -> dict[str, float]:
    """Microseconds per token."""
    tokenizer = Tokenizer.from_file(str(path))
    ids = tokenizer.encode(ANSWER, add_special_tokens=False).ids
    vocab = tokenizer.get_vocab_size() if size is None else size
    enforcer = Enforcer(path.parent, vocab)
    rules = OutputRules(grammar=f"start: %json {json.dumps(SCHEMA)}")
    params = SamplingParams(max_tokens=len(ids), rules=rules)
    logits_V = torch.randn(vocab)
    times: dict[str, list[float]] = {name: [] for name in ("first_pass", "fill", "apply", "append", "together", "apply_in_torch")}

    def begun() -> tuple[Matcher, SamplingState]:
        matcher, meter = enforcer.begin(rules, frozenset({0}), ())
        assert matcher is not None
        return matcher, SamplingState(params, frozenset({0}), [1], [], vocab, matcher=matcher, meter=meter)

    def timed(name: str, call: Callable[[], object]) -> None:
        start_ns = time.thread_time_ns()
        call()
        times[name].append((time.thread_time_ns() - start_ns) / 1e3)

    for turn in range(repeat):
        _, state = begun()
        for position, token_id in enumerate(ids):
            timed("together" if turn else "first_pass", lambda: state.adjust(logits_V, position))  # noqa: B023 - called at once
            state.append(token_id)
        matcher, _ = begun()
        for token_id in ids:
            timed("fill", matcher.allowed)
            allowed = matcher.allowed()
            timed("apply", lambda: keep_allowed(logits_V, allowed))  # noqa: B023 - as above
            timed("append", lambda: matcher.append(token_id))  # noqa: B023 - as above
        matcher, _ = begun()
        with mock.patch.object(sampler, "available", return_value=False):
            for token_id in ids:
                allowed = matcher.allowed()
                timed("apply_in_torch", lambda: keep_allowed(logits_V, allowed))  # noqa: B023 - as above
                matcher.append(token_id)
    figures: dict[str, float] = {"vocabulary": vocab, "tokens": len(ids)}
    for name, found in times.items():
        figures[f"{name}_median_us"] = round(statistics.median(found), 1)
    deciles = statistics.quantiles(times["together"], n=10)
    figures |= {"together_p10_us": round(deciles[0], 1), "together_p90_us": round(deciles[-1], 1)}
    return figures


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizers", type=Path, nargs="+")
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--repeat", type=int, default=20)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for path in asked.tokenizers:
        load = round(os.getloadavg()[0], 1)
        print(json.dumps(measure(path, asked.vocabulary, asked.repeat) | {"kernels": available(), "load": load}), flush=True)


if __name__ == "__main__":
    main()
