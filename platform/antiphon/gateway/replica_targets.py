"""The replicas of this gateway, as a name of the cluster resolves to them (request speed).

Resolved again every second; while the name can't be resolved, what was known stays. Belongs to one event loop. Must not know: who
asks for them.
"""

from __future__ import annotations

import asyncio
import logging
import socket

from antiphon.core.errors import InvalidInput

_log = logging.getLogger(__name__)
_EVERY_S = 1.0
_DEADLINE_S = 5.0


class ReplicaTargets:
    """Knows the addresses behind ``host:port``.

    Raises:
        InvalidInput: ``targets`` is something else.
    """

    def __init__(self, targets: str) -> None:
        host, _, port = targets.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
            raise InvalidInput(f"{targets!r} is not host:port", "endpoint.pickerTargets")
        self._host, self._port = host.strip("[]"), int(port)
        self._found: tuple[str, ...] = ()

    @property
    def endpoints(self) -> tuple[str, ...]:
        """``ip:port`` of each."""
        return self._found

    async def refresh(self) -> None:
        """Resolve once; a name that resolves to nothing changes nothing."""
        try:
            async with asyncio.timeout(_DEADLINE_S):
                found = await asyncio.get_running_loop().getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except (OSError, TimeoutError) as error:
            if self._found:
                _log.debug("%s can't be resolved, the replicas known stay: %s", self._host, error)
            return
        hosts = sorted({str(address[0]) for *_, address in found})
        self._found = tuple(f"[{host}]:{self._port}" if ":" in host else f"{host}:{self._port}" for host in hosts)

    async def run(self) -> None:
        """Refresh until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(_EVERY_S)
