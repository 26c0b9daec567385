"""Which wiring to deploy and why, or which constraint fails and by how much (control speed).

Must not know: documents, terminals, or simulation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from antiphon.planner.cost.formats import bytes_per_value
from antiphon.planner.cost.model_cost import cache_bytes
from antiphon.planner.cost.shape import FLOPS_PER_WEIGHT
from antiphon.planner.options import Option, Planner, Wiring
from antiphon.planner.pipeline.fabric import dense_batch, min_sparsity, moe_batch
from antiphon.planner.pipeline.group import GroupPoint, Layout
from antiphon.planner.pipeline.prefill import TAIL
from antiphon.planner.search import best_option

WORTH_IT = 1.03  # a wiring with more parts must be this much better than a simpler one
SIMPLEST_FIRST = (Wiring.COLOCATED, Wiring.PD, Wiring.AFD)


class Constraint(StrEnum):
    """What can make a request infeasible."""

    MEMORY = "memory"
    TPOT = "tpot"
    TTFT = "ttft"
    NETWORK = "network"
    RATE = "rate"
    BUDGET = "budget"


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A constraint that fails: ``needed`` against ``available``, in ``unit``."""

    constraint: Constraint
    needed: float
    available: float
    unit: str
    what: str

    @property
    def by(self) -> float:
        """How much is missing, in ``unit``."""
        return abs(self.needed - self.available)

    @property
    def text(self) -> str:
        """One sentence."""
        if math.isinf(self.needed):
            return self.what
        scale, unit = {"byte": (1e-9, "GB"), "s": (1e3, "ms")}.get(self.unit, (1.0, self.unit))

        def shown(value: float) -> str:
            if unit == "cards":
                return f"{value:,.0f} card" if value == 1 else f"{value:,.0f} cards"
            return f"{value * scale:.4g} {unit}"

        return f"{self.what}: needs {shown(self.needed)}, has {shown(self.available)} (off by {shown(self.by)})"


def violations(planner: Planner, wiring: Wiring) -> tuple[Violation, ...]:
    """Why a wiring has no option; never empty."""
    found = [*_memory(planner, wiring)]
    if not found:
        found = [*_tpot(planner, wiring), *_ttft(planner, wiring)]
    if not found and planner.demand.rate is not None:
        filled = dataclasses.replace(planner, demand=dataclasses.replace(planner.demand, rate=None))
        best = best_option(filled, wiring)
        if best is not None:
            rate = best.tokens_per_s / planner.demand.traffic.mean_output * planner.assumptions.fill
            found = [_rate(planner.demand.rate, rate)]
    return tuple(found) or (_budget(planner, wiring),)


def _rate(wanted: float, reached: float) -> Violation:
    return Violation(
        constraint=Constraint.RATE,
        needed=wanted,
        available=reached,
        unit="requests/s",
        what="the budget's cards can't serve the rate",
    )


def _memory(planner: Planner, wiring: Wiring) -> list[Violation]:
    model, shape, formats = planner.decode_model(wiring), planner.shape, planner.formats
    size = bytes_per_value(formats.weights)
    tensor = planner.tensor_sizes(model)[-1]
    request = cache_bytes(shape, formats, planner.demand.traffic.mean_context, tensor)
    budget, found = planner.demand.max_cards, []
    usable = model.usable_attention_bytes()
    fixed = shape.attention_side_weights * size / tensor + request
    if fixed > usable:
        found.append(
            Violation(
                constraint=Constraint.MEMORY,
                needed=fixed,
                available=usable,
                unit="byte",
                what=f"attention weights and the KV of one request don't fit {tensor} x {model.stages.attention.key} (each)",
            )
        )
    weights = shape.total_weights * size + request
    cards = min(budget, planner.assumptions.max_group_cards)
    if wiring is not Wiring.AFD and weights > cards * usable:
        found.append(
            Violation(
                constraint=Constraint.MEMORY,
                needed=weights,
                available=cards * usable,
                unit="byte",
                what=f"weights and the KV of one request don't fit {cards} x {model.stages.attention.key}",
            )
        )
    if wiring is Wiring.AFD and shape.ffn_weights * size > max(0, cards - 1) * model.usable_ffn_bytes():
        found.append(
            Violation(
                constraint=Constraint.MEMORY,
                needed=shape.ffn_weights * size,
                available=max(0, cards - 1) * model.usable_ffn_bytes(),
                unit="byte",
                what=f"FFN weights don't fit {max(0, cards - 1)} x {model.stages.ffn.key}, one card being for attention",
            )
        )
    if not found:
        least = _fewest_cards(planner, wiring)
        if least > budget:
            found.append(
                Violation(
                    constraint=Constraint.BUDGET,
                    needed=least,
                    available=budget,
                    unit="cards",
                    what=f"one {wiring.value} group and its prefill instance hold the weights only on more cards",
                )
            )
    return found


def _fewest_cards(planner: Planner, wiring: Wiring) -> int:
    model = planner.decode_model(wiring)
    whole = math.ceil(planner.shape.total_weights * bytes_per_value(planner.formats.weights) / model.usable_attention_bytes())
    if wiring is Wiring.COLOCATED:
        return whole
    decode = whole if wiring is Wiring.PD else 1 + planner.fewest_ffn_cards(model)
    return decode + planner.prefill_model().smallest_instance()


def step_floor(planner: Planner, wiring: Wiring, *, free_network: bool = False) -> float:
    """Shortest decode step of any group within the budget: one row per card and ubatch."""
    if free_network:
        ideal = dataclasses.replace(planner.assumptions.efficiency, network=1e9, link_latency_s=0.0)
        planner = dataclasses.replace(planner, assumptions=dataclasses.replace(planner.assumptions, efficiency=ideal))
    model = planner.decode_model(wiring)
    limit = min(planner.demand.max_cards, planner.assumptions.max_group_cards)
    shortest = math.inf
    for tensor in planner.tensor_sizes(model):
        size = 1 if wiring is Wiring.AFD else tensor
        while size <= limit:
            if wiring is Wiring.AFD:
                layout = Layout(num_attention=tensor, num_ffn=size, num_ubatches=1, tensor=tensor)
            else:
                layout = Layout(num_attention=size, num_ffn=size, num_ubatches=1, colocated=True, tensor=tensor)
            if layout.num_cards <= limit and model.fits(layout, 1):
                shortest = min(shortest, model.step(layout, 1)[0])
            size += max(1, size // 4 // tensor) * (1 if wiring is Wiring.AFD else tensor)
    return shortest


def _tpot(planner: Planner, wiring: Wiring) -> list[Violation]:
    tokens = planner.assumptions.speculation.tokens()  # of a step
    target, floor = planner.demand.tpot_s, step_floor(planner, wiring) / tokens
    if floor <= target:
        return []
    found = [
        Violation(
            constraint=Constraint.TPOT,
            needed=floor,
            available=target,
            unit="s",
            what="TPOT is below the floor of one decode step at batch 1",
        )
    ]
    without = step_floor(planner, wiring, free_network=True) / tokens
    if without <= target:
        found.append(
            Violation(
                constraint=Constraint.NETWORK,
                needed=floor - without,
                available=target - without,
                unit="s",
                what="the exchange between attention and FFN takes more of a step than TPOT leaves for it",
            )
        )
    return found


def _ttft(planner: Planner, wiring: Wiring) -> list[Violation]:
    model, prompt = planner.prefill_model(), planner.demand.traffic.prompt_quantile(1 - TAIL)
    target, cards = planner.demand.ttft_s, max(1, planner.demand.max_cards)
    floor = model.prompt_s(prompt, cards) + step_floor(planner, wiring)
    if floor > target:
        return [
            Violation(
                constraint=Constraint.TTFT,
                needed=floor,
                available=target,
                unit="s",
                what=f"a prompt of {prompt} tokens and one step take longer than TTFT with every card of the budget on it",
            )
        ]
    if wiring is Wiring.COLOCATED:
        return []
    transfer_s = model.transfer_s(cards, planner.decode_model(wiring).stages.attention.nic_bandwidth)
    if transfer_s <= target:
        return []
    return [
        Violation(
            constraint=Constraint.NETWORK,
            needed=transfer_s,
            available=target,
            unit="s",
            what=f"moving the KV of a prompt of {prompt} tokens to its decode worker takes longer than TTFT",
        )
    ]


def _budget(planner: Planner, wiring: Wiring) -> Violation:
    """The smallest budget that would do, within a quarter."""
    cards = planner.demand.max_cards
    needed = math.inf
    for _ in range(24):
        cards += max(1, cards // 4)
        larger = dataclasses.replace(planner, demand=dataclasses.replace(planner.demand, budget_cards=cards))
        if best_option(larger, wiring) is not None:
            needed = cards
            break
    if math.isinf(needed) and wiring is Wiring.COLOCATED:
        untimed = dataclasses.replace(planner, demand=dataclasses.replace(planner.demand, ttft_s=math.inf))
        patient = best_option(untimed, wiring)
        if patient is not None:
            return Violation(
                constraint=Constraint.TTFT,
                needed=patient.ttft_s,
                available=planner.demand.ttft_s,
                unit="s",
                what="prompts that enter decode steps wait longer than TTFT, or make steps longer than TPOT",
            )
    would = "would any number of cards that was tried" if math.isinf(needed) else "about this many cards would"
    return Violation(
        constraint=Constraint.BUDGET,
        needed=needed,
        available=planner.demand.max_cards,
        unit="cards",
        what=f"no group with its prefill pool keeps the targets within the budget; {'nor ' if math.isinf(needed) else ''}{would}",
    )


def binding(planner: Planner, option: Option) -> str:
    """What keeps the option's groups from serving more."""
    point, model = option.point, planner.decode_model(option.wiring, option.prompt_room)
    if point.limit == "memory":
        return "KV memory of the attention cards" if option.wiring is Wiring.AFD else "memory of the cards"
    if point.limit == "prefill":
        return "prefill cards that the budget leaves"
    if point.limit == "rows":
        return "nothing within the batches considered"
    times, layout = point.main.times, point.layout
    rows = point.rows_per_ffn_ubatch
    ffn_share = model.stages.ffn_compute_share(point.main.layer.ffn, rows, layout.num_ffn)
    ffn = "FFN compute" if ffn_share > 0.5 else "FFN weight reads"
    attention = model.stages.attention_bound(point.main.layer, point.computed_rows, model.contexts.mean, layout.tensor)
    halves, moved = times.attention_s + times.ffn_s, times.a2f_s + times.f2a_s
    if layout.colocated:  # both halves follow each other on the same cards, and so do out and back
        if moved > halves:
            return "TPOT through the network"
        return f"TPOT through {attention if times.attention_s > times.ffn_s else ffn}"
    busiest = times.slowest_s
    if layout.num_ubatches * busiest < times.round_s:
        return f"TPOT through the latency of a round ({attention}, exchange and {ffn} one after the other)"
    if busiest in (times.a2f_s, times.f2a_s) and busiest > 0:
        return "TPOT through the network"
    return f"TPOT through {attention if busiest == times.attention_s else ffn}"


def choose(options: Sequence[Option]) -> Option:
    """The simplest wiring that no other one beats by what further parts must bring."""
    ordered = sorted(options, key=lambda option: SIMPLEST_FIRST.index(option.wiring))
    best = max(option.score for option in options)
    return next(option for option in ordered if option.score * WORTH_IT >= best)


def reason(planner: Planner, chosen: Option, options: Mapping[Wiring, Option], failed: Mapping[Wiring, Sequence[Violation]]) -> str:
    """Why ``chosen``, in a sentence or two."""
    others = [option for wiring, option in options.items() if wiring is not chosen.wiring]
    parts = []
    if others:
        rival = max(others, key=lambda option: option.score)
        gain = chosen.score / rival.score - 1
        unpriced = ", ".join(card.key for card in planner.unpriced)
        per = f"card (no price: {unpriced})" if unpriced else "dollar"
        if gain >= 0:
            parts.append(f"{chosen.wiring.value} serves {gain:.1%} more per {per} than {rival.wiring.value}")
        else:
            parts.append(
                f"{rival.wiring.value} would serve {-gain / (1 + gain):.1%} more per {per} than {chosen.wiring.value}, "
                f"less than the {WORTH_IT - 1:.0%} that its further parts must bring"
            )
    afd = options.get(Wiring.AFD)
    if chosen.wiring is Wiring.AFD and others:
        parts.append(_why_afd(planner, chosen, max(others, key=lambda option: option.score)))
    elif afd is not None:
        parts.append(_why_not_afd(planner, afd, chosen))
    parts.extend(f"{wiring.value} is infeasible: {failed[wiring][0].text}" for wiring in failed)
    return "; ".join(parts) or f"{chosen.wiring.value} is the only wiring considered"


def _ffn_facts(planner: Planner, option: Option) -> tuple[int, float]:
    point: GroupPoint = option.point
    model = planner.decode_model(option.wiring, option.prompt_room)
    ffn, rows = point.main.layer.ffn, point.rows_per_ffn_ubatch
    return rows, model.stages.ffn_compute_share(ffn, rows, point.layout.num_ffn)


def _why_afd(planner: Planner, afd: Option, rival: Option) -> str:
    rows, share = _ffn_facts(planner, afd)
    rival_rows, rival_share = _ffn_facts(planner, rival)
    text = (
        f"{rows} rows meet at the FFN against {rival_rows}, so that it computes {share:.0%} of its time against {rival_share:.0%}"
    )
    if planner.cards.attention.key != planner.cards.ffn.key:
        text += f"; attention runs on {planner.cards.attention.key}, the FFN on {planner.cards.ffn.key}"
    return text


def _why_not_afd(planner: Planner, afd: Option, chosen: Option) -> str:
    times = afd.point.main.times
    ffn = afd.point.main.layer.ffn
    if times.slowest in ("a2f", "f2a"):
        return (
            f"AFD's exchange takes {1e6 * (times.a2f_s + times.f2a_s):.0f} us per layer and ubatch, longer than "
            f"attention ({1e6 * times.attention_s:.0f} us) or FFN ({1e6 * times.ffn_s:.0f} us): the fabric binds"
        )
    rows, share = _ffn_facts(planner, chosen)
    if not ffn.num_experts and share > 0.5:
        return f"the FFN is dense and {rows} rows already keep it computing {share:.0%} of its time without AFD"
    if afd.point.layout.num_ubatches * times.slowest_s < times.round_s:
        return f"a round of {1e6 * times.round_s:.0f} us per layer is too long for TPOT to fill AFD's pipeline"
    return (
        f"whole cards already bring {rows} rows to the FFN ({share:.0%} of its time computing), so that AFD gains less "
        "than its bubbles and barriers cost"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricCheck:
    """Whether the fabric can feed the FFN cards."""

    sparsity: float  # of the model's MoE; 1 for dense
    min_sparsity: float
    rows_to_fill: float  # rows from which the FFN is bound by computing

    @property
    def feeds(self) -> bool:
        """True when the model is no sparser than the fabric allows."""
        return self.sparsity >= self.min_sparsity


def fabric_check(planner: Planner, num_stages: int) -> FabricCheck | None:
    """The fabric of the FFN cards against the model's sparsity; None without a TPOT target."""
    if not math.isfinite(planner.demand.tpot_s):
        return None
    card, formats = planner.cards.ffn, planner.formats
    mixture = planner.shape.experts
    sparsity = 1.0 if mixture is None else mixture.sparsity
    dense = dense_batch(
        flops=card.flops_in(formats.compute),
        weight_bytes=bytes_per_value(formats.weights),
        flops_per_weight=FLOPS_PER_WEIGHT,
        bandwidth=card.bandwidth,
    )
    return FabricCheck(
        sparsity=sparsity,
        min_sparsity=min_sparsity(
            card,
            planner.shape,
            formats,
            tpot_s=planner.demand.tpot_s,
            num_stages=num_stages,
            network_efficiency=planner.assumptions.efficiency.network,
        ),
        rows_to_fill=moe_batch(dense_batch=dense, sparsity=sparsity),
    )
