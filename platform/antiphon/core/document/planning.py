"""What ``antiphon plan`` needs to know beyond what is deployed: accelerators per role, traffic, formats (control speed).

Latency targets and the budget stand in the document already (``slo``, ``gpuBudget``). Serving ignores this block.

Must not know: how plans are made.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from antiphon.core.document.part import Line, Model, as_tuple

FormatName = Literal["fp32", "bf16", "fp16", "fp8", "int8", "fp4", "int4"]


class PlanningHardware(Model):
    """Accelerator of each role, by its name in the planner's list."""

    fleet: tuple[Annotated[Line, Field(max_length=64)], ...] = Field(
        default=(), description="Accelerators to choose from for roles that name none.", max_length=64
    )
    colocated: Line | None = Field(default=None, description="When one card does everything.", max_length=64)
    prefill: Line | None = Field(default=None, description="Prefill workers.", max_length=64)
    decode: Line | None = Field(default=None, description="Decode workers that hold whole layers.", max_length=64)
    attention: Line | None = Field(default=None, description="Attention workers.", max_length=64)
    ffn: Line | None = Field(default=None, description="FFN workers.", max_length=64)

    _lists = field_validator("fleet", mode="before")(as_tuple)


class PlanningTraffic(Model):
    """One kind of request."""

    prompt_tokens: int = Field(ge=1, le=100_000_000, description="Length of the prompt.")
    output_tokens: int = Field(ge=1, le=100_000_000, description="Length of the answer.")
    weight: float = Field(default=1.0, gt=0, le=1e9, strict=False, description="How frequent, relative to the others.")


class PlanningFormats(Model):
    """Number formats to plan with; None = the model's."""

    weights: FormatName | None = Field(default=None, description="Weights.")
    compute: FormatName | None = Field(default=None, description="Products with weights.")
    attention: FormatName | None = Field(default=None, description="Scores and weighted sums of attention; None = bf16.")
    kv: FormatName | None = Field(default=None, description="KV cache.")


class PlanningEfficiency(Model):
    """Shares of an accelerator's peaks that are reached, and fixed costs; None = the planner's default."""

    compute: float | None = Field(default=None, ge=1e-3, le=1, strict=False, description="Products with weights.")
    attention: float | None = Field(default=None, ge=1e-3, le=1, strict=False, description="Scores and weighted sums of attention.")
    memory: float | None = Field(default=None, ge=1e-3, le=1, strict=False, description="Bandwidth of weight reads.")
    kv: float | None = Field(default=None, ge=1e-3, le=1, strict=False, description="Bandwidth of KV reads.")
    network: float | None = Field(default=None, ge=1e-3, le=1, strict=False, description="Bandwidth of links.")
    overlap: float | None = Field(
        default=None, ge=0, le=1, strict=False, description="Of the shorter of computing and exchanging on the same cards, hidden."
    )
    kernel_s: float | None = Field(default=None, ge=0, le=1, strict=False, description="Fixed seconds of one kernel.")
    link_latency_s: float | None = Field(default=None, ge=0, le=1, strict=False, description="Seconds of a link's first byte.")


class PlanningSpec(Model):
    """Inputs of ``antiphon plan deploy``."""

    config: Line | None = Field(
        default=None,
        description="The model's dimensions: a name in the planner's library, or a path to a config.json; "
        "None = from the model's uri.",
        min_length=1,
        max_length=1024,
    )
    hardware: PlanningHardware = Field(default_factory=PlanningHardware, description="Accelerator of each role.")
    traffic: tuple[PlanningTraffic, ...] = Field(
        default=(), description="Kinds of requests; empty = from the trace.", max_length=4096
    )
    trace: Line | None = Field(
        default=None,
        description="CSV or JSON lines with prompt_tokens, output_tokens and maybe arrival_s; relative to the document.",
        min_length=1,
        max_length=1024,
    )
    requests_per_second: float | None = Field(
        default=None, gt=0, le=1e9, strict=False, description="Rate to serve; None = as much as the budget gives."
    )
    formats: PlanningFormats = Field(default_factory=PlanningFormats, description="Number formats to plan with.")
    efficiency: PlanningEfficiency = Field(
        default_factory=PlanningEfficiency,
        description="Shares of the peaks reached, as antiphon plan calibrate fits them.",
    )
    expert_skew: float = Field(
        default=1.0, ge=1, le=1000, strict=False, description="Lasting load of the hottest FFN card over the mean."
    )

    _lists = field_validator("traffic", mode="before")(as_tuple)

    @model_validator(mode="after")
    def _one_source(self) -> PlanningSpec:
        if self.traffic and self.trace is not None:
            raise ValueError("give traffic or trace, not both")
        return self
