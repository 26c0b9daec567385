"""Families: from a Hugging Face ``config.json`` to a DecoderConfig, one small module each (control speed).

A module here has ``ARCHITECTURES``, the names it answers to in ``config.json``'s ``architectures``, and
``describe(raw) -> DecoderConfig``, which refuses by name what it can't express. Must not know: tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from antiphon.core.errors import UnsupportedModel
from antiphon.models.config import DecoderConfig
from antiphon.models.families import llama, qwen2, qwen3

_FAMILIES = {name: module.describe for module in (llama, qwen2, qwen3) for name in module.ARCHITECTURES}


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a parsed ``config.json`` describes.

    Raises:
        UnsupportedModel: the family is unknown, or a field that would change results is not supported.
    """
    architectures = raw.get("architectures") or []
    for name in architectures:
        if name in _FAMILIES:
            try:
                return _FAMILIES[name](raw)
            except (KeyError, TypeError, ValueError) as error:
                raise UnsupportedModel(f"config.json of {name}: {error!r}", str(error).strip("'")) from error
    known = ", ".join(sorted(_FAMILIES))
    raise UnsupportedModel(f"architectures {architectures} are unknown; known: {known}", "architectures")
