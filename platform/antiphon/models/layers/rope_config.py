"""Rotary frequencies from a Hugging Face config: default, linear, llama3 and yarn scaling (control speed, pure values).

Must not know: tensors, or which layers a rotation is for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from antiphon.core.errors import UnsupportedModel

_KNOWN = frozenset(
    (
        "rope_theta",
        "rope_type",
        "type",
        "partial_rotary_factor",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    )
)


_MOST_DIMS = 65_536  # a hundred times what any published model has


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: ``inv_freq`` per pair of dimensions (after scaling) and the factor on cos and sin."""

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of a head that are rotated."""
        return 2 * len(self.inv_freq)


def rope_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary parameters of a config, of both spellings together.

    Newer configs write ``rope_parameters``, older ones ``rope_scaling``, and many carry both: one of them often only says "default"
    beside the other, which scales. That one then counts, as in transformers; what the two say differently is refused.

    Raises:
        UnsupportedModel: one is no mapping, or they contradict each other; the message names the parameter.
    """
    newer, classic = _section(raw, "rope_parameters"), _section(raw, "rope_scaling")
    kinds = [rope_type(section) for section in (newer, classic)]
    settings = {key: value for key, value in newer.items() if key not in ("type", "rope_type")}
    for key, value in classic.items():
        if key in ("type", "rope_type") or value is None:
            continue
        if settings.get(key) is not None and settings[key] != value:
            raise UnsupportedModel(
                f"rope_parameters.{key} is {settings[key]!r}, but rope_scaling.{key} is {value!r}: keep one of them",
                f"rope_scaling.{key}",
            )
        settings[key] = value
    named = [kind for kind in dict.fromkeys(kinds) if kind != "default"]
    if len(named) > 1:
        raise UnsupportedModel(
            f"rope_parameters say {kinds[0]!r}, rope_scaling says {kinds[1]!r}: keep one of them", "rope_scaling.rope_type"
        )
    if newer or classic:
        settings["rope_type"] = named[0] if named else "default"
    return settings


def rope_type(section: Mapping[str, Any]) -> str:
    """The kind of scaling that parameters name; older configs call it ``type``."""
    kinds = [str(section[key]) for key in ("rope_type", "type") if section.get(key) is not None]
    # A file that was written by one program and edited for another has both; "default" says nothing.
    return next((kind for kind in kinds if kind != "default"), "default")


def _section(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = raw.get(name)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise UnsupportedModel(f"{name} is {section!r}, not a mapping", name)
    return section


def check_rotary_dim(rotary_dim: int, field: str) -> None:
    """A damaged config's number must not become a table that fills the memory. Raises UnsupportedModel."""
    if rotary_dim > _MOST_DIMS:
        raise UnsupportedModel(f"{rotary_dim} rotated dimensions a head are more than {_MOST_DIMS}", field)


def rope_config(
    raw: Mapping[str, Any],
    head_dim: int,
    max_position: int,
    *,
    default_theta: float = 10_000.0,
    scaling: Mapping[str, Any] | None = None,
) -> RopeConfig:
    """Rotary frequencies from a Hugging Face config.

    Types ``default``, ``linear``, ``llama3`` (Llama 3.1 model card's frequency smoothing) and ``yarn`` (arXiv 2309.00071).

    Args:
        raw: The config.
        head_dim: Dimensions of a head, of which ``partial_rotary_factor`` are rotated.
        max_position: Tokens the model was made for.
        default_theta: The base where the config names none.
        scaling: The parameters where they are not the config's ``rope_parameters`` or ``rope_scaling``.

    Raises:
        UnsupportedModel: another rope type, a parameter that is not known or no number, or two that contradict each other.
    """
    if scaling is None:
        scaling = rope_settings(raw)
    unknown = sorted(scaling.keys() - _KNOWN)
    if unknown:
        raise UnsupportedModel(f"rope parameter {unknown[0]!r} is not supported", f"rope_scaling.{unknown[0]}")
    classic_theta = raw.get("rope_theta")
    theta = float(scaling.get("rope_theta") or classic_theta or default_theta)
    rotary_dim = int(head_dim * float(scaling.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0))
    check_rotary_dim(rotary_dim, "head_dim")
    kind = rope_type(scaling)
    inv_freq = [theta ** (-2.0 * i / rotary_dim) for i in range(rotary_dim // 2)]
    if kind == "default":
        return RopeConfig(inv_freq=tuple(inv_freq))
    if kind == "linear":
        return RopeConfig(inv_freq=tuple(f / float(scaling["factor"]) for f in inv_freq))
    if kind == "llama3":
        return RopeConfig(inv_freq=tuple(_llama3_frequency(f, scaling) for f in inv_freq))
    if kind == "yarn":
        return _yarn(inv_freq, theta, rotary_dim, scaling, max_position)
    raise UnsupportedModel(f"rope type {kind!r} is not supported", "rope_scaling.rope_type")


def _llama3_frequency(frequency: float, scaling: Mapping[str, Any]) -> float:
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    original = float(scaling["original_max_position_embeddings"])
    wavelength = 2.0 * math.pi / frequency
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1.0 - smooth) * frequency / factor + smooth * frequency


def _yarn(inv_freq: list[float], theta: float, rotary_dim: int, scaling: Mapping[str, Any], max_position: int) -> RopeConfig:
    original = float(scaling.get("original_max_position_embeddings") or max_position)
    factor = float(scaling.get("factor") or max_position / original)
    mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = magnitude(float(mscale)) / magnitude(float(mscale_all)) if mscale and mscale_all else magnitude(1.0)

    def dimension_of(num_rotations: float) -> float:
        return rotary_dim * math.log(original / (num_rotations * 2.0 * math.pi)) / (2.0 * math.log(theta))

    low = dimension_of(float(scaling.get("beta_fast") or 32.0))
    high = dimension_of(float(scaling.get("beta_slow") or 1.0))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0.0), min(high, rotary_dim - 1.0)
    if low == high:
        high += 0.001
    mixed = []
    for i, frequency in enumerate(inv_freq):
        ramp = min(1.0, max(0.0, (i - low) / (high - low)))  # 0 = keep the frequency, 1 = interpolate it
        mixed.append(frequency * (1.0 - ramp) + frequency / factor * ramp)
    return RopeConfig(inv_freq=tuple(mixed), attention_factor=float(attention_factor))
