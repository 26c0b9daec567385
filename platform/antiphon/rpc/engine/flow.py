"""How far an engine may be ahead of a gateway that reads its session (request speed; values, no I/O).

    engine ── updates ──► gateway        a few updates are on their way, fewer where they are large
           ◄── taken ────                what the engine makes meanwhile waits at the engine, each request's outputs together

Without it a gateway that has more to do than it can stands behind all that the network holds, some thousand updates, and the first
token of a request that has just come waits for them all. So it is behind by a few, and catches up with more tokens in each update.

Must not know: streams.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final, TypeVar

from antiphon.core.request import RequestId, RequestOutput

T = TypeVar("T")

WINDOW_UPDATES: Final = 4  # may be on their way; a gateway may need a turn of its loop for each
WINDOW_LARGE: Final = 2  # where they hold
WINDOW_OUTPUTS: Final = 32  # outputs or more together
TAKEN_UPDATES: Final = 2  # that a gateway takes before it says so, or
TAKEN_OUTPUTS: Final = 12  # with so many outputs


class Window:
    """The engine's end: updates that are written and that the gateway has not said to have taken."""

    def __init__(self) -> None:
        self._sizes: deque[int] = deque()
        self._num_outputs = 0
        self._is_told = False  # a gateway that never says what it takes is not waited for

    @property
    def is_open(self) -> bool:
        """Whether another update may be written."""
        return not self._is_told or len(self._sizes) < (WINDOW_UPDATES if self._num_outputs < WINDOW_OUTPUTS else WINDOW_LARGE)

    def wrote(self, num_outputs: int) -> None:
        """An update of so many outputs was written."""
        if self._is_told:
            self._sizes.append(num_outputs)
            self._num_outputs += num_outputs

    def taken(self, num_updates: int) -> None:
        """The gateway has taken so many more; 0 at its beginning says that it will tell."""
        self._is_told = True
        for _ in range(min(num_updates, len(self._sizes))):
            self._num_outputs -= self._sizes.popleft()


class Taken:
    """The gateway's end: what it has taken and not said."""

    def __init__(self) -> None:
        self._num_updates = 0
        self._num_outputs = 0

    def took(self, num_outputs: int) -> int:
        """An update of so many outputs was taken; how many updates to tell of now, or 0."""
        self._num_updates += 1
        self._num_outputs += num_outputs
        if self._num_updates < TAKEN_UPDATES and self._num_outputs < TAKEN_OUTPUTS:
            return 0
        told, self._num_updates, self._num_outputs = self._num_updates, 0, 0
        return told


def together(outputs: Sequence[RequestOutput]) -> list[RequestOutput]:
    """Outputs of several steps with one for each request, in the order in which the requests first come."""
    by_id: dict[RequestId, list[RequestOutput]] = {}
    for output in outputs:
        by_id.setdefault(output.request_id, []).append(output)
    return [each[0] if len(each) == 1 else _joined(each) for each in by_id.values()]


def _joined(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """Outputs of one request as one: the last, which may be its end, with what came before it."""
    return replace(
        outputs[-1],
        new_token_ids=_all(each.new_token_ids for each in outputs),
        logprobs=_all(each.logprobs for each in outputs),
        prompt_logprobs={position: found for each in outputs for position, found in each.prompt_logprobs.items()},
        num_cached_tokens=max(each.num_cached_tokens for each in outputs),
        num_remote_tokens=max(each.num_remote_tokens for each in outputs),
        num_preemptions=max(each.num_preemptions for each in outputs),
    )


def _all(parts: Iterable[tuple[T, ...]]) -> tuple[T, ...]:
    return tuple(item for part in parts for item in part)
