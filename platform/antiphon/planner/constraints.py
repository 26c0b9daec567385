"""Why a wiring has no option: the constraint that fails, by how much, and whether only what is modelled fails it (control speed).

Must not know: which wiring is best.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from antiphon.planner.cost.formats import bytes_per_value
from antiphon.planner.cost.model_cost import cache_bytes
from antiphon.planner.options import Planner, Wiring
from antiphon.planner.pipeline.group import Layout
from antiphon.planner.pipeline.prefill import TAIL
from antiphon.planner.search import best_option

BEYOND = "attention spread over several nodes or along the context might do, and is not modelled"


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
    modelled: bool = True  # False: cards in ways that the planner does not know might keep it

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


def shortfall(found: Sequence[Violation]) -> str:
    """infeasible, or "not modelled" when nothing but what is not modelled rules a wiring out."""
    return "infeasible" if any(violation.modelled for violation in found) else "not modelled"


def beyond(failed: Iterable[Sequence[Violation]]) -> list[str]:
    """What to add, once, when a wiring is not modelled."""
    return [BEYOND] if any(shortfall(found) != "infeasible" for found in failed) else []


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
                modelled=shape.total_weights * size + request * tensor > budget * usable,
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
            modelled=_spread_floor(planner, wiring) / tokens > target,
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
                modelled=found[0].modelled,
            )
        )
    return found


def _spread_floor(planner: Planner, wiring: Wiring) -> float:
    """A bound on the shortest step of attention that is spread over more cards than a node's; what is modelled within it."""
    model = planner.decode_model(wiring)
    stages, formats, cards = model.stages, planner.formats, planner.demand.max_cards
    if cards <= planner.tensor_sizes(model)[-1]:
        return math.inf
    kernels = sum(count * (layer.attention_kernels + layer.ffn.kernels) for layer, count in planner.shape.kinds)
    reads = planner.shape.activated_weights * bytes_per_value(formats.weights)
    fastest = max(stages.attention.bandwidth, stages.ffn.bandwidth) * stages.efficiency.memory
    return reads / (min(cards, planner.assumptions.max_group_cards) * fastest) + kernels * stages.efficiency.kernel_s


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
