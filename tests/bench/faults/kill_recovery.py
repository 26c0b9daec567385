"""Kill -9 of FFN, attention and prefill workers at random moments under streams: is every stream whole, and how long is the pause.

    python tests/bench/faults/kill_recovery.py [--kills 50] [--streams 32] [--seconds 480] [--seed 0]

A deployment of real processes, prefill + 2A2F over a tiny model, streams without end; each that ends is compared with the text of
the undisturbed run. Workers are killed at random moments, but never two of one pool at a time. One JSON line a kill, one for all:
``pause_s`` is the longest silence of any stream that overlaps the time from the kill until the worker was back, ``back_s`` the time
until a new process was ready in its place. Exits with 1 if any stream was cut, changed or refused.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from antiphon.apps.serve.local import DirectDeployment
from antiphon.core.document.spec import LLMDeployment
from antiphon.testing import write_tiny_llama

VICTIMS = (("ffn", 0), ("ffn", 1), ("attention", 0), ("attention", 1), ("prefill", 0))
NUM_TOKENS = 120
START_S, BACK_S = 120.0, 180.0  # a worker that is killed again and again is started ever later
MIN_SILENCE_S = 0.1


def document(checkpoint: Path, num_streams: int) -> LLMDeployment:
    """Prefill + 2A2F, room for all streams on one attention worker."""
    return LLMDeployment.model_validate(
        {
            "apiVersion": "serving.antiphon.dev/v1alpha1",
            "kind": "LLMDeployment",
            "metadata": {"name": "tiny"},
            "spec": {
                "model": {"uri": str(checkpoint)},
                "topology": "pd-afd",
                "pools": [
                    {"name": "prefill", "role": "prefill"},
                    {"name": "attention", "role": "attention", "replicas": 2},
                    {"name": "ffn", "role": "ffn", "replicas": 2},
                ],
                "cache": {"numBlocks": 64 * num_streams},
                "scheduler": {
                    "maxNumSeqs": num_streams,
                    "maxQueuedRequests": 4 * num_streams,
                    "maxNumBatchedTokens": 256,
                    "remotePrefillMinTokens": 16,
                },
                "endpoint": {"httpPort": 0, "grpcPort": 0},
                "directory": {"leaseS": 1.5},
            },
        }
    )


class System:
    """The running deployment, seen through its event log and its doors."""

    def __init__(self, base: Path, num_streams: int) -> None:
        checkpoint = write_tiny_llama(base / "model")
        self._run_dir = base / "run"
        self._run_dir.mkdir()
        self.deployment = DirectDeployment(document(checkpoint, num_streams), checkpoint=str(checkpoint), run_dir=self._run_dir)
        self.deployment.start()
        deadline = time.monotonic() + START_S
        while not self.deployment.poll():
            if time.monotonic() > deadline:
                raise SystemExit("the deployment did not get ready")
            time.sleep(0.05)
        (facts,) = [e["facts"] for e in self._event_log() if e["kind"] == "ready" and e["subject"] == "gateway"]
        self.url = f"http://127.0.0.1:{facts['http_port']}"
        while self._num_ready() < len(VICTIMS):
            if time.monotonic() > deadline:
                raise SystemExit("the gateway did not see all workers")
            time.sleep(0.05)

    def pid(self, pool: str, index: int, kind: str = "started") -> int:
        """Of the newest process of a worker that has ``kind`` in the event log; -1 if none has."""
        found = [e["pid"] for e in self._event_log() if e["kind"] == kind and e["subject"] == f"{pool}/{index}"]
        return int(found[-1]) if found else -1

    def is_ready(self, pool: str, index: int) -> bool:
        """True when the gateway has the worker as ready."""
        return any(_id(w).endswith(f"/{pool}/{index}") and w.get("ready") for w in self._workers())

    def _num_ready(self) -> int:
        return sum(bool(worker.get("ready")) for worker in self._workers())

    def _workers(self) -> list[dict[str, Any]]:
        return list(_workers_in(httpx.get(f"{self.url}/status", timeout=10).json()))

    def _event_log(self) -> list[dict[str, Any]]:
        lines = (self._run_dir / "journal.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]


def _id(worker: dict[str, Any]) -> str:
    return str(worker.get("worker_id", worker.get("workerId", "")))


def _workers_in(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if _id(value):
            yield value
        else:
            for child in value.values():
                yield from _workers_in(child)
    elif isinstance(value, list):
        for child in value:
            yield from _workers_in(child)


class Load:
    """Streams without end; what they brought and when."""

    def __init__(self, system: System, prompts: list[str]) -> None:
        self._client = httpx.AsyncClient(base_url=system.url, timeout=90, limits=httpx.Limits(max_connections=200))
        self._prompts = prompts
        self.expected: list[str] = []
        self.stop = False
        self.num_streams = 0
        self.wrong: list[str] = []
        self._last_s = [0.0] * len(prompts)
        self.silences: list[tuple[float, float]] = []  # (from, to) of those worth keeping

    async def learn(self) -> None:
        """The undisturbed run."""
        self.expected = await asyncio.gather(*(self._stream(i) for i in range(len(self._prompts))))
        self.num_streams = 0

    async def run(self) -> None:
        """All streams, again and again, until told to stop."""
        await asyncio.gather(*(self._again(i) for i in range(len(self._prompts))))
        await self._client.aclose()

    async def _again(self, number: int) -> None:
        while not self.stop:
            try:
                text = await self._stream(number)
            except (httpx.HTTPError, AssertionError) as error:
                self.wrong.append(f"stream {number}: {type(error).__name__}: {error}")
                await asyncio.sleep(0.2)
                continue
            if text != self.expected[number]:
                self.wrong.append(f"stream {number}: another text")

    async def _stream(self, number: int) -> str:
        body = {
            "model": "tiny",
            "prompt": self._prompts[number],
            "max_tokens": NUM_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        text = ""
        self._last_s[number] = time.monotonic()
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, response.status_code
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    text += event["choices"][0]["text"] if event["choices"] else ""
                    now = time.monotonic()
                    if now - self._last_s[number] > MIN_SILENCE_S:
                        self.silences.append((self._last_s[number], now))
                    self._last_s[number] = now
        self.num_streams += 1
        return text


async def measure(system: System, args: argparse.Namespace) -> int:
    """The whole run; the number of streams that were not whole."""
    chance = random.Random(args.seed)
    load = Load(system, [f"stream number {n} " * (1 + n % 5) for n in range(args.streams)])
    await load.learn()
    running = asyncio.create_task(load.run())
    end = time.monotonic() + args.seconds
    lines: list[dict[str, Any]] = []
    down: dict[tuple[str, int], asyncio.Task[None]] = {}

    async def await_back(worker: tuple[str, int], pid: int) -> None:
        start = time.monotonic()
        while system.pid(*worker, "ready") in (pid, -1) or not await asyncio.to_thread(system.is_ready, *worker):
            if time.monotonic() > start + BACK_S:
                raise SystemExit(f"{worker[0]}/{worker[1]} did not come back within {BACK_S:g} s")
            await asyncio.sleep(0.1)
        end = time.monotonic()
        await asyncio.sleep(1.0)  # until a silence that began before it has ended
        pause = max((to - since for since, to in load.silences if to > start and since < end), default=0.0)
        line = {"bench": "kill", "worker": f"{worker[0]}/{worker[1]}", "back_s": round(end - start, 3), "pause_s": round(pause, 3)}
        lines.append(line)
        print(json.dumps(line), flush=True)
        del down[worker]

    num_kills = 0
    while num_kills < args.kills and time.monotonic() < end:
        await asyncio.sleep(chance.uniform(0.2, 2.0))
        pools_down = {pool for pool, _ in down}
        able = [worker for worker in VICTIMS if worker[0] not in pools_down]
        if able:
            worker = chance.choice(able)
            pid = system.pid(*worker)
            os.kill(pid, signal.SIGKILL)
            num_kills += 1
            down[worker] = asyncio.create_task(await_back(worker, pid))
    await asyncio.gather(*down.values())
    load.stop = True
    await running
    for why in load.wrong[:10]:
        print(why, file=sys.stderr)
    for pool in [*sorted({line["worker"].split("/")[0] for line in lines}), ""]:
        of_pool = [line for line in lines if line["worker"].startswith(pool)]
        print(
            json.dumps(
                {
                    "bench": "kill_recovery",
                    "pool": pool or "all",
                    "num_kills": len(of_pool),
                    "pause_median_s": statistics.median(line["pause_s"] for line in of_pool),
                    "pause_max_s": max(line["pause_s"] for line in of_pool),
                    "back_median_s": statistics.median(line["back_s"] for line in of_pool),
                    "back_max_s": max(line["back_s"] for line in of_pool),
                    **({} if pool else {"num_streams": load.num_streams, "num_wrong": len(load.wrong)}),
                }
            )
        )
    return len(load.wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=480.0, help="no further kill after this long")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="antiphon-kill-") as base:
        system = System(Path(base), args.streams)
        try:
            num_wrong = asyncio.run(measure(system, args))
        finally:
            system.deployment.close()
    raise SystemExit(1 if num_wrong else 0)


if __name__ == "__main__":
    main()
