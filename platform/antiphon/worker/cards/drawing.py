"""Draws next tokens where the logits are, for all rows at once and without a question to the host: it can be recorded (hot).

The same draw as ``sampler.sample``'s, number by number: temperature, top-k, top-p, min-p, then the cumulative distribution inverted
at one uniform number that depends on (seed, place) alone. A row's token depends on its own logits and settings alone.
Legend: R rows, V vocabulary. Must not know: requests, what is done with tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_POINT, _TEMPERATURE, _TOP_K, _TOP_P, _MIN_P = range(5)
NUM_SETTINGS = 5


class Draw(NamedTuple):
    """How one row's token is chosen. ``temperature`` 0: the most likely; ``top_k`` 0, ``top_p`` 1, ``min_p`` 0: off."""

    point: float = 0.0  # in [0, 1)
    temperature: float = 0.0
    top_k: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def is_cut(self) -> bool:
        """Whether tokens are left out by their order, which has to be found."""
        return self.temperature > 0.0 and (self.top_k > 0 or self.top_p < 1.0)


GREEDY = Draw()


def draw(logits_RV: torch.Tensor, best_R: torch.Tensor, settings_SR: torch.Tensor, *, cuts: bool) -> torch.Tensor:
    """One token a row, int64 [R]; any at all where logits are no numbers.

    Args:
        logits_RV: fp32.
        best_R: the most likely token of each row, int64.
        settings_SR: fp64 [5, R], a ``Draw`` per column.
        cuts: whether any row has top-k or top-p; without, nothing is sorted.
    """
    vocabulary = logits_RV.shape[1]
    settings = settings_SR.to(torch.float32)[:, :, None]
    temperature_R1 = settings[_TEMPERATURE]
    scaled_RV = logits_RV / torch.where(temperature_R1 > 0, temperature_R1, 1.0)
    if cuts:
        count_R1 = settings_SR[_TOP_K].to(torch.int64)[:, None]
        place_R1 = torch.where(count_R1 > 0, count_R1, vocabulary).clamp(max=vocabulary) - 1
        largest_RV = torch.sort(scaled_RV, dim=-1, descending=True).values
        scaled_RV = torch.where(scaled_RV < largest_RV.gather(1, place_R1), float("-inf"), scaled_RV)
    probs_RV = torch.softmax(scaled_RV, dim=-1)
    keep_RV = probs_RV >= settings[_MIN_P] * probs_RV.amax(dim=-1, keepdim=True)
    if cuts:
        keep_RV = keep_RV & within_mass(probs_RV, settings[_TOP_P])
    cumulative_RV = (probs_RV * keep_RV).cumsum(1, dtype=torch.float64)
    point_R1 = settings_SR[_POINT][:, None] * cumulative_RV[:, -1:]
    found_R = torch.searchsorted(cumulative_RV, point_R1, right=True)[:, 0]
    last_R = (keep_RV * torch.arange(vocabulary, device=keep_RV.device)).amax(dim=-1)
    found_R = torch.where(found_R >= vocabulary, last_R, found_R)  # rounding at the very end of the distribution
    return torch.where(temperature_R1[:, 0] > 0, found_R, best_R)


def within_mass(probs_RV: torch.Tensor, top_p_R1: torch.Tensor) -> torch.Tensor:
    """The smallest set of most probable tokens with ``top_p`` of the mass (arXiv 1904.09751), as a mask; of equals the first."""
    ordered_RV = torch.sort(probs_RV, dim=-1, descending=True).values
    count_R1 = (
        (ordered_RV.cumsum(1) - ordered_RV < top_p_R1).sum(dim=-1, keepdim=True).clamp(min=1)
    )  # mass of the more probable ones
    least_R1 = ordered_RV.gather(1, count_R1 - 1)
    equal_RV = probs_RV == least_R1
    num_above_R1 = (probs_RV > least_R1).sum(dim=-1, keepdim=True)
    mask_RV = (probs_RV > least_R1) | (equal_RV & (equal_RV.cumsum(1) <= count_R1 - num_above_R1))
    return mask_RV | (top_p_R1 >= 1.0)
