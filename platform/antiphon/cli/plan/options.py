"""Options that several verbs of ``antiphon plan`` share, each said once; a verb takes them as one value (control speed).

Must not know: what the verbs do with them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from antiphon.core.document.loading import read_documents
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import InvalidInput

if TYPE_CHECKING:
    from antiphon.planner.cost.hardware import Catalogue
    from antiphon.planner.question import Question, Wishes

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Explain = Annotated[bool, typer.Option("--explain", help="Show each number's formula with its values.")]

HardwareFile = Annotated[
    Path | None, typer.Option("--hardware-file", help="JSON or YAML with further accelerators, or other prices.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class CardOptions:
    """Accelerators and number formats."""

    hardware: Annotated[
        list[str] | None, typer.Option("--hardware", help="Accelerator to choose from; repeatable. 'local' measures this machine.")
    ] = None
    hardware_file: HardwareFile = None
    weights: Annotated[str | None, typer.Option("--weights", help="Format of the weights.")] = None
    kv: Annotated[str | None, typer.Option("--kv", help="Format of the KV cache.")] = None
    compute: Annotated[str | None, typer.Option("--compute", help="Format of products with weights.")] = None
    price: Annotated[float | None, typer.Option("--price", min=1e-9, help="USD per hour of the local machine.")] = None

    def catalogue(self) -> Catalogue:
        """The accelerators known to this command."""
        return catalogue(self.hardware_file)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What to plan, beside or instead of a document."""

    file: Annotated[Path | None, typer.Option("--file", "-f", help="LLMDeployment document.")] = None
    model: Annotated[str | None, typer.Option("--model", help="Name in the library, or path to a config.json.")] = None
    role: Annotated[
        list[str] | None,
        typer.Option("--role", help="ROLE=ACCELERATOR; roles: colocated, prefill, decode, attention, ffn. Repeatable."),
    ] = None
    tpot_ms: Annotated[float | None, typer.Option("--tpot-ms", min=0.001, help="Time per output token to keep.")] = None
    ttft_ms: Annotated[float | None, typer.Option("--ttft-ms", min=0.001, help="Time to first token to keep, 95th percentile.")] = (
        None
    )
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, help="Most accelerators to use.")] = None
    rate: Annotated[float | None, typer.Option("--rate", min=1e-9, help="Requests per second to serve.")] = None
    context: Annotated[
        float | None,
        typer.Option(
            "--context",
            min=1,
            help="Tokens that a decode step sees on average, prompt and output so far: prompts are shorter than this by half "
            "the output (--output-tokens, else 512).",
        ),
    ] = None
    prompt_tokens: Annotated[int | None, typer.Option("--prompt-tokens", min=1, help="Length of every prompt.")] = None
    output_tokens: Annotated[int | None, typer.Option("--output-tokens", min=1, help="Length of every answer.")] = None
    trace: Annotated[Path | None, typer.Option("--trace", help="CSV or JSON lines: prompt_tokens, output_tokens, arrival_s.")] = (
        None
    )
    attention: Annotated[
        str | None, typer.Option("--attention", help="Format of attention's scores and weighted sums; none = bf16.")
    ] = None
    efficiency: Annotated[
        list[str] | None,
        typer.Option(
            "--efficiency",
            help="NAME=VALUE, repeatable: compute, attention, memory, kv, network, overlap (shares), kernel_s, link_latency_s.",
        ),
    ] = None
    efficiency_file: Annotated[
        Path | None, typer.Option("--efficiency-file", help="What 'antiphon plan calibrate --output' wrote.")
    ] = None
    expert_skew: Annotated[
        float | None, typer.Option("--expert-skew", min=1, help="Load of the hottest FFN card over the mean.")
    ] = None
    drafts: Annotated[
        int | None, typer.Option("--drafts", min=0, max=64, help="Drafts of every request in every step; needs --acceptance.")
    ] = None
    acceptance: Annotated[
        float | None,
        typer.Option("--acceptance", min=0, max=0.999, help="Chance that a draft is taken, given those before it."),
    ] = None
    drafting: Annotated[
        float | None,
        typer.Option("--drafting", min=0, max=10, help="Time to make a step's drafts, as a share of the step that verifies them."),
    ] = None

    def question(self, cards: CardOptions) -> Question:
        """What to plan: these options over those of the document.

        Raises:
            InvalidInput: something needed is missing or unknown; ``field`` names it.
        """
        from antiphon.planner.calibration.shares import read_shares
        from antiphon.planner.question import question

        folder = Path() if self.file is None else self.file.parent
        shares, peaks = ({}, {}) if self.efficiency_file is None else read_shares(self.efficiency_file)
        # A file of accelerators says more than the peaks that were measured with the shares.
        known = cards.catalogue()
        known = known.extended({key: card for key, card in peaks.items() if key not in known.accelerators})
        wishes = self._wishes(cards, shares | _efficiency(self.efficiency))
        return question(wishes, known, _document(self.file), folder)

    def _wishes(self, cards: CardOptions, efficiency: dict[str, float]) -> Wishes:
        from antiphon.planner.question import Wishes

        return Wishes(
            model=self.model,
            fleet=tuple(cards.hardware or ()),
            roles=_roles(self.role),
            tpot_ms=self.tpot_ms,
            ttft_ms=self.ttft_ms,
            gpu_budget=self.gpus,
            rate=self.rate,
            context=self.context,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            trace=self.trace,
            weights=cards.weights,
            kv=cards.kv,
            compute=cards.compute,
            attention=self.attention,
            efficiency=efficiency,
            expert_skew=self.expert_skew,
            price=cards.price,
            drafts=self.drafts,
            acceptance=self.acceptance,
            drafting=self.drafting,
        )


def spread(verb: Callable[..., None]) -> Callable[..., None]:
    """Give typer the fields of a verb's dataclass parameters as options of their own."""
    hints = get_type_hints(verb, include_extras=True)
    values: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(verb).parameters.items():
        if name in values:
            parameters += _parameters(values[name])
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(verb)
    def gathered(**given: Any) -> None:
        made = {name: kind(**{f.name: given.pop(f.name) for f in fields(kind)}) for name, kind in values.items()}
        verb(**given, **made)

    gathered.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    gathered.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del gathered.__wrapped__  # its hints would win over those above
    return gathered


def _parameters(kind: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if f.default is MISSING else f.default,
            annotation=hints[f.name],
        )
        for f in fields(kind)
    ]


def catalogue(file: Path | None) -> Catalogue:
    """The built-in accelerators with those of a file."""
    from antiphon.planner.cost.hardware import Catalogue

    return Catalogue.built_in() if file is None else Catalogue.built_in().with_file(file)


def _document(file: Path | None) -> LLMDeployment | None:
    if file is None:
        return None
    deployments = [document for document in read_documents(file) if isinstance(document, LLMDeployment)]
    if len(deployments) != 1:
        raise InvalidInput(f"file: {file} has {len(deployments)} LLMDeployment documents; a plan is made for one", "file")
    return deployments[0]


def _efficiency(options: list[str] | None) -> dict[str, float]:
    values = {}
    for option in options or ():
        name, separator, value = option.partition("=")
        try:
            values[name] = float(value)
        except ValueError:
            separator = ""
        if not separator:
            raise InvalidInput(f"--efficiency {option!r} is not NAME=NUMBER", "efficiency")
    return values


def _roles(options: list[str] | None) -> dict[str, str]:
    roles = {}
    for option in options or ():
        role, separator, key = option.partition("=")
        if not separator or not role or not key:
            raise InvalidInput(f"--role {option!r} is not ROLE=ACCELERATOR", "role")
        roles[role] = key
    return roles
