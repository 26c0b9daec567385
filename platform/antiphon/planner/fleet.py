"""Which accelerator each role runs on: what the user fixed, and for the rest the cheapest of a fleet (pure arithmetic).

Must not know: batches or budgets; a role's cheapest card follows from the cost of one token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from antiphon.core.errors import InvalidInput
from antiphon.planner.cost.formats import Formats
from antiphon.planner.cost.hardware import Accelerator
from antiphon.planner.cost.library import Model
from antiphon.planner.cost.model_cost import prefill_cost
from antiphon.planner.cost.token_cost import token_cost, unit_cost
from antiphon.planner.options import Cards

ROLES = ("colocated", "prefill", "decode", "attention", "ffn")


def assign(model: Model, formats: Formats, context: float, fleet: Sequence[Accelerator], fixed: Mapping[str, Accelerator]) -> Cards:
    """Cards by role.

    Args:
        model: What to serve.
        formats: Number formats to serve it in.
        context: Decode context, in tokens.
        fleet: Accelerators to choose from, those of ``fixed`` when empty; without a price they count as costing the same.
        fixed: Accelerators that the user gave to roles.

    Raises:
        InvalidInput: a role is unknown, or neither fixed nor can be chosen.
    """
    for role in fixed:
        if role not in ROLES:
            raise InvalidInput(f"no role {role!r}; roles are {', '.join(ROLES)}", "hardware")
    choices = list(dict.fromkeys(fleet or fixed.values()))
    if not choices:
        raise InvalidInput("name at least one accelerator", "hardware")
    priced = [card.priced(card.usd_per_hour or 1.0) for card in choices]
    cost = token_cost(model, priced, context, formats)
    prompt = prefill_cost(model.shape, formats, max(1.0, context)).flops
    cheapest_prefill = min(priced, key=lambda card: prompt * unit_cost(card, formats.compute).usd_per_flop).key
    chosen = {
        "colocated": cost.best_colocated,
        "prefill": cheapest_prefill,
        "decode": cost.best_colocated,
        "attention": cost.best_attention,
        "ffn": cost.best_ffn,
    }
    by_key = {card.key: card for card in choices}
    return Cards(**{role: fixed[role] if role in fixed else by_key[chosen[role]] for role in ROLES})
