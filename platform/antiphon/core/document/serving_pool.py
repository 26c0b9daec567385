"""``ServingPool``: the child of an ``LLMDeployment`` that owns one pool's scale subresource (control speed).

The operator writes it; people and autoscalers write only ``spec.replicas``, through ``/scale``.

Must not know: how a size is reached.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from antiphon.core.document.part import Model
from antiphon.core.document.policies import ScalingMode
from antiphon.core.document.spec import Metadata, PoolRole


class ServingPoolSpec(Model):
    """Which pool it is, and the size asked for."""

    deployment: str = Field(description="Name of the LLMDeployment it belongs to.", min_length=1, max_length=40)
    pool: str = Field(description="Name of the pool within it.", min_length=1, max_length=32)
    role: PoolRole = Field(description="What the pool's workers hold and do.")
    mode: ScalingMode = Field(description="Who decides the size.", strict=False)
    replicas: int | None = Field(
        default=None,
        ge=0,
        le=10_000,
        description="Workers asked for; kubectl scale and autoscalers write it when mode is External.",
    )
    min_replicas: int = Field(default=1, ge=0, le=10_000, description="Fewest workers accepted.")
    max_replicas: int = Field(default=1, ge=0, le=10_000, description="Most workers accepted.")


class ServingPool(Model):
    """The whole object, without its status."""

    api_version: Literal["serving.antiphon.dev/v1alpha1"] = Field(description="Group and version of the kind.")
    kind: Literal["ServingPool"] = Field(description="The kind.")
    metadata: Metadata = Field(description="Name, namespace, labels and annotations.", strict=False)
    spec: ServingPoolSpec = Field(description="Which pool it is, and the size asked for.")
