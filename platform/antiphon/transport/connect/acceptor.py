"""Accepts stream sockets in a thread, and greets each in a short-lived thread of its own (control).

Must not know: what is said in a greeting.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import socket
import threading
from collections.abc import Callable

from antiphon.transport.base import Link
from antiphon.transport.wakeup import Wakeup

_MAX_GREETINGS = 64  # at once; further peers wait in the socket's backlog
_JOIN_S = 1.0
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_NO_ROOM_REST_S = 0.25

logger = logging.getLogger(__name__)


class Acceptor:
    """Hands each arriving socket to ``greet``, and the link that comes of it to ``arrive``.

    ``greet`` owns its socket, must not take for ever, and returns None (socket closed) for a peer it turned away. It calls the
    function it is given once the peer has proven itself: of those who have not, the oldest goes when there is no room for another.
    """

    def __init__(
        self,
        listening: socket.socket,
        greet: Callable[[socket.socket, Callable[[], None]], Link | None],
        arrive: Callable[[Link], None],
    ) -> None:
        """``listening`` is bound, and owned from now on."""
        self._arrive = arrive
        self._listening = listening
        self._greet = greet
        self._stop = Wakeup()
        self._room = threading.Semaphore(_MAX_GREETINGS)
        self._lock = threading.Lock()
        self._greeting: dict[threading.Thread, socket.socket] = {}
        self._unproven: dict[threading.Thread, socket.socket] = {}  # of them
        listening.listen()
        listening.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="link-acceptor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop accepting, and break off the greetings under way. Not to be called twice."""
        self._stop.ring()
        self._thread.join(_JOIN_S)
        self._listening.close()
        self._stop.close()
        with self._lock:
            greeting = list(self._greeting.items())
        for thread, sock in greeting:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            thread.join(_JOIN_S)

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._listening, select.POLLIN)
        poller.register(self._stop.fd, select.POLLIN)
        stopping = select.poll()
        stopping.register(self._stop.fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poller.poll()}
            if self._stop.fd in ready:
                return
            if not self._room.acquire(blocking=False):
                self._turn_out_the_oldest()
                if not self._room.acquire(timeout=_JOIN_S / 2):
                    continue
            try:
                sock, _ = self._listening.accept()
            except OSError as error:  # it went away between poll and accept, or this process may open no more files
                self._room.release()
                if error.errno in _NO_ROOM:
                    logger.warning("no peer is taken for %g s: %s", _NO_ROOM_REST_S, error)
                    stopping.poll(_NO_ROOM_REST_S * 1000)  # the peer is still there, and asking at once would only spin
                continue
            thread = threading.Thread(target=self._greet_one, args=(sock,), name="link-greeting", daemon=True)
            with self._lock:
                self._greeting[thread] = self._unproven[thread] = sock
            try:
                thread.start()
            except RuntimeError as error:  # this process may start no more threads
                logger.warning("a peer is turned away: %s", error)
                with self._lock:
                    del self._greeting[thread], self._unproven[thread]
                self._room.release()
                sock.close()

    def _turn_out_the_oldest(self) -> None:
        with self._lock:
            for thread, sock in self._unproven.items():
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                del self._unproven[thread]
                return

    def _proven(self) -> None:
        with self._lock:
            self._unproven.pop(threading.current_thread(), None)

    def _greet_one(self, sock: socket.socket) -> None:
        link = None
        try:
            link = self._greet(sock, self._proven)
        finally:
            with self._lock:
                del self._greeting[threading.current_thread()]
                self._unproven.pop(threading.current_thread(), None)
            self._room.release()
        if link is not None:  # no longer in _greeting: a close of the listener leaves it alone
            self._arrive(link)
