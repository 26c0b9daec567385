"""Doors on a thread and event loop of their own, until closed (control speed). Must not know: what serves behind them."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import Awaitable, Callable

from antiphon.core.errors import DeadlineExceeded
from antiphon.gateway.config import BoundPorts

OnBound = Callable[[BoundPorts], None]
ServeDoors = Callable[[asyncio.Event, OnBound], Awaitable[None]]  # until the event is set; told the ports once the doors are open

_SWITCH_INTERVAL_S = 0.5e-3
_YOUNG_OBJECTS = 10_000  # that are made before they are looked through: with Python's 700, every few requests


def settle_memory() -> None:
    """Once a process is about to serve: what imports, tokenizers and routes made stays, and no collection looks at it again. Each
    that did stopped every stream for as long as it took, 0.1 s and more.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 10, 10)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)  # gRPC's threads hand over what came while the loop is busy


class DoorThread:
    """Runs ``serve``. ``close`` is idempotent.

    Args:
        name: of the thread, and of what serves in messages.
        serve: what runs.
        stop_timeout_s: how long ``close`` waits for it to end.
    """

    def __init__(self, name: str, serve: ServeDoors, *, stop_timeout_s: float) -> None:
        self._name = name
        self._serve = serve
        self._stop_timeout_s = stop_timeout_s
        self._bound: BoundPorts | None = None
        self._error: BaseException | None = None
        self._opened = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wait_open(self, timeout_s: float) -> BoundPorts:
        """Where it listens, once it does.

        Raises:
            AntiphonError: what kept the doors closed, e.g. Unavailable where a port is taken.
            DeadlineExceeded: they are not open after ``timeout_s`` seconds.
        """
        if not self._opened.wait(timeout_s):
            raise DeadlineExceeded(f"the {self._name} has not opened its doors after {timeout_s:g} s")
        self.check()
        assert self._bound is not None  # opened without an error
        return self._bound

    @property
    def is_open(self) -> bool:
        """It has opened its doors, or failed to."""
        return self._opened.is_set()

    def check(self) -> None:
        """Raise what ended the doors, if anything did."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Let what is under way end in its own time, then close the doors."""
        try:
            self._loop.call_soon_threadsafe(self._stop.set)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            # They ended by themselves: what ended them is what wait_open() and check() tell, not that there is nothing to stop.
        self._thread.join(self._stop_timeout_s)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
        except BaseException as error:  # noqa: BLE001 - stored; wait_open() and check() raise it
            self._error = error
        finally:
            self._opened.set()
            self._loop.close()

    async def _main(self) -> None:
        await self._serve(self._stop, self._set_bound)

    def _set_bound(self, bound: BoundPorts) -> None:
        settle_memory()
        self._bound = bound
        self._opened.set()
