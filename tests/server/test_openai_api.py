"""The OpenAI-compatible way in: what harnesses and trainers read from it against a float64 forward, everything that is
refused, and that it lives by the same limits, keys, deadlines and budgets as the other ways."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serving import Server, ask_http, request_of, serving
from tinymodels import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from teacher_api.types import Scores, TeacherInfo
from teacher_server.front import Front
from teacher_server.lifecycle import Lifecycle
from teacher_server.openai_answer import PIECE_CHARS, Answer, Scored
from teacher_server.openai_models import NEUTRAL, request_from_json
from teacher_server.openai_text import Texts

pytestmark = pytest.mark.slow

VOCABULARY, LONGEST = 120, 64
HANG, POISON = 8, 9  # not among the self-check's, which are 0 to 7
ANY = 1e-9  # high_water: /readyz says no while anything at all is in work
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("openai") / "tiny", tokenizer_size=VOCABULARY, logit_width=128)


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Server]:
    with serving(backend="torch", model=str(directory), threads=1, max_sequence_tokens=LONGEST) as running:
        yield running


@pytest.fixture(scope="module")
def fake() -> Iterator[Server]:
    settings = {"fake_hang_token": HANG, "fake_poison_token": POISON, "high_water": ANY, "batch_sequences": 1}
    with serving(fake_vocabulary=4096, max_top_k=4096, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def log_p(directory: Path) -> Callable[[list[int]], np.ndarray]:
    """log p [T, W] in float64: row t predicts what follows token t."""
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()

    @torch.inference_mode()
    def of(ids: list[int], temperature: float = 1.0) -> np.ndarray:
        return (network(torch.tensor([ids])).logits[0] / temperature).log_softmax(-1).numpy()

    return of


def ask(server: Server, **body: Any) -> Any:
    return server.http.post(f"{server.http_url}/v1/completions", json=body)


def choices(server: Server, **body: Any) -> list[dict[str, Any]]:
    answer = ask(server, **body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def error_of(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    told = answer.json()
    assert list(told) == ["error"]
    assert list(told["error"]) == ["message", "type", "param", "code"]
    assert told["error"]["code"] == status
    return told["error"]


def some_ids(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(2, VOCABULARY, length).tolist()


def until(condition: Callable[[], bool], complaint: str, limit_s: float = 20) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, complaint


def idle(server: Server) -> bool:
    return server.http.get(f"{server.http_url}/readyz").status_code == 200


# --- the numbers ----------------------------------------------------------------------------------------------------


def test_what_the_harness_reads_is_the_log_likelihood_of_each_continuation(server: Server, log_p: Any):
    """lm-evaluation-harness: the sum behind the context without the last position, and whether all of it is greedy."""
    context = some_ids(1, 20)
    greedy = list(context)
    for _ in range(3):
        greedy.append(int(log_p(greedy)[-1, :VOCABULARY].argmax()))
    sequences = [context + some_ids(2, 5), context + some_ids(3, 1), greedy]
    body = {"model": "tiny", "prompt": sequences, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    for one, ids in zip(choices(server, **body, echo=True), sequences, strict=True):
        told = one["logprobs"]
        assert len(told["token_logprobs"]) == len(ids) + 1
        mine = told["token_logprobs"][len(context) : -1]
        tops = told["top_logprobs"][len(context) : -1]
        rows = log_p(ids)
        expected = [rows[at - 1, ids[at]] for at in range(len(context), len(ids))]
        assert sum(mine) == pytest.approx(sum(expected), abs=1e-4)
        assert all(own == max(top.values()) for own, top in zip(mine, tops, strict=True)) == (ids is greedy)


@pytest.mark.parametrize("k", [1, 8, 100])
def test_what_trl_reads_is_the_best_of_each_row_and_the_actual_token(server: Server, log_p: Any, k: int):
    """TRL's server teacher: the first k by rank, and the entry of the token that was sent."""
    sequences = [some_ids(4, 30), some_ids(5, 11)]
    told = choices(server, model="tiny", prompt=sequences, max_tokens=1, temperature=1.0, prompt_logprobs=k)
    for one, ids in zip(told, sequences, strict=True):
        assert one["prompt_logprobs"][0] is None
        rows = log_p(ids)
        for at in range(1, len(ids)):
            entries = one["prompt_logprobs"][at]
            best = sorted(entries.items(), key=lambda item: item[1]["rank"])[:k]
            known = rows[at - 1, :VOCABULARY]
            np.testing.assert_allclose([e["logprob"] for _, e in best], np.sort(known)[::-1][:k], atol=TOLERANCE)
            np.testing.assert_allclose(
                [e["logprob"] for _, e in best], known[[int(i) for i, _ in best]], atol=TOLERANCE
            )
            own = entries[str(ids[at])]
            assert own["logprob"] == pytest.approx(rows[at - 1, ids[at]], abs=TOLERANCE)
            inside = [int(i) for i, _ in best].index(ids[at]) + 1 if str(ids[at]) in dict(best) else None
            assert own["rank"] == (inside or 1 + (rows[at - 1] > rows[at - 1, ids[at]]).sum())


@pytest.mark.parametrize("temperature", [None, 0, 0.3, 2.0])
def test_the_temperature_of_sampling_changes_nothing(server: Server, temperature: float | None):
    body: dict[str, Any] = {"prompt": some_ids(6, 9), "max_tokens": 1, "prompt_logprobs": 2, "logprobs": 2}
    assert choices(server, **body, temperature=temperature) == choices(server, **body)


def test_the_teachers_temperature_divides_its_logits(server: Server, log_p: Any):
    ids = some_ids(7, 12)
    (one,) = choices(server, prompt=ids, max_tokens=1, prompt_logprobs=0, logprobs=0, teacher_temperature=2.5)
    rows = log_p(ids, 2.5)
    own = [one["prompt_logprobs"][at][str(ids[at])]["logprob"] for at in range(1, len(ids))]
    np.testing.assert_allclose(own, [rows[at - 1, ids[at]] for at in range(1, len(ids))], atol=TOLERANCE)
    assert one["logprobs"]["token_logprobs"] == [pytest.approx(rows[-1, :VOCABULARY].max(), abs=TOLERANCE)]


def test_the_next_token_is_the_most_likely_one_and_changes_no_other_row(server: Server, log_p: Any):
    ids = some_ids(8, 15)
    (one,) = choices(server, prompt=ids, max_tokens=1, prompt_logprobs=3, return_token_ids=True)
    (none,) = choices(server, prompt=ids, max_tokens=0, prompt_logprobs=3, return_token_ids=True)
    assert one["token_ids"] == [int(log_p(ids)[-1, :VOCABULARY].argmax())]
    assert (none["token_ids"], none["text"]) == ([], "")
    assert one["prompt_token_ids"] == none["prompt_token_ids"] == ids
    assert len(one["prompt_logprobs"]) == len(ids)
    for a, b in zip(one["prompt_logprobs"][1:], none["prompt_logprobs"][1:], strict=True):
        assert list(a) == list(b)
        np.testing.assert_allclose([e["logprob"] for e in a.values()], [e["logprob"] for e in b.values()], atol=1e-5)


def test_an_end_token_ends_the_text_unless_told_to_go_on(directory: Path, tmp_path: Path, log_p: Any):
    ids = some_ids(9, 6)
    new = int(log_p(ids)[-1, :VOCABULARY].argmax())
    listed, own = tmp_path / "listed", tmp_path / "own"
    shutil.copytree(directory, listed)
    settings = json.loads((listed / "generation_config.json").read_text())
    (listed / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [1, new]}))
    shutil.copytree(directory, own)
    tokenizer = AutoTokenizer.from_pretrained(own)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(new)
    tokenizer.save_pretrained(own)
    for path, stop_reason in ((listed, new), (own, None)):
        with serving(backend="torch", model=str(path), threads=1) as running:
            (one,) = choices(running, prompt=ids, max_tokens=1, return_token_ids=True)
            assert (one["finish_reason"], one["stop_reason"], one["text"]) == ("stop", stop_reason, "")
            assert one["token_ids"] == [new]
            (more,) = choices(running, prompt=ids, max_tokens=1, ignore_eos=True)
            assert (more["finish_reason"], more["stop_reason"]) == ("length", None)


def test_a_large_answer_comes_in_pieces_and_equals_the_binary_one(fake: Server):
    sequences = [np.random.default_rng(n).integers(10, 4096, 90 + n).tolist() for n in range(3)]
    k = 700
    told = choices(fake, prompt=sequences, max_tokens=0, prompt_logprobs=k)
    binary = ask_http(fake, request_of(*sequences, top_k=k, rank=True), size=4096)
    for one, scores in zip(told, binary, strict=True):
        assert isinstance(scores, Scores)
        for n, at in enumerate(scores.positions.tolist()):
            entries = one["prompt_logprobs"][at]
            ids = [str(token) for token in scores.topk_ids[n].tolist()]
            own = next(iter(entries))
            assert own == str(sequences[int(one["index"])][at])
            assert entries[own]["logprob"] == float(scores.token_logprob[n])
            assert entries[own]["rank"] == (ids.index(own) + 1 if own in ids else int(scores.rank[n]))
            rest = [(name, entry["logprob"], entry["rank"]) for name, entry in entries.items() if name != own]
            best = zip(ids, scores.topk_logprob[n].tolist(), range(1, k + 1), strict=True)
            assert rest == [each for each in best if each[0] != own]
    until(lambda: idle(fake), "the answers' budget was not given back")


def test_no_piece_of_an_answer_grows_with_it():
    rows, k, size = 4000, 64, 4096
    rng = np.random.default_rng(0)
    info = TeacherInfo("f", "m", "", size, size, 8192, 256, 0, 1, 1, 1)
    scores = Scores(
        id="0",
        positions=np.arange(1, rows + 1, dtype=np.int32),
        token_logprob=rng.normal(size=rows).astype(np.float32),
        log_tail=np.zeros(rows, np.float32),
        topk_ids=np.tile(np.arange(k, dtype=np.int32), (rows, 1)),
        topk_logprob=rng.normal(size=(rows, k)).astype(np.float32),
        rank=np.ones(rows, np.uint32),
    )
    body = {"prompt": [1] * (rows + 1), "max_tokens": 0, "prompt_logprobs": k, "logprobs": k, "echo": True}
    asked = request_from_json(json.dumps(body).encode())
    ids = rng.integers(0, size, rows + 1).astype(np.int32)
    pieces = list(Answer(asked, [Scored(ids, None, scores, True)], Texts(None, size), info, "i", 0).pieces())
    own_tokens = 80 * rows  # the lists of one entry a token come whole
    assert sum(map(len, pieces)) > 60 * PIECE_CHARS
    assert max(map(len, pieces)) < 4 * PIECE_CHARS + own_tokens
    assert len(json.loads(b"".join(pieces))["choices"][0]["logprobs"]["top_logprobs"]) == rows + 1


# --- prompts, tokenizer, names --------------------------------------------------------------------------------------


def test_text_is_scored_as_its_tokens(server: Server, directory: Path):
    text = "the quick brown fox"
    ids = AutoTokenizer.from_pretrained(directory)(text)["input_ids"]
    body: dict[str, Any] = {"max_tokens": 1, "prompt_logprobs": 2, "return_token_ids": True}
    (by_text,), (by_ids,) = choices(server, prompt=text, **body), choices(server, prompt=[ids], **body)
    assert by_text == by_ids


def test_one_token_without_anything_to_score(server: Server):
    (one,) = choices(server, prompt=[5], max_tokens=0, prompt_logprobs=1, logprobs=1, echo=True)
    assert one["prompt_logprobs"] == [None]
    assert one["logprobs"]["token_logprobs"] == one["logprobs"]["top_logprobs"] == [None]
    assert one["logprobs"]["text_offset"] == [0]


def test_without_a_tokenizer_tokens_are_told_by_id_and_text_is_refused(fake: Server):
    (one,) = choices(fake, prompt=[20, 21], max_tokens=1, echo=True, logprobs=1, return_token_ids=True)
    new = one["token_ids"][0]
    assert one["logprobs"]["tokens"] == ["token_id:20", "token_id:21", f"token_id:{new}"]
    assert one["logprobs"]["text_offset"] == [0, 11, 22]
    (plain,) = choices(fake, prompt=[20, 21], max_tokens=1, echo=True)
    assert plain["text"] == f"token_id:20token_id:21token_id:{new}"
    told = error_of(ask(fake, prompt=["a", "b"], max_tokens=1), 400)
    assert told["param"] == "prompt[0]"
    assert "tokenizer" in told["message"]


def test_the_model_is_the_served_one_or_not_named(server: Server):
    names = [card["id"] for card in server.http.get(f"{server.http_url}/v1/models").json()["data"]]
    assert names == ["tiny"]
    for model in ("tiny", None, ""):
        assert ask(server, prompt=[5, 6], max_tokens=1, model=model).json()["model"] == "tiny"
    told = error_of(ask(server, prompt=[5, 6], max_tokens=1, model="gpt-4"), 404)
    assert (told["type"], told["param"]) == ("NotFoundError", "model")


def test_the_answers_id_is_the_requests(server: Server):
    body = {"prompt": [5, 6], "max_tokens": 1}
    assert ask(server, **body, request_id="mine").json()["id"] == "cmpl-mine"
    url, header = f"{server.http_url}/v1/completions", {"x-request-id": "header"}
    assert server.http.post(url, json={**body, "request_id": "mine"}, headers=header).json()["id"] == "cmpl-header"
    assert error_of(ask(server, **body, request_id="a\nb"), 400)["param"] == "request_id"


# --- what is refused ------------------------------------------------------------------------------------------------

ASKING: dict[str, Any] = {
    "n": 2,
    "best_of": 3,
    "stream": True,
    "suffix": "end",
    "stop": ["\n"],
    "logit_bias": {"5": 1.0},
    "top_p": 0.9,
    "top_k": 5,
    "min_tokens": 1,
    "repetition_penalty": 1.1,
    "response_format": {"type": "json_object"},
    "priority": 1,
    "mm_payload": "none",
    "watermarking": True,
    "routed_experts_prompt_start": 1,
    "return_token_offsets": True,
    "spaces_between_special_tokens": False,
    "use_beam_search": True,
    "include_stop_str_in_output": True,
    "thinking_token_budget": 8,
}


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_a_field_that_cannot_be_honoured_is_taken_only_where_it_asks_for_nothing(server: Server, name: str):
    body = {"prompt": [5, 6], "max_tokens": 1}
    for value in (*NEUTRAL[name], None):
        assert ask(server, **body, **{name: value}).status_code == 200, value
    told = error_of(ask(server, **body, **{name: ASKING.get(name, {"some": "thing"})}), 400)
    assert (told["param"], told["type"]) == (name, "BadRequestError")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": 2}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "1"}, "max_tokens"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[5], []]}, "prompt[1]"),
        ({"prompt": [[5], "x"]}, "prompt"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"prompt": [True, False]}, "prompt"),
        ({"prompt": [[5, 6], [5, VOCABULARY]]}, "prompt[1][1]"),
        ({"prompt": [5, -1]}, "prompt[0][1]"),
        ({"prompt": [5, 1 << 40]}, "prompt"),
        ({"prompt": [VOCABULARY], "max_tokens": 0, "echo": True}, "prompt[0][0]"),  # nothing of these is scored
        ({"prompt": [-1], "max_tokens": 0, "echo": True, "logprobs": 1}, "prompt[0][0]"),
        ({"prompt": [[5, 6], [-1]], "max_tokens": 0, "prompt_logprobs": 1}, "prompt[1][0]"),
        ({"teacher_temperature": -1, "max_tokens": 0}, "teacher_temperature"),
        ({"prompt": [5] * (LONGEST + 1), "max_tokens": 0}, "prompt"),
        ({"prompt": [5] * LONGEST}, "prompt"),
        ({"prompt": "fox " * 4000}, "prompt"),
        ({"logprobs": -2}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 121}, "logprobs"),
        ({"prompt_logprobs": 121}, "prompt_logprobs"),
        ({"teacher_temperature": 0}, "teacher_temperature"),
        ({"teacher_temperature": "hot"}, "teacher_temperature"),
        ({"temperature": -1}, "temperature"),
        ({"seed": 1 << 63}, "seed"),
        ({"echo": "yes"}, "echo"),
        ({"guided_json": {}}, "guided_json"),
        ({"x" * 500: 1}, "x" * 64),
    ],
)
def test_a_wrong_request_is_refused_by_name(server: Server, change: dict[str, Any], param: str):
    told = error_of(ask(server, **{"prompt": [5, 6], "max_tokens": 1, **change}), 400)
    assert told["param"] == param
    assert told["message"]


def test_the_longest_prompt_is_scored_where_no_token_is_asked_for(server: Server):
    longest = some_ids(11, LONGEST)
    (one,) = choices(server, prompt=longest, max_tokens=0, prompt_logprobs=0)
    assert len(one["prompt_logprobs"]) == LONGEST
    assert "max_tokens 0" in error_of(ask(server, prompt=longest, max_tokens=1), 400)["message"]
    assert len(choices(server, prompt=longest[1:], max_tokens=1, prompt_logprobs=0)) == 1


def test_the_whole_vocabulary_is_given_only_within_max_top_k(server: Server, directory: Path):
    body = {"prompt": some_ids(12, 5), "max_tokens": 0, "prompt_logprobs": -1}
    (one,) = choices(server, **body)
    assert [len(row) for row in one["prompt_logprobs"][1:]] == [VOCABULARY] * 4
    with serving(backend="torch", model=str(directory), threads=1, max_top_k=VOCABULARY - 1) as narrow:
        told = error_of(ask(narrow, **body), 400)
        assert told["param"] == "prompt_logprobs"
        assert f"at most {VOCABULARY - 1}" in told["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(server: Server, body: bytes):
    url, kind = f"{server.http_url}/v1/completions", {"content-type": "application/json"}
    error_of(server.http.post(url, content=body, headers=kind), 400)
    assert error_of(server.http.post(url, content=body), 400)["param"] == "content-type"


def test_a_name_that_is_no_text_is_refused_like_any_other(server: Server):
    url, kind = f"{server.http_url}/v1/completions", {"content-type": "application/json"}
    for _ in range(2):
        answer = server.http.post(url, content=b'{"\\ud800": 1, "prompt": [5, 6], "max_tokens": 1}', headers=kind)
        assert "?" in error_of(answer, 400)["param"]


def test_other_errors_on_these_paths_have_the_same_form(server: Server):
    url = server.http_url
    wrong = server.http.get(f"{url}/v1/completions")
    assert "POST" in error_of(wrong, 405)["message"]
    assert wrong.headers["allow"] == "POST"
    error_of(server.http.post(f"{url}/v1/chat/completions", json={}), 404)
    assert server.http.get(f"{url}/v1/nothing").headers["content-type"] == "application/problem+json"


# --- the same service -----------------------------------------------------------------------------------------------


def test_a_key_is_needed_where_keys_are_set_but_not_for_health():
    with serving(api_keys=["a-secret-key"]) as running:
        body = {"prompt": [5, 6], "max_tokens": 1}
        for headers in ({}, {"authorization": "Bearer"}, {"authorization": "Bearer another-key"}):
            answer = running.http.post(f"{running.http_url}/v1/completions", json=body, headers=headers)
            assert error_of(answer, 401)["type"] == "AuthenticationError"
            assert answer.headers["www-authenticate"] == "Bearer"
            error_of(running.http.get(f"{running.http_url}/v1/models", headers=headers), 401)
        key = {"authorization": "Bearer a-secret-key"}
        assert running.http.post(f"{running.http_url}/v1/completions", json=body, headers=key).status_code == 200
        assert running.http.get(f"{running.http_url}/health").status_code == 200


def test_more_than_the_limits_is_refused_with_a_time_to_come_back():
    with serving(queue_tokens=1000, max_sequence_tokens=1000, max_request_bytes=4096) as small:
        body = {"prompt": [[5] * 400] * 3, "max_tokens": 1}
        error_of(ask(small, **body), 413)
        told = ask(small, prompt=[[1000] * 400] * 2, max_tokens=1, user="x" * 4096)
        assert error_of(told, 413)["type"] == "RequestTooLargeError"
    with serving(max_completions=2) as small:
        assert error_of(ask(small, prompt=[[5, 6]] * 3, max_tokens=1), 413)["param"] == "prompt"
        assert error_of(ask(small, prompt=[[5]] * 3, max_tokens=0, echo=True), 413)["param"] == "prompt"
    with serving(max_response_bytes=2048) as small:
        assert error_of(ask(small, prompt=[5] * 500, max_tokens=0, prompt_logprobs=1), 413)["param"] == "prompt"


def hanging(server: Server) -> socket.socket:
    """A caller whose request is never answered."""
    body = json.dumps({"prompt": [HANG, 5], "max_tokens": 1}).encode()
    host, port = server.http_url.removeprefix("http://").split(":")
    caller = socket.create_connection((host, int(port)))
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    caller.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    until(lambda: not idle(server), "the request was not taken")
    return caller


def test_a_caller_that_goes_away_gives_its_budget_back():
    with serving(fake_hang_token=HANG, high_water=ANY) as running:
        hanging(running).close()
        until(lambda: idle(running), "the budget was not given back")


def test_a_full_queue_says_when_to_come_back():
    small = {"queue_tokens": 100, "max_sequence_tokens": 100}
    with serving(fake_hang_token=HANG, high_water=ANY, **small) as running, hanging(running):
        answer = ask(running, prompt=[5] * 99, max_tokens=1)
        assert error_of(answer, 429)["type"] == "RateLimitError"
        assert int(answer.headers["retry-after"]) >= 1


def test_the_deadline_is_the_servers():
    with serving(fake_hang_token=HANG, default_timeout_s=0.3) as running:
        error_of(ask(running, prompt=[HANG, 5], max_tokens=1), 504)


def test_while_the_model_loads_the_error_has_the_form_that_the_caller_reads():
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    front = Front(Lifecycle(stall_s=1.0, high_water=1.0))
    for path in ("/v1/completions", "/health"):
        asyncio.run(front({"path": path}, None, send))
    assert json.loads(sent[1]["body"])["error"]["type"] == "ServiceUnavailableError"
    assert (b"retry-after", b"1") in sent[0]["headers"]
    assert [message["status"] for message in sent[::2]] == [503, 503]


def test_one_prompt_that_fails_fails_its_request(fake: Server):
    told = error_of(ask(fake, prompt=[[20, 21], [POISON, 21]], max_tokens=1), 503)
    assert told["type"] == "ServiceUnavailableError"
    until(lambda: idle(fake), "the budget was not given back")


def test_numbers_are_finite_even_where_a_model_is_certain(tmp_path: Path):
    """vLLM's −inf is −9999; ours, a floor of −10,000, is told as the same."""
    path = save_tiny(tmp_path / "sure", tokenizer_size=VOCABULARY, logit_width=VOCABULARY, scale=4e4)
    with serving(backend="torch", model=str(path), threads=1) as running:
        (one,) = choices(
            running, prompt=some_ids(13, 20), max_tokens=1, prompt_logprobs=VOCABULARY, logprobs=1, echo=True
        )
    values = [entry["logprob"] for row in one["prompt_logprobs"][1:] for entry in row.values()]
    assert min(values) == -9999.0
    assert all(math.isfinite(value) for value in values)
