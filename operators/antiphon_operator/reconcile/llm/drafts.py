"""Draft models that are other LLMDeployments: reads those that documents name (control speed).

Only their documents count, not whether they run: their checkpoints are loaded beside the larger model's. Must not know: claims.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from antiphon.core.document.spec import DRAFT_REFERENCE, LLMDeployment
from antiphon.core.errors import InvalidInput, UnknownModel
from antiphon_operator.api.conditions import Reason
from antiphon_operator.kube.base import Kube, Object
from antiphon_operator.kube.resources import LLM_DEPLOYMENT
from antiphon_operator.reconcile.llm.accept import Refused


async def with_draft_model(kube: Kube, document: LLMDeployment) -> LLMDeployment:
    """``document`` with its draft model's uri, looked up in its namespace.

    Raises:
        Refused: there is no such deployment, or it can't draft; the message names the field.
        KubeError: the API server failed.
    """
    name = document.draft_reference
    if name is None:
        return document
    live = await kube.get(LLM_DEPLOYMENT, document.metadata.namespace, name)
    gone = live is None or "deletionTimestamp" in live["metadata"]
    known = {} if live is None or gone else {name: typed(live)}
    try:
        return document.with_draft_model(known)
    except UnknownModel as error:
        raise Refused(Reason.REFERENCE_NOT_FOUND, f"{DRAFT_REFERENCE}: {error} in this namespace") from error
    except InvalidInput as error:
        raise Refused(Reason.INVALID_SPEC, f"{DRAFT_REFERENCE}: {error}") from error


def typed(live: Object) -> LLMDeployment:
    """A document that another one names.

    Raises:
        Refused: it is not valid itself.
    """
    try:
        return LLMDeployment.model_validate({k: live[k] for k in ("apiVersion", "kind", "metadata", "spec")})
    except ValidationError as error:
        message = f"{DRAFT_REFERENCE}: LLMDeployment {live['metadata']['name']!r} is not valid, its own conditions say why"
        raise Refused(Reason.INVALID_SPEC, message) from error


def resolved(documents: Mapping[str, LLMDeployment]) -> list[LLMDeployment]:
    """All of them with their draft models; as they are where that can't be had."""
    found = []
    for document in documents.values():
        try:
            found.append(document.with_draft_model(documents))
        except InvalidInput:
            found.append(document)
    return found
