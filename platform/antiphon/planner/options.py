"""The three ways to deploy - colocated, prefill/decode apart, AFD - each at its best under a demand (control speed).

Must not know: which of them wins; that is the plan's verdict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from antiphon.planner.cost.formats import Formats, bytes_per_value
from antiphon.planner.cost.hardware import Accelerator, Efficiency
from antiphon.planner.cost.shape import ModelShape
from antiphon.planner.pipeline.group import Contexts, DecodeModel, GroupPoint, Layout, largest
from antiphon.planner.pipeline.prefill import TAIL, PrefillModel, PrefillPool, waiting_chance, waiting_quantile_s
from antiphon.planner.pipeline.speculation import NO_SPECULATION, Speculation
from antiphon.planner.pipeline.stages import Roofline
from antiphon.planner.traffic import Traffic

# Colocated steps have room for this many times the mean prompt rows, so that prompts don't queue up: the first that keeps TTFT.
PROMPT_ROOMS = (1.25, 2.5, 5.0, 10.0, 20.0)
SECONDS_PER_HOUR = 3600.0
NUM_FINALISTS = 12


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
    """Finds each wiring's best option for one model on given cards."""

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

    def best(self, wiring: Wiring) -> Option | None:
        """The wiring's best option; None when nothing keeps the demand."""
        rooms = PROMPT_ROOMS if wiring is Wiring.COLOCATED else PROMPT_ROOMS[:1]
        found = (self._best(wiring, room) for room in rooms)
        return next((option for option in found if option is not None), None)

    def _best(self, wiring: Wiring, room: float) -> Option | None:
        model = self.decode_model(wiring, room)
        points = self._afd_points(model) if wiring is Wiring.AFD else self._whole_points(model)
        ranked = sorted(points, key=self._usd_per_token)[:NUM_FINALISTS]
        if wiring is Wiring.AFD:
            ranked = sorted([*ranked, *self._neighbours(model, ranked[:4])], key=self._usd_per_token)[:NUM_FINALISTS]
        # A budget of few cards may not hold the cheapest groups: the smallest stay in the race.
        small = sorted(points, key=_size)[:NUM_FINALISTS]
        options = [option for point in [*ranked, *small] if (option := self._option(wiring, point, room)) is not None]
        return max(options, key=lambda option: option.score, default=None)

    @property
    def unpriced(self) -> tuple[Accelerator, ...]:
        """Cards of the question without a price: one of them, and wirings are compared by the card instead of by the dollar."""
        cards = (self.cards.colocated, self.cards.prefill, self.cards.decode, self.cards.attention, self.cards.ffn)
        return tuple(dict.fromkeys(card for card in cards if card.usd_per_hour is None))

    def _price(self, card: Accelerator) -> float:
        return 1.0 if card.usd_per_hour is None or self.unpriced else card.usd_per_hour

    def _usd_per_token(self, point: GroupPoint) -> float:
        layout = point.layout
        cards = self.cards
        if layout.colocated:
            return layout.num_cards * self._price(cards.decode) / point.tokens_per_s
        price = layout.num_attention * self._price(cards.attention) + layout.num_ffn * self._price(cards.ffn)
        return price / point.tokens_per_s

    def tensor_sizes(self, model: DecodeModel) -> tuple[int, ...]:
        """Cards that may share an attention: powers of two within a node that divide the heads."""
        limit = min(self.assumptions.max_tensor, model.stages.attention.cards_per_node, self.demand.max_cards)
        return tuple(size for size in (1, 2, 4, 8, 16) if size <= limit and self.shape.num_heads % size == 0)

    def _whole_points(self, model: DecodeModel) -> list[GroupPoint]:
        limit = min(self.demand.max_cards, self.assumptions.max_group_cards)
        weights = self.shape.total_weights * bytes_per_value(self.formats.weights)
        low = max(1, math.ceil(weights / model.usable_attention_bytes()))
        sizes, tensors = _grid(low, limit, 1.25), self.tensor_sizes(model)
        layouts = {
            Layout(num_attention=size // tensor * tensor, num_ffn=size // tensor * tensor, num_ubatches=count, colocated=True,
                   tensor=tensor)
            for size in sizes
            for tensor in {1, tensors[-1]}
            for count in (1, 2)
            if size // tensor * tensor >= low
        }  # fmt: skip
        found = self._points(model, _ordered(layouts))
        # Between one card and the most that share an attention: only around what was best.
        between = {
            replace(point.layout, num_attention=size, num_ffn=size, tensor=tensor)
            for point in [*sorted(found, key=self._usd_per_token)[:4], *sorted(found, key=_size)[:4]]
            for tensor in tensors[1:-1]
            if (size := point.layout.num_attention // tensor * tensor) >= low
        }
        return found + self._points(model, _ordered(between))

    def _afd_points(self, model: DecodeModel) -> list[GroupPoint]:
        limit = min(self.demand.max_cards, self.assumptions.max_group_cards)
        shards = _grid(self.fewest_ffn_cards(model), max(1, limit // 2), 1.7)

        def points(tensors: Iterable[int]) -> list[GroupPoint]:
            layouts = {
                Layout(num_attention=x // tensor * tensor, num_ffn=y, num_ubatches=count, tensor=tensor)
                for y in shards
                for x in _grid(1, limit - y, 1.7)
                for tensor in tensors
                for count in (2, 3)
                if count <= self.assumptions.max_ubatches and x >= tensor
            }
            return self._points(model, _ordered(layouts))

        # Sharing an attention costs exchange of its own: it is looked at where one card alone keeps no target.
        return points((1,)) or points(self.tensor_sizes(model)[1:])

    def fewest_ffn_cards(self, model: DecodeModel) -> int:
        """Cards that hold the FFN weights once."""
        weights = self.shape.ffn_weights * bytes_per_value(self.formats.weights)
        return max(1, math.ceil(weights / (model.usable_ffn_bytes() * 0.98)))  # the rest is for exchange buffers

    def _neighbours(self, model: DecodeModel, points: Sequence[GroupPoint]) -> list[GroupPoint]:
        limit = min(self.demand.max_cards, self.assumptions.max_group_cards)
        layouts = {
            replace(point.layout, num_attention=x // point.layout.tensor * point.layout.tensor, num_ubatches=count)
            for point in points
            for x in _around(point.layout.num_attention)
            for count in range(1, self.assumptions.max_ubatches + 1)
            if x + point.layout.num_ffn <= limit and x >= point.layout.tensor
        }
        return self._points(model, _ordered(layouts))

    def _points(self, model: DecodeModel, layouts: Iterable[Layout]) -> list[GroupPoint]:
        found = (model.best_point(layout, self.demand.tpot_s) for layout in layouts)
        return [point for point in found if point is not None]

    def _option(self, wiring: Wiring, point: GroupPoint, room: float) -> Option | None:
        """As many groups of ``point`` as the budget or the rate takes, with their prefill pool."""
        demand = self.demand
        per_group = point.tokens_per_s / demand.traffic.mean_output  # requests per second at full batch
        most = demand.max_cards // point.layout.num_cards
        if most < 1:
            return None
        if demand.rate is not None:
            needed = max(1, math.ceil(demand.rate / (per_group * self.assumptions.fill)))
            return self._assembled(wiring, point, needed, demand.rate, room) if needed <= most else None
        if self._assembled(wiring, point, 1, per_group, room) is None:
            return None
        count = largest(lambda n: self._assembled(wiring, point, n, n * per_group, room) is not None, most)
        return self._assembled(wiring, point, count, count * per_group, room)

    def _assembled(self, wiring: Wiring, point: GroupPoint, num_groups: int, rate: float, room: float) -> Option | None:
        demand, cards, layout = self.demand, self.cards, point.layout
        left = demand.max_cards - num_groups * layout.num_cards
        if left < 0:
            return None
        pool: PrefillPool | None = None
        if wiring is Wiring.COLOCATED:
            ttft_s = self._colocated_ttft_s(point, num_groups, room)
            prices = [(num_groups * layout.num_cards, cards.colocated)]
        else:
            attention = cards.decode if wiring is Wiring.PD else cards.attention
            pool = self.prefill_model().smallest_pool(
                rate,
                ttft_s=demand.ttft_s,
                max_cards=left,
                first_step_s=point.step_s,
                decode_net=attention.nic_bandwidth,
            )
            if pool is None:
                return None
            ttft_s = pool.ttft_s
            prices = [(num_groups * layout.num_attention, attention), (pool.num_cards, cards.prefill)]
            if wiring is Wiring.AFD:
                prices.append((num_groups * layout.num_ffn, cards.ffn))
        if ttft_s > demand.ttft_s:
            return None
        num_cards = sum(count for count, _ in prices)
        usd = sum(count * self._price(card) for count, card in prices)
        # Without a rate the budget is bought whole: what stays idle is of the cheapest kind among the roles.
        idle = 0 if demand.rate is not None or demand.budget_cards is None else demand.budget_cards - num_cards
        idle_card = min((card for _, card in prices), key=self._price)
        return Option(
            wiring=wiring,
            point=point,
            num_groups=num_groups,
            prefill=pool,
            num_cards=num_cards,
            num_idle=idle,
            idle_card=idle_card,
            tokens_per_s=rate * demand.traffic.mean_output,
            usd_per_hour=None if self.unpriced else usd + idle * self._price(idle_card),
            tpot_s=point.tpot_s,
            ttft_s=ttft_s,
            prompt_room=room,
        )

    def _colocated_ttft_s(self, point: GroupPoint, num_groups: int, room: float) -> float:
        """Prompts run in chunks beside decode rows; each rank serves one prompt at a time."""
        traffic = self.demand.traffic
        chunk = colocated_chunk(point, traffic, room)
        servers, load = num_groups * point.layout.num_ranks, 1 / room
        second = sum(share * prompt**2 for prompt, share in traffic.prompt_points)
        wait_s = waiting_quantile_s(
            service_s=traffic.mean_prompt / chunk * point.step_s,
            variation=math.sqrt(max(0.0, second / traffic.mean_prompt**2 - 1)),
            num_servers=servers,
            load=load,
            chance=waiting_chance(load=load, num_servers=servers),
            tail=TAIL,
        )
        # A prompt waits half a step for a chunk on average; its first token leaves with the step after its last chunk.
        return wait_s + (traffic.prompt_quantile(1 - TAIL) / chunk + 1.5) * point.step_s


def colocated_chunk(point: GroupPoint, traffic: Traffic, room: float) -> float:
    """Prompt rows that a colocated rank takes into each step; prompts are packed into them."""
    return point.batch * point.speculation.tokens() * room * traffic.mean_prompt / traffic.mean_output


def _grid(low: int, high: int, factor: float) -> list[int]:
    """Whole numbers from ``low`` to ``high``, each about ``factor`` times the one before."""
    sizes, size = [], float(low)
    while size <= high:
        sizes.append(round(size))
        size = max(size * factor, size + 1)
    if sizes and sizes[-1] != high:
        sizes.append(high)
    return sizes


def _size(point: GroupPoint) -> int:
    return point.layout.num_cards


def _ordered(layouts: Iterable[Layout]) -> list[Layout]:
    return sorted(layouts, key=lambda layout: (layout.num_cards, layout.name, layout.num_ubatches))


def _around(count: int) -> list[int]:
    spread = max(1, count // 12)
    return [x for offset in (-4, -2, -1, 0, 1, 2, 4) if (x := count + offset * spread) >= 1]
