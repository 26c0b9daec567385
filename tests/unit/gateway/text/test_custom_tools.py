"""Tools that are called with a text: what models write for it, what holds it to its grammar, and what comes out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from antiphon.core.errors import InvalidInput
from antiphon.gateway.text.answer_grammar import answer_grammar
from antiphon.gateway.text.chat_options import ChatOptions, Tool, ToolCall
from antiphon.gateway.text.custom.inputs import InputReader, as_arguments, tool_of_text
from antiphon.gateway.text.custom.lark import quoted
from antiphon.gateway.text.events import EventParser, ParserSpec, merged
from antiphon.gateway.text.folded import Folded
from antiphon.gateway.text.formats.base import CallFormat
from antiphon.gateway.text.formats.registry import CALL_FORMATS

FORMATS = pytest.mark.parametrize("form", CALL_FORMATS, ids=lambda form: form.name)
BYTES = LLTokenizer("byte")
# A patch, as agents ask for one.
PATCHES = """start: begin_patch hunk+ end_patch
begin_patch: "*** Begin Patch" LF
end_patch: "*** End Patch" LF?

hunk: add_hunk | update_hunk
add_hunk: "*** Add File: " filename LF add_line+
update_hunk: "*** Update File: " filename LF change?

filename: /(.+)/
add_line: "+" /(.*)/ LF -> line
change: (change_context | change_line)+ eof_line?
change_context: ("@@" | "@@ " /(.+)/) LF
change_line: ("+" | "-" | " ") /(.*)/ LF
eof_line: "*** End of File" LF

%import common.LF
"""
PATCH = '*** Begin Patch\n*** Update File: a "b".py\n@@ def f():\n-x = "\\n"\n+\ty = 1  # 世界\n*** End Patch'


def accepts(grammar: str, text: str) -> bool:
    matcher = LLMatcher(BYTES, grammar)
    assert not matcher.is_error(), matcher.get_error()
    written = list(text.encode())
    return bool(matcher.try_consume_tokens(written) == len(written) and matcher.is_accepting())


def as_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def patch_tool(syntax: Any = "lark", definition: str = PATCHES) -> Tool:
    return tool_of_text("apply_patch", "Edits files", syntax=syntax, definition=definition, field="tools[0].custom.format")


def called(form: CallFormat, tool: Tool, pieces: list[str]) -> Folded:
    spec = ParserSpec(calls=form.machine((tool,)), custom=frozenset([tool.name]))
    parser = EventParser(spec)
    parts = [part for piece in pieces for part in parser.feed(piece)]
    result = Folded()
    for part in merged([*parts, *parser.finish(truncated=False)]):
        result.add(part)
    return result


# Of formats with tags, the text stands between them: marks of its own, and white space at its edges, are the format's.
texts = st.text(st.characters(codec="utf-8", exclude_characters="<｜"), min_size=1, max_size=30).filter(lambda s: s == s.strip())


@FORMATS
@given(text=texts)
@example(text=PATCH)
@example(text='{"input": "x"}')
@settings(max_examples=20, deadline=None)
def test_the_text_comes_out_as_it_was_meant_at_every_cut(form: CallFormat, text: str) -> None:
    tool = tool_of_text("note", None, field="tools")
    answer = form.write([ToolCall(id="", name="note", arguments=as_arguments(text))])
    whole = called(form, tool, [answer])
    assert [(call.name, call.is_custom, call.arguments, call.is_whole) for call in whole.calls] == [("note", True, text, True)]
    for cut in range(len(answer) + 1):
        assert called(form, tool, [answer[:cut], answer[cut:]]) == whole
    assert called(form, tool, list(answer)) == whole


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"input": "a\\nb"}', "a\nb"),
        ('{"input":"\\ud83d\\ude00 \\u00e9"}', "😀 é"),
        ('{"input": "\\ud83d!"}', "\ufffd!"),
        ('{"input": "a", "more": "b"}', "a"),
        ('{"patch": "a\\"b"}', 'a"b'),
        ('{"more": 1, "input": "a"}', "a"),
        ('"a\\tb"', "a\tb"),
        ("{}", ""),
        ('{"input": 5}', '{"input": 5}'),
        ("*** Begin Patch", "*** Begin Patch"),
        (" " * 999 + '{"input": "a"}', "a"),
    ],
)
def test_a_model_that_is_held_to_nothing_is_understood_all_the_same(arguments: str, expected: str) -> None:
    for pieces in ([arguments], list(arguments)):
        reader = InputReader()
        assert "".join(map(reader.feed, pieces)) + reader.finish() == expected


GRAMMARS = [
    r"start: /[\n\t]+/",
    r"start: /\s\S/",
    r'start: /(?i)a\n"b[x"]/',
    r"start: /(?s:.)./",
    r'start: "A\"b"i',
    r'start: /[^"]*/',
    r"start: /\p{P}\P{L}/",
    r"start: /\x41\x0a\u{22}/",
    'start: "!".."/" | "é"',
    'start: " ".."a"',
    "start: W X\n%import common.ESCAPED_STRING -> W\n%import common (NEWLINE, INT)\nX: NEWLINE INT",
    r"start: /[\\\]]/ | /[]a]b/",
    'start: A{1,3} b*\nA: /["a]/ & /[^b]/\nb: "q" ~ 2 -> c',
    'start: a [b]\n?a: "x\\n" // comment "\n!b: "x" | "\\\\"',
    'start: "x" | "(" start ")"',
]


@pytest.mark.parametrize("grammar", GRAMMARS)
@given(text=st.text('ab"\\\n\t /!x1Aéq\x01.(),', max_size=4))
@example(text='a\n"bx')
@example(text='A\n"')
@example(text='"a"\n1')
@example(text="((x))")
@example(text="x\nx")
@example(text='""qq')
@settings(max_examples=60, deadline=None)
def test_a_text_in_json_is_held_to_what_it_is_held_to_by_itself(grammar: str, text: str) -> None:
    assert accepts(quoted(grammar, "f"), as_json(text)) == accepts(grammar, text)


@pytest.mark.parametrize("text", [PATCH, PATCH + "\n", PATCH[:-2], PATCH.replace("\n@@", "\n##"), "*** Begin Patch\n*** End Patch"])
def test_a_patch_in_json_is_a_patch(text: str) -> None:
    assert accepts(quoted(PATCHES, "f"), as_json(text)) == accepts(PATCHES, text)


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        ('start: "\\"" | "(" start ")"', "line 1: start contains itself"),
        ('start: "x"\nA: /x/ & ~/y/', "line 2: '~/y/' can't stand"),
        ("start: <think>", "line 1: '<think>' can't stand"),
        ("start: %json {}", "line 1: '%json {}' can't stand"),
        ("start: /[a&&b]/", "line 1: [a&&b]: classes made of classes"),
        ('start: "\\n"\n%ignore /x/', "line 2: %ignore can't be used"),
        ("%import common.C_COMMENT\nstart: C_COMMENT", "common.C_COMMENT can't be used"),
        ('start[stop="\\n"]: /x/', "attributes and priorities"),
    ],
)
def test_what_json_cannot_hold_is_refused_with_its_line(grammar: str, why: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        quoted(grammar, "tools[0].custom.format.grammar.definition")
    assert raised.value.field == "tools[0].custom.format.grammar.definition"
    assert why in str(raised.value)


@FORMATS
@pytest.mark.parametrize("syntax", ["lark", "regex"])
def test_every_format_holds_a_call_to_its_grammar(form: CallFormat, syntax: str) -> None:
    tool = patch_tool() if syntax == "lark" else patch_tool("regex", r"[a-z/]+\n\d{2}")
    right, wrong = (PATCH, PATCH.replace("\n@@", "\n##")) if syntax == "lark" else ("ab/\n12", "ab/ 12")
    options = ChatOptions(tools=(tool,), tool_choice="required", parallel_tool_calls=False)
    grammar, field = answer_grammar(options, (tool,), form, None, is_open=False, special_tokens={})
    assert grammar is not None
    assert field == "tools[0].custom.format"
    for text, is_right in ((right, True), (wrong, False)):
        answer = form.write([ToolCall(id="", name=tool.name, arguments=as_arguments(text))])
        assert accepts(grammar, answer) == is_right, answer


def test_a_text_without_a_grammar_binds_nothing() -> None:
    tool = tool_of_text("note", None, field="tools")
    grammar, _ = answer_grammar(ChatOptions(tools=(tool,)), (tool,), CALL_FORMATS[-1], None, is_open=False, special_tokens={})
    assert grammar is None
