"""The experts' load over HTTP: ``GET /experts``, rows by layer and expert as JSON (request speed). Must not know: who counts."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from antiphon.gateway.experts import GatewayExperts
from antiphon.gateway.openai.http_io import error_response
from antiphon.rpc.experts import ExpertLoad


def add_expert_routes(app: FastAPI, experts: GatewayExperts) -> None:
    """Serve ``/experts``, of one deployment (?deployment=) or of the only one that has experts."""

    @app.get("/experts")
    async def load(request: Request) -> Response:
        try:
            authorization = request.headers.get("authorization")
            metadata = {} if authorization is None else {"authorization": authorization}
            return JSONResponse(load_body(await experts.expert_load(request.query_params.get("deployment", ""), metadata)))
        except Exception as error:  # noqa: BLE001 - the door: whatever happens, the client gets OpenAI's error shape
            return error_response(error)


def load_body(load: ExpertLoad) -> dict[str, Any]:
    """A load as JSON; ``rows`` is what ``antiphon inspect --load`` reads."""
    return {
        "deployment": load.deployment,
        "placement": load.placement_number,
        "rows": {str(layer): list(counts) for layer, counts in load.rows.items()},
    }
