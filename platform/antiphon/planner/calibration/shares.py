"""Shares of an accelerator's peaks that measured stages reached: what ``calibrate`` gives to ``deploy`` (control speed).

A stage is a sum of parts, each a time at the peak over the share reached, and of kernels that cost the same: attention is its
core (operations or KV, whichever is longer), its weights (operations or reads) and kernels; the FFN is its weights and kernels;
an exchange is its bytes and a latency. Which side of a roofline counts depends on the shares themselves, so that a few rounds of
least squares follow one another. Must not know: what runs the models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from antiphon.core.errors import InvalidInput
from antiphon.planner.bounds import LIMITS, parse_json, read_text
from antiphon.planner.calibration.curves import nonnegative
from antiphon.planner.calibration.fit import Measurement
from antiphon.planner.cost.formats import bytes_per_value
from antiphon.planner.cost.hardware import Accelerator, Efficiency
from antiphon.planner.cost.library import Model
from antiphon.planner.pipeline.stages import Roofline

ROUNDS = 12
LEAST_SHARE, MOST_SHARE = LIMITS["share"]


def read_shares(path: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """The shares that a file says, and the accelerators whose peaks they are shares of; both are checked where they are used.

    Raises:
        InvalidInput: it can't be read, or has no mapping called efficiency.
    """
    raw = parse_json(read_text(path, "efficiency_file"), str(path), "efficiency_file")
    values = raw.get("efficiency") if isinstance(raw, dict) else None
    cards = raw.get("hardware", {}) if isinstance(raw, dict) else None
    if not isinstance(values, dict) or not isinstance(cards, dict):
        raise InvalidInput(
            f'efficiency_file: {path} has no mapping "efficiency", as antiphon plan calibrate --output writes it', "efficiency_file"
        )
    return dict(values), dict(cards)


def stage_errors(measurements: Sequence[Measurement], model: Model, card: Accelerator, shares: Mapping[str, float]) -> list[float]:
    """Of every measured stage: what the planner predicts for it with these shares over what was measured, less 1."""
    reached = Efficiency().with_values(shares)
    stages = Roofline(shape=model.shape, formats=model.formats, attention=card, ffn=card, efficiency=reached)
    layer = model.shape.kinds[-1][0]
    errors = []
    for one in measurements:
        if one.t_attention_s:
            errors.append(stages.attention_s(layer, one.rows_per_ubatch, one.context) / one.t_attention_s - 1)
        if one.t_ffn_s:
            errors.append(stages.ffn_s(layer.ffn, one.rows_per_ubatch, 1) / one.t_ffn_s - 1)
    return errors


def fit_shares(measurements: Sequence[Measurement], model: Model, card: Accelerator) -> dict[str, float]:
    """The efficiency that fits the measured stages of one model on one card; parts that nothing was bound by are left out.

    Raises:
        InvalidInput: no measurement has stage times.
    """
    points = [one for one in measurements if one.has_stages]
    if not points:
        raise InvalidInput("shares need stage times: t_attention_s, t_ffn_s, t_transfer_s and num_layers", "input")
    reached = Efficiency()
    for _ in range(ROUNDS):
        stages = Roofline(shape=model.shape, formats=model.formats, attention=card, ffn=card, efficiency=reached)
        found = _round(stages, points)
        reached = reached.with_values(found)
    return {name: value for name, value in found.items() if value is not None} | _network(points, model, card)


def _round(stages: Roofline, points: Sequence[Measurement]) -> dict[str, float]:
    """One least-squares fit with the rooflines' sides as they are at the present shares."""
    names = ("attention", "kv", "compute", "memory", "kernel_s")
    rows, times = [], []
    for one in points:
        for parts, seconds in (
            (stages.attention_parts(one.rows_per_ubatch, one.context), one.t_attention_s),
            (stages.ffn_parts(one.rows_per_ubatch), one.t_ffn_s),
        ):
            if seconds is not None and seconds > 0:  # relative errors: small batches matter as much
                rows.append([parts.get(name, 0.0) / seconds for name in names])
                times.append(1.0)
    solution = nonnegative(np.array(rows), np.array(times))
    found = {}
    for name, value in zip(names, solution, strict=True):
        if name == "kernel_s":
            found[name] = min(float(value), 1.0)
        elif value > 0:
            found[name] = float(min(max(1 / value, LEAST_SHARE), MOST_SHARE))
    return found


def _network(points: Sequence[Measurement], model: Model, card: Accelerator) -> dict[str, float]:
    """Share of the link's rate and its latency, from exchanges of two sizes or more."""
    size = model.shape.hidden_size * bytes_per_value(model.formats.f2a) / card.nic_bandwidth
    seen = [(one.rows_per_ubatch * size, one.t_transfer_s) for one in points if one.t_transfer_s]
    if len({peak for peak, _ in seen}) < 2:
        return {}
    matrix = np.array([[peak / seconds, 1 / seconds] for peak, seconds in seen])
    inverse, latency_s = nonnegative(matrix, np.ones(len(seen)))
    found = {"link_latency_s": float(min(latency_s, 1.0))}
    if inverse > 0:
        found["network"] = float(min(max(1 / inverse, LEAST_SHARE), MOST_SHARE))
    return {name: value for name, value in found.items() if math.isfinite(value)}
