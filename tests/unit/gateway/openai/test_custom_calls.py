"""Custom tools through OpenAI's doors: how clients ask for them, what they get, and how it comes back in a history."""

from __future__ import annotations

from typing import Any

import pytest

from antiphon.core.errors import InvalidInput
from antiphon.core.request import FinishReason
from antiphon.gateway.generation.request import ChoiceDelta, Started, Usage
from antiphon.gateway.openai.answers import Answer
from antiphon.gateway.openai.parsing import parse
from antiphon.gateway.openai.responses import ResponseWriter
from antiphon.gateway.openai.responses_schema import ResponsesBody
from antiphon.gateway.openai.schema import ChatBody
from antiphon.gateway.text.parts import CallArguments, CallBegin, CallEnd, Part

GRAMMAR = {"syntax": "regex", "definition": "[a-z]+"}
NESTED = {"type": "custom", "custom": {"name": "note", "description": "d", "format": {"type": "grammar", "grammar": GRAMMAR}}}
FLAT = {"type": "custom", "name": "note", "description": "d", "format": {"type": "grammar", **GRAMMAR}}
PARTS: tuple[Part, ...] = (
    CallBegin(index=0, name="note", is_custom=True),
    CallArguments(index=0, text='a "b"'),
    CallArguments(index=0, text="\nc"),
    CallEnd(index=0),
)
STARTED = Started(request_id="r", created=1, model="m", seed=1, num_prompt_tokens=1, prompt_texts=("x",))
USAGE = Usage(
    num_prompt_tokens=1,
    num_completion_tokens=1,
    num_cached_tokens=0,
    num_remote_tokens=0,
    num_resumptions=0,
    first_token_s=0.0,
    finished_s=0.0,
)


def responses(**fields: Any) -> ResponsesBody:
    return parse(ResponsesBody, {"model": "m", "input": "x", **fields})


def chat(**fields: Any) -> ChatBody:
    return parse(ChatBody, {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields})


def deltas() -> list[ChoiceDelta]:
    last = len(PARTS) - 1
    return [
        ChoiceDelta(index=0, text="", parts=(part,), finish_reason=FinishReason.STOP if number == last else None)
        for number, part in enumerate(PARTS)
    ]


@pytest.mark.parametrize("tool", [NESTED, FLAT])
@pytest.mark.parametrize("choice", [{"type": "custom", "name": "note"}, {"type": "custom", "custom": {"name": "note"}}])
def test_both_doors_take_both_ways_of_writing_a_tool_and_a_choice(tool: Any, choice: Any) -> None:
    of_chat = chat(tools=[tool], tool_choice=choice).request(request_id="r", deadline_s=None, traceparent=None).options
    body = responses(tools=[tool], tool_choice=choice)
    of_responses = body.request(body.messages(), request_id="r", deadline_s=None, traceparent=None).options
    for options in (of_chat, of_responses):
        (made,) = options.tools
        assert made.is_custom
        assert made.grammar == "start: /[a-z]+/"
        assert (options.tool_choice, options.tool_names) == ("required", ("note",))


def asked_for(tool: Any) -> None:
    body = responses(tools=[tool])
    body.request(body.messages(), request_id="r", deadline_s=None, traceparent=None)


@pytest.mark.parametrize(
    ("tool", "field"),
    [
        ({"type": "custom", "name": "note", "format": {"type": "grammar"}}, "tools[0].custom.format.grammar.syntax"),
        ({"type": "custom", "name": "note", "format": {"type": "xml"}}, "tools[0].custom.format.type"),
        ({"type": "custom", "name": "no te"}, "tools[0].custom.name"),
        ({"type": "web_search"}, "tools[0].type"),
    ],
)
def test_what_is_wrong_with_a_tool_is_named(tool: Any, field: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        asked_for(tool)
    assert raised.value.field == field
    assert tool["type"] == "custom" or "there are function and custom" in str(raised.value)


def test_a_chat_shows_the_text_whole_and_as_it_comes() -> None:
    whole, streamed = (Answer(chat=True, num_logprobs=None) for _ in range(2))
    for answer in (whole, streamed):
        answer.start(STARTED)
    chunks = []
    for delta in deltas():
        whole.add(delta)
        chunks += streamed.chunks(delta)
    (choice,) = whole.body(USAGE)["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert call == {"id": call["id"], "type": "custom", "custom": {"name": "note", "input": 'a "b"\nc'}}
    shown = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert shown[0] == {"index": 0, "id": call["id"], "type": "custom", "custom": {"name": "note", "input": ""}}
    assert "".join(each["custom"]["input"] for each in shown) == 'a "b"\nc'


def test_responses_show_the_text_as_it_comes_and_whole() -> None:
    writer = ResponseWriter(responses(tools=[FLAT], tool_choice={"type": "custom", "name": "note"}))
    events = writer.start(STARTED)
    for delta in deltas():
        events += writer.add(delta)
    events += writer.end(USAGE)
    shown = [(event["type"], event.get("delta", event.get("input"))) for event in events[2:-1]]
    assert shown == [
        ("response.output_item.added", None),
        ("response.custom_tool_call_input.delta", 'a "b"'),
        ("response.custom_tool_call_input.delta", "\nc"),
        ("response.custom_tool_call_input.done", 'a "b"\nc'),
        ("response.output_item.done", None),
    ]
    body = events[-1]["response"]
    (item,) = body["output"]
    assert {key: item[key] for key in ("type", "name", "input", "status")} == {
        "type": "custom_tool_call", "name": "note", "input": 'a "b"\nc', "status": "completed",
    }  # fmt: skip
    assert body["tools"] == [FLAT]
    assert body["tool_choice"] == {"type": "custom", "name": "note"}
    # What is kept for a later request says the same.
    (call,) = writer.message().message().tool_calls
    assert (call.id, call.name, call.arguments) == (item["call_id"], "note", '{"input": "a \\"b\\"\\nc"}')


def test_a_history_with_such_calls_is_one_with_functions() -> None:
    call = {"type": "custom_tool_call", "call_id": "c", "name": "note", "input": 'a "b"', "id": "ctc_1", "status": "completed"}
    result = {"type": "custom_tool_call_output", "call_id": "c", "output": "done"}
    told = [message.message() for message in responses(input=[call, result]).messages()]
    said = {"id": "c", "type": "custom", "custom": {"name": "note", "input": 'a "b"'}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [said]},
        {"role": "tool", "tool_call_id": "c", "content": "done"},
    ]
    assert [message.message() for message in chat(messages=messages).messages] == told
    assert told[0].tool_calls[0].arguments == '{"input": "a \\"b\\""}'
    assert (told[1].role, told[1].tool_call_id, told[1].content) == ("tool", "c", "done")
