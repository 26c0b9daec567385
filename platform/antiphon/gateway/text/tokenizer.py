"""A checkpoint's tokenizer, chat template and end-of-sequence ids: the only door between text and tokens (request speed).

Reads tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json and config.json of a checkpoint
directory. Must not know: weights, requests or workers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from antiphon.core.errors import CheckpointInvalid, InvalidInput
from antiphon.gateway.text.chat_template import ChatTemplate
from antiphon.gateway.text.detokenizer import (
    ByteLevelDetokenizer,
    Detokenizer,
    WindowDetokenizer,
    byte_level_bytes,
)

INLINE_CHARS = 2048  # shorter texts are tokenized on the event loop; that takes less than handing them over

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenText:
    """One token as clients see it next to its log-probability."""

    text: str  # with replacement characters where the token is a part of a character
    raw: bytes


class TextModel:
    """Text to tokens and back for one model. Immutable once loaded; any thread may use it.

    Args:
        tokenizer: the tokenizer; truncation and padding are switched off.
        chat_template: None = the model takes no chats.
        eos_token_ids: ids that end a text.
    """

    def __init__(self, tokenizer: Tokenizer, *, chat_template: ChatTemplate | None, eos_token_ids: Iterable[int]) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._byte_level = _is_byte_level(tokenizer)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.special_token_ids = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._literal_ids = _literal_ids(tokenizer) if self._byte_level else frozenset()
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, directory: Path) -> TextModel:
        """Read a checkpoint directory.

        Raises:
            CheckpointInvalid: tokenizer.json is missing, or a file is not what it should be.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointInvalid(f"{directory} has no tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointInvalid(f"{path}: {error}") from error
        config = _read_json(directory / "tokenizer_config.json")
        special_tokens = _special_tokens(config)
        eos_token_ids = _eos_token_ids(directory)
        eos = special_tokens.get("eos_token")
        if eos is not None and (eos_id := tokenizer.token_to_id(eos)) is not None:
            eos_token_ids.add(eos_id)
        source = _chat_template_source(directory, config)
        template = None if source is None else ChatTemplate(source, special_tokens)
        return cls(tokenizer, chat_template=template, eos_token_ids=eos_token_ids)

    @property
    def takes_chats(self) -> bool:
        """True when the checkpoint has a chat template."""
        return self._chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text.

        Raises:
            InvalidInput: the text has no UTF-8 form (it holds lone surrogates).
        """
        try:
            (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)  # lets other threads run
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidInput("the text is not valid Unicode: it holds half of a surrogate pair", "prompt") from error
        return tuple(encoding.ids)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text of a chat.

        Raises:
            InvalidInput: the model has no chat template, or it refuses the messages.
        """
        if self._chat_template is None:
            raise InvalidInput("this model has no chat template; use completions", "messages")
        return self._chat_template.render(messages, add_generation_prompt=add_generation_prompt, variables=variables or {})

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a chat; the template writes special tokens itself."""
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, variables=variables)
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of tokens; ids outside the vocabulary give none."""
        if self._byte_level:
            detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
            return "".join(detokenizer.feed(token_id) for token_id in token_ids) + detokenizer.flush()
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A new choice's detokenizer."""
        skipped = self.special_token_ids if skip_special_tokens else frozenset()
        if self._byte_level:
            return ByteLevelDetokenizer(self._tokenizer, skipped, self._literal_ids)
        return WindowDetokenizer(self._tokenizer, skipped)

    def token_text(self, token_id: int) -> TokenText:
        """One token by itself."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return TokenText(text="", raw=b"")
        if token_id in self._literal_ids:
            raw = token.encode()
        elif self._byte_level:
            raw = byte_level_bytes(token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            raw = bytes([int(token[3:5], 16)])
        else:
            raw = token.replace("▁", " ").encode()
        return TokenText(text=raw.decode(errors="replace"), raw=raw)


async def in_thread(executor: Executor, num_chars: int, work: Any, *args: Any) -> Any:
    """Run text work inline when it is short, otherwise in ``executor``, so that long prompts don't hold up streams."""
    if num_chars <= INLINE_CHARS:
        return work(*args)
    return await asyncio.get_running_loop().run_in_executor(executor, work, *args)


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    decoder = json.loads(tokenizer.to_str()).get("decoder")
    while isinstance(decoder, dict) and decoder.get("type") == "Sequence" and len(decoder.get("decoders", ())) == 1:
        decoder = decoder["decoders"][0]
    return isinstance(decoder, dict) and decoder.get("type") == "ByteLevel"


def _literal_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Added tokens that are found in a text as they are written, before it becomes bytes: they stand for their own text."""
    normalised_to_bytes = '"ByteLevel"' in json.dumps(json.loads(tokenizer.to_str()).get("normalizer"))
    added = tokenizer.get_added_tokens_decoder().items()
    return frozenset(token_id for token_id, token in added if not (normalised_to_bytes and token.normalized))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointInvalid(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointInvalid(f"{path}: expected an object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointInvalid(f"{path}: not UTF-8: byte {error.start}") from error
    except OSError as error:
        raise CheckpointInvalid(f"{path}: can't be read: {error.strerror or error}") from error


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in _SPECIAL_TOKENS:
        value = config.get(name)
        if isinstance(value, dict):  # an AddedToken, written out
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _eos_token_ids(directory: Path) -> set[int]:
    for name in ("generation_config.json", "config.json"):
        value = _read_json(directory / name).get("eos_token_id")
        found = value if isinstance(value, list) else [value]
        if ids := {item for item in found if isinstance(item, int) and not isinstance(item, bool)}:
            return ids  # an empty list says nothing, and leaves it to the next file
    return set()


def _chat_template_source(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    value = config.get("chat_template")
    if isinstance(value, list):  # several by name
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
