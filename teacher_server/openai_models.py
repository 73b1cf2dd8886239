"""What an OpenAI-style completions request may ask of a teacher, and the list of models. Every field of vLLM's protocol
is either honoured, or accepted only with the value that asks for nothing; anything else is refused by name."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from teacher_api.errors import InvalidRequest, NotFound, TeacherError, Unsupported
from teacher_api.types import TeacherInfo

MAX_BODY_BYTES = 16 << 20
"""Of JSON: more token ids than the queue takes by default. Read, it takes up to 20 times as much memory."""
_INT64 = 1 << 63

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "stream_options": (),
    "suffix": (),
    "stop": ([],),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "watermarking": (False,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "allowed_token_ids": (),
    "logprob_token_ids": ([],),
    "bad_words": ([],),
    "prompt_embeds": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "priority": (0,),
    "session_id": (),
    "routed_experts_prompt_start": (0,),
    "return_token_offsets": (False,),
    "mm_payload": ("tensors",),
    "return_mm_kwargs": (),
    "cache_salt": (),
    "kv_transfer_params": (),
    "ec_transfer_params": (),
    "vllm_xargs": ({},),
    "repetition_detection": (),
    "thinking_token_budget": (-1,),
    "stream_interval": (),
}
"""Fields that a teacher can't honour, each with the values, beside null, that ask for nothing."""
OF_WRITING = ("n", "stop", "stop_token_ids", "top_p", "top_k", "min_p")
"""Those of them that a server started with `generate` honours (openai_generation.py)."""


class CompletionRequest(BaseModel):
    """The fields that are honoured."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        use_attribute_docstrings=True,
        json_schema_extra={"example": {"prompt": [[1, 2, 3, 4]], "max_tokens": 1, "prompt_logprobs": 5}},
    )

    prompt: list[int] | list[list[int]] | str | list[str]
    """Token ids or text; one sequence or a list of them."""
    model: str | None = None
    """Name of the served model; null: that one."""
    max_tokens: int | None = Field(default=None, ge=0)
    """0: score only; 1: the most likely next token too. Must be given: left out it means 16 to OpenAI's clients."""
    echo: bool | None = False
    """Give the prompt back as text, and with `logprobs` its logprobs."""
    logprobs: int | None = Field(default=None, ge=-1)
    """Most likely tokens at each position of the text that is given back; -1: the whole vocabulary."""
    prompt_logprobs: int | None = Field(default=None, ge=-1)
    """Most likely tokens at each position of the prompt; -1: all. Left out, `echo` takes `logprobs`."""
    teacher_temperature: FiniteFloat = 1.0
    """Divides the teacher's logits before its softmax; an extension."""
    temperature: FiniteFloat | None = Field(default=None, ge=0)
    """Of sampling: as in vLLM it does not touch logprobs, and the one token is always the most likely one."""
    seed: int | None = Field(default=None, ge=-_INT64, lt=_INT64)
    """Without effect, for nothing is drawn."""
    user: str | None = None
    """Without effect."""
    add_special_tokens: bool = True
    """Whether text prompts get the tokenizer's special tokens."""
    skip_special_tokens: bool = True
    """Whether the generated token's text is empty where it is a special one."""
    ignore_eos: bool = False
    """An end token finishes with `length`, and its text is given."""
    return_tokens_as_token_ids: bool | None = None
    """Name tokens `token_id:<id>` in `logprobs`."""
    return_token_ids: bool | None = None
    """Give the ids of prompt and generated token; `echo` then leaves the prompt's text out, as in vLLM."""
    request_id: str | None = None
    """Part of the answer's id, where the header x-request-id was not sent."""

    @property
    def generates(self) -> bool:
        """Whether the most likely next token is told, which scoring gives."""
        return self.max_tokens == 1

    @property
    def writes(self) -> bool:
        """Whether text is written: never by a server that only scores."""
        return False

    @property
    def prompt_k(self) -> int | None:
        """Entries beside the actual token at each position of the prompt; None: no logprobs of the prompt."""
        return self.logprobs if self.prompt_logprobs is None and self.echo else self.prompt_logprobs


def request_from_json(body: bytes) -> CompletionRequest:
    """Raises TeacherError that names the first wrong field; never repeats what was sent."""
    asked = validated(body, CompletionRequest)
    if asked.max_tokens is None:
        raise InvalidRequest(
            "left out, it means 16 tokens, and this server scores: expected 0 or 1; one started with --generate writes",
            field="max_tokens",
        )
    if asked.max_tokens > 1:
        raise Unsupported(
            f"got {asked.max_tokens}; this server scores and generates at most the one next token: expected 0 or 1; "
            "one started with --generate writes more",
            field="max_tokens",
        )
    return asked


Request = TypeVar("Request", bound=CompletionRequest)


def validated(body: bytes, kind: type[Request]) -> Request:
    """The JSON object in `body`, field by field. Raises TeacherError as `request_from_json`."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidRequest("the body is not JSON; expected an object") from None
    if not isinstance(values, dict):
        raise InvalidRequest("the body is not a JSON object")
    honoured = {name: value for name, value in values.items() if name in kind.model_fields}
    for name, value in values.items():
        if name not in honoured:
            _check_neutral(name, value, writes=kind is not CompletionRequest)
    for name, field in kind.model_fields.items():
        if honoured.get(name, 0) is None and field.default is not None and not field.is_required():
            del honoured[name]  # null stands for the default, as in vLLM
    try:
        asked = kind.model_validate(honoured)
    except ValidationError as error:
        raise _first(error) from None
    if not asked.prompt:
        raise InvalidRequest("empty; expected at least one token", field="prompt")
    return asked


def _check_neutral(name: str, value: Any, *, writes: bool) -> None:
    if name not in NEUTRAL:
        raise InvalidRequest("this server knows no such field", field=name[:64])
    if value is None or value in NEUTRAL[name]:
        return
    allowed = " or ".join(json.dumps(each) for each in (*NEUTRAL[name], None))
    if writes:
        raise Unsupported(f"this server can't honour it; expected {allowed}", field=name)
    cure = "; one started with --generate honours it" if name in OF_WRITING else ""
    raise Unsupported(f"this server scores and can't honour it; expected {allowed}{cure}", field=name)


def _first(error: ValidationError) -> TeacherError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    name = str(first["loc"][0])
    if name == "prompt":  # pydantic tells of each form that it tried
        return InvalidRequest("expected a text, a list of token ids, or a list of either", field=name)
    return InvalidRequest(first["msg"], field=name)


def teacher_of(asked: CompletionRequest, base: TeacherInfo) -> str:
    """The teacher that `model` means: "" for the base, which also has no name at all. Raises NotFound for others."""
    if not asked.model or asked.model == base.model_name:
        return ""
    if asked.model not in base.teachers:
        served = ", ".join(f"`{name}`" for name in (base.model_name, *base.teachers))
        raise NotFound(f"The model `{asked.model[:128]}` does not exist. This server has {served}.", field="model")
    return asked.model


def model_list(infos: Sequence[TeacherInfo], created: int) -> dict[str, Any]:
    """The answer of /v1/models, in the shape of vLLM's: the base, then its adapters."""
    base, *_ = infos
    return {"object": "list", "data": [_card(info, base, created) for info in infos]}


def _card(info: TeacherInfo, base: TeacherInfo, created: int) -> dict[str, Any]:
    permission = {
        "id": f"modelperm-{info.fingerprint}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": "generate" in info.features,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": info.model_name,
        "object": "model",
        "created": created,
        "owned_by": "preceptor",
        "root": info.model_name,
        "parent": None if info is base else base.model_name,
        "max_model_len": info.max_sequence_tokens,
        "permission": [permission],
    }


def now() -> int:
    return int(time.time())
