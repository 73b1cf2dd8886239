"""The report: divergences against their definition, colours, escaping, charts, and one page from real models."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tinymodels import save_tiny, tiny_model, tiny_tokenizer

from student_trainer.config import TrainConfig
from student_trainer.report import __main__ as command
from student_trainer.report import collect, compare, curves, html
from student_trainer.report.model import Chart, Choice, Comparison, CompletionView, Figure, Report, Series, TokenView
from student_trainer.types import Prompt, Rollout
from teacher_api.settings import dump_yaml
from teacher_api.types import LOGPROB_FLOOR, ScoreRequest, Scores, TeacherInfo

VOCABULARY, WIDTH = 120, 128
NASTY = '</script><script>alert("1")</script><img src=x onerror=alert(2)>&amp;'


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _random_logprobs(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return _log_softmax(rng.normal(scale=3.0, size=shape))


def test_divergence_on_the_full_vocabulary_is_the_kl():
    rng = np.random.default_rng(0)
    log_q, log_p = _random_logprobs(rng, 2, 50)
    expected = float(np.sum(np.exp(log_q) * (log_q - log_p)))
    got = collect.divergence(log_q, np.arange(50, dtype=np.int32), log_p, LOGPROB_FLOOR)
    assert got == pytest.approx(expected, rel=1e-12)


def test_divergence_with_a_bucket_is_the_kl_of_the_merged_outcomes_and_no_more_than_the_whole():
    rng = np.random.default_rng(1)
    log_q, log_p = _random_logprobs(rng, 2, 50)
    ids = rng.permutation(50)[:7].astype(np.int32)
    q, p = np.exp(log_q), np.exp(log_p)
    merged_q, merged_p = np.append(q[ids], 1 - q[ids].sum()), np.append(p[ids], 1 - p[ids].sum())
    expected = float(np.sum(merged_q * np.log(merged_q / merged_p)))
    got = collect.divergence(log_q, ids, log_p[ids], float(np.log(merged_p[-1])))
    assert got == pytest.approx(expected, rel=1e-9)
    assert 0 < got < float(np.sum(q * (log_q - log_p)))


def test_divergence_is_zero_for_equal_models_and_finite_where_the_student_excludes_a_token():
    log_p = _random_logprobs(np.random.default_rng(2), 20)
    ids = np.arange(20, dtype=np.int32)
    assert collect.divergence(log_p, ids, log_p, LOGPROB_FLOOR) == 0.0
    log_q = np.full(20, -np.inf)
    log_q[3] = 0.0
    assert collect.divergence(log_q, ids, log_p, LOGPROB_FLOOR) == pytest.approx(-log_p[3])


class LocalTeacher:
    """A teacher without a server: float64 from the model's own forward."""

    def __init__(self, model: torch.nn.Module, *, full_vocabulary: bool) -> None:
        self.model = model
        self.features = ("full_vocabulary", "candidates") if full_vocabulary else ("candidates",)

    def __enter__(self) -> LocalTeacher:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def info(self) -> TeacherInfo:
        limits = {"max_sequence_tokens": 128, "max_top_k": 16, "max_candidates": 4096, "max_completions": 2}
        sizes = {"max_request_bytes": 1 << 20, "max_response_bytes": 1 << 20}
        return TeacherInfo("f", "tiny", "t", VOCABULARY, WIDTH, **limits, **sizes, features=self.features)

    def score(self, request: ScoreRequest) -> list[Scores]:
        assert len(request.completions) <= 2
        return [self._one(request, completion) for completion in request.completions]

    def _one(self, request: ScoreRequest, completion) -> Scores:
        prompt = request.prompts[completion.prompt_index]
        rows = _full_rows(self.model, prompt, completion.token_ids)
        count = np.arange(len(rows))
        inside = np.zeros(rows.shape, dtype=bool)
        inside[count, completion.token_ids] = True
        ids = candidate_logprob = None
        if request.options.top_k == "all":
            values = rows[:, :VOCABULARY]
            inside[:, :VOCABULARY] = True
        else:
            ids = np.argsort(-rows[:, :VOCABULARY])[:, : request.options.top_k].astype(np.int32)
            values = np.take_along_axis(rows, ids, 1)
            np.put_along_axis(inside, ids, True, 1)
            bounds = completion.candidates.row_offsets
            wanted = [completion.candidates.ids[bounds[n] : bounds[n + 1]] for n in count]
            candidate_logprob = np.concatenate([rows[n, wanted[n]] for n in count]).astype(np.float32)
            for n in count:
                inside[n, wanted[n]] = True
        tail = np.log(np.where(inside, 0.0, np.exp(rows)).sum(1) + 1e-300).clip(LOGPROB_FLOOR)
        return Scores(
            id=completion.id,
            positions=(len(prompt) + count).astype(np.int32),
            token_logprob=rows[count, completion.token_ids].astype(np.float32),
            log_tail=tail.astype(np.float32),
            topk_ids=ids,
            topk_logprob=values.astype(np.float32),
            candidate_logprob=candidate_logprob,
        )


def _full_rows(model: torch.nn.Module, prompt: np.ndarray, completion: np.ndarray) -> np.ndarray:
    ids = torch.as_tensor(np.concatenate([prompt, completion]), dtype=torch.long)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().numpy()
    return _log_softmax(logits)


@pytest.fixture(scope="module")
def student():
    return tiny_model("qwen3", seed=1, scale=2.0)


@pytest.fixture(scope="module")
def teacher():
    return tiny_model("llama", seed=2, scale=2.0)


def _rollouts() -> list[Rollout]:
    rng = np.random.default_rng(3)
    rollouts = []
    for uid, (prompt, length) in enumerate(((3, 9), (5, 1), (2, 14))):
        tokens = rng.integers(2, VOCABULARY, prompt + length).astype(np.int32)
        zeros = np.zeros(length, np.float32)
        rollouts.append(Rollout(uid, Prompt(uid, tokens[:prompt]), tokens[prompt:], "length", zeros, zeros))
    return rollouts


def test_view_gives_each_token_the_divergence_of_the_two_models(student, teacher):
    tokenizer = tiny_tokenizer(VOCABULARY)
    client = LocalTeacher(teacher, full_vocabulary=True)
    rollouts = _rollouts()
    views = collect.view(rollouts, student, tokenizer, client, [True, False, None])
    assert [view.correct for view in views] == [True, False, None]
    for view, rollout in zip(views, rollouts, strict=True):
        log_q = _full_rows(student, rollout.prompt.token_ids, rollout.token_ids)
        log_p = _full_rows(teacher, rollout.prompt.token_ids, rollout.token_ids)
        q, p = np.exp(log_q), np.exp(log_p)
        ids = rollout.token_ids
        # columns beyond the tokenizer are one outcome
        merged_q = np.column_stack([q[:, :VOCABULARY], q[:, VOCABULARY:].sum(1)])
        merged_p = np.column_stack([p[:, :VOCABULARY], p[:, VOCABULARY:].sum(1)])
        expected = (merged_q * np.log(merged_q / merged_p)).sum(1)
        assert [t.kl_nats for t in view.tokens] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        n = np.arange(len(ids))
        assert [t.student_probability for t in view.tokens] == pytest.approx(q[n, ids], rel=1e-4)
        assert [t.teacher_probability for t in view.tokens] == pytest.approx(p[n, ids], rel=1e-4)
        best = np.sort(p[:, :VOCABULARY], axis=1)[:, ::-1][:, :5]
        assert [[c.probability for c in t.teacher_top] for t in view.tokens] == pytest.approx(best, rel=1e-4)


def test_view_without_the_full_vocabulary_gives_a_lower_bound(student, teacher, monkeypatch):
    monkeypatch.setattr(collect, "TOP_K", 16)
    tokenizer, rollouts = tiny_tokenizer(VOCABULARY), _rollouts()
    verdicts = [None] * len(rollouts)
    exact = collect.view(rollouts, student, tokenizer, LocalTeacher(teacher, full_vocabulary=True), verdicts)
    bounded = collect.view(rollouts, student, tokenizer, LocalTeacher(teacher, full_vocabulary=False), verdicts)
    for whole, part in zip(exact, bounded, strict=True):
        for a, b in zip(whole.tokens, part.tokens, strict=True):
            assert 0 < b.kl_nats < a.kl_nats
            assert [c.text for c in b.teacher_top] == [c.text for c in a.teacher_top]
            assert b.teacher_probability == a.teacher_probability


def test_token_texts_join_to_the_decoded_whole():
    tokenizer = tiny_tokenizer(400)
    for text in ("the quick brown fox 12+34=46 " * 30, "plain", " leading and  double"):
        ids = tokenizer(text)["input_ids"]
        texts = collect.token_texts(tokenizer, ids)
        assert len(texts) == len(ids)
        assert "".join(texts) == text


def test_token_texts_show_a_split_character_once_it_is_whole():
    tokenizer = tiny_tokenizer(400)
    ids = tokenizer("aé€b")["input_ids"]
    texts = collect.token_texts(tokenizer, ids)
    assert len(texts) == len(ids) == 7  # a, two bytes, three bytes, b
    shown = [text for text in texts if not text.startswith("⟨")]
    assert shown == ["a", "é", "€", "b"]


@given(st.floats(0, 20, allow_nan=False), st.floats(0, 20, allow_nan=False))
def test_a_larger_divergence_never_has_a_lower_level(a, b):
    low, high = sorted((a, b))
    assert 0 <= html.level(low) <= html.level(high) <= len(html.LEVEL_STARTS_NATS)


def test_levels_start_where_the_legend_says():
    assert html.level(0.0) == 0
    for step, start in enumerate(html.LEVEL_STARTS_NATS, start=1):
        assert html.level(start) == step
        assert html.level(start * 0.999) == step - 1


def _token(text: str, kl: float = 0.2) -> TokenView:
    return TokenView(text, kl, 0.25, 0.5, (Choice(text, 0.25), Choice(NASTY, 0.2)), (Choice("b", 0.5),))


def _report(**changes) -> Report:
    sides = (
        CompletionView((_token("a"), _token(NASTY, 1.5)), finished=False, correct=False),
        CompletionView((_token("b\n", 0.0), _token("<|end|>", 1e-5)), finished=True, correct=True),
    )
    values = {
        "title": NASTY,
        "subtitle": NASTY,
        "sides": ("before" + NASTY, "after"),
        "figures": (Figure(NASTY, NASTY, NASTY),),
        "charts": (Chart(NASTY, NASTY, (Series(NASTY, (0, 1), (0.1, 0.9)), Series(NASTY, (0, 1), (1, 1), True))),),
        "comparisons": (Comparison(NASTY, NASTY, sides),),
        "notes": (NASTY,),
        "config_yaml": NASTY,
        "facts": {NASTY: NASTY},
    }
    return Report(**{**values, **changes})


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data):
        self.texts.append((self._open, data))


def test_no_text_of_a_report_becomes_markup():
    page = _Page(html.render(_report()))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    data = next(text for tag, text in page.texts if tag == "script" and text.startswith("{"))
    embedded = json.loads(data)
    assert embedded["strings"][embedded["tokens"][1][0]] == NASTY
    assert [row[1] for row in embedded["tokens"]] == [0.2, 1.5, 0.0, 1e-5]


def test_the_page_needs_nothing_else():
    text = html.render(_report(**dict.fromkeys(("title", "subtitle", "config_yaml"), "x")))
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(|<link|<iframe|fetch\(|XMLHttpRequest", text)
    assert not any({"src", "href", "srcset"} & attrs.keys() for _, attrs in _Page(text).elements)


def test_every_token_refers_to_its_own_numbers():
    page = _Page(html.render(_report()))
    spans = [attrs for tag, attrs in page.elements if tag == "span" and "data-n" in attrs]
    assert [span["data-n"] for span in spans] == ["0", "1", "2", "3"]
    assert [span["class"].split()[1] for span in spans] == [f"k{html.level(kl)}" for kl in (0.2, 1.5, 0.0, 1e-5)]
    assert "end" in spans[3]["class"].split()
    assert not any("end" in span["class"].split() for span in spans[:3])


def test_a_comparison_needs_one_completion_per_side():
    with pytest.raises(ValueError, match="2 completions for 1 sides"):
        html.render(_report(sides=("only",)))


def test_write_leaves_the_old_page_when_the_new_one_fails(tmp_path: Path):
    path = tmp_path / "report.html"
    html.write(_report(title="first"), path)
    before = path.read_text()
    with pytest.raises(ValueError, match="sides"):
        html.write(_report(sides=()), path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
@example(879_609.999_999_999_9, 1e-6)
def test_ticks_are_few_round_and_inside(low, span):
    marks = curves.ticks(low, low + span)
    assert 1 <= len(marks) <= 8
    assert marks == sorted(marks)
    assert all(low - span * 1e-6 <= mark <= low + span * (1 + 1e-6) for mark in marks)


def test_log_ticks_thin_out_over_many_decades():
    assert curves.ticks(0.01, 0.3, log=True) == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2])
    assert curves.ticks(1e-6, 1.0, log=True) == pytest.approx([10.0**n for n in range(-6, 1)])


LINES = [
    {"step": 0, "eval_accuracy": 0.1},
    {"step": 1, "loss": 0.5},
    {"step": 2, "loss": None},
    {"step": 3, "loss": 0.25},
    {"step": 3, "eval_accuracy": 0.6},
]


def test_charts_come_from_the_metrics_and_skip_what_was_not_finite():
    accuracy, loss = curves.from_metrics(LINES, divergence_name="nats", teacher=0.9)
    assert accuracy.series[0].steps == (0, 3)
    assert accuracy.series[0].values == (0.1, 0.6)
    assert accuracy.series[1].reference
    assert accuracy.series[1].values == (0.9, 0.9)
    assert loss.series[0].steps == (1, 3)
    assert loss.log_y
    (only_loss,) = curves.from_metrics(LINES[1:4], divergence_name="nats")
    assert only_loss.title == loss.title
    assert not curves.from_metrics([{"step": 1, "loss": -0.1}], divergence_name="nats")[0].log_y


def test_svg_places_values_in_proportion():
    chart = Chart("t", "y", (Series("a", (0, 5, 10), (0.0, 0.5, 1.0)),), share=True)
    points = re.search(r'points="([^"]+)"', str(curves.svg(chart)))[1]
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, point.split(","))) for point in points.split()]
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert y2 < y0
    log = Chart("t", "y", (Series("a", (0, 1, 2), (0.01, 0.1, 1.0)),), log_y=True)
    heights = [float(p.split(",")[1]) for p in re.search(r'points="([^"]+)"', str(curves.svg(log)))[1].split()]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)


def test_png_is_written(tmp_path: Path):
    charts = curves.from_metrics(LINES, divergence_name="nats", teacher=0.9)
    curves.png(charts, tmp_path / "curve.png")
    head = (tmp_path / "curve.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    assert width > 2 * height


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What student-train leaves behind, with a student whose greedy completions are known from transformers."""
    folder = tmp_path_factory.mktemp("run")
    before = save_tiny(folder / "before", "qwen3", seed=1)
    save_tiny(folder / "final", "qwen3", seed=4)
    lines = [{"prompt": "the fox", "answer": "nothing says this"}, {"prompt": "12 + 3 =", "answer": "nor this"}]
    (folder / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = TrainConfig.model_validate(
        {
            "student": {"model": str(before)},
            "teacher": {"url": ["grpc://127.0.0.1:1"], "top_k": "all"},
            "data": {"source": str(folder / "problems.jsonl")},
            "rollout": {"max_new_tokens": 6},
        }
    )
    (folder / "config.yaml").write_text(dump_yaml(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return folder


def test_compare_shows_what_each_checkpoint_writes_greedily(finished_run: Path, teacher):
    client = LocalTeacher(teacher, full_vocabulary=True)
    tokenizer = tiny_tokenizer(VOCABULARY)
    prompt_ids = np.array(tokenizer("the fox")["input_ids"], np.int32)
    checkpoints = [compare.load(finished_run / name, 6) for name in ("before", "final")]
    (result,) = compare.compare(checkpoints, [Prompt(0, prompt_ids, "the fox", "x")], "exact_match", client)
    for checkpoint, completion in zip(checkpoints, result.completions, strict=True):
        ids = torch.as_tensor(prompt_ids, dtype=torch.long)[None]
        with torch.no_grad():
            for _ in range(6):
                chosen = checkpoint.student.model(input_ids=ids).logits[:, -1, :VOCABULARY].argmax(-1, keepdim=True)
                ids = torch.cat([ids, chosen], dim=1)
                if int(chosen) == tokenizer.eos_token_id:
                    break
        assert "".join(t.text for t in completion.tokens) == tokenizer.decode(ids[0, len(prompt_ids) :])
        assert completion.correct is False


def test_the_command_writes_the_report_of_a_run(finished_run: Path, teacher, monkeypatch, capsys):
    monkeypatch.setattr(command, "TeacherClient", lambda *_, **__: LocalTeacher(teacher, full_vocabulary=True))
    monkeypatch.setenv("PRECEPTOR_REPORT_API_KEY", "k")  # not STUDENT_…, where student-train would refuse it
    assert command.main(["--run", str(finished_run), "--teacher-url", "grpc://127.0.0.1:1"]) == 0
    path = finished_run / "report.html"
    assert capsys.readouterr().out.strip() == str(path)
    page = _Page(path.read_text())
    assert sum(attrs.get("class") == "card" for _, attrs in page.elements) == 2
    assert sum(tag == "svg" for tag, _ in page.elements) == 2
    assert "max_new_tokens: 6" in "".join(text for tag, text in page.texts if tag == "pre")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--run", "nowhere", "--teacher-url", "grpc://127.0.0.1:1"], "nowhere"),
        (["--teacher-url", "grpc://127.0.0.1:1"], "run"),
        (["--rum", "x"], "run"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, says, capsys):
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error


def test_what_a_run_has_no_problems_for_is_named() -> None:
    def run_of(**data: object) -> TrainConfig:
        sections = {"student": {"model": "s"}, "teacher": {"url": "grpc://t:1"}, "data": data}
        return TrainConfig.model_validate(sections)

    assert command._problems(run_of(source="a.jsonl")).source == "a.jsonl"
    with pytest.raises(ValueError, match=r"eval\.data: not set, and the run was trained on several domains"):
        command._problems(run_of(domains=[{"name": "a", "source": "a.jsonl"}]))
    with pytest.raises(ValueError, match=r"eval\.data: not set, and the run was trained on packed text"):
        command._problems(run_of(preset="fineweb-edu"))
