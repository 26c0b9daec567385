"""Incremental text against decoding everything at once, for the kinds of vocabulary there are."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from antiphon.gateway.text.detokenizer import ByteLevelDetokenizer, Detokenizer, WindowDetokenizer
from antiphon.gateway.text.tokenizer import TextModel

CORPUS = ["the choir answers", "là-bas, à côté", "今日は良い天気🎵 👩‍👩‍👧", "   spaced   out \n\n lines\t"] * 4
KINDS = ("byte level", "byte fallback", "metaspace", "word piece")


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    special = ["<s>", "</s>"]
    if kind == "byte level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
    elif kind == "word piece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.WordPiece()
        tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=[*special, "[UNK]"]))
    elif kind == "metaspace":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=[*special, "<unk>"], unk_token="<unk>")
        tokenizer.train_from_iterator(CORPUS, trainer)
    else:  # as Llama 2 and Mistral have it
        byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
        pieces = ["<unk>", *special, *byte_tokens, "▁", "a", "b", "▁a", "▁▁", "é", "天", "\n", "ab", "▁ab"]
        vocab = {piece: index for index, piece in enumerate(pieces)}
        tokenizer = Tokenizer(
            models.BPE(vocab, [("a", "b"), ("▁", "a"), ("▁", "▁"), ("▁", "ab")], unk_token="<unk>", byte_fallback=True)
        )
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken("<two words>", special=False), AddedToken("añadido", special=False)])
    return tokenizer


def detokenizer_of(kind: str, *, skip: bool = False) -> Detokenizer:
    return TextModel(tokenizer_of(kind), chat_template=None, eos_token_ids=()).detokenizer(skip_special_tokens=skip)


def ids(kind: str) -> st.SearchStrategy[list[int]]:
    # Two ids beyond the vocabulary, as models with padded embeddings may emit them.
    return st.lists(st.integers(0, tokenizer_of(kind).get_vocab_size() + 1), max_size=40)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_the_pieces_add_up_to_decoding_everything(kind: str, data: st.DataObject, skip: bool) -> None:
    token_ids = data.draw(ids(kind))
    detokenizer = detokenizer_of(kind, skip=skip)
    text = "".join(detokenizer.feed(token_id) for token_id in token_ids) + detokenizer.flush()
    assert text == decoded(kind, token_ids, skip=skip)


def decoded(kind: str, token_ids: list[int], *, skip: bool) -> str:
    """What the library decodes, but for added tokens of byte-level vocabularies: those it takes for bytes ("añadido")."""
    tokenizer = tokenizer_of(kind)
    if kind != "byte level":
        return str(tokenizer.decode(token_ids, skip_special_tokens=skip))
    added = tokenizer.get_added_tokens_decoder()
    text, run = "", []
    for token_id in token_ids:
        if token_id in added and skip and added[token_id].special:
            continue  # the library leaves it out before it decodes, so that the bytes on its sides meet
        if token_id in added:
            text += tokenizer.decode(run, skip_special_tokens=False) + added[token_id].content
            run = []
        else:
            run.append(token_id)
    return text + str(tokenizer.decode(run, skip_special_tokens=False))


@pytest.mark.parametrize("text", ["un café", "日本 ø", "añadido", "aĠend", "</s>"])
def test_added_tokens_of_a_byte_level_vocabulary_come_back_as_they_were_written(text: str) -> None:
    alphabet = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["café", "日本", "ø", "añadido", "Ġend"])
    tokenizer.add_special_tokens(["</s>"])
    model = TextModel(tokenizer, chat_template=None, eos_token_ids=())
    token_ids = model.encode(text, add_special_tokens=False)
    detokenizer = model.detokenizer(skip_special_tokens=False)
    assert "".join(map(detokenizer.feed, token_ids)) + detokenizer.flush() == text
    assert model.decode(token_ids, skip_special_tokens=False) == text
    assert b"".join(model.token_text(token_id).raw for token_id in token_ids).decode() == text


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="ab é天🎵👩‍\n", max_size=20))
def test_real_text_never_shows_a_broken_character(kind: str, text: str) -> None:
    token_ids = tokenizer_of(kind).encode(text, add_special_tokens=False).ids
    detokenizer = detokenizer_of(kind)
    pieces = [detokenizer.feed(token_id) for token_id in token_ids]
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_several_tokens_comes_whole_with_its_last() -> None:
    tokenizer = tokenizer_of("byte level")
    alphabet = {byte: char for char, byte in _alphabet().items()}
    token_ids = [tokenizer.token_to_id(alphabet[byte]) for byte in "🎶".encode()]
    detokenizer = detokenizer_of("byte level")
    assert [detokenizer.feed(token_id) for token_id in token_ids] == ["", "", "", "🎶"]


def _alphabet() -> dict[str, int]:
    from antiphon.gateway.text.detokenizer import byte_alphabet

    return byte_alphabet()


def test_an_unfinished_character_shows_only_at_the_end() -> None:
    tokenizer = tokenizer_of("byte fallback")
    detokenizer = detokenizer_of("byte fallback")
    assert detokenizer.feed(tokenizer.token_to_id("<0xC3>")) == ""
    assert detokenizer.flush() == "\ufffd"


def test_the_alphabet_is_the_librarys() -> None:
    assert set(_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(_alphabet().values()) == list(range(256))


@pytest.mark.parametrize(("kind", "expected"), [("byte level", ByteLevelDetokenizer), ("byte fallback", WindowDetokenizer)])
def test_the_decoder_decides_which_way_is_taken(kind: str, expected: type) -> None:
    assert type(detokenizer_of(kind)) is expected
