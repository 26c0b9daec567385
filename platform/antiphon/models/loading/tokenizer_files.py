"""Rebuilds a Hugging Face tokenizer (tokenizer.json, tokenizer_config.json) from a GGUF file's fields (control speed).

Two kinds: byte-level BPE ("gpt2"), where GGUF names how text is cut into words (``tokenizer.ggml.pre``) instead of storing it and
the table below holds the rules; and SentencePiece BPE ("llama"), where any two neighbours merge whose joined text is a token, the
best score first, and what is no token becomes bytes.
Must not know: weights, or how the gateway uses a tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from antiphon.core.errors import CheckpointInvalid, UnsupportedModel
from antiphon.models.loading.gguf_file import GgufFile


class _TokenType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class _WordRule:
    """How text becomes words before byte-pair merging, and what the tokenizers of that kind do besides."""

    split: Callable[[], Any]
    nfc: bool = False
    ignore_merges: bool = False  # a word that is a token is taken whole
    add_bos: bool = False  # where the file does not say


def _byte_level(*, use_regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _digits_then_words() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level(use_regex=True)])


def _words() -> Any:
    return _byte_level(use_regex=True)


def _pattern(digits: str) -> Callable[[], Any]:
    """The cut of cl100k and its relatives; they differ in how many digits stay together."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), _byte_level(use_regex=False)]
    )


_QWEN2: Final = _WordRule(split=_pattern(r"\p{N}"), nfc=True)
_LLAMA3: Final = _WordRule(split=_pattern(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
_DIGITS: Final = _WordRule(split=_digits_then_words)

WORD_RULES: Final[Mapping[str, _WordRule]] = {
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "gpt-2": _WordRule(split=_words),
    "qwen2": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}


def write_tokenizer(gguf: GgufFile, out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json (special tokens, chat template) into ``out``.

    Raises:
        UnsupportedModel: the tokenizer's kind or word rule is not in the table.
        CheckpointInvalid: a field is missing or contradicts another.
    """
    kind = gguf.text("tokenizer.ggml.model")
    if kind not in _KINDS:
        known = ", ".join(sorted(_KINDS))
        raise UnsupportedModel(f"{gguf.path}: tokenizer of kind {kind!r} can't be converted (only {known})")
    tokenizer = _KINDS[kind](gguf)
    tokenizer.save(str(out / "tokenizer.json"))
    config = json.dumps(_tokenizer_config(gguf), indent=2, ensure_ascii=False)
    (out / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")


def _byte_level_bpe(gguf: GgufFile) -> Any:
    pre = gguf.text("tokenizer.ggml.pre", "default")
    rule = WORD_RULES.get(pre)
    if rule is None:
        known = ", ".join(sorted(WORD_RULES))
        raise UnsupportedModel(f"{gguf.path}: field 'tokenizer.ggml.pre' is {pre!r}; known are {known}")
    tokens, types = _vocabulary(gguf)
    vocab = {token: index for index, token in enumerate(tokens) if types[index] != _TokenType.UNUSED}
    merges = [_merge(gguf, merge) for merge in gguf.texts("tokenizer.ggml.merges")]
    try:
        tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=rule.ignore_merges))
    except Exception as error:  # the library raises plain Exception for a merge of unknown tokens
        raise CheckpointInvalid(f"{gguf.path}: field 'tokenizer.ggml.merges' does not fit its tokens: {error}") from error
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = rule.split()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(_added(tokens, types))
    _begin_with_bos(gguf, tokenizer, tokens, default=rule.add_bos)
    return tokenizer


def _sentencepiece_bpe(gguf: GgufFile) -> Any:
    for key, served in (("remove_extra_whitespaces", False), ("add_eos_token", False), ("escape_whitespaces", True)):
        if gguf.flag(f"tokenizer.ggml.{key}", served) is not served:
            raise UnsupportedModel(f"{gguf.path}: field 'tokenizer.ggml.{key}' is {not served}, which is not supported")
    if gguf.has("tokenizer.ggml.precompiled_charsmap"):
        raise UnsupportedModel(f"{gguf.path}: field 'tokenizer.ggml.precompiled_charsmap' is not supported")
    tokens, types = _vocabulary(gguf)
    scores = gguf.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise CheckpointInvalid(f"{gguf.path}: field 'tokenizer.ggml.scores' has {len(scores)} entries for {len(tokens)} tokens")
    vocab = {token: index for index, token in enumerate(tokens) if types[index] != _TokenType.UNUSED}
    unknown = _special_id(gguf, "unknown", len(tokens))
    tokenizer = Tokenizer(
        BPE(
            vocab=vocab,
            merges=_merges_of_scores(tokens, types, scores),
            unk_token=None if unknown is None else tokens[unknown],
            byte_fallback=_TokenType.BYTE in types,
            fuse_unk=True,
        )
    )
    prefix = gguf.flag("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    # User-defined tokens are found in the text as the model sees it, its spaces replaced.
    tokenizer.add_tokens(_added(tokens, types, normalized=True))
    _begin_with_bos(gguf, tokenizer, tokens, default=True)
    return tokenizer


_SPACE: Final = "\u2581"
_KINDS: Final[Mapping[str, Callable[[GgufFile], Any]]] = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}


def _merges_of_scores(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of ordinary tokens whose joined text is one, the pairs of better-scored tokens first."""
    ids = {token: index for index, token in enumerate(tokens) if types[index] == _TokenType.NORMAL}
    merges: list[tuple[str, str]] = []
    for token in sorted(ids, key=lambda token: -scores[ids[token]]):
        pairs = [(token[:at], token[at:]) for at in range(1, len(token)) if token[:at] in ids and token[at:] in ids]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _begin_with_bos(gguf: GgufFile, tokenizer: Any, tokens: Sequence[str], *, default: bool) -> None:
    bos = _special_id(gguf, "bos", len(tokens))
    if bos is not None and gguf.flag("tokenizer.ggml.add_bos_token", default):
        text = tokens[bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{text} $A", pair=f"{text} $A {text}:1 $B:1", special_tokens=[(text, bos)]
        )


def _vocabulary(gguf: GgufFile) -> tuple[list[str], list[int]]:
    tokens = list(gguf.texts("tokenizer.ggml.tokens"))
    types = list(gguf.integers("tokenizer.ggml.token_type"))
    if len(types) != len(tokens):
        raise CheckpointInvalid(f"{gguf.path}: field 'tokenizer.ggml.token_type' has {len(types)} entries for {len(tokens)} tokens")
    return tokens, types


def _merge(gguf: GgufFile, merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        raise CheckpointInvalid(f"{gguf.path}: field 'tokenizer.ggml.merges' holds {merge!r}, not two tokens")
    return left, right


def _added(tokens: list[str], types: list[int], *, normalized: bool = False) -> list[AddedToken]:
    """Tokens found in the text before it is cut into words; ``normalized``: user-defined ones after it was normalised."""
    return [
        AddedToken(
            token,
            special=types[index] == _TokenType.CONTROL,
            normalized=normalized and types[index] == _TokenType.USER_DEFINED,
        )
        for index, token in enumerate(tokens)
        if types[index] in (_TokenType.CONTROL, _TokenType.USER_DEFINED)
    ]


def _special_id(gguf: GgufFile, name: str, num_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    index = gguf.optional_integer(key)
    if index is not None and not 0 <= index < num_tokens:
        raise CheckpointInvalid(f"{gguf.path}: field {key!r} is {index}, but there are {num_tokens} tokens")
    return index


def _tokenizer_config(gguf: GgufFile) -> dict[str, Any]:
    tokens = gguf.texts("tokenizer.ggml.tokens")
    architecture = gguf.text("general.architecture")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        "clean_up_tokenization_spaces": False,
        "model_max_length": gguf.integer(f"{architecture}.context_length"),
    }
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    for role, name in names.items():
        index = _special_id(gguf, name, len(tokens))
        if index is not None:
            config[role] = tokens[index]
    if gguf.has("tokenizer.chat_template"):
        config["chat_template"] = gguf.text("tokenizer.chat_template")
    return config
