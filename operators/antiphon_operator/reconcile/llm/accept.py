"""Whether a document can be acted on at all (control speed, pure).

The API server's own checks come first; what is left is what a schema can't say. Must not know: what runs.
"""

from __future__ import annotations

import re

from pydantic import ValidationError

from antiphon.core.device import device_problems
from antiphon.core.document.spec import LLMDeployment
from antiphon_operator.api.conditions import Reason
from antiphon_operator.kube.base import Object
from antiphon_operator.reconcile.llm.status import Refusal
from antiphon_operator.render.names import RAY_WORKER_PORTS, RESERVED_PORTS, URI_PATTERN, grpc_port, http_port
from antiphon_operator.render.settings import Runtime

OLDEST_RAY = (2, 60)  # what the package itself asks for; older ones lack fields of the rendered Serve configuration
TOO_NEW_RAY = (3,)


class Refused(Exception):
    """Nothing is done for a document; ``refusal`` says why."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.refusal = Refusal(reason=reason, message=message)


def accept(live: Object, runtime: Runtime) -> LLMDeployment:
    """The typed document of ``live``, to be run with ``runtime`` where it leaves that open.

    Raises:
        Refused: it is not valid, asks for devices that workers can't compute on, or for a version of Ray that they can't run with.
    """
    try:
        document = LLMDeployment.model_validate({k: live[k] for k in ("apiVersion", "kind", "metadata", "spec") if k in live})
    except ValidationError as error:
        first = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors(include_input=False)]
        raise Refused(Reason.INVALID_SPEC, "; ".join(first)[:900]) from error
    ports = (http_port(document), grpc_port(document))
    draft = None if document.spec.speculation is None else document.spec.speculation.model
    for field, uri in (("model.uri", document.spec.model.uri), ("speculation.model.uri", None if draft is None else draft.uri)):
        if uri is not None and not re.match(URI_PATTERN, uri):
            raise Refused(Reason.INVALID_SPEC, f"{field}: {uri!r} is neither an absolute path nor hf://, s3://, pvc:// or pypi://")
    lowest, highest = RAY_WORKER_PORTS
    if ports[0] == ports[1] or any(port in RESERVED_PORTS or lowest <= port <= highest for port in ports):
        listed = ", ".join(str(port) for port in sorted(RESERVED_PORTS))
        message = f"endpoint: ports {ports[0]} and {ports[1]} must differ and be none of Ray's: {listed}, {lowest} to {highest}"
        raise Refused(Reason.INVALID_SPEC, message)
    if document.spec.endpoint.metrics_access == "admin":
        message = "endpoint.metricsAccess: the operator reads /metrics of gateways and has no API key; leave it open here"
        raise Refused(Reason.INVALID_SPEC, message)
    misfits = [f"spec.{path}: {why}" for path, why in device_problems(document.spec)]
    if misfits:
        raise Refused(Reason.INVALID_SPEC, "; ".join(misfits)[:900])
    why = unsupported_ray(document.spec.kubernetes.ray_version or runtime.ray_version)
    if why:
        raise Refused(Reason.UNSUPPORTED_RAY_VERSION, why)
    return document


def unsupported_ray(version: str) -> str:
    """Why ``version`` of Ray can't be used, for people; empty when it can."""
    wanted = f"{'.'.join(map(str, OLDEST_RAY))} or newer, below {'.'.join(map(str, TOO_NEW_RAY))}, is needed"
    try:
        numbers = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        return f"kubernetes.rayVersion {version!r} is no version: {wanted}"
    return "" if OLDEST_RAY <= numbers < TOO_NEW_RAY else f"kubernetes.rayVersion {version} is not supported: {wanted}"
