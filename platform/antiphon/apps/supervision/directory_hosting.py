"""The directory of a deployment of one machine, in the process that starts it: it outlives gateways and workers (control speed).

Must not know: who registers.
"""

from __future__ import annotations

import asyncio
import threading

from antiphon.directory.memory import MemoryDirectory
from antiphon.rpc.directory.service import DirectoryServer

_HOSTING_DEADLINE_S = 10.0


class DirectoryHosting:
    """A deployment's directory: the Redis it names, or a store of this process, served to the others.

    Args:
        redis_url: None = a store of this process.
    """

    def __init__(self, redis_url: str | None) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        if redis_url is not None:
            self.address = redis_url
            return
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="directory-server", daemon=True)
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(DirectoryServer.start(MemoryDirectory()), self._loop)
        self._server = starting.result(_HOSTING_DEADLINE_S)
        self.address = self._server.address

    def close(self) -> None:
        """Stop serving; idempotent."""
        loop, self._loop = self._loop, None
        if loop is not None and self._thread is not None:
            asyncio.run_coroutine_threadsafe(self._server.close(0.0), loop).result(_HOSTING_DEADLINE_S)
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join(_HOSTING_DEADLINE_S)
            loop.close()
