"""Puts a run together from its configuration and keeps what surrounds the algorithm of train.py: reports, evaluations,
checkpoints. Everything that can be refused is refused in `prepare`, before the first step and before a file is written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from student_trainer import (
    checkpoint,
    evaluation,
    fits,
    guards,
    hub,
    metrics,
    model_card,
    packing_check,
    resume,
)
from student_trainer import student as students
from student_trainer.alarms import Alarms
from student_trainer.average import averages, in_place_of
from student_trainer.config import TrainConfig, steps_of_epochs
from student_trainer.console import Console
from student_trainer.data import Prompts, open_prompts
from student_trainer.data.fixed import Mix
from student_trainer.distributed import Distributed, weights_digest
from student_trainer.losses import build
from student_trainer.losses.base import AnyObjective, Needs
from student_trainer.losses.chunked import default_rows
from student_trainer.optim import Optimizer, StateSource
from student_trainer.parallel.base import Replicated
from student_trainer.parallel.choose import choose
from student_trainer.pipeline import schedule
from student_trainer.pipeline.arrivals import Arrivals
from student_trainer.pipeline.copied import Copied
from student_trainer.pipeline.timeline import Timeline
from student_trainer.rollout import engines
from student_trainer.rollout.base import RolloutEngine
from student_trainer.student import Student
from student_trainer.teachers import privileged, refresh
from student_trainer.teachers.config import prefix
from student_trainer.teachers.panel import Panel, connect
from student_trainer.teachers.past import PastTeachers
from student_trainer.tracking import METRICS_FILE, Tracker, check_installed, open_tracing, read_metrics
from student_trainer.types import Metrics
from teacher_api.types import TeacherInfo

SAMPLES_SHOWN = 3


@dataclass(slots=True)
class Run:
    """All that a step needs. Only `step`, `tokens` and what the optimizer changes move."""

    config: TrainConfig
    dist: Distributed
    student: Student
    prompts: Prompts
    mix: Mix
    evaluator: evaluation.Evaluator
    sampler: RolloutEngine
    scorer: Panel
    past: PastTeachers
    objective: AnyObjective
    needs: Needs
    strategy: Replicated
    bad_steps: guards.BadSteps
    alarms: Alarms
    stop: guards.StopSignals
    console: Console
    start: resume.Start
    warnings: list[str]
    longest_tokens: int
    timeline: Timeline
    copied: Copied | None = None  # weights to sample from while others change
    tracker: Tracker | None = None  # from `begin` on
    claim: IO[str] | None = None  # of the output directory; on the main rank, from `begin` on
    step: int = 0  # optimizer steps done
    tokens: int = 0  # completion tokens trained on so far
    evaluated_at: int = -1
    saved_at: int = -1
    ranks: bool = False  # checkpoint.metric has been measured
    kinds: set[bool] = field(default_factory=set)  # of steps so far: whether they were on fixed data
    figures: Metrics = field(default_factory=dict)  # of the step that `step` counts, its evaluation included

    @property
    def optimizer(self) -> Optimizer:
        return self.strategy.optimizer

    @property
    def teachers(self) -> dict[str, TeacherInfo]:
        """What each teacher says of itself, by its name in the run."""
        return {name: member.info for name, member in self.scorer.members.items()}

    @property
    def run_dir(self) -> Path:
        return Path(self.config.train.output_dir)

    @property
    def learns_early(self) -> bool:
        """Whether a micro-batch can be learned from before the step's last sample is scored."""
        return not (self.strategy.collective_passes or self.objective.looks_at_whole_steps)

    @property
    def sampled_from(self) -> Student:
        """With the weights that samples come from, for forward passes that belong to sampling."""
        return self.copied.student if self.copied is not None else self.strategy.plain

    @property
    def chunk_rows(self) -> int:
        """Positions whose logits exist at a time."""
        width, device = self.student.parts.logit_width, self.student.device
        return self.config.train.loss_chunk_rows or default_rows(width, device.type)

    def spread(self) -> None:
        """Puts the student on the ranks as train.strategy says, the optimizer where it was, and the weights into the
        engine that samples. Collectives first: reading the checkpoint may fail on one rank alone, starting an engine
        too."""
        self.student = self.strategy.spread(self.student, self.config.optim, self.config.train.steps)
        if self.start.checkpoint is not None:
            checkpoint.load_optimizer(self.start.checkpoint, self.optimizer)
        with self.strategy.whole():
            self.sampler.update(self.step)

    def begin(self) -> None:
        """Opens the output directory: from here on, files are written."""
        resolved = self.config.model_dump(mode="json")
        if self.dist.is_main:
            self.claim = resume.claim(self.run_dir)
            resume.record(self.config)
            self.past.bring()
        self.tracker = Tracker(
            self.run_dir,
            self.config.tracking,
            resolved,
            resumed_step=self.step if self.start.checkpoint else -1,
            is_main=self.dist.is_main,
        )

    def report(self, samples: Arrivals, learned: Metrics) -> None:
        """Metrics of the step that `step` now counts, reduced over ranks, to the console and the trackers."""
        scored, add_up = samples.all(), self.dist.sum_metrics
        figures = metrics.of_rollouts(scored, add_up)
        self.tokens += int(figures["tokens"])
        figures |= {**self.scorer.figures(add_up, samples.sums()), **self.past.figures()}
        if self.config.train.schedule == "async":
            figures |= metrics.of_staleness(scored, samples.step, samples.dropped, add_up)
        figures |= {name: self.dist.all_reduce_max(value) for name, value in sorted(self.sampler.figures().items())}
        figures = {**learned, **figures, "total_tokens": float(self.tokens)}
        if any(source.overlong == "drop" for source in self.config.data.sources):
            figures["dropped_prompts"] = float(self.prompts.dropped().total)
        figures["total_skipped"] = float(self.bad_steps.total)
        alarms, begun = self.alarms.look(figures)
        figures = {**figures, **alarms, **self.timeline.figures()}
        self.timeline.end_step(samples.step)
        self._require_ranking(figures)
        self.figures = figures
        for alarm in begun:
            self.console.say(f"step {self.step}: warning: {alarm}")
        if self.step % self.config.tracking.log_every == 0 or self.step == self.config.train.steps:
            self._log(figures)
        self.console.step(self.step, figures)
        every = self.config.tracking.samples_every
        if every and self.step % every == 0 and self.dist.is_main:
            self.console.samples(self.step, metrics.sample_rows(scored, self._decode, SAMPLES_SHOWN))

    def _require_ranking(self, figures: Metrics) -> None:
        """Raises ValueError for a checkpoint.metric that no step has. One that some have may still come: of a teacher
        that none of the samples so far fell to, or of the other kind of steps where data.mix is by steps."""
        config, data = self.config.checkpoint, self.config.data
        self.ranks = self.ranks or config.metric in figures
        self.kinds.add(figures["fixed_samples"] > 0.0)
        kinds = 2 if data.mix == "step" and 0.0 < data.on_policy_fraction < 1.0 else 1
        is_a_teachers = config.metric.partition("/")[0] in self.config.teachers
        if not (self.ranks or is_a_teachers or len(self.kinds) < kinds):
            checkpoint.require_measured(config, figures)

    def evaluate_if_due(self) -> None:
        """Accuracy of the weights as they are."""
        step = self.step
        if not self.evaluator.due(step) or self.evaluated_at == step:
            return
        result = self.evaluator.result(self.strategy, self.whole_or_not_at_all())
        # Past what a stop may interrupt: one between line and note would have it written twice.
        evaluated = {"eval_accuracy": result.accuracy, "eval_low": result.low, "eval_high": result.high}
        self.figures = {**self.figures, **evaluated}
        self._log(evaluated)
        self.console.say(
            f"step {step}: accuracy {result.accuracy:.1%} ({result.low:.1%}…{result.high:.1%}, n = {result.num})"
        )
        self.evaluated_at = step
        if self.saved_at == step:  # stopped in this evaluation: its checkpoint does not know the outcome
            self.saved_at = -1
            self.checkpoint()

    def checkpoint_if_due(self) -> None:
        refresh.keep(self)
        every = self.config.checkpoint.save_every
        if (every and self.step % every == 0) or self.step == self.config.train.steps:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Writes the state after `step` steps, unless that is on disk already."""
        if self.saved_at == self.step:
            return
        failure: Exception | None = None
        optimizer = self.optimizer.gathered()
        with self.strategy.whole(main_only=True, on_host=True):
            if self.dist.is_main:
                try:
                    self._save(optimizer)
                except checkpoint.CheckpointError as error:  # the others wait to hear how it went
                    failure = error
        self.saved_at = self.step
        guards.agree(self.dist, failure)

    def _save(self, optimizer: StateSource) -> None:
        state = {
            "tokens": self.tokens,
            "evaluated_at": self.evaluated_at,
            "bad_steps": self.bad_steps.in_a_row,
            "total_skipped": self.bad_steps.total,
            "alarms": self.alarms.state(),
            "figures": {k: v for k, v in self.figures.items() if metrics.finite(v) and checkpoint.is_kept(k)},
            "teacher_fingerprints": self.scorer.fingerprints,
            "past": self.past.state(),
            "prompts": resume.prompts_state(
                self.prompts, self.step * self.config.train.batch_size, self.config.train.seed
            ),
            "world": self.dist.world,
            "strategy": str(self.strategy),
        }
        checkpoint.save(
            self.run_dir,
            self.step,
            model=self.student.as_saved(),
            tokenizer=self.student.tokenizer,
            optimizer=optimizer,
            state=state,
        )
        checkpoint.prune(self.run_dir, self.config.checkpoint)
        self.past.prune(checkpoint.steps(self.run_dir))

    @contextlib.contextmanager
    def whole_or_not_at_all(self) -> Iterator[None]:
        """For work that changes no state, so that a stop or an outage inside may drop it. What ends it on one rank ends
        it on all; where the run can go on later, its checkpoint is written first."""
        failure: Exception | None = None
        try:
            with self.stop.interruptible():
                yield
        except Exception as error:  # every rank must hear of it before any leaves
            failure = error
        try:
            guards.agree(self.dist, failure)
        except guards.RESUMABLE:
            self.checkpoint()
            raise

    def finish(self) -> None:
        """The final student, as a directory that plain transformers loads; its adapters and its average, too, in
        others beside it."""
        self.export(self.run_dir / resume.FINAL, with_card=True)
        if self.config.optim.ema_decay:
            self.export(self.run_dir / resume.AVERAGE, averaged=True, with_card=True)
        if self.dist.is_main and self.config.checkpoint.push_to_hub:
            self.console.say(f"uploaded to {hub.push(self.run_dir / resume.FINAL, self.config.checkpoint)}")

    def export(self, directory: Path, *, averaged: bool = False, with_card: bool = False) -> None:
        """The student, or its average, in `directory`; with a card for those who get it, and its adapters beside it."""
        average = averages(self.optimizer.gathered().state()[0]) if averaged else {}
        failure: Exception | None = None
        with self.strategy.whole(main_only=True, on_host=True), in_place_of(self.student.model, average):
            if self.dist.is_main:
                try:
                    self._write_exports(directory, with_card=with_card)
                except checkpoint.CheckpointError as error:  # the others wait to hear how it went
                    failure = error
        guards.agree(self.dist, failure)

    def _write_exports(self, directory: Path, *, with_card: bool) -> None:
        lines = read_metrics(self.run_dir / METRICS_FILE) if with_card else []
        card = model_card.render(self.config, self.teachers, lines) if with_card else ""
        for suffix, model in self.student.exports().items():
            if with_card or not suffix:
                place = directory.with_name(directory.name + suffix)
                checkpoint.export(place, model=model, tokenizer=self.student.tokenizer, card=card)

    def close(self) -> None:
        """Ends everything, the rest too where one of them fails to."""
        try:
            self.timeline.write_trace(self.run_dir, self.dist.rank)
        except OSError as error:  # how the run ended is told by whoever ends it
            self.console.say(f"warning: no trace: {error}")
        with contextlib.ExitStack() as last_first:
            for part in (self.claim, self.sampler, self.scorer, self.tracker, self.console, self.timeline):
                if part is not None:
                    last_first.callback(part.close)

    def _log(self, figures: Metrics) -> None:
        assert self.tracker is not None, "begin() opens the tracker"
        self.tracker.log(self.step, figures)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self.student.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def prepare(
    config: TrainConfig, dist: Distributed, urls: Mapping[str, str], stop: guards.StopSignals, past: PastTeachers
) -> Run:
    """Loads and checks everything; writes nothing, and waits for no other rank. `Run.spread` comes next.

    Args:
        urls: of the teachers, by name.
        past: those that are the student's own past, served.
    Raises:
        ValueError: a family of one-line refusals: student, data, output directory, handshake.
        TeacherGone, TeacherError, RolloutGone, CheckpointError: teacher, rollout servers or checkpoint can't be used.
    """
    start = None if config.train.epochs else resume.find_start(config)
    check_installed(config.tracking)
    tracing = open_tracing(config.tracking)
    hub.check(config.checkpoint)
    objective = build(config.loss)
    strategy = choose(config, dist)
    schedule.check(config, strategy, dist.world)
    goes_on_from = _going_on_from(config, start)
    student = students.load(config.student, dist.device, seed=config.train.seed, checkpoint=goes_on_from)
    fits.require_known_ids(config, student.tokenizer)
    student = packing_check.applied(student, config)
    prompts = _open_prompts(config, student)
    config, start = _settled(config, start, prompts)
    longest = fits.longest_tokens(config, student, prompts)
    scorer, warnings = connect(
        config,
        urls,
        objective,
        tokenizer=student.tokenizer,
        longest_tokens=longest,
        longest_privileged=prompts.longest.teacher_prompt + fits.longest_completion(config, prompts),
        began_with=past.held_to(start.state, resume.fingerprints(start)),
    )
    try:
        for name in past.teachers:
            past.note(name, start.step, scorer.fingerprints[name])
        warnings += [*start.warnings, *fits.warnings(config, prompts, scorer.needs), *_told(student)]
        if start.checkpoint is not None:
            checkpoint.load_model_weights(start.checkpoint, student.model)
        copied = Copied(student) if config.train.schedule == "async" else None
        return Run(
            config=config,
            dist=dist,
            student=student,
            prompts=prompts,
            mix=Mix(config.data.on_policy_fraction, config.data.mix, config.train.seed),
            evaluator=_evaluator(config, dist, student),
            sampler=engines.make(
                config,
                copied.student if copied else student,
                dist,
                longest_tokens=longest,
                stop=stop,
            ),
            copied=copied,
            scorer=scorer,
            past=past,
            objective=objective,
            needs=scorer.needs,
            strategy=strategy,
            stop=stop,
            console=Console(is_main=dist.is_main, total_steps=config.train.steps, first_step=start.step),
            warnings=warnings,
            longest_tokens=longest,
            timeline=Timeline(
                config.tracking.trace_steps,
                tracing=tracing,
                told={"run": config.tracking.run_name or Path(config.train.output_dir).name, "rank": dist.rank},
            ),
            **_counts(config, start),
        )
    except BaseException:
        scorer.close()
        raise


def _open_prompts(config: TrainConfig, student: Student) -> Prompts:
    views = privileged.views(config.all_teachers, by_domain=config.teaching.by == "domain")
    return open_prompts(config.data, student.tokenizer, eos_token_ids=student.eos_token_ids, views=views)


def _settled(config: TrainConfig, start: resume.Start | None, prompts: Prompts) -> tuple[TrainConfig, resume.Start]:
    """Steps and beginning of the run, which with train.epochs are known only when its prompts are."""
    if config.train.epochs:
        config = steps_of_epochs(config, prompts.num_prompts or 0)
    start = start or resume.find_start(config)
    resume.go_on_with_prompts(start, config, prompts)
    return config, start


def _evaluator(config: TrainConfig, dist: Distributed, student: Student) -> evaluation.Evaluator:
    problems = evaluation.load_problems(config, student)
    sampler = engines.make_torch(config, student, evaluation.sampling_changes(config))
    conversing = engines.conversing(sampler, sampler.config, student)
    return evaluation.Evaluator(config, dist, student, problems, conversing)


def _told(student: Student) -> list[str]:
    """Why this student is not packed, where it is not."""
    return [student.packing.reason] if student.packing.reason else []


def _counts(config: TrainConfig, start: resume.Start) -> dict[str, Any]:
    """Where a run begins, and what of it counts on from there."""
    state = start.state
    return {
        "bad_steps": guards.BadSteps(
            config.train.max_bad_steps, int(state.get("bad_steps", 0)), int(state.get("total_skipped", 0))
        ),
        "alarms": Alarms(config.guards, state.get("alarms")),
        "start": start,
        "step": start.step,
        "figures": dict(state.get("figures", {})),
        "tokens": int(state.get("tokens", 0)),
        "evaluated_at": int(state.get("evaluated_at", -1)),
        "saved_at": start.step if start.checkpoint else -1,
    }


def _going_on_from(config: TrainConfig, start: resume.Start | None) -> Path | None:
    """The checkpoint that a run goes on from, as far as that is known before its prompts are."""
    if start is not None:
        return start.checkpoint
    return checkpoint.find_latest(Path(config.train.output_dir)) if config.student.layers_from_teacher else None


def require_alike(run: Run) -> None:
    """Raises ValueError, on every rank, where ranks are about to train different things."""
    if run.dist.world > 1:
        run.dist.require_equal("the student's weights", weights_digest(run.student.model.named_parameters()))
        for name, fingerprint in run.scorer.fingerprints.items():
            run.dist.require_equal(f"the fingerprint of {prefix(name)}", fingerprint)
        run.dist.require_equal("the first step", str(run.step))
        run.dist.require_equal("the digest of the prompts", run.prompts.digest())
