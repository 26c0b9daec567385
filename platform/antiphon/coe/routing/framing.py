"""Takes courtesies off both ends of a prompt, so that how one asks does not decide who answers (request speed, microseconds).

    "Hi there, I hope you are well. | What part of the cell makes energy? | Thanks a lot!"   →   the middle

A sentence at an end is framing when it speaks to the assistant, or is a bare label, and is made of common words that carry no
subject. The first sentence that is not stops the search, and a prompt that is nothing but framing is left whole. Works on a
bounded number of characters at each end. Must not know: embeddings, categories.
"""

from __future__ import annotations

import re

MAX_CHARS = 480  # looked at, at each end
_MAX_SENTENCES = 8  # taken off, at each end

_ADDRESS_TEXT = """
    i me my mine myself we us our you your yours
    hi hello hey greetings dear good welcome thanks thank thx cheers regards sincerely please pls kindly sorry
    answer answers question task instruction instructions response query problem prompt input output request assistant user
"""
# Words that speak to the assistant or glue a sentence together, and say nothing about the subject.
_COMMON_TEXT = """
    a able about above advance after afternoon again all also am an and any anyone anything appreciate appreciated apologies are
    as ask asked asking assist assistance at ay back be been before being below best bit bother brief briefly but by can careful
    carefully case certain chance clear clearly colleague come concise concisely correct correctly could couple curious d day
    days deal detail detailed did do does doing don done down each ease easy effort else enjoy evening everyone excuse expert
    explain explained explanation eye far fast favor favour feel figure fine first follow following for forward free friend from
    full fully further get getting give given glad go going grateful great guess had hand happy has have having hear heard help
    helpful helping helps here highly honest honestly hope hoping hours hurry idea if immensely in info information interested
    into is issue it its job just keen keep kind know known last lately later least let life like little ll long look looked
    looking lot lots love make many matter may maybe mean means might mind minute minutes moment more morning most much must
    need needed new next nice night no not note now of off ok okay on once one only opinion or other out over part patience
    patient perhaps point polite possible precise precisely proper properly provide put quick quickly quite rather re read ready
    really reason reply right s say see seems share short should show simple simply since so solve solution some someone
    something soon spare started step stuck such suggest support sure t take taking talk team tell than that the their them then
    there these they thing things think this thorough thoroughly those thought thoughts through time times to today together
    tomorrow tonight too tried trouble true truly try trying two understand understanding unsure until up use useful ve very
    wait want wanted wants was way week weekend well were will wish with without wonder wondered wonderful wondering word words
    work working works worry would write yes yet
"""
# A sentence with one of these asks for something itself.
_QUESTION = frozenset(("how", "who", "whom", "whose", "when", "where", "why", "which"))
_ADDRESS = frozenset(_ADDRESS_TEXT.split())
_COMMON = _ADDRESS | frozenset(_COMMON_TEXT.split())

_WORD = re.compile(r"[^\W_]+")
_SUBJECT = re.compile(r"[\d=\\$^{}<>\[\]()|~`@%&+]")
_SENTENCE_END = re.compile(r"[.!?:](?=\s|$)[.!?:;,\s]*|\n\s*")
_CLAUSE_END = re.compile(r"[.!?:;,](?=\s|$)[.!?:;,\s]*|\n\s*")
_EDGE = " \t\r\n#*-_>.!?:;,"


def without_framing(text: str) -> str:
    """``text`` without the framing at its ends; ``text`` itself when there is none, or nothing else."""
    begin = _framing_before(text)
    if begin >= len(text):
        return text
    end = _framing_after(text, begin)
    if end <= begin or (begin == 0 and end == len(text)):
        return text
    return text[begin:end]


def _framing_before(text: str) -> int:
    """Where the prompt proper begins."""
    head, begin = text[:MAX_CHARS], 0
    for _ in range(_MAX_SENTENCES):
        for end_of in (_SENTENCE_END, _CLAUSE_END):
            found = end_of.search(head, begin)
            if found is not None and _is_framing(head[begin : found.start()]):
                begin = found.end()
                break
        else:
            break
    return begin


def _framing_after(text: str, begin: int) -> int:
    """Where the prompt proper ends."""
    start = max(begin, len(text) - MAX_CHARS)
    tail = text[start:]
    # What the first piece of the tail belongs to is not seen whole, so it always stays.
    sentences = [found.end() for found in _SENTENCE_END.finditer(tail)]
    clauses = [found.end() for found in _CLAUSE_END.finditer(tail)]
    end = len(tail)
    for _ in range(_MAX_SENTENCES):
        for cuts in (sentences, clauses):
            cut = next((cut for cut in reversed(cuts) if cut < end), None)
            if cut is not None and _is_framing(tail[cut:end]):
                end = cut
                break
        else:
            break
    return start + end


def _is_framing(sentence: str) -> bool:
    if _SUBJECT.search(sentence):
        return False
    words = _WORD.findall(sentence.lower())
    if not words:
        return not sentence.strip(_EDGE)
    if not _QUESTION.isdisjoint(words) or _ADDRESS.isdisjoint(words):
        return False
    return sum(word not in _COMMON for word in words) <= len(words) // 6
