r"""Takes off what stands around a prompt, so that how one asks does not decide who answers (request speed, microseconds).

    "Hi there, I hope you are well. | What part of the cell makes energy? | Thanks a lot!"   →   the middle

Off come, at both ends, sentences that speak to the assistant, in English or, around an English prompt, in another language, and
sentences that give it a role; and worked examples before the question. The first sentence at an end that is none of these stops
the search, and a prompt that is nothing but framing is left whole. Looks at a bounded number of characters. Must not know:
embeddings, categories.
"""

from __future__ import annotations

import enum
import re

from antiphon.coe.routing.framing.courtesies import has_subject, is_courtesy, words_of
from antiphon.coe.routing.framing.examples import asked_after_examples
from antiphon.coe.routing.framing.languages import is_english, speaks_otherwise
from antiphon.coe.routing.framing.roles import TASK, end_of_role_clause, gives_role, tells_more_of_role

MAX_CHARS = 480  # looked at, at each end
_MAX_SENTENCES = 8  # taken off, at each end

_SENTENCE_END = re.compile(r"[.!?:](?=\s|$)[.!?:;,\s]*|[。！？：；।؟]\s*|\n\s*")
_CLAUSE_END = re.compile(r"[.!?:;,](?=\s|$)[.!?:;,\s]*|[。！？：；，、।؟]\s*|\n\s*")
_OTHER_SCRIPT_LAST = re.compile(r"[\u0370-\u1fff\u2e80-\ud7ff][^A-Za-z]*\Z")
_TASK = re.compile(TASK, re.IGNORECASE)


def without_framing(text: str) -> str:
    """``text`` without what stands around it; ``text`` itself when that is nothing, or all there is."""
    core = asked_after_examples(text)
    found = _middle(core, others=True)
    if found is None:
        return core
    middle, otherwise = found
    if otherwise and not is_english(middle[:MAX_CHARS]):
        found = _middle(core, others=False)
        return core if found is None else found[0]
    return middle


def _middle(text: str, *, others: bool) -> tuple[str, bool] | None:
    """What is left, and whether a sentence in another language came off; None when nothing or everything would."""
    begin, otherwise = _before(text, others=others)
    if begin >= len(text):
        return None
    end, more = _after(text, begin, others=others)
    if end <= begin or (begin == 0 and end == len(text)):
        return None
    return text[begin:end], otherwise or more


def _before(text: str, *, others: bool) -> tuple[int, bool]:
    """Where the prompt proper begins."""
    head, begin, in_role, otherwise = text[:MAX_CHARS], 0, False, False
    for _ in range(_MAX_SENTENCES):
        clause = end_of_role_clause(head, begin)
        if clause > begin:
            begin, in_role = clause, True
            continue
        sentence_end, clause_end = _SENTENCE_END.search(head, begin), _CLAUSE_END.search(head, begin)
        if sentence_end is None or clause_end is None:
            break
        sentence = head[begin : sentence_end.start()]
        if _is_role(head, sentence, sentence_end, in_role):
            in_role = True
            if clause_end.start() < sentence_end.start() and _TASK.match(head, clause_end.end()):
                begin = clause_end.end()
                break
            if sentence_end[0][0] != "?":
                begin = sentence_end.end()
                continue
        ends = (sentence_end,) if clause_end.start() == sentence_end.start() else (sentence_end, clause_end)
        for end in ends:
            kind = _kind(head[begin : end.start()], others=others)
            if kind is not None:
                begin, otherwise = end.end(), otherwise or kind is _Kind.OTHERWISE
                break
        else:
            break
    return begin, otherwise


class _Kind(enum.Enum):
    COURTESY = enum.auto()
    OTHERWISE = enum.auto()  # in another language


def _kind(piece: str, *, others: bool) -> _Kind | None:
    """What framing the piece is; None = none."""
    if has_subject(piece):
        return None
    words = words_of(piece)
    if is_courtesy(piece, words):
        return _Kind.COURTESY
    return _Kind.OTHERWISE if others and speaks_otherwise(piece, words) else None


def _end_of_latin(text: str, end: int) -> int:
    """Where the last run without Latin letters that holds letters of another script begins; ``end`` when there is none."""
    if text.isascii():
        return end
    found = _OTHER_SCRIPT_LAST.search(text, 0, end)
    return end if found is None else found.start()


def _is_role(head: str, sentence: str, end: re.Match[str], in_role: bool) -> bool:
    return end.end() < len(head) and (gives_role(sentence) or (in_role and end[0][0] != "?" and tells_more_of_role(sentence)))


def _after(text: str, begin: int, *, others: bool) -> tuple[int, bool]:
    """Where the prompt proper ends."""
    start = max(begin, len(text) - MAX_CHARS)
    tail, otherwise = text[start:], False
    # What the first piece of the tail belongs to is not seen whole, so it always stays.
    sentences = [found.end() for found in _SENTENCE_END.finditer(tail)]
    clauses = [found.end() for found in _CLAUSE_END.finditer(tail)]
    end = len(tail)
    for _ in range(_MAX_SENTENCES):
        seen = -1
        for cuts in (sentences, clauses):
            cut = next((cut for cut in reversed(cuts) if cut < end), None)
            if cut is None or cut == seen:
                continue
            seen, piece = cut, tail[cut:end]
            kind = _kind(piece, others=others)
            if kind is not None or gives_role(piece):
                end, otherwise = cut, otherwise or kind is _Kind.OTHERWISE
                break
        else:
            cut = _end_of_latin(tail, end) if others else end
            if cut == end or not speaks_otherwise(tail[cut:end], ()):
                break
            end, otherwise = cut, True
    return start + end, otherwise
