"""Who teaches which sample, what is refused, and what one dead teacher of several does to a run."""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from serving import serving

from student_trainer import cli, metrics, scoring
from student_trainer.config import TrainConfig, differences, experiment
from student_trainer.microbatch import divide_in_order
from student_trainer.packing import Packing
from student_trainer.teachers.config import NamedTeacherConfig
from student_trainer.teachers.panel import Member, Panel, drawn
from student_trainer.types import Prompt, Rollout, ScoredRollout
from teacher_api.client import TeacherClient
from teacher_api.errors import Unavailable
from teacher_api.types import ScoreOptions, Scores, TeacherInfo

INFO = TeacherInfo("f", "teacher", "t", 120, 128, 64, 16, 64, 10, 1 << 20, 1 << 20, ("top_k", "candidates"))


class Scorer:
    """Answers with a constant of its own; may wait for another, or fail."""

    def __init__(self, name: str, value: float, wait: threading.Event | None = None, error: Exception | None = None):
        self.name, self.value, self.wait, self.error = name, value, wait, error
        self.options = ScoreOptions(top_k=2)
        self.asked: list[int] = []
        self.reached = threading.Event()

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        return list(self.arriving(rollouts))[::-1]

    def arriving(self, rollouts: Sequence[Rollout]) -> Iterator[ScoredRollout]:
        self.asked = [r.uid for r in rollouts]
        self.reached.set()
        if self.error:
            raise self.error
        if self.wait is not None:
            assert self.wait.wait(20), "the other teacher was not asked meanwhile"
        for rollout in reversed(rollouts):  # whichever order
            yield ScoredRollout(rollout, self._scores(rollout), self.name)

    def _scores(self, rollout: Rollout) -> Scores:
        values = np.full(rollout.num_tokens, self.value, np.float32)
        positions = np.arange(rollout.num_tokens, dtype=np.int32) + len(rollout.prompt.token_ids)
        return Scores(str(rollout.uid), positions, values, values)

    def close(self) -> None:
        pass


def panel(by: Any, *scorers: Scorer, **settings: dict[str, Any]) -> Panel:
    members = {
        s.name: Member(s.name, NamedTeacherConfig(**settings.get(s.name, {})), s, INFO)  # type: ignore[arg-type]
        for s in scorers
    }
    return Panel(members, by, seed=7)


@pytest.mark.parametrize(
    ("batch_tokens", "of_all"), [((100, 300), (2, 4, 300)), ((100, 0), (2, 4, 0)), ((0, 0), (2, 4, 0))]
)
def test_teachers_are_sent_what_keeps_them_busy(batch_tokens: tuple[int, int], of_all: tuple[int, int, int]) -> None:
    """By the name of each; all of a mixture together no more than each may be sent."""
    configs = {
        "a": NamedTeacherConfig(max_concurrency=2, request_sequences=9),
        "b": NamedTeacherConfig(max_concurrency=5, request_sequences=4),
    }
    members = {
        name: Member(name, configs[name], Scorer(name, -1.0), replace(INFO, batch_tokens=tokens))  # type: ignore[arg-type]
        for name, tokens in zip("ab", batch_tokens, strict=True)
    }
    assert Panel(members, "sample").widths() == {"a": (2, 9, batch_tokens[0]), "b": (5, 4, batch_tokens[1])}
    assert list(Panel(members, "mixture").widths().values()) == [of_all]
    assert Panel({"a": members["a"]}, "mixture").widths() == {"a": (2, 9, batch_tokens[0])}


def rollouts(*domains: str) -> list[Rollout]:
    zeros = np.zeros(3, np.float32)
    return [
        Rollout(
            uid, Prompt(uid, np.array([2, 3], np.int32), domain=d), np.array([4, 5, 1], np.int32), "eos", zeros, zeros
        )
        for uid, d in enumerate(domains)
    ]


# -- who teaches what


def test_a_sample_is_scored_by_the_teacher_of_its_domain_and_the_order_stays() -> None:
    math, code = Scorer("math", -1.0), Scorer("code", -2.0)
    scored = panel("domain", math, code, code={"domains": ("python", "rust")}).score(
        rollouts("python", "math", "rust", "math")
    )
    assert [(s.rollout.uid, s.teacher, float(s.scores.token_logprob[0])) for s in scored] == [
        (0, "code", -2.0),
        (1, "math", -1.0),
        (2, "code", -2.0),
        (3, "math", -1.0),
    ]
    assert (math.asked, code.asked) == ([1, 3], [0, 2])


def test_teachers_are_asked_at_the_same_time() -> None:
    math = Scorer("math", -1.0)
    code = Scorer("code", -2.0, wait=math.reached)
    math.wait = code.reached
    assert len(panel("domain", math, code).score(rollouts("math", "code"))) == 2


def test_a_domain_without_a_teacher_is_named() -> None:
    with pytest.raises(ValueError, match="sample 1: no teacher has the domain 'law'"):
        panel("domain", Scorer("math", -1.0), Scorer("code", -2.0)).score(rollouts("math", "law"))


def test_a_drawn_teacher_depends_on_seed_and_number_alone_and_falls_by_weight() -> None:
    shares = [3.0, 1.0]
    first = [drawn(shares, 7, uid) for uid in range(4000)]
    assert first == [drawn(np.array(shares) / 4, 7, uid) for uid in range(4000)]
    assert first != [drawn(shares, 8, uid) for uid in range(4000)]
    rare = sum(first)  # Binomial(4000, 1/4): 5 standard deviations are 137
    assert abs(rare - 1000) < 137
    one, other = Scorer("one", -1.0), Scorer("other", -2.0)
    several = panel("sample", one, other, one={"weight": 3.0})
    asked = rollouts(*[""] * 40)
    names = ["one" if m == 0 else "other" for m in first]
    assert [s.teacher for s in several.score(asked)] == names[:40]
    assert [s.teacher for s in several.score(asked[::-1])] == names[:40][::-1]


def test_the_draw_of_a_teacher_is_not_the_draw_of_the_first_token() -> None:
    """Both come from (seed, uid): where they were one number, a teacher would see only one part of the distribution."""
    from student_trainer.rollout.sampling import uniforms

    token = uniforms(7, range(2000), 1)[:, 0]
    chosen = np.array([drawn([1.0, 1.0], 7, uid) for uid in range(2000)])
    assert abs(np.corrcoef(token, chosen)[0, 1]) < 0.1


def test_the_first_dead_teacher_ends_the_call_with_its_name() -> None:
    gone = scoring.TeacherGone("grpc://there:1", 2.0, Unavailable("down"), "code")
    never = threading.Event()
    with pytest.raises(scoring.TeacherGone, match="no teacher code at grpc://there:1 for 2 s"):
        panel("domain", Scorer("math", -1.0, wait=never), Scorer("code", -2.0, error=gone)).score(
            rollouts("math", "code")
        )
    never.set()


@pytest.mark.filterwarnings(
    "ignore:coroutine 'connect_tcp:RuntimeWarning"
)  # anyio's own, where it is cut off in between
@pytest.mark.slow
def test_a_client_that_is_closed_ends_the_thread_that_waits_for_it() -> None:
    """A stop leaves threads behind: they must end with the clients, or the process would not."""
    with serving(backend="fake", fake_latency_s=2.0) as server:
        client = TeacherClient(server.http_url)
        scorer = scoring.TeacherScorer(client, server.http_url, NamedTeacherConfig(), ScoreOptions(top_k=2), "slow")
        failing = Scorer("gone", -1.0, error=scoring.TeacherGone("u", 1.0, Unavailable("x"), "gone"))
        members = {
            "slow": Member("slow", NamedTeacherConfig(), scorer, INFO),
            "gone": Member("gone", NamedTeacherConfig(), failing, INFO),  # type: ignore[arg-type]
        }
        before = set(threading.enumerate())
        several = Panel(members, "domain")
        with pytest.raises(scoring.TeacherGone):
            several.score(rollouts("slow", "gone"))
        left = [t for t in threading.enumerate() if t not in before]
        several.close()
        for thread in left:
            thread.join(20)
            assert not thread.is_alive()
    gc.collect()


# -- what is measured


def test_micro_batches_hold_one_teachers_samples() -> None:
    scored = [
        replace(view, teacher=teacher)
        for view, teacher in zip(Scorer("", -1.0).score(rollouts(*"abab")), "abab", strict=True)
    ]
    batches = divide_in_order(scored, 10, 0, Packing())  # sequences of 5 tokens
    assert batches == [[0, 2], [1, 3]]
    assert divide_in_order([replace(s, teacher="") for s in scored], 10, 0, Packing()) == [[0, 1], [2, 3]]


def test_figures_of_a_teacher_are_means_over_its_own_tokens() -> None:
    sums: dict[str, float] = {}
    of_math = {"delta": 6.0, "rows_of_delta": 3.0, "student_mass": 2.0, "x": 1.0, "trained_tokens": 4.0}
    metrics.add(sums, metrics.of_teacher("math", of_math))
    metrics.add(sums, metrics.of_teacher("code", {"delta": 10.0, "student_mass": 5.0, "trained_tokens": 5.0}))
    assert metrics.means(sums) == {
        "skipped_tokens": 0.0,
        "math/delta": 2.0,
        "math/student_mass": 0.5,
        "code/delta": 2.0,
        "code/student_mass": 1.0,
    }
    assert metrics.of_teacher("", {"delta": 6.0, "trained_tokens": 3.0}) == {}


# -- configuration

DOMAINS = [{"name": "math", "source": "m.txt"}, {"name": "code", "source": "c.txt"}]
WHOLE = {"student": {"model": "s"}, "data": {"domains": DOMAINS}}
TWO = {"math": {"url": "grpc://a:1"}, "code": {"url": "grpc://b:1"}}


def read(**sections: Any) -> TrainConfig:
    return TrainConfig.model_validate({**WHOLE, **sections})


@pytest.mark.parametrize("name", TWO)
def test_what_a_step_says_of_a_teacher_may_rank_checkpoints(name: str) -> None:
    sums = {"delta": 6.0, "teacher_mass": 1.0, "student_mass": 1.0, "trained_tokens": 3.0}
    for metric in (f"{name}/tokens", *(key for key in metrics.of_teacher(name, sums) if not key.startswith("rows_of"))):
        assert read(teachers=TWO, checkpoint={"metric": metric}).checkpoint.metric == metric
    own = {"objective": "math:fsum"}
    assert read(teachers=TWO, loss=own, checkpoint={"metric": "a/b"}).checkpoint.metric == "a/b"


LAW = {"url": "grpc://c:1", "domains": ["law"]}
MORE = {"domains": [*DOMAINS, {"name": "law", "source": "l.txt"}]}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"teachers": TWO, "teacher": {"url": "grpc://c:1"}}, "teacher: got it beside teachers"),
        (
            {"teachers": TWO, "checkpoint": {"metric": "mth/delta"}},
            "checkpoint.metric: got 'mth/delta', expected one of math/delta, .*did you mean math/delta",
        ),
        (
            {"teachers": TWO, "checkpoint": {"metric": "code/dleta", "mode": "min"}},
            "checkpoint.metric: got 'code/dleta', .*did you mean code/delta",
        ),
        (
            {"teacher": {"url": "grpc://c:1"}, "checkpoint": {"metric": "math/delta"}},
            "checkpoint.metric: got 'math/delta', expected one without a slash",
        ),
        (
            {"teacher": {"url": "grpc://c:1"}, "teaching": {"by": "mixture"}},
            "teaching.by: got mixture without teachers",
        ),
        ({"teachers": {**TWO, "law": {}}}, "expected one of teachers.law.url and teachers.law.model, got neither"),
        ({"teachers": {**TWO, "a b": {"url": "grpc://c:1"}}}, "got the name 'a b'"),
        ({"teachers": {**TWO, "law": {"url": "grpc://c:1", "weight": 2}}}, "teachers.law.weight: got 2.0 with"),
        (
            {"teachers": {**TWO, "law": {"url": "grpc://c:1", "weight": math.inf}}, "teaching": {"by": "mixture"}},
            "teachers.law.weight",
        ),
        (
            {"teachers": {**TWO, "law": {"url": "grpc://c:1", "domains": ["x"]}}, "teaching": {"by": "sample"}},
            "teachers.law.domains: got .* with teaching.by sample",
        ),
        ({"teachers": {**TWO, "law": {"url": "grpc://c:1", "domains": ["code"]}}}, "'code' is taught by teachers.code"),
        (
            {"teachers": {**TWO, "law": {"url": "grpc://c:1", "top_k": "all"}}, "teaching": {"by": "mixture"}},
            "got all for some",
        ),
        ({"teachers": {**TWO, "law": LAW}}, "teachers.law.domains: the data has no 'law', expected one of math, code"),
        ({"teachers": TWO, "data": {"source": "p.txt"}}, "the data has no 'math', expected data.domains to name some"),
        ({"teachers": TWO, "data": MORE}, "data.domains: 'law' has no teacher, expected .* one of math, code"),
        ({}, r"expected one of teacher.url \(--teacher-url\)"),
    ],
)
def test_contradictions_are_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(**sections)


def test_what_several_teachers_are_asked_is_held_and_where_they_are_is_not() -> None:
    before = experiment(read(teachers=TWO))
    moved = {**TWO, "math": {"url": "http://elsewhere:1", "timeout_s": 5}}
    assert differences(before, experiment(read(teachers=moved))) == []
    assert differences(before, experiment(read(teachers={**TWO, "math": {"url": "grpc://a:1", "top_k": 3}}))) == [
        "teachers.math.top_k: 64 -> 3"
    ]
    weighed = experiment(read(teachers=TWO, teaching={"by": "sample"}))
    assert differences(before, weighed) == ["teaching.by: 'domain' -> 'sample'"]
    assert "teaching.by" not in experiment(read(teacher={"url": "grpc://a:1"}))


def test_new_teachers_are_accepted_all_together() -> None:
    config = read(teachers=TWO).accepting_new_teachers()
    assert all(one.accept_new_teacher for one in config.all_teachers.values())
    assert read(teacher={"url": "grpc://a:1"}).accepting_new_teachers().teacher.accept_new_teacher


@pytest.mark.parametrize(
    ("recipe", "more", "by", "kinds"),
    [
        ("multi-teacher", ["--student=s"], "domain", {"math": "url", "code": "url"}),
        ("privileged", ["--student=s", "--prompts=p", "--teacher-url=grpc://a:1"], "domain", {"": "url"}),
        ("self-distillation", ["--student=s", "--prompts=p"], "domain", {"": "ema"}),
    ],
)
def test_the_recipes_are_taken_as_they_stand(recipe, more, by, kinds, capsys) -> None:
    path = Path(__file__).parents[2] / "recipes" / f"{recipe}.yaml"
    assert cli.run([f"--config={path}", *more, "--print-config"]) == 0
    config = TrainConfig.model_validate(yaml.safe_load(capsys.readouterr().out))
    assert config.teaching.by == by
    assert {name: one.model or "url" for name, one in config.all_teachers.items()} == kinds
    assert all(one.is_privileged == (recipe != "multi-teacher") for one in config.all_teachers.values())
