"""US dollars per million decoded tokens: attention and FFN on each accelerator, the cheapest mix, one card (pure arithmetic).

Pure arithmetic at full utilisation: communication hidden, weight reads amortised, embedding and head ignored. What a real
deployment reaches is the plan's business. Must not know: batches, networks, or latencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from antiphon.core.errors import InvalidInput
from antiphon.planner.cost.formats import Formats
from antiphon.planner.cost.formula import Derivation, formula, plainly
from antiphon.planner.cost.hardware import Accelerator, usd_per_byte, usd_per_flop
from antiphon.planner.cost.library import Model
from antiphon.planner.cost.model_cost import ModelCost, RowCost, model_cost

PER_MILLION = 1e6
SECONDS_PER_HOUR = 3600.0


@formula(
    "usd/row",
    attention_flops="flop/row",
    linear_flops="flop/row",
    kv_bytes="byte/row",
    usd_per_flop="usd/flop",
    usd_per_byte="usd/byte",
)
def attention_usd(
    *, attention_flops: float, linear_flops: float, kv_bytes: float, usd_per_flop: float, usd_per_byte: float
) -> float:
    """Attention: the dearer of computing and of reading the KV, plus its projections."""
    return max(attention_flops * usd_per_flop, kv_bytes * usd_per_byte) + linear_flops * usd_per_flop


@formula("usd/row", ffn_flops="flop/row", usd_per_flop="usd/flop")
def ffn_usd(*, ffn_flops: float, usd_per_flop: float) -> float:
    """FFN: its operations, batches being large enough to amortise the weights."""
    return ffn_flops * usd_per_flop


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitCost:
    """Prices of one operation and one byte on an accelerator, computing in a format."""

    usd_per_flop: float
    usd_per_byte: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCost:
    """US dollars per million decoded tokens, by accelerator key."""

    model: ModelCost
    attention: dict[str, float]
    ffn: dict[str, float]

    @property
    def best_attention(self) -> str:
        """Cheapest accelerator for attention."""
        return min(self.attention, key=self.attention.__getitem__)

    @property
    def best_ffn(self) -> str:
        """Cheapest accelerator for the FFN."""
        return min(self.ffn, key=self.ffn.__getitem__)

    @property
    def afd_usd(self) -> float:
        """The cheapest mix."""
        return self.attention[self.best_attention] + self.ffn[self.best_ffn]

    @property
    def best_colocated(self) -> str:
        """Cheapest accelerator for both halves."""
        return min(self.attention, key=self.colocated_usd)

    def colocated_usd(self, key: str) -> float:
        """Both halves on one accelerator."""
        return self.attention[key] + self.ffn[key]


def unit_cost(card: Accelerator, compute: str, derivation: Derivation | None = None) -> UnitCost:
    """Prices on ``card`` when computing in format ``compute``.

    Raises:
        InvalidInput: the card has no price, or can't compute in that format.
    """
    if card.usd_per_hour is None:
        raise InvalidInput(f"{card.key} has no price; give one", "usd_per_hour")
    apply = plainly if derivation is None else derivation.section(f"unit cost on {card.key}")
    usd_per_s = card.usd_per_hour / SECONDS_PER_HOUR
    return UnitCost(
        usd_per_flop=apply(usd_per_flop, usd_per_s=usd_per_s, flops=card.flops_in(compute)),
        usd_per_byte=apply(usd_per_byte, usd_per_s=usd_per_s, bandwidth=card.bandwidth),
    )


def attention_cost(row: RowCost, unit: UnitCost, derivation: Derivation | None = None, key: str = "") -> float:
    """US dollars per million rows of attention."""
    apply = plainly if derivation is None else derivation.section(f"attention on {key}")
    return PER_MILLION * apply(
        attention_usd,
        attention_flops=row.attention_flops,
        linear_flops=row.linear_flops,
        kv_bytes=row.kv_bytes,
        usd_per_flop=unit.usd_per_flop,
        usd_per_byte=unit.usd_per_byte,
    )


def token_cost(
    model: Model,
    cards: Sequence[Accelerator],
    context: float,
    formats: Formats | None = None,
    derivation: Derivation | None = None,
) -> TokenCost:
    """What a million decoded tokens cost at a context on each of ``cards``.

    Raises:
        InvalidInput: there are no cards, or one has no price.
    """
    if not cards:
        raise InvalidInput("no accelerator with a price", "hardware")
    chosen = model.formats if formats is None else formats
    cost = model_cost(model.shape, chosen, context, plainly if derivation is None else derivation.section("one decoded token"))
    attention: dict[str, float] = {}
    ffn: dict[str, float] = {}
    for card in cards:
        unit = unit_cost(card, chosen.compute, derivation)
        attention[card.key] = attention_cost(cost.decode, unit, derivation, card.key)
        apply = plainly if derivation is None else derivation.section(f"FFN on {card.key}")
        ffn[card.key] = PER_MILLION * apply(ffn_usd, ffn_flops=cost.decode.ffn_flops, usd_per_flop=unit.usd_per_flop)
    return TokenCost(model=cost, attention=attention, ffn=ffn)
