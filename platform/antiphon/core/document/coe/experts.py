"""Part of a composition's document about experts: who they are, where they answer, what they cost (control speed).

Must not know: routers, other parts.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from antiphon.core.document.part import Line, Model, as_tuple
from antiphon.core.document.pools import Quantity, parse_quantity
from antiphon.core.text.addresses import check_address

Modality = Literal["text", "image", "audio", "video"]
EXTERNAL_SCHEMES = ("http://", "https://")


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([-_.:/A-Za-z0-9]*[A-Za-z0-9])?$", min_length=1, max_length=128)]


class SecretKeyRef(Model):
    """One key of a Kubernetes secret."""

    name: Line = Field(description="Name of the secret.", min_length=1, max_length=253)
    key: Line = Field(description="Key within the secret.", min_length=1, max_length=253)


class ExternalEndpoint(Model):
    """An OpenAI-compatible endpoint that Antiphon does not run. At most one of the two key references is given."""

    url: Line = Field(description="Base URL, with the /v1 when the endpoint has one.", min_length=8, max_length=1024)
    model: Line = Field(description="Model name that the endpoint expects.", min_length=1, max_length=256)
    api_key_env: Line | None = Field(
        default=None, description="Environment variable with the API key; None = none is sent.", max_length=128
    )
    api_key_secret: SecretKeyRef | None = Field(
        default=None,
        description="Kubernetes secret with the API key; its <key>.hosts says to which hosts it may be sent. None = none is sent.",
    )

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        if not url.startswith(EXTERNAL_SCHEMES):
            raise ValueError("must start with http:// or https://")
        check_address(url)
        return url.rstrip("/")

    @model_validator(mode="after")
    def _one_key(self) -> ExternalEndpoint:
        if self.api_key_env is not None and self.api_key_secret is not None:
            raise ValueError("apiKeySecret: give apiKeyEnv or apiKeySecret, not both")
        return self


class Price(Model):
    """What an expert costs, in any one currency used throughout the document."""

    input_per_mtok: float = Field(default=0.0, ge=0, le=1e6, description="Per million prompt tokens.")
    output_per_mtok: float = Field(default=0.0, ge=0, le=1e6, description="Per million output tokens.")


class ExpertSpec(Model):
    """One expert: a deployment of this platform or an external endpoint, and what the router may assume of it."""

    name: Name = Field(description="Name of the expert; the same as in the router artifact.")
    deployment_ref: Line | None = Field(
        default=None, description="metadata.name of an LLMDeployment; None = external.", min_length=1, max_length=63
    )
    external: ExternalEndpoint | None = Field(default=None, description="An endpoint run by others; None = deploymentRef.")
    api_key_secret: SecretKeyRef | None = Field(
        default=None,
        description="Kubernetes secret with a key that the referenced deployment accepts (scope user will do); None = none.",
    )
    active_params_b: float | None = Field(
        default=None, gt=0, le=100_000,
        description="Parameters used per token, in 1e9; None = as the artifact says, else 1.",
    )  # fmt: skip
    memory: Quantity | None = Field(default=None, description="Memory of its weights when resident; None = unknown.")
    context_tokens: int | None = Field(
        default=None, ge=1, le=100_000_000, description="Longest prompt plus output; None = as its deployment says."
    )
    modalities: tuple[Modality, ...] = Field(default=("text",), description="What it can read.", min_length=1, max_length=4)
    tools: bool = Field(default=False, description="Whether it can call tools.")
    price: Price = Field(default_factory=Price, description="What it costs.")

    _lists = field_validator("modalities", mode="before")(as_tuple)

    @model_validator(mode="after")
    def _served_one_way(self) -> ExpertSpec:
        if (self.deployment_ref is None) == (self.external is None):
            raise ValueError("deploymentRef: exactly one of deploymentRef and external is needed")
        if self.api_key_secret is not None and self.external is not None:
            raise ValueError("apiKeySecret: is for a deploymentRef; an external expert has external.apiKeySecret")
        return self

    @property
    def memory_bytes(self) -> int | None:
        """Memory of its weights in bytes, or None when unknown."""
        return None if self.memory is None else int(parse_quantity(self.memory))
