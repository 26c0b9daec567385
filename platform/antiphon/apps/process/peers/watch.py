"""Asks peers that owe something whether they still live, and gives up those who don't say so (control speed).

    owes for OWED_S ──► asked at its rpc address ──answers──► asked again a second later, as long as it owes
                            └──silent ``_TRIES`` times──► lost: the side's loop drops its link, and the peer is tried again
                                                          once it answers

A stopped process keeps its sockets, and its machine acknowledges what is sent to it: only its silence tells. Nothing is asked while
nobody owes, and nothing is added to a message. Must not know: what is owed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from antiphon.core.ids import Epoch, WorkerId
from antiphon.rpc import health

logger = logging.getLogger(__name__)

OWED_S = 0.5  # longer than any layer's exchange that goes well
ASK_S = 1.0  # for one answer
_TRIES = 2  # one may be lost by whoever asks: when it was itself stopped
_LOOK_EVERY_S = 0.25
_AGAIN_S = 1.0
_MAX_AT_ONCE = 8
LOST_AFTER_S = OWED_S + _LOOK_EVERY_S + _TRIES * ASK_S  # at most, from the last thing a peer did

PeerKey = tuple[WorkerId, Epoch]


@dataclass(frozen=True, slots=True, kw_only=True)
class Creditor:
    """Whoever waits for peers; both are called from the watch's threads."""

    owing: Callable[[], Mapping[PeerKey, float]]  # peers that owe something, and for how many seconds
    lose: Callable[[PeerKey, str], None]  # takes a peer for lost, and why


class PeerWatch:
    """Watches over the peers of some creditors until closed. ``met`` and ``is_silent`` are safe from any thread.

    Args:
        creditors: who waits for peers.
        answers: whether somebody at an address answers within so many seconds.
    """

    def __init__(self, creditors: list[Creditor], *, answers: Callable[[str, float], bool] = health.answers) -> None:
        self._creditors = creditors
        self._answers = answers
        self._addresses: dict[WorkerId, str] = {}
        self._silent: set[PeerKey] = set()
        self._asked: dict[PeerKey, Future[None]] = {}
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._pool = ThreadPoolExecutor(_MAX_AT_ONCE, thread_name_prefix="ask")  # threads start when first needed
        self._thread = threading.Thread(target=self._run, name="peer-watch", daemon=True)
        if creditors:
            self._thread.start()

    def met(self, key: PeerKey, address: str) -> None:
        """A link to the peer is open; ``address`` is that of its rpc server."""
        self._addresses[key[0]] = address
        self._silent.discard(key)

    def is_silent(self, key: PeerKey, address: str) -> bool:
        """Whether the peer was given up and still does not answer; asks it."""
        if key in self._silent and not self._answers(address, ASK_S):
            return True
        self._silent.discard(key)
        return False

    def check(self) -> None:
        """Raise what ended the watch, if anything did."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop asking; idempotent."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(ASK_S)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        try:
            while not self._stop.wait(_LOOK_EVERY_S):
                for creditor in self._creditors:
                    for key, owed_s in creditor.owing().items():
                        address = self._addresses.get(key[0])
                        if owed_s >= OWED_S and key not in self._asked and address is not None:
                            self._asked[key] = self._pool.submit(self._ask, creditor, key, address)
                for key, asked in list(self._asked.items()):
                    if asked.done():
                        del self._asked[key]
                        asked.result()
        except BaseException as error:  # noqa: BLE001  # stored; the owner's check() raises it
            self._error = error

    def _ask(self, creditor: Creditor, key: PeerKey, address: str) -> None:
        for _ in range(_TRIES):
            started_s = time.monotonic()
            if self._answers(address, ASK_S):
                self._stop.wait(_AGAIN_S)
                return
            self._stop.wait(max(0.0, ASK_S - (time.monotonic() - started_s)))  # refused at once: it may be starting again
            if key not in creditor.owing():
                return
        self._silent.add(key)
        why = f"it owes an answer and is silent (stopped, or cut off), {_TRIES * ASK_S:g} s after it was asked"
        logger.warning("%s: %s", key[0], why)
        creditor.lose(key, why)
