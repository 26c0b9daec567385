"""Answers to events: every format, however the text is cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.core.document.spec import ModelSpec
from antiphon.gateway.text.chat_options import Tool, ToolCall
from antiphon.gateway.text.events import EventParser, ParserSpec, Part, merged
from antiphon.gateway.text.folded import Folded
from antiphon.gateway.text.formats.base import CallFormat
from antiphon.gateway.text.formats.registry import CALL_FORMATS, THOUGHT_FORMATS, call_format, thought_format

TOOLS = (
    Tool(
        name="weather",
        parameters={
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "where": {"type": "object"},
                "all": {"type": "array"},
                "sure": {"type": "boolean"},
            },
        },
    ),
    Tool(name="now"),
)
THINK = THOUGHT_FORMATS[0]
FORMATS = pytest.mark.parametrize("form", CALL_FORMATS, ids=lambda form: form.name)

# Marks and braces inside values are the model's right: only a format's own closing marks are not.
words = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<｜"), max_size=20).map(str.strip)
values = st.fixed_dictionaries(
    {},
    optional={
        "city": words.filter(lambda s: "\n" not in s),
        "days": st.integers(-1000, 1000),
        "where": st.dictionaries(st.sampled_from(["a", "b"]), words, max_size=2),
        "all": st.lists(st.integers(0, 9) | words, max_size=3),
        "sure": st.booleans(),
    },
)
some_calls = st.lists(
    st.tuples(st.sampled_from(["weather"]), values).map(
        lambda made: ToolCall(id="", name=made[0], arguments=json.dumps(made[1], ensure_ascii=False))
    ),
    min_size=1,
    max_size=3,
)


def read(form: CallFormat | None, pieces: Sequence[str], *, truncated: bool = False, is_open: bool = False) -> tuple[Part, ...]:
    machine = None if form is None else form.machine(TOOLS)
    parser = EventParser(ParserSpec(thoughts=THINK, is_open=is_open, calls=machine))
    parts = [part for piece in pieces for part in parser.feed(piece)]
    return merged([*parts, *parser.finish(truncated=truncated)])


def folded(parts: Sequence[Part]) -> Folded:
    result = Folded()
    for part in parts:
        result.add(part)
    return result


def calls_of(parts: Sequence[Part]) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in folded(parts).calls]


@FORMATS
@given(calls=some_calls, thought=words, before=words)
@settings(max_examples=4, deadline=None)
def test_calls_come_out_as_they_were_written_at_every_cut(
    form: CallFormat, calls: list[ToolCall], thought: str, before: str
) -> None:
    text = f"{thought}</think>\n\n" + (f"{before}\n" if form.opening is not None else "") + form.write(calls)
    whole = read(form, [text], is_open=True)
    assert calls_of(whole) == [(call.name, json.loads(call.arguments)) for call in calls]
    assert folded(whole).thought == thought
    assert folded(whole).text == (before if form.opening is not None else "")
    assert all(call.is_whole for call in folded(whole).calls)
    assert read(form, list(text), is_open=True) == whole
    for cut in range(1, len(text)):
        assert read(form, [text[:cut], text[cut:]], is_open=True) == whole


@FORMATS
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_whatever_a_model_writes_the_cuts_change_nothing(form: CallFormat, data: st.DataObject) -> None:
    written = form.write([ToolCall(id="", name="weather", arguments='{"city": "x", "days": 1}')])
    pieces = [
        *form.markers,
        written,
        written[: len(written) // 2],
        "{",
        "}",
        '"',
        "[",
        "]",
        ",",
        "\\",
        "\n",
        " a ",
        "<think>",
        "</think>",
    ]
    text = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=8)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    truncated = data.draw(st.booleans())
    assert read(form, parts, truncated=truncated) == read(form, [text], truncated=truncated)


@FORMATS
def test_a_call_that_is_cut_short_is_never_whole(form: CallFormat) -> None:
    text = form.write([ToolCall(id="", name="weather", arguments='{"city": "Paris", "days": 3}')])
    ends = [
        end for end in range(len(text)) if all(call.is_whole for call in folded(read(form, [text[:end]], truncated=True)).calls)
    ]
    broken = [end for end in ends if folded(read(form, [text[:end]], truncated=True)).calls]
    assert all(calls_of(read(form, [text[:end]], truncated=True)) == [("weather", {"city": "Paris", "days": 3})] for end in broken)


@FORMATS
def test_an_answer_without_calls_is_its_text_to_the_letter(form: CallFormat) -> None:
    for text in ("Hello there. \n", "  spaces ", "a < b, [1, 2] and {x}", "", "\n"):
        if form.opening is None and text.strip().startswith("{"):
            continue
        assert folded(read(form, [text])).text == text


def test_json_that_is_no_call_stays_text_where_calls_are_json() -> None:
    form = call_format("llama3_json", None)
    for text in ('{"name": "someone", "parameters": {}}', '{"answer": 42}', "{not json"):
        assert folded(read(form, [text])).text == text


def test_arguments_may_come_before_the_name_or_as_text() -> None:
    form = call_format("hermes", None)
    early = '<tool_call>{"arguments": {"city": "x"}, "name": "weather"}</tool_call>'
    quoted = '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"x\\"}"}</tool_call>'
    assert calls_of(read(form, [early])) == calls_of(read(form, [quoted])) == [("weather", {"city": "x"})]


def test_thoughts_begin_only_at_the_beginning_and_end_once() -> None:
    made = folded(read(None, ["<think>\nhm\n</think>\n\nSo: <think> is a tag</think>"]))
    assert (made.thought, made.text) == ("hm", "So: <think> is a tag</think>")
    made = folded(read(None, ["No <think>thought</think>"]))
    assert (made.thought, made.text) == ("", "No <think>thought</think>")


TEMPLATES = {
    "hermes": "{% if tools %}<tool_call>{{ tools }}</tool_call>{% endif %}",
    "qwen3_coder": "{% if tools %}<tool_call><function=x>{% endif %}",
    "glm": "{% if tools %}<tool_call><arg_key>{% endif %}",
    "llama3_json": "{% if tools %}<|python_tag|>{% endif %}",
    "mistral": "{{ tools }}[TOOL_CALLS]",
    "mistral_args": "{{ tools }}[TOOL_CALLS][ARGS]",
    "deepseek_v3": "{{ tools }}<｜tool▁calls▁begin｜>```json",
    "deepseek_v31": "{{ tools }}<｜tool▁calls▁begin｜>",
    "step3": "{{ tools }}<steptml:invoke",
    "harmony": "{{ tools }}<|channel|>analysis<|message|>{{ m.thinking }}<|end|>",
}


def test_a_template_chooses_its_format() -> None:
    for name, template in TEMPLATES.items():
        form = call_format("auto", template)
        assert form is not None
        assert form.name == name
    assert call_format("auto", "no t00ls") is None
    assert thought_format("auto", "{{ x }}</think>") == THINK


def test_documents_name_the_formats_there_are() -> None:
    def allowed(field: str) -> set[str]:
        return set(ModelSpec.model_json_schema()["properties"][field]["enum"])

    assert allowed("toolFormat") == {"auto", "none", *(form.name for form in CALL_FORMATS)}
    assert allowed("reasoningFormat") == {"auto", "none", *(form.name for form in THOUGHT_FORMATS)}
