"""From a document and options to a question that can be planned: model, cards, demand, assumptions (control speed).

Options win over the document. Must not know: terminals.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from antiphon.core.document.planning import PlanningSpec
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import InvalidInput
from antiphon.planner.bounds import checked
from antiphon.planner.cost.formats import Formats
from antiphon.planner.cost.hardware import Accelerator, Catalogue, Efficiency
from antiphon.planner.cost.library import Model, find_model, model_names, read_model
from antiphon.planner.cost.local_machine import measure_local
from antiphon.planner.fleet import assign
from antiphon.planner.options import Assumptions, Cards, Demand, Planner, Wiring
from antiphon.planner.pipeline.speculation import Speculation
from antiphon.planner.search import best_option
from antiphon.planner.traffic import DEFAULT_OUTPUT_TOKENS, RequestShape, Traffic

DEFAULT_CONTEXT = 8192.0
LOCAL = "local"
BOUNDED = ("tpot_ms", "ttft_ms", "gpu_budget", "rate", "context", "prompt_tokens", "output_tokens", "expert_skew", "price",
    "drafts", "acceptance", "drafting",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What was said beside the document; None and empty = nothing."""

    model: str | None = None  # name in the library, or a path
    fleet: tuple[str, ...] = ()
    roles: Mapping[str, str] = field(default_factory=dict)
    tpot_ms: float | None = None
    ttft_ms: float | None = None
    gpu_budget: int | None = None
    rate: float | None = None
    context: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    trace: Path | None = None
    weights: str | None = None
    kv: str | None = None
    compute: str | None = None
    attention: str | None = None
    efficiency: Mapping[str, float] = field(default_factory=dict)
    expert_skew: float | None = None
    price: float | None = None  # of the local machine
    drafts: int | None = None
    acceptance: float | None = None
    drafting: float | None = None

    def __post_init__(self) -> None:
        for name in BOUNDED:
            value = getattr(self, name)
            if value is not None:
                checked(name, value)
        said = [name for name in ("trace", "prompt_tokens", "context") if getattr(self, name) is not None]
        if len(said) > 1:
            raise InvalidInput(f"{' and '.join(said)} both say what requests look like; give one", said[-1])
        if bool(self.drafts) != (self.acceptance is not None):
            raise InvalidInput(
                "drafts and acceptance: give both or neither", "drafts" if self.acceptance is not None else "acceptance"
            )
        if self.drafting is not None and not self.drafts:
            raise InvalidInput("drafting: give drafts and acceptance with it", "drafting")
        if self.output_tokens is not None and said not in (["prompt_tokens"], ["context"]):
            raise InvalidInput("output_tokens: give prompt_tokens or context with it", "output_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Ready to plan."""

    model: Model
    planner: Planner
    fleet: tuple[Accelerator, ...]


def resolve_model(name: str, base: Path | None = None, field: str = "model") -> Model:
    """The model of a library name, or of a path (relative to ``base``) to a checkpoint or config.json; ``field`` is what named it.

    Raises:
        UnknownModel, CheckpointInvalid, UnsupportedModel, InvalidInput: there is none, or it can't be read.
    """
    if name in model_names():
        return find_model(name)
    path = Path(name) if base is None else base / name
    return read_model(path) if _exists(path) else find_model(name, field)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # longer than a name may be, or with a NUL
        return False


def question(wishes: Wishes, catalogue: Catalogue, document: LLMDeployment | None, folder: Path) -> Question:
    """What to plan.

    Raises:
        InvalidInput: something needed is missing or unknown; ``field`` names it.
    """
    planning = PlanningSpec() if document is None or document.spec.planning is None else document.spec.planning
    model = _model(wishes, planning, document, folder)
    traffic = _traffic(wishes, planning, folder)
    formats = _formats(wishes, planning, model.formats)
    local: list[Accelerator] = []  # this machine, once a role uses it

    def card(key: str, where: str) -> Accelerator:
        if key != LOCAL:
            return catalogue.get(key, where)
        if not local:
            known = LOCAL in catalogue.accelerators
            local.append(catalogue.get(LOCAL).priced(wishes.price) if known else measure_local(wishes.price))
        return local[0]

    hardware = planning.hardware
    said = "spec.planning.hardware."
    named = {role: (getattr(hardware, role), said + role) for role in ("colocated", "prefill", "decode", "attention", "ffn")}
    named.update({role: (key, f"role {role}") for role, key in wishes.roles.items()})
    fixed = {role: card(key, where) for role, (key, where) in named.items() if key is not None}
    fleet: Sequence[Accelerator] = (
        [card(key, "hardware") for key in wishes.fleet] if wishes.fleet else [card(key, said + "fleet") for key in hardware.fleet]
    )
    if not fleet and not fixed:
        fleet = catalogue.priced
    if wishes.price is not None and not local:
        raise InvalidInput("price: is that of the local machine, which no role may use here; see hardware_file", "price")
    cards = assign(model, formats, traffic.mean_context, fleet, fixed)
    slo = None if document is None else document.spec.slo
    budget = wishes.gpu_budget
    if budget is None and document is not None:
        budget = document.spec.gpu_budget
    rate = planning.requests_per_second if wishes.rate is None else wishes.rate
    planner = Planner(
        shape=model.shape,
        formats=formats,
        cards=cards,
        assumptions=Assumptions(
            efficiency=Efficiency()
            .with_values(planning.efficiency.model_dump(), "spec.planning.efficiency")
            .with_values(wishes.efficiency),
            expert_skew=planning.expert_skew if wishes.expert_skew is None else wishes.expert_skew,
            speculation=Speculation(
                drafts=wishes.drafts or 0, acceptance=wishes.acceptance or 0.0, drafting=wishes.drafting or 0.0
            ),
        ),
        demand=Demand(
            traffic=traffic,
            tpot_s=_seconds(wishes.tpot_ms, None if slo is None else slo.tpot_ms),
            ttft_s=_seconds(wishes.ttft_ms, None if slo is None else slo.ttft_ms),
            budget_cards=budget,
            rate=rate,
        ),
    )
    if len(set(fleet)) > 1 and (budget or rate is not None):
        planner = _on_cards_that_do(planner, lambda one: assign(model, formats, traffic.mean_context, [one], fixed), fleet)
    return Question(model=model, planner=planner, fleet=tuple(dict.fromkeys([*fleet, *fixed.values()])))


def _on_cards_that_do(planner: Planner, assigned: Callable[[Accelerator], Cards], fleet: Sequence[Accelerator]) -> Planner:
    """The planner, unless nothing is feasible on the cards that cost least: then on the card of the fleet that does best."""
    if any(best_option(planner, wiring) for wiring in Wiring):
        return planner
    best, most = planner, 0.0
    for card in dict.fromkeys(fleet):
        other = dataclasses.replace(planner, cards=assigned(card))
        price = 1.0 if card.usd_per_hour is None else card.usd_per_hour
        found = [option for wiring in Wiring if (option := best_option(other, wiring)) is not None]
        worth = max((option.tokens_per_s_per_card / price for option in found), default=0.0)
        if worth > most:
            best, most = other, worth
    return best


def _seconds(wish_ms: float | None, document_ms: float | None) -> float:
    chosen = document_ms if wish_ms is None else wish_ms
    return math.inf if chosen is None else chosen / 1e3


def _model(wishes: Wishes, planning: PlanningSpec, document: LLMDeployment | None, folder: Path) -> Model:
    if wishes.model is not None:
        return resolve_model(wishes.model)
    if planning.config is not None:
        return resolve_model(planning.config, folder, "spec.planning.config")
    if document is None:
        raise InvalidInput("model: give a model, or a document (--file)", "model")
    uri = document.spec.model.uri
    path = uri.removeprefix("file://")
    if "://" not in path and _exists(folder / path):
        return read_model(folder / path)
    names = {uri.rstrip("/").split("/")[-1].lower(), document.model_name.lower()}
    for name in model_names():
        if name in names:
            return find_model(name)
    raise InvalidInput(
        f"the dimensions of {uri} are not known; set spec.planning.config to a config.json or one of {', '.join(model_names())}",
        "spec.planning.config",
    )


def _traffic(wishes: Wishes, planning: PlanningSpec, folder: Path) -> Traffic:
    if wishes.trace is not None:
        return Traffic.from_trace(wishes.trace)
    if wishes.prompt_tokens is not None:
        output = DEFAULT_OUTPUT_TOKENS if wishes.output_tokens is None else wishes.output_tokens
        return Traffic.of([RequestShape(prompt_tokens=wishes.prompt_tokens, output_tokens=output)])
    if wishes.context is None and planning.trace is not None:
        return Traffic.from_trace(folder / planning.trace)
    if wishes.context is None and planning.traffic:
        return Traffic.of(
            [RequestShape(prompt_tokens=t.prompt_tokens, output_tokens=t.output_tokens, weight=t.weight) for t in planning.traffic]
        )
    context = DEFAULT_CONTEXT if wishes.context is None else wishes.context
    return Traffic.at_context(context, wishes.output_tokens)


def _formats(wishes: Wishes, planning: PlanningSpec, usual: Formats) -> Formats:
    said = planning.formats
    return chosen_formats(
        usual,
        weights=wishes.weights or said.weights,
        compute=wishes.compute or said.compute,
        kv=wishes.kv or said.kv,
        attention=wishes.attention or said.attention,
    )


def chosen_formats(
    usual: Formats, *, weights: str | None, compute: str | None, kv: str | None, attention: str | None = None
) -> Formats:
    """The usual formats with those that were named.

    Raises:
        InvalidInput: there is no such format.
    """
    return dataclasses.replace(
        usual,
        weights=usual.weights if weights is None else weights,
        compute=usual.compute if compute is None else compute,
        attention=usual.attention if attention is None else attention,
        kv=usual.kv if kv is None else kv,
        local_kv=usual.local_kv if kv is None else kv,
    )
