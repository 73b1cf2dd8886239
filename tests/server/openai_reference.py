"""What vLLM answers to a completions request: its own request and response classes, logprob containers, detokeniser and
serving helper, fed with float64 logits instead of an engine."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from fastapi.responses import JSONResponse
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists, LogprobsTensors


def vllm_answer(network: Any, tokenizer: Any, body: dict[str, Any]) -> dict[str, Any]:
    """The JSON of `vllm serve`, with the most likely next token as under temperature 0."""
    request = CompletionRequest(**body)
    serving = OpenAIServingCompletion.__new__(OpenAIServingCompletion)
    serving.return_tokens_as_token_ids = False
    serving.enable_prompt_tokens_details = serving.enable_per_request_metrics = False
    serving.system_fingerprint = None
    given = request.prompt
    prompts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    outputs = [_output(network, tokenizer, request, prompt) for prompt in prompts]
    metadata = RequestResponseMetadata(request_id="x")
    response = serving.request_output_to_completion_response(outputs, request, "x", 0, "tiny", tokenizer, metadata)
    return json.loads(JSONResponse(response.model_dump()).body)


def _output(network: Any, tokenizer: Any, request: CompletionRequest, prompt: Any) -> RequestOutput:
    ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
    text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
    with torch.inference_mode():
        log_p = network(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = request.to_sampling_params(request.max_tokens)
    core = SimpleNamespace(sampling_params=wanted, prompt_token_ids=ids, request_id="x")
    told = LogprobsProcessor.from_new_request(tokenizer, core)
    if wanted.prompt_logprobs is not None and len(ids) > 1:
        told._update_prompt_logprobs(LogprobsTensors(*_rows(log_p[:-1], ids[1:], wanted.prompt_logprobs)))
    new = int(log_p[-1].argmax())
    if wanted.logprobs is not None:
        arrays = [each.numpy() for each in _rows(log_p[-1:], [new], wanted.logprobs)]
        told._update_sample_logprobs(LogprobsLists(*arrays, None))
    detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, core)
    detokenizer.update([new], False)
    made = CompletionOutput(
        0, detokenizer.get_next_output_text(True, False), [new], None, told.logprobs, finish_reason="length"
    )
    return RequestOutput("x", text, ids, told.prompt_logprobs, [made], True)


def _rows(log_p: torch.Tensor, own: list[int], k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, logprobs, ranks) as vLLM's sampler gives them: of each row its own token, then its k most likely."""
    own_N1 = torch.tensor(own)[:, None]
    best, ids = log_p.topk(log_p.shape[-1] if k == -1 else k, dim=-1)
    own_logprob = log_p.gather(1, own_N1)
    ranks = (log_p > own_logprob).sum(-1) + 1
    return torch.cat([own_N1, ids], 1), torch.cat([own_logprob, best], 1).float(), ranks


def assert_alike(ours: Any, theirs: Any, where: str = "", tolerance: float = 2e-5) -> None:
    """Equal in everything, the order of keys included, but for the last digits of numbers."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for name, value in theirs.items():
            assert_alike(ours[name], value, f"{where}.{name}", tolerance)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for n, value in enumerate(theirs):
            assert_alike(ours[n], value, f"{where}[{n}]", tolerance)
    elif isinstance(theirs, float):
        assert np.isclose(ours, theirs, rtol=0, atol=tolerance), (where, ours, theirs)
    else:
        assert ours == theirs, where
        assert type(ours) is type(theirs), where
