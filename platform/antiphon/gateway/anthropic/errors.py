"""Errors in Anthropic's shape (request speed). Must not know: what was asked."""

from __future__ import annotations

import json
from typing import Final

from fastapi.responses import JSONResponse, Response

from antiphon.gateway.openai.http_io import error_response

_KINDS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_DOOR: Final = "/v1/messages"
_HEADERS: Final = ("retry-after", "www-authenticate")


def anthropic_error(error: Exception) -> Response:
    """Any error in Anthropic's shape."""
    response = error_response(error)
    told = json.loads(bytes(response.body))["error"]
    kind = _KINDS.get(response.status_code, "api_error" if response.status_code >= 500 else "invalid_request_error")
    headers = {name: value for name, value in response.headers.items() if name in _HEADERS}
    body = {"type": "error", "error": {"type": kind, "message": told["message"]}}
    return JSONResponse(body, status_code=response.status_code, headers=headers)


def error_at(path: str, error: Exception) -> Response:
    """Any error in the shape that clients of a path read, whether there is such a path or not."""
    if path == _DOOR or path.startswith(f"{_DOOR}/"):
        return anthropic_error(error)
    return error_response(error)
