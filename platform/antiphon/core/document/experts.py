"""The ``experts`` section of a deployment document: how the experts of a mixture are held, chosen and moved (control speed).

Must not know: how experts are computed, or who moves them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from antiphon.core.document.part import Line, Model, as_tuple


class RebalanceSpec(Model):
    """When experts move between FFN workers while serving. Copies of busy experts need memory: plan for it."""

    interval_s: float = Field(default=300.0, gt=0, le=86_400, description="Seconds between two looks at the load of experts.")
    threshold: float = Field(
        default=1.15, ge=1, le=1000, description="Busiest group's rows over the mean, from which a layer is balanced again."
    )
    min_gain: float = Field(
        default=0.05, ge=0, le=1000, description="Least that this quotient must fall by; below, the layer stays as it is."
    )
    min_rows: int = Field(default=2000, ge=1, le=1_000_000_000, description="Rows a layer must have had since the last look.")
    redundant: int = Field(default=0, ge=0, le=65_536, description="Copies of busy experts beyond the first, per layer.")
    nodes: int = Field(
        default=1,
        ge=1,
        le=4096,
        description="Machines that the groups are spread over, in equal runs; more than one keeps the gate's groups within one.",
    )
    extra_memory_bytes: int = Field(
        default=512 * 2**20,
        ge=0,
        le=1 << 50,
        description="Most that an FFN worker reads before it lets go of as much; one layer's experts where that is more.",
    )


class ExpertsSpec(Model):
    """How the experts of a mixture are held and chosen."""

    placement_file: Line | None = Field(
        default=None,
        description="File with the groups that hold each expert, as written after balancing; None = spread in equal runs.",
        min_length=1,
        max_length=1024,
    )
    rebalance: RebalanceSpec | None = Field(
        default=None, description="Move experts by their load while serving; None = only when told to (antiphon experts rebalance)."
    )
    keep: tuple[Literal["shared", "down"], ...] = Field(
        default=(),
        description="Weights that stay in the compute format where quantization is int8: shared experts, down projections.",
        max_length=2,
    )
    skip_file: Line | None = Field(
        default=None,
        description="File with thresholds below which experts are skipped, as written by the search; None = none are.",
        min_length=1,
        max_length=1024,
    )

    _lists = field_validator("keep", mode="before")(as_tuple)
