"""`student-train` with two real teachers: what they do to a run, and what happens when one of them goes away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from tinymodels import save_tiny
from training import PROMPTS, TeacherProcess, arguments, assert_same_bits, finish, metrics, trainer, wait_until, weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("several")
    save_tiny(place / "left", seed=1, scale=2.5)
    save_tiny(place / "right", seed=5, scale=2.5)
    save_tiny(place / "student", seed=2)
    (place / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return place


@pytest.fixture(scope="module")
def served(place) -> Iterator[dict[str, TeacherProcess]]:
    teachers = {
        name: TeacherProcess(place / f"serve_{name}", place / name, "--reference") for name in ("left", "right")
    }
    try:
        for one in teachers.values():
            one.begin()
        for one in teachers.values():
            one.wait()
        yield teachers
    finally:
        for one in teachers.values():
            one.stop()


@pytest.fixture
def run(place, served, tmp_path) -> Callable[..., tuple[int, Path, str]]:
    """(exit code, output directory, what it said)."""

    def complete(
        name: str,
        *more: str,
        before: Callable[[Path], None] = lambda _: None,
        with_prompts: bool = True,
        **urls: str,
    ) -> tuple[int, Path, str]:
        argv = arguments(tmp_path / name, place / "student", place / "prompts.txt", "")
        unwanted = ("--teacher-url", "teacher.", *(() if with_prompts else ("--prompts",)))
        argv = [a for a in argv if not a.startswith(unwanted)]
        for one, process in served.items():
            argv += [
                f"teachers.{one}.url={urls.get(one, process.url)}",
                f"teachers.{one}.top_k=8",
                f"teachers.{one}.timeout_s=2",
            ]
        log = tmp_path / f"{name}.log"
        process = trainer([*argv, *more], log)
        before(tmp_path / name)
        return finish(process, log), tmp_path / name, log.read_text()

    return complete


def close(a: Path, b: Path) -> float:
    x, y = (torch.cat([t.reshape(-1) for t in weights(d / "final").values()]).double() for d in (a, b))
    return float((x - y).norm() / x.norm())


def test_a_mixture_is_learnt_from_alike_after_a_stop_and_on_two_processes(run) -> None:
    mixture = ["teaching.by=mixture", "teachers.left.weight=3", "loss.support=union"]
    code, whole, said = run("whole", *mixture)
    assert code == 0, said
    for line in metrics(whole):
        for name in ("left", "right"):
            assert line[f"{name}/tokens"] == line["tokens"]
            assert 0 < line[f"{name}/teacher_mass"] <= 1
            assert line[f"{name}/seconds"] > 0
        assert line["left/delta"] != line["right/delta"]
    run("parts", *mixture, "--steps=4")
    assert run("parts", *mixture)[0] == 0
    assert_same_bits(whole / "final", run("parts", *mixture)[1] / "final")
    assert run("ranks", *mixture, "--num-processes=2")[0] == 0
    assert close(whole, whole.with_name("ranks")) < 1e-5


def test_one_dead_teacher_of_two_ends_in_a_checkpoint_with_its_name_and_another_is_refused(run, served) -> None:
    by = ["teaching.by=sample", "--steps=8"]
    code, whole, said = run("whole", *by)
    assert code == 0, said
    lines = metrics(whole)
    assert all(line["left/tokens"] + line["right/tokens"] == line["tokens"] for line in lines)
    assert sum(line["left/tokens"] for line in lines) * sum(line["right/tokens"] for line in lines) > 0

    def kill(run_dir: Path) -> None:
        wait_until(lambda: len(metrics(run_dir)) >= 2, what="two steps")
        served["right"].kill()

    code, parts, said = run("parts", *by, before=kill)
    served["right"].start()
    assert code == 75, said
    assert f"no teacher right at {served['right'].url} for" in said.splitlines()[-1]
    code, _, said = run("parts", *by, right=served["left"].url)
    assert code == 2
    assert "teachers.right: this run began with teacher" in said.splitlines()[-1]
    assert run("parts", *by)[0] == 0
    assert_same_bits(whole / "final", parts / "final")


def test_each_domain_has_its_teacher_with_a_top_k_of_its_own(run, place, tmp_path) -> None:
    """One gives 8 ids and the other its whole vocabulary: they never meet in one micro-batch."""
    (tmp_path / "more.txt").write_text("fox\nlazy dog\n")
    domains = [
        {"name": "left", "source": str(place / "prompts.txt")},
        {"name": "words", "source": f"{tmp_path}/more.txt"},
    ]
    config = tmp_path / "domains.yaml"
    config.write_text(yaml.safe_dump({"data": {"domains": domains}}))
    more = ["teachers.right.domains=words", "teachers.right.top_k=all", "loss.support=union", f"--config={config}"]
    code, run_dir, said = run("domains", *more, with_prompts=False)
    assert code == 0, said
    lines = metrics(run_dir)
    assert all(line["left/tokens"] + line["right/tokens"] == line["tokens"] for line in lines)
    both = [line for line in lines if line["left/tokens"] * line["right/tokens"]]
    assert both
    for line in both:
        share = line["left/tokens"] / line["tokens"]
        for name in ("delta", "teacher_mass", "student_mass"):
            mixed = share * line[f"left/{name}"] + (1 - share) * line[f"right/{name}"]
            assert line[name] == pytest.approx(mixed, rel=1e-5)
        assert line["right/teacher_mass"] > line["left/teacher_mass"]
    code, _, said = run("refused", *more, "teachers.right.domains=law", with_prompts=False)
    assert code == 2
    assert "teachers.right.domains: the data has no 'law', expected one of left, words" in said.splitlines()[-1]


@pytest.mark.parametrize("strategy", [pytest.param("ddp_sharded", marks=pytest.mark.long), "fsdp2"])
def test_an_average_is_the_same_however_it_is_cut_among_processes(strategy, run) -> None:
    several = ["teaching.by=sample", "optim.ema_decay=0.5"]
    assert run("alone", *several)[0] == 0
    code, cut, said = run("cut", *several, "--num-processes=2", f"train.strategy={strategy}", "--steps=3")
    assert code == 0, said
    assert run("cut", *several)[0] == 0  # goes on from the gathered parts, alone
    for directory in ("final", "ema"):
        a, b = (weights(d / directory) for d in (cut.with_name("alone"), cut))
        x, y = (torch.cat([t.reshape(-1) for t in w.values()]).double() for w in (a, b))
        assert float((x - y).norm() / x.norm()) < 1e-5
