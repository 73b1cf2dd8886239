"""`student-train`: reads the configuration, starts what must be started, runs, and turns every end into one line and
an exit code: 0 done; 1 training failed; 2 the command, a file or the teacher does not fit; 75 the teacher or the
rollout servers stayed away (the same command goes on); 130 and 143 stopped by SIGINT and SIGTERM (likewise).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from student_trainer.config import TrainConfig
from student_trainer.planning.config import PlanConfig
from student_trainer.teachers.config import prefix
from teacher_api import settings
from teacher_api.errors import TeacherError

if TYPE_CHECKING:
    from student_trainer.distributed import Distributed, RankLost
    from student_trainer.guards import StopSignals
    from student_trainer.run import Run
    from student_trainer.teachers.past import PastTeachers

PROGRAM = "student-train"
DESCRIPTION = """Trains a student on its own samples, scored by a teacher that runs elsewhere.

Exit codes: 0 done; 1 training failed; 2 the command, a file or the teacher does not fit; 75 the teacher was away past
teacher.timeout_s, or all rollout servers past rollout.server.timeout_s; 130 and 143 stopped by SIGINT and SIGTERM.
After 75, 130 and 143 the same command goes on."""
FAILED, UNUSABLE, GONE = 1, 2, 75
SHORTCUTS = {
    "--teacher-url": "teacher.url",
    "--teacher-model": "teacher.model",
    "--student": "student.model",
    "--prompts": "data.source",
    "--output-dir": "train.output_dir",
    "--steps": "train.steps",
    "--num-processes": "train.num_processes",
    "--push-to-hub": "checkpoint.push_to_hub",
}
SWITCHES = {
    "print_config": "print the resolved configuration as YAML and exit",
    "print_prompts": "print the prompts as the student is shown them, a JSON line each, for teacher-generate, and exit",
    "dry_run": "load everything, shake hands, score one sequence, measure the memory of the largest micro-batch and "
    "the time of a step, print the plan and exit; with plan.device_memory_gib plan for another machine; writes nothing",
    "accept_new_teacher": "go on with a teacher other than the one this run began with",
    "accept_new_prompts": "go on with prompts other than those this run was trained on so far",
}
COLLECTIVE_MARGIN_S = 1800.0
"""Added to the teacher's budget: how long ranks wait for one another (evaluation and checkpoints on the main rank)."""
LAUNCHER_SPEAKS_S = 5.0
"""What our own launcher is given to say which process of the run ended, before the others say whom they miss."""


@dataclass(frozen=True, slots=True)
class Command:
    config: TrainConfig
    arguments: tuple[str, ...]
    dry_run: bool


def main() -> NoReturn:
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs the command line and returns its exit code."""
    try:
        config, extras = settings.load(
            TrainConfig,
            arguments,
            prog=PROGRAM,
            description=DESCRIPTION,
            env_prefix="STUDENT_",
            shortcuts=SHORTCUTS,
            switches=SWITCHES,
        )
    except settings.SettingsError as error:
        return _say(error, UNUSABLE)
    if "print_config" in extras:
        print(settings.dump_yaml(config), end="")
        return 0
    if "print_prompts" in extras:
        return _print_prompts(config)
    if "accept_new_teacher" in extras:
        config = config.accepting_new_teachers()
    if "accept_new_prompts" in extras:
        accepting = config.checkpoint.model_copy(update={"accept_new_prompts": True})
        config = config.model_copy(update={"checkpoint": accepting})
    if config.plan != PlanConfig() and "dry_run" not in extras:
        return _say("plan: got options without --dry-run, expected none: they describe what it plans for", UNUSABLE)
    if config.plan.is_described:
        return _plan(config)
    return _start(Command(config, tuple(arguments), "dry_run" in extras))


def _plan(config: TrainConfig) -> int:
    """For a machine that is described by options."""
    from student_trainer.planning import machine

    try:
        print("\n".join(machine.plan(config)))
    except ValueError as error:
        return _say(error, UNUSABLE)
    return 0


def _print_prompts(config: TrainConfig) -> int:
    from student_trainer import student
    from student_trainer.data.export import prompt_lines

    try:
        for line in prompt_lines(config.data, student.load_tokenizer(config.student)):
            print(line)
    except ValueError as error:
        return _say(error, UNUSABLE)
    return 0


def _start(command: Command) -> int:
    """One process, or a launcher of several; a local teacher around either."""
    from student_trainer import distributed, launch

    try:
        if distributed.under_launcher():
            _refuse_another_number(command.config)
            return _rank(command, launch.urls_of_launcher())
        num_processes = _num_processes(command.config)
        for rank in range(num_processes):
            distributed.choose_device(command.config.student.device, rank)
        with launch.teachers(command.config.all_teachers) as urls:
            if num_processes > 1:
                return launch.run_ranks(num_processes, command.arguments, urls)
            return _rank(command, urls)
    except ValueError as error:
        return _say(error, UNUSABLE)


def _rank(command: Command, urls: Mapping[str, str]) -> int:
    """This process' part of the run, with the teachers at `urls`; none: they are to be found or started."""
    from student_trainer import distributed, guards, launch, plan
    from student_trainer.checkpoint import CheckpointError
    from student_trainer.rollout.base import RolloutError
    from student_trainer.run import prepare, require_alike
    from student_trainer.teachers.past import PastTeachers

    config, stop = command.config, guards.StopSignals()
    with contextlib.ExitStack() as stack:
        try:
            dist = distributed.join(config.student.device, _outage_s(config) + COLLECTIVE_MARGIN_S)
            stack.callback(dist.close)
            distributed.set_arithmetic(config.train.threads, reference=config.train.reference)
            urls = urls or _shared_urls(config, dist, stack)
            past = PastTeachers(
                config.all_teachers, Path(config.train.output_dir), launch.local_teacher, is_main=dist.is_main
            )
            stack.callback(past.close)
            urls = {**urls, **_past_urls(config, dist, past)}
            stack.enter_context(stop.installed())
            with guards.told_once(dist, _exit_code):
                prepared = prepare(config, dist, urls, stop, past)
                stack.callback(prepared.close)
            with guards.told_once(dist, _exit_code):
                require_alike(prepared)
            with guards.told_once(dist, _exit_code):
                prepared.spread()
            if command.dry_run:
                with guards.told_once(dist, _exit_code):
                    scored = plan.try_once(prepared)
                took, speed = plan.measured(prepared), plan.timed(prepared)
                if dist.is_main:
                    more = [f"teacher   {scored}", f"measured  {took}", f"speed     {speed}"]
                    print("\n".join([*plan.describe(prepared), *more]))
                return 0
            for warning in prepared.warnings:
                prepared.console.say(f"warning: {warning}")
            if prepared.step == prepared.config.train.steps:
                prepared.console.say(f"all {prepared.step} steps are done already: {prepared.start.checkpoint}")
            with guards.told_once(dist, _exit_code):
                prepared.begin()
        except guards.FailedElsewhere as error:
            return error.code
        except (ValueError, RolloutError, TeacherError, CheckpointError, *guards.GONE) as error:
            return _say(error, _exit_code(error))
        except distributed.RankLost as error:
            return _say_unless_launcher_does(error, stop)
        return _train(prepared, stop)


def _train(run: Run, stop: StopSignals) -> int:
    from student_trainer import distributed, guards, scoring
    from student_trainer.checkpoint import CheckpointError
    from student_trainer.hub import PushError
    from student_trainer.rollout.base import RolloutError
    from student_trainer.train import train

    try:
        with distributed.noticing_losses():
            train(run)
    except guards.StopRequested:
        return _say(f"stopped after step {run.step}; run the same command again to go on", stop.exit_code)
    except guards.GONE as error:
        return _say(f"stopped after step {run.step}: {error}", GONE)
    except (
        guards.TrainingError,
        RolloutError,
        scoring.ScoreError,
        TeacherError,
        CheckpointError,
        PushError,
        ValueError,  # another teacher than before; an objective of the user's own that gives what it must not
        OSError,  # a disk that refuses a line of metrics
    ) as error:
        return _say(error, FAILED)
    except distributed.RankLost as error:
        return _say_unless_launcher_does(error, stop)
    return 0


def _shared_urls(config: TrainConfig, dist: Distributed, stack: contextlib.ExitStack) -> dict[str, str]:
    """URLs of the teachers under somebody else's launcher: the main rank serves the local ones until `stack` ends, all
    ranks get their URLs."""
    from student_trainer import guards, launch

    local = [prefix(name) for name, one in config.all_teachers.items() if one.model]
    if local and int(os.environ.get("LOCAL_WORLD_SIZE", dist.world)) != dist.world:
        raise ValueError(
            f"{local[0]}.model serves one machine only; for several start teacher-serve and set {local[0]}.url"
        )
    urls: dict[str, str] = {}
    with guards.told_once(dist, _exit_code):
        if dist.is_main:
            urls = stack.enter_context(launch.teachers(config.all_teachers))
    gathered: list[dict[str, str]] = dist.gather(urls)
    return gathered[0]


def _past_urls(config: TrainConfig, dist: Distributed, past: PastTeachers) -> dict[str, str]:
    """URLs of the teachers that are the student's own past, which the main rank serves."""
    import torch

    from student_trainer import checkpoint, guards, launch, resume, student

    def write_initial(path: Path) -> None:
        fresh = student.load(config.student, torch.device("cpu"), seed=config.train.seed)
        checkpoint.export(path, model=fresh.exports()[""], tokenizer=fresh.tokenizer)

    if not past.teachers:
        return {}
    launch.expect_children()
    urls: dict[str, str] = {}
    with guards.told_once(dist, _exit_code):
        start = resume.look(config)
        urls = past.begin(start.state, start.checkpoint, write_initial)
    gathered: list[dict[str, str]] = dist.gather(urls)
    return gathered[0]


def _outage_s(config: TrainConfig) -> float:
    """The longest outage of a teacher that is sat out."""
    return max(one.timeout_s for one in config.all_teachers.values())


def _exit_code(error: Exception) -> int:
    """Of a failure before the first step."""
    from student_trainer.checkpoint import CheckpointError
    from student_trainer.guards import GONE as AWAY
    from student_trainer.rollout.base import RolloutError

    if isinstance(error, AWAY):
        return GONE
    return UNUSABLE if isinstance(error, ValueError | RolloutError | TeacherError | CheckpointError) else FAILED


def _num_processes(config: TrainConfig) -> int:
    """train.num_processes, or one per visible GPU where the student may use them."""
    import torch

    if config.train.num_processes:
        return config.train.num_processes
    if config.student.device not in ("auto", "cuda"):
        return 1
    return max(1, torch.cuda.device_count())


def _refuse_another_number(config: TrainConfig) -> None:
    """A launcher has decided how many processes there are."""
    started = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    if config.train.num_processes and str(config.train.num_processes) != started:
        raise ValueError(
            f"train.num_processes: got {config.train.num_processes}, but the launcher started {started} on this "
            f"machine; expected {started}, or 0"
        )


def _say_unless_launcher_does(error: RankLost, stop: StopSignals) -> int:
    """Our own launcher sees which process ended, says so, and stops this one: it has a while for that."""
    from student_trainer import launch

    if launch.is_ours():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if stop.received:  # it was quicker
            return FAILED
        time.sleep(LAUNCHER_SPEAKS_S)
    return _say(error, FAILED)


def _say(message: object, code: int) -> int:
    """One line on standard error."""
    print(f"{PROGRAM}: {' '.join(str(message).split())}", file=sys.stderr)
    return code
