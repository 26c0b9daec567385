"""The three ways to deploy - colocated, prefill/decode apart, AFD - and what is asked of them (control speed).

Must not know: how the best of each is found, or which of them wins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum

from antiphon.planner.cost.formats import Formats, bytes_per_value
from antiphon.planner.cost.hardware import Accelerator, Efficiency
from antiphon.planner.cost.shape import ModelShape
from antiphon.planner.pipeline.group import Contexts, DecodeModel, GroupPoint
from antiphon.planner.pipeline.prefill import PrefillModel, PrefillPool
from antiphon.planner.pipeline.speculation import NO_SPECULATION, Speculation
from antiphon.planner.pipeline.stages import Roofline
from antiphon.planner.traffic import Traffic

# Colocated steps have room for this many times the mean prompt rows, so that prompts don't queue up: the first that keeps TTFT.
PROMPT_ROOMS = (1.25, 2.5, 5.0, 10.0, 20.0)
SECONDS_PER_HOUR = 3600.0


class Wiring(StrEnum):
    """How prefill, attention and FFN are spread over cards."""

    COLOCATED = "colocated"
    PD = "pd"
    AFD = "afd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cards:
    """Which accelerator each role runs on."""

    colocated: Accelerator
    prefill: Accelerator
    decode: Accelerator
    attention: Accelerator
    ffn: Accelerator


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What a plan takes for granted."""

    efficiency: Efficiency = field(default_factory=Efficiency)
    memory_share: float = 0.9
    expert_skew: float = 1.0
    max_ubatches: int = 4
    max_group_cards: int = 320
    max_tensor: int = 16  # cards that share an attention, at most; a node's cards and the model's heads bound it too
    speculation: Speculation = NO_SPECULATION
    fill: float = 0.9  # share of the decode slots in use when a request rate is planned for


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is asked of a deployment. Infinite targets are none; without a rate the budget is filled."""

    traffic: Traffic
    tpot_s: float = math.inf
    ttft_s: float = math.inf
    budget_cards: int | None = None
    rate: float | None = None  # requests per second

    @property
    def max_cards(self) -> int:
        """The budget; without one, more than any demand needs."""
        return 100_000 if self.budget_cards is None else self.budget_cards


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to deploy, at its best."""

    wiring: Wiring
    point: GroupPoint
    num_groups: int
    prefill: PrefillPool | None
    num_cards: int  # that work
    num_idle: int  # cards of the budget that stay over: they are paid for too
    idle_card: Accelerator
    tokens_per_s: float  # output tokens of the whole deployment at full batch; at the planned rate when one is given
    usd_per_hour: float | None  # idle cards too; None when a card of the question has no price
    tpot_s: float
    ttft_s: float
    prompt_room: float = PROMPT_ROOMS[0]  # colocated only

    @property
    def num_paid(self) -> int:
        """Cards that are paid for, working or idle."""
        return self.num_cards + self.num_idle

    @property
    def tokens_per_s_per_card(self) -> float:
        """Every card counted, prefill and idle ones too."""
        return self.tokens_per_s / self.num_paid

    @property
    def usd_per_mtok(self) -> float | None:
        """US dollars per million output tokens, every card counted; None without prices."""
        if self.usd_per_hour is None:
            return None
        return self.usd_per_hour / SECONDS_PER_HOUR / self.tokens_per_s * 1e6

    @property
    def score(self) -> float:
        """What the verdict compares, greater is better: nothing but the price shown or, without prices, the rate per card shown."""
        usd = self.usd_per_mtok
        return self.tokens_per_s_per_card if usd is None else 1 / usd

    @property
    def prefill_decode_ratio(self) -> float:
        """Prefill cards per decode card; 0 when they are the same."""
        return 0.0 if self.prefill is None else self.prefill.num_cards / (self.num_groups * self.point.layout.num_cards)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """One model on given cards under a demand: what every wiring is worked out from."""

    shape: ModelShape
    formats: Formats
    cards: Cards
    assumptions: Assumptions
    demand: Demand

    def with_tpot(self, tpot_s: float) -> Planner:
        """The same question at another TPOT target."""
        return replace(self, demand=replace(self.demand, tpot_s=tpot_s))

    def decode_model(self, wiring: Wiring, room: float = PROMPT_ROOMS[0]) -> DecodeModel:
        """The decode side of a wiring; colocated steps have ``room`` times the mean prompt rows."""
        traffic, cards = self.demand.traffic, self.cards
        attention, ffn = {
            Wiring.COLOCATED: (cards.colocated, cards.colocated),
            Wiring.PD: (cards.decode, cards.decode),
            Wiring.AFD: (cards.attention, cards.ffn),
        }[wiring]
        in_step = wiring is Wiring.COLOCATED
        return DecodeModel(
            stages=Roofline(
                shape=self.shape,
                formats=self.formats,
                attention=attention,
                ffn=ffn,
                efficiency=self.assumptions.efficiency,
                expert_skew=self.assumptions.expert_skew,
            ),
            contexts=Contexts(
                mean=traffic.mean_context,
                deviation=traffic.context_deviation,
                prompt_rows_per_decode_row=room * traffic.mean_prompt / traffic.mean_output if in_step else 0.0,
                prompt=traffic.mean_prompt,
            ),
            memory_share=self.assumptions.memory_share,
            speculation=self.assumptions.speculation,
        )

    def prefill_model(self) -> PrefillModel:
        """The prefill side."""
        return PrefillModel(
            shape=self.shape,
            formats=self.formats,
            card=self.cards.prefill,
            efficiency=self.assumptions.efficiency,
            traffic=self.demand.traffic,
            memory_share=self.assumptions.memory_share,
        )

    @property
    def unpriced(self) -> tuple[Accelerator, ...]:
        """Cards of the question without a price: one of them, and wirings are compared by the card instead of by the dollar."""
        cards = (self.cards.colocated, self.cards.prefill, self.cards.decode, self.cards.attention, self.cards.ffn)
        return tuple(dict.fromkeys(card for card in cards if card.usd_per_hour is None))

    def price(self, card: Accelerator) -> float:
        """USD per hour; 1 for every card when one of the question has no price."""
        return 1.0 if card.usd_per_hour is None or self.unpriced else card.usd_per_hour

    def tensor_sizes(self, model: DecodeModel) -> tuple[int, ...]:
        """Cards that may share an attention: powers of two within a node that divide the heads."""
        limit = min(self.assumptions.max_tensor, model.stages.attention.cards_per_node, self.demand.max_cards)
        return tuple(size for size in (1, 2, 4, 8, 16) if size <= limit and self.shape.num_heads % size == 0)

    def fewest_ffn_cards(self, model: DecodeModel) -> int:
        """Cards that hold the FFN weights once."""
        weights = self.shape.ffn_weights * bytes_per_value(self.formats.weights)
        return max(1, math.ceil(weights / (model.usable_ffn_bytes() * 0.98)))  # the rest is for exchange buffers


def colocated_chunk(point: GroupPoint, traffic: Traffic, room: float) -> float:
    """Prompt rows that a colocated rank takes into each step; prompts are packed into them."""
    return point.batch * point.speculation.tokens() * room * traffic.mean_prompt / traffic.mean_output
