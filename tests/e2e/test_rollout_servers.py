"""Two real rollout servers on the CPU: what they sample against float64 forwards of the trainer's weights as they are
after each update, whole runs with them, and runs in which they or the teacher are killed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rolloutservers
import torch
from onestep import ALONE
from rolloutservers import RolloutServer, recorded, recording_trainer, save_student
from scipy import stats
from training import PROMPTS, TeacherProcess, arguments, finish, metrics, wait_until

from student_trainer import student as students
from student_trainer.config import TrainConfig
from student_trainer.rollout.base import RolloutError
from student_trainer.rollout.servers.engine import ServersSampler
from student_trainer.types import Prompt, Rollout

V, W = 120, 128
TOLERANCE = 2e-3  # nats
STEPS, BATCH, GROUP = 6, 4, 2

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("vllm")
    place = tmp_path_factory.mktemp("servers")
    save_student(place / "student", seed=2)
    save_student(place / "served", seed=7)  # what the servers start with is not what the student is
    save_student(place / "teacher", seed=1)
    (place / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return place


@pytest.fixture(scope="module")
def fleet(place: Path) -> Iterator[list[RolloutServer]]:
    """Started side by side, shared by all tests; a test that kills one starts it again."""
    servers = [RolloutServer(place / name, place / "served") for name in ("a", "b")]
    try:
        for server in servers:
            server.begin()
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.stop()


@pytest.fixture(scope="module")
def teacher(place: Path) -> Iterator[TeacherProcess]:
    served = TeacherProcess(place / "teach", place / "teacher")
    served.begin()
    try:
        yield served
    finally:
        served.stop()


def settings(place: Path, fleet: list[RolloutServer], patience_s: float = 60.0, **rollout: Any) -> TrainConfig:
    options = {"urls": [server.url for server in fleet], "attempt_timeout_s": patience_s}
    return TrainConfig.model_validate(
        {
            "student": {"model": str(place / "student"), "device": "cpu"},
            "data": {"source": "unread"},
            "teacher": {"url": "grpc://unread:1"},
            "rollout": {"engine": "vllm-server", "server": options, "max_new_tokens": 12, **rollout},
        }
    )


@torch.no_grad()
def log_q(model: Any, rollout: Rollout) -> np.ndarray:
    """float64 [N, W], T = 1, by transformers itself."""
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]]).long()
    try:
        logits = model.double()(ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
    finally:
        model.float()
    return logits.log_softmax(-1).numpy()


def behaviour(log_q_W: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """float64 [V] by the definition."""
    z = log_q_W[:V] / temperature
    p = np.exp(z - z.max())
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0.0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0.0
    return p / p.sum()


def prompts(count: int) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [Prompt(i, rng.integers(2, V, 2 + i % 11).astype(np.int32)) for i in range(count)]


def test_after_each_update_both_servers_sample_from_the_trainers_weights(
    place: Path, fleet: list[RolloutServer]
) -> None:
    policy = {"temperature": 0.8, "top_k": 30, "top_p": 0.9}
    config = settings(place, fleet, **policy)
    student = students.load(config.student, torch.device("cpu"))
    engine = ServersSampler(config, student, ALONE, longest_tokens=60)
    asked = [prompt for prompt in prompts(6) for _ in range(2)]
    try:
        for version in (0, 3, 4, 9):
            if version:
                generator = torch.Generator().manual_seed(version)
                with torch.no_grad():
                    for parameter in student.model.parameters():
                        parameter.add_(0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator))
            engine.update(version)
            figures = engine.figures()
            assert figures["handover_gap"] <= TOLERANCE
            assert figures["rollout_servers"] == 2
            found = engine.sample(asked, range(100, 112), keep_top_k=4)
            again = engine.sample(asked[::-1], range(111, 99, -1), keep_top_k=4)[::-1]
            for rollout, same in zip(found, again, strict=True):
                truth = log_q(student.model, rollout)
                at = np.arange(rollout.num_tokens), rollout.token_ids
                np.testing.assert_allclose(rollout.full_logprob, truth[at], atol=TOLERANCE)
                b = np.log([behaviour(row, **policy)[t] for row, t in zip(truth, rollout.token_ids, strict=True)])
                np.testing.assert_allclose(rollout.behaviour_logprob, b, atol=2 * TOLERANCE)
                assert rollout.token_ids.max() < V
                assert rollout.versions is not None
                assert set(rollout.versions) == {version}
                kept = np.sort(np.take_along_axis(truth, rollout.student_topk_ids.astype(int), 1), 1)
                np.testing.assert_allclose(kept, np.sort(truth[:, :V], 1)[:, -4:], atol=TOLERANCE)
                assert (rollout.finish == "eos") == (rollout.token_ids[-1] in student.eos_token_ids)
                assert np.array_equal(rollout.token_ids, same.token_ids), (
                    "a sample is a function of (weights, seed, uid)"
                )
    finally:
        engine.close()


def test_sampled_tokens_have_the_policys_distribution(place: Path, fleet: list[RolloutServer]) -> None:
    config = settings(place, fleet, max_new_tokens=1)
    student = students.load(config.student, torch.device("cpu"))
    engine = ServersSampler(config, student, ALONE, longest_tokens=60)
    prompt, count = prompts(1)[0], 500
    try:
        engine.update(0)
        tokens = [int(r.token_ids[0]) for r in engine.stream([prompt] * count, range(count))]
    finally:
        engine.close()
    one = Rollout(0, prompt, np.array([2], dtype=np.int32), "length", *[np.zeros(1, dtype=np.float32)] * 2)
    expected = behaviour(log_q(student.model, one)[0], 1.0, 0, 1.0) * count
    observed = np.bincount(tokens, minlength=V)
    common = expected >= 5
    cells = np.append(observed[common], observed[~common].sum()), np.append(expected[common], expected[~common].sum())
    assert stats.chisquare(*cells).pvalue > 1e-4
    assert observed.size == V


def test_a_server_of_another_student_is_refused(place: Path, fleet: list[RolloutServer], tmp_path: Path) -> None:
    rolloutservers.tinymodels.save_tiny(tmp_path / "wider", "qwen3", logit_width=136, **rolloutservers.SHAPE)
    config = settings(tmp_path, fleet)
    config = config.model_copy(update={"student": config.student.model_copy(update={"model": str(tmp_path / "wider")})})
    student = students.load(config.student, torch.device("cpu"))
    with pytest.raises(ValueError, match="whose head has 128 columns; expected the student's 136"):
        ServersSampler(config, student, ALONE, longest_tokens=60)
    config = settings(place, fleet)
    student = students.load(config.student, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"make up to 500 tokens, rollout server .* takes at most 128"):
        ServersSampler(config, student, ALONE, longest_tokens=500)


def test_logprobs_that_are_not_the_trainers_end_the_run(place: Path, fleet: list[RolloutServer]) -> None:
    """Weights that a server holds otherwise than the trainer does: here, by a trainer that computes with more."""
    config = settings(place, fleet)
    student = students.load(config.student, torch.device("cpu"))
    engine = ServersSampler(config, student, ALONE, longest_tokens=60)
    hook = student.model.model.norm.register_forward_hook(lambda module, args, output: 1.1 * output)
    try:
        with pytest.raises(RolloutError, match=r"rollout server .* does not compute what the trainer does"):
            engine.update(0)
    finally:
        hook.remove()
        engine.close()


def drill(place: Path, fleet: list[RolloutServer], teacher: TeacherProcess, folder: Path, kills: list[str]) -> None:
    """A run in which, a step after the other, what `kills` names is killed and started again while it goes on: of the
    servers one that serves, whether or not the other is back."""
    steps = max(STEPS, 3 * len(kills))
    log, records, run_dir = folder / "run.log", folder / "records.jsonl", folder / "run"
    teacher.wait()
    argv = arguments(
        run_dir, place / "student", place / "prompts.txt", teacher.url, f"--steps={steps}",
        "rollout.engine=vllm-server",
        f"rollout.server.urls={[server.url for server in fleet]}", f"rollout.group_size={GROUP}",
        f"train.batch_size={BATCH}", "train.reference=false", "rollout.server.timeout_s=600",
        "rollout.server.attempt_timeout_s=60", "checkpoint.save_every=0",
    )  # fmt: skip
    process = recording_trainer(argv, log, records)
    killed = 0
    for number, what in enumerate(kills):
        seen = len(recorded(records))
        wait_until(
            lambda seen=seen: len(recorded(records)) > seen or process.exitcode is not None,
            timeout_s=900,
            what="a step",
        )
        assert process.exitcode is None, f"ended before kill {number}:\n{log.read_text()}"
        serving = [server for server in fleet if server.serves()] if "server" in what else []
        servers = serving if "all" in what else serving[:1]
        for server in servers:
            server.kill()
            server.begin()
        if "teacher" in what:
            teacher.kill()
            teacher.start()
        killed += bool(servers) or "teacher" in what
    assert killed == len(kills)
    for server in fleet:
        server.wait()
    assert finish(process, log, timeout_s=1800) == 0, log.read_text()
    used = recorded(records)
    assert Counter(line["uid"] for line in used) == Counter(range(steps * BATCH * GROUP)), "each once, none left out"
    assert all(line["versions"] == [line["step"]] for line in used), "of the weights of its step"
    lines = [line for line in metrics(run_dir) if "handover_gap" in line]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert max(line["handover_gap"] for line in lines) <= TOLERANCE


def test_a_run_loses_nothing_when_all_servers_and_the_teacher_are_killed(
    place: Path, fleet: list[RolloutServer], teacher: TeacherProcess, tmp_path: Path
) -> None:
    drill(place, fleet, teacher, tmp_path, ["all servers and teacher"])


@pytest.mark.long
def test_a_run_loses_nothing_in_ten_kills(
    place: Path, fleet: list[RolloutServer], teacher: TeacherProcess, tmp_path: Path
) -> None:
    kills = ["all servers and teacher", *["server", "teacher", "server and teacher"] * 3]
    drill(place, fleet, teacher, tmp_path, kills)


def test_steps_are_sampled_ahead_while_others_are_learned_from(
    place: Path, fleet: list[RolloutServer], teacher: TeacherProcess, tmp_path: Path
) -> None:
    """Weights come from a copy, while the trained ones move on."""
    log, records = tmp_path / "run.log", tmp_path / "records.jsonl"
    teacher.wait()
    steps, stale = 8, 2
    argv = arguments(
        tmp_path / "run", place / "student", place / "prompts.txt", teacher.url, f"--steps={steps}",
        "rollout.engine=vllm-server", f"rollout.server.urls={[server.url for server in fleet]}",
        f"train.batch_size={BATCH}", "train.reference=false", "train.schedule=async", f"train.max_staleness={stale}",
        "checkpoint.save_every=0",
    )  # fmt: skip
    assert finish(recording_trainer(argv, log, records), log, timeout_s=600) == 0, log.read_text()
    used = recorded(records)
    assert Counter(line["uid"] for line in used) == Counter(range(steps * BATCH))
    assert all(line["step"] - stale <= version <= line["step"] for line in used for version in line["versions"])
    assert any(version < line["step"] for line in used for version in line["versions"]), "nothing was sampled ahead"
    lines = [line for line in metrics(tmp_path / "run") if "handover_gap" in line]
    assert len(lines) == steps
    assert max(line["handover_gap"] for line in lines) <= TOLERANCE


def test_all_servers_gone_is_a_checkpoint_and_exit_code_75(
    place: Path, fleet: list[RolloutServer], teacher: TeacherProcess, tmp_path: Path
) -> None:
    """Last in the file: it leaves the servers dead."""
    log, records = tmp_path / "run.log", tmp_path / "records.jsonl"
    teacher.wait()
    argv = arguments(
        tmp_path / "run", place / "student", place / "prompts.txt", teacher.url, "--steps=10000",
        "rollout.engine=vllm-server", f"rollout.server.urls={[server.url for server in fleet]}",
        "train.reference=false", "rollout.server.timeout_s=3", "checkpoint.save_every=0",
    )  # fmt: skip
    process = recording_trainer(argv, log, records)
    wait_until(lambda: len(recorded(records)) > 8 or process.exitcode is not None, timeout_s=900, what="two steps")
    for server in fleet:
        server.kill()
    assert finish(process, log, timeout_s=600) == 75, log.read_text()
    said = log.read_text()
    assert f"no rollout server at {fleet[0].url}, {fleet[1].url} for" in said
    assert "run the same command again to go on" in said
    assert list((tmp_path / "run").glob("checkpoints/*")) or list((tmp_path / "run").glob("*checkpoint*"))
