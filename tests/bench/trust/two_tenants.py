"""Two tenants of one deployment, one floods at ten times the other's rate: what the other waits for its first token, in one run.

    python tests/bench/trust/two_tenants.py [--rate 3] [--flood 10] [--phase-s 12] [--phases 4] [--tokens 32] [--max-num-seqs 4]
        [--model DIR] [--topology monolith]

A served deployment of its own processes (a tiny model or ``--model``, two API keys), asked over HTTP from here, by as little code
as it takes: a client that parses each event would have the processor that the deployment needs. Phases take turns: the calm tenant
alone, then beside the flood, with the same arrivals (Poisson). What is refused is not sent again; the calm tenant's refusals are
counted. One JSON line: p50 and p99 of its time to first token in milliseconds, and ``p99_ratio`` of beside to alone. The flood's
own p50 shows that there was a queue to stand in.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROLES = {"monolith": ["monolith"], "afd": ["attention", "ffn"], "pd-afd": ["prefill", "attention", "ffn"]}
START_S, ANSWER_S = 300.0, 120.0
KEYS = {"calm": "calm-key-of-random-text", "flood": "flood-key-of-random-text"}


@dataclass(slots=True)
class Seen:
    """What a tenant saw in one kind of phase."""

    first_s: list[float] = field(default_factory=list)
    num_refused: int = 0


def document(base: Path, args: argparse.Namespace) -> Path:
    """One deployment that takes the two keys."""
    from antiphon.gateway.access.key_lines import key_line
    from antiphon.testing import write_tiny_llama

    model = Path(args.model) if args.model else write_tiny_llama(base / "model")
    (base / "keys").write_text("\n".join(str(key_line(tenant, "user", key)) for tenant, key in KEYS.items()))
    (base / "keys").chmod(0o600)
    spec: dict[str, Any] = {
        "model": {"uri": str(model)},
        "topology": args.topology,
        "pools": [{"name": role, "role": role} for role in ROLES[args.topology]],
        "scheduler": {"maxNumSeqs": args.max_num_seqs, "maxQueuedRequests": 64},
        "endpoint": {"httpPort": 0, "grpcPort": 0, "apiKeysFile": str(base / "keys")},
    }
    path = base / "document.yaml"
    head = {"apiVersion": "serving.antiphon.dev/v1alpha1", "kind": "LLMDeployment", "metadata": {"name": "tiny"}}
    path.write_text(json.dumps({**head, "spec": spec}))
    return path


def serve_main(path: str, run_dir: str) -> None:
    """The deployment's process: says where its HTTP door is, and serves until it is ended."""
    from antiphon.apps.serve.deployment_set import serving_of
    from antiphon.apps.serve.local import DirectDeployment, running, wait_ready
    from antiphon.core.document.loading import parse_object

    value = json.loads(Path(path).read_text())
    made = serving_of([parse_object(value, "bench")], "bench")
    made = replace(made, checkpoints={"tiny": value["spec"]["model"]["uri"]})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with DirectDeployment(made, run_dir=Path(run_dir)) as deployment:
        deployment.start()
        wait_ready(deployment, START_S)
        ports = running(Path(run_dir)).ports
        assert ports is not None
        print(ports.http_port, flush=True)
        while True:
            deployment.poll()
            time.sleep(0.5)


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """When requests come, from the phase's beginning."""
    chance, at_s, found = random.Random(seed), 0.0, []
    while (at_s := at_s + chance.expovariate(rate)) < seconds:
        found.append(at_s)
    return found


class Asked(asyncio.Protocol):
    """One request on a connection of its own, to its end."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._kept = b""  # up to the first token, then the last bytes
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.first_at_s: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send it."""
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Note the first token's time."""
        self._kept += data
        if self.first_at_s is None and b"data: {" in self._kept:
            self.first_at_s = time.monotonic()
        if self.first_at_s is not None:
            self._kept = self._kept[-512:]

    def connection_lost(self, exc: Exception | None) -> None:
        """The answer is over."""
        self.ended.set_result(None)

    @property
    def is_refused(self) -> bool:
        """Too many requests."""
        return self._kept.startswith(b"HTTP/1.1 429")

    @property
    def is_whole(self) -> bool:
        """It was answered to its end."""
        return b"data: [DONE]" in self._kept

    def __str__(self) -> str:
        return self._kept.decode(errors="replace")


async def ask(port: int, tenant: str, number: str, num_tokens: int, at_s: float, seen: Seen) -> None:
    """One request at its time."""
    await asyncio.sleep(max(0.0, at_s - time.monotonic()))  # arrivals are in real time
    body = {
        "model": "tiny",
        "prompt": f"{tenant} asks {number}: " * 6,
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": True,
    }
    text = json.dumps(body).encode()
    lines = (
        "POST /v1/completions HTTP/1.1",
        "host: tenants",
        "connection: close",
        f"authorization: Bearer {KEYS[tenant]}",
        "content-type: application/json",
        f"content-length: {len(text)}",
    )
    request = "\r\n".join(lines).encode() + b"\r\n\r\n" + text
    async with asyncio.timeout(ANSWER_S):
        _, asked = await asyncio.get_running_loop().create_connection(lambda: Asked(request), "127.0.0.1", port)
        await asked.ended
    if asked.is_refused:
        seen.num_refused += 1
        return
    if asked.first_at_s is None or not asked.is_whole:
        raise SystemExit(f"{tenant}: {asked}")
    seen.first_s.append(asked.first_at_s - at_s)  # from when it should have been sent: a client that is late itself waits, too


async def phase(port: int, args: argparse.Namespace, number: int, calm: Seen, flood: Seen | None) -> None:
    """One phase, to its last answer."""
    began_s = time.monotonic() + 0.2
    asking = [("calm", at, calm) for at in arrivals(args.rate, args.phase_s, number)]
    if flood is not None:
        asking += [("flood", at, flood) for at in arrivals(args.flood * args.rate, args.phase_s, 1000 + number)]
    kind = "beside" if flood is not None else "alone"  # no prompt comes twice: no prefix cache helps either
    async with asyncio.TaskGroup() as group:
        for index, (tenant, at, seen) in enumerate(asking):
            group.create_task(ask(port, tenant, f"{kind}.{number}.{index}", args.tokens, began_s + at, seen))


def p99(values: Sequence[float]) -> float:
    """Of all values."""
    return sorted(values)[int(0.99 * (len(values) - 1))]


async def measure(port: int, args: argparse.Namespace) -> dict[str, Any]:
    """All phases; the line."""
    alone, beside, flood = Seen(), Seen(), Seen()
    gc.disable()  # a collection here would be a silence there
    await phase(port, args, 999, Seen(), None)  # warm
    for number in range(args.phases):
        await phase(port, args, number, alone, None)
        await phase(port, args, number, beside, flood)
    line: dict[str, Any] = {
        "bench": "two-tenants",
        "topology": args.topology,
        "rate": args.rate,
        "flood": args.flood * args.rate,
        "num_calm": len(beside.first_s),
    }
    for name, seen in (("alone", alone), ("beside", beside)):
        line[f"{name}_p50_ms"] = round(statistics.median(seen.first_s) * 1e3, 1)
        line[f"{name}_p99_ms"] = round(p99(seen.first_s) * 1e3, 1)
    line["p50_ratio"] = round(line["beside_p50_ms"] / line["alone_p50_ms"], 2)
    line["p99_ratio"] = round(line["beside_p99_ms"] / line["alone_p99_ms"], 2)
    line |= {"num_calm_refused": alone.num_refused + beside.num_refused, "num_flood_refused": flood.num_refused}
    line |= {"num_flood": len(flood.first_s), "flood_p50_ms": round(statistics.median(flood.first_s) * 1e3, 1)}
    return line | {"cores": len(os.sched_getaffinity(0)), "load_1m": round(os.getloadavg()[0], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=3.0, help="the calm tenant's requests a second")
    parser.add_argument("--flood", type=float, default=10.0, help="the other's rate, in times of it")
    parser.add_argument("--phase-s", type=float, default=12.0)
    parser.add_argument("--phases", type=int, default=4, help="of each kind")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--max-num-seqs", type=int, default=4)
    parser.add_argument("--model", default="", help="a checkpoint's folder; a tiny one is made without it")
    parser.add_argument("--topology", choices=ROLES, default="monolith", help="pools of one worker each")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_main(*args.serve)
    with tempfile.TemporaryDirectory(prefix="antiphon-tenants-") as base:
        path, run_dir = document(Path(base), args), Path(base) / "run"
        run_dir.mkdir()
        with open(Path(base) / "serve.log", "wb") as log:
            command = [sys.executable, __file__, "--serve", str(path), str(run_dir)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
            try:
                assert process.stdout is not None
                port = process.stdout.readline().strip()
                if not port:
                    raise SystemExit(Path(log.name).read_text()[-2000:])
                print(json.dumps(asyncio.run(measure(int(port), args))), flush=True)
            finally:
                process.terminate()
                process.wait(30)


if __name__ == "__main__":
    main()
