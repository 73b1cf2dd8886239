"""The client when a server of vLLM's API fails, or answers what does not fit: what is asked again and what is final."""

from __future__ import annotations

import asyncio

import pytest
import stamina
from openai_calls import a_request, check_scores, fake, run
from stock_vllm import Cut, Refusal, refusal

from teacher_api import errors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("quick_retries"),
    pytest.mark.filterwarnings("ignore::ResourceWarning:uvicorn.*"),
]

TOO_LONG = "This model's maximum context length is 64 tokens. However, your prompt contains 99 input tokens."


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (refusal(400, "bad sampling parameter"), errors.InvalidRequest),
        (refusal(400, TOO_LONG), errors.TooLarge),
        (refusal(401, "who are you"), errors.Unauthenticated),
        (refusal(403, "not for you"), errors.PermissionDenied),
        (refusal(404, "The model `x` does not exist.", "NotFoundError"), errors.NotFound),
        (refusal(422, "no"), errors.InvalidRequest),
        (refusal(501, "not here", "NotImplementedError"), errors.Unsupported),
        (Refusal(418, b"teapot"), errors.InternalError),
    ],
)
def test_errors_that_stay(fault, kind):
    vllm = fake(faults=[fault])
    with pytest.raises(kind) as caught:
        run(vllm, lambda c: c.score(a_request(1)))
    assert type(caught.value) is kind
    assert f"HTTP {fault.status}" in caught.value.message
    assert len(vllm.asked) == 1


@pytest.mark.parametrize(
    "fault",
    [
        refusal(429, "queue is full", retry_after="0.01"),
        refusal(500, "EngineCore encountered an issue", "InternalServerError"),
        refusal(503, "loading", "ServiceUnavailableError"),
        Refusal(502, b"<html>bad gateway</html>"),
        Refusal(504, b""),
        Cut(),
    ],
)
def test_errors_that_pass(fault):
    vllm, request = fake(faults=[fault]), a_request(1)
    check_scores(request, run(vllm, lambda c: c.score(request)))
    assert len(vllm.asked) == 2


def test_a_hanging_attempt_is_given_up_and_made_again():
    vllm, request = fake(faults=["hang"]), a_request(1)
    check_scores(request, run(vllm, lambda c: c.score(request), attempt_timeout_s=2.0))
    assert len(vllm.asked) == 2
    with pytest.raises((errors.DeadlineExceeded, errors.Unavailable), match=r"0\.5 s"):
        run(fake(faults=["hang"]), lambda c: c.score(request), timeout_s=0.5)


def rows_of(answer):
    return answer["choices"][0]["prompt_logprobs"]


def changed(what):
    def change(answer):
        what(rows_of(answer))
        return answer

    return change


def _first(row):
    return row[next(iter(row))]


DAMAGE = {
    "no rows at all": (lambda a: {**a, "choices": [{"index": 0, "prompt_logprobs": None}]}, "no prompt logprobs"),
    "no JSON": (lambda a: b"<html>", "no prompt logprobs"),
    "two choices": (lambda a: {**a, "choices": a["choices"] * 2}, "no prompt logprobs"),
    "a row missing": (changed(lambda rows: rows.pop()), "returned 3 rows, expected 4"),
    "an empty row": (changed(lambda rows: rows.__setitem__(2, None)), "no prompt logprobs"),
    "an entry missing": (changed(lambda rows: [rows[2].popitem(), rows[2].popitem()]), "position 2: "),
    "another token": (
        changed(lambda rows: rows.__setitem__(3, {str(int(i) + 100): v for i, v in rows[3].items()})),
        "position 3: the actual token is not among the entries",
    ),
    "NaN": (changed(lambda rows: _first(rows[1]).update(logprob=float("nan"))), "position 1: values that are no"),
    "a logit": (changed(lambda rows: _first(rows[1]).update(logprob=3.0)), "position 1: values that are no"),
    "null": (changed(lambda rows: _first(rows[1]).update(logprob=None)), "position 1: values that are no"),
    "too much mass": (
        changed(lambda rows: [v.update(logprob=-0.5) for v in rows[2].values()]),
        "position 2: probabilities add up to more than 1",
    ),
    "one rank twice": (
        changed(lambda rows: [v.update(rank=1) for v in rows[2].values()]),
        "position 2: ranks do not count from 1 to 5",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_an_answer_that_does_not_fit_is_withheld_and_asked_again(name):
    change, text = DAMAGE[name]
    request = a_request(1)
    vllm = fake(faults=[change])
    causes = []
    stamina.instrumentation.set_on_retry_hooks([lambda details: causes.append(details.caused_by)])
    check_scores(request, run(vllm, lambda c: c.score(request)))
    assert len(vllm.asked) == 2
    assert [type(cause) for cause in causes] == [errors.InvalidBackendOutput]
    assert text in causes[0].message


def test_key_order_of_the_rows_does_not_matter():
    """A gateway may sort the keys of what it passes on."""
    request = a_request(1)

    def sort(rows):
        rows[1:] = [dict(sorted(row.items())) for row in rows[1:]]

    check_scores(request, run(fake(faults=[changed(sort)]), lambda c: c.score(request)))


def test_no_more_than_max_concurrency_at_a_time():
    vllm = fake()
    request = a_request(12)

    async def work(client):
        await client.info()
        vllm.hold, vllm.most_in_flight = asyncio.Event(), 0
        asked = asyncio.create_task(client.score(request))
        async with asyncio.timeout(10):
            while vllm.in_flight < 3:
                await asyncio.sleep(0.005)
        vllm.hold.set()
        return await asked

    check_scores(request, run(vllm, work, max_concurrency=3))
    assert vllm.most_in_flight == 3
    assert len(vllm.asked) == 12
