"""Skipping experts that matter little: thresholds on layer importance x local gate probability (control speed, pure values).

An expert of a row is skipped where importance[layer] x (its weight / the row's summed weight) < threshold; a row's best expert
never is, nor is a shared one. Both numbers come from a calibration file: how much the model's loss rises when one layer uses only
its best expert, and the largest threshold whose loss stays within what was allowed. After MoDES (arXiv 2511.15690).
Must not know: how a loss is measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antiphon.core.errors import InvalidInput
from antiphon.models.config import DecoderConfig, MoEConfig

_FORMAT = "antiphon-expert-skipping-1"
_NEVER_ZERO = 1e-6  # of the largest importance: a layer that seemed not to matter at all still has a finite bound


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSkipping:
    """Which experts may be skipped."""

    importance: Mapping[int, float]  # by layer number on the wire; the most important layer has 1
    threshold: float
    loss_rise: float = 0.0  # nats per token on the calibration file, as measured
    skipped_share: float = 0.0  # of routed experts there, as measured

    def bound(self, number: int) -> float:
        """Share of a row's weight below which an expert of this layer is skipped."""
        importance = self.importance.get(number)
        return 0.0 if importance is None else self.threshold / importance

    def save(self, path: Path, config: DecoderConfig) -> None:
        """Write a thresholds file."""
        raw = {
            "format": _FORMAT,
            "model": config.fingerprint,
            "threshold": self.threshold,
            "importance": {str(number): value for number, value in self.importance.items()},
            "lossRise": self.loss_rise,
            "skippedShare": self.skipped_share,
        }
        path.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path, config: DecoderConfig) -> ExpertSkipping:
        """Read a thresholds file.

        Raises:
            InvalidInput: it is none, or is for another model.
        """
        try:
            raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if raw["format"] != _FORMAT or raw["model"] != config.fingerprint:
                raise InvalidInput(f"{path}: made for {raw['format']}, model {raw['model']}", "experts.skipFile")
            return cls(
                importance={int(number): float(value) for number, value in raw["importance"].items()},
                threshold=float(raw["threshold"]),
                loss_rise=float(raw["lossRise"]),
                skipped_share=float(raw["skippedShare"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"{path}: not a thresholds file: {error!r}", "experts.skipFile") from error


Measure = Callable[[ExpertSkipping | None], tuple[float, float]]  # -> nats per token, skipped share


def search(config: DecoderConfig, measure: Measure, allowed_rise: float, num_halvings: int = 12) -> ExpertSkipping:
    """The most skipping whose loss on the calibration data rises by at most ``allowed_rise``.

    Args:
        config: The model.
        measure: Loss in nats per token, and the share of experts skipped, under some skipping (None: none).
        allowed_rise: Nats per token.
        num_halvings: Steps of the bisection.

    Raises:
        InvalidInput: the model has no layer with several experts per row, or ``allowed_rise`` is negative.
    """
    layers = [n for n, ffn in enumerate(config.ffns) if isinstance(ffn, MoEConfig) and ffn.gate.top_k > 1]
    if not layers:
        raise InvalidInput("no layer chooses several experts, so none can be skipped", "model")
    if allowed_rise < 0.0:
        raise InvalidInput(f"a loss can't be allowed to rise by {allowed_rise:g}", "allowedRise")
    whole, _ = measure(None)
    # A bound of 1 is above any share, so that only the best expert of a row stays.
    rises = {n: max(0.0, measure(ExpertSkipping(importance={n: 1.0}, threshold=1.0))[0] - whole) for n in layers}
    largest = max(*rises.values(), 0.0)
    importance = {n: max(rise / largest, _NEVER_ZERO) if largest > 0.0 else 1.0 for n, rise in rises.items()}
    best = ExpertSkipping(importance=importance, threshold=0.0)
    low, high = 0.0, 1.0
    for _ in range(num_halvings):
        middle = (low + high) / 2.0
        loss, share = measure(ExpertSkipping(importance=importance, threshold=middle))
        if loss - whole <= allowed_rise:
            low = middle
            best = ExpertSkipping(importance=importance, threshold=middle, loss_rise=loss - whole, skipped_share=share)
        else:
            high = middle
    return best
