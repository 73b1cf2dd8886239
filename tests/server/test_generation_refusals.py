"""What a server that writes text refuses, by name; and what one that only scores says of it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import Server, serving
from writing import LONGEST, VOCABULARY, a_checkpoint, a_fake_server, a_torch_server, ask, choices, error_of

from teacher_server.config import ServerConfig
from teacher_server.openai_models import NEUTRAL, OF_WRITING

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_checkpoint(tmp_path_factory.mktemp("writes") / "tiny")


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Server]:
    with a_torch_server(directory) as running:
        yield running


@pytest.fixture(scope="module")
def fake() -> Iterator[Server]:
    with a_fake_server() as running:
        yield running


def test_a_server_that_only_scores_names_the_option():
    with serving() as running:
        body = {"prompt": [5, 6], "max_tokens": 1}
        changes = {
            "max_tokens": 2,
            "n": 2,
            "stop": ["x"],
            "stop_token_ids": [5],
            "top_p": 0.9,
            "top_k": 5,
            "min_p": 0.1,
        }
        for name, value in changes.items():
            told = error_of(ask(running, **{**body, name: value}), 400)
            assert told["param"] == name
            assert "--generate" in told["message"]
        assert "--generate" in error_of(ask(running, prompt=[5, 6]), 400)["message"]
        assert "generate" not in running.info().features
        assert "--generate" not in error_of(ask(running, **body, stream=True), 400)["message"]


def test_a_server_that_writes_says_so(fake: Server):
    assert "generate" in fake.info().features
    (card,) = fake.http.get(f"{fake.http_url}/v1/models").json()["data"]
    assert card["permission"][0]["allow_sampling"] is True
    described = fake.http.get(f"{fake.http_url}/openapi.json").json()
    assert "stop_token_ids" in described["components"]["schemas"]["GenerationRequest"]["properties"]


@pytest.mark.parametrize("name", sorted(set(NEUTRAL) - set(OF_WRITING)))
def test_what_cannot_be_honoured_is_still_refused_by_name(fake: Server, name: str):
    body = {"prompt": [5, 6], "max_tokens": 2}
    for value in (*NEUTRAL[name], None):
        assert ask(fake, **body, **{name: value}).status_code == 200, value
    value = True if name in ("stream", "use_beam_search") else {"some": "thing"}
    told = error_of(ask(fake, **body, **{name: value}), 400)
    assert (told["param"], told["type"]) == (name, "BadRequestError")


@pytest.mark.parametrize(
    ("change", "param", "status"),
    [
        ({"max_tokens": 81}, "max_tokens", 413),
        ({"max_tokens": -1}, "max_tokens", 400),
        ({"max_tokens": "5"}, "max_tokens", 400),
        ({"prompt": [5] * (LONGEST - 7), "max_tokens": 8}, "prompt", 400),
        ({"prompt": [[5], [5] * 90], "max_tokens": 8}, "prompt[1]", 400),
        ({"prompt": [5, VOCABULARY]}, "prompt[0][1]", 400),
        ({"prompt": [5, -1]}, "prompt[0][1]", 400),
        ({"temperature": -0.1}, "temperature", 400),
        ({"temperature": 0.001}, "temperature", 400),
        ({"temperature": 1e4}, "temperature", 400),
        ({"top_p": 0}, "top_p", 400),
        ({"top_p": 1.1}, "top_p", 400),
        ({"top_k": -2}, "top_k", 400),
        ({"top_k": 1.5}, "top_k", 400),
        ({"min_p": -0.1}, "min_p", 400),
        ({"min_p": 1.5}, "min_p", 400),
        ({"seed": 1 << 63}, "seed", 400),
        ({"n": 0}, "n", 400),
        ({"n": 4097}, "n", 413),
        ({"n": 2, "max_tokens": 0}, "n", 400),
        ({"stop": [""]}, "stop", 400),
        ({"stop": [5]}, "stop", 400),
        ({"stop": ["x"] * 65}, "stop", 413),
        ({"stop_token_ids": [VOCABULARY]}, "stop_token_ids", 400),
        ({"stop_token_ids": [-1]}, "stop_token_ids", 400),
        ({"stop_token_ids": list(range(65))}, "stop_token_ids", 413),
        ({"logprobs": 121}, "logprobs", 400),
        ({"teacher_temperature": 0}, "teacher_temperature", 400),
        ({"teacher_temperature": -1, "logprobs": 1}, "teacher_temperature", 400),
        ({"teacher_temperature": 1e-300, "logprobs": 1}, "teacher_temperature", 400),
        ({"stream": True}, "stream", 400),
        ({"min_tokens": 2}, "min_tokens", 400),
    ],
)
def test_a_wrong_request_is_refused_by_name(server: Server, change: dict[str, Any], param: str, status: int):
    told = error_of(ask(server, **{"prompt": [25, 26], "max_tokens": 4, **change}), status)
    assert told["param"] == param
    assert told["message"]


def test_text_that_finds_no_room_is_told_so_and_counts_as_refused():
    with serving(generate=True, queue_tokens=1000, max_sequence_tokens=1000) as small:
        told = error_of(ask(small, prompt=[5] * 600, max_tokens=4), 413)
        assert told["param"] == "prompt", "half of the queue is for text"
        body = {"prompt": [[5] * 100] * 4, "max_tokens": 4}
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: ask(small, **body), range(64)))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused, "eight at a time are four times what has room"
        rows = small.http.get(f"{small.http_url}/v1/usage").json()["rows"]
        assert sum(row["refused_tokens"] for row in rows) == len(refused) * 4 * 104


def test_null_stands_for_the_default(server: Server):
    names = ("temperature", "top_p", "top_k", "min_p", "seed", "n", "stop", "stop_token_ids", "max_tokens", "echo")
    assert len(choices(server, prompt=[25, 26], ignore_eos=True, **dict.fromkeys(names))[0]["token_ids"]) == 16


def test_a_stop_string_needs_a_tokenizer(fake: Server):
    told = error_of(ask(fake, prompt=[25, 26], stop=["x"]), 400)
    assert told["param"] == "stop"
    assert "stop_token_ids" in told["message"]


def test_options_that_contradict_each_other_are_refused(directory: Path):
    for settings, name in (
        ({"max_generations": 2}, "max_generations"),
        ({"max_generated_tokens": 2}, "max_generated_tokens"),
        ({"generate": True, "control": "random"}, "control"),
        ({"generate": True, "reference": True, "backend": "torch"}, "reference"),
        ({"generate": True, "backend": "torch", "generate_vllm": {"a": 1}}, "generate_vllm"),
    ):
        with pytest.raises(ValueError, match=name):
            ServerConfig.model_validate({"model": "fake", "backend": "fake", **settings})


def test_an_adapter_only_scores():
    """The engine that writes has the base alone."""
    with serving(generate=True, lora={"math": "any"}) as running:
        body = {"prompt": [20, 21], "max_tokens": 4}
        told = error_of(ask(running, **body, model="math"), 400)
        assert (told["param"], told["type"]) == ("model", "BadRequestError")
        assert "generate" not in running.http.get(f"{running.http_url}/v1/info?teacher=math").json()["features"]
        assert ask(running, **body).status_code == 200
        scoring = {**body, "max_tokens": 1, "temperature": 0}
        assert ask(running, **scoring, model="math").status_code == 200
