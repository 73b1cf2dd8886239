"""The page for people at `/`, and what it shows as JSON at `/v1/status`. The page is one static file made of three when
the server starts, which loads nothing from elsewhere and shows nothing by itself: it asks for the JSON, with a key
where one is needed. So whoever has no key yet gets it, too, as the body of the refusal.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from teacher_api.errors import TeacherError
from teacher_server.http_requests import caller_of
from teacher_server.service import TeacherService
from teacher_server.status import status_of

PATH = "/"
HTML = "text/html; charset=utf-8"


def add_status(app: FastAPI, service: TeacherService) -> None:
    @app.get("/v1/status", summary="What the server is doing: all of it for admins, else the caller's part")
    async def status(request: Request) -> Response:
        return JSONResponse(status_of(service, caller_of(request)), headers={"cache-control": "no-store"})

    @app.get(PATH, include_in_schema=False)
    async def page() -> Response:
        body, headers = status_page()
        return Response(body, headers=headers)


def refusing_page(error: TeacherError) -> Response:
    """The page with the status of `error`: it asks for the key."""
    body, headers = status_page()
    return Response(body, error.http_status, {**headers, "www-authenticate": "Bearer"})


def wants_page(path: str, headers: dict[str, str]) -> bool:
    """Whether a browser asks for the page, which it does without a key."""
    return path == PATH and "text/html" in headers.get("accept", "")


@cache
def status_page() -> tuple[bytes, dict[str, str]]:
    """Body and headers. What may run and what may be loaded are told by their digests (CSP): nothing that somebody
    smuggles into a name of a model or a tenant would."""
    folder = files("teacher_server") / "dashboard"
    html, style, script = ((folder / f"status.{kind}").read_text() for kind in ("html", "css", "js"))
    html = html.replace("<style></style>", f"<style>{style}</style>")
    body = html.replace("<script></script>", f"<script>{script}</script>").encode()
    policy = {
        "default-src": "'none'",
        "style-src": _digest(style),
        "script-src": _digest(script),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return body, {
        "content-type": HTML,
        "content-length": str(len(body)),
        "cache-control": "no-cache",
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
