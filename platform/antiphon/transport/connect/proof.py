"""Both ends of a stream socket prove that they are parts of one deployment, before anything else that they say is read (control).

    connecting                                          listening
      magic, version, name of a key, nonce ──────────────►  no more is read of a stranger than these 48 bytes
           ◄──────────────  magic, version, nonce, proof over both nonces
      proof over both nonces ────────────────────────────►
      then greetings, each with a proof over the two nonces, its direction and number, and its bytes

A proof is an HMAC-SHA256 under a key derived for it, so that none can be played back, turned round, or made without the
deployment's key; and a greeting (worker id, epoch, layout with its fingerprint, addresses of memory) can't be changed on its way.
What follows on the link costs nothing more. Must not know: what is greeted.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
from dataclasses import dataclass

from antiphon.core.errors import CorruptMessage, LayoutMismatch, Unauthenticated, Unavailable
from antiphon.core.identity import PROOF_BYTES, Identity, own_identity
from antiphon.transport.connect.hello import (
    HELLO_VERSION,
    MAGIC,
    PREFIX_BYTES,
    Greeting,
    decode_greeting,
    frame_bytes,
    receive_exactly,
    send_frame,
)

PROOF_S = 5.0  # how long whoever connects may take to prove itself
_NONCE_BYTES = 32
_OPENING = struct.Struct(f"<IHH8s{_NONCE_BYTES}s")  # magic, version, 0, name of a key, nonce
_REPLY = struct.Struct(f"<IHH{_NONCE_BYTES}s{PROOF_BYTES}s")  # magic, version, 0, nonce, proof
_CONNECTING, _LISTENING = b"connecting", b"listening"


@dataclass(slots=True)
class ProvenSocket:
    """A stream socket whose other end has proven itself; carries greetings. Its owner closes the socket."""

    sock: socket.socket
    _key: bytes
    _mine: bytes
    _theirs: bytes
    _num_sent: int = 0
    _num_received: int = 0

    def send(self, frame: bytes, peer: str, deadline: float) -> None:
        """Send a greeting's frame before ``deadline`` (time.monotonic). Raises PeerLost."""
        send_frame(self.sock, frame + self._proof(self._mine, self._num_sent, frame), peer, deadline)
        self._num_sent += 1

    def receive(self, peer: str, deadline: float) -> Greeting:
        """The next greeting.

        Raises:
            PeerLost: the other end closed, or said nothing in time.
            LayoutMismatch, Unavailable: it is a refusal.
            CorruptMessage: it is nothing of ours, or was changed on its way.
        """
        prefix = receive_exactly(self.sock, PREFIX_BYTES, peer, deadline)
        body = receive_exactly(self.sock, frame_bytes(prefix, peer) + PROOF_BYTES, peer, deadline)
        frame, proof = prefix + body[:-PROOF_BYTES], body[-PROOF_BYTES:]
        if not hmac.compare_digest(proof, self._proof(self._theirs, self._num_received, frame)):
            raise CorruptMessage(peer, "its greeting was changed on its way")
        self._num_received += 1
        return decode_greeting(frame, peer)

    def _proof(self, direction: bytes, number: int, frame: bytes) -> bytes:
        return hmac.digest(self._key, direction + number.to_bytes(8, "little") + frame, "sha256")


def connect_proven(sock: socket.socket, peer: str, deadline: float, identity: Identity | None = None) -> ProvenSocket:
    """The connecting end.

    Raises:
        PeerLost: nobody answers in time.
        Unavailable: whoever listens there is no part of this deployment.
        LayoutMismatch: it speaks another version.
    """
    identity = own_identity() if identity is None else identity
    mine = secrets.token_bytes(_NONCE_BYTES)
    send_frame(sock, _OPENING.pack(MAGIC, HELLO_VERSION, 0, identity.key_id(), mine), peer, deadline)
    magic, version, _, theirs, proof = _REPLY.unpack(receive_exactly(sock, _REPLY.size, peer, deadline))
    _check_version(magic, version, peer)
    if not hmac.compare_digest(proof, identity.prove("hello listening", mine, theirs)):
        raise Unavailable(f"{peer} is no part of this deployment")
    send_frame(sock, identity.prove("hello connecting", mine, theirs), peer, deadline)
    return ProvenSocket(sock, identity.prove("hello session", mine, theirs), _CONNECTING, _LISTENING)


def accept_proven(sock: socket.socket, peer: str, deadline: float, identity: Identity | None = None) -> ProvenSocket:
    """The listening end. Nothing is said to a stranger but a nonce and a proof, which are worth nothing to it.

    Raises:
        PeerLost: the other end closed, or said nothing in time.
        Unauthenticated: it is no part of this deployment.
        CorruptMessage, LayoutMismatch: it speaks something else.
    """
    identity = own_identity() if identity is None else identity
    magic, version, _, name, theirs = _OPENING.unpack(receive_exactly(sock, _OPENING.size, peer, deadline))
    _check_version(magic, version, peer)
    key = next((index for index in range(len(identity.keys)) if hmac.compare_digest(name, identity.key_id(index))), None)
    if key is None:
        raise Unauthenticated(f"{peer} is no part of this deployment")
    mine = secrets.token_bytes(_NONCE_BYTES)
    proof = identity.prove("hello listening", theirs, mine, key=key)
    send_frame(sock, _REPLY.pack(MAGIC, HELLO_VERSION, 0, mine, proof), peer, deadline)
    answer = receive_exactly(sock, PROOF_BYTES, peer, deadline)
    if not hmac.compare_digest(answer, identity.prove("hello connecting", theirs, mine, key=key)):
        raise Unauthenticated(f"{peer} is no part of this deployment")
    return ProvenSocket(sock, identity.prove("hello session", theirs, mine, key=key), _LISTENING, _CONNECTING)


def _check_version(magic: int, version: int, peer: str) -> None:
    if magic != MAGIC:
        raise CorruptMessage(peer, f"its hello starts with {magic:#x}")
    if version != HELLO_VERSION:
        raise LayoutMismatch(peer, [f"version of the hello {HELLO_VERSION} against {version}"])
