"""What the operator's own configuration adds to a document (control speed, values).

Must not know: where the configuration comes from.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """Images and versions that a document may leave open; frozen into a revision when it is first rendered."""

    image: str
    ray_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A claim with the model's weights, mounted read-only."""

    claim: str
    path: str  # within the claim, no leading slash

    @property
    def mount(self) -> str:
        """Where the claim appears in the pods."""
        return f"/models/{self.claim}"

    @property
    def directory(self) -> str:
        """Where the weights appear in the pods."""
        return f"{self.mount}/{self.path}" if self.path else self.mount


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Defaults and surroundings that the operator is installed with."""

    runtime: Runtime
    head_cpu: str = "300m"
    head_memory: str = "2Gi"
    gateway_cpu: str = "250m"
    gateway_memory: str = "1280Mi"
    kuberay_labels: dict[str, str] = field(default_factory=lambda: {"app.kubernetes.io/name": "kuberay-operator"})
    metrics_namespace_labels: dict[str, str] = field(default_factory=dict)  # empty = every namespace may scrape
    router_image: str = ""  # of compositions; "" = runtime.image
    artifact_image: str = ""  # "" = runtime.image
