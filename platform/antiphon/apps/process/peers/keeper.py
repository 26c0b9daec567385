"""Finds the peers of a worker in the directory and opens links to them, on a thread of its own (control speed).

    directory ──every interval──► peers of the wanted role, same revision, not linked ──connect──► add_link(worker, link)

A link that is lost leaves the side's ``linked`` set, so the peer is tried again; a restarted peer has a higher epoch and is a new
one. A peer that is linked and owes something is watched over (``watch``). Must not know: what links carry.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from antiphon.apps.process.peers.watch import Creditor, PeerWatch
from antiphon.core.errors import AntiphonError, LayoutMismatch, kept
from antiphon.core.ids import Epoch, Role, WorkerId
from antiphon.core.worker_info import WorkerInfo
from antiphon.directory.lease import BlockingDirectory
from antiphon.transport.base import Hello, Link

logger = logging.getLogger(__name__)

INTERVAL_S = 0.25
CALM_TURNS: Final = 4  # between two looks into the directory while every wish has its peers and none of them went
CONNECT_TIMEOUT_S = 5.0
_RETRY_AFTER_REFUSAL_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerWish:
    """Which peers are wanted and what to do with a link to one."""

    role: Role
    hello: Callable[[WorkerInfo], Hello]  # ours, for this peer
    linked: Callable[[], set[tuple[WorkerId, Epoch]]]
    add_link: Callable[[WorkerInfo, Link], None]
    creditor: Creditor  # who waits for these peers


Connect = Callable[[str, Hello, float], Link]


class PeerKeeper:
    """Keeps links to every peer that is wanted until closed. Its owner calls ``check``, which raises what stopped it."""

    def __init__(
        self, directory: BlockingDirectory, deployment: str, revision: str, wishes: list[PeerWish], connect: Connect
    ) -> None:
        self._directory = directory
        self._deployment = deployment
        self._revision = revision
        self._wishes = wishes
        self._connect = connect
        self._stop = threading.Event()
        self._refused: dict[tuple[WorkerId, Epoch], int] = {}  # turns to leave a peer alone that refused us
        self._error: BaseException | None = None
        self._linked: list[set[tuple[WorkerId, Epoch]]] = []  # as the last look left it; empty = somebody is wanted still
        self._num_calm = 0  # turns since
        self.last_refusal: AntiphonError | None = None
        self._watch = PeerWatch([wish.creditor for wish in wishes])
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what ended the keeper, if anything did."""
        if self._error is not None:
            raise self._error
        self._watch.check()

    def close(self) -> None:
        """Stop looking; links stay. Idempotent."""
        self._stop.set()
        self._watch.close()
        self._thread.join(CONNECT_TIMEOUT_S + 1.0)

    def _run(self) -> None:
        try:
            while not self._stop.wait(INTERVAL_S):
                try:
                    self._turn()
                except AntiphonError as error:
                    logger.info("peers can't be looked up, still trying: %s", error)
        except BaseException as error:  # noqa: BLE001  # stored; the owner's check() raises it
            self._error = error

    def _turn(self) -> None:
        if not self._wishes or self._is_calm():
            return
        self._linked, self._num_calm = [], 0
        records = self._directory.workers(self._deployment)
        found, num_missing = [], 0
        for wish in self._wishes:
            linked = wish.linked()
            found.append(linked)
            for record in records:
                info = record.info
                wanted = info.role is wish.role and info.ready and info.revision == self._revision
                if wanted and (info.worker_id, info.epoch) not in linked:
                    num_missing += 1
                    self._link(wish, info)
        if not num_missing and all(found):
            self._linked = found

    def _is_calm(self) -> bool:
        """Whether a look can wait: an idle worker is to sleep."""
        self._num_calm += 1
        return self._num_calm < CALM_TURNS and bool(self._linked) and self._linked == [wish.linked() for wish in self._wishes]

    def _link(self, wish: PeerWish, info: WorkerInfo) -> None:
        key = (info.worker_id, info.epoch)
        turns = self._refused.get(key, 0)
        if turns > 0:
            self._refused[key] = turns - 1
            return
        if self._watch.is_silent(key, info.endpoint.rpc):
            return  # stopped or cut off: to connect would take its whole deadline, and keep others waiting
        try:
            link = self._connect(info.endpoint.data, wish.hello(info), CONNECT_TIMEOUT_S)
        except LayoutMismatch as error:
            self.last_refusal = kept(error)
            self._refused[key] = int(_RETRY_AFTER_REFUSAL_S / INTERVAL_S)
            logger.error("can't pair with %s: %s", info.worker_id, error)  # noqa: TRY400  # a fact, not a traceback
            return
        except AntiphonError as error:
            self.last_refusal = kept(error)
            logger.info("%s does not answer yet: %s", info.worker_id, error)
            return
        self.last_refusal = None
        logger.info("linked to %s (epoch %d)", info.worker_id, info.epoch)
        self._watch.met(key, info.endpoint.rpc)
        wish.add_link(info, link)
