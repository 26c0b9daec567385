"""What numbers from outside may be: finite, and within what a plan can mean (pure values).

Every number that a person or a file gives passes here once; behind it, arithmetic neither overflows nor runs without end. Must
not know: where a number came from.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from antiphon.core.errors import InvalidInput
from antiphon.core.text.json_text import read_json_text

MAX_TOKENS = 100_000_000  # as in the document's spec.planning.traffic
# Least and most of each; the least of counts is 1, of rates and times a share that is still told from nothing.
LIMITS: dict[str, tuple[float, float]] = {
    "tpot_ms": (1e-3, 1e9),
    "ttft_ms": (1e-3, 1e9),
    "gpu_budget": (1, 1_000_000),  # as spec.gpuBudget
    "rate": (1e-9, 1e9),
    "context": (1, MAX_TOKENS),
    "prompt_tokens": (1, MAX_TOKENS),
    "output_tokens": (1, MAX_TOKENS),
    "weight": (1e-9, 1e9),
    "arrival_s": (0, 1e9),
    "expert_skew": (1, 1000),
    "drafts": (0, 64),  # as spec.speculation.maxDrafts
    "acceptance": (0, 0.999),
    "drafting": (0, 10),
    "price": (1e-9, 1e9),
    "duration_s": (1, 1e7),
    "warm_up_s": (0, 1e7),
    "failures": (0, 1e6),
    "repair_s": (0, 1e9),
    "failover_s": (0, 1e9),
    "stragglers": (0, 1e6),
    "straggle_factor": (1, 1e6),
    "seed": (0, 2**63 - 1),
    "batch": (1, 1e9),
    "rows": (1e-9, 1e9),
    "num_layers": (1, 100_000),
    "num_ubatches": (1, 100_000),
    "threads": (1, 1_000_000),
    "share": (1e-3, 1),  # of a peak
    "overlap": (0, 1),
    "fixed_s": (0, 1),
    "step_s": (1e-9, 1e9),
    "stage_s": (0, 1e9),
}


def checked(name: str, value: float, field: str | None = None) -> float:
    """``value``, which lies within the limits of ``name``.

    Raises:
        InvalidInput: it does not; the message says ``field``, which is ``name`` unless given.
    """
    least, most = LIMITS[name]
    said = name if field is None else field
    if not (math.isfinite(value) if isinstance(value, float) else True) or not least <= value <= most:
        shown = f"{value:g}" if isinstance(value, float) else str(value)[:32]
        raise InvalidInput(f"{said}: must be from {least:g} to {most:g}, is {shown}", said)
    return value


def number(raw: Any, name: str, field: str | None = None) -> float:
    """The finite number that ``raw`` (a number, or the text of one) is, within the limits of ``name``.

    Raises:
        InvalidInput: it is none, or lies outside.
    """
    said = name if field is None else field
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        raise InvalidInput(f"{said}: {str(raw)[:64]!r} is not a number", said)
    try:
        value = float(raw)
    except (ValueError, OverflowError):
        raise InvalidInput(f"{said}: {str(raw)[:64]!r} is not a number", said) from None
    return checked(name, value, said)


def count(raw: Any, name: str, field: str | None = None) -> int:
    """As ``number``, for a whole one."""
    said = name if field is None else field
    value = number(raw, name, said)
    if value != int(value):
        raise InvalidInput(f"{said}: {value:g} is not a whole number", said)
    return int(value)


def read_text(path: Path, field: str) -> str:
    """The text of a file.

    Raises:
        InvalidInput: it can't be read, or is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{field}: {path}: can't be read: {error.strerror}", field) from error
    except ValueError as error:  # not UTF-8, or a path with a NUL
        raise InvalidInput(f"{field}: {path}: can't be read: {error}", field) from error


def parse_json(text: str, where: str, field: str) -> Any:
    """The value that ``text`` is.

    Raises:
        InvalidInput: it is no JSON, or nested too deeply to be read.
    """
    try:
        return read_json_text(text, unique_keys=True)
    except ValueError as error:
        raise InvalidInput(f"{where}: {error}", field) from error
