"""The tier policy against first-come with LRU eviction, on the same traces. Run alone on an idle machine:

    python tests/bench/coe/tiers.py simulated
    python tests/bench/coe/tiers.py real CHECKPOINT [--experts 4] [--room 2] [--requests 48] [--repeats 3]

``real`` loads and serves whole models: the checkpoint, and others of its shape with weights of their own, made beside it in a
scratch directory. JSON lines (throughput, switches, waits, seconds of every load stage), then a table of medians.
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from antiphon.coe.tiers.policy import LoadTimes, Policy, TierExpert, TierLimits, Waiting, plan
from antiphon.coe.tiers.simulation import Service, first_come, play, random_trace

EXPERTS = {name: TierExpert(name=name, memory_bytes=1, host_bytes=1, fetch_s=1.5, load_s=0.5) for name in "abcdef"}
LIMITS = TierLimits(resident_bytes=2, host_bytes=3, fairness_window_s=10.0, max_group=16)
SERVICE = Service(base_s=0.1, per_request_s=0.02)


def simulated() -> None:
    for rate in (1.0, 2.0, 4.0, 8.0, 16.0):
        faster, fewer, longest = [], [], []
        for seed in range(15):
            trace = random_trace("abcdef", 400, rate, 1.0, 0.3, seed)
            mine = play(trace, EXPERTS, LIMITS, SERVICE, with_prefetch=True)
            theirs = play(trace, EXPERTS, LIMITS, SERVICE, first_come)
            faster.append(mine.throughput / theirs.throughput)
            fewer.append(mine.num_switches / theirs.num_switches)
            longest.append(max(mine.waits_s))
        print(
            f"{rate:4.0f} requests/s: throughput x{statistics.median(faster):.2f}, switches x{statistics.median(fewer):.2f}, "
            f"longest wait {max(longest):.1f} s (window {LIMITS.fairness_window_s:.0f} s)"
        )


def make_experts(checkpoint: Path, num: int, into: Path) -> dict[str, Path]:
    """``checkpoint`` and num - 1 others of its shape, whose weights differ."""
    import torch
    from safetensors.torch import load_file, save_file

    found = {"expert-0": checkpoint}
    for i in range(1, num):
        directory = into / f"expert-{i}"
        shutil.copytree(checkpoint, directory)
        source = torch.Generator().manual_seed(i)
        for path in directory.glob("*.safetensors"):
            tensors = load_file(path)
            for name, tensor in tensors.items():
                if tensor.dim() > 1:
                    tensors[name] = tensor[:, torch.randperm(tensor.shape[1], generator=source)].contiguous()
            save_file(tensors, path)
        found[f"expert-{i}"] = directory
    os.sync()
    return found


async def played(
    experts: dict[str, Path], trace: list[Waiting], policy: Policy, with_prefetch: bool, args: argparse.Namespace
) -> dict:
    from antiphon.apps.tiers.model_pool import ModelPool, ModelPoolAsk
    from antiphon.coe.tiers.pool import TieredPool
    from antiphon.coe.tiers.standing import PoolOptions
    from antiphon.core.request import SamplingParams
    from antiphon.testing import wiring

    with tempfile.TemporaryDirectory(dir="/dev/shm") as host:
        specs = {
            name: wiring(path, "monolith", dtype="bfloat16", cache={"numBlocks": 256}, model={"maxModelLen": 1024})
            for name, path in experts.items()
        }
        model_pool = ModelPool(specs, experts, Path(host), forget_pages=True)
        facts = [TierExpert(name=n, memory_bytes=1, host_bytes=1, fetch_s=0.5, load_s=0.5) for n in experts]
        limits = TierLimits(resident_bytes=args.room, host_bytes=args.host_room, fairness_window_s=args.window, max_group=8)
        ask = ModelPoolAsk(token_ids=tuple(range(40, 72)), sampling=SamplingParams(max_tokens=args.tokens, temperature=0.0))
        waits: list[float] = []
        try:
            pool = TieredPool(facts, model_pool, model_pool, limits, options=PoolOptions(prefetch=with_prefetch), policy=policy)
            async with pool:
                began = time.monotonic()

                async def one(request: Waiting) -> None:
                    await asyncio.sleep(max(0.0, began + request.arrival_s - time.monotonic()))  # real time: arrivals
                    pool.expect({request.expert: 1.0})
                    asked = time.monotonic()
                    await pool.submit(request.expert, ask, 250.0)
                    waits.append(time.monotonic() - asked)

                await asyncio.gather(*(one(request) for request in trace))
                took = time.monotonic() - began
                stats = pool.stats()
        finally:
            model_pool.close()
    stages = {stage: [getattr(times, stage) for _, times in stats.loads] for stage in asdict(LoadTimes(**NOTHING))}
    read = [t for t in stages.pop("read_s") if t > 0.01]
    return {
        "throughput": len(trace) / took,
        "switches": stats.num_switches,
        "groups": stats.num_groups,
        "prefetches": stats.num_prefetches,
        "serve_s": stats.serve_s,
        "longest_answer_s": max(waits),
        "median_answer_s": statistics.median(waits),
        "loads_from_disk": len(read),
        "read_s": statistics.median(read) if read else 0.0,
        **{stage: statistics.median(values) for stage, values in stages.items()},
    }


NOTHING = {"evict_s": 0.0, "read_s": 0.0, "convert_s": 0.0, "ready_s": 0.0}


def real(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        experts = make_experts(args.checkpoint, args.experts, Path(scratch))
        faster, fewer = [], []
        for seed in range(args.repeats):
            trace = random_trace(list(experts), args.requests, args.rate, args.skew, 0.3, seed)
            mine = asyncio.run(played(experts, trace, plan, True, args))
            theirs = asyncio.run(played(experts, trace, first_come, False, args))
            for name, found in (("tiers", mine), ("first come", theirs)):
                print(json.dumps({"policy": name, "seed": seed} | {k: round(v, 3) for k, v in found.items()}), flush=True)
            faster.append(mine["throughput"] / theirs["throughput"])
            fewer.append(mine["switches"] / theirs["switches"])
    print(f"medians of {args.repeats}: throughput x{statistics.median(faster):.2f}, switches x{statistics.median(fewer):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(required=True)
    kinds.add_parser("simulated").set_defaults(run=lambda _: simulated())
    with_models = kinds.add_parser("real")
    with_models.set_defaults(run=real)
    with_models.add_argument("checkpoint", type=Path)
    with_models.add_argument("--experts", type=int, default=4)
    with_models.add_argument("--room", type=int, default=2, help="experts that fit in memory, ready")
    with_models.add_argument("--host-room", type=int, default=1, help="copies that fit in host memory")
    with_models.add_argument("--requests", type=int, default=48)
    with_models.add_argument("--rate", type=float, default=8.0, help="requests per second")
    with_models.add_argument("--skew", type=float, default=0.5, help="Zipf exponent of the experts")
    with_models.add_argument("--tokens", type=int, default=8)
    with_models.add_argument("--window", type=float, default=10.0, help="fairness window, seconds")
    with_models.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
