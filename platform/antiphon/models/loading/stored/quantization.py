"""What a config's ``quantization_config`` may say: each field is known and means what is computed, or is refused (control speed).

Must not know: tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from antiphon.core.errors import UnsupportedModel
from antiphon.models.loading.block_scales import CONFIG_FIELD, check_block_scales


def check_quantization(raw: Mapping[str, Any]) -> None:
    """Check that weights stored as a ``config.json`` says can be read.

    Raises:
        UnsupportedModel: names the field that says otherwise.
    """
    section = raw.get(CONFIG_FIELD)
    if section is None:
        return
    if not isinstance(section, Mapping):
        raise UnsupportedModel(f"{CONFIG_FIELD} = {section!r}: expected a section", CONFIG_FIELD)
    method = section.get("quant_method")
    if method not in _METHODS:
        name = f"{CONFIG_FIELD}.quant_method"
        raise UnsupportedModel(f"{name} = {method!r} is not supported (only {', '.join(map(repr, _METHODS))})", name)
    _METHODS[method](section)


def expect_fields(
    section: Mapping[str, Any], supported: Mapping[str, tuple[object, ...]], harmless: frozenset[str], prefix: str = CONFIG_FIELD
) -> None:
    """Check fields against the values that they may have.

    Raises:
        UnsupportedModel: names a field with another value, or one that is neither supported nor harmless.
    """
    for key, value in section.items():
        name = f"{prefix}.{key}"
        if key in supported:
            if value not in supported[key]:
                raise UnsupportedModel(f"{name} = {value!r} is not supported (only {supported[key][0]!r})", name)
        elif key not in harmless and value not in (None, False, "", [], {}):
            raise UnsupportedModel(f"{name} = {value!r} is not known: it could change results", name)


def _mxfp4(section: Mapping[str, Any]) -> None:
    # Which tensors are stored as they are shows in their names.
    expect_fields(section, {}, frozenset(("quant_method", "modules_to_not_convert", "dequantize")))


_METHODS: Mapping[str, Callable[[Mapping[str, Any]], None]] = {"fp8": check_block_scales, "mxfp4": _mxfp4}
