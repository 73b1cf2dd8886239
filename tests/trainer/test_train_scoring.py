"""The trainer's side of the teacher, against a client that answers as it is told."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from serving import serving

from student_trainer import guards, scoring
from student_trainer.distributed import Distributed
from student_trainer.losses import build
from student_trainer.losses.base import Needs
from student_trainer.losses.config import parse_loss
from student_trainer.teachers.config import TeacherConfig
from student_trainer.types import Prompt, Rollout
from teacher_api import compression
from teacher_api.client import TeacherClient
from teacher_api.errors import (
    DeadlineExceeded,
    FingerprintMismatch,
    InvalidRequest,
    NotFound,
    Overloaded,
    TeacherError,
    Unavailable,
    Unsupported,
)
from teacher_api.types import ScoreOptions, ScoreRequest, Scores, TeacherInfo, scored_positions

INFO = TeacherInfo(
    fingerprint="f" * 32,
    model_name="teacher",
    tokenizer_fingerprint="t",
    tokenizer_size=120,
    logit_width=128,
    max_sequence_tokens=64,
    max_top_k=16,
    max_candidates=8,
    max_completions=10,
    max_request_bytes=1 << 20,
    max_response_bytes=1 << 20,
    features=("top_k", "candidates", "exact_tail"),
)


class Client:
    """Answers backwards, with values that say whose they are; `spoil` may change the answers."""

    def __init__(self, spoil: Any = lambda answers: answers) -> None:
        self.asked: list[ScoreRequest] = []
        self._spoil = spoil

    def score_many(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]:
        self.asked = list(requests)
        answers = []
        for request in self.asked:
            for completion in request.completions:
                positions = scored_positions(completion, len(request.prompts[completion.prompt_index]))
                value = np.full(len(positions), -float(completion.id) - 1, dtype=np.float32)
                answers.append(Scores(completion.id, positions, value, value, topk_logprob=np.stack([value] * 2, 1)))
        yield from self._spoil(answers[::-1])


def rollouts(*groups: int, candidates: int = 0) -> list[Rollout]:
    """Samples of 3 tokens, so many of each prompt."""
    found = []
    for index, size in enumerate(groups):
        prompt = Prompt(index=index, token_ids=np.arange(2, 4 + index, dtype=np.int32))
        for _ in range(size):
            zeros = np.zeros(3, dtype=np.float32)
            ids = np.arange(3 * candidates).reshape(3, candidates) if candidates else None
            tokens = np.array([5, 6, 7], dtype=np.int32)
            found.append(Rollout(len(found), prompt, tokens, "length", zeros, zeros, student_topk_ids=ids))
    return found


def scorer(client: Any, **settings: Any) -> scoring.TeacherScorer:
    return scoring.TeacherScorer(client, "grpc://somewhere:1", TeacherConfig(**settings), ScoreOptions(top_k=2))


def test_scores_come_back_in_the_order_of_the_samples() -> None:
    asked = rollouts(1, 2, 1)
    for scored, rollout in zip(scorer(Client()).score(asked), asked, strict=True):
        assert scored.rollout is rollout
        assert (scored.scores.token_logprob == -rollout.uid - 1).all()


def test_a_prompt_is_sent_once_a_request_and_groups_stay_together() -> None:
    client = Client()
    scorer(client, request_sequences=4).score(rollouts(3, 2, 1, 9))
    shape = [(len(r.prompts), [int(c.id) for c in r.completions]) for r in client.asked]
    assert shape == [(1, [0, 1, 2]), (2, [3, 4, 5]), (1, [6, 7, 8, 9]), (1, [10, 11, 12, 13]), (1, [14])]
    assert [len(p) for p in client.asked[1].prompts] == [3, 4]


def test_the_students_ids_go_along_as_candidates() -> None:
    client = Client()
    scorer(client).score(rollouts(1, candidates=4))
    candidates = client.asked[0].completions[0].candidates
    assert candidates is not None
    assert candidates.ids.tolist() == list(range(12))
    assert candidates.row_offsets.tolist() == [0, 4, 8, 12]


def test_an_adapter_by_name_is_the_teacher_of_the_run() -> None:
    asked = rollouts(2)
    with serving(lora={"math": "one"}) as server, TeacherClient(server.http_url, teacher="math") as direct:
        config = TeacherConfig(url=(server.http_url,), name="math", start_timeout_s=20, timeout_s=20)
        client, info = scoring.connect(config, server.http_url, run_name="run", tokenizer=None)
        with client:
            scored = scoring.TeacherScorer(client, server.http_url, config, ScoreOptions(top_k=2)).score(asked)
        assert info.model_name == "math"
        assert info.fingerprint == direct.info().fingerprint != server.fingerprint
        assert {one.scores.fingerprint for one in scored} == {info.fingerprint}
        with pytest.raises(NotFound, match="'sums'; expected one of math"):
            scoring.connect(config.model_copy(update={"name": "sums"}), server.http_url, run_name="run", tokenizer=None)
    with pytest.raises(ValueError, match=r"name: got 'math' with openai\+http://host:1/v1, expected none"):
        TeacherConfig(url=("openai+http://host:1/v1",), name="math")


def with_nan(answers: list[Scores]) -> list[Scores]:
    broken = answers[1].topk_logprob.copy()
    broken[2, 1] = np.nan
    return [answers[0], dataclasses.replace(answers[1], topk_logprob=broken), *answers[2:]]


def shifted(answers: list[Scores]) -> list[Scores]:
    return [dataclasses.replace(answers[0], positions=answers[0].positions + 1), *answers[1:]]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda answers: answers[:-1], "left out 1 of 3 samples, such as 0"),
        (lambda answers: [*answers, answers[0]], "sample 2 twice"),
        (with_nan, "sample 1, position 4: the teacher's topk_logprob is not finite"),
        (shifted, "sample 2 cover positions"),
        (lambda answers: [dataclasses.replace(a, topk_logprob=None) for a in answers], "no top-k values"),
    ],
    ids=["missing", "twice", "nan", "shifted", "no values"],
)
def test_an_answer_that_does_not_fit_never_becomes_a_training_token(spoil: Any, words: str) -> None:
    with pytest.raises(scoring.ScoreError, match=words):
        scorer(Client(spoil)).score(rollouts(3))


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (Unavailable("x"), scoring.TeacherGone),
        (Overloaded("x"), scoring.TeacherGone),
        (DeadlineExceeded("x"), scoring.TeacherGone),
        (FingerprintMismatch("x"), scoring.HandshakeError),
        (InvalidRequest("x"), InvalidRequest),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_a_failed_call_is_an_outage_another_teacher_or_a_refusal(error: TeacherError, becomes: type) -> None:
    def fail(_answers: list[Scores]) -> list[Scores]:
        raise error

    with pytest.raises(becomes):
        scorer(Client(fail)).score(rollouts(1))


@pytest.mark.parametrize(
    ("options", "needs", "longest", "words"),
    [
        (ScoreOptions(top_k="all"), Needs("all", 0), 9, "does not offer full_vocabulary"),
        (ScoreOptions(top_k=2, temperature=2.0), Needs(2, 0), 9, "does not offer temperature"),
        (ScoreOptions(top_k=2, value_type="float16"), Needs(2, 0), 9, "does not offer float16"),
        (ScoreOptions(top_k=17), Needs(17, 0), 9, "at most 16"),
        (ScoreOptions(top_k=2), Needs(2, 9), 9, "takes 8"),
        (ScoreOptions(top_k=2), Needs(2, 2), 65, "at most 64"),
    ],
)
def test_what_this_teacher_would_refuse_is_refused_before_the_first_step(options, needs, longest, words) -> None:
    with pytest.raises(scoring.HandshakeError, match=words):
        scoring.check_teacher(INFO, needs, options, longest)


def test_a_teacher_of_its_own_top_k_alone_is_told_which_support_fits() -> None:
    """The vLLM backend with a large vocabulary, and the README's way of asking it."""
    alone = dataclasses.replace(INFO, features=("top_k", "float16"))
    with pytest.raises(scoring.HandshakeError, match=r"does not offer candidates.*loss.support=teacher"):
        scoring.check_teacher(alone, build(parse_loss({})).needs(2), ScoreOptions(top_k=2), 9)
    readme = build(parse_loss({"support": "teacher"})).needs(2)
    assert len(scoring.check_teacher(alone, readme, ScoreOptions(top_k=2), 9)) == 1


def test_a_tail_that_is_not_exact_is_a_warning() -> None:
    without = dataclasses.replace(INFO, features=("top_k",))
    assert scoring.check_teacher(INFO, Needs(2, 0), ScoreOptions(top_k=2), 64) == []
    assert "exact_tail" in scoring.check_teacher(without, Needs(2, 0), ScoreOptions(top_k=2), 64)[0]


def test_a_tokenizer_nobody_could_name_is_a_warning_that_says_how_to_name_it() -> None:
    stock = dataclasses.replace(
        INFO,
        tokenizer_fingerprint="unverified",
        scoring_path="openai",
        engine="vllm serve",
        features=("top_k", "rank", "float16"),
    )
    scoring.check_tokenizer(object(), stock)
    warnings = scoring.check_teacher(stock, Needs(2, 0), ScoreOptions(top_k=2), 64)
    for words in ("is unverified", "set teacher.tokenizer", "weights can't be identified", "exact_tail"):
        assert sum(words in text for text in warnings) == 1, words
    with pytest.raises(scoring.HandshakeError, match="does not offer candidates, temperature"):
        scoring.check_teacher(stock, Needs(2, 2), ScoreOptions(top_k=2, temperature=2.0), 64)


@pytest.mark.parametrize("settings", [{"url": "grpc://a:1"}, {"model": "m"}, {}])
def test_a_tokenizer_beside_a_teacher_that_has_its_own_is_refused(settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="expected none: only a stock server"):
        TeacherConfig(tokenizer="there", **settings)
    assert TeacherConfig(tokenizer="there", url=("openai+http://a/v1",)).tokenizer == "there"


# -- leaving together


def test_compression_needs_its_package_a_teacher_that_has_it_and_no_stock_server(monkeypatch: Any) -> None:
    with pytest.raises(ValueError, match="expected none: a stock server has none"):
        TeacherConfig(url="openai+http://127.0.0.1:1/v1", compression="zstd")
    config = TeacherConfig(url="http://127.0.0.1:1", compression="zstd")
    without = Unsupported("the teacher does not offer zstd", field="compression")

    def refuse(_self: Any) -> TeacherInfo:
        raise without

    monkeypatch.setattr(scoring.TeacherClient, "info", refuse)
    with pytest.raises(scoring.HandshakeError, match=r"teacher\.compression: the teacher does not offer zstd"):
        scoring.connect(config, "http://127.0.0.1:1", run_name="r", tokenizer=None)
    monkeypatch.setattr(compression, "_library", lambda: None)
    with pytest.raises(ValueError, match=r"preceptor\[zstd\]"):
        TeacherConfig(url="http://127.0.0.1:1", compression="zstd")


def test_the_gravest_failure_of_any_rank_is_everybodys(monkeypatch) -> None:
    gone = scoring.TeacherGone("grpc://somewhere:1", 3.0, Unavailable("x"))
    for theirs, expected in (
        (guards.StopRequested(), guards.StopRequested),
        (gone, scoring.TeacherGone),
        (ZeroDivisionError("a bug"), guards.TrainingError),
    ):
        others = [None, guards._portable(theirs)]
        monkeypatch.setattr(Distributed, "all_reduce_max", lambda _, mine, o=theirs: max(mine, guards._gravity(o)))
        monkeypatch.setattr(Distributed, "gather", lambda _, mine, o=others: [mine, o[1]])
        with pytest.raises(expected):
            guards.agree(Distributed(0, 2, 0, None), None)


def test_what_ends_a_run_survives_the_way_between_processes() -> None:
    gone = pickle.loads(pickle.dumps(scoring.TeacherGone("grpc://somewhere:1", 3.0, Unavailable("down"))))
    assert (gone.url, gone.seconds, gone.cause.message) == ("grpc://somewhere:1", 3.0, "down")
