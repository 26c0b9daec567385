"""Every format's recorded answer at every cut, and through every door, whole and streamed: the same calls."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import anthropic
import openai
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from antiphon.gateway.text.chat_options import Tool
from antiphon.gateway.text.detokenizer import ByteLevelDetokenizer
from antiphon.gateway.text.dialect import TextFormats
from antiphon.gateway.text.events import EventParser, ParserSpec, Part, merged
from antiphon.gateway.text.folded import Folded
from antiphon.gateway.text.formats.registry import CALL_FORMATS, THOUGHT_FORMATS, call_format, thought_format


def _beside(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault(name, importlib.util.module_from_spec(spec))
    if module.__spec__ is spec:
        spec.loader.exec_module(module)
    return module


recorded = _beside("recorded_answers", Path(__file__).with_name("recorded.py"))
odd = _beside("odd_answers", Path(__file__).with_name("odd.py"))
fake = _beside("doors_fake_engine", Path(__file__).parents[1] / "doors" / "fake_engine.py")

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "where": {"type": "object"},
        "sure": {"type": "boolean"},
        "code": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "place": {"$ref": "#/$defs/place"},
        "level": {"enum": ["low", "2", None]},
    },
    "$defs": {"place": {"type": ["string", "null"]}},
}
NAMES = ("weather", "now")
QUESTION: list[Any] = [{"role": "user", "content": "what is it?"}]
TEMPLATE = (
    "{{ tools }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORMATS = pytest.mark.parametrize("name", [form.name for form in CALL_FORMATS])


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    """One token a byte, and tokens of several bytes that end within characters."""
    of_bytes = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    of_bytes.decoder = decoders.ByteLevel()
    trained = fake.make_checkpoint(tmp_path_factory.mktemp("tokenizer")) / "tokenizer.json"
    return [of_bytes, Tokenizer.from_file(str(trained))]


def read(name: str, pieces: list[str]) -> tuple[Part, ...]:
    form = call_format(name, None)
    assert form is not None
    thoughts = thought_format(recorded.RECORDED[name].reasoning, None)
    machine = form.machine([Tool(name=NAMES[0], parameters=PARAMETERS), Tool(name=NAMES[1])])
    parser = EventParser(ParserSpec(thoughts=thoughts, may_think=thoughts is not None, calls=machine))
    parts = [part for piece in pieces for part in parser.feed(piece)]
    return merged([*parts, *parser.finish(truncated=False)])


def test_every_format_has_a_recorded_answer_and_every_way_to_think() -> None:
    assert set(recorded.RECORDED) == {form.name for form in CALL_FORMATS}
    thought_of = {answer.reasoning for answer in recorded.RECORDED.values()} - {"none"}
    assert thought_of >= {form.name for form in THOUGHT_FORMATS} - {"seed"}  # which differs from "think" in its marks alone


@FORMATS
def test_a_recorded_answer_cut_at_every_byte_and_token_gives_the_same_calls(name: str, tokenizers: list[Tokenizer]) -> None:
    answer = recorded.RECORDED[name]
    whole = read(name, [answer.raw])
    result = Folded()
    for part in whole:
        result.add(part)
    assert [(call.name, json.loads(call.arguments)) for call in result.calls] == list(answer.calls)
    assert all(call.is_whole for call in result.calls)
    assert (result.thought, result.text) == (answer.thought, answer.text)
    for tokenizer in tokenizers:
        detokenizer = ByteLevelDetokenizer(tokenizer, ())
        pieces = [*(detokenizer.feed(i) for i in tokenizer.encode(answer.raw).ids), detokenizer.flush()]
        assert "".join(pieces) == answer.raw
        assert read(name, pieces) == whole
        for cut in range(1, len(pieces)):
            assert read(name, ["".join(pieces[:cut]), "".join(pieces[cut:])]) == whole, pieces[:cut]


@pytest.mark.parametrize(("name", "raw", "text", "calls", "is_whole"), odd.ODD)
def test_an_odd_answer_means_the_same_at_every_cut(
    name: str, raw: str, text: str, calls: list[tuple[str, Any]], is_whole: bool, tokenizers: list[Tokenizer]
) -> None:
    whole = read(name, [raw])
    result = Folded()
    for part in whole:
        result.add(part)
    assert result.text == text
    assert [(c.name, json.loads(c.arguments) if c.is_whole else c.arguments) for c in result.calls] == calls
    assert all(call.is_whole for call in result.calls) == is_whole
    for tokenizer in tokenizers:
        detokenizer = ByteLevelDetokenizer(tokenizer, ())
        pieces = [*(detokenizer.feed(i) for i in tokenizer.encode(raw).ids), detokenizer.flush()]
        assert read(name, pieces) == whole
        for cut in range(1, len(pieces)):
            assert read(name, ["".join(pieces[:cut]), "".join(pieces[cut:])]) == whole, pieces[:cut]


@FORMATS
async def test_every_door_gives_a_recorded_answer_s_calls_streamed_as_whole(name: str, tmp_path: Path) -> None:
    answer = recorded.RECORDED[name]
    script = Tokenizer.from_file(str(fake.make_checkpoint(tmp_path / "tokenizer") / "tokenizer.json")).encode(answer.raw).ids
    formats = {"tiny": TextFormats(tool=name, reasoning=answer.reasoning)}
    functions = [{"name": tool, "parameters": PARAMETERS} for tool in NAMES]
    expected = (list(answer.calls), answer.text, answer.thought)
    async with (
        fake.world(tmp_path, chat_template=TEMPLATE, script=script, max_model_len=4096, gateway={"formats": formats}) as world,
        openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0) as client,
        anthropic.AsyncAnthropic(base_url=world.url, api_key="none", max_retries=0) as messages,
    ):
        chat: dict[str, Any] = {"model": "tiny", "messages": QUESTION}
        chat["tools"] = [{"type": "function", "function": function} for function in functions]
        whole = await client.chat.completions.create(**chat)
        async with client.chat.completions.stream(**chat) as stream:
            async for _ in stream:
                pass
            streamed = await stream.get_final_completion()
        for choice in (whole.choices[0], streamed.choices[0]):
            calls = [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls or ()]
            assert choice.finish_reason == "tool_calls"
            thought = (choice.message.model_extra or {}).get("reasoning_content") or ""
            assert (calls, choice.message.content or "", thought) == expected

        asked: dict[str, Any] = {"model": "tiny", "input": "what?", "tools": [{"type": "function", **f} for f in functions]}
        async with client.responses.stream(**asked) as events:
            async for _ in events:
                pass
            response = await events.get_final_response()
        for made in (await client.responses.create(**asked), response):
            items: list[Any] = list(made.output)
            calls = [(item.name, json.loads(item.arguments)) for item in items if item.type == "function_call"]
            thoughts = [part.text for item in items if item.type == "reasoning" for part in item.content or item.summary]
            assert (calls, made.output_text, "".join(thoughts)) == expected

        told: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "max_tokens": 2000}
        told["tools"] = [{"name": tool, "input_schema": PARAMETERS} for tool in NAMES]
        async with messages.messages.stream(**told) as parts:
            message = await parts.get_final_message()
        for said in (await messages.messages.create(**told), message):
            blocks: list[Any] = list(said.content)
            assert said.stop_reason == "tool_use"
            calls = [(block.name, block.input) for block in blocks if block.type == "tool_use"]
            texts = ["".join(getattr(b, kind) for b in blocks if b.type == kind) for kind in ("text", "thinking")]
            assert (calls, *texts) == expected
