"""Experts and gates of one layer by themselves: the compiled kernel against the torch path and against the memory's speed.

    python tests/bench/moe/layer.py [--width 256] [--threads 1] [--batch 1 8 32 64 256]

Twelve layers of 32 experts, hidden 512, top 4, so that layers do not stay in a cache from step to step. A JSON line per batch and
way, medians of several interleaved rounds: milliseconds a step (all layers), bytes of the weights that rows came for, and the share
of the rate at which this machine sums up memory of that size in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from antiphon.models.config import GateConfig, MoEConfig
from antiphon.models.experts.gates import choose
from antiphon.models.experts.packed import Int8Parts, PackedExperts
from antiphon.models.experts.reading import ExpertWeights
from antiphon.models.experts.shard import _PlainExperts
from antiphon.models.layers.linear import Linear
from antiphon.models.native.library import available

LAYERS, EXPERTS, TOP_K, HIDDEN = 12, 32, 4, 512
Bank = PackedExperts | _PlainExperts


def build(way: str, width: int) -> list[Bank]:
    """Random layers."""
    int8 = Int8Parts(gate_up="int8" in way, down="int8" in way)
    banks: list[Bank] = []
    for _ in range(LAYERS):
        bank: Bank
        if "kernel" in way:
            bank = PackedExperts(EXPERTS, torch.bfloat16, "silu", lambda _: int8)
            bank.expect(EXPERTS)
        else:
            gate = GateConfig(num_experts=EXPERTS, top_k=TOP_K)
            bank = _PlainExperts(MoEConfig(gate=gate, intermediate_size=width), lambda _: int8)
        for expert in range(EXPERTS):
            gate_proj, up, down = (torch.randn(shape).bfloat16() for shape in ((width, HIDDEN), (width, HIDDEN), (HIDDEN, width)))
            if isinstance(bank, PackedExperts):
                bank.put(expert, gate_proj, up, down)
            else:
                bank.put(expert, ExpertWeights(gate=gate_proj, up=up, down=down))
        banks.append(bank)
    return banks


def seconds(run: Callable[[], None]) -> float:
    """How long one run takes."""
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s


def gates(batch: int) -> dict[str, float]:
    """Microseconds of one gate, logits included, by the kernel and by torch."""
    weight, rows = torch.randn(EXPERTS, HIDDEN), torch.randn(batch, HIDDEN).bfloat16()
    packed = torch.empty(EXPERTS * HIDDEN)
    torch.ops.antiphon.pack_experts(packed, weight, None, 1)
    linear, gate = Linear(weight), GateConfig(num_experts=EXPERTS, top_k=TOP_K, renormalise=True)
    ids, by = torch.empty(batch, TOP_K, dtype=torch.int64), torch.empty(batch, TOP_K)

    def kernel() -> None:
        torch.ops.antiphon.route(ids, by, rows, packed, None, None, EXPERTS, TOP_K, False, False, True, 1.0, 1, 1, 0)

    def plain() -> None:
        choose(gate, linear(rows.float()))

    rounds = [(seconds(kernel), seconds(plain)) for _ in range(200)]
    return {name: 1e6 * statistics.median(each[i] for each in rounds) for i, name in enumerate(("kernel_us", "torch_us"))}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 64, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=["kernel", "kernel int8", "torch"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not available():
        raise SystemExit("the kernels are not built: python -m antiphon.models.native.library")
    banks = {way: build(way, args.width) for way in args.ways}
    expert_bytes = 3 * HIDDEN * args.width * 2
    memory = torch.ones(LAYERS * EXPERTS * expert_bytes // 8, dtype=torch.int64)
    counts = torch.zeros(EXPERTS, dtype=torch.int64)
    with torch.inference_mode():
        for batch in args.batch:
            rows, by = torch.randn(batch, HIDDEN).bfloat16(), torch.rand(batch, TOP_K)
            out = torch.empty_like(rows)
            ids = [torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(batch)]) for _ in range(LAYERS)]
            touched = sum(len(each.unique()) for each in ids) * expert_bytes
            taken: dict[str, list[float]] = {way: [] for way in (*banks, "memory")}
            for _ in range(args.rounds):
                for way, layers in banks.items():
                    taken[way].append(
                        seconds(lambda: [bank.compute(out, counts, rows, each, by) for bank, each in zip(layers, ids, strict=True)])  # type: ignore[arg-type,return-value]  # noqa: B023
                    )
                taken["memory"].append(seconds(lambda: memory.sum()))  # type: ignore[arg-type,return-value]
            rate = memory.nbytes / statistics.median(taken["memory"])
            for way in banks:
                step_s = statistics.median(taken[way])
                num_bytes = touched // 2 if "int8" in way else touched
                line = {"bench": "moe_layer", "way": way, "batch": batch, "threads": args.threads, "step_ms": 1e3 * step_s}
                line |= {"weight_bytes": num_bytes, "of_memory_rate": num_bytes / step_s / rate, "memory_gb_s": rate / 1e9}
                print(json.dumps(line), flush=True)
            print(json.dumps({"bench": "moe_gate", "batch": batch, "threads": args.threads, **gates(batch)}), flush=True)


if __name__ == "__main__":
    main()
