"""Tools, thoughts and shapes through the HTTP door, with OpenAI's own client, over an engine that answers what the test says."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest

from antiphon.core.errors import StructureRefused
from antiphon.worker.structure import checking

_spec = importlib.util.spec_from_file_location("doors_fake_engine", Path(__file__).with_name("fake_engine.py"))
assert _spec is not None
assert _spec.loader is not None
fake = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
if not hasattr(fake, "world"):
    _spec.loader.exec_module(fake)

QUESTION = [{"role": "user", "content": "what is it?"}]
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is not defined or enable_thinking %}<think>\n"
    "{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How it is outside",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Où?"}}\n</tool_call>'
THOUGHT = "Hm, let me see."


@asynccontextmanager
async def answering(tmp_path: Path, text: str, **options: Any) -> AsyncIterator[tuple[Any, openai.AsyncOpenAI]]:
    """A world whose model has tools and thoughts, and always answers ``text``."""
    checkpoint = fake.make_checkpoint(tmp_path / "tokenizer")
    script = fake.Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text).ids
    async with (
        fake.world(tmp_path, chat_template=TEMPLATE, script=script, max_model_len=4096, **options) as world,
        openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0, timeout=30) as client,
    ):
        yield world, client


def prompt_of(world: Any, number: int = -1) -> str:
    return str(world.tokenizer.decode(list(world.engine.requests[number].prompt_token_ids), skip_special_tokens=False))


async def test_a_call_comes_whole_and_streamed_alike(tmp_path: Path) -> None:
    async with answering(tmp_path, f"{THOUGHT}</think>\n\nI look.\n{CALL}\n{CALL}") as (world, client):
        whole = await client.chat.completions.create(model="tiny", messages=QUESTION, tools=[WEATHER])
        message = whole.choices[0].message
        assert whole.choices[0].finish_reason == "tool_calls"
        assert message.content == "I look."
        assert message.model_extra is not None
        assert message.model_extra["reasoning_content"] == message.model_extra["reasoning"] == THOUGHT
        assert message.tool_calls is not None
        assert [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls] == [
            ("weather", {"city": "Où?"})
        ] * 2
        assert len({call.id for call in message.tool_calls}) == 2
        assert whole.usage is not None
        assert whole.usage.completion_tokens_details is not None
        assert 0 < (whole.usage.completion_tokens_details.reasoning_tokens or 0) < whole.usage.completion_tokens
        assert "How it is outside" in prompt_of(world)

        async with client.chat.completions.stream(model="tiny", messages=QUESTION, tools=[WEATHER]) as stream:
            async for _ in stream:
                pass
            streamed = (await stream.get_final_completion()).choices[0]
        assert streamed.finish_reason == "tool_calls"
        assert streamed.message.content == "I look."
        assert streamed.message.tool_calls is not None
        assert [c.function.arguments for c in streamed.message.tool_calls] == [c.function.arguments for c in message.tool_calls]


async def test_functions_are_tools_by_their_older_name_and_called_one_at_a_time(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "functions": [WEATHER["function"]]}
    async with answering(tmp_path, f"{THOUGHT}</think>\n\nI look.\n{CALL}") as (world, client):
        whole = (await client.chat.completions.create(**asked)).choices[0]
        assert whole.finish_reason == "function_call"
        assert whole.message.tool_calls is None
        assert whole.message.function_call is not None
        assert (whole.message.function_call.name, whole.message.function_call.arguments) == ("weather", '{"city": "Où?"}')
        assert "How it is outside" in prompt_of(world)
        assert world.engine.requests[-1].sampling.rules.grammar is not None  # which has one call at most

        name, arguments, reasons = "", "", []
        async for chunk in await client.chat.completions.create(**asked, stream=True):
            called = chunk.choices[0].delta.function_call
            name += (called.name or "") if called else ""
            arguments += (called.arguments or "") if called else ""
            reasons.append(chunk.choices[0].finish_reason)
        assert (name, arguments, reasons[-1]) == ("weather", '{"city": "Où?"}', "function_call")

        history = [
            *QUESTION,
            {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}},
            {"role": "function", "name": "weather", "content": "21 degrees"},
        ]
        await client.chat.completions.create(**{**asked, "messages": history}, function_call="none")
        assert "<|im_start|>tool\n21 degrees" in prompt_of(world)
        assert world.engine.requests[-1].sampling.rules is None
        await client.chat.completions.create(**asked, function_call={"name": "weather"})
        for wrong, field in (({"tools": [WEATHER]}, "functions"), ({"function_call": {"name": "x"}}, "function_call")):
            with pytest.raises(openai.BadRequestError) as refused:
                await client.chat.completions.create(**asked, **wrong)
            assert refused.value.param == field


async def test_some_of_the_tools_may_be_called_and_all_are_shown(tmp_path: Path) -> None:
    other = {"type": "function", "function": {"name": "other", "parameters": {"type": "object", "properties": {}}}}
    allowed: Any = {"type": "function", "function": {"name": "weather"}}
    async with answering(tmp_path, f"</think>{CALL}") as (world, client):
        choice: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [allowed]}}
        await client.chat.completions.create(model="tiny", messages=QUESTION, tools=[WEATHER, other], tool_choice=choice)
        grammar = world.engine.requests[-1].sampling.rules.grammar
        assert "weather" in grammar
        assert "other" not in grammar
        assert '"other"' in prompt_of(world)
        flat: Any = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]}
        tools: Any = [{"type": "function", **WEATHER["function"]}, {"type": "function", **other["function"]}]
        answer = await client.responses.create(model="tiny", input="x", tools=tools, tool_choice=flat)
        assert answer.tool_choice.model_dump() == flat
        choice["allowed_tools"]["tools"] = [{"type": "function", "function": {"name": "none"}}]
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model="tiny", messages=QUESTION, tools=[WEATHER], tool_choice=choice)
        assert refused.value.param == "tool_choice"


async def test_a_call_that_is_cut_off_claims_nothing(tmp_path: Path) -> None:
    async with answering(tmp_path, f"</think>{CALL}") as (world, client):
        num_tokens = len(world.tokenizer.encode(f"</think>{CALL[:-20]}").ids)
        answer = await client.chat.completions.create(model="tiny", messages=QUESTION, tools=[WEATHER], max_tokens=num_tokens)
        assert answer.choices[0].finish_reason == "length"


async def test_calls_and_their_results_go_back_into_the_prompt(tmp_path: Path) -> None:
    async with answering(tmp_path, "</think>Fine.") as (world, client):
        call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "x"}'}}
        history: list[Any] = [
            *QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "thought"},
            {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "21 degrees"}]},
            {"role": "user", "content": [{"type": "text", "text": "and now?", "cache_control": {"type": "ephemeral"}}]},
        ]
        answer = await client.chat.completions.create(model="tiny", messages=history, tools=[WEATHER], verbosity="medium", top_p=0)
        assert answer.choices[0].message.content == "Fine."
        assert answer.choices[0].finish_reason == "stop"
        prompt = prompt_of(world)
        assert '<tool_call>weather {"city": "x"}</tool_call>' in prompt
        assert "<|im_start|>tool\n21 degrees" in prompt
        assert "and now?" in prompt


async def test_the_grammar_reaches_the_engine_and_parse_gives_a_model(tmp_path: Path) -> None:
    class Weather(pydantic.BaseModel):
        city: str
        degrees: int

    async with answering(tmp_path, f'{THOUGHT}</think>\n\n{{"city": "Paris", "degrees": 21}}') as (world, client):
        parsed = await client.chat.completions.parse(model="tiny", messages=QUESTION, response_format=Weather)
        assert parsed.choices[0].message.parsed == Weather(city="Paris", degrees=21)
        rules = world.engine.requests[-1].sampling.rules
        assert rules is not None
        assert rules.grammar is not None
        assert '"degrees"' in rules.grammar
        await client.chat.completions.create(model="tiny", messages=QUESTION, tools=[WEATHER])
        assert world.engine.requests[-1].sampling.rules is None  # tools that are not strict bind nothing
        for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
            await client.chat.completions.create(model="tiny", messages=QUESTION, tools=[WEATHER], tool_choice=choice)  # type: ignore[arg-type]
            assert "weather" in (world.engine.requests[-1].sampling.rules.grammar or "")


async def test_a_schema_beside_json_object_is_one(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"degrees": {"type": "integer"}}}
    async with answering(tmp_path, '</think>{"degrees": 21}') as (world, client):
        grammars = []
        for form in (
            {"type": "json_object", "schema": schema},
            {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
            {"type": "json_object"},
        ):
            asked = {"model": "tiny", "messages": QUESTION, "response_format": form}
            await client.post("/chat/completions", cast_to=object, body=asked)
            grammars.append(world.engine.requests[-1].sampling.rules.grammar)
        assert grammars[0] == grammars[1] != grammars[2]


async def test_a_named_function_is_called_once(tmp_path: Path) -> None:
    async with answering(tmp_path, f"</think>{CALL}") as (world, client):

        def grammar() -> str:
            rules = world.engine.requests[-1].sampling.rules
            assert rules is not None
            assert rules.grammar is not None
            return rules.grammar

        ask = {"model": "tiny", "messages": QUESTION, "tools": [WEATHER]}
        await client.post("/chat/completions", cast_to=object, body={**ask, "tool_choice": "required"})
        several = grammar()
        await client.post(
            "/chat/completions", cast_to=object, body={**ask, "tool_choice": "required", "parallel_tool_calls": False}
        )
        once = grammar()
        assert several != once
        named: Any = {"type": "function", "function": {"name": "weather"}}
        await client.post("/chat/completions", cast_to=object, body={**ask, "tool_choice": named})
        assert grammar() == once
        flat: Any = {"type": "function", "name": "weather"}
        await client.responses.create(
            model="tiny", input="x", tools=[{"type": "function", **WEATHER["function"]}], tool_choice=flat
        )
        assert grammar() == once


async def test_thinking_is_switched_bounded_and_hidden(tmp_path: Path) -> None:
    async with answering(tmp_path, f"{THOUGHT}</think>\n\nYes.") as (world, client):
        off = await client.chat.completions.create(model="tiny", messages=QUESTION, reasoning_effort="none")
        assert prompt_of(world).endswith("<think>\n\n</think>\n\n")
        assert off.choices[0].message.content == f"{THOUGHT}</think>\n\nYes."  # outside a thought it is text
        hidden = await client.chat.completions.create(model="tiny", messages=QUESTION, extra_body={"include_reasoning": False})
        assert hidden.choices[0].message.content == "Yes."
        assert "reasoning_content" not in (hidden.choices[0].message.model_extra or {})
        await client.chat.completions.create(model="tiny", messages=QUESTION, extra_body={"thinking_budget": 7})
        thinking = world.engine.requests[-1].sampling.rules.thinking
        assert (thinking.budget_tokens, thinking.is_open) == (7, True)
        assert list(thinking.end_token_ids) == world.tokenizer.encode("</think>").ids


def chained(count: int) -> dict[str, Any]:
    links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{count}": {"type": "integer"}}}


COSTLY_SCHEMAS: dict[str, Any] = {
    "patterns": {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b.*c{{{i * 3}}}"} for i in range(1, 30)]},
    "many patterns": {"allOf": [{"type": "string", "pattern": f"a{i}"} for i in range(1000)]},
    "many values": {"enum": [f"value{i * 7919}" for i in range(100_000)]},
    "a long value": {"enum": ["x" * 200_000]},
    "depth": json.loads('{"items":' * 150 + "{}" + "}" * 150),
    "references": chained(3000),
    "references in a ring": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "many options": {"anyOf": [{"properties": {f"k{i}": {}}, "required": [f"k{i}"], "type": "object"} for i in range(3000)]},
    "many properties": {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(5000)}},
    "a step": {"type": "integer", "multipleOf": 999_983},
}
COSTLY_SHAPES: dict[str, Any] = {
    "regex": "a" * 900_000,
    "choice": [f"value{i * 7919}" for i in range(100_000)],
    "grammar": "start: r0\n" + "\n".join(f'r{i}: "a{i}" r{i + 1} | "b" r{i + 1}' for i in range(8000)) + '\nr8000: "z"',
}
COSTLY: list[tuple[str, dict[str, Any], str]] = [
    *(
        (
            name,
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
            "response_format.json_schema.schema",
        )
        for name, schema in COSTLY_SCHEMAS.items()
    ),
    *(
        (kind, {"extra_body": {"structured_outputs": {kind: value}}}, f"structured_outputs.{kind}")
        for kind, value in COSTLY_SHAPES.items()
    ),
    (
        "words",
        {"extra_body": {"structured_outputs": {"grammar": "start: T\nT: /.*a.{14}/ & /.*b.{13}/ & ~/.*c.{12}/"}}},
        "structured_outputs.grammar",
    ),
    ("older names", {"extra_body": {"guided_regex": COSTLY_SHAPES["regex"]}}, "guided_regex"),
    *(
        (
            f"a tool of {name}",
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": schema}}]},
            "tools[0].function.parameters",
        )
        for name in ("depth", "a step")
        for schema in [
            {"type": "object", "properties": {"x": COSTLY_SCHEMAS[name]}, "$defs": COSTLY_SCHEMAS[name].get("$defs", {})}
        ]
    ),
]


async def test_expensive_shapes_end_by_name_and_delay_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 0.3 s of processor time of processes of their own: see ``CHECK_TIMEOUT_S``."""
    monkeypatch.setattr(checking, "CHECK_WAIT_S", 120.0)  # the tests' machine may be a busy one
    async with answering(tmp_path, "</think>{}") as (world, client):

        async def others() -> list[float]:
            waits = []
            while not done.is_set():
                begun_s = time.monotonic()
                await client.chat.completions.create(model="tiny", messages=QUESTION, response_format={"type": "json_object"})
                waits.append(time.monotonic() - begun_s)
            return waits

        done = asyncio.Event()
        other = asyncio.create_task(others())
        for name, fields, named in COSTLY:
            field = named
            with pytest.raises(openai.BadRequestError) as refused:
                await client.chat.completions.create(model="tiny", messages=QUESTION, timeout=130, **fields)
            if name.endswith("depth"):  # refused before anything is made of the body: by its first field
                field = field.partition(".")[0].partition("[")[0]
            assert refused.value.param == field, (name, refused.value)
        done.set()
        waits = await other
        assert len(waits) > len(COSTLY)  # each of them took less time than a refusal, in which one core has other work
        assert len(world.engine.requests) == len(waits)  # no worker saw any of them


async def test_bounds_that_are_large_but_cheap_are_taken(tmp_path: Path) -> None:
    cheap: list[dict[str, Any]] = [
        {"type": "array", "minItems": 10**9},
        {"type": "string", "minLength": 99_999, "maxLength": 10**9},
        {"type": "string", "pattern": "^((a+)+)+$"},
        {"type": "string", "pattern": "^(a{1,1000}){1,1000}$"},
        json.loads('{"items":' * 60 + "{}" + "}" * 60),
    ]
    async with answering(tmp_path, "</think>{}") as (_, client):
        for schema in cheap:
            shape: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            answer = await client.chat.completions.create(model="tiny", messages=QUESTION, response_format=shape)
            assert answer.choices[0].finish_reason == "stop"


async def test_unknown_fields_are_named_in_a_header_or_refused(tmp_path: Path) -> None:
    body = {"model": "tiny", "messages": [{**QUESTION[0], "mood": 1}], "max_tokens": 1, "num_ctx": 4096}
    async with answering(tmp_path, "x") as (world, _), httpx.AsyncClient() as http:
        answer = await http.post(f"{world.url}/v1/chat/completions", json=body)
        assert answer.status_code == 200
        assert "num_ctx" in answer.headers["warning"]
        assert "messages[0].mood" in answer.headers["warning"]
    async with (
        answering(tmp_path / "2", "x", gateway={"unknown_fields": "refuse"}) as (world, _),
        httpx.AsyncClient() as http,
    ):
        answer = await http.post(f"{world.url}/v1/chat/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_parameter")


async def test_an_answer_that_was_begun_is_continued(tmp_path: Path) -> None:
    async with answering(tmp_path, "is Paris.") as (world, client):
        messages: list[Any] = [*QUESTION, {"role": "assistant", "content": "The capital"}]
        await client.chat.completions.create(
            model="tiny", messages=messages, reasoning_effort="none", extra_body={"continue_final_message": True, "max_tokens": 3}
        )
        assert prompt_of(world).endswith("</think>\n\nThe capital")  # and no thought that is skipped comes behind it
        await client.chat.completions.create(
            model="tiny", messages=messages, extra_body={"continue_final_message": True, "max_tokens": 3, "thinking_budget": 9}
        )
        assert prompt_of(world).endswith("<think>\nThe capital")
        assert world.engine.requests[-1].sampling.rules.thinking.is_open


async def test_a_worker_prepares_a_grammar_before_its_engine_sees_the_request_and_may_refuse_it(tmp_path: Path) -> None:
    prepared: list[Any] = []

    def prepare(request: Any) -> None:
        prepared.append(request.request_id)
        if '"b"' in request.sampling.rules.grammar:
            raise StructureRefused("the grammar does not compile here", "grammar")

    async with answering(tmp_path, "</think>a", prepare=prepare) as (world, client):
        answer = await client.chat.completions.create(model="tiny", messages=QUESTION, extra_body={"guided_choice": ["a"]})
        assert answer.choices[0].message.content == "a"
        assert prepared == [request.request_id for request in world.engine.requests]
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model="tiny", messages=QUESTION, extra_body={"guided_choice": ["b"]})
        assert refused.value.param == "guided_choice"
        assert len(world.engine.requests) == 1
        await client.chat.completions.create(model="tiny", messages=QUESTION)
        assert len(prepared) == 2
