"""Prompts with a suffix: what a model that can fill in the middle is asked with (request speed).

    prefix marker · text before · suffix marker · text after · middle marker ─► the model writes what stands between

The markers are tokens of the vocabulary; a model that has none can't be asked. Must not know: requests, doors.
"""

from __future__ import annotations

from dataclasses import dataclass

from antiphon.core.errors import InvalidInput
from antiphon.gateway.text.tokenizer import TextModel


class NoInfilling(InvalidInput):
    """The model can't fill in the middle."""

    code = "unsupported_parameter"


@dataclass(frozen=True, slots=True, kw_only=True)
class Markers:
    """One family's tokens; ``ends`` are those that end what was filled in, where the vocabulary has them."""

    prefix: str
    suffix: str
    middle: str
    ends: tuple[str, ...] = ()


FAMILIES: tuple[Markers, ...] = (
    Markers(  # Qwen2.5-Coder and Qwen3-Coder; CodeGemma
        prefix="<|fim_prefix|>",
        suffix="<|fim_suffix|>",
        middle="<|fim_middle|>",
        ends=("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>"),
    ),
    Markers(  # StarCoder, StarCoder2, Granite
        prefix="<fim_prefix>",
        suffix="<fim_suffix>",
        middle="<fim_middle>",
        ends=("<|endoftext|>", "<file_sep>"),
    ),
    Markers(prefix="<fim-prefix>", suffix="<fim-suffix>", middle="<fim-middle>", ends=("<|endoftext|>",)),  # SantaCoder
    Markers(prefix="▁<PRE>", suffix="▁<SUF>", middle="▁<MID>", ends=("▁<EOT>",)),  # Code Llama
    Markers(  # DeepSeek-Coder
        prefix="<｜fim▁begin｜>", suffix="<｜fim▁hole｜>", middle="<｜fim▁end｜>", ends=("<｜end▁of▁sentence｜>",)
    ),
)
_APART = "☺"  # before a suffix, so that a tokenizer that begins texts with a space puts it there; then taken off


def infilling(model: TextModel, before: str, after: str, *, max_tokens: int | None = None) -> tuple[int, ...]:
    """Token ids of the prompt for what stands between two texts, in which control markers are text.

    Args:
        model: the model.
        before: the text before the answer.
        after: the text behind it.
        max_tokens: refuse, at little cost, texts that are clearly longer; None = any length.

    Raises:
        NoInfilling: the vocabulary has no markers for it.
        InvalidInput: a text is not valid Unicode, or too long.
    """
    family = _family(model)
    prefix, suffix, middle = (_id(model, marker) for marker in (family.prefix, family.suffix, family.middle))
    begun = model.encode("")  # what the tokenizer puts before any text
    ids = model.encode_plain(before, max_tokens=max_tokens)
    return (*begun, prefix, *ids, suffix, *_continued(model, after, max_tokens), middle)


def infilling_ends(model: TextModel) -> frozenset[int]:
    """Tokens that end what was filled in, beside the model's own. Raises NoInfilling."""
    ends = (model.token_id(end) for end in _family(model).ends)
    return frozenset(end for end in ends if end is not None)


def _family(model: TextModel) -> Markers:
    for family in FAMILIES:
        if all(model.token_id(marker) is not None for marker in (family.prefix, family.suffix, family.middle)):
            return family
    raise NoInfilling("suffix: this model's vocabulary has no tokens to fill in the middle with", "suffix")


def _id(model: TextModel, marker: str) -> int:
    found = model.token_id(marker)
    assert found is not None, "the family was chosen by its markers"
    return found


def _continued(model: TextModel, text: str, max_tokens: int | None) -> tuple[int, ...]:
    """Tokens of a text that doesn't begin anything."""
    apart, ids = model.encode_plain(_APART), model.encode_plain(_APART + text, max_tokens=max_tokens)
    return ids[len(apart) :] if ids[: len(apart)] == apart else model.encode_plain(text)
