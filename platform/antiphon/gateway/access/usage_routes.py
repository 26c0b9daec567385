"""GET /usage: the ledger by day, tenant and model, for keys of scope admin (request speed). Must not know: how it is kept.

/usage?from=2027-01-01&to=2027-01-31        JSON, days in UTC, today where none is said
/usage?format=csv
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
from typing import Final

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from antiphon.core.budget import KEPT_DAYS
from antiphon.core.errors import InvalidInput
from antiphon.gateway.gateway import Gateway
from antiphon.gateway.openai.http_io import error_response

_COLUMNS: Final = ("day", "tenant", "model", "num_requests", "num_prompt_tokens", "num_cached_tokens", "num_output_tokens")


def add_usage_routes(app: FastAPI, gateway: Gateway) -> None:
    """Put the route into the application."""

    @app.get("/usage")
    async def usage(request: Request) -> Response:
        try:
            gateway.keys.check(request.headers.get("authorization"), admin=True)
            asked = request.query_params
            today = datetime.datetime.now(datetime.UTC).date()
            last = _day(asked.get("to"), "to") or today
            first = _day(asked.get("from"), "from") or last
            if not 0 <= (last - first).days < KEPT_DAYS:
                raise InvalidInput(f"from must be at most {KEPT_DAYS - 1} days before to", "from")
            if (form := asked.get("format", "json")) not in ("json", "csv"):
                raise InvalidInput("format must be json or csv", "format")
            rows = [{"day": day, **dataclasses.asdict(use)} for day, use in await gateway.admission.used(first, last)]
        except Exception as error:  # noqa: BLE001 - the door: whatever happens, the client gets OpenAI's error shape
            return error_response(error)
        if form == "json":
            return JSONResponse({"object": "list", "data": rows})
        out = io.StringIO()
        writer = csv.DictWriter(out, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return Response(out.getvalue(), media_type="text/csv")


def _day(text: str | None, field: str) -> datetime.date | None:
    if text is None:
        return None
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise InvalidInput(f"{field} must be a day like 2027-01-31", field) from error
