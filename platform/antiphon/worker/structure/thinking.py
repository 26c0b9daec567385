"""Counts a thought's tokens and ends it by force at its budget (step speed; once per token).

    not begun ──start marker──► thinking ──end marker──► done
                                   └──budget──► forced: the end marker's ids, one per step ──► done

The state is a function of the output's ids. Markers are found in the tokens' bytes, since a model may spell one with other tokens
than the tokenizer does. Must not know: grammars, logits or torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from antiphon.core.request import ThinkingRules


class ThinkingMeter:
    """Where one output stands in its thought. Belongs to one thread.

    Args:
        rules: markers and budget.
        token_bytes: bytes of a token.
        output: tokens so far.
    """

    __slots__ = ("_count", "_end", "_is_done", "_is_thinking", "_rules", "_start", "_tail", "_token_bytes")

    def __init__(self, rules: ThinkingRules, token_bytes: Callable[[int], bytes], output: Sequence[int] = ()) -> None:
        self._rules = rules
        self._token_bytes = token_bytes
        self._start, self._end = rules.start.encode(), rules.end.encode()
        self._is_thinking = rules.is_open
        self._is_done = False
        self._count = 0
        self._tail = b""
        for token_id in output:
            self.append(token_id)

    @property
    def forced(self) -> int | None:
        """The token that must come next; None = any."""
        if not self._is_thinking:
            return None
        past = self._count - self._rules.budget_tokens
        return None if past < 0 else self._rules.end_token_ids[past]

    def append(self, token_id: int) -> None:
        """A token was chosen."""
        if self._is_done:
            return
        self._tail += self._token_bytes(token_id)
        if not self._is_thinking:
            self._begin()
            return
        self._count += 1
        was_last = self._count - self._rules.budget_tokens >= len(self._rules.end_token_ids)
        if self._end in self._tail or was_last:
            self._is_thinking, self._is_done, self._tail = False, True, b""
        else:
            self._tail = self._tail[-len(self._end) :]

    def _begin(self) -> None:
        begun = self._tail.lstrip()
        if begun.startswith(self._start):
            self._is_thinking, self._tail = True, begun[len(self._start) :]
            self._is_done = self._end in self._tail
            self._is_thinking = not self._is_done
        elif not self._start.startswith(begun):
            self._is_done = True  # an answer without a thought
