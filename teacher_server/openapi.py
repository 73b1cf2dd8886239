"""What /openapi.json says beyond what FastAPI finds by itself: the bodies that are read by hand, the error format, and
the probes that answer in front of the application."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from teacher_api.errors import KINDS
from teacher_server import http_deadline
from teacher_server.json_models import JsonScoreRequest
from teacher_server.openai_errors import speaks_openai
from teacher_server.openai_generation import GenerationRequest
from teacher_server.openai_models import CompletionRequest

REF = "#/components/schemas/{model}"
_DEADLINE = {
    "name": http_deadline.HEADER,
    "in": "header",
    "required": False,
    "description": "the caller's deadline, as gRPC writes it: 2500m is 2.5 s from the head of the request on",
    "schema": {"type": "string", "pattern": f"^{http_deadline.PATTERN}$"},
}
_PROTOBUF = {"application/x-protobuf": {"schema": {"type": "string", "format": "binary"}}}


def describe(app: FastAPI, *, generate: bool) -> None:
    """Replaces `app.openapi` by one that is complete; the result is made once.

    Args:
        generate: whether the server writes text.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            app.openapi_schema = _completed(schema, GenerationRequest if generate else CompletionRequest)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _completed(schema: dict[str, Any], completions: type[CompletionRequest]) -> dict[str, Any]:
    components = schema.setdefault("components", {}).setdefault("schemas", {})
    bodies = [(JsonScoreRequest, "validation"), (completions, "validation")]
    _, definitions = models_json_schema(bodies, ref_template=REF)  # type: ignore[arg-type]  # a list of pairs it is
    components.update(definitions["$defs"])
    components["Problem"] = _problem_schema()
    components["OpenAIError"] = _openai_error_schema()
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
    paths["/v1/head"]["get"]["responses"]["200"] = {"description": "a safetensors file", "content": frames}
    openai_body = {"application/json": {"schema": {"$ref": REF.format(model=completions.__name__)}}}
    paths["/v1/completions"]["post"]["requestBody"] = {"required": True, "content": openai_body}
    for name in ("/v1/score", "/v1/score/stream", "/v1/completions"):
        paths[name]["post"].setdefault("parameters", []).append(_DEADLINE)
    for name, path in paths.items():
        for operation in path.values():
            operation["responses"]["default"] = _openai_response() if speaks_openai(name) else _problem_response()
    taking = "the teacher can take work"
    for name, meaning in (("livez", "the process answers"), ("readyz", taking), ("health", f"{taking}, as /readyz")):
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


def _openai_error_schema() -> dict[str, Any]:
    fields = {
        "message": {"type": "string"},
        "type": {"type": "string"},
        "param": {"type": ["string", "null"]},
        "code": {"type": "integer"},
    }
    inside = {"type": "object", "required": sorted(fields), "properties": fields}
    return {"title": "OpenAIError", "type": "object", "required": ["error"], "properties": {"error": inside}}


def _problem_response() -> dict[str, Any]:
    content = {"application/problem+json": {"schema": {"$ref": REF.format(model="Problem")}}}
    return {"description": "an error from the table in docs/protocol.md", "content": content}


def _openai_response() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": REF.format(model="OpenAIError")}}}
    return {"description": "an error in the form of docs/openai.md", "content": content}
