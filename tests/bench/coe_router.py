"""Times of routing decisions and the router's memory. Run alone on an idle machine:

    python tests/bench/coe_router.py ARTIFACT TABLE.jsonl.gz

Prints fast-path and slow-path decisions in milliseconds (median, p99) and resident memory in MB.
"""

import sys
import time
from pathlib import Path

import numpy as np
import psutil

from antiphon.coe.artifact import load_artifact
from antiphon.coe.decision import Question
from antiphon.coe.router import Router, judge, spec_of
from antiphon.coe.table import read_table


def _line(name: str, seconds: list[float]) -> None:
    print(f"{name}: median {1e3 * np.median(seconds):.3f} ms, p99 {1e3 * np.quantile(seconds, 0.99):.3f} ms, n {len(seconds)}")


def main() -> None:
    artifact = load_artifact(Path(sys.argv[1]))
    prompts = list(read_table(Path(sys.argv[2])).prompts)[:2000]
    print(f"resident after loading: {psutil.Process().memory_info().rss / 1e6:.0f} MB")
    spec = spec_of(artifact)
    fast = spec.model_copy(update={"router": spec.router.model_copy(update={"slow_path": "never"})})
    router = Router(fast, artifact)
    for prompt in prompts[:200]:
        router.route(Question(prompt=prompt))
    took = []
    for prompt in prompts:
        began = time.perf_counter()
        router.route(Question(prompt=prompt))
        took.append(time.perf_counter() - began)
    _line("fast path", took)
    if artifact.encoder is not None:
        took = []
        for prompt in prompts[:300]:
            began = time.perf_counter()
            judge(artifact, prompt, strictness=1e9, slow_path=True)  # nothing is familiar enough: always the slow path
            took.append(time.perf_counter() - began)
        _line("slow path", took[20:])
    print(f"resident after routing: {psutil.Process().memory_info().rss / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
