"""Parts of one answer as blocks that open, grow and close, one at a time (request speed).

Doors whose streams have blocks (Responses, Messages) only write these. Must not know: any door's shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from antiphon.gateway.text.parts import CallArguments, CallBegin, CallEnd, Part, Text, Thought

Kind = Literal["thought", "text", "call"]


@dataclass(slots=True, kw_only=True)
class Block:
    """One block as far as it came; ``call`` counts the answer's calls."""

    index: int
    kind: Kind
    text: str = ""  # of a call: its arguments
    name: str = ""
    call: int = 0
    is_custom: bool = False  # a call whose arguments are a text
    is_whole: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A block opened, grew by ``text``, or closed."""

    what: Literal["open", "grow", "close"]
    block: Block
    text: str = ""


class Blocks:
    """The blocks of one answer, in order."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None

    def take(self, part: Part) -> list[Change]:
        """What the next part changes."""
        match part:
            case Thought():
                return self._grown("thought", part.text)
            case Text():
                return self._grown("text", part.text)
            case CallBegin():
                return [*self.close(), self._opened("call", name=part.name, call=part.index, is_custom=part.is_custom)]
            case CallArguments():
                return self._grown("call", part.text)
            case CallEnd():
                if self._open is not None:
                    self._open.is_whole = True
                return self.close()

    def close(self, *, cut: bool = False) -> list[Change]:
        """No more of the open block comes; ``cut``: because the answer was cut in it."""
        block, self._open = self._open, None
        if block is None:
            return []
        block.is_whole = block.is_whole or (block.kind != "call" and not cut)
        return [Change(what="close", block=block)]

    @property
    def ends_in_calls(self) -> bool:
        """True when there are calls, and all are whole."""
        calls = [block for block in self.all if block.kind == "call"]
        return bool(calls) and all(block.is_whole for block in calls)

    def _grown(self, kind: Kind, text: str) -> list[Change]:
        changes: list[Change] = []
        if self._open is None or self._open.kind != kind:
            changes = [*self.close(), self._opened(kind)]
        assert self._open is not None
        self._open.text += text
        return [*changes, Change(what="grow", block=self._open, text=text)]

    def _opened(self, kind: Kind, *, name: str = "", call: int = 0, is_custom: bool = False) -> Change:
        self._open = Block(index=len(self.all), kind=kind, name=name, call=call, is_custom=is_custom)
        self.all.append(self._open)
        return Change(what="open", block=self._open)
