"""Steps of a monolith against the machine's own limits, our kernels against the plain torch path: JSON lines and a table.

    python tests/bench/decode_step.py CHECKPOINT [--batch 1 32 64] [--prompt 1024] [--threads 2] [--path tiles kernels torch]

The roofline is measured in the same process, between the steps: bytes read per second from memory (weights and KV are read once
a step) and bfloat16 products per second of a large matrix product. A step's share is the longer of the two times over its own.
Every path is a process of its own, and they take turns, each round in another order; figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from typing import Any

PATHS = {
    "tiles": {},  # matrix units, where the processor has them
    "kernels": {"ANTIPHON_TILES": "0"},  # our vector kernels and oneDNN
    "torch": {"ANTIPHON_NATIVE": "0"},  # the reference
}
PROMPT_TOKENS = 128
STEPS = 12


def serve(checkpoint: str, threads: int) -> None:
    """A child: answer each line of JSON on stdin with a line of figures."""
    import torch

    from antiphon.models.config import AttentionConfig
    from antiphon.models.loading.source import resolve
    from antiphon.models.native.library import available, tiles_available
    from antiphon.testing import LocalCluster, wiring

    torch.set_num_threads(threads)
    path = resolve(checkpoint)
    chance = random.Random(0)
    document = wiring(
        path,
        "monolith",
        model={"uri": str(path), "dtype": "bfloat16", "maxModelLen": 2048},
        cache={"numBlocks": 1024, "prefixCaching": False},
        scheduler={"maxNumBatchedTokens": 1024, "maxNumSeqs": 64},
    )
    memory = torch.ones(512 * 2**20, dtype=torch.uint8)
    square = torch.randn(2048, 2048).bfloat16()

    def limits() -> tuple[float, float]:
        def seconds(call: Any) -> float:
            start_s = time.perf_counter()
            call()
            return time.perf_counter() - start_s

        read = (lambda: torch.ops.antiphon.read_all(memory)) if available() else (lambda: memory.view(torch.int64).sum())
        with torch.inference_mode():
            return (
                memory.numel() / min(seconds(read) for _ in range(3)),
                2 * 2048**3 / min(seconds(lambda: torch.mm(square, square)) for _ in range(3)),
            )

    with LocalCluster(document, path) as cluster:
        part = cluster.generating[0]
        config, layout = part.worker.halves.config, part.worker.cache.layout
        weight_bytes = sum(part.resident_bytes.values())
        print(json.dumps({"path": "tiles" if tiles_available() else "kernels" if available() else "torch"}), flush=True)
        for line in sys.stdin:
            ask = json.loads(line)
            bandwidth, rate = limits()
            if "prompt" in ask:
                cluster.submit([chance.randrange(10, 200) for _ in range(ask["prompt"])], max_tokens=1)
                start_s = time.perf_counter()
                cluster.run()
                took_s = time.perf_counter() - start_s
                head = config.hidden_size * config.vocab_size
                macs = (weight_bytes // 2 - head) * ask["prompt"] + head
                for layer in config.layers:
                    if isinstance(layer.attention, AttentionConfig):  # q·k and p·v, half of each
                        macs += layer.attention.num_heads * layer.attention.head_dim * ask["prompt"] ** 2
                limit_s = max(weight_bytes / bandwidth, 2 * macs / rate)
                figures = {"step_s": took_s, "tokens": ask["prompt"], "schedule_s": 0.0, "sample_s": 0.0}
            else:
                batch = ask["batch"]
                for _ in range(batch):
                    cluster.submit([chance.randrange(10, 200) for _ in range(PROMPT_TOKENS)], max_tokens=STEPS + 6)
                scheduler, stats = part.engine.scheduler, part.worker.stats
                while scheduler.stats.num_generation_tokens < ask["seen"] + 2 * batch:
                    part.engine.step()
                whole, execute, sample = [], [], []
                for _ in range(STEPS):
                    before = stats.step_s, stats.sample_s
                    start_s = time.perf_counter()
                    part.engine.step()
                    whole.append(time.perf_counter() - start_s)
                    execute.append(stats.step_s - before[0])
                    sample.append(stats.sample_s - before[1])
                cluster.run()
                context = PROMPT_TOKENS + STEPS / 2
                limit_s = max(
                    (weight_bytes + batch * context * layout.token_bytes) / bandwidth, 2 * batch * (weight_bytes / 2) / rate
                )
                figures = {
                    "step_s": statistics.median(whole),
                    "tokens": batch,
                    "schedule_s": statistics.median(w - e for w, e in zip(whole, execute, strict=True)),
                    "sample_s": statistics.median(sample),
                    "seen": scheduler.stats.num_generation_tokens,
                }
            print(json.dumps(figures | {"limit_s": limit_s, "read_gb_s": bandwidth / 1e9, "tflops": rate / 1e12}), flush=True)


class Child:
    """One path's process."""

    def __init__(self, name: str, checkpoint: str, threads: int) -> None:
        self.name = name
        self.seen = 0
        self._process = subprocess.Popen(
            [sys.executable, __file__, checkpoint, "--serve", "--threads", str(threads)],
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "1000", **PATHS[name]},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ready(self) -> None:
        """Wait until the model is loaded. Raises SystemExit when this machine computes by another path than asked for."""
        path = self._answer()["path"]
        if path != self.name:
            raise SystemExit(f"{self.name} is not to be had here: {path} serves (are the kernels built?)")

    def ask(self, what: dict[str, int]) -> dict[str, Any]:
        """One measurement."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**what, "seen": self.seen}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.seen = answer.pop("seen", self.seen + 1)
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.name} ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(30)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 32, 64])
    parser.add_argument("--prompt", type=int, nargs="*", default=[1024])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--path", nargs="*", choices=sorted(PATHS), default=list(PATHS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.checkpoint, options.threads)
        return
    children = [Child(name, options.checkpoint, options.threads) for name in options.path]
    for child in children:
        child.ready()
    asks = [{"batch": b} for b in options.batch] + [{"prompt": p} for p in options.prompt]
    seen: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for turn in range(options.rounds + 1):
        for ask in asks:
            for child in children[turn % len(children) :] + children[: turn % len(children)]:
                answer = child.ask(ask)
                if turn > 0:  # the first warms up
                    seen.setdefault((child.name, next(f"{k} {v}" for k, v in ask.items())), []).append(answer)
    for child in children:
        child.close()
    table = []
    for (path, what), answers in seen.items():
        median = {key: statistics.median(a[key] for a in answers) for key in answers[0]}
        share = statistics.median(a["limit_s"] / a["step_s"] for a in answers)
        own = (median["schedule_s"] + median["sample_s"]) / median["step_s"]
        line = {"bench": "step", "path": path, "what": what, "threads": options.threads, **median}
        line |= {
            "tokens_per_s": median["tokens"] / median["step_s"],
            "share_of_roofline": share,
            "scheduler_and_sampler_share": own,
        }
        print(json.dumps(line))
        table.append(
            f"{path:8} {what:12} {1e3 * median['step_s']:9.2f} ms {line['tokens_per_s']:9.1f} tokens/s {share:7.1%} {own:7.2%}"
        )
    print("path     what              step             rate      roofline  scheduler+sampler", *table, sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
