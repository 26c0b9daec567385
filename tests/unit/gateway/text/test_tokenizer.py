"""Tokens by themselves, and long texts away from the event loop."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from antiphon.core.errors import CheckpointInvalid
from antiphon.gateway.text.tokenizer import INLINE_CHARS, TextModel, TokenText, in_thread


def byte_level() -> TextModel:
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TextModel(tokenizer, chat_template=None, eos_token_ids=())


def test_a_token_that_is_part_of_a_character_keeps_its_bytes() -> None:
    model = byte_level()
    parts = [model.token_text(token_id) for token_id in model.encode("é")]
    assert b"".join(part.raw for part in parts) == "é".encode()
    assert all(part.text == "\ufffd" for part in parts)


def test_a_byte_token_stands_for_its_byte_and_a_metaspace_for_a_space() -> None:
    tokenizer = Tokenizer(models.BPE({"<0xC3>": 0, "▁a": 1}, []))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    model = TextModel(tokenizer, chat_template=None, eos_token_ids=())
    assert model.token_text(0) == TokenText(text="\ufffd", raw=b"\xc3")
    assert model.token_text(1) == TokenText(text=" a", raw=b" a")


def test_an_id_without_token_is_no_text() -> None:
    assert byte_level().token_text(9999) == TokenText(text="", raw=b"")


async def test_only_long_texts_are_handed_to_a_thread() -> None:
    with ThreadPoolExecutor(1) as executor:
        here = threading.get_ident()
        assert await in_thread(executor, INLINE_CHARS, threading.get_ident) == here
        assert await in_thread(executor, INLINE_CHARS + 1, threading.get_ident) != here


def checkpoint(directory: Path, **files: bytes) -> Path:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, data in files.items():
        (directory / name.replace("__", ".")).write_bytes(data)
    return directory


@pytest.mark.parametrize(
    ("generation", "expected"),
    [(b'{"eos_token_id": []}', {1}), (b'{"eos_token_id": null}', {1}), (b'{"eos_token_id": [0]}', {0}), (b"{}", {1})],
)
def test_an_empty_list_of_end_ids_leaves_them_to_the_other_file(tmp_path: Path, generation: bytes, expected: set[int]) -> None:
    found = checkpoint(tmp_path, generation_config__json=generation, config__json=b'{"eos_token_id": 1}')
    assert TextModel.load(found).eos_token_ids == expected


LATIN1 = "{{ messages[0].content }}é".encode("latin-1")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("chat_template.jinja", LATIN1),
        ("tokenizer_config.json", b'{"eos_token": "\xe9"}'),
        ("tokenizer_config.json", b"[" * 200_000),
        ("generation_config.json", b"[1]"),
        ("config.json", b"\xff\xfe"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    checkpoint(tmp_path)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointInvalid, match=re.escape(name)):
        TextModel.load(tmp_path)
