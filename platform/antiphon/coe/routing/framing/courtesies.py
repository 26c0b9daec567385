"""Tells English sentences that speak to the assistant and carry no subject (request speed, microseconds).

A sentence is a courtesy when it speaks to the assistant, or is a bare label, and is made of common words. Must not know: other
sentences, embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

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
EDGE = " \t\r\n#*-_>.!?:;,。！？：；，।؟¿¡、"


def has_subject(sentence: str) -> bool:
    """Whether figures, formulas or code stand in it: then it is never framing."""
    return _SUBJECT.search(sentence) is not None


def words_of(sentence: str) -> list[str]:
    """Its words and figures, in lower case."""
    return _WORD.findall(sentence.lower())


def is_courtesy(sentence: str, words: Sequence[str]) -> bool:
    """Whether the sentence of these words speaks to the assistant and to nothing else."""
    if not words:
        return not sentence.strip(EDGE)
    if not _QUESTION.isdisjoint(words) or _ADDRESS.isdisjoint(words):
        return False
    return sum(word not in _COMMON for word in words) <= len(words) // 6
