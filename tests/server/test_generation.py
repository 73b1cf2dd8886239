"""Text that the teacher writes, over /v1/completions: greedy text against transformers' own, sampled text against the
softmax it is drawn from, its logprobs against a float64 forward; what is refused; and that it is stopped, bounded and
paid for like all other work."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serving import Server, ask_http, request_of, serving
from tinymodels import save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from writing import (
    ANY,
    DEATH,
    HANG,
    LONGEST,
    POISON,
    VOCABULARY,
    WIDTH,
    a_checkpoint,
    a_fake_server,
    a_torch_server,
    ask,
    choices,
    error_of,
    idle,
    some_ids,
    texts,
    until,
)

from teacher_api.types import Scores
from teacher_server.backends.model_thread import ModelThread
from teacher_server.openai_text import Texts
from teacher_server.openai_writing import GrowingText

pytestmark = pytest.mark.slow

TOLERANCE = 2e-5


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


@pytest.fixture(scope="module")
def network(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def log_p(network: Any) -> Callable[..., np.ndarray]:
    """log p [T, W] in float64: row t predicts what follows token t."""

    @torch.inference_mode()
    def of(ids: list[int], temperature: float = 1.0) -> np.ndarray:
        return (network(torch.tensor([ids])).logits[0] / temperature).log_softmax(-1).numpy()

    return of


@torch.inference_mode()
def greedy(network: Any, ids: list[int], num_tokens: int) -> list[int]:
    """transformers' own, one prompt at a time, in float64."""
    padding = list(range(VOCABULARY, WIDTH))
    settings = {"max_new_tokens": num_tokens, "do_sample": False, "eos_token_id": None, "suppress_tokens": padding}
    whole = network.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **settings)
    return whole[0, len(ids) :].tolist()


# --- what is written ------------------------------------------------------------------------------------------------


def test_greedy_text_is_transformers_own_whatever_is_written_beside_it(server: Server, network: Any):
    prompts = [some_ids(n, length) for n, length in enumerate((3, 17, 1, 30, 9))]
    expected = [greedy(network, prompt, 24) for prompt in prompts]
    body = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
    assert texts(server, prompt=prompts, **body) == expected  # one batch, padded
    assert texts(server, prompt=prompts[1], **body) == [expected[1]]
    assert texts(server, prompt=prompts[1], **body, n=3) == [expected[1]] * 3
    longest = some_ids(9, LONGEST - 24)
    assert texts(server, prompt=longest, **body) == [greedy(network, longest, 24)]


def test_without_max_tokens_sixteen_are_written(server: Server, network: Any):
    (one,) = choices(server, prompt=some_ids(1, 5), temperature=0, ignore_eos=True)
    assert one["token_ids"] == greedy(network, some_ids(1, 5), 16)
    assert (one["finish_reason"], one["stop_reason"], one["index"]) == ("length", None, 0)


def test_the_most_likely_next_token_is_the_one_that_scoring_tells(server: Server, network: Any):
    (one,) = choices(server, prompt=some_ids(2, 9), temperature=0, max_tokens=1, ignore_eos=True)
    assert one["token_ids"] == greedy(network, some_ids(2, 9), 1)


def test_text_is_that_of_the_tokens(server: Server, directory: Path):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    body = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "skip_special_tokens": False}
    (by_text,) = choices(server, prompt="the quick brown", **body)
    (by_ids,) = choices(server, prompt=tokenizer("the quick brown")["input_ids"], **body)
    assert by_text == by_ids
    assert by_text["text"] == tokenizer.decode(by_text["token_ids"])
    (echoed,) = choices(server, prompt="the quick brown", **body, echo=True, return_token_ids=False)
    assert echoed["text"] == "the quick brown" + by_text["text"]


def test_logprobs_are_those_of_a_float64_forward_whatever_was_drawn_from(server: Server, log_p: Any):
    prompt, k = some_ids(3, 11), 4
    body = {"max_tokens": 9, "temperature": 1.7, "top_p": 0.9, "seed": 5, "n": 3, "ignore_eos": True}
    shown = {"logprobs": k, "prompt_logprobs": 2, "echo": True, "return_tokens_as_token_ids": True}
    told = choices(server, prompt=prompt, **body, **shown)
    assert [one["index"] for one in told] == [0, 1, 2]
    for one in told:
        whole = prompt + one["token_ids"]
        rows = log_p(whole)
        own = [rows[t - 1][whole[t]] for t in range(1, len(whole))]
        assert one["logprobs"]["tokens"] == [f"token_id:{token}" for token in whole]
        np.testing.assert_allclose(one["logprobs"]["token_logprobs"][1:], own, atol=TOLERANCE)
        for t in range(len(prompt), len(whole)):
            best = np.sort(rows[t - 1][:VOCABULARY])[::-1][:k]
            found = sorted(one["logprobs"]["top_logprobs"][t].values(), reverse=True)[:k]
            np.testing.assert_allclose(found, best, atol=TOLERANCE)
        assert [len(row) for row in one["prompt_logprobs"][1:]] == [len(row) for row in told[0]["prompt_logprobs"][1:]]
    (tempered,) = choices(server, prompt=prompt, max_tokens=4, temperature=0, logprobs=0, teacher_temperature=2.0)
    whole = prompt + tempered["token_ids"]
    own = [log_p(whole, 2.0)[t - 1][whole[t]] for t in range(len(prompt), len(whole))]
    np.testing.assert_allclose(tempered["logprobs"]["token_logprobs"], own, atol=TOLERANCE)


def test_usage_counts_a_prompt_once_and_every_written_token(server: Server):
    answer = ask(server, prompt=[some_ids(1, 4), some_ids(2, 6)], n=3, max_tokens=5, ignore_eos=True).json()
    assert len(answer["choices"]) == 6
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (10, 30, 40)


# --- where it ends --------------------------------------------------------------------------------------------------


def test_an_id_that_ends_a_text_is_its_last_and_not_in_its_string(server: Server, network: Any):
    prompt = some_ids(4, 8)
    expected = greedy(network, prompt, 20)
    at = next(n for n in range(5, 20) if expected.index(expected[n]) == n)
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 20, "ignore_eos": True}
    (one,) = choices(server, **body, stop_token_ids=[expected[at]])
    assert one["token_ids"] == expected[: at + 1]
    assert (one["finish_reason"], one["stop_reason"]) == ("stop", expected[at])
    (shorter,) = choices(server, **{**body, "max_tokens": at})
    assert one["text"] == shorter["text"]


def test_the_models_own_end(tmp_path: Path, network: Any, directory: Path):
    """Of a checkpoint whose tokenizer ends a text with the third token that it would write."""
    import shutil

    prompt = some_ids(4, 8)
    expected = greedy(network, prompt, 12)
    at = next(n for n in range(2, 12) if expected.index(expected[n]) == n)
    path = Path(shutil.copytree(directory, tmp_path / "ends"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(expected[at])
    tokenizer.save_pretrained(path)
    with serving(backend="torch", model=str(path), threads=1, generate=True) as running:
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 12}
        (one,) = choices(running, **body)
        assert one["token_ids"] == expected[: at + 1]
        assert (one["finish_reason"], one["stop_reason"]) == ("stop", None)
        assert texts(running, **body, ignore_eos=True) == [expected]


def test_a_string_that_ends_a_text_may_lie_across_tokens(server: Server, network: Any, directory: Path):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = some_ids(5, 8)
    expected = greedy(network, prompt, 20)
    whole = tokenizer.decode(expected)
    pieces = [tokenizer.decode(expected[: n + 1]) for n in range(20)]
    cut = len(pieces[9]) - 1  # the stop begins with the last character of token 9
    stop = whole[cut : cut + 3]
    first = whole.index(stop)
    ended_by = next(n for n, text in enumerate(pieces) if len(text) >= first + len(stop))
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 20, "ignore_eos": True, "skip_special_tokens": False}
    (one,) = choices(server, **body, stop=["never there", stop], logprobs=0)
    assert one["text"] == whole[:first]
    assert one["token_ids"] == expected[: ended_by + 1]
    assert (one["finish_reason"], one["stop_reason"]) == ("stop", stop)
    assert len(one["logprobs"]["tokens"]) == ended_by + 1


def test_text_grows_by_whole_characters_with_every_kind_of_tokenizer():
    fast = tiny_tokenizer(320)  # all bytes, so that single tokens end within a character

    class Slow:
        """What a tokenizer without a Rust half has of it."""

        eos_token_id = fast.eos_token_id
        decode, get_vocab = fast.decode, fast.get_vocab

    text = "é → 狐 🦊 jumps"
    prompt, ids = fast("the quick fox")["input_ids"], fast(text)["input_ids"]
    assert any(fast.decode([token]).endswith("\ufffd") for token in ids)
    for tokenizer in (fast, Slow()):
        decode = Texts(tokenizer, 320).decoder(prompt, skip_special_tokens=True)
        pieces = [decode(token) for token in [*ids, fast.eos_token_id]]
        assert "".join(pieces) == text
        assert "" in pieces
        grown = GrowingText(Texts(tokenizer, 320).decoder(prompt, skip_special_tokens=True), ["jump", "狐 🦊"])
        last = next(n for n, token in enumerate(ids) if grown.add(token))
        assert "".join(pieces[: last + 1]) == "é → 狐 🦊"
        assert (grown.text, grown.found) == ("é → ", "狐 🦊")


# --- how it is drawn ------------------------------------------------------------------------------------------------


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom, over ids expected five times and more; the others are one."""
    expected = counts.sum() * probabilities
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    awaited = np.append(expected[common], expected[~common].sum())
    used = awaited > 0
    return float(((observed[used] - awaited[used]) ** 2 / awaited[used]).sum()), int(used.sum()) - 1


def truncated(p: np.ndarray, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """By the definition: min_p, then top_k, then top_p."""
    kept = p * (p >= min_p * p.max())
    order = np.argsort(-kept)
    if top_k:
        kept[order[top_k:]] = 0
    kept = kept / kept.sum()
    before = np.cumsum(kept[order]) - kept[order]
    kept[order[before >= top_p]] = 0
    return kept / kept.sum()


DRAWN: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 2.5},
    "cold": {"temperature": 0.3},
    "top-k": {"top_k": 6, "temperature": 2.0},
    "top-p": {"top_p": 0.7, "temperature": 2.0},
    "min-p": {"min_p": 0.2, "temperature": 2.0},
    "all three": {"top_k": 12, "top_p": 0.9, "min_p": 0.02, "temperature": 1.5},
}


@pytest.mark.parametrize("name", DRAWN)
def test_tokens_are_drawn_with_their_probabilities(server: Server, log_p: Any, name: str):
    asked, prompt, num = DRAWN[name], some_ids(6, 7), 2000
    cut = {key: value for key, value in asked.items() if key != "temperature"}
    logits = log_p(prompt)[-1][:VOCABULARY] / asked.get("temperature", 1.0)
    p = np.exp(logits - np.logaddexp.reduce(logits))
    drawn = np.concatenate(texts(server, prompt=prompt, max_tokens=1, n=num, seed=1, ignore_eos=True, **asked))
    counts = np.bincount(drawn, minlength=VOCABULARY)
    expected = truncated(p, **cut)
    assert counts[expected == 0].sum() == 0
    statistic, freedom = chi_square(counts, expected)
    assert statistic < freedom + 5 * np.sqrt(2 * max(freedom, 1)) + 5


def test_the_fake_backend_draws_from_its_own_distribution(fake: Server):
    prompt, num = some_ids(6, 7), 4000
    (scores,) = ask_http(fake, request_of([*prompt, 1], top_k="all"))
    assert isinstance(scores, Scores)
    p = np.exp(scores.topk_logprob[-1].astype(np.float64))
    for asked in ({}, {"top_k": 20, "top_p": 0.8}):
        drawn = np.concatenate(texts(fake, prompt=prompt, max_tokens=1, n=num, seed=3, **asked))
        expected = truncated(p / p.sum(), **asked)
        counts = np.bincount(drawn, minlength=len(p))
        assert counts[expected == 0].sum() == 0
        statistic, freedom = chi_square(counts, expected)
        assert statistic < freedom + 5 * np.sqrt(2 * freedom)


def test_a_seed_gives_the_same_text_whatever_is_written_beside_it(server: Server):
    prompt, body = some_ids(7, 10), {"max_tokens": 12, "ignore_eos": True}
    alone = texts(server, prompt=prompt, seed=42, **body)
    assert texts(server, prompt=prompt, seed=42, **body) == alone
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(texts, server, prompt=some_ids(n, 5 + n), seed=n, n=4, **body) for n in range(3)]
        assert texts(server, prompt=prompt, seed=42, **body) == alone
        assert len({tuple(ids) for other in others for ids in other.result()}) == 12
    several = texts(server, prompt=prompt, seed=40, n=4, **body)
    assert several[2] == alone[0]
    assert len({tuple(ids) for ids in several}) == 4
    unseeded = [tuple(texts(server, prompt=prompt, **body)[0]) for _ in range(3)]
    assert len(set(unseeded)) == 3
    assert texts(server, prompt=prompt, seed=-(1 << 63), n=2, **body)


# --- beside scoring -------------------------------------------------------------------------------------------------


def test_scores_are_the_same_while_text_is_written(server: Server):
    asked = [request_of(some_ids(n, 20 + n), some_ids(50 + n, 9), top_k=8, entropy=True) for n in range(12)]
    before = [ask_http(server, request, size=VOCABULARY) for request in asked]
    body = {"prompt": [some_ids(n, 8) for n in range(6)], "max_tokens": 80, "ignore_eos": True, "n": 2}
    with ThreadPoolExecutor(2) as pool:
        writing = [pool.submit(texts, server, **body) for _ in range(2)]
        during = [ask_http(server, request, size=VOCABULARY) for request in asked]
        assert all(len(ids) == 80 for work in writing for ids in work.result())
    pairs = [pair for one, other in zip(before, during, strict=True) for pair in zip(one, other, strict=True)]
    for one, other in pairs:
        for name in ("token_logprob", "log_tail", "topk_ids", "topk_logprob", "entropy"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=0, atol=TOLERANCE)


def test_short_work_goes_between_the_steps_of_long_work():
    thread, order = ModelThread("test"), []
    begun, come = threading.Event(), threading.Event()

    def long() -> None:
        begun.set()
        assert come.wait(30)
        for step in range(3):
            order.append(step)
            thread.between()

    work = thread.submit_long(long)
    assert begun.wait(30)
    short = [thread.submit(lambda name=name: order.append(name)) for name in "ab"]
    dropped = thread.submit(lambda: order.append("never"))
    dropped.cancel()
    failing = thread.submit(lambda: 1 / 0)
    come.set()
    for future in (work, *short):
        future.result(30)
    assert order == [0, "a", 1, "b", 2]
    with pytest.raises(ZeroDivisionError):
        failing.result(30)
    thread.close()


# --- bounds, ends of callers and engines ----------------------------------------------------------------------------


def test_no_more_than_so_many_are_written_at_a_time():
    with serving(generate=True, max_generations=3, fake_latency_s=0.002, high_water=ANY) as running:
        assert len(texts(running, prompt=[5, 6], n=12, max_tokens=6, ignore_eos=True)) == 12
        assert running.backend.generator.most_running == 3
        until(lambda: idle(running), "the budget was not given back")


def opened(server: Server, **body: Any) -> socket.socket:
    """A caller that does not wait for its answer."""
    sent = json.dumps(body).encode()
    host, port = server.http_url.removeprefix("http://").split(":")
    caller = socket.create_connection((host, int(port)))
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    caller.sendall(f"{head}content-length: {len(sent)}\r\n\r\n".encode() + sent)
    return caller


def test_a_caller_that_goes_away_stops_the_writing_and_gives_its_budget_back():
    with serving(generate=True, fake_latency_s=0.01, high_water=ANY, max_generations=2) as running:
        generator = running.backend.generator
        with opened(running, prompt=[5, 6], n=5, max_tokens=4000, ignore_eos=True):
            until(lambda: generator.running == 2, "nothing was written")
        until(lambda: generator.running == 0, "it was written on")
        until(lambda: idle(running), "the budget was not given back")
        assert generator.begun == 2


def test_a_caller_of_the_torch_backend_that_goes_away_stops_the_writing(tmp_path: Path):
    path = save_tiny(tmp_path / "long", tokenizer_size=VOCABULARY, max_position_embeddings=4096)
    with serving(backend="torch", model=str(path), threads=1, generate=True, high_water=ANY) as running:
        with opened(running, prompt=[25, 26], n=2, max_tokens=4000, ignore_eos=True):
            until(lambda: not idle(running), "nothing was written")
        until(lambda: idle(running), "the budget was not given back")
        steps = 4000 * 2  # what was stopped would take minutes, and this waits behind it
        assert len(texts(running, prompt=[25, 26], max_tokens=3, ignore_eos=True)[0]) == 3 < steps


def test_the_deadline_is_the_servers():
    with serving(generate=True, fake_hang_token=HANG, default_timeout_s=0.3, high_water=ANY) as running:
        assert error_of(ask(running, prompt=[HANG, 5], max_tokens=4), 504)["type"] == "GatewayTimeoutError"
        until(lambda: idle(running), "the budget was not given back")


def test_text_holds_at_most_half_of_the_queue(fake: Server):
    settings = {"queue_tokens": 1000, "max_sequence_tokens": 1000, "fake_hang_token": HANG, "high_water": ANY}
    with serving(generate=True, **settings) as running:
        assert error_of(ask(running, prompt=[5] * 300, max_tokens=201), 413)["type"] == "RequestTooLargeError"
        with opened(running, prompt=[HANG] * 100, max_tokens=300):
            until(lambda: not idle(running), "nothing was written")
            answer = ask(running, prompt=[5] * 50, max_tokens=60)
            assert error_of(answer, 429)["type"] == "RateLimitError"
            assert int(answer.headers["retry-after"]) >= 1
            assert isinstance(ask_http(running, request_of([5] * 590, top_k=1))[0], Scores)
        until(lambda: idle(running), "the budget was not given back")
        assert len(texts(running, prompt=[5] * 50, max_tokens=60, ignore_eos=True)[0]) == 60


def test_an_engine_that_fails_fails_its_request_and_no_other(fake: Server):
    told = error_of(ask(fake, prompt=[[20, 21], [POISON, 21]], max_tokens=3), 503)
    assert told["type"] == "ServiceUnavailableError"
    until(lambda: idle(fake), "the budget was not given back")
    answer = ask(fake, prompt=[DEATH, 21], max_tokens=3)
    assert error_of(answer, 503)["type"] == "ServiceUnavailableError"
    assert answer.headers["retry-after"] == "1"
    until(lambda: ask(fake, prompt=[20, 21], max_tokens=3).status_code == 200, "the engine did not come back")
