"""Our answers next to vLLM's own: the same keys in the same order, the same strings, ranks and offsets, and the numbers
of a float64 forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from openai_reference import assert_alike, vllm_answer
from serving import Server, serving
from tinymodels import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from teacher_server.openai_models import NEUTRAL, CompletionRequest

pytestmark = pytest.mark.slow

SIZE = 320  # of the vocabulary: all bytes, so that single tokens end within a character
IDS = [[5, 6, 7, 300, 41, 9], [200, 201, 202, 203], [17]]
TEXTS = ["the quick fox", "é → 狐 🦊 jumps"]

ASKED: dict[str, dict[str, Any]] = {
    "harness": {"model": "tiny", "prompt": IDS[:2], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    | {"echo": True},
    "harness with text": {"model": "tiny", "prompt": TEXTS[0], "temperature": 0, "max_tokens": 1, "logprobs": 1}
    | {"seed": 1234, "echo": True},
    "TRL's teacher": {"model": "tiny", "prompt": IDS, "max_tokens": 1, "temperature": 0.7, "prompt_logprobs": 100},
    "TRL's teacher, sampled token": {"prompt": IDS, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 1},
    "TRL's sampler": {"model": "tiny", "prompt": IDS, "return_token_ids": True, "return_tokens_as_token_ids": True}
    | {"n": 1, "repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": 1}
    | {"logprobs": 0},
    "one flat prompt": {"prompt": IDS[0], "max_tokens": 1, "prompt_logprobs": 0},
    "texts": {"prompt": TEXTS, "max_tokens": 1, "prompt_logprobs": 5, "logprobs": 3},
    "whole vocabulary": {"prompt": IDS[0], "max_tokens": 1, "prompt_logprobs": -1, "logprobs": -1, "echo": True},
    "narrow echo of wide rows": {"prompt": TEXTS, "max_tokens": 1, "prompt_logprobs": 6, "logprobs": 2, "echo": True},
    "wide echo of narrow rows": {"prompt": TEXTS, "max_tokens": 1, "prompt_logprobs": 2, "logprobs": 6, "echo": True},
    "own token only": {"prompt": TEXTS, "max_tokens": 1, "logprobs": 0, "echo": True},
    "only the next token": {"prompt": IDS, "max_tokens": 1, "logprobs": 4},
    "only the next text": {"prompt": TEXTS, "max_tokens": 1},
    "echo of text": {"prompt": IDS, "max_tokens": 1, "echo": True},
    "echo with ids": {"prompt": IDS, "max_tokens": 1, "echo": True, "logprobs": 2, "return_token_ids": True},
    "no token": {"prompt": IDS, "max_tokens": 0, "echo": True, "logprobs": 2},
    "no token, by id": {"prompt": TEXTS, "max_tokens": 0, "echo": True, "logprobs": 2}
    | {"return_tokens_as_token_ids": True},
    "no token, text only": {"prompt": TEXTS, "max_tokens": 0, "echo": True},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("openai") / "tiny", tokenizer_size=SIZE, logit_width=SIZE))


@pytest.fixture(scope="module")
def server(directory: str) -> Iterator[Server]:
    with serving(backend="torch", model=directory, threads=1, max_top_k=SIZE) as running:
        yield running


@pytest.fixture(scope="module")
def network(directory: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def tokenizer(directory: str) -> Any:
    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("name", ASKED)
def test_an_answer_is_vllms(server: Server, network: Any, tokenizer: Any, name: str):
    answer = server.http.post(f"{server.http_url}/v1/completions", json=ASKED[name])
    assert answer.status_code == 200, answer.text
    ours, theirs = answer.json(), vllm_answer(network, tokenizer, ASKED[name])
    assert ours.pop("system_fingerprint") == server.fingerprint
    del theirs["system_fingerprint"]
    for one in (ours, theirs):  # of this one request
        assert one.pop("id")
        assert isinstance(one.pop("created"), int)
    if ASKED[name]["max_tokens"] == 0:  # vLLM counts a token that it makes and throws away
        assert theirs["usage"].pop("completion_tokens") == len(theirs["choices"])
        assert ours["usage"].pop("completion_tokens") == 0
        del ours["usage"]["total_tokens"], theirs["usage"]["total_tokens"]
    assert_alike(ours, theirs)


def test_the_prompts_bring_tokens_that_end_within_a_character(tokenizer: Any):
    """Else the test above would say nothing of them."""
    assert any(tokenizer.decode([token]).endswith("\ufffd") for token in tokenizer(TEXTS[1])["input_ids"])


def test_every_field_of_vllms_protocol_is_honoured_or_refused_by_name():
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest as Theirs

    honoured = set(CompletionRequest.model_fields)
    assert set(Theirs.model_fields) - honoured <= set(NEUTRAL)
    assert honoured - set(Theirs.model_fields) == {"teacher_temperature"}
    for name in set(Theirs.model_fields) & set(NEUTRAL):
        default = Theirs.model_fields[name].get_default(call_default_factory=True)
        assert default is None or default in NEUTRAL[name], name


def test_the_list_of_models_is_vllms(server: Server):
    from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList, ModelPermission

    card = ModelCard(id="tiny", root="tiny", max_model_len=128, permission=[ModelPermission()])
    theirs = ModelList(data=[card]).model_dump()
    ours = server.http.get(f"{server.http_url}/v1/models").json()
    assert list(ours) == list(theirs)
    assert list(ours["data"][0]) == list(theirs["data"][0])
    assert list(ours["data"][0]["permission"][0]) == list(theirs["data"][0]["permission"][0])
    assert ours["data"][0]["max_model_len"] == 128


def test_errors_are_vllms(server: Server):
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    for body in ({"prompt": [1], "max_tokens": 1, "model": "another"}, {"prompt": [1], "max_tokens": 1, "n": 2}):
        answer = server.http.post(f"{server.http_url}/v1/completions", json=body)
        read = ErrorResponse.model_validate_json(answer.content)
        assert read.model_dump() == answer.json()
        assert read.error.code == answer.status_code
