"""Parts of one answer added up: what a door that answers whole shows (request speed).

Must not know: any door's shapes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from antiphon.core.request import FinishReason
from antiphon.gateway.text.parts import CallArguments, CallBegin, CallEnd, Part, Text, Thought


@dataclass(slots=True, kw_only=True)
class FoldedCall:
    """One call as far as it came."""

    name: str
    is_custom: bool = False
    arguments: str = ""  # of a custom tool: its text
    is_whole: bool = False


@dataclass(slots=True)
class Folded:
    """One answer as far as it came."""

    thought: str = ""
    text: str = ""
    calls: list[FoldedCall] = field(default_factory=list)

    def add(self, part: Part) -> None:
        """The next part."""
        match part:
            case Thought():
                self.thought += part.text
            case Text():
                self.text += part.gap + part.text
            case CallBegin():
                self.calls.append(FoldedCall(name=part.name, is_custom=part.is_custom))
            case CallArguments():
                self.calls[part.index].arguments += part.text
            case CallEnd():
                self.calls[part.index].is_whole = True

    def ends_in_calls(self, reason: FinishReason | None, stop: str | int | None) -> bool:
        """True when the answer ended by itself with whole calls: only then is it for the client to run them."""
        return reason is FinishReason.STOP and stop is None and bool(self.calls) and all(call.is_whole for call in self.calls)


def call_id(request_id: str, choice: int, index: int) -> str:
    """A call's id: the same whenever and wherever the answer is made again."""
    return f"call_{hashlib.sha256(f'{request_id}/{choice}/{index}'.encode()).hexdigest()[:24]}"
