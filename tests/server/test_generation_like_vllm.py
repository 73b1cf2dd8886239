"""Text that the teacher writes next to vLLM's own answers: greedy ids of a float64 forward, put through vLLM's
detokeniser, logprob containers, stop checks and serving helper."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from fastapi.responses import JSONResponse
from openai_reference import _rows, assert_alike
from serving import Server, serving
from tinymodels import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

pytestmark = pytest.mark.slow

SIZE = 320  # of the vocabulary: all bytes, so that single tokens end within a character
IDS = [[5, 6, 7, 300, 41, 9], [200, 201, 202, 203], [17]]
TEXTS = ["the quick fox", "é → 狐 🦊 jumps"]

ASKED: dict[str, dict[str, Any]] = {
    "sixteen": {"prompt": IDS},
    "texts": {"prompt": TEXTS, "max_tokens": 11, "logprobs": 3},
    "TRL's sampler": {"model": "tiny", "prompt": IDS, "return_token_ids": True, "return_tokens_as_token_ids": True}
    | {"n": 2, "repetition_penalty": 1.0, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "max_tokens": 7, "logprobs": 0},
    "everything of a prompt, twice": {"prompt": TEXTS, "max_tokens": 6, "n": 2, "logprobs": 2, "prompt_logprobs": 4}
    | {"echo": True},
    "echo": {"prompt": TEXTS, "max_tokens": 5, "echo": True, "logprobs": 2},
    "own tokens": {"prompt": IDS, "max_tokens": 9, "logprobs": 0, "skip_special_tokens": False},
    "whole vocabulary": {"prompt": IDS[0], "max_tokens": 3, "logprobs": -1},
    "an id that ends": {"prompt": IDS, "max_tokens": 20, "stop_token_ids": "fourth", "logprobs": 1},
    "a string that ends": {"prompt": IDS, "max_tokens": 20, "stop": "fourth", "logprobs": 1},
    "strings that are not there": {"prompt": TEXTS, "max_tokens": 8, "stop": ["nowhere", "neither"]},
    "the end told as text": {"prompt": IDS, "max_tokens": 20, "ignore_eos": True, "skip_special_tokens": False},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("written") / "tiny", tokenizer_size=SIZE, logit_width=SIZE))


@pytest.fixture(scope="module")
def server(directory: str) -> Iterator[Server]:
    with serving(backend="torch", model=directory, threads=1, max_top_k=SIZE, generate=True) as running:
        yield running


@pytest.fixture(scope="module")
def network(directory: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def tokenizer(directory: str) -> Any:
    return AutoTokenizer.from_pretrained(directory)


@torch.inference_mode()
def output_of(network: Any, tokenizer: Any, request: CompletionRequest, prompt: Any) -> RequestOutput:
    """Of one prompt as vLLM's engine gives it, with `n` equal completions."""
    ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
    text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
    # vLLM takes no greedy request for several completions, which would be equal.
    wanted = request.model_copy(update={"n": 1}).to_sampling_params(request.max_tokens)
    wanted.update_from_generation_config({}, tokenizer.eos_token_id)
    core = SimpleNamespace(sampling_params=wanted, prompt_token_ids=ids, request_id="x")
    told = LogprobsProcessor.from_new_request(tokenizer, core)
    detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, core)
    if wanted.prompt_logprobs is not None and len(ids) > 1:
        log_p = network(torch.tensor([ids])).logits[0].log_softmax(-1)
        told._update_prompt_logprobs(LogprobsTensors(*_rows(log_p[:-1], ids[1:], wanted.prompt_logprobs)))
    reason, stop_reason, written = "length", None, list[int]()
    while len(written) < wanted.max_tokens and reason == "length":
        log_p = network(torch.tensor([ids + written])).logits[0, -1:].log_softmax(-1)
        new = int(log_p.argmax())
        written.append(new)
        if wanted.logprobs is not None:
            arrays = [each.numpy() for each in _rows(log_p, [new], wanted.logprobs)]
            told._update_sample_logprobs(LogprobsLists(*arrays, None))
        if not wanted.ignore_eos and new == tokenizer.eos_token_id:
            reason = "stop"
        elif new in (wanted.stop_token_ids or ()):
            reason, stop_reason = "stop", new
        found = detokenizer.update([new], reason == "stop")
        if found is not None:
            reason, stop_reason = "stop", found
    shown = detokenizer.get_next_output_text(True, False)
    made = [
        CompletionOutput(i, shown, written, None, told.logprobs, finish_reason=reason, stop_reason=stop_reason)
        for i in range(request.n)
    ]
    return RequestOutput("x", text, ids, told.prompt_logprobs, made, True)


def vllms(network: Any, tokenizer: Any, body: dict[str, Any]) -> dict[str, Any]:
    request = CompletionRequest(**body)
    helper = OpenAIServingCompletion.__new__(OpenAIServingCompletion)
    helper.return_tokens_as_token_ids = False
    helper.enable_prompt_tokens_details = helper.enable_per_request_metrics = False
    helper.system_fingerprint = None
    given = request.prompt
    prompts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    outputs = [output_of(network, tokenizer, request, prompt) for prompt in prompts]
    metadata = RequestResponseMetadata(request_id="x")
    response = helper.request_output_to_completion_response(outputs, request, "x", 0, "tiny", tokenizer, metadata)
    return json.loads(JSONResponse(response.model_dump()).body)


@pytest.mark.parametrize("name", ASKED)
def test_an_answer_is_vllms(server: Server, network: Any, tokenizer: Any, name: str):
    body = {**ASKED[name], "temperature": 0}
    if "fourth" in body.values():  # the fourth token of the first completion
        fourth = vllms(network, tokenizer, {"prompt": IDS, "temperature": 0, "return_token_ids": True})
        token = fourth["choices"][0]["token_ids"][3]
        body |= {"stop_token_ids": [token]} if "stop_token_ids" in body else {"stop": tokenizer.decode([token])}
    answer = server.http.post(f"{server.http_url}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    ours, theirs = answer.json(), vllms(network, tokenizer, body)
    assert ours.pop("system_fingerprint") == server.fingerprint
    del theirs["system_fingerprint"]
    for one in (ours, theirs):  # of this one request
        del one["id"], one["created"]
    assert_alike(ours, theirs)
    if "fourth" in ASKED[name].values():
        assert ours["choices"][0]["finish_reason"] == "stop"
