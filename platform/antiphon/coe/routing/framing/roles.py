"""Tells sentences that give the assistant a role or a manner of speaking (request speed, microseconds).

    "You are a grumpy pirate captain. | What part of the cell makes energy? | Answer as he would."   →   the middle

Must not know: embeddings, where sentences end.
"""

from __future__ import annotations

import re

# What begins a task: "as a teacher, explain ...".
TASK = (
    r"(?:please |then |and |now |so )*(?:what|how|why|who|when|where|which|whom|explain|answer|write|solve|tell|give|describe|find|"
    r"list|calculate|compute|summari[sz]e|translate|implement|create|complete|help|determine|is|are|do|does|can|could|if)\b"
)
_WHO = r"(?:an?|the|my|our|one of|someone|somebody|if you|though you|you|(?-i:[A-Z]\w+))\b"
_ROLE = re.compile(
    rf"""(?:
    (?:from\ now\ on,?\ |for\ this\ (?:task|conversation),?\ |please\ |today,?\ |now,?\ )*
    (?:
      you(?:\ are|'re|\ will\ be|\ shall\ be|\ play|\ will\ play|\ will\ act\ as|\ work\ as|\ take\ the\ role\ of|\ have\ been)
         (?:\ now|\ currently|\ going\ to\ be|\ playing)?\ {_WHO}
     |(?:i\ (?:want|need|would\ like)|i'd\ like)\ you\ to\ (?:act|be|play|pretend|behave|answer|respond|speak|write|take)\b
     |(?:act|behave|pretend|pose|roleplay|role-play|imagine|suppose|assume|speak|talk|answer|respond|reply|write|explain|think)
         (?:\ this|\ it|\ everything|\ that)?\ (?:as|like|to\ be|you(?:\ are|'re|\ were)|yourself\ as
            |in\ (?:the|his|her|their|that)\ (?:style|voice|role|manner|persona))\b
     |(?:take\ on|assume|adopt|play)\ the\ (?:role|persona|part|identity|voice)\b
     |your\ (?:role|persona|character|name|job|identity)\ is\b
     |(?:in|with)\ (?:the\ (?:style|voice|tone|role|persona|manner)\ of|character\ as)\b
    ))""",
    re.IGNORECASE | re.VERBOSE,
)
_AS_A = re.compile(rf"\s*(?:speaking |acting )?as (?:an?|my) [^,.;:!?\n=\d]{{3,70}},\s*(?={TASK})", re.IGNORECASE)
_LABEL = re.compile(r"\W*(?:system(?: prompt| message)?|persona|role)\W*:\W*(?=\w)", re.IGNORECASE)
_MORE = re.compile(
    r"(?:you|your|stay in|never break|never leave|always|keep|remain|speak|talk|use (?:your|a|the)|do not break|don't break|be )\b",
    re.I,
)
_SUBJECT = re.compile(r"[=\\$^{}<>\[\]|~`@%&+?]|\b(?:given|asked|provided)\b", re.IGNORECASE)


def gives_role(sentence: str) -> bool:
    """Whether the sentence says who the assistant is to be, or in whose manner it is to speak."""
    return _ROLE.match(sentence) is not None and _SUBJECT.search(sentence) is None


def tells_more_of_role(sentence: str) -> bool:
    """Whether a sentence that follows one that gives a role goes on about it."""
    return _MORE.match(sentence) is not None and _SUBJECT.search(sentence) is None


def end_of_role_clause(text: str, begin: int) -> int:
    """Where "as a ...," or "System:" at ``begin`` ends; ``begin`` when there is none."""
    found = _AS_A.match(text, begin, begin + 120) or _LABEL.match(text, begin, begin + 40)
    return begin if found is None else found.end()
