"""The rollout server's routes, beside vLLM's own. They are under /v1, which vLLM's --api-key guards.

Answers are JSON, a completion is a safetensors file: arrays by name, and why it ended in its metadata.
"""

from __future__ import annotations

from typing import Any

import safetensors.numpy
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.exceptions import VLLMClientError

from student_trainer.rollout.vllm_side.request import Draws, Weights
from student_trainer.rollout.vllm_side.service import HandOverFailed, OtherWeights, RolloutService

router = APIRouter(prefix="/v1/rollout", tags=["rollout"])


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Of(_Asked):
    """What names weights."""

    session: str
    version: int

    @property
    def weights(self) -> Weights:
        return Weights(self.session, self.version)


class Connect(_Asked):
    """Where the sender waits: keyword arguments of the transport's init info."""

    parameters: dict[str, Any]


class Take(_Of):
    """What comes: keyword arguments of the transport's update info."""

    update: dict[str, Any]
    timeout_s: float = Field(gt=0)


class Logprobs(_Of):
    token_ids: list[int] = Field(min_length=2)


class Sample(_Of):
    prompt_ids: list[int] = Field(min_length=1)
    draws: dict[str, Any]
    stop_ids: list[int]
    keep_top_k: int = Field(0, ge=0)


def _service(request: Request) -> RolloutService:
    service: RolloutService = request.app.state.preceptor_rollout
    return service


def _problem(status: int, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": " ".join(str(error).split())[:500]}, status)


@router.get("/info")
async def info(raw_request: Request) -> JSONResponse:
    return JSONResponse(_service(raw_request).info())


@router.post("/connect")
@with_cancellation  # type: ignore[untyped-decorator]
async def connect(asked: Connect, raw_request: Request) -> JSONResponse:
    try:
        await _service(raw_request).connect(asked.parameters)
    except HandOverFailed as error:
        return _problem(503, error)
    return JSONResponse({})


@router.post("/weights")
async def weights(asked: Take, raw_request: Request) -> JSONResponse:
    service = _service(raw_request)
    try:
        digest = await service.take(asked.weights, asked.update, timeout_s=asked.timeout_s)
    except HandOverFailed as error:
        return _problem(503, error)
    return JSONResponse({"digest": digest})


@router.post("/logprobs")
async def logprobs(asked: Logprobs, raw_request: Request) -> JSONResponse:
    try:
        found = await _service(raw_request).logprobs(asked.weights, asked.token_ids)
    except OtherWeights as error:
        return _problem(409, error)
    except (VLLMClientError, ValueError) as error:
        return _problem(400, error)
    # As text: JSON has no NaN, which weights may give.
    return JSONResponse({"logprobs": [repr(float(value)) for value in found]})


@router.post("/sample")
@with_cancellation  # type: ignore[untyped-decorator]
async def sample(asked: Sample, raw_request: Request) -> Response:
    try:
        draws = Draws(**asked.draws)
        record = await _service(raw_request).sample(
            asked.weights, asked.prompt_ids, draws, asked.stop_ids, asked.keep_top_k
        )
    except OtherWeights as error:
        return _problem(409, error)
    except (VLLMClientError, ValueError, TypeError) as error:
        return _problem(400, error)
    content = safetensors.numpy.save(record.arrays(), {"finish": record.finish})
    return Response(content, media_type="application/octet-stream")
