"""The best option of a wiring: layouts of a grid first, then steps from the best of them (control speed).

What counts is the price of a token of the whole deployment, prefill pool and idle cards in: the group that decodes cheapest may
leave half of a budget idle. Must not know: which wiring wins; that is the plan's verdict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from antiphon.planner.cost.formats import bytes_per_value
from antiphon.planner.layouts import Bounds, apart_grid, near, whole_grid
from antiphon.planner.options import PROMPT_ROOMS, SECONDS_PER_HOUR, Option, Planner, Wiring, colocated_chunk
from antiphon.planner.pipeline.group import DecodeModel, GroupPoint, Layout, largest
from antiphon.planner.pipeline.prefill import MAX_UTILISATION, TAIL, PrefillModel, PrefillPool, waiting_chance, waiting_quantile_s

NUM_STARTS = 3  # of the grid's best options, climbed from
MAX_STEPS = 12  # of one climb


def best_option(planner: Planner, wiring: Wiring) -> Option | None:
    """The wiring's best option; None when nothing keeps the demand."""
    rooms = PROMPT_ROOMS if wiring is Wiring.COLOCATED else PROMPT_ROOMS[:1]
    found = (_Search.of(planner, wiring, room).best() for room in rooms)
    return next((option for option in found if option is not None), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """One wiring with one room for prompts; every layout is worked out once."""

    planner: Planner
    wiring: Wiring
    room: float
    model: DecodeModel
    prefill: PrefillModel
    bounds: Bounds
    seen: dict[Layout, Option | None] = field(default_factory=dict)

    @classmethod
    def of(cls, planner: Planner, wiring: Wiring, room: float) -> _Search:
        model = planner.decode_model(wiring, room)
        weights = planner.shape.total_weights * bytes_per_value(planner.formats.weights)
        whole = max(1, math.ceil(weights / model.usable_attention_bytes()))
        bounds = Bounds(
            most_cards=min(planner.demand.max_cards, planner.assumptions.max_group_cards),
            least=planner.fewest_ffn_cards(model) if wiring is Wiring.AFD else whole,
            tensors=planner.tensor_sizes(model),
            max_ubatches=planner.assumptions.max_ubatches,
        )
        return cls(planner=planner, wiring=wiring, room=room, model=model, prefill=planner.prefill_model(), bounds=bounds)

    def best(self) -> Option | None:
        if self.wiring is not Wiring.AFD:
            points = self._points(whole_grid(self.bounds))
        else:
            # Sharing an attention costs exchange of its own: it is looked at first where one card alone keeps no target.
            points = self._points(apart_grid(self.bounds, (1,))) or self._points(apart_grid(self.bounds, self.bounds.tensors[1:]))
        best: Option | None = None
        for point in sorted(points, key=self._bound, reverse=True):
            if best is not None and self._bound(point) <= best.score:
                break
            best = _better(best, self._known(point, best))
        starts = sorted((option for option in self.seen.values() if option is not None), key=lambda one: -one.score)
        for start in starts[:NUM_STARTS]:
            best = _better(best, self._climbed(start))
        return best

    def _points(self, layouts: Iterable[Layout]) -> list[GroupPoint]:
        found = (self.model.best_point(layout, self.planner.demand.tpot_s) for layout in layouts)
        return [point for point in found if point is not None]

    def _climbed(self, at: Option) -> Option:
        for _ in range(MAX_STEPS):
            step = at
            for layout in near(at.point.layout, self.bounds):
                if layout not in self.seen:
                    for point in self._points([layout]):
                        if self._bound(point) > step.score:
                            self._known(point, step)
                step = _better(step, self.seen.get(layout)) or step
            if step is at:
                break
            at = step
        return at

    def _known(self, point: GroupPoint, rival: Option | None) -> Option | None:
        if point.layout not in self.seen:
            self.seen[point.layout] = self._option(point, 0.0 if rival is None else rival.score)
        return self.seen[point.layout]

    def _bound(self, point: GroupPoint) -> float:
        """No option with this group has a better score: full batches, the cheapest prefill, nothing idle."""
        planner, cards = self.planner, self.planner.cards
        usd = self._group_price(point.layout) / point.tokens_per_s
        if self.wiring is not Wiring.COLOCATED:
            size = self.prefill.smallest_instance()
            seconds = size * self.prefill.service(size)[0] / MAX_UTILISATION  # of a card, for a request
            usd += seconds / planner.demand.traffic.mean_output * planner.price(cards.prefill)
        return 1 / (usd if planner.unpriced else usd / SECONDS_PER_HOUR * 1e6)

    def _group_price(self, layout: Layout) -> float:
        cards, price = self.planner.cards, self.planner.price
        if self.wiring is Wiring.AFD:
            return layout.num_attention * price(cards.attention) + layout.num_ffn * price(cards.ffn)
        return layout.num_cards * price(cards.decode if self.wiring is Wiring.PD else cards.colocated)

    def _option(self, point: GroupPoint, rival: float) -> Option | None:
        """As many groups of ``point`` as the budget or the rate takes, with their prefill pool."""
        demand = self.planner.demand
        per_group = point.tokens_per_s / demand.traffic.mean_output  # requests per second at full batch
        most = demand.max_cards // point.layout.num_cards
        if most < 1:
            return None
        if demand.rate is not None:
            needed = max(1, math.ceil(demand.rate / (per_group * self.planner.assumptions.fill)))
            return self._assembled(point, needed, demand.rate) if needed <= most else None
        found, count = None, 0
        if self._assembled(point, 1, per_group) is not None:
            count = largest(lambda n: self._assembled(point, n, n * per_group) is not None, most)
            found = self._assembled(point, count, count * per_group)
        if self.wiring is Wiring.COLOCATED or count == most:
            return found
        # Cards that a further group would take leave fewer for prompts: it runs, but with smaller batches.
        return _better(found, self._at_smaller_batches(point, count + 1, max(rival, 0.0 if found is None else found.score)))

    def _at_smaller_batches(self, point: GroupPoint, num_groups: int, rival: float) -> Option | None:
        """``num_groups`` groups with the largest batches whose prompts the rest of the budget keeps up with."""
        planner, demand = self.planner, self.planner.demand
        left, size = demand.max_cards - num_groups * point.layout.num_cards, self.prefill.smallest_instance()
        most = left // size * MAX_UTILISATION / self.prefill.service(size)[0] * demand.traffic.mean_output  # tokens/s
        usd = num_groups * self._group_price(point.layout)  # at least; what is left costs more than nothing
        if most <= 0 or most / (usd if planner.unpriced else usd / SECONDS_PER_HOUR * 1e6) <= rival:
            return None

        def option(rows: int) -> Option | None:
            fewer = self.model.point(point.layout, rows, "prefill")
            return self._assembled(fewer, num_groups, num_groups * fewer.tokens_per_s / demand.traffic.mean_output)

        if option(1) is None:
            return None
        return option(largest(lambda rows: option(rows) is not None, point.rows))

    def _assembled(self, point: GroupPoint, num_groups: int, rate: float) -> Option | None:
        planner, layout = self.planner, point.layout
        demand, cards = planner.demand, planner.cards
        left = demand.max_cards - num_groups * layout.num_cards
        if left < 0:
            return None
        pool: PrefillPool | None = None
        if self.wiring is Wiring.COLOCATED:
            ttft_s = self._colocated_ttft_s(point, num_groups)
            prices = [(num_groups * layout.num_cards, cards.colocated)]
        else:
            attention = cards.decode if self.wiring is Wiring.PD else cards.attention
            pool = self.prefill.smallest_pool(
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
            if self.wiring is Wiring.AFD:
                prices.append((num_groups * layout.num_ffn, cards.ffn))
        if ttft_s > demand.ttft_s:
            return None
        num_cards = sum(count for count, _ in prices)
        usd = sum(count * planner.price(card) for count, card in prices)
        # Without a rate the budget is bought whole: what stays idle is of the cheapest kind among the roles.
        idle = 0 if demand.rate is not None or demand.budget_cards is None else demand.budget_cards - num_cards
        idle_card = min((card for _, card in prices), key=planner.price)
        return Option(
            wiring=self.wiring,
            point=point,
            num_groups=num_groups,
            prefill=pool,
            num_cards=num_cards,
            num_idle=idle,
            idle_card=idle_card,
            tokens_per_s=rate * demand.traffic.mean_output,
            usd_per_hour=None if planner.unpriced else usd + idle * planner.price(idle_card),
            tpot_s=point.tpot_s,
            ttft_s=ttft_s,
            prompt_room=self.room,
        )

    def _colocated_ttft_s(self, point: GroupPoint, num_groups: int) -> float:
        """Prompts run in chunks beside decode rows; each rank serves one prompt at a time."""
        traffic = self.planner.demand.traffic
        chunk = colocated_chunk(point, traffic, self.room)
        servers, load = num_groups * point.layout.num_ranks, 1 / self.room
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


def _better(one: Option | None, other: Option | None) -> Option | None:
    """The one with the greater score; the first of equal ones."""
    if one is None or other is None:
        return other if one is None else one
    return other if other.score > one.score else one
