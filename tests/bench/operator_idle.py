"""What many idle LLMDeployments cost: API calls at rest, writes at rest, the operator's memory and processor time.

    python tests/bench/operator_idle.py [--deployments 1000] [--watch-s 30]

The API server is the in-memory one behind HTTP in this process; ``antiphon-operator run`` is a process of its own, so
that its memory is its own. Every deployment is brought to Ready beforehand. The first look at all of them, at the operator's
start, is what each resync costs too. One JSON line a figure, then a table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil

from antiphon_operator.kube.resources import LLM_DEPLOYMENT
from antiphon_operator.reconcile.llm.reconciler import REST_S, LLMReconciler
from antiphon_operator.render.settings import Runtime, Settings
from antiphon_operator.testing.http_api import HttpApi
from antiphon_operator.testing.kuberay import KubeRay
from antiphon_operator.testing.memory_api import MemoryApi
from antiphon_operator.testing.memory_kube import MemoryKube

IMAGE, RAY_VERSION = "antiphon/worker:0.1.0", "2.60.0"
DEADLINE_S = 1500.0
MEMORY_LIMIT_MB = 300.0


async def settled(name: str, namespace: str) -> MemoryApi:
    """One deployment brought to rest in an API of its own."""
    api = MemoryApi(clock=time.time, uids=name)
    kuberay = KubeRay(api=api)
    pools = [{"name": "attention", "role": "attention"}, {"name": "ffn", "role": "ffn"}]
    spec = {"model": {"uri": "/m"}, "topology": "afd", "pools": pools}
    api.create(LLM_DEPLOYMENT, {"metadata": {"name": name, "namespace": namespace}, "spec": spec}, manager="kubectl")
    settings = Settings(runtime=Runtime(image=IMAGE, ray_version=RAY_VERSION))
    reconciler = LLMReconciler(MemoryKube(api), settings, clock=time.time)
    for _ in range(40):
        if await reconciler.reconcile(namespace, name) == REST_S:
            return api
        kuberay.tick()
    raise RuntimeError(f"{name} did not come to rest")


def operator_process(kubeconfig: Path, port: int) -> subprocess.Popen[bytes]:
    command = [
        *(sys.executable, "-m", "antiphon_operator", "run", "--kubeconfig", str(kubeconfig), "--port", str(port)),
        *("--no-leader-election", "--image", IMAGE, "--ray-version", RAY_VERSION, "--log-level", "WARNING"),
    ]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


async def passes(client: httpx.AsyncClient, port: int) -> float:
    """Finished reconciles of LLMDeployments, as the operator itself counts them; failures end the bench."""
    try:
        text = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
    except httpx.TransportError:
        return 0.0
    counts = [line.split() for line in text.splitlines() if line.startswith("antiphon_operator_reconciles_total")]
    failed = [name for name, count in counts if 'result="ok"' not in name and float(count) > 0]
    if failed:
        raise RuntimeError(f"reconciles failed: {failed}")
    return sum(float(count) for _, count in counts)


def memory_mb(process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Resident memory now and at its highest."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    highest = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return psutil.Process(process.pid).memory_info().rss / 1e6, highest * 1024 / 1e6


async def measure(num_deployments: int, watch_s: float) -> dict[str, float]:
    api = MemoryApi(clock=time.time)
    began = time.monotonic()
    for index in range(num_deployments):
        namespace = f"team-{index // 50}"
        api.take_over(await settled(f"model-{index}", namespace))
    prepared_s = time.monotonic() - began
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    async with HttpApi(api) as server, httpx.AsyncClient(timeout=30) as client:
        with tempfile.TemporaryDirectory() as directory:
            kubeconfig = Path(directory) / "kubeconfig"
            kubeconfig.write_text(server.kubeconfig())
            process = operator_process(kubeconfig, port)
            try:
                start_cpu_s = 0.0
                began = time.monotonic()
                while (done := await passes(client, port)) < num_deployments:
                    if not done:
                        start_cpu_s = sum(psutil.Process(process.pid).cpu_times()[:2])  # imports
                    if process.poll() is not None or time.monotonic() - began > DEADLINE_S:
                        raise RuntimeError("the operator ended, or did not see every deployment in time")
                    await asyncio.sleep(0.5)
                first_s = time.monotonic() - began
                cpu_s = sum(psutil.Process(process.pid).cpu_times()[:2]) - start_cpu_s
                first = Counter(f"{call.verb} {call.resource}" for call in api.calls)
                first_writes = sum(call.writes for call in api.calls)
                api.calls.clear()
                await asyncio.sleep(watch_s)  # real time: calls at rest are counted over it
                now_mb, highest_mb = memory_mb(process)
                at_rest = list(api.calls)
            finally:
                process.terminate()
                process.wait(30)
        if process.returncode:
            raise RuntimeError(f"the operator ended with {process.returncode}")
    per_pass = sum(first.values()) / num_deployments
    return {
        "deployments": num_deployments,
        "prepared_s": round(prepared_s, 1),
        "first_pass_of_all_s": round(first_s, 1),
        "calls_per_deployment": round(per_pass, 2),
        "operator_cpu_ms_per_deployment": round(1000 * cpu_s / num_deployments, 1),
        "writes_of_first_pass": first_writes,
        "watched_s": watch_s,
        "calls_while_watched": len(at_rest),
        "writes_while_watched": sum(call.writes for call in at_rest),
        "resync_s": REST_S,
        "calls_per_s_at_rest": round(per_pass * num_deployments / REST_S, 2),
        "memory_mb": round(now_mb, 1),
        "highest_memory_mb": round(highest_mb, 1),
        "memory_limit_mb": MEMORY_LIMIT_MB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deployments", type=int, default=1000)
    parser.add_argument("--watch-s", type=float, default=30.0, help="how long the operator is watched at rest")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)  # of this process, which plays the API server
    figures = asyncio.run(measure(arguments.deployments, arguments.watch_s))
    for name, value in figures.items():
        print(json.dumps({"bench": "operator_idle", "figure": name, "value": value}))
    print("\n".join(f"{name:<24}{value:>10}" for name, value in figures.items()))
    if figures["highest_memory_mb"] > MEMORY_LIMIT_MB or figures["writes_while_watched"] or figures["writes_of_first_pass"]:
        sys.exit("above its limit, or it wrote at rest")


if __name__ == "__main__":
    main()
