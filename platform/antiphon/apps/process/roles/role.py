"""What a worker's process asks of its role, whichever it is (control speed around a hot loop).

    AttentionRole   an engine: monolith, prefill, decode and attention workers
    FFNRole         weights alone: answers whoever links to it

Must not know: leases, signals, rebalancing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from antiphon.apps.process.peers.keeper import PeerKeeper, PeerWish
from antiphon.apps.process.wiring.build import AttentionPart
from antiphon.core.worker_info import WorkerLoad
from antiphon.rpc.engine.server import EngineServicer
from antiphon.transport.base import Listener
from antiphon.worker.ffn_worker import FFNWorker
from antiphon.worker.model_runner import AttentionWorker


class WorkerRole(Protocol):
    """What a process asks of its role, whichever it is."""

    part: AttentionPart | None
    ffn: FFNWorker | None

    @property
    def worker(self) -> AttentionWorker | FFNWorker:
        """What computes."""
        ...

    @property
    def resident_weight_bytes(self) -> int:
        """Weights that it holds."""
        ...

    @property
    def stalled(self) -> str:
        """What a loop that waits for others waits for, once that takes longer than any computing; else empty."""
        ...

    @property
    def lacks_peers(self) -> bool:
        """Peers without whom nothing can be computed have been missing for so long that no more work should come."""
        ...

    def listen(self) -> Listener | None:
        """Where peers reach it; None = it goes to them."""
        ...

    def wishes(self) -> list[PeerWish]:
        """The peers it looks for."""
        ...

    def await_peers(self, peers: PeerKeeper, say: Callable[[str], None], is_stopped: Callable[[], bool]) -> None:
        """Wait for peers without whom nothing can be computed. Raises Unavailable where they don't come."""
        ...

    def attach(self, servicer: EngineServicer | None) -> None:
        """Outputs go to ``servicer``; None = nobody asks this worker for answers."""
        ...

    def run(self, is_stopped: Callable[[], bool]) -> None:
        """The loop, until stopped."""
        ...

    def stop(self) -> None:
        """Wake the loop, so that it sees that it is stopped."""
        ...

    def load(self) -> WorkerLoad:
        """Load now."""
        ...

    def close(self) -> None:
        """Close links; idempotent."""
        ...
