"""What a device is asked for in order: work on it, and when all of it up to now is done (hot).

    stream.do(work)      behind everything asked for before; a card may do it later than the call returns
    stream.mark()        when all that was asked for until now is done

Host memory that work reads must stay as it is until a mark behind it is reached. Must not know: what the work is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from antiphon.device.ready import THERE, CardReady, Ready


class Stream(Protocol):
    """Work in order."""

    def do(self, work: Callable[[], object]) -> None:
        """Ask for work behind all that was asked for before."""
        ...

    def mark(self) -> Ready:
        """When all of it is done."""
        ...


class CurrentStream:
    """A card's current stream, whose operators return before they are done; on a CPU they are done at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def do(self, work: Callable[[], object]) -> None:
        """See ``Stream``."""
        work()

    def mark(self) -> Ready:
        """See ``Stream``."""
        return CardReady(self._device) if self._device.type == "cuda" else THERE
