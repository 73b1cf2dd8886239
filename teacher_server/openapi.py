"""What /openapi.json says beyond what FastAPI finds by itself: the bodies that are read by hand, the error format, and
the probes that answer in front of the application."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from teacher_api.errors import KINDS
from teacher_server.json_models import JsonScoreRequest

REF = "#/components/schemas/{model}"
_PROTOBUF = {"application/x-protobuf": {"schema": {"type": "string", "format": "binary"}}}


def describe(app: FastAPI) -> None:
    """Replaces `app.openapi` by one that is complete; the result is made once."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _completed(get_openapi(title=app.title, version=app.version, routes=app.routes))
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _completed(schema: dict[str, Any]) -> dict[str, Any]:
    components = schema.setdefault("components", {}).setdefault("schemas", {})
    _, definitions = models_json_schema([(JsonScoreRequest, "validation")], ref_template=REF)
    components.update(definitions["$defs"])
    components["Problem"] = _problem_schema()
    paths = schema["paths"]
    json_body = {"application/json": {"schema": {"$ref": REF.format(model="JsonScoreRequest")}}}
    paths["/v1/score"]["post"]["requestBody"] = {"required": True, "content": {**json_body, **_PROTOBUF}}
    paths["/v1/score"]["post"]["responses"]["200"]["content"].update(_PROTOBUF)
    paths["/v1/score/stream"]["post"]["requestBody"] = {"required": True, "content": _PROTOBUF}
    frames = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    paths["/v1/score/stream"]["post"]["responses"]["200"] = {
        "description": "frames, each a little-endian uint32 length and a teacher.v1.ScoreFrame",
        "content": frames,
    }
    for path in paths.values():
        for operation in path.values():
            operation["responses"]["default"] = _problem_response("an error from the table in docs/protocol.md")
    for name, meaning in (("livez", "the process answers"), ("readyz", "the teacher can take work")):
        paths[f"/{name}"] = {
            "get": {
                "summary": f"Probe: {meaning}",
                "responses": {"200": {"description": "yes"}, "503": {"description": "no, and why"}},
            }
        }
    return schema


def _problem_schema() -> dict[str, Any]:
    return {
        "title": "Problem",
        "type": "object",
        "required": ["type", "title", "status", "detail", "kind", "retryable", "request_id"],
        "properties": {
            "type": {"type": "string"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
            "kind": {"type": "string", "enum": sorted(KINDS)},
            "retryable": {"type": "boolean"},
            "request_id": {"type": "string"},
            "field": {"type": "string"},
            "retry_after_s": {"type": "number"},
        },
    }


def _problem_response(meaning: str) -> dict[str, Any]:
    content = {"application/problem+json": {"schema": {"$ref": REF.format(model="Problem")}}}
    return {"description": meaning, "content": content}
