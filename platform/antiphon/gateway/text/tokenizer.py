"""A checkpoint's tokenizer, chat template and end-of-sequence ids: the only door between text and tokens (request speed).

Reads tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json and config.json of a checkpoint
directory. Must not know: weights, requests or workers.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from antiphon.core.errors import CheckpointInvalid, ContextLengthExceeded, InvalidInput
from antiphon.gateway.text.checkpoint_texts import (
    read_chat_template,
    read_eos_token_ids,
    read_json,
    read_sampling_defaults,
    read_special_tokens,
)
from antiphon.gateway.text.detokenizer import (
    ByteLevelDetokenizer,
    Detokenizer,
    WindowDetokenizer,
    byte_level_bytes,
)
from antiphon.gateway.text.templates.chat_template import ChatTemplate
from antiphon.gateway.text.templates.markers import ControlMarkers

_log = logging.getLogger(__name__)

_PIECE_CHARS = 64 * 2**10  # a text is measured in pieces of so many characters before it is tokenized whole
_CUT_TOKENS = 64
_MAX_TOKEN_ID = 2**24  # the library lays tables out by the largest id: one of 2**31 takes gigabytes
INLINE_CHARS = 2048  # shorter texts are tokenized on the event loop; that takes less than handing them over


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenText:
    """One token as clients see it next to its log-probability."""

    text: str  # with replacement characters where the token is a part of a character
    raw: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedText:
    """A text, or a pair of texts, as token ids."""

    token_ids: tuple[int, ...]
    num_first_tokens: int | None = None  # of a pair's first text, where the tokenizer tells them apart


class TextModel:
    """Text to tokens and back for one model. Immutable once loaded; any thread may use it.

    Args:
        tokenizer: the tokenizer; truncation and padding are switched off.
        chat_template: None = the model takes no chats.
        eos_token_ids: ids that end a text.
        markers_are_text: control markers in chats' messages are text; False = they become control tokens.
        sampling_defaults: what the checkpoint says about sampling, by ``Sampling``'s field names; None = nothing.

    Raises:
        CheckpointInvalid: an id that no vocabulary has.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        chat_template: ChatTemplate | None,
        eos_token_ids: Iterable[int],
        markers_are_text: bool = True,
        sampling_defaults: Mapping[str, float] | None = None,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._byte_level = _is_byte_level(_written(tokenizer.decoder))
        self._markers_are_text = markers_are_text
        self.sampling_defaults = {} if sampling_defaults is None else dict(sampling_defaults)
        self._plain: Tokenizer | None = None  # made when a client first writes a marker
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        if (largest := max(vocabulary.values(), default=0)) > _MAX_TOKEN_ID:
            raise CheckpointInvalid(f"a token has the id {largest}, of a vocabulary of {len(vocabulary)}")
        self._longest_token = max(map(len, vocabulary), default=1)
        self.eos_token_ids = frozenset(eos_token_ids)
        special = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.special_token_ids = frozenset(special)
        self._markers = _control_markers(tokenizer, special.values())
        self._literal_ids = _literal_ids(tokenizer) if self._byte_level else frozenset()
        self.special_tokens: Mapping[str, int] = {
            token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self.template_source = None if chat_template is None else chat_template.source
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, directory: Path, *, markers_are_text: bool = True) -> TextModel:
        """Read a checkpoint directory.

        Args:
            directory: where it is.
            markers_are_text: see the class.

        Raises:
            CheckpointInvalid: tokenizer.json is missing, or a file is not what it should be.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointInvalid(f"{directory} has no tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.encode_batch(["a", ("a", "b")])  # what it puts around a text is there
        except BaseException as error:  # tokenizers raises bare Exception, and what Rust panics with is none
            if not (isinstance(error, Exception) or _is_panic(error)):
                raise
            raise CheckpointInvalid(f"{path}: {error}") from error
        config = read_json(directory / "tokenizer_config.json")
        special_tokens = read_special_tokens(config)
        eos_token_ids = read_eos_token_ids(directory)
        eos = special_tokens.get("eos_token")
        if eos is not None and (eos_id := tokenizer.token_to_id(eos)) is not None:
            eos_token_ids.add(eos_id)
        source = read_chat_template(directory, config)
        template = None if source is None else ChatTemplate(source, special_tokens)
        return cls(
            tokenizer,
            chat_template=template,
            eos_token_ids=eos_token_ids,
            markers_are_text=markers_are_text,
            sampling_defaults=read_sampling_defaults(directory),
        )

    @property
    def takes_chats(self) -> bool:
        """True when the checkpoint has a chat template."""
        return self._chat_template is not None

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The checkpoint's chat template, if it has one."""
        return self._chat_template

    def encode(self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> tuple[int, ...]:
        """Token ids of a text.

        Args:
            text: the text.
            add_special_tokens: with those that the tokenizer puts around a text.
            max_tokens: refuse, at little cost, a text that is clearly longer; None = any length.

        Raises:
            InvalidInput: the text has no UTF-8 form (it holds lone surrogates).
            ContextLengthExceeded: it has far more than ``max_tokens`` tokens.
        """
        if max_tokens is not None:
            self.refuse_longer(text, max_tokens)
        return self._ids(self._tokenizer, text, add_special_tokens=add_special_tokens)

    def beginning(self, text: str, num_tokens: int) -> str:
        """The text, or as much of it as holds more than ``num_tokens`` tokens. Raises InvalidInput."""
        counted = 0
        for start in range(0, len(text) - _PIECE_CHARS, _PIECE_CHARS):
            piece = text[start : start + _PIECE_CHARS]
            counted += max(0, len(self._ids(self._tokenizer, piece, add_special_tokens=False)) - _CUT_TOKENS)
            if counted > num_tokens:
                return text[: start + _PIECE_CHARS]
        return text

    def refuse_longer(self, text: str, max_tokens: int) -> None:
        """Refuse, at little cost, a text that has far more than ``max_tokens`` tokens.

        Raises:
            InvalidInput, ContextLengthExceeded: as ``encode``.
        """
        if len(text) <= _PIECE_CHARS:
            return
        if len(text) > max_tokens * self._longest_token:
            raise ContextLengthExceeded(f"{len(text)} characters are more than {max_tokens} tokens can hold", "prompt")
        num_tokens = 0
        for start in range(0, len(text), _PIECE_CHARS):
            # Cutting a text may add tokens at the cut, never many.
            num_tokens += (
                len(self._ids(self._tokenizer, text[start : start + _PIECE_CHARS], add_special_tokens=False)) - _CUT_TOKENS
            )
            if num_tokens > max_tokens:
                raise ContextLengthExceeded(f"the text has more than {max_tokens} tokens, the model's context", "prompt")

    @staticmethod
    def _ids(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(_encoded(tokenizer, text, add_special_tokens=add_special_tokens).ids)

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
        """Token ids of a chat; the template writes special tokens itself, and what clients write is text."""
        guarded, shown, breaker = self.guard(messages, variables or {})
        text = self.render_chat(guarded, add_generation_prompt=add_generation_prompt, variables=shown)
        return self.encode_rendered(text, breaker)

    def guard(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], dict[str, Any], str | None]:
        """Messages and variables as a template may see them, and what ``encode_rendered`` needs to know of it.

        Raises:
            InvalidInput: they hold every character that could break a marker.
        """
        if not self._markers_are_text:
            return [dict(message) for message in messages], dict(variables), None
        return self._markers.guarded(messages, variables)

    def encode_begun(self, text: str, max_tokens: int | None = None) -> tuple[int, ...]:
        """Token ids of an answer that a client began: its thoughts' markers count, others are text. Raises as ``encode``."""
        (message,), _, breaker = self.guard([{"role": "assistant", "content": text}], {})
        return self.encode_rendered(message["content"], breaker, max_tokens)

    def encode_rendered(self, text: str, breaker: str | None, max_tokens: int | None = None) -> tuple[int, ...]:
        """Token ids of a rendered chat.

        Args:
            text: what the template made of guarded messages.
            breaker: what ``guard`` gave beside them.
            max_tokens: as ``encode``.

        Raises:
            InvalidInput, ContextLengthExceeded: as ``encode``.
        """
        if breaker is None or breaker not in text:
            return self.encode(text, add_special_tokens=False, max_tokens=max_tokens)
        if max_tokens is not None:
            self.refuse_longer(text, max_tokens)
        ids: list[int] = []
        for piece, is_plain in self._markers.pieces(text, breaker):
            ids += self.encode_plain(piece) if is_plain else self._ids(self._tokenizer, piece, add_special_tokens=False)
        return tuple(ids)

    def encode_plain(self, text: str, *, max_tokens: int | None = None) -> tuple[int, ...]:
        """Token ids of a text in which control markers are text; ``max_tokens`` as ``encode``. Raises InvalidInput."""
        if max_tokens is not None:
            self.refuse_longer(text, max_tokens)
        if self._plain is None:
            plain = Tokenizer.from_str(self._tokenizer.to_str())
            plain.encode_special_tokens = True
            self._plain = plain
        return self._ids(self._plain, text, add_special_tokens=False)

    def encode_cut(self, text: str, cut: int | None, *, add_special_tokens: bool = True) -> EncodedText:
        """A text as an encoder reads it, cut to ``cut`` tokens, special ones included; None = whole. Raises InvalidInput."""
        ids = self.encode(text, add_special_tokens=add_special_tokens)
        if cut is None or len(ids) <= cut:
            return EncodedText(token_ids=ids)
        encoding = self._encoding(text)
        num_special = self._tokenizer.num_special_tokens_to_add(False) if add_special_tokens else 0
        encoding.truncate(max(0, cut - num_special))
        return EncodedText(token_ids=tuple(self._tokenizer.post_process(encoding, None, add_special_tokens).ids)[:cut])

    def encode_pair(self, first: str, second: str, cut: int | None) -> EncodedText:
        """Two texts as an encoder reads them, cut to ``cut`` tokens, the second first; None = whole. Raises InvalidInput."""
        one, other = self._encoding(first), self._encoding(second)
        if cut is not None:
            room = max(0, cut - self._tokenizer.num_special_tokens_to_add(True))
            one.truncate(min(len(one.ids), room))
            other.truncate(min(len(other.ids), room - len(one.ids)))
        joined = self._tokenizer.post_process(one, other, True)
        ids = tuple(joined.ids)
        num_first = next((at for at, kind in enumerate(joined.type_ids) if kind), None)
        return EncodedText(token_ids=ids, num_first_tokens=num_first)

    def _encoding(self, text: str) -> Encoding:
        return _encoded(self._tokenizer, text, add_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of tokens; ids outside the vocabulary give none."""
        if self._byte_level:
            detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
            return "".join(detokenizer.feed(token_id) for token_id in token_ids) + detokenizer.flush()
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, *, skip_special_tokens: bool = True, kept: Collection[str] = ()) -> Detokenizer:
        """A new choice's detokenizer; special tokens in ``kept`` are text all the same."""
        skipped = self.special_token_ids if skip_special_tokens else frozenset()
        if kept:
            skipped = skipped - {self.special_tokens[token] for token in kept if token in self.special_tokens}
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


def _control_markers(tokenizer: Tokenizer, special: Iterable[str]) -> ControlMarkers:
    normaliser = tokenizer.normalizer
    normalised = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special and t.normalized]
    if normaliser is None or not normalised:
        return ControlMarkers(special)

    def normalise(text: str) -> str:
        try:
            return str(normaliser.normalize_str(text))
        except (UnicodeEncodeError, TypeError):  # half of a surrogate pair: encoding refuses it
            return text

    return ControlMarkers(special, normalise=normalise, normalised=map(normalise, normalised))


def _encoded(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> Encoding:
    """A text's tokens. Raises InvalidInput."""
    try:
        (encoding,) = tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)  # lets other threads run
    except (UnicodeEncodeError, TypeError) as error:
        raise InvalidInput("the text is not valid Unicode: it holds half of a surrogate pair", "prompt") from error
    except BaseException as error:  # as in ``load``
        if not (isinstance(error, Exception) or _is_panic(error)):
            raise
        raise InvalidInput("the model's tokenizer has no tokens for this text", "prompt") from error
    return encoding


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"


def _written(part: Any) -> Any:
    """A part of a tokenizer as tokenizer.json has it, without its vocabulary, which takes seconds to write; None = it has none."""
    return None if part is None else json.loads(part.__getstate__())


def _is_byte_level(decoder: Any) -> bool:
    while isinstance(decoder, dict) and decoder.get("type") == "Sequence" and len(decoder.get("decoders", ())) == 1:
        decoder = decoder["decoders"][0]
    return isinstance(decoder, dict) and decoder.get("type") == "ByteLevel"


def _literal_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Added tokens that are found in a text as they are written, before it becomes bytes: they stand for their own text."""
    normalised_to_bytes = '"ByteLevel"' in json.dumps(_written(tokenizer.normalizer))
    added = tokenizer.get_added_tokens_decoder().items()
    return frozenset(token_id for token_id, token in added if not (normalised_to_bytes and token.normalized))
