"""Server-sent events with ids, from which any gateway of the deployment goes on after a lost connection (request speed).

    event ─► id: <number>.<token>      the number counts the stream's events; the token is for gateways alone
    the same POST again + x-request-id + last-event-id ─► the answer is made again with the token's seed, what the client has is
    left out, and the rest follows: nothing is kept, so any gateway will do, whatever became of the first

A token is worth something only with the request id and the key (tenant) that it was made for. It carries a sum over the answer's
tokens: where they come out otherwise the second time (another model, another request; a tie), the client is told, instead of being
given the end of another answer. Only streams of one choice have ids. Must not know: any door's shapes, or HTTP.
"""

from __future__ import annotations

import base64
import hmac
import json
import struct
import zlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Final

from antiphon.core.errors import InvalidInput
from antiphon.core.identity import Identity, own_identity
from antiphon.gateway.generation.request import ChoiceDelta, Completed, Event, GenerationRequest, Started
from antiphon.gateway.text.events import Part, merged

LAST_EVENT_HEADER: Final = "last-event-id"
DONE: Final = "[DONE]"

_PURPOSE: Final = "place in a stream"
_PLACE: Final = struct.Struct(">IIIIQII")
_MAC_BYTES: Final = 9
_LINE_ENDS: Final = str.maketrans({mark: f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"})  # JSON escapes all others
_MAX_ID_CHARS: Final = 96

Json = dict[str, Any]


class CannotResume(InvalidInput):
    """The stream's beginning does not come out as the client has it."""

    code = "cannot_resume"
    http_status = 409
    grpc_status = "ABORTED"


@dataclass(slots=True, kw_only=True)
class Place:
    """Where a client stands in a stream, with what the rest of it depends on; a stream moves its own with each event."""

    num_events: int = 0  # that it has
    num_tokens: int = 0  # whose events it has all
    num_next_tokens: int = 0  # that were added together after these, where it has only some of the events that they gave
    num_next_events: int = 0  # that it has of what came after num_tokens
    seed: int = 0
    created: int = 0  # seconds since 1970
    token_sum: int = 0  # over the first num_tokens


def is_of(last_event_id: str, *, tenant: str, request_id: str, model: str, identity: Identity | None = None) -> bool:
    """Whether the id is of an event of the stream that this tenant had under this request id from this model.

    Raises:
        InvalidInput: it is no event's.
    """
    packed, mac = _parsed(last_event_id)
    return _is_proven(own_identity() if identity is None else identity, (tenant, request_id, model), packed, mac)


class EventStream:
    """Frames the events of one answer. One per request.

    Args:
        generation: what is asked for, with its tenant.
        last_event_id: the header's value; None = a new stream.
        identity: the deployment's keys; None = this process'.

    Raises:
        InvalidInput: the id is not one of this request's, or there is nothing to go on with.
    """

    def __init__(self, generation: GenerationRequest, last_event_id: str | None, *, identity: Identity | None = None) -> None:
        self._identity = own_identity() if identity is None else identity
        self._bound_to = (generation.tenant, generation.request_id, generation.model)
        self._prove = self._identity.prover(_PURPOSE, *(each.encode() for each in self._bound_to), num_bytes=_PLACE.size)
        self._has_ids = generation.n * len(generation.prompts) == 1
        self._target = Place()
        self._at = Place()
        self.is_replay = False  # True while what the client has is left out
        self.generation = generation
        if last_event_id is not None:
            self._target = self._read(generation, last_event_id)
            self.is_replay = True
            sampling = replace(generation.sampling, seed=self._target.seed)
            self.generation = replace(generation, sampling=sampling, token_by_token=True)

    async def events(self, answer: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """The answer's events, cut as they were the first time up to where the client stands.

        Raises:
            CannotResume: the answer is another one.
        """
        target, num_tokens, token_sum = self._target, 0, 0
        gathered: list[ChoiceDelta] = []
        async with aclosing(answer):
            async for event in answer:
                if not self.is_replay:
                    yield event
                    continue
                if isinstance(event, Started):
                    yield replace(event, created=target.created)
                    continue
                if isinstance(event, Completed):
                    if num_tokens < target.num_tokens or gathered:
                        raise _other_answer()
                    yield event
                    continue
                if num_tokens < target.num_tokens:
                    token_sum = _sum(event.token_ids, token_sum)
                    num_tokens += len(event.token_ids)
                    if num_tokens == target.num_tokens and token_sum != target.token_sum:
                        raise _other_answer()
                    yield event
                elif not gathered and not event.token_ids:
                    yield event
                else:
                    gathered.append(event)
                    num_gathered = sum(len(each.token_ids) for each in gathered)
                    if num_gathered >= target.num_next_tokens or event.finish_reason is not None:
                        yield _together(gathered)
                        gathered = []
                        target = replace(target, num_next_tokens=0)

    def frame(self, event: Event, made: Sequence[Json | str], *, named: bool) -> bytes:
        """What ``event`` is on the wire, without what the client has.

        Args:
            event: of ``events``, each once and in order.
            made: the door's events for it.
            named: each has an ``event:`` line, from its ``type``.
        """
        num_new = len(event.token_ids) if isinstance(event, ChoiceDelta) else 0
        if isinstance(event, Started):
            self._at.seed, self._at.created = event.seed, event.created
        framed = []
        at = self._at
        for position, each in enumerate(made):
            before = replace(at) if self.is_replay else at
            at.num_events += 1
            at.num_next_events += 1
            at.num_next_tokens = num_new
            if position + 1 == len(made):
                self._add(event)
            if self.is_replay:
                if self._has(before, num_new):
                    continue
                self.is_replay = False
                at.num_events = self._target.num_events + 1  # cut otherwise, they may be more or less
            framed.append(self._framed(each, named=named))
        if not made:
            self._add(event)
        return b"".join(framed)

    def _add(self, event: Event) -> None:
        """All of an event's tokens' events are made."""
        if isinstance(event, ChoiceDelta) and event.token_ids:
            at = self._at
            at.num_tokens += len(event.token_ids)
            at.token_sum = _sum(event.token_ids, at.token_sum)
            at.num_next_tokens = at.num_next_events = 0

    def _has(self, before: Place, num_new: int) -> bool:
        """Whether the client has the event after ``before``."""
        target = self._target
        if before.num_tokens != target.num_tokens:
            return before.num_tokens < target.num_tokens
        return before.num_next_events < target.num_next_events and num_new <= target.num_next_tokens

    def _framed(self, each: Json | str, *, named: bool) -> bytes:
        if isinstance(each, dict) and "sequence_number" in each:
            each = {**each, "sequence_number": self._at.num_events - 1}
        data = each if isinstance(each, str) else one_line(json.dumps(each, ensure_ascii=False, separators=(",", ":")))
        name = f"event: {each['type']}\n" if named and isinstance(each, dict) else ""
        event_id = f"id: {self._id()}\n" if self._has_ids else ""
        return f"{event_id}{name}data: {data}\n\n".encode()

    def _id(self) -> str:
        at = self._at
        packed = _PLACE.pack(
            at.num_events, at.num_tokens, at.num_next_tokens, at.num_next_events, at.seed % 2**64, at.created, at.token_sum
        )
        mac = self._prove(packed)[:_MAC_BYTES]
        return f"{at.num_events}.{base64.urlsafe_b64encode(packed[4:] + mac).decode().rstrip('=')}"

    def _read(self, generation: GenerationRequest, text: str) -> Place:
        if not generation.stream:
            raise InvalidInput("only a stream can be gone on with", LAST_EVENT_HEADER)
        if not self._has_ids:
            raise InvalidInput("only a stream of one choice can be gone on with", LAST_EVENT_HEADER)
        packed, mac = _parsed(text)
        if not _is_proven(self._identity, self._bound_to, packed, mac):
            raise InvalidInput("this event was not of the stream that this key, x-request-id and model had", LAST_EVENT_HEADER)
        values = _PLACE.unpack(packed)
        num_events, num_tokens, num_next_tokens, num_next_events, seed, created, token_sum = values
        return Place(
            num_events=num_events,
            num_tokens=num_tokens,
            num_next_tokens=num_next_tokens,
            num_next_events=num_next_events,
            seed=seed,
            created=created,
            token_sum=token_sum,
        )


def one_line(json_text: str) -> str:
    """JSON that is one line to every reader: some split event streams wherever Unicode ends a line, as ``str.splitlines`` does."""
    return json_text.translate(_LINE_ENDS)


def _parsed(text: str) -> tuple[bytes, bytes]:
    """An id's place and its proof."""
    number, _, token = text.partition(".")
    try:
        if len(text) > _MAX_ID_CHARS or not number.isascii() or not number.isdecimal():
            raise ValueError
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        packed, mac = int(number).to_bytes(4) + raw[: _PLACE.size - 4], raw[_PLACE.size - 4 :]
        _PLACE.unpack(packed)
    except (ValueError, OverflowError, struct.error) as error:
        raise InvalidInput("this is not the id of an event of ours", LAST_EVENT_HEADER) from error
    return packed, mac


def _mac(identity: Identity, bound_to: tuple[str, ...], packed: bytes, key: int) -> bytes:
    return identity.prove(_PURPOSE, *(each.encode() for each in bound_to), packed, key=key)[:_MAC_BYTES]


def _is_proven(identity: Identity, bound_to: tuple[str, ...], packed: bytes, mac: bytes) -> bool:
    return sum(hmac.compare_digest(mac, _mac(identity, bound_to, packed, key)) for key in range(len(identity.keys))) > 0


def _other_answer() -> CannotResume:
    return CannotResume("the answer does not come out again as far as it had come: ask anew", LAST_EVENT_HEADER)


def _sum(token_ids: Sequence[int], before: int) -> int:
    return zlib.crc32(struct.pack(f">{len(token_ids)}I", *token_ids), before)


def _together(deltas: Sequence[ChoiceDelta]) -> ChoiceDelta:
    """Deltas of one choice as one."""
    if len(deltas) == 1:
        return deltas[0]
    parts: list[Part] = [part for each in deltas for part in each.parts or ()]
    return replace(
        deltas[-1],
        text="".join(each.text for each in deltas),
        token_ids=tuple(token_id for each in deltas for token_id in each.token_ids),
        logprobs=tuple(logprob for each in deltas for logprob in each.logprobs),
        text_offsets=tuple(offset for each in deltas for offset in each.text_offsets),
        parts=None if deltas[-1].parts is None else merged(parts),
        prompt_logprobs=next((each.prompt_logprobs for each in deltas if each.prompt_logprobs), ()),
    )
