"""What a checkpoint says of text: whatever its files hold, there is a tokenizer or an error of the tree, within bounded time.

Briefly in ``make test``; ``make fuzz`` sets ANTIPHON_FUZZ_EXAMPLES and runs them at length. Templates are rendered elsewhere: in a
process of their own, with limits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from antiphon.core.errors import AntiphonError
from antiphon.gateway.text.tokenizer import TextModel

from .damage import damaged, fuzz
from .test_files import WORDS, bounded, folder

TEXT = "the choir\n<|im_end|>ﬁ é 天 </s> \ud83d"


def _tokenizer(kind: str) -> Tokenizer:
    byte_level = kind == "bytes"
    made = Tokenizer(models.BPE(byte_fallback=not byte_level, unk_token=None) if kind != "pieces" else models.Unigram())
    made.pre_tokenizer = pre_tokenizers.ByteLevel() if byte_level else pre_tokenizers.Metaspace()
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("a", "b")])
    special = ["<|im_start|>", "<|im_end|>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else [chr(number) for number in range(32, 127)]
    trainer: Any = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    if kind == "pieces":
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>", *special], unk_token="<unk>", show_progress=False)
    made.train_from_iterator(["the choir sings what the other choir answers"] * 3, trainer)
    made.add_special_tokens([AddedToken(name, special=True, normalized=True) for name in special])
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", made.token_to_id("</s>"))])
    made.decoder = decoders.ByteLevel() if byte_level else decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return made


FILES: dict[str, bytes] = {
    "tokenizer_config.json": json.dumps(
        {
            "chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}",
            "eos_token": {"content": "<|im_end|>", "special": True},
            "bos_token": "</s>",
        }
    ).encode(),
    "generation_config.json": b'{"eos_token_id": [1, 2], "temperature": 0.6, "top_k": 20, "top_p": 0.95}',
    "config.json": b'{"eos_token_id": 1, "vocab_size": 300}',
    "chat_template.jinja": b"{{ bos_token }}{% for m in messages if m.role != 'x' %}{{ m.content | trim }}{% endfor %}",
}
TOKENIZERS = {kind: _tokenizer(kind).to_str().encode() for kind in ("bytes", "fallback", "pieces")}


def used(base: Path) -> None:
    """Everything that a gateway does with it."""
    model = TextModel.load(base)
    ids: tuple[int, ...] = ()
    for text in (TEXT[:-2], TEXT, "", "a" * 100):
        try:
            ids = model.encode(text)
        except AntiphonError:
            continue
        model.decode(ids)
    detokenizer = model.detokenizer()
    for token_id in (*ids, 0, 5, 10**6):
        detokenizer.feed(token_id)
        model.token_text(token_id)
    detokenizer.flush()


def read(kind: str, files: dict[str, bytes]) -> None:
    with folder() as base:
        for name, data in ({"tokenizer.json": TOKENIZERS[kind]} | FILES | files).items():
            (base / name).write_bytes(data)
        bounded(lambda: used(base))


def test_the_files_that_are_damaged_are_good_ones() -> None:
    for data in TOKENIZERS.values():
        with folder() as base:
            for name, content in ({"tokenizer.json": data} | FILES).items():
                (base / name).write_bytes(content)
            used(base)
            model = TextModel.load(base)
            assert model.decode(model.encode("the choir")).strip() == "the choir"
            assert model.eos_token_ids >= {1, 2}
            assert model.takes_chats


@fuzz
@given(
    st.sampled_from(sorted(TOKENIZERS)),
    st.sampled_from(sorted(FILES)).flatmap(lambda name: st.tuples(st.just(name), damaged(FILES[name]))),
)
def test_what_stands_beside_a_tokenizer(kind: str, change: tuple[str, bytes]) -> None:
    read(kind, dict([change]))  # anything else raises


@fuzz
@given(st.sampled_from(sorted(TOKENIZERS)).flatmap(lambda kind: st.tuples(st.just(kind), damaged(TOKENIZERS[kind]))))
def test_tokenizers_with_other_bytes(change: tuple[str, bytes]) -> None:
    read(change[0], {"tokenizer.json": change[1]})  # anything else raises


@fuzz
@given(st.sampled_from(sorted(TOKENIZERS)), st.integers(0, 1 << 16), WORDS | st.sampled_from([2**31, 2**32 - 1, 10**30, "", "\0"]))
def test_tokenizers_with_another_value_somewhere(kind: str, at: int, value: object) -> None:
    """Bytes that are changed are mostly no JSON: here one value of a good tokenizer is another, of its vocabulary seldom."""
    tokenizer: Any = json.loads(TOKENIZERS[kind])
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, inner in list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()):
            if key in ("vocab", "merges"):
                places.append((inner, next(iter(inner)) if isinstance(inner, dict) else 0)) if inner else None
            else:
                walk(inner)
            places.append((node, key))

    walk(tokenizer)
    node, key = places[at % len(places)]
    node[key] = value
    read(kind, {"tokenizer.json": json.dumps(tokenizer).encode()})  # anything else raises
