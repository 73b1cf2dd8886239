"""`GET /v1/usage`: what the caller's tenant used, or for an admin what all did (usage.py)."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated

from fastapi import FastAPI, Query, Request, Response
from pydantic import BaseModel

from teacher_api.errors import InvalidRequest
from teacher_server.http_requests import JSON, caller_of
from teacher_server.service import TeacherService


class UsageRow(BaseModel):
    day: str | None = None
    """UTC; of rows by day."""
    tenant: str
    experiment: str | None = None
    """Of rows by experiment or day; "(others)": those beyond the first 1,000 of a tenant and day."""
    sequences: int
    computed_tokens: int
    cached_tokens: int
    refused_tokens: int
    """Of calls that were refused because the server, or the tenant's share or rate, was full."""
    engine_s: float
    """Seconds of the engine, those of a batch divided by tokens."""


class UsageAnswer(BaseModel):
    rows: list[UsageRow]


def add_usage(app: FastAPI, service: TeacherService) -> None:
    def rows(by: str, since: str, tenant: str | None) -> bytes:
        """In a thread, and one by one, so that the event loop has its turns: there may be a thousand for each day."""
        found = service.usage.rows(by=by, since=since, tenant=tenant)
        return b'{"rows":[' + b",".join(json.dumps(row).encode() for row in found) + b"]}"

    @app.get("/v1/usage", summary="Tokens and engine time that the caller's tenant used", response_model=UsageAnswer)
    async def usage(
        request: Request,
        by: Annotated[str, Query(description="tenant, experiment or day")] = "experiment",
        since: Annotated[str, Query(description="first day, YYYY-MM-DD (UTC); empty: from the beginning")] = "",
    ) -> Response:
        caller = caller_of(request)
        tenant = None if caller.is_admin else caller.tenant
        try:
            return Response(await asyncio.to_thread(rows, by, since, tenant), media_type=JSON)
        except ValueError as error:
            field, _, expected = str(error).partition(": ")
            raise InvalidRequest(expected, field=field) from None
