"""The only door to llguidance: a grammar over a model's vocabulary, and which tokens it allows next (step speed).

A matcher's state is a function of the grammar and the output's ids, so that preemption, hand-off and another worker's going on
need nothing but the ids. Must not know: JSON schemas, formats of calls, or torch.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from antiphon.core.errors import CheckpointInvalid, StructureRefused
from antiphon.worker.structure.checking import BOUND, MAX_GRAMMAR_CHARS

MAX_WALK_S = 0.1  # of processor time; what people write takes a hundredth of it
_WALK_BYTES = 64
_MAX_CACHED = 64  # compiled grammars; those of running requests are held by their matchers
_MAX_VOCABULARIES = 4  # by end-of-sequence ids: one model has one
_UNWRITABLE = "doesn't satisfy the grammar; forced bytes"
_DEAD_END = "no token of this model's vocabulary writes what must come"
_SPECIAL_MARK = b"\xff"  # llguidance marks special tokens' bytes with it


def limits() -> LLParserLimits:
    """Bounds of one grammar, to compile and per token: what exceeds them ends with an error, never late."""
    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        max_grammar_size=500_000,
        step_max_items=50_000,
        max_items_in_row=2_000,
        max_lexer_states=50_000,
    )


def why_invalid(grammar: str) -> str | None:
    """What is wrong with a grammar; None when it compiles. Takes as long as it takes: see ``checking``."""
    wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=limits())
    return messages[0] if wrong else None


class _Bytes:
    """A vocabulary of single bytes, as llguidance reads one; and ids that grammars name."""

    eos_token_id = 256
    bos_token_id = None

    def __init__(self, num_ids: int) -> None:
        self.tokens = [bytes([byte]) for byte in range(256)] + [b"<%d>" % i for i in range(256, num_ids)]
        self.special_token_ids = list(range(256, num_ids))

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def why_unaffordable(grammar: str) -> str | None:
    """Why a grammar that compiles is too much per token, seen by a walk along random answers, byte by byte; None when it isn't.

    Compiling over a vocabulary takes longer than validating, and a long text that must come takes its length at every token.
    """
    rest = grammar.partition("\n")[2]
    if rest.startswith(BOUND):
        grammar = f"start: {rest.removeprefix(BOUND)}"
    named = [int(found) for found in re.findall(r"<\[(\d{1,6})\]>", grammar)]
    vocabulary = LLTokenizer(TokenizerWrapper(_Bytes(max(named, default=0) + 257)), slices=[])
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits())
    chance = random.Random(0)
    start_s = time.thread_time()
    for _ in range(_WALK_BYTES):
        allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little").nonzero()[0]
        if time.thread_time() - start_s > MAX_WALK_S:
            return "holding an answer to it takes too long per token"
        if matcher.is_error():
            return f"no answer can be held to it: {matcher.get_error().splitlines()[0]}"
        if len(allowed) == 0 or matcher.is_stopped():
            return None
        matcher.consume_token(int(chance.choice(allowed)))
    return None


class Matcher:
    """Where one output stands in its grammar. Belongs to one thread."""

    __slots__ = ("_address", "_allowed", "_matcher")

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._allowed = np.zeros(-(-vocab_size // 32) * 4, dtype=np.uint8)
        self._address = self._allowed.ctypes.data

    def allowed(self) -> npt.NDArray[np.uint8]:
        """A bit per token of the vocabulary, lowest first, of whole words of 32; good until asked again."""
        self._matcher.unsafe_compute_mask_ptr(self._address, self._allowed.nbytes)
        return self._allowed

    def append(self, token_id: int) -> None:
        """A token was chosen."""
        self._matcher.consume_token(token_id)

    @property
    def failure(self) -> str | None:
        """Why it can't go on, if it can't: a limit was hit, or the vocabulary lacks a byte that must come."""
        if not self._matcher.is_error():
            return None
        error = self._matcher.get_error().splitlines()[0]
        # Of tokens that were allowed: a byte of theirs stood for one that no token has.
        return f"{_DEAD_END} ({error})" if _UNWRITABLE in error else error


class Grammars:
    """Grammars over one checkpoint's vocabulary, compiled once each. Any thread may use it.

    Args:
        tokenizer: the checkpoint's tokenizer.json.
        vocab_size: of the model; may be above the tokenizer's.
    """

    def __init__(self, tokenizer: Path, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._vocabularies: OrderedDict[frozenset[int], LLTokenizer] = OrderedDict()
        self._compiled: OrderedDict[tuple[str, frozenset[int]], LLMatcher] = OrderedDict()

    def matcher(self, grammar: str, end_ids: frozenset[int], output: Sequence[int] = ()) -> Matcher:
        """A matcher that stands after ``output``; ``end_ids`` are allowed where the grammar may end.

        Raises:
            StructureRefused: the grammar does not compile, or ``output`` is not of it.
            CheckpointInvalid: the tokenizer can't be read.
        """
        with self._lock:
            root = self._root(grammar, end_ids)
        matcher = root.deep_copy()
        if output and not matcher.consume_tokens(list(output)):
            raise StructureRefused(f"the output so far is not of its grammar: {matcher.get_error().splitlines()[0]}", "grammar")
        return Matcher(matcher, self._vocab_size)

    def token_bytes(self, end_ids: frozenset[int]) -> Callable[[int], bytes]:
        """Bytes of single tokens; a special one's are those of its name."""
        with self._lock:
            vocabulary = self._vocabulary(end_ids)

        def of(token_id: int) -> bytes:
            return bytes(vocabulary.decode_bytes([token_id])).removeprefix(_SPECIAL_MARK)

        return of

    def _root(self, grammar: str, end_ids: frozenset[int]) -> LLMatcher:
        key = (grammar, end_ids)
        found = self._compiled.get(key)
        if found is not None:
            self._compiled.move_to_end(key)
            return found
        if len(grammar) > MAX_GRAMMAR_CHARS:
            raise StructureRefused(f"the grammar has {len(grammar)} characters, above the limit of {MAX_GRAMMAR_CHARS}", "grammar")
        made = LLMatcher(self._vocabulary(end_ids), grammar, log_level=0, limits=limits())
        if made.is_error():
            raise StructureRefused(f"the grammar does not compile: {made.get_error().splitlines()[0]}", "grammar")
        self._compiled[key] = made
        if len(self._compiled) > _MAX_CACHED:
            self._compiled.popitem(last=False)
        return made

    def _vocabulary(self, end_ids: frozenset[int]) -> LLTokenizer:
        found = self._vocabularies.get(end_ids)
        if found is not None:
            return found
        try:
            text = self._tokenizer.read_text(encoding="utf-8")
            ends = sorted(i for i in end_ids if i < self._vocab_size)
            made = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=ends or None)
        except (OSError, ValueError) as error:
            raise CheckpointInvalid(f"{self._tokenizer}: {error}") from error
        self._vocabularies[end_ids] = made
        if len(self._vocabularies) > _MAX_VOCABULARIES:
            self._vocabularies.popitem(last=False)
        return made
