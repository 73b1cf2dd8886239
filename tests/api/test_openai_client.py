"""The client against a server that answers as `vllm serve` does: what arrives, who it is, what is refused and why."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect

import numpy as np
import pytest
from client_calls import ids
from fake_teacher import WIDTH, V, logprobs
from openai_calls import Tokenizer, a_request, check_scores, fake, run
from stock_vllm import FakeVllm, Refusal, in_thread, serve_vllm

from teacher_api import check, errors
from teacher_api.client import AsyncTeacherClient, ClientOptions, TeacherClient
from teacher_api.info import UNVERIFIED, tokenizer_fingerprint
from teacher_api.openai_info import OpenAIOptions, differences, place_of
from teacher_api.types import LOGPROB_FLOOR, CallMetadata, Candidates, Completion, ScoreOptions, ScoreRequest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("quick_retries"),
    pytest.mark.filterwarnings("ignore::ResourceWarning:uvicorn.*"),
]


# ---- what arrives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 0}, {"top_k": 1, "rank": True}, {"top_k": 0, "rank": True}, {"top_k": 20, "value_type": "float16"}],
)
def test_scores_are_the_models(options):
    request = a_request(**options)
    scores = run(fake(), lambda c: c.score(request))
    check_scores(request, scores)
    assert {s.computed_tokens for s in scores} == {4, 7, 9}
    for array in (scores[0].topk_logprob, scores[0].token_logprob):
        assert array is None or array.dtype in (np.float32, np.dtype(options.get("value_type", "float32")))


def test_only_what_is_needed_is_asked():
    vllm = fake()
    request = a_request(2, ranges=((1, 2), (3, 4)))
    check_scores(request, run(vllm, lambda c: c.score(request)))
    assert sorted(len(q["prompt"]) for q in vllm.asked) == [4, 4], "nothing after the last scored position"
    assert {q["prompt_logprobs"] for q in vllm.asked} == {5}


def test_the_whole_vocabulary_where_the_server_gives_all():
    request = a_request(top_k="all")
    vllm = fake(max_logprobs=-1, tokenize=Tokenizer().ids_of)
    check_scores(request, run(vllm, lambda c: c.score(request)))
    check_scores(request, run(vllm, lambda c: c.score(request), tokenizer=Tokenizer()), size=V)


def test_all_columns_of_no_padding_leave_no_tail():
    request = a_request(1, top_k="all")
    (scores,) = run(fake(max_logprobs=-1), lambda c: c.score(request))
    assert (scores.log_tail == LOGPROB_FLOOR).all()


def test_streams_and_the_synchronous_client():
    requests = [a_request(2), a_request(3, rank=True)]
    requests[1] = dataclasses.replace(
        requests[1], completions=[dataclasses.replace(c, id=f"m{c.id}") for c in requests[1].completions]
    )
    with in_thread(fake()) as url, TeacherClient.openai(url, timeout_s=20) as client:
        check_scores(requests[0], client.score(requests[0]))
        found = {s.id: s for s in client.score_many(requests)}
    for request in requests:
        check_scores(request, [found[c.id] for c in request.completions])


def masked(tokens):
    """All mass on ids 0 to 2 but for a trace; id 39 has none at all."""
    logits = np.full((len(tokens), WIDTH), -40.0)
    logits[:, :3] = [5.0, 4.0, 3.0]
    logits[:, 39] = -np.inf
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def test_small_tails_are_bounded_from_above_and_masked_tokens_are_finite():
    request = ScoreRequest([Completion("a", ids(1, 0, 39))], options=ScoreOptions(top_k=3))
    (scores,) = run(fake(masked), lambda c: c.score(request))
    true_tail = np.log(np.exp(masked([1])[0, 3:]).sum())
    assert (scores.log_tail >= true_tail - 1e-3).all()
    assert (scores.log_tail <= np.log(2.0**-18)).all(), "no more than float32 can tell from none"
    assert scores.token_logprob[1] == LOGPROB_FLOOR
    request = dataclasses.replace(request, options=ScoreOptions(top_k=4))
    (scores,) = run(fake(masked), lambda c: c.score(request))
    assert (scores.log_tail <= np.log(WIDTH) + scores.topk_logprob[:, 3]).all(), "no unseen id beats the last one seen"


# ---- columns without a token -----------------------------------------------------------------------------------------


def padding_first(tokens):
    """The four columns without a token are the most likely ones."""
    logits = logprobs(tokens)
    logits[:, V:] += 9.0
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def test_ids_without_a_token_are_not_offered_and_stay_in_the_tail(monkeypatch):
    request = a_request()
    for allowance in (8, 1):  # enough at once; asked again
        monkeypatch.setattr("teacher_api.transport_openai.PADDING_ALLOWANCE", allowance)
        vllm = fake(padding_first)
        scores = run(vllm, lambda c: c.score(request), assumed_tokenizer=Tokenizer())
        check_scores(request, scores, size=V, model=padding_first)
        assert {q["prompt_logprobs"] for q in vllm.asked} == ({9} if allowance == 8 else {6, 9})


def test_too_many_of_them_are_said_to_be_the_reason():
    with pytest.raises(errors.TooLarge, match="4 columns without one; start it with --max-logprobs") as caught:
        run(fake(padding_first, max_logprobs=8), lambda c: c.score(a_request()), tokenizer=Tokenizer())
    assert caught.value.field == "options.top_k"


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "field", "kind", "text"),
    [
        ({"temperature": 0.5}, "options.temperature", errors.Unsupported, "does not offer temperature"),
        ({"entropy": True}, "options.entropy", errors.Unsupported, "does not offer entropy"),
        ({"hidden": True}, "options.hidden", errors.Unsupported, "does not offer hidden"),
        ({"top_k": "all"}, "options.top_k", errors.Unsupported, "its --max-logprobs is below 44"),
        ({"top_k": 21}, "options.top_k", errors.TooLarge, r"at most 20 \(--max-logprobs\)"),
    ],
)
def test_what_the_server_would_ignore_is_refused(options, field, kind, text):
    vllm = fake()
    with pytest.raises(kind, match=text) as caught:
        run(vllm, lambda c: c.score(a_request(1, **options)))
    assert caught.value.field == field
    assert not vllm.asked


@pytest.mark.parametrize(
    ("completion", "field", "kind", "text"),
    [
        (
            Completion("a", ids(1, 2), candidates=Candidates.from_rows([[3]])),
            "completions[1].candidates",
            errors.Unsupported,
            "does not offer candidates",
        ),
        (Completion("a", ids(1, 2, 44)), "completions[1].token_ids", errors.InvalidRequest, "ids below 44"),
        (Completion("a", np.ones(64, np.int32)), "completions[1].token_ids", errors.TooLarge, "scores 63"),
    ],
)
def test_a_sequence_that_cannot_be_scored(completion, field, kind, text):
    request = ScoreRequest([Completion("good", ids(1, 2)), completion])
    good, bad = run(fake(), lambda c: c.score(request, return_errors=True))
    assert good.id == "good"
    assert isinstance(bad, kind)
    assert bad.field == field
    assert text in bad.message


@pytest.mark.parametrize(
    "url", ["openai+ftp://a", "openai+http://", "openai+http://a/v1?modle=x", "openai+http://a/v1#x"]
)
def test_bad_urls(url):
    with pytest.raises(ValueError, match=r"expected .*openai\+http://host:port/v1"):
        TeacherClient(url)


def test_good_urls():
    for url in ("openai+http://h:1", "openai+http://h:1/", "openai+http://h:1/v1", "openai+http://h:1/v1/"):
        assert place_of(url) == place_of("openai+http://h:1/v1")
    assert place_of("openai+https://h/x/v1?model=a/b").root == "https://h/x"
    assert place_of("openai+https://h/x/v1?model=a/b").model == "a/b"


def test_options_that_contradict_each_other():
    with pytest.raises(ValueError, match=r"options for a stock server; expected openai\+http"):
        TeacherClient("http://h:1", stock=OpenAIOptions())
    with pytest.raises(ValueError, match="names model 'a'; expected 'b'"):
        TeacherClient.openai("http://h:1/v1?model=a", model="b")
    with pytest.raises(ValueError, match="expected one of them"):
        TeacherClient.openai("http://h:1/v1", tokenizer=Tokenizer(), assumed_tokenizer=Tokenizer())


def test_both_clients_take_the_same_arguments_with_the_same_defaults():
    ours, theirs = (inspect.signature(c.openai).parameters for c in (TeacherClient, AsyncTeacherClient))
    assert ours == theirs
    init = set(inspect.signature(TeacherClient).parameters) - {"url", "stock"}
    assert init == set(ClientOptions.__annotations__), "what is passed through"


# ---- who is there ----------------------------------------------------------------------------------------------------


def info_of(vllm, **options):
    return run(vllm, lambda c: c.info(), **options)


def test_the_server_as_a_teacher():
    info = info_of(fake())
    assert (info.model_name, info.engine, info.engine_version) == ("org/teacher", "vllm serve", "0.32.0")
    assert (info.max_sequence_tokens, info.max_top_k, info.logit_width, info.max_candidates) == (63, 20, WIDTH, 0)
    assert info.features == ("float16", "rank", "top_k")
    assert info.tokenizer_fingerprint == UNVERIFIED
    assert info.weights_digest == ""
    assert any("unverified" in text for text in differences(info))
    assert any("weights can't be identified" in text for text in differences(info))
    whole = info_of(fake(max_logprobs=-1))
    assert "full_vocabulary" in whole.features
    assert whole.max_top_k == WIDTH


def test_the_fingerprint_is_of_what_the_server_says_and_not_of_where_it_is():
    first = info_of(fake()).fingerprint
    assert first == info_of(fake()).fingerprint, "another port, other `created` and permission ids"
    others = [{"version": "0.33.0"}, {"root": "/models/other"}, {"name": "other"}, {"max_model_len": 65}]
    prints = [info_of(fake(**other)).fingerprint for other in others]
    assert len({first, *prints}) == 5
    assert first.startswith("stock-")


def test_a_tokenizer_that_is_given_is_held_against_the_servers():
    mine, parts = tokenizer_fingerprint(Tokenizer())
    info = info_of(fake(tokenize=Tokenizer().ids_of), tokenizer=Tokenizer())
    assert (info.tokenizer_fingerprint, info.tokenizer_parts, info.tokenizer_size) == (mine, parts, V)
    info = info_of(fake(tokenize=Tokenizer().ids_of), assumed_tokenizer=Tokenizer())
    assert (info.tokenizer_fingerprint, info.tokenizer_size) == (UNVERIFIED, V)
    for name in ("tokenizer", "assumed_tokenizer"):
        with pytest.raises(errors.FingerprintMismatch, match="other ids of a known text"):
            info_of(fake(tokenize=Tokenizer(shift=1).ids_of), **{name: Tokenizer()})


def test_a_server_without_tokenize_is_said_to_be_unchecked(caplog):
    assert info_of(fake(), tokenizer=Tokenizer()).tokenizer_size == V
    assert "no /tokenize" in caplog.text


def test_several_models():
    vllm = fake(adapters=("lora-a", "lora-b"))
    with pytest.raises(errors.InvalidRequest, match=r"org/teacher, lora-a, lora-b; name one"):
        info_of(vllm)
    with pytest.raises(errors.NotFound, match="no model 'lora-c'; it has org/teacher"):
        info_of(vllm, model="lora-c")
    request = a_request(1)
    check_scores(request, run(vllm, lambda c: c.score(request), model="lora-b"))
    assert vllm.asked[0]["model"] == "lora-b"


def test_another_server_in_the_same_place_is_refused():
    """Though the pool replaces closed connections silently, so that no call fails."""

    async def main():
        vllm = fake()
        async with serve_vllm(vllm) as url:
            port = int(url.split(":")[2].removesuffix("/v1"))
            client = AsyncTeacherClient.openai(url, timeout_s=20)
            await client.score(a_request(1))
        vllm = fake(version="0.33.0")
        async with serve_vllm(vllm, port):
            with pytest.raises(errors.FingerprintMismatch, match=r"expected teacher 'stock-\w+'.*org/teacher"):
                await client.score(a_request(1))
        await client.close()

    asyncio.run(main())


def test_a_server_that_comes_back_is_gone_on_with():
    async def main():
        async with serve_vllm(fake()) as url:
            port = int(url.split(":")[2].removesuffix("/v1"))
            client = AsyncTeacherClient.openai(url, timeout_s=20)
            await client.info()
        request = a_request()
        async with serve_vllm(fake(), port):
            check_scores(request, await client.score(request))
        await client.close()

    asyncio.run(main())


def test_keys():
    vllm = fake(key="s3cret")
    request = a_request(1)
    check_scores(request, run(vllm, lambda c: c.score(request), api_key="s3cret", metadata=CallMetadata("t")))
    assert vllm.keys == {"Bearer s3cret"}
    with pytest.raises(errors.Unauthenticated, match="HTTP 401: Unauthorized"):
        info_of(vllm, api_key="wrong")


def test_no_vllm_here():
    class Other(FakeVllm):
        async def answer(self, *_):
            raise Refusal(404, {"detail": "Not Found"})

    with pytest.raises(errors.NotFound, match="expected the base URL of a `vllm serve`"):
        info_of(Other(logprobs, WIDTH))


# ---- teacher-check ---------------------------------------------------------------------------------------------------


def test_teacher_check(capsys):
    with in_thread(fake()) as url:
        assert check.main([f"openai+{url}"]) == 0
    out = capsys.readouterr().out
    assert "org/teacher at openai+http://127.0.0.1" in out
    assert "fingerprint unverified" in out
    assert "engine       vllm serve 0.32.0, openai, weights unknown" in out
    assert out.count("warning  ") == 2
    assert "15 positions" in out
