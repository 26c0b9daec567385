"""Chat templates against transformers' own rendering."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from antiphon.core.errors import CheckpointInvalid, InvalidInput
from antiphon.gateway.text.templates.chat_template import ChatTemplate
from antiphon.gateway.text.tokenizer import TextModel

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == 'user' %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- generation %}
        {{- '<|im_start|>assistant\\n' + message.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
STRICT = (
    "{{ bos_token }}{% if messages|length > 2 %}{{ raise_exception('too many messages') }}{% endif %}"
    "{% for m in messages %}{{ m | tojson }}{{ eos_token }}{% endfor %}"
)
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "what is it?"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<b>è & 'ü' 天</b>\n\n  x "}],
    "turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
        {"role": "user", "content": "c", "name": "eve"},
    ],
}


def write_checkpoint(directory: Path, template: str, *, as_file: bool = False) -> Path:
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>"])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {
            "__type": "AddedToken",
            "content": "<s>",
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
        },
        "eos_token": "<|im_end|>",
    }
    if as_file:
        (directory / "chat_template.jinja").write_text(template)
    else:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("template", [CHATML, THINKING, STRICT], ids=["chatml", "thinking", "strict"])
@pytest.mark.parametrize("generate", [True, False], ids=["generate", "whole"])
def test_text_and_tokens_are_transformers_own(tmp_path: Path, template: str, generate: bool) -> None:
    transformers = pytest.importorskip("transformers")
    directory = write_checkpoint(tmp_path, template)
    reference = transformers.AutoTokenizer.from_pretrained(directory)
    model = TextModel.load(directory)
    for chat in CHATS.values():
        if template is STRICT and len(chat) > 2:
            continue
        for variables in ({}, {"enable_thinking": False}):
            options = {"add_generation_prompt": generate, **variables}
            text = reference.apply_chat_template(chat, tokenize=False, **options)
            assert model.render_chat(chat, add_generation_prompt=generate, variables=variables) == text
            ids = reference.apply_chat_template(chat, tokenize=True, return_dict=True, truncation=False, padding=False, **options)
            assert list(model.encode_chat(chat, add_generation_prompt=generate, variables=variables)) == ids["input_ids"]


def test_a_template_that_refuses_is_the_clients_error() -> None:
    template = ChatTemplate(STRICT, {})
    with pytest.raises(InvalidInput, match="too many messages") as caught:
        template.render(CHATS["turns"], add_generation_prompt=True, variables={})
    assert caught.value.field == "messages"


@pytest.mark.parametrize("source", ["{{ messages[0].content.nope() }}", "{{ 1 / 0 }}", "{{ messages['x'].y }}", "{{ none + 1 }}"])
def test_a_template_that_fails_is_no_crash(source: str) -> None:
    with pytest.raises(InvalidInput):
        ChatTemplate(source, {}).render(CHATS["one"], add_generation_prompt=True, variables={})


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    try:
        text = ChatTemplate(source, {}).render(CHATS["one"], add_generation_prompt=True, variables={})
    except InvalidInput:
        return
    assert text == ""


def test_a_template_that_does_not_parse_is_an_invalid_checkpoint() -> None:
    with pytest.raises(CheckpointInvalid, match="line 1"):
        ChatTemplate("{% for %}", {})


def test_a_clients_variables_do_not_replace_the_messages() -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ add_generation_prompt }}", {})
    text = template.render(CHATS["one"], add_generation_prompt=True, variables={"messages": "x", "add_generation_prompt": 7})
    assert text == "what is it?True"


def test_a_template_in_a_file_of_its_own_counts(tmp_path: Path) -> None:
    model = TextModel.load(write_checkpoint(tmp_path, CHATML, as_file=True))
    assert model.render_chat(CHATS["one"]).endswith("<|im_start|>assistant\n")


def test_a_checkpoint_without_template_takes_no_chats(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, CHATML)
    (directory / "tokenizer_config.json").write_text("{}")
    model = TextModel.load(directory)
    assert not model.takes_chats
    with pytest.raises(InvalidInput, match="no chat template"):
        model.encode_chat(CHATS["one"])


def test_end_of_sequence_ids_come_from_all_files_that_name_them(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, CHATML)
    (directory / "config.json").write_text('{"eos_token_id": 1}')
    end = TextModel.load(directory).eos_token_ids - {1}
    assert len(end) == 1
    (directory / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert TextModel.load(directory).eos_token_ids == {3, 4} | end


def test_long_texts_are_neither_truncated_nor_padded(tmp_path: Path) -> None:
    model = TextModel.load(write_checkpoint(tmp_path, CHATML))
    assert len(model.encode("x" * 100)) == 100
    assert len(model.encode("x")) == 1


@pytest.mark.parametrize("content", ["{", "[]", '"x"'])
def test_a_broken_file_is_an_invalid_checkpoint(tmp_path: Path, content: str) -> None:
    directory = write_checkpoint(tmp_path, CHATML)
    (directory / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointInvalid, match="tokenizer_config"):
        TextModel.load(directory)


def test_a_directory_without_tokenizer_is_an_invalid_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match="no tokenizer"):
        TextModel.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("nonsense")
    with pytest.raises(CheckpointInvalid, match=r"tokenizer\.json"):
        TextModel.load(tmp_path)


def test_half_a_surrogate_pair_is_the_clients_error(tmp_path: Path) -> None:
    model = TextModel.load(write_checkpoint(tmp_path, CHATML))
    with pytest.raises(InvalidInput, match="surrogate"):
        model.encode("\ud800")
