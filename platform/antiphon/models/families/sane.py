"""Figures of a ``config.json`` that no model has, though arithmetic takes them (control speed).

A weight's shape tells a wrong size, but not that an epsilon is NaN, that a rotation turns backwards, or that "false" is true. Must
not know: any family.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from antiphon.core.errors import UnsupportedModel
from antiphon.models.config import AttentionConfig, DecoderConfig
from antiphon.models.layers.rope_config import RopeConfig

_SECTIONS: Final = ("text_config", "rope_parameters", "rope_scaling")
_NUMBER: Final = re.compile(r"(num|n|max|original_max)_\w+|(\w+_)?(factor|size|dim|rank|eps|epsilon|theta|layers|heads)")
_COUNT: Final = re.compile(r"(num|max|original_max)_\w+|(\w+_)?(factor|size|eps|epsilon|theta|heads)|head_dim")
_FLAG: Final = re.compile(r"(use|tie|has|is)_\w+|\w+_(bias|prob)")


def check_written(raw: Mapping[str, Any], where: str = "") -> None:
    """Refuse numbers and flags that are written as something else: Python takes True for 1, and "false" for true.

    Raises:
        UnsupportedModel: one is.
    """
    for name, value in raw.items():
        if name in _SECTIONS and isinstance(value, Mapping):
            check_written(value, f"{where}{name}.")
        elif (isinstance(value, str) and _NUMBER.fullmatch(name)) or (isinstance(value, bool) and _COUNT.fullmatch(name)):
            raise UnsupportedModel(f"{where}{name} is {value!r}, not a number", f"{where}{name}")
        elif isinstance(value, str) and _FLAG.fullmatch(name):
            raise UnsupportedModel(f"{where}{name} is {value!r}, neither true nor false", f"{where}{name}")
        elif name == "partial_rotary_factor" and value is not None and not 0 <= value <= 1:
            raise UnsupportedModel(f"{where}{name} is {value!r}, not a part of 1", f"{where}{name}")


def check_sane(config: DecoderConfig) -> None:
    """Refuse what can't be computed with, or gives nonsense.

    Raises:
        UnsupportedModel: so it is.
    """
    for name in ("hidden_size", "vocab_size", "max_position"):
        _need(getattr(config, name) >= 1, f"{name} = {getattr(config, name)}: a model has some", name)
    _need(bool(config.layers), "a model without layers", "num_hidden_layers")
    _need(0 <= config.norm_eps < 1, f"the norms' epsilon is {config.norm_eps}", "norm_eps")
    for part in _parts(config):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, float | complex):
                _need(isinstance(value, float) and math.isfinite(value), f"{field.name} = {value}: not a finite number", field.name)
        if isinstance(part, RopeConfig):
            good = all(0 <= frequency < math.inf for frequency in part.inv_freq)
            _need(good, "a rotation's frequencies are finite and not negative", "rope_parameters")
        if isinstance(part, AttentionConfig):
            heads = part.num_heads, part.num_kv_heads, part.head_dim
            _need(min(heads) >= 1, f"{heads[0]} heads, {heads[1]} of keys, with {heads[2]} dims each", "num_attention_heads")
            _need(part.rope.rotary_dim <= part.head_dim, "more dims are rotated than a head has", "partial_rotary_factor")


def _parts(value: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield value
        for field in dataclasses.fields(value):
            yield from _parts(getattr(value, field.name))
    elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        for item in {id(item): item for item in value}.values():
            yield from _parts(item)


def _need(holds: bool, message: str, field: str) -> None:
    if not holds:
        raise UnsupportedModel(message, field)
