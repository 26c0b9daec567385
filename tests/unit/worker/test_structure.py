"""Grammars and thinking budgets: what is allowed is a function of the output's ids."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from antiphon.core.errors import InvalidInput, Overloaded
from antiphon.core.request import OutputRules, SamplingParams, ThinkingRules
from antiphon.gateway.text.answer_grammar import answer_grammar
from antiphon.gateway.text.chat_options import AnswerShape, ChatOptions, Tool, ToolCall
from antiphon.gateway.text.formats.base import CallFormat, ChannelFormat
from antiphon.gateway.text.formats.registry import CALL_FORMATS, THOUGHT_FORMATS, call_format
from antiphon.worker.sampler import SamplingState, sample
from antiphon.worker.structure import checking
from antiphon.worker.structure.checking import CHECK_TIMEOUT_S, GrammarChecker, TooExpensive
from antiphon.worker.structure.enforcer import Enforcer
from antiphon.worker.structure.grammar import Grammars, Matcher, why_invalid
from antiphon.worker.structure.thinking import ThinkingMeter

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["c", "f"]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = (Tool(name="weather", parameters=SCHEMA, strict=True), Tool(name="now"))
CALLS = [
    ToolCall(id="", name="weather", arguments='{"city": "Paris", "days": 3, "unit": "c"}'),
    ToolCall(id="", name="weather", arguments='{"city": "a b \\"x", "days": -1}'),
]
SPECIAL = "<|special|>"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|end|>", SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([json.dumps(SCHEMA), '{"name": "weather", "arguments": {"city": "Paris"}}'] * 5, trainer)
    directory = tmp_path_factory.mktemp("checkpoint")
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint / "tokenizer.json"))


@pytest.fixture(scope="module")
def grammars(checkpoint: Path, tokenizer: Tokenizer) -> Grammars:
    return Grammars(checkpoint / "tokenizer.json", tokenizer.get_vocab_size())


def allows(mask: npt.NDArray[np.uint8], token_id: int) -> bool:
    return bool(mask[token_id // 8] >> token_id % 8 & 1)


def accepted(matcher: Matcher, ids: list[int]) -> bool:
    """Whether ids are allowed one after the other, and the end (id 0) after them."""
    for token_id in ids:
        if not allows(matcher.allowed(), token_id):
            return False
        matcher.append(token_id)
    return allows(matcher.allowed(), 0)


@pytest.fixture(scope="module")
def takes(grammars: Grammars, tokenizer: Tokenizer) -> Callable[[str, str], bool]:
    def taken(grammar: str, text: str) -> bool:
        return accepted(grammars.matcher(grammar, frozenset({0})), tokenizer.encode(text, add_special_tokens=False).ids)

    return taken


def grammar_of(options: ChatOptions, form: CallFormat | None = None, **how: bool) -> str:
    thoughts = THOUGHT_FORMATS[0] if how.pop("thinks", False) else None
    made, _ = answer_grammar(
        options, options.callable_tools if form else (), form, thoughts, is_open=how.pop("is_open", False), special_tokens={}
    )
    assert made is not None
    return made


@pytest.mark.parametrize("form", CALL_FORMATS, ids=lambda form: form.name)
def test_every_format_s_grammar_takes_what_it_writes_and_nothing_else(form: CallFormat, takes: Callable[[str, str], bool]) -> None:
    both, one = form.write(CALLS), form.write(CALLS[:1])
    wrong = form.write([ToolCall(id="", name="weather", arguments='{"city": "Paris", "days": "three"}')])
    unknown = form.write([ToolCall(id="", name="stranger", arguments="{}")])
    required = grammar_of(ChatOptions(tools=TOOLS, tool_choice="required"), form)
    assert takes(required, one if isinstance(form, ChannelFormat) else both)
    assert not any(takes(required, text) for text in (wrong, unknown, "Hello", ""))
    if isinstance(form, ChannelFormat):  # one call at most, and text in a channel of its own: see the format's tests
        return
    alone = grammar_of(ChatOptions(tools=TOOLS, tool_choice="required", parallel_tool_calls=False), form)
    assert takes(alone, one)
    assert not takes(alone, both)
    strict = grammar_of(ChatOptions(tools=TOOLS), form)
    assert takes(strict, both)
    assert takes(strict, "Hello, there.")
    assert not takes(strict, wrong)
    thinking = grammar_of(ChatOptions(tools=TOOLS, tool_choice="required"), form, thinks=True, is_open=True)
    assert takes(thinking, f"hm</think>\n\n{both}")
    assert not takes(thinking, both)
    either = grammar_of(ChatOptions(tools=TOOLS, shape=AnswerShape(kind="json_schema", value=SCHEMA)), form)
    assert takes(either, both)
    assert takes(either, '{"city": "x", "days": 1}')
    assert not takes(either, "Hello")


def test_a_shape_that_may_look_like_a_call_is_refused_where_calls_have_no_mark() -> None:
    form = call_format("llama3_json", None)
    named = {**SCHEMA, "properties": {"name": {"type": "string"}}, "required": []}
    for schema in (
        named,
        {"type": "object"},
        {**SCHEMA, "additionalProperties": True},
        {"$ref": "#/$defs/a", "$defs": {"a": SCHEMA}},
    ):
        with pytest.raises(InvalidInput) as refused:
            grammar_of(ChatOptions(tools=TOOLS, shape=AnswerShape(kind="json_schema", value=schema, field="here")), form)
        assert refused.value.field == "here"
    for schema in ({"type": "array"}, {"type": "string"}):
        grammar_of(ChatOptions(tools=TOOLS, shape=AnswerShape(kind="json_schema", value=schema)), form)


def test_shapes_take_what_they_say(takes: Callable[[str, str], bool]) -> None:
    table: list[tuple[AnswerShape, str, str]] = [
        (AnswerShape(kind="json_object"), '{"a": [1, null]}', "[1]"),
        (AnswerShape(kind="json_schema", value=SCHEMA), '{"city": "x", "days": 1}', '{"city": "x"}'),
        (AnswerShape(kind="regex", value=r"\d{3}/\d+"), "123/4", "12/4"),
        (AnswerShape(kind="choice", value=("yes", 'n"o')), 'n"o', "maybe"),
        (AnswerShape(kind="grammar", value='start: "a"+'), "aaa", "ab"),
    ]
    for shape, right, wrong in table:
        for before, how in (("", {}), ("hm</think>", {"thinks": True, "is_open": True})):
            grammar = grammar_of(ChatOptions(shape=shape), **how)
            assert takes(grammar, before + right), (shape, before)
            assert not takes(grammar, before + wrong), (shape, before)


def test_dates_are_in_the_calendar_and_minutes_have_sixty_seconds(takes: Callable[[str, str], bool]) -> None:
    def text(form: str, value: str, **more: object) -> bool:
        schema = {"type": "object", "properties": {"format": {"type": "string", "format": form, **more}}, "required": ["format"]}
        grammar = grammar_of(ChatOptions(shape=AnswerShape(kind="json_schema", value=schema)))
        return takes(grammar, json.dumps({"format": value}))

    for day in ("2024-02-29", "2000-02-29", "0004-02-29", "2023-02-28", "2023-12-31", "0001-01-01"):
        assert text("date", day), day
        assert text("date-time", f"{day}T23:59:59.5+01:00"), day
    for day in ("2023-02-29", "1900-02-29", "0000-12-31", "0000-02-29", "2023-04-31"):
        assert not text("date", day), day
        assert not text("date-time", f"{day}T10:00:00Z"), day
    assert text("time", "23:59:59Z")
    assert not text("time", "23:59:60Z")
    assert text("date", "2024-02-29", pattern="^2")
    assert not text("date", "1999-01-01", pattern="^2")
    assert not text("date", "2023-02-29", pattern="^2")


def test_a_class_without_the_quote_or_the_backslash_takes_neither_escaped(takes: Callable[[str, str], bool]) -> None:
    for pattern in (
        '^[^"]*$',
        r"^[^\\]*$",
        r'^[^"\\\n]+$',
        r'^[^a-z"]{1,9}$',
        r"^x?[\x00-\x21\x23-\x7f]$",
        r'^\[?(_|[^"])$',
        '^[]"]?[^]"]$',
    ):
        grammar = grammar_of(ChatOptions(shape=AnswerShape(kind="json_schema", value={"type": "string", "pattern": pattern})))
        for text in ('"', "\\", "A", "Z?", "x!", '["', "]]", "_", ""):
            fits = re.search(pattern, text) is not None
            assert takes(grammar, json.dumps(text)) == fits, (pattern, text)
    grammar = grammar_of(ChatOptions(shape=AnswerShape(kind="json_schema", value={"type": "string", "pattern": r"^[^a]\S.$"})))
    assert takes(grammar, json.dumps('"\\"'))
    assert takes(grammar, json.dumps('\n""'))


def test_what_is_allowed_depends_on_the_output_s_ids_alone(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = f"start: %json {json.dumps(SCHEMA)}"
    ids = tokenizer.encode('{"city": "Paris", "days": 12}').ids
    stepwise = grammars.matcher(grammar, frozenset({0}))
    for position, token_id in enumerate(ids):
        assert grammars.matcher(grammar, frozenset({0}), ids[:position]).allowed().tolist() == stepwise.allowed().tolist()
        stepwise.append(token_id)
    with pytest.raises(InvalidInput):
        grammars.matcher(grammar, frozenset({0}), tokenizer.encode("no").ids)


def test_the_sampler_chooses_only_what_is_allowed_at_any_temperature(checkpoint: Path, tokenizer: Tokenizer) -> None:
    vocab = tokenizer.get_vocab_size() + 12  # models pad their vocabularies
    enforcer = Enforcer(checkpoint, vocab)
    rules = OutputRules(grammar='start: "[" ("1" | "2"){3} "]"')
    for temperature in (0.0, 1.5):
        params = SamplingParams(max_tokens=9, temperature=temperature, seed=5, rules=rules)
        matcher, meter = enforcer.begin(rules, frozenset({0}), ())
        state = SamplingState(params, frozenset({0}), [1], [], vocab, matcher=matcher, meter=meter)
        generator = torch.Generator().manual_seed(3)
        ids: list[int] = []
        while not ids or ids[-1] != 0:
            (chosen,) = sample(torch.randn(1, vocab, generator=generator) * 5, [state], [len(ids)])
            assert chosen is not None
            state.append(chosen)
            ids.append(chosen)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert len(text) == 5
        assert set(text) <= set("[12]")


def test_a_thought_ends_at_its_budget_by_force_or_before_by_itself(tokenizer: Tokenizer) -> None:
    def token_bytes(token_id: int) -> bytes:
        return str(tokenizer.decode([token_id])).encode()

    end = tuple(tokenizer.encode("</think>").ids)
    assert len(end) > 1
    letters = tokenizer.encode("abcdefgh").ids
    for is_open, start in ((True, []), (False, tokenizer.encode("<think>").ids)):
        rules = ThinkingRules(start="<think>", end="</think>", end_token_ids=end, budget_tokens=4, is_open=is_open)
        meter = ThinkingMeter(rules, token_bytes)
        output = list(start)
        for token_id in start:
            assert meter.forced is None
            meter.append(token_id)
        for position in range(12):
            expected = end[position - 4] if 4 <= position < 4 + len(end) else None
            assert meter.forced == expected
            assert ThinkingMeter(rules, token_bytes, output).forced == expected
            output.append(letters[position % len(letters)] if expected is None else expected)
            meter.append(output[-1])
    long = ThinkingRules(start="<think>", end="</think>", end_token_ids=end, budget_tokens=len(end) + 1, is_open=True)
    by_itself = ThinkingMeter(long, token_bytes, [letters[0], *end, *letters])
    assert by_itself.forced is None
    none = ThinkingMeter(ThinkingRules(start="<think>", end="</think>", end_token_ids=end, budget_tokens=0), token_bytes, letters)
    assert none.forced is None


async def test_a_grammar_that_is_too_expensive_is_given_up_in_time_and_delays_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "CHECK_WAIT_S", 120.0)  # the tests' machine may be a busy one
    checker = GrammarChecker()
    try:
        await checker.check('start: "a"', "x")
        patterns = [{"type": "string", "pattern": f"a.{{{i}}}b.*c{{{i * 3}}}"} for i in range(1, 30)]
        costly = f"start: %json {json.dumps({'allOf': patterns})}"
        expensive = asyncio.create_task(checker.check(costly, "response_format"))
        await checker.check('start: "b"', "x")
        assert not expensive.done()
        with pytest.raises(TooExpensive, match=f"longer than {CHECK_TIMEOUT_S} s") as refused:
            await expensive
        assert refused.value.field == "response_format"
        with pytest.raises(InvalidInput):
            await checker.check("start: nothing_there", "guided_grammar")
    finally:
        await checker.close()
    assert why_invalid('start: "a"') is None


async def test_a_machine_without_time_for_a_check_says_nothing_about_the_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    checker = GrammarChecker()
    try:
        await checker.check('start: "a"', "x")
        with monkeypatch.context() as patched:
            patched.setattr(checking, "CHECK_WAIT_S", 0.0001)  # as one that gets no processor
            with pytest.raises(Overloaded):
                await checker.check('start: "b"', "x")
        await checker.check('start: "b"', "x")
        process = checker._forker._process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        with monkeypatch.context() as patched:
            patched.setattr(checking, "CHECK_WAIT_S", 0.05)
            patched.setattr(checking, "START_TIMEOUT_S", 0.05)
            with pytest.raises(Overloaded):
                await checker.check('start: "c"', "x")
        await checker.check('start: "c"', "x")
    finally:
        await checker.close()


async def test_what_was_too_expensive_is_known_and_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "CHECK_WAIT_S", 120.0)  # the tests' machine may be a busy one
    costly = [f"start: %json {json.dumps({'type': 'integer', 'multipleOf': 999_983 + i})}" for i in range(3)]
    checker = GrammarChecker()
    try:
        refused = [asyncio.create_task(checker.check(each, "x")) for each in costly]
        left = asyncio.create_task(checker.check(costly[0], "x"))
        await asyncio.sleep(0)
        left.cancel()  # a client that leaves takes no other's answer with it
        await checker.check('start: "a"', "x")
        assert not all(task.done() for task in refused)  # those that need long wait for each other, not this one for them
        for answer in await asyncio.gather(*refused, return_exceptions=True):
            assert isinstance(answer, TooExpensive)
        num_asked = checker._forker._num_asked
        with pytest.raises(TooExpensive):
            await checker.check(costly[0], "y")
        assert checker._forker._num_asked == num_asked
    finally:
        await checker.close()


def test_what_a_vocabulary_can_t_write_is_said_of_it(tmp_path: Path) -> None:
    whole = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {
        token: number for number, token in enumerate(["<|end|>", *sorted(set(whole) - {"ò"})])
    }  # stands for the byte 0xf2
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    matcher = Grammars(tmp_path / "tokenizer.json", len(vocabulary)).matcher('start: "a\U000a0a4b"', frozenset({0}))
    while matcher.failure is None:
        allowed = np.unpackbits(matcher.allowed(), bitorder="little").nonzero()[0]
        matcher.append(int(allowed[0]))
    assert "vocabulary" in matcher.failure
