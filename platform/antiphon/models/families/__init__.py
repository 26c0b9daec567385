"""Families: from a Hugging Face ``config.json`` to a DecoderConfig, one small module each (control speed).

A module here has ``ARCHITECTURES``, the names it answers to in ``config.json``'s ``architectures``, and
``describe(raw) -> DecoderConfig``, which refuses by name what it can't express. Reading a field is declaring it known: any other
that could matter is refused after it. Must not know: tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from antiphon.core.errors import UnsupportedModel
from antiphon.models.config import DecoderConfig
from antiphon.models.families import (
    adamoe,
    deepseek,
    dots1,
    gemma2,
    gemma3,
    glm_moe,
    gpt_oss,
    kimi_linear,
    lfm2,
    llama,
    longcat_flash,
    mixtral,
    olmo2,
    olmoe,
    pangu_pro_moe,
    phimoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_moe,
    qwen3_next,
    step3,
    step3p7,
)
from antiphon.models.families.fields import Fields
from antiphon.models.families.sane import check_sane, check_written
from antiphon.models.loading.stored.quantization import check_quantization

_MODULES = (
    adamoe,
    deepseek,
    dots1,
    gemma2,
    gemma3,
    glm_moe,
    gpt_oss,
    kimi_linear,
    lfm2,
    llama,
    longcat_flash,
    mixtral,
    olmo2,
    olmoe,
    pangu_pro_moe,
    phimoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_moe,
    qwen3_next,
    step3,
    step3p7,
)
_MAX_LAYERS = 10_000  # a description is made of each
_Describe = Callable[[Mapping[str, Any]], DecoderConfig]
_FAMILIES: dict[str, _Describe] = {name: module.describe for module in _MODULES for name in module.ARCHITECTURES}


def _check_size(raw: Mapping[str, Any]) -> None:
    num_layers = raw.get("num_hidden_layers")
    if num_layers is not None and int(num_layers) > _MAX_LAYERS:
        raise UnsupportedModel(f"{num_layers} layers are more than any model has", "num_hidden_layers")


def describe(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a parsed ``config.json`` describes.

    Raises:
        UnsupportedModel: the family is unknown, or a field that would change results is not supported.
    """
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list):
        raise UnsupportedModel(f"architectures is {architectures!r}, not a list of names", "architectures")
    for name in architectures:
        if isinstance(name, str) and name in _FAMILIES:
            fields = Fields({**raw, "architectures": [name]})
            try:
                check_written(raw)
                _check_size(fields)
                check_quantization(fields)
                config = _FAMILIES[name](fields)
                fields.refuse_unread()
                check_sane(config)
            except (KeyError, TypeError, ValueError, IndexError, ArithmeticError, AttributeError) as error:
                raise UnsupportedModel(f"config.json of {name}: {error!r}", str(error).strip("'")) from error
            return config
    known = ", ".join(sorted(_FAMILIES))
    raise UnsupportedModel(f"architectures {architectures} are unknown; known: {known}", "architectures")
