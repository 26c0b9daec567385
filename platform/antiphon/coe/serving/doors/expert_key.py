"""The key that is shown at an expert's door, and the hosts that may see it (request speed).

Who writes a composition names a variable or a Secret and a URL; who keeps the key says where it may go
(``core.document.coe.expert_keys``). Must not know: what is asked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from antiphon.core.document.coe.expert_keys import HOSTS_SUFFIX, REQUIRED_VARIABLE
from antiphon.core.document.coe.experts import ExternalEndpoint
from antiphon.core.document.composition import CompositionOfExperts
from antiphon.core.errors import InvalidInput

_PORTS: Final = {"http": 80, "https": 443}


def key_headers(endpoint: ExternalEndpoint, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The key of an endpoint, from the environment; the first where it lists several, as a deployment of ours does. A host that it
    is not for gets none.
    """
    if why_not_sent(endpoint, environment) is not None:
        return {}
    keys = environment.get(endpoint.api_key_env, "") if endpoint.api_key_env is not None else ""
    key = next((part.strip() for part in keys.split(",") if part.strip()), "")  # no key that a header can carry has a comma
    return {"authorization": f"Bearer {key}"} if key else {}


def check_key_host(endpoint: ExternalEndpoint, field: str, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse an endpoint whose key may not go to its host.

    Raises:
        InvalidInput: so it is; ``field`` is the endpoint's path in the document.
    """
    if (why := why_not_sent(endpoint, environment)) is not None:
        raise InvalidInput(f"{field}.url: {why}", f"{field}.url")


def check_lending(
    document: CompositionOfExperts,
    *,
    is_open: bool,
    endpoints: Mapping[str, ExternalEndpoint] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Refuse a door that asks for no keys and has keys to show at its experts': whoever reaches it would use, and pay with, those.

    Args:
        document: the composition.
        is_open: the door asks for no API keys.
        endpoints: where deploymentRefs are reached elsewhere.
        environment: has the experts' keys.

    Raises:
        InvalidInput: so it is, and the document does not say that it shall be.
    """
    if not is_open or document.spec.router.lends_expert_keys:
        return
    for index, expert in enumerate(document.spec.experts):
        endpoint = expert.external
        if expert.deployment_ref is not None:
            endpoint = (endpoints or {}).get(expert.deployment_ref)
        if endpoint is not None and key_headers(endpoint, environment):
            raise InvalidInput(
                f"{document.model_name}: spec.experts[{index}] is asked with the key in {endpoint.api_key_env}, and who asks here "
                "needs none: give this door API keys, or say with spec.router.lendsExpertKeys that all who reach it may use it",
                "spec.router.lendsExpertKeys",
            )


def why_not_sent(endpoint: ExternalEndpoint, environment: Mapping[str, str]) -> str | None:
    """Why the endpoint's key may not be sent to its host; None = it may, or there is none."""
    name = endpoint.api_key_env
    if name is None or not environment.get(name):
        return None
    hosts = environment.get(name + HOSTS_SUFFIX)
    if hosts is None:
        if environment.get(REQUIRED_VARIABLE) != "required":
            return None
        return f"nobody says to which hosts the key in {name} may be sent ({name}{HOSTS_SUFFIX})"
    url = urlsplit(endpoint.url)
    port = _PORTS[url.scheme] if url.port is None else url.port
    allowed = hosts.replace(",", " ").lower().split()
    host = (url.hostname or "").rstrip(".")
    if f"{host}:{port}" in allowed or (host in allowed and port == _PORTS[url.scheme]):
        return None
    return f"the key in {name} may not be sent to {host}:{port}, only to {', '.join(allowed) or 'nowhere'}"
