"""The embedded directory of a deployment without Redis: one small named Ray actor with a port of its own (control speed).

It outlives gateways and pool replicas. When it dies Ray starts it again on the same port, empty; workers and supervisors fill
it with their next renewal, and its epochs go on above all that were handed out before. Must not know: who registers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from antiphon.apps.serve.plan import ServeSettings
from antiphon.core.directory import Directory
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import Unavailable
from antiphon.core.identity import adopt, is_given, new_key, own_identity
from antiphon.directory.memory import MemoryDirectory
from antiphon.rpc.directory.service import DirectoryServer

NAMESPACE = "antiphon"

# Between Ray's range for its workers and the system's range for outgoing connections, where nobody takes a port by chance.
_PORTS = range(20_000, 30_000)
_BIND_DEADLINE_S = 20.0
_NUM_PORTS_TRIED = 5

logger = logging.getLogger(__name__)


class DirectoryHost:
    """The actor's class.

    Args:
        deployment: whose parts may use it.
        host: bound; None = the address of the node.
        port: bound, at the first start and at every later one.
        lease_s: of the workers; a restarted directory waits so long for their renewals before it lists them.
    """

    def __init__(self, deployment: str, host: str | None, port: int, lease_s: float) -> None:
        ensure_key(deployment)
        self._host = host if host is not None else node_address()
        self._port = port
        self._lease_s = lease_s
        self._server: DirectoryServer | None = None
        self._starting = asyncio.Lock()
        # Ray starts a dead one again, but nobody asks the new one for its address: everybody has it.
        self._listening = asyncio.get_running_loop().create_task(self._listen_again()) if _is_restarted() else None

    async def address(self) -> str:
        """Where it listens, as ``open_directory`` takes it.

        Raises:
            Unavailable: the port is taken.
        """
        async with self._starting:
            if self._server is None:
                self._server = await self._listen()
        return self._server.address

    async def _listen_again(self) -> None:
        try:
            await self.address()
        except Unavailable as error:
            logger.warning("the directory's port is not free any more: %s", error)
            os._exit(1)  # Ray starts it once more

    async def _listen(self) -> DirectoryServer:
        again = _is_restarted()
        store: Directory = MemoryDirectory()
        if again:
            store = MemoryDirectory(epoch_base=int(time.time()), settle_s=self._lease_s)
        deadline = time.monotonic() + (_BIND_DEADLINE_S if again else 0.0)
        while True:
            try:
                return await DirectoryServer.start(store, host=self._host, port=self._port)
            except Unavailable:
                if time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(0.1)


def _is_restarted() -> bool:
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def ensure_key(deployment: str) -> None:
    """Give this process the deployment's key: that of its environment, or the one its Ray cluster keeps, made by whoever is first.

    Who may talk to that Ray may read it: on a cluster without Ray's token, set ``ANTIPHON_KEY_FILE`` to a mounted Secret instead.
    """
    if is_given():
        own_identity()
        return
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

    name = f"antiphon/key/{deployment}".encode()
    _internal_kv_put(name, new_key().encode(), overwrite=False)
    adopt(_internal_kv_get(name).decode())


def node_address() -> str:
    """The address of this node, as other nodes of its Ray cluster reach it."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def ensure_directory(deployment: str, *, lease_s: float, host: str | None = None, timeout_s: float = 60.0) -> str:
    """The address of the deployment's directory actor, which is started if there is none. Blocks.

    Raises:
        Unavailable: it does not answer within ``timeout_s`` seconds.
    """
    deadline = time.monotonic() + timeout_s
    for _ in range(_NUM_PORTS_TRIED):
        actor: Any = (
            ray.remote(DirectoryHost)
            .options(
                name=f"directory-{deployment}",
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                max_restarts=-1,
                num_cpus=0,
                resources={"node:__internal_head__": 0.001},  # its address stays when worker nodes come and go
            )
            .remote(deployment, host, random.choice(_PORTS), lease_s)
        )
        try:
            return str(ray.get(actor.address.remote(), timeout=max(0.1, deadline - time.monotonic())))
        except Unavailable:  # the port was taken
            ray.kill(actor)
        except RayActorError:  # another caller replaced it
            continue
        except RayError as error:
            raise Unavailable(f"the directory of {deployment} does not answer: {error}") from error
    raise Unavailable(f"the directory of {deployment} found no free port in {_PORTS.start}-{_PORTS.stop - 1}")


def directory_address(document: LLMDeployment, settings: ServeSettings) -> str:
    """Where the deployment's workers register: given, or Redis, or the actor (started if there is none). Raises Unavailable.

    This process has the deployment's key afterwards.
    """
    ensure_key(document.metadata.name)
    if settings.directory is not None:
        return settings.directory
    spec = document.spec.directory
    if spec.redis_url is not None:
        return spec.redis_url
    return ensure_directory(document.metadata.name, lease_s=spec.lease_s, host=settings.host)
