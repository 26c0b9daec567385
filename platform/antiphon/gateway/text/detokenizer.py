"""Turns one choice's tokens into text, token by token (request speed: once per token).

Whatever is given out is final: the concatenation equals decoding all tokens at once, and a character whose bytes come in several
tokens is given out whole, with its last. Two ways lead there:

    ByteLevelDetokenizer   vocabularies whose tokens are plain bytes (GPT-2's alphabet: Llama 3, Qwen, SmolLM2); O(1) per token
    WindowDetokenizer      any other: decodes the newest tokens with and without the last, and gives out the difference

Must not know: stop strings, or where tokens come from.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection
from typing import Protocol

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Detokenizer(Protocol):
    """One choice's text so far."""

    def feed(self, token_id: int) -> str:
        """The text that has become final with this token; may be empty."""
        ...

    def flush(self) -> str:
        """No token follows: the rest, with replacement characters for what stayed incomplete."""
        ...


def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


_BYTE_OF = byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """The bytes a token of such a vocabulary stands for; one outside the alphabet stands for its own text."""
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:
        return token.encode()


class ByteLevelDetokenizer:
    """For vocabularies whose tokens are bytes.

    Args:
        tokenizer: names the tokens.
        skipped: ids that give no text (special tokens).
        literal: ids of added tokens that are their own text, though it may look like bytes of the alphabet ("café").
    """

    def __init__(self, tokenizer: Tokenizer, skipped: Collection[int], literal: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._literal = literal
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """See ``Detokenizer``."""
        token = None if token_id in self._skipped else self._tokenizer.id_to_token(token_id)
        if token is None:
            return ""
        return self._decoder.decode(token.encode() if token_id in self._literal else byte_level_bytes(token))

    def flush(self) -> str:
        """See ``Detokenizer``."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For any other vocabulary.

    A run of byte tokens is decoded as a whole (an invalid one becomes replacement characters from its first byte on), so it is held
    back until another token ends it. The window starts at the last but one place where text was final: decoders that treat the
    first token apart (leading spaces) then see it in both decodings, and it drops out of the difference.

    Args:
        tokenizer: decodes.
        skipped: ids that give no text (special tokens).
    """

    def __init__(self, tokenizer: Tokenizer, skipped: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._window: list[int] = []
        self._num_given = 0  # of the window's tokens, those whose text was given out

    def feed(self, token_id: int) -> str:
        """See ``Detokenizer``."""
        token = None if token_id in self._skipped else self._tokenizer.id_to_token(token_id)
        if token is None:
            return ""
        self._window.append(token_id)
        return "" if _BYTE_TOKEN.fullmatch(token) else self._advance()

    def flush(self) -> str:
        """See ``Detokenizer``."""
        return self._advance() if self._num_given < len(self._window) else ""

    def _advance(self) -> str:
        given = self._decode(self._window[: self._num_given])
        whole = self._decode(self._window)
        if self._num_given:
            self._window = self._window[self._num_given :]
        self._num_given = len(self._window)
        return whole[len(given) :]

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text
