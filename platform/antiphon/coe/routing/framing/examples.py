r"""Finds what is asked behind worked examples, and what follows a role (request speed, microseconds).

    "Q: Who wrote Emma?\nA: Jane Austen\n\nQ: |What part of the cell makes energy?|\nA:"   →   the last question

Examples are questions with their answers, under labels that repeat; the last one stands without an answer. Where the last one is
answered too, as in the examples of a task, the prompt is left whole. Must not know: embeddings, courtesies.
"""

from __future__ import annotations

import re

_ASK = (
    "q|question|input|user|human|customer|student|problem|prompt|instruction|task|query|exercise|request|text|sentence|review|"
    "statement"
)
_ANSWER = "a|answer|output|assistant|ai|bot|model|teacher|solution|response|result|reply|label|completion|sentiment|expert"
# Begins with the end of the line before: what begins with one certain character is looked for as fast as that character.
_LABEL = re.compile(rf"\n[ \t>*#\-]*(?:(?P<ask>{_ASK})|(?P<answer>{_ANSWER}))(?:[ \t]*#?\d+)?[ \t*]*[:：][ \t*]*", re.IGNORECASE)
_EXAMPLE = re.compile(r"\bexamples?\b|\bfor instance\b|\bdemonstrations?\b", re.IGNORECASE)
_NOW = re.compile(
    r"(?:^|(?<=[\n.!?] ))(?:and )?(?:now(?!adays)|your turn|over to you|(?:the |my )?(?:actual|real) (?:question|task|one)|next)\b"
    r"[^\n.?!:]{0,80}[:.!]\s+",
    re.IGNORECASE | re.MULTILINE,
)
_SHOWN = re.compile(r"[#*\s]*(?:here (?:is|are)[^\n]{0,60}\bexamples?\b|examples?\b)", re.IGNORECASE)  # at the very beginning
_SHOWS = ("example", "for instance", "demonstration")  # without one of these, _EXAMPLE is not looked for
# Of a prompt that are looked through: examples begin near its beginning, and the last question is short and at its end.
_HEAD_CHARS, _TAIL_CHARS = 1000, 3000


def asked_after_examples(text: str) -> str:
    """The last question of a prompt that shows worked examples first; ``text`` itself when it shows none."""
    seen = _seen(text)
    if ":" not in seen and "：" not in seen:
        return text
    labels = list(_LABEL.finditer(seen))
    asks = [i for i, label in enumerate(labels) if label["ask"]]
    answers = [i for i, label in enumerate(labels) if label["answer"]]
    rest = ""
    if len(asks) >= 2 and any(asks[0] < i < asks[-1] for i in answers) and _in_one_piece(text, labels[asks[-1]].end()):
        rest = _last_question(seen, labels, asks[-1])
    if not rest and ((asks and answers) or _shows_examples(seen, len(seen))):
        turns = [turn for turn in _NOW.finditer(seen) if _in_one_piece(text, turn.end())]
        shown_before = turns and (_shows_examples(seen, turns[-1].start()) or (labels and labels[0].start() < turns[-1].start()))
        if shown_before:
            rest = _without_labels(seen[turns[-1].end() :])
    if not rest and _SHOWN.match(text) and len(parts := text[-_TAIL_CHARS:].rstrip().rsplit("\n\n", 1)) == 2:
        rest = "" if _SHOWN.match(parts[1]) else _without_labels(parts[1])
    return rest if rest else text


def _seen(text: str) -> str:
    """What is looked through, as lines that each begin after an end of line."""
    if len(text) <= _HEAD_CHARS + _TAIL_CHARS:
        return "\n" + text
    return f"\n{text[:_HEAD_CHARS]}\n{text[-_TAIL_CHARS:]}"


def _in_one_piece(text: str, begin: int) -> bool:
    """Whether what is seen from there on is the prompt's own end, with nothing left out in between."""
    return len(text) <= _HEAD_CHARS + _TAIL_CHARS or begin > _HEAD_CHARS + 1


def _shows_examples(seen: str, end: int) -> bool:
    """Whether something before ``end`` says that examples are shown."""
    lowered = seen.lower()
    return any(word in lowered for word in _SHOWS) and _EXAMPLE.search(seen, 0, end) is not None


def _last_question(seen: str, labels: list[re.Match[str]], last: int) -> str:
    """What stands under the last label that asks; "" when it is answered."""
    end = len(seen)
    if last + 1 < len(labels):
        if seen[labels[last + 1].end() :].strip():
            return ""
        end = labels[last + 1].start()
    return seen[labels[last].end() : end].strip()


def _without_labels(text: str) -> str:
    """A question without the labels at its ends."""
    text = "\n" + text
    labels = list(_LABEL.finditer(text))
    if labels and labels[0]["ask"] and not text[: labels[0].start()].strip():
        return _last_question(text, labels, 0) or text.strip()
    if labels and labels[-1]["answer"] and not text[labels[-1].end() :].strip():
        return text[: labels[-1].start()].strip()
    return text.strip()
