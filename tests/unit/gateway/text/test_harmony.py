"""gpt-oss's channels: read at every cut, bound by grammars, asked for with its words, and written into its template."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from antiphon.core.errors import InvalidInput
from antiphon.core.request import FinishReason
from antiphon.gateway.text.chat_options import AnswerShape, ChatOptions, Tool
from antiphon.gateway.text.dialect import AnswerPlan, Dialect, TextFormats
from antiphon.gateway.text.events import Part, merged
from antiphon.gateway.text.folded import Folded
from antiphon.gateway.text.tokenizer import TextModel
from antiphon.worker.structure.grammar import Grammars

MARKERS = ["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"]
TEMPLATE = (
    "<|start|>system<|message|>Reasoning: {{ reasoning_effort or 'medium' }}<|end|>"
    "{% if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|start|>functions.f to=assistant<|channel|>commentary"
    "<|message|>{{ m.content }}<|end|>{% elif m.tool_calls %}{% if m.thinking %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary json<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
TOOLS = (Tool(name="sky", parameters={"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}),)
THOUGHT = "<|channel|>analysis<|message|>They want the sky — là-haut 🌌.<|end|>"
NEXT = "<|start|>assistant"
PREAMBLE = "<|channel|>commentary<|message|>I look up.<|end|>"
CALL = '<|channel|>commentary to=functions.sky <|constrain|>json<|message|>{"at": "<|end|> of day, 日本"}'
FINAL = "<|channel|>final<|message|>It is **blue**."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=["<|pad|>"]
    )
    tokenizer.train_from_iterator(["assistant analysis commentary final to=functions. json"] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(marker, special=True) for marker in MARKERS])
    directory = tmp_path_factory.mktemp("harmony")
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|return|>", "chat_template": TEMPLATE}))
    ends = [tokenizer.token_to_id("<|return|>"), tokenizer.token_to_id("<|call|>")]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return directory


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> TextModel:
    return TextModel.load(checkpoint)


@pytest.fixture(scope="module")
def dialect(model: TextModel) -> Dialect:
    return Dialect(model, TextFormats())


def planned(dialect: Dialect, model: TextModel, options: ChatOptions) -> AnswerPlan:
    return dialect.plan(options, model.encode("<|start|>user<|message|>Hi<|end|><|start|>assistant"), is_chat=True)


def read(plan: AnswerPlan, pieces: Sequence[str], *, truncated: bool = False) -> tuple[Part, ...]:
    parser = plan.new_parser()
    assert parser is not None
    parts = [part for piece in pieces for part in parser.feed(piece)]
    return merged([*parts, *parser.finish(truncated=truncated)])


def folded(parts: Sequence[Part]) -> Folded:
    result = Folded()
    for part in parts:
        result.add(part)
    return result


def test_thoughts_preambles_calls_and_answers_come_apart_at_every_cut(dialect: Dialect, model: TextModel) -> None:
    plan = planned(dialect, model, ChatOptions(tools=TOOLS))
    second = "<|channel|>analysis<|message|>And then?<|end|>"
    recipient_first = CALL.replace(" to=functions.sky ", " ").replace("<|channel|>", " to=functions.sky<|channel|>", 1)
    thought = "They want the sky — là-haut 🌌."
    table = [
        (THOUGHT + NEXT + FINAL, thought, "It is **blue**.", 0),
        (FINAL, "", "It is **blue**.", 0),
        (THOUGHT + NEXT + PREAMBLE + NEXT + CALL, thought, "I look up.", 1),
        (THOUGHT + NEXT + PREAMBLE + NEXT + second + NEXT + CALL, f"{thought}\n\nAnd then?", "I look up.", 1),
        (THOUGHT + NEXT + recipient_first, thought, "", 1),
        (recipient_first.lstrip(), "", "", 1),
        (PREAMBLE + NEXT + FINAL, "", "I look up.\n\nIt is **blue**.", 0),
        (CALL + "<|call|>" + NEXT + CALL + "<|call|>", "", "", 2),
        ("No channel at all", "", "No channel at all", 0),
        ("to be <|or", "", "to be <|or", 0),
    ]
    for text, thought_of, said, num_calls in table:
        whole = read(plan, [text])
        made = folded(whole)
        assert (made.thought, made.text) == (thought_of, said), text
        assert [(c.name, json.loads(c.arguments)) for c in made.calls] == [("sky", {"at": "<|end|> of day, 日本"})] * num_calls
        assert made.ends_in_calls(FinishReason.STOP, None) == (num_calls > 0)
        assert read(plan, list(text)) == whole
        for cut in range(1, len(text)):
            assert read(plan, [text[:cut], text[cut:]]) == whole, (text, cut)
            assert not [c for c in folded(read(plan, [text[:cut]], truncated=True)).calls if c.is_whole and "}" not in c.arguments]


def test_answers_are_in_channels_without_tools_too_and_a_call_may_have_no_arguments(dialect: Dialect, model: TextModel) -> None:
    made = folded(read(planned(dialect, model, ChatOptions()), [THOUGHT + NEXT + FINAL]))
    assert (made.thought, made.text) == ("They want the sky — là-haut 🌌.", "It is **blue**.")
    plan = planned(dialect, model, ChatOptions(tools=TOOLS))
    empty = "<|channel|>commentary to=functions.sky<|message|>"
    assert [(c.arguments, c.is_whole) for c in folded(read(plan, [empty])).calls] == [("{}", True)]
    assert not any(c.is_whole for c in folded(read(plan, [empty], truncated=True)).calls)
    assert not any(c.is_whole for c in folded(read(plan, [CALL[:-1]], truncated=True)).calls)


def test_grammars_hold_channels_calls_and_shapes(dialect: Dialect, model: TextModel, checkpoint: Path) -> None:
    grammars = Grammars(checkpoint / "tokenizer.json", model.vocab_size)

    def taker(options: ChatOptions) -> Callable[[str], bool]:
        grammar = planned(dialect, model, options).grammar
        assert grammar is not None

        def takes(text: str) -> bool:
            try:
                matcher = grammars.matcher(grammar, model.eos_token_ids, model.encode(text))
            except InvalidInput:
                return False
            mask = matcher.allowed()
            return any(mask[i // 8] >> i % 8 & 1 for i in model.eos_token_ids)

        return takes

    plain = '<|channel|>commentary to=functions.sky <|constrain|>json<|message|>{"at": "noon"}'
    wrong = plain.replace('"noon"', "3")
    required = taker(ChatOptions(tools=TOOLS, tool_choice="required"))
    strict = taker(ChatOptions(tools=(Tool(name="sky", parameters=TOOLS[0].parameters, strict=True),)))
    shape = AnswerShape(kind="json_schema", value={"type": "integer"})
    either = taker(ChatOptions(tools=TOOLS, shape=shape))
    alone = taker(ChatOptions(shape=shape))
    for before in ("", THOUGHT + NEXT, THOUGHT + NEXT + PREAMBLE + NEXT):
        assert required(before + plain)
        assert strict(before + plain)
        assert strict(before + FINAL)
        assert either(before + plain)
        assert either(before + "<|channel|>final<|message|>12")
        assert alone(before + "<|channel|>final<|message|>12")
        for refuses in (required, strict, either, alone):
            assert not refuses(before + wrong)
        assert not required(before + FINAL)
        assert not either(before + FINAL)
        assert not alone(before + FINAL)
        assert not alone(before + plain)
    budget = taker(ChatOptions(tools=TOOLS, thinking_budget=4))
    assert budget(THOUGHT + NEXT + FINAL)
    assert not budget(THOUGHT + NEXT + THOUGHT + NEXT + FINAL)


def test_effort_is_said_in_the_template_s_words_and_no_thought_is_an_empty_one(dialect: Dialect, model: TextModel) -> None:
    assert dialect.variables(ChatOptions(effort="minimal", thinking=True), {})["reasoning_effort"] == "low"
    assert dialect.variables(ChatOptions(effort="high", thinking=True), {})["reasoning_effort"] == "high"
    plan = planned(dialect, model, ChatOptions(thinking=False))
    begun = model.decode(plan.extra_token_ids, skip_special_tokens=False)
    assert begun == "<|channel|>analysis<|message|><|end|><|start|>assistant"
    assert folded(read(plan, [FINAL])).text == "It is **blue**."


def test_a_history_with_parallel_calls_has_each_result_behind_its_call(dialect: Dialect, model: TextModel) -> None:
    calls = [{"id": f"c{i}", "type": "function", "function": {"name": "f", "arguments": {"n": i}}} for i in range(2)]
    history = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "content": "zero", "tool_call_id": "c0"},
        {"role": "tool", "content": "one", "tool_call_id": "c1"},
    ]
    text = model.render_chat(dialect.messages(history, ChatOptions(tools=TOOLS)), variables={})
    order = [text.index(piece) for piece in ("analysis<|message|>hm", '{"n": 0}', "zero", '{"n": 1}', "one<|end|>")]
    assert order == sorted(order)
    assert text.count("zero") == text.count("one<|end|>") == text.count("hm<|end|>") == 1
