"""A mixture of experts in decode: monolith and AFD side by side, with cores dealt out and with cores shared, bf16 and int8 experts.

    python tests/bench/moe/random_moe.py DIR && python tests/bench/moe/decode.py DIR [--batch 32 64] [--rounds 3]

One attention worker and one FFN worker on two processors can each have one, or both can have both: while the rows of the only
ubatch are away, the attention worker has nothing to do, and experts that are read from memory are read faster by two processors
than by one. All set-ups stay loaded and are measured in turn. A JSON line per round with its stage times, then medians and a table;
``tests/bench/peers/peers.py`` has the comparison with other systems.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from contextlib import ExitStack
from dataclasses import dataclass

# Compute threads of several processes share processors here: one that has nothing to do must not spin.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from antiphon.apps.bench.engine import BenchDeployment
from antiphon.apps.bench.setup import BenchSetup
from antiphon.core.document.spec import LLMDeployment


@dataclass(frozen=True, slots=True, kw_only=True)
class MoESetup(BenchSetup):
    """A set-up whose workers may share all processors, with experts as they are or in int8."""

    shared_cores: bool = False
    quantization: str = "none"

    def document(self) -> LLMDeployment:
        """See BenchSetup."""
        made = BenchSetup.document(self).model_dump(by_alias=True, mode="json")
        cores = list(self.cores) or sorted(os.sched_getaffinity(0))
        for pool in made["spec"]["pools"]:
            if self.shared_cores:
                pool["cores"], pool["threads"] = cores, len(cores)
        made["spec"]["model"]["quantization"] = self.quantization
        return LLMDeployment.model_validate(made)


SETUPS = {
    "monolith": {"wiring": "monolith"},
    "1A1F": {"wiring": "1A1F"},
    "1A1F, shared": {"wiring": "1A1F", "shared_cores": True, "num_ubatches": 1},
    "monolith, int8": {"wiring": "monolith", "quantization": "int8"},
    "1A1F, int8": {"wiring": "1A1F", "quantization": "int8"},
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--batch", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--generated", type=int, default=48)
    args = parser.parse_args()
    rates: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(BenchDeployment(MoESetup(uri=args.checkpoint, **SETUPS[name])))  # type: ignore[arg-type]
            for name in args.setups
        }
        for _ in range(args.rounds):
            for batch in args.batch:
                for name, deployment in running.items():
                    line = deployment.decode(batch, num_prompt=args.prompt, num_generated=args.generated)
                    print(json.dumps({**line, "bench": "moe_decode-round", "setup": name}), flush=True)
                    rates.setdefault((name, batch), []).append(line["tokens_per_s"])
    base = args.setups[0]
    for (name, batch), measured in rates.items():
        median = statistics.median(measured)
        ratio = median / statistics.median(rates[base, batch])
        line = {
            "bench": "moe_decode",
            "setup": name,
            "batch": batch,
            "tokens_per_s": median,
            "rounds": measured,
            f"x_{base}": ratio,
        }
        print(json.dumps(line), flush=True)
        print(f"{name:16} batch {batch:3}  {median:8.0f} tokens/s  {ratio:5.2f} x {base}", file=sys.stderr)


if __name__ == "__main__":
    main()
