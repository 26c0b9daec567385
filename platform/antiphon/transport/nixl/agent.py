"""The only door to NIXL: one agent over UCX for one link (hot).

No progress thread: it never sleeps and costs a core. Everything moves when ``notifications`` or ``finished`` is called.
Must not know: links, slots, what notifications say.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import uuid
from types import ModuleType
from typing import Any

import torch

from antiphon.core.errors import PeerLost, Unavailable

_MODULES = ("nixl_cu12._api", "nixl_cu13._api", "nixl._api")


def _load() -> ModuleType:
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")  # its INFO lines go to stdout
    reasons = []
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reasons.append(str(error))
    raise Unavailable(f"NIXL is not installed: {reasons[0]}")


def require_nixl() -> None:
    """Raise Unavailable where NIXL can't be loaded."""
    _load()


class Agent:
    """A NIXL agent with one remote agent and one registered region each way. Belongs to its link's loop."""

    def __init__(self, *, survives_peer_errors: bool) -> None:
        """Create the agent.

        Args:
            survives_peer_errors: UCX's ``peer`` error handling, for links between machines. False is ``none``, without which UCX
                leaves shared memory aside between processes of one machine; a dead peer then never shows in a transfer.

        Raises Unavailable.
        """
        api = _load()
        mode = "peer" if survives_peer_errors else "none"
        try:
            config = api.nixl_agent_config(enable_prog_thread=False, backends=[])
            self._agent: Any = api.nixl_agent(f"antiphon-{uuid.uuid4().hex}", config)
            self._agent.create_backend("UCX", {"ucx_error_handling_mode": mode})
        except Exception as error:
            raise Unavailable(f"NIXL can't be started: {error}") from error
        self._registered: list[Any] = []
        self._lists: list[Any] = []
        self._transfers: list[Any] = []
        self._peer: Any = None
        self._local: Any = None
        self._remote: Any = None

    def register(self, region: torch.Tensor) -> None:
        """Make ``region``, contiguous uint8, known to the hardware; the caller keeps it alive."""
        if region.numel():
            self._registered.append(self._agent.register_memory(region.view(-1)))

    def metadata(self) -> bytes:
        """What the peer's agent needs to reach this one, after all ``register`` calls."""
        return bytes(self._agent.get_agent_metadata())

    def connect(self, metadata: bytes) -> None:
        """Make the peer's agent known. Raises Unavailable."""
        try:
            self._peer = self._agent.add_remote_agent(metadata)
            # The first message opens UCX's connection; do it before anybody waits.
            self._agent.make_connection(self._peer)
        except Exception as error:
            raise Unavailable(f"NIXL can't reach the peer: {error}") from error

    def prepare(self, pieces: list[tuple[int, int, int]], device: int, remote_device: int, kind: str) -> None:
        """Prepare writes of ``pieces``: (local address, remote address, bytes). ``kind`` is DRAM or VRAM."""
        self._local = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", [(a, n, device) for a, _, n in pieces], kind)
        self._remote = self._agent.prep_xfer_dlist(self._peer, [(b, n, remote_device) for _, b, n in pieces], kind)
        self._lists += [self._local, self._remote]

    def transfer(self, piece: int) -> Any:
        """A handle that writes one of the prepared pieces, as often as it is posted."""
        handle = self._agent.make_prepped_xfer("WRITE", self._local, [piece], self._remote, [piece])
        self._transfers.append(handle)
        return handle

    def post(self, handle: Any, notification: bytes, peer: str) -> bool:
        """Start the write; the notification reaches the peer after the bytes. True when done already. Raises PeerLost."""
        try:
            state = self._agent.transfer(handle, notification)
        except Exception as error:
            raise PeerLost(peer, f"NIXL: {error}") from error
        if state == "ERR":
            raise PeerLost(peer, "NIXL could not start a transfer")
        return bool(state == "DONE")

    def finished(self, handle: Any, peer: str) -> bool:
        """True when a posted write is done; drives progress. Raises PeerLost."""
        try:
            state = self._agent.check_xfer_state(handle)
        except Exception as error:
            raise PeerLost(peer, f"NIXL: {error}") from error
        if state == "ERR":
            raise PeerLost(peer, "NIXL could not complete a transfer")
        return bool(state == "DONE")

    def notify(self, notification: bytes, peer: str) -> None:
        """Send a notification of its own. Raises PeerLost."""
        try:
            self._agent.send_notif(self._peer, notification)
        except Exception as error:
            raise PeerLost(peer, f"NIXL: {error}") from error

    def notifications(self) -> list[bytes]:
        """All that came from the peer, in order; drives progress."""
        arrived: dict[str, list[bytes]] = self._agent.get_new_notifs()
        return next(iter(arrived.values())) if arrived else []  # the only remote agent's

    def close(self) -> None:
        """Let everything go. A transfer to a dead peer can't be cancelled; NIXL then keeps it until the process ends."""
        for handle in (*self._transfers, *self._lists):
            with contextlib.suppress(Exception):
                handle.release()
        if self._peer is not None:
            with contextlib.suppress(Exception):
                self._agent.remove_remote_agent(self._peer)
        for region in self._registered:
            with contextlib.suppress(Exception):
                self._agent.deregister_memory(region)
        self._transfers, self._lists, self._registered = [], [], []
        self._local = self._remote = self._agent = None
