"""Which wiring to deploy and why (control speed).

Must not know: documents, terminals, or simulation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from antiphon.planner.constraints import Violation, beyond, shortfall
from antiphon.planner.cost.formats import bytes_per_value
from antiphon.planner.cost.hardware import Accelerator
from antiphon.planner.cost.shape import FLOPS_PER_WEIGHT
from antiphon.planner.options import Option, Planner, Wiring
from antiphon.planner.pipeline.fabric import dense_batch, min_sparsity, moe_batch
from antiphon.planner.pipeline.group import GroupPoint

WORTH_IT = 1.03  # a wiring with more parts must be this much better than a simpler one
SIMPLEST_FIRST = (Wiring.COLOCATED, Wiring.PD, Wiring.AFD)


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
    parts.extend(f"{wiring.value} is {shortfall(found)}: {found[0].text}" for wiring, found in failed.items())
    parts.extend(beyond(failed.values()))
    return "; ".join(parts) or f"{chosen.wiring.value} is the only wiring considered"


def _ffn_facts(planner: Planner, option: Option) -> tuple[int, float]:
    point: GroupPoint = option.point
    model = planner.decode_model(option.wiring, option.prompt_room)
    ffn, rows = point.main.layer.ffn, point.rows_per_ffn_ubatch
    return rows, model.stages.ffn_compute_share(ffn, rows, point.layout.num_ffn)


def _why_afd(planner: Planner, afd: Option, rival: Option) -> str:
    rows, share = _ffn_facts(planner, afd)
    rival_rows, rival_share = _ffn_facts(planner, rival)
    moved_s, rival_moved_s = (sum((o.point.main.times.a2f_s, o.point.main.times.f2a_s)) for o in (afd, rival))
    parts = []
    if share > rival_share:
        more = f"{rows} rows meet at the FFN against {rival_rows}, so that it" if rows > rival_rows else "the FFN"
        parts.append(f"{more} computes {share:.0%} of its time against {rival_share:.0%}")
    if moved_s < rival_moved_s:
        parts.append(
            f"its exchange takes {1e6 * moved_s:.0f} us per layer and ubatch, behind the other ubatches, against "
            f"{1e6 * rival_moved_s:.0f} us"
        )
    if planner.cards.attention.key != planner.cards.ffn.key:
        parts.append(f"attention runs on {planner.cards.attention.key}, the FFN on {planner.cards.ffn.key}")
    return "; ".join(parts) or "attention and FFN work at the same time, on cards of their own"


def _attention_usd(planner: Planner, option: Option, card: Accelerator) -> float:
    """Of one row of the main kind of layer, as the option's ranks take it; in the planner's prices."""
    point = option.point
    return point.main.times.attention_s / point.computed_rows * point.layout.tensor * planner.price(card)


def _why_not_afd(planner: Planner, afd: Option, chosen: Option) -> str:
    times = afd.point.main.times
    ffn = afd.point.main.layer.ffn
    if times.slowest in ("a2f", "f2a"):
        return (
            f"AFD's exchange takes {1e6 * (times.a2f_s + times.f2a_s):.0f} us per layer and ubatch, longer than "
            f"attention ({1e6 * times.attention_s:.0f} us) or FFN ({1e6 * times.ffn_s:.0f} us): the fabric binds"
        )
    cards = planner.cards
    whole = cards.colocated if chosen.wiring is Wiring.COLOCATED else cards.decode
    dearer = _attention_usd(planner, afd, cards.attention) / _attention_usd(planner, chosen, whole)
    if cards.attention.key != whole.key and dearer > 1.1:
        return f"a row of attention costs {dearer:.1f} times as much on {cards.attention.key} as on {whole.key}"
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
