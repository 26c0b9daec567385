"""The layer exchange between real processes, without gateway or rpc: rates, stage times and bubbles of wirings side by side.

    python tests/bench/afd.py CHECKPOINT [-w monolith -w 1A1F] [-b 1 -b 32] [--repeats 3] [--transport shm] [--generated 64]

All wirings are started once and measured in turn, interleaved, each on all given cores (dealt out to its workers in equal runs); an
idle wiring sleeps. One JSON line per wiring and batch, medians over the repeats, then a table. Ratios are to the first wiring.

``bubble_a`` / ``bubble_f``: share of the window in which the attention / FFN workers wait for their peers. ``fill``: rows per FFN
batch over the rows all attention workers send per exchange, 1 where every batch holds everybody's rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from antiphon.apps.process.wiring.build import build_attention, build_ffn
from antiphon.apps.process.wiring.resolve import resolve_model
from antiphon.apps.process.wiring.sizes import afd_layout, num_ubatches
from antiphon.apps.supervision.child_process import RUNTIME_VARIABLES
from antiphon.core.document.spec import LLMDeploymentSpec
from antiphon.core.identity import own_identity
from antiphon.core.ids import Epoch, FFNShard, Role, WorkerId
from antiphon.core.request import Request, RequestId, RequestOutput, SamplingParams
from antiphon.testing import wiring
from antiphon.transport.base import Hello
from antiphon.transport.connect.choose import connect_auto, open_transport

START_TIMEOUT_S = 120.0
RUN_TIMEOUT_S = 280.0


def spec_of(options: dict[str, Any]) -> LLMDeploymentSpec:
    """The document that the processes of one wiring share."""
    found = re.fullmatch(r"(\d+)A(\d+)F", options["wiring"])
    x, y = (int(found[1]), int(found[2])) if found else (1, 1)
    return wiring(
        options["checkpoint"],
        "afd" if found else "monolith",
        attention=x,
        ffn=y,
        dtype=options["dtype"],
        model={
            "uri": options["checkpoint"],
            "dtype": options["dtype"],
            "maxModelLen": 1024,
            "quantization": options["quantization"],
        },
        cache={"memory": "1Gi", "prefixCaching": False},
        scheduler={"maxNumSeqs": 128, "maxNumBatchedTokens": 1024},
        transport={
            "numUbatches": options["ubatches"] or "auto",
            "activationDtype": options["activations"],
            **options["transport_section"],
        },
    )


# ---- the processes under measurement -------------------------------------------------------------------------------


def serve_ffn(options: dict[str, Any], index: int) -> None:
    """An FFN worker that answers "figures" on stdin with its sums since start."""
    spec = spec_of(options)
    facts = resolve_model(spec, options["checkpoint"], "bench")
    num_shards = spec.pools[-1].replicas
    shard = FFNShard.of(index, num_tensor=num_shards, num_expert=1)
    worker = build_ffn(facts, shard, Epoch(1))

    def answer(hello: Hello) -> Hello:
        layout = afd_layout(facts, spec, shard, attention_end=False, ubatches=hello.layout.num_slots - 1)
        return Hello(worker_id=WorkerId(f"bench/ffn/{index}"), epoch=Epoch(1), layout=layout)

    listener = open_transport(options["transport"]).listen("127.0.0.1", answer)
    worker.side.add_listener(listener)
    print(json.dumps({"address": listener.address, "index": index}), flush=True)
    stop = threading.Event()

    def control() -> None:
        for _ in sys.stdin:
            stats = worker.stats
            print(
                json.dumps(
                    {
                        "rows": stats.num_rows,
                        "batches": stats.num_batches,
                        "busy_s": stats.busy_s,
                        "compute_s": stats.compute_s,
                        "now_s": time.perf_counter(),
                    }
                ),
                flush=True,
            )
        stop.set()

    threading.Thread(target=control, daemon=True).start()
    worker.serve(stop.is_set)
    worker.side.close()


def serve_attention(options: dict[str, Any], index: int, addresses: list[str]) -> None:
    """An engine that runs a batch for every line on stdin and answers with the figures of its steady window."""
    spec = spec_of(options)
    facts = resolve_model(spec, options["checkpoint"], "bench")
    role = Role.ATTENTION if addresses else Role.MONOLITH
    me = WorkerId(f"bench/attention/{index}")
    tokens: dict[str, list[float]] = {}
    ended: list[float] = []

    def take(outputs: Any) -> None:
        now = time.perf_counter()
        output: RequestOutput
        for output in outputs:
            tokens[output.request_id] += [now] * len(output.new_token_ids)
            if output.finish_reason is not None:
                assert output.error is None, output.error
                ended.append(now)

    part = build_attention(facts, spec, role, me, Epoch(1), take, time.monotonic, index=index)
    for number, address in enumerate(addresses):
        shard = FFNShard.of(number, num_tensor=len(addresses), num_expert=1)
        layout = afd_layout(facts, spec, shard, attention_end=True, ubatches=num_ubatches(spec, role))
        hello = Hello(worker_id=me, epoch=Epoch(1), layout=layout)
        part.worker.afd.add_link(number, connect_auto(address.split(","), hello, START_TIMEOUT_S))
    print(json.dumps({"ready": True}), flush=True)
    chance = random.Random(index)
    for line in sys.stdin:
        asked = json.loads(line)
        batch = asked["batch"]
        tokens.clear()
        ended.clear()
        for number in range(batch):
            name = RequestId(f"r{number}-{time.monotonic_ns()}")
            tokens[name] = []
            part.engine.submit(
                Request(
                    request_id=name,
                    prompt_token_ids=tuple(chance.randrange(10, 200) for _ in range(asked["prompt"])),
                    sampling=SamplingParams(max_tokens=asked["generated"], temperature=0.0, ignore_eos=True),
                    arrival_s=time.monotonic(),
                )
            )
        first: dict[str, float] | None = None
        last: dict[str, float] = {}
        while len(ended) < batch:
            part.engine.step()
            if not ended:
                last = _sums(part)
                if first is None and all(len(times) >= 2 for times in tokens.values()):
                    first = last
        assert first is not None
        delta = {name: last[name] - first[name] for name in last}
        print(json.dumps({"batch": batch, "start_s": first["now_s"], "end_s": last["now_s"], **delta}), flush=True)
    part.close()


def _sums(part: Any) -> dict[str, float]:
    runner, times = part.worker.stats, part.worker.afd.times
    return {
        "now_s": time.perf_counter(),
        "steps": float(runner.num_steps),
        "rows": float(runner.num_rows),
        "step_s": runner.step_s,
        "attention_s": runner.attention_s,
        "send_s": runner.send_s,
        "head_s": runner.head_s,
        "sample_s": runner.sample_s,
        "blocked_s": times.blocked_s,
        "round_trip_s": times.round_trip_s,
        "ffn_compute_s": times.ffn_compute_s,
        "ffn_wait_s": times.ffn_wait_s,
        "exchanges": float(times.num_exchanges),
    }


# ---- the measuring process -----------------------------------------------------------------------------------------


class Child:
    """One process and its lines."""

    def __init__(self, role: str, options: dict[str, Any], index: int, addresses: list[str], cores: list[int]) -> None:
        arguments = json.dumps({"role": role, "options": options, "index": index, "addresses": addresses, "cores": cores})
        environment = {**os.environ, **RUNTIME_VARIABLES, "OMP_NUM_THREADS": str(len(cores))}
        command = [sys.executable, __file__, "--child", arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def ask(self, **asked: Any) -> None:
        """Send a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next line."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker stopped with {self._process.wait()}")
        return dict(json.loads(line))

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait(10)


class Wiring:
    """The processes of one wiring."""

    def __init__(self, options: dict[str, Any], cores: list[int]) -> None:
        own_identity()  # what its processes start with, so that they believe each other
        spec = spec_of(options)
        monolith = len(spec.pools) == 1
        num_ffn = 0 if monolith else spec.pools[1].replicas
        num_workers = spec.pools[0].replicas + num_ffn
        share = max(1, len(cores) // num_workers)
        turns = [[cores[(i * share + c) % len(cores)] for c in range(share)] for i in range(num_workers)]
        if num_workers > len(cores) > 1:  # attention workers share; an FFN worker that shares with one would wait for its own peer
            turns = [[cores[i % (len(cores) - 1)]] for i in range(num_workers - num_ffn)] + [[cores[-1]]] * num_ffn
        self.ffns = [Child("ffn", options, i, [], turns[-1 - i]) for i in range(num_ffn)]
        addresses = [ffn.answer()["address"] for ffn in self.ffns]
        self.attention = [Child("attention", options, i, addresses, turns[i]) for i in range(spec.pools[0].replicas)]
        for child in self.attention:
            child.answer()

    def run(self, batch: int, prompt: int, generated: int) -> dict[str, float]:
        """One run; ``batch`` is dealt out over the attention workers."""
        per_worker = batch // len(self.attention)
        for child in self.attention:
            child.ask(batch=per_worker, prompt=prompt, generated=generated)
        stop = threading.Event()
        looks: list[list[dict[str, Any]]] = []

        def watch() -> None:
            while not stop.wait(0.05):
                for ffn in self.ffns:
                    ffn.ask()
                looks.append([ffn.answer() for ffn in self.ffns])

        watcher = threading.Thread(target=watch)
        if self.ffns:
            watcher.start()
        got = [child.answer() for child in self.attention]
        stop.set()
        if self.ffns:
            watcher.join()
        exchanges = sum(g["exchanges"] for g in got)
        compute, wait, away = (sum(g[name] for g in got) / exchanges for name in ("ffn_compute_s", "ffn_wait_s", "round_trip_s"))
        line = {
            "tokens_per_s": sum(g["rows"] / (g["end_s"] - g["start_s"]) for g in got),
            "step_ms": 1e3 * statistics.mean((g["end_s"] - g["start_s"]) / g["steps"] for g in got),
            "t_attention_us": 1e6 * sum(g["attention_s"] for g in got) / exchanges,
            "t_ffn_us": 1e6 * compute,
            "t_wait_us": 1e6 * wait,
            "t_transfer_us": 1e6 * max(0.0, away - compute - wait) / 2,
            "bubble_a": sum(g["blocked_s"] for g in got) / sum(g["step_s"] for g in got),
            "attention_share": sum(g["attention_s"] for g in got) / sum(g["step_s"] for g in got),
            "send_share": sum(g["send_s"] for g in got) / sum(g["step_s"] for g in got),
            "head_share": sum(g["head_s"] for g in got) / sum(g["step_s"] for g in got),
            "sample_share": sum(g["sample_s"] for g in got) / sum(g["step_s"] for g in got),
            "outside_share": 1 - statistics.mean(g["step_s"] / (g["end_s"] - g["start_s"]) for g in got),
            "num_ubatches": exchanges / sum(g["steps"] for g in got) / self.num_layers(got),
        }
        start, end = max(g["start_s"] for g in got), min(g["end_s"] for g in got)
        inside = [look for look in looks if start <= look[0]["now_s"] <= end]
        if len(inside) >= 2:
            first, last = inside[0], inside[-1]
            span = [b["now_s"] - a["now_s"] for a, b in zip(first, last, strict=True)]
            line["bubble_f"] = 1 - statistics.mean(
                (b["busy_s"] - a["busy_s"]) / s for a, b, s in zip(first, last, span, strict=True)
            )
            rows = sum(b["rows"] - a["rows"] for a, b in zip(first, last, strict=True))
            batches = sum(b["batches"] - a["batches"] for a, b in zip(first, last, strict=True))
            per_exchange = sum(g["rows"] / g["steps"] / line["num_ubatches"] for g in got)
            line["rows_per_batch"] = rows / max(1, batches)
            line["fill"] = line["rows_per_batch"] / per_exchange
        return line

    layers = 0

    def num_layers(self, got: list[dict[str, float]]) -> int:
        """Of the model."""
        return self.layers

    def close(self) -> None:
        """End all processes."""
        for child in (*self.attention, *self.ffns):
            child.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("-w", "--wiring", action="append")
    parser.add_argument("-b", "--batch", action="append", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--generated", type=int, default=64)
    parser.add_argument("--warm-up", type=int, default=24, help="tokens generated once beforehand, not counted")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--activations", default="auto", help="format of the rows on their way to the FFN side")
    parser.add_argument("--transport", default="shm")
    parser.add_argument("--ubatches", type=int, default=0, help="0 = auto")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="more of the transport section")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child = json.loads(args.child)
        os.sched_setaffinity(0, child["cores"])
        torch.set_num_threads(len(child["cores"]))
        if child["role"] == "ffn":
            serve_ffn(child["options"], child["index"])
        else:
            serve_attention(child["options"], child["index"], child["addresses"])
        return
    if args.checkpoint is None:
        parser.error("CHECKPOINT is missing")
    Wiring.layers = json.loads((Path(args.checkpoint) / "config.json").read_text())["num_hidden_layers"]
    names = args.wiring or ["monolith", "1A1F"]
    section = {name: json.loads(value) for name, _, value in (item.partition("=") for item in args.set)}
    wirings: dict[str, Wiring] = {}
    lines: dict[tuple[str, int], list[dict[str, float]]] = {}
    try:
        for name in names:
            options = {
                "wiring": name,
                "checkpoint": args.checkpoint,
                "dtype": args.dtype,
                "quantization": args.quantization,
                "activations": args.activations,
                "transport": args.transport,
                "ubatches": args.ubatches,
                "transport_section": section,
            }
            wirings[name] = Wiring(options, sorted(os.sched_getaffinity(0)))
        for turn in range(args.repeats + 1):
            for batch in args.batch or [1, 32]:
                for name, one in wirings.items():
                    figures = one.run(batch, args.prompt, args.generated if turn else args.warm_up)
                    if turn:
                        lines.setdefault((name, batch), []).append(figures)
    finally:
        for one in wirings.values():
            one.close()
    rows = []
    for (name, batch), runs in lines.items():
        line: dict[str, Any] = {"bench": "afd", "wiring": name, "batch": batch, "transport": args.transport, "repeats": len(runs)}
        line |= {key: statistics.median(run[key] for run in runs if key in run) for key in runs[0]}
        reference = statistics.median(run["tokens_per_s"] for run in lines[(names[0], batch)])
        line["ratio"] = line["tokens_per_s"] / reference
        print(json.dumps(line))
        rows.append(line)
    columns = ("tokens_per_s", "ratio", "step_ms", "t_attention_us", "t_ffn_us", "t_transfer_us", "bubble_a", "bubble_f", "fill")
    print(f"{'wiring':10}{'batch':>6}" + "".join(f"{column:>16}" for column in columns))
    for line in rows:
        values = "".join(f"{line[c]:16.3f}" if c in line else f"{'-':>16}" for c in columns)
        print(f"{line['wiring']:10}{line['batch']:6d}{values}")


if __name__ == "__main__":
    main()
