"""Responses, Messages and tokens: the same answers through other doors, with their own clients."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pydantic
import pytest

_spec = importlib.util.spec_from_file_location("doors_agents", Path(__file__).with_name("test_agents.py"))
assert _spec is not None
assert _spec.loader is not None
agents = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = agents
_spec.loader.exec_module(agents)

ANSWER = f"{agents.THOUGHT}</think>\n\nI look.\n{agents.CALL}"
FLAT_TOOL: dict[str, Any] = {"type": "function", **agents.WEATHER["function"]}


async def test_a_response_comes_whole_and_streamed_alike_and_is_gone_on_with(tmp_path: Path) -> None:
    async with agents.answering(tmp_path, ANSWER) as (world, client):
        asked: dict[str, Any] = {"model": "tiny", "input": "what is it?", "instructions": "Be brief.", "tools": [FLAT_TOOL]}
        whole = await client.responses.create(**asked)
        assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
        assert whole.output_text == "I look."
        assert whole.status == "completed"
        call: Any = whole.output[2]
        assert (call.name, call.arguments) == ("weather", '{"city": "Où?"}')
        assert whole.usage is not None
        assert whole.usage.output_tokens_details.reasoning_tokens > 0
        assert "Be brief." in agents.prompt_of(world)

        async with client.responses.stream(**asked) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.completed"
        assert {"response.output_text.delta", "response.function_call_arguments.delta"} <= set(kinds)
        assert final.output_text == whole.output_text
        last: Any = final.output[2]
        assert last.arguments == call.arguments

        result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"}]
        await client.responses.create(model="tiny", previous_response_id=whole.id, input=result)
        prompt = agents.prompt_of(world)
        assert prompt.index("what is it?") < prompt.index("I look.") < prompt.index("21 degrees")
        assert (await client.responses.retrieve(whole.id)).output_text == "I look."
        unkept = await client.responses.create(**asked, store=False)
        with pytest.raises(openai.BadRequestError) as refused:
            await client.responses.create(model="tiny", previous_response_id=unkept.id, input="x")
        assert refused.value.param == "previous_response_id"


@pytest.mark.parametrize(
    ("field", "value"), [("top_logprobs", 2), ("include", ["reasoning.encrypted_content", "message.output_text.logprobs"])]
)
async def test_a_response_says_that_it_has_no_log_probabilities(tmp_path: Path, field: str, value: Any) -> None:
    async with agents.answering(tmp_path, "</think>Yes.") as (_, client):
        asked: Any = {"model": "tiny", "input": "what is it?", field: value}
        with pytest.raises(openai.BadRequestError) as refused:
            await client.responses.create(**asked)
        assert refused.value.param == field
        await client.responses.create(model="tiny", input="x", top_logprobs=0, include=["reasoning.encrypted_content"])


async def test_a_kept_response_tells_what_it_answered_and_is_forgotten_when_asked(tmp_path: Path) -> None:
    async with agents.answering(tmp_path, "</think>Yes.") as (world, client):
        asked: Any = [{"role": "user", "content": text} for text in ("first", "second", "third")]
        kept = await client.responses.create(model="tiny", input=asked)
        newest: list[Any] = [item async for item in client.responses.input_items.list(kept.id, limit=2)]
        assert [item.content[0].text for item in newest] == ["third", "second", "first"]  # two pages
        page = await client.responses.input_items.list(kept.id, order="asc", limit=1)
        first: Any = page.data[0]
        assert (first.content[0].text, page.has_more) == ("first", True)
        counted = await client.responses.input_tokens.count(model="tiny", input="more", previous_response_id=kept.id)
        await client.responses.create(model="tiny", input="more", previous_response_id=kept.id)
        assert counted.input_tokens == len(world.engine.requests[-1].prompt_token_ids)
        await client.responses.delete(kept.id)
        for gone in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                await gone(kept.id)
        with pytest.raises(openai.BadRequestError):
            await client.responses.create(model="tiny", input="x", previous_response_id=kept.id)


async def test_a_message_has_the_shape_its_output_config_asks_for(tmp_path: Path) -> None:
    class City(pydantic.BaseModel):
        name: str

    async with (
        agents.answering(tmp_path, '</think>{"name": "Oslo"}') as (world, _),
        anthropic.AsyncAnthropic(base_url=world.url, api_key="none", max_retries=0) as client,
    ):
        asked: dict[str, Any] = {"model": "tiny", "max_tokens": 50, "messages": agents.QUESTION}
        parsed = await client.messages.parse(**asked, output_format=City)
        assert parsed.parsed_output == City(name="Oslo")
        grammar = world.engine.requests[-1].sampling.rules.grammar
        assert '"name"' in grammar
        await client.messages.create(
            **asked, extra_body={"output_format": {"type": "json_schema", "schema": City.model_json_schema()}}
        )
        assert '"name"' in world.engine.requests[-1].sampling.rules.grammar
        wrong: Any = {"format": {"type": "json_schema", "schema": {"not": {"type": "string"}}}}
        with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format\.schema"):
            await client.messages.create(**asked, output_config=wrong)


async def test_a_message_comes_whole_and_streamed_alike(tmp_path: Path) -> None:
    tool: Any = {"name": "weather", "input_schema": agents.WEATHER["function"]["parameters"]}
    async with (
        agents.answering(tmp_path, ANSWER) as (world, _),
        anthropic.AsyncAnthropic(base_url=world.url, api_key="none", max_retries=0) as client,
    ):
        history: Any = [
            {"role": "user", "content": "what is it?"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "x"}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "21 degrees"}]},
        ]
        asked: dict[str, Any] = {"model": "tiny", "max_tokens": 500, "messages": history, "tools": [tool], "system": "Be brief."}
        whole = await client.messages.create(**asked)
        assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]
        assert whole.stop_reason == "tool_use"
        used: Any = whole.content[2]
        assert (used.name, used.input) == ("weather", {"city": "Où?"})
        assert "21 degrees" in agents.prompt_of(world)
        assert "Be brief." in agents.prompt_of(world)

        async with client.messages.stream(**asked) as stream:
            final = await stream.get_final_message()
        assert [block.model_dump(exclude={"id"}) for block in final.content] == [
            block.model_dump(exclude={"id"}) for block in whole.content
        ]
        assert final.stop_reason == "tool_use"

        counted = await client.messages.count_tokens(model="tiny", messages=history, tools=[tool], system="Be brief.")
        assert counted.input_tokens == len(world.engine.requests[-1].prompt_token_ids)
        short = await client.messages.create(**{**asked, "max_tokens": 2})
        assert short.stop_reason == "max_tokens"
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(**{**asked, "model": "nobody"})


async def test_a_message_calls_a_named_tool_once_where_parallel_use_is_disabled(tmp_path: Path) -> None:
    tools: Any = [{"name": name, "input_schema": {"type": "object"}} for name in ("weather", "now")]
    async with (
        agents.answering(tmp_path, f"</think>{agents.CALL}") as (world, _),
        anthropic.AsyncAnthropic(base_url=world.url, api_key="none", max_retries=0) as client,
    ):
        asked: dict[str, Any] = {"model": "tiny", "max_tokens": 500, "messages": agents.QUESTION, "tools": tools}

        async def grammar(choice: Any) -> str:
            await client.messages.create(**asked, tool_choice=choice)
            return str(world.engine.requests[-1].sampling.rules.grammar)

        for kind in ({"type": "any"}, {"type": "tool", "name": "weather"}):
            several = await grammar(kind)
            once = await grammar({**kind, "disable_parallel_tool_use": True})
            assert several.replace(")*", "") != several
            assert ")*" not in once
            assert ('"now' in once.replace("\\", "")) == (kind["type"] == "any")
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"tool_choice": {"type": "tool"}}, "tool_choice"),
            ({"tool_choice": {"type": "any", "name": "weather"}}, "tool_choice"),
            ({"tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
            ({"tools": [*tools, tools[0]]}, r"tools\[2\]\.name"),
        ]
        for change, field in wrong:
            with pytest.raises(anthropic.BadRequestError, match=field):
                await client.messages.create(**{**asked, **change})


async def test_tokens_go_there_and_back(tmp_path: Path) -> None:
    async with agents.answering(tmp_path, "x") as (world, _), httpx.AsyncClient(base_url=world.url) as http:
        made = (await http.post("/tokenize", json={"model": "tiny", "prompt": "The choir answers"})).json()
        assert made["tokens"] == world.tokenizer.encode("The choir answers").ids
        assert made["count"] == len(made["tokens"])
        back = (await http.post("/detokenize", json={"model": "tiny", "tokens": made["tokens"]})).json()
        assert back["prompt"] == "The choir answers"
        chat = (await http.post("/tokenize", json={"model": "tiny", "messages": agents.QUESTION})).json()
        assert "<|im_start|>" in world.tokenizer.decode(chat["tokens"], skip_special_tokens=False)
        for tokens in ([10**7], [-1]):
            wrong = await http.post("/detokenize", json={"model": "tiny", "tokens": tokens})
            assert wrong.status_code == 400
            assert wrong.json()["error"]["param"].startswith("tokens")
        wrong = await http.post("/tokenize", json={"model": "tiny"})
        assert wrong.status_code == 400


async def test_an_event_is_one_line_wherever_unicode_ends_lines(tmp_path: Path) -> None:
    said = "a\u2028b\u2029c\x85d"
    chat: dict[str, Any] = {"model": "tiny", "stream": True, "max_tokens": 200}
    async with agents.answering(tmp_path, f"</think>{said}") as (world, _), httpx.AsyncClient(base_url=world.url) as http:
        for path, asked in (
            ("/v1/chat/completions", {"messages": agents.QUESTION}),
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/responses", {"input": "x", "max_tokens": None, "max_output_tokens": 200}),
            ("/v1/messages", {"messages": agents.QUESTION}),
        ):
            body = {name: value for name, value in {**chat, **asked}.items() if value is not None}
            answer = await http.post(path, json=body)
            assert answer.status_code == 200, answer.text
            events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: {")]
            assert len(events) > 1
            assert all(line.startswith(("data: ", "event: ", "id: ")) for line in answer.text.splitlines() if line), path
            assert all(mark in json.dumps(events, ensure_ascii=False) for mark in "\u2028\u2029\x85"), path


async def test_a_tool_that_failed_is_told_to_the_model(tmp_path: Path) -> None:
    async with (
        agents.answering(tmp_path, "</think>Oh.") as (world, _),
        anthropic.AsyncAnthropic(base_url=world.url, api_key="none", max_retries=0) as client,
    ):
        for content, shown in (("no such city", "Error: no such city"), ([], "Error<|im_end|>")):
            failed = {"type": "tool_result", "tool_use_id": "t1", "content": content, "is_error": True}
            used: Any = {"type": "tool_use", "id": "t1", "name": "weather", "input": {}}
            history: Any = [*agents.QUESTION, {"role": "assistant", "content": [used]}, {"role": "user", "content": [failed]}]
            await client.messages.create(model="tiny", max_tokens=20, messages=history)
            assert f"tool\n{shown}" in agents.prompt_of(world)


async def test_a_conversation_that_is_too_long_loses_its_first_turns_where_that_is_asked_for(tmp_path: Path) -> None:
    async with agents.answering(tmp_path, "</think>Yes.") as (world, client):
        turns: Any = []
        for number in range(40):
            turns += [{"role": "user", "content": f"{number}: {'la ' * 150}"}, {"role": "assistant", "content": f"answer {number}"}]
        asked: Any = {"model": "tiny", "instructions": "Be brief.", "input": [*turns, {"role": "user", "content": "and now?"}]}
        with pytest.raises(openai.BadRequestError) as refused:
            await client.responses.create(**asked, max_output_tokens=500)
        assert refused.value.code == "context_length_exceeded"
        kept = await client.responses.create(**asked, max_output_tokens=500, truncation="auto")
        assert kept.truncation == "auto"
        prompt = agents.prompt_of(world)
        assert "Be brief." in prompt
        assert "and now?" in prompt
        assert "answer 39" in prompt
        assert "\n0: la" not in prompt
        length = len(world.engine.requests[-1].prompt_token_ids)
        assert length + 500 <= 4096 < length + 500 + 400, "as many turns as fit"
        counted = await client.responses.input_tokens.count(**asked, truncation="auto")
        assert 4096 - 500 - 400 < counted.input_tokens < 4096
        goes_on = await client.responses.create(
            model="tiny", previous_response_id=kept.id, input="x", truncation="auto", max_output_tokens=90
        )
        assert goes_on.status == "completed"
        items = [item async for item in client.responses.input_items.list(kept.id, limit=100)]
        assert len(items) == 81, "what was said is kept whole"
        with pytest.raises(openai.BadRequestError):
            await client.responses.create(model="tiny", input="la " * 5000, truncation="auto")


async def test_a_response_that_was_cut_says_in_which_item(tmp_path: Path) -> None:
    async with agents.answering(tmp_path, "Hm.</think>A long answer that goes on.") as (_, client):
        cut: Any = await client.responses.create(model="tiny", input="x", max_output_tokens=20)
        assert cut.status == "incomplete"
        assert [item.status for item in cut.output] == ["completed", "incomplete"]
        whole: Any = await client.responses.create(model="tiny", input="x")
        assert [item.status for item in whole.output] == ["completed", "completed"]


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/responses", "conversation", "conv_1"),
        ("/v1/responses", "prompt", {"id": "p"}),
        ("/v1/messages", "mcp_servers", [{"type": "url", "url": "https://x.org", "name": "x"}]),
        ("/v1/messages", "container", "c"),
        ("/v1/chat/completions", "regex", "a+"),
        ("/v1/chat/completions", "bad_words", ["x"]),
        ("/v1/chat/completions", "documents", [{"text": "x"}]),
        ("/v1/chat/completions", "structured_outputs", {"structural_tag": "{}"}),
        ("/v1/chat/completions", "structured_outputs", {"regex": "a+", "whitespace_pattern": " ?"}),
        ("/v1/chat/completions", "structured_outputs", {"json": {}, "whitespace_pattern": "x*"}),
        ("/v1/completions", "use_beam_search", True),
        ("/tokenize", "add_special_tokens", True),
    ],
)
async def test_a_field_that_would_change_the_answer_is_not_left_out_in_silence(
    tmp_path: Path, path: str, field: str, value: Any
) -> None:
    said: dict[str, Any] = {"model": "tiny", "max_tokens": 8}
    if path == "/v1/responses":
        said = {"model": "tiny", "input": "x"}
    elif path == "/v1/completions":
        said["prompt"] = "x"
    else:
        said["messages"] = agents.QUESTION
    if path == "/tokenize":
        del said["max_tokens"]
    async with agents.answering(tmp_path, "</think>Yes.") as (world, _), httpx.AsyncClient(base_url=world.url) as http:
        assert (await http.post(path, json=said)).status_code == 200
        refused = await http.post(path, json={**said, field: value})
        assert refused.status_code == 400, refused.text
        assert field in refused.json()["error"]["message"]


async def test_a_chat_has_the_tokens_that_its_answer_begins_after(tmp_path: Path) -> None:
    begun = [*agents.QUESTION, {"role": "assistant", "content": "It is a"}]
    async with agents.answering(tmp_path, " song.") as (world, _), httpx.AsyncClient(base_url=world.url) as http:
        for chat in (
            {"messages": agents.QUESTION},
            {"messages": agents.QUESTION, "chat_template_kwargs": {"enable_thinking": False}},
            {"messages": begun, "continue_final_message": True},
            {"messages": begun, "add_generation_prompt": False},
        ):
            await http.post("/v1/chat/completions", json={"model": "tiny", "max_tokens": 2, **chat})
            made = (await http.post("/tokenize", json={"model": "tiny", **chat})).json()
            assert made["tokens"] == list(world.engine.requests[-1].prompt_token_ids), chat
        wrong = await http.post("/tokenize", json={"model": "tiny", "prompt": "x", "continue_final_message": True})
        assert wrong.json()["error"]["param"] == "continue_final_message"


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ('{"city": "\\ud83c!"}', {"city": "\ufffd!"}),
        ('{"city": 1e999}', {"_raw": '{"city": 1e999}'}),
        ('{"city": NaN, "sure": True}', {"city": None, "sure": True}),
    ],
)
async def test_arguments_that_json_has_no_place_for_are_shown(tmp_path: Path, written: str, shown: Any) -> None:
    call = f'</think><tool_call>\n{{"name": "weather", "arguments": {written}}}\n</tool_call>'
    tool: Any = {"name": "weather", "input_schema": agents.WEATHER["function"]["parameters"]}
    async with (
        agents.answering(tmp_path, call) as (world, client),
        anthropic.AsyncAnthropic(base_url=world.url, api_key="none", max_retries=0) as messages,
    ):
        said: Any = await messages.messages.create(model="tiny", max_tokens=300, messages=agents.QUESTION, tools=[tool])
        assert said.content[0].input == shown
        whole = await client.chat.completions.create(model="tiny", messages=agents.QUESTION, tools=[agents.WEATHER])
        assert whole.choices[0].finish_reason == "tool_calls"
