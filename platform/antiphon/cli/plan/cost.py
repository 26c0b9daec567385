"""``antiphon plan cost`` (control speed)."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from antiphon.cli.plan.options import AsJson, CardOptions, Explain, spread
from antiphon.cli.plan.show import show
from antiphon.core.errors import InvalidInput


@spread
def cost(
    model: Annotated[str, typer.Option("--model", help="Name in the library, or path to a config.json.")],
    cards: CardOptions,
    context: Annotated[float, typer.Option("--context", min=1, help="Decode context in tokens.")] = 8192,
    explain: Explain = False,
    as_json: AsJson = False,
) -> None:
    """What a decoded token costs a model, and a million of them on each accelerator with a price."""
    from antiphon.planner.bounds import checked
    from antiphon.planner.cost.formula import Derivation
    from antiphon.planner.cost.local_machine import measure_local
    from antiphon.planner.cost.token_cost import token_cost
    from antiphon.planner.question import LOCAL, chosen_formats, resolve_model
    from antiphon.planner.report.as_json import cost_json, derivation_json
    from antiphon.planner.report.tables import cost_tables, derivation_lines

    checked("context", context)
    if cards.price is not None:
        checked("price", cards.price)
        if LOCAL not in (cards.hardware or ()):
            raise InvalidInput("price: is that of the local machine; name it with --hardware local", "price")
    found, catalogue = resolve_model(model), cards.catalogue()
    if cards.hardware and LOCAL in cards.hardware and LOCAL not in catalogue.accelerators:
        catalogue = catalogue.including(measure_local(cards.price))
    chosen = [catalogue.get(key) for key in cards.hardware] if cards.hardware else list(catalogue.priced)
    derivation = Derivation() if explain else None
    formats = chosen_formats(found.formats, weights=cards.weights, compute=cards.compute, kv=cards.kv)
    result = token_cost(found, chosen, context, formats, derivation)
    if as_json:
        value: dict[str, Any] = cost_json(result)
        if derivation is not None:
            value["explanation"] = derivation_json(derivation)
        print(json.dumps(value, indent=2))
        return
    show(cost_tables(result))
    if derivation is not None:
        print("\n".join(derivation_lines(derivation)))
