"""Times of routing decisions and the router's memory. Run alone on an idle machine, on one core:

    taskset -c 0 python tests/bench/coe/router.py ARTIFACT TABLE.jsonl.gz

JSON lines, then a table: decisions in milliseconds (median and p99 of interleaved rounds) on the fast path in C and in numpy, the
slow path and for prompts of 200,000 characters, beside the sentence encoder alone; the processor time of both fast paths, which
other work on the machine does not lengthen as much, taken in turns for each prompt; and the resident memory of a fresh process that
only routes.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

os.environ.setdefault("OMP_NUM_THREADS", "1")

NUM_ROUNDS = 3
NUM_CPU_ROUNDS = 8


def memory_of_a_fresh_process(artifact: str) -> dict[str, float]:
    """Megabytes resident: with the artifact loaded, and after both paths have served."""
    code = (
        "import sys, json, psutil, pathlib\n"
        "from antiphon.coe.routing.artifact import load_artifact\n"
        "from antiphon.coe.routing.decision import Question\n"
        "from antiphon.coe.routing.router import Router, judge, spec_of\n"
        "artifact = load_artifact(pathlib.Path(sys.argv[1]))\n"
        "loaded = psutil.Process().memory_info().rss / 1e6\n"
        "router = Router(spec_of(artifact), artifact)\n"
        "for i in range(1000):\n"
        "    prompt = f'question {i} ' * (i % 60 + 1)\n"
        "    router.route(Question(prompt=prompt))\n"
        "    if i % 20 == 0: judge(artifact, prompt, strictness=1e9, slow_path=True)\n"
        "router.route(Question(prompt='x y ' * 50_000))\n"
        "print(json.dumps({'loaded_mb': loaded, 'served_mb': psutil.Process().memory_info().rss / 1e6}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, artifact], check=True, capture_output=True, text=True, timeout=120)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def timed(run: Callable[[str], object], prompts: Sequence[str]) -> list[float]:
    """Seconds of each call."""
    took = []
    for prompt in prompts:
        began = time.perf_counter()
        run(prompt)
        took.append(time.perf_counter() - began)
    return took


def processor_time(both: dict[str, Callable[[str], object]], prompts: Sequence[str]) -> dict[str, dict[str, float]]:
    """Milliseconds of this thread on a processor: the median of all calls, and of each prompt's best."""
    took = {name: np.zeros((NUM_CPU_ROUNDS, len(prompts))) for name in both}
    for i in range(NUM_CPU_ROUNDS):
        for p, prompt in enumerate(prompts):
            for name in both if (i + p) % 2 else reversed(both):
                began = time.thread_time_ns()
                both[name](prompt)
                took[name][i, p] = time.thread_time_ns() - began
    return {
        name: {"median_ms": 1e-6 * float(np.median(some)), "best_ms": 1e-6 * float(np.median(some.min(axis=0)))}
        for name, some in took.items()
    }


def main() -> None:
    from antiphon.coe.routing.artifact import load_artifact
    from antiphon.coe.routing.assessment import Ready
    from antiphon.coe.routing.decision import Question
    from antiphon.coe.routing.router import Router, judge, spec_of
    from antiphon.coe.training.data.table import read_table

    artifact = load_artifact(Path(sys.argv[1]))
    prompts = list(read_table(Path(sys.argv[2])).prompts)
    prompts = prompts[:: max(1, len(prompts) // 2000)]
    spec = spec_of(artifact)
    spec = spec.model_copy(update={"router": spec.router.model_copy(update={"slow_path": "never"})})
    router, path = Router(spec, artifact), artifact.fast
    numpy_path = replace(path, quick=Ready(path.fitted, path.mix, path.gate, native=False))
    in_numpy = Router(spec, replace(artifact, embedding=replace(artifact.embedding, native=False), fast=numpy_path))
    runs: dict[str, tuple[Callable[[str], object], list[str]]] = {
        "fast path": (lambda prompt: router.route(Question(prompt=prompt)), prompts),
        "fast path, in numpy": (lambda prompt: in_numpy.route(Question(prompt=prompt)), prompts),
        "fast path, 200,000 characters": (
            lambda prompt: router.route(Question(prompt=prompt)),
            [(prompt + " ") * (200_000 // (len(prompt) + 1)) for prompt in prompts[:60]],
        ),
    }
    if artifact.encoder is not None:
        encoder = artifact.encoder
        # A strictness that no prompt meets: always the slow path. Prompts of at least 64 tokens fill its window.
        full = [prompt for prompt in prompts if len(encoder.tokens.encode(prompt[:2000], 64)) == 64][:150]
        runs["slow path, 64 tokens"] = (lambda prompt: judge(artifact, prompt, strictness=1e9, slow_path=True), full)
        runs["sentence encoder alone"] = (encoder.encode, full)
    for run, some in runs.values():
        timed(run, some[:50])
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(NUM_ROUNDS):
        for name, (run, some) in runs.items():
            took[name] += timed(run, some)
    for name, seconds in took.items():
        line = {"what": name, "median_ms": 1e3 * float(np.median(seconds)), "p99_ms": 1e3 * float(np.quantile(seconds, 0.99))}
        print(json.dumps(line | {"n": len(seconds)}))
    spent = processor_time({name: runs[name][0] for name in ("fast path", "fast path, in numpy")}, prompts[::4])
    for name, times in spent.items():
        print(json.dumps({"what": f"{name}, processor time", **times, "c_is_built": artifact.embedding.reader is not None}))
    memory = memory_of_a_fresh_process(sys.argv[1])
    print(json.dumps({"what": "memory of a fresh process", **memory}))
    print()
    for name, seconds in took.items():
        print(f"{name:32} {1e3 * np.median(seconds):8.3f} ms median {1e3 * np.quantile(seconds, 0.99):8.3f} ms p99")
    print(f"{'resident, fresh process':32} {memory['loaded_mb']:8.0f} MB loaded {memory['served_mb']:8.0f} MB after serving")


if __name__ == "__main__":
    main()
