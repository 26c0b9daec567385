"""A Lark grammar of a text to one of the text as JSON writes it between quotes (request speed; pure).

Every character is written in one way, of which none begins another, so terminals are rewritten character by character. But escapes
begin alike, and the engine's lexer looks no further than one byte: where there are any, the rules become one terminal, which
the engine holds as a whole. Rules that contain themselves can't, and are refused there; so is what can't be looked into.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from antiphon.core.errors import InvalidInput
from antiphon.gateway.text.custom.patterns import quoted_pattern, quoted_text

_TOKENS: Final = re.compile(
    r"""(?P<comment>(?://|\#)[^\n]*)
      | (?P<range>"(?:\\.|[^"\\\n])+"\s*\.\.\s*"(?:\\.|[^"\\\n])+")
      | (?P<text>"(?:\\.|[^"\\\n])*"i?)
      | (?P<pattern>/(?![/*])(?:\\.|[^/\\\n])+/[imslux]*)
      | (?P<imports>%import[ \t]+common[ \t]*(?:\.[ \t]*(?P<one>\w+)(?:[ \t]*->[ \t]*(?P<alias>\w+))?|\((?P<many>[\w\s,]*)\)))
      | (?P<ignore>%ignore\b)
      | (?P<times>~[ \t]*\d+(?:[ \t]*\.\.[ \t]*\d+)?|\{\d*,?\d*\})
      | (?P<label>->[ \t]*\w+)
      | (?P<head>(?:(?<=\n)|\A)[ \t]*[?!]*(?P<name>_?[A-Za-z]\w*)(?P<attributes>\[[^\]\n]*\]|\.-?\d+)?[ \t]*:)
      | (?P<word>_?[A-Za-z]\w*)
      | (?P<plain>[\s|()\[\]*+?&])""",
    re.VERBOSE,
)
# Of Lark's common terminals: those without a character that JSON escapes, and what the others are.
_LETTERS: Final = ("LCASE_LETTER", "UCASE_LETTER", "LETTER", "WORD", "CNAME")
_NUMBERS: Final = ("DIGIT", "HEXDIGIT", "INT", "SIGNED_INT", "DECIMAL", "FLOAT", "SIGNED_FLOAT", "NUMBER", "SIGNED_NUMBER")
_IMPORTED: Final = frozenset((*_LETTERS, *_NUMBERS))
_WRITTEN: Final[Mapping[str, str]] = {
    "CR": r"\r",
    "LF": r"\n",
    "NEWLINE": r"(?:\r?\n)+",
    "WS": r"[ \t\f\r\n]+",
    "WS_INLINE": r"[ \t]+",
    "ESCAPED_STRING": r'"(?:[^"\\\n]|\\.)*"',
    "SH_COMMENT": r"#[^\n]*",
    "CPP_COMMENT": r"//[^\n]*",
    "SQL_COMMENT": r"--[^\n]*",
}


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    written: str  # what follows characters, as JSON writes them
    name: str = ""  # of what is defined, used or imported
    line: int = 1


def quoted(grammar: str, field: str) -> str:
    """The grammar.

    Raises:
        InvalidInput: it has a part that can't be written so; ``field`` is named.
    """
    line = 1
    tokens: list[_Token] = []
    try:
        at = 0
        while at < len(grammar):
            found = _TOKENS.match(grammar, at)
            if found is None:
                raise ValueError(f"{grammar[at : at + 24].splitlines()[0]!r} can't stand where calls are JSON")
            tokens.append(_token(found, line))
            line, at = line + found[0].count("\n"), found.end()
        if all(token.written == token.text for token in tokens):
            return grammar
        return _as_terminals(tokens)
    except _Wrong as error:
        raise InvalidInput(f"{field}: line {error.line}: {error}", field) from None
    except ValueError as error:
        raise InvalidInput(f"{field}: line {line}: {error}", field) from None


class _Wrong(ValueError):
    def __init__(self, why: str, line: int) -> None:
        super().__init__(why)
        self.line = line


def _token(found: re.Match[str], line: int) -> _Token:
    """Raises ValueError: why it can't be written."""
    text = found[0]
    for kind in ("head", "imports"):
        if found[kind] is not None:
            name = found["name"] or found["alias"] or found["one"] or ""
            if found["attributes"]:
                raise ValueError(f"{text.strip()} attributes and priorities can't be used where calls are JSON")
            return _Token(kind, text, _imports(found) if kind == "imports" else text, name, line)
    match str(found.lastgroup):
        case "text":
            return _Token("text", text, _text(text), line=line)
        case "range":
            first, last = (str(json.loads(each)) for each in re.findall(r'"(?:\\.|[^"\\])+"', text))
            if len(first) != 1 or len(last) != 1:
                raise ValueError(f"{text}: a range is from one character to another")
            pattern = f"[{_in_class(first)}-{_in_class(last)}]"
            written = quoted_pattern(pattern)
            return _Token("range", text, text if written == pattern else f"/{written}/", line=line)
        case "pattern":
            pattern, _, flags = text[1:].rpartition("/")
            written = quoted_pattern(f"(?{flags}:{pattern})" if flags else pattern)
            return _Token("pattern", text, text if written == f"(?{flags}:{pattern})" else f"/{written}/", line=line)
        case kind:
            return _Token(kind, text, text, text if kind == "word" else "", line)


def _as_terminals(tokens: list[_Token]) -> str:
    """All rules as terminals. Raises ValueError: they can't be."""
    used: dict[str, set[str]] = {}
    current = ""
    for token in tokens:
        if token.kind == "head":
            current = token.name
            used.setdefault(current, set())
        elif token.kind == "word":
            used.setdefault(current, set()).add(token.name)
        elif token.kind == "ignore":
            raise _Wrong("%ignore can't be used where calls are JSON, beside characters that JSON escapes", token.line)
    _check_not_in_itself(used, tokens)
    names = {name: f"T{number}_{name.upper()}" for number, name in enumerate(used)}
    made = [f"start: {names['start']}\n"] if "start" in names else []
    for token in tokens:
        match token.kind:
            case "head":
                made.append(f"{names[token.name]}:")
            case "word":
                made.append(names.get(token.name, token.name))
            case "imports":
                made.append(re.sub(r"(?m)^(?!%)\w+(?=:)", lambda found: names.get(found[0], found[0]), token.written))
            case "plain":
                made.append({"[": "(", "]": ")?"}.get(token.text, token.text))
            case "comment" | "label":
                pass
            case _:
                made.append(token.written)
    return "".join(made)


def _check_not_in_itself(used: Mapping[str, set[str]], tokens: list[_Token]) -> None:
    whole: set[str] = set()  # those that are known not to contain themselves
    lines = {token.name: token.line for token in tokens if token.kind == "head"}
    waiting = [name for name in used if name]
    while waiting:
        missing = [name for name in waiting if not (used[name] & used.keys()) <= whole]
        if len(missing) == len(waiting):
            why = f"{missing[0]} contains itself, or such a rule: that can't be held where calls are JSON, beside characters that "
            raise _Wrong(f"{why}JSON escapes", lines.get(missing[0], 1))
        whole.update(name for name in waiting if name not in missing)
        waiting = missing


def _text(token: str) -> str:
    text = str(json.loads(token.removesuffix("i")))
    written = quoted_text(text)
    if written == text:
        return token
    if not token.endswith("i"):
        return json.dumps(written, ensure_ascii=False)
    return f"/{quoted_pattern('(?i:' + ''.join(map(_in_class, text)) + ')')}/"


def _in_class(char: str) -> str:
    """A character in a pattern, whatever it is elsewhere."""
    return char if char.isalnum() else f"\\x{{{ord(char):x}}}"


def _imports(found: re.Match[str]) -> str:
    names = [found["one"]] if found["one"] else [name.strip() for name in (found["many"] or "").split(",") if name.strip()]
    if all(name in _IMPORTED for name in names):
        return found[0]
    lines = []
    for name in names:
        alias = found["alias"] or name
        if name in _WRITTEN:
            lines.append(f"{alias}: /{quoted_pattern(_WRITTEN[name])}/")
        elif name in _IMPORTED:
            lines.append(f"%import common.{name}")
        else:
            raise ValueError(f"common.{name} can't be used where calls are JSON")
    return "\n".join(lines)
