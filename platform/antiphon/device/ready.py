"""When bytes are there: what a message waits for before anyone is told of it (hot).

Whoever writes with a CPU has written when the call returns. A card writes later than the call that asked for it, and a message
published in between would carry whatever lay there before: ``written`` gives what to wait for. Must not know: links, messages.
"""

from __future__ import annotations

from typing import Protocol

import torch

DEADLINE_S = 30.0  # a card that has not written by then is not going to


class Ready(Protocol):
    """Bytes that are there, or will be."""

    def wait(self, timeout_s: float) -> bool:
        """Wait until they are there; False when they are not after ``timeout_s`` seconds."""
        ...


class Settled(Ready, Protocol):
    """Bytes that can be asked after, too."""

    def done(self) -> bool:
        """Whether they are there; never waits."""
        ...


class _There:
    __slots__ = ()

    def done(self) -> bool:
        """They are."""
        return True

    def wait(self, timeout_s: float) -> bool:
        """They are."""
        return True


THERE: Settled = _There()


class CardReady:
    """What a card's current stream was asked for up to now."""

    __slots__ = ("_event",)

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(blocking=False)  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(device))

    def done(self) -> bool:
        """See ``Settled``."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self, timeout_s: float) -> bool:
        """See ``Ready``; the driver has its own deadline for a card that hangs."""
        self._event.synchronize()
        return True


def written(source: torch.Tensor, target: torch.Tensor) -> Ready:
    """When what was copied from ``source`` into ``target`` is there for a reader on the host or behind it."""
    if source.device.type != "cuda" or target.device == source.device:
        return THERE  # a card's own stream orders what follows in it
    return CardReady(source.device)
