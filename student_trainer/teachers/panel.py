"""All teachers of a run: who scores which sample, the handshake with each, and what they do together. One teacher is a
panel of one; it is asked as ever.

Invariants: which teacher a sample gets is a pure function of the configuration, its prompt's domain, the seed and its
number; teachers are asked at the same time; each has its own outage budget, and the first that fails ends the call.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from student_trainer import metrics, scoring
from student_trainer.config import TrainConfig
from student_trainer.losses.base import ROWS_OF, AnyObjective, Needs
from student_trainer.pipeline.feed import Width
from student_trainer.pipeline.timeline import covered
from student_trainer.teachers import mixture
from student_trainer.teachers.config import ONLY, NamedTeacherConfig, TeacherConfig, domains_of, prefix
from student_trainer.types import Metrics, Rollout, ScoredRollout
from teacher_api.types import ScoreOptions, TeacherInfo

T = TypeVar("T")
CHOICE_STREAM = 1
"""Highest word of the Philox counter: the sampler draws a sample's tokens from the same key, at 0."""


@dataclass(frozen=True, slots=True)
class Member:
    """One teacher, after the handshake."""

    name: str
    config: TeacherConfig
    scorer: scoring.TeacherScorer
    info: TeacherInfo

    @property
    def weight(self) -> float:
        return (self.config.weight or 1.0) if isinstance(self.config, NamedTeacherConfig) else 1.0


class Panel:
    """Scores rollouts with the teachers that they have.

    Args:
        members: at least one, by name.
        by: how several share the work (TeachingConfig.by).
        seed: of teaching.by sample.
        student_top_k: ids per position that the sampler keeps.
        shake_hands: makes a member of a teacher's name and URL.
    """

    def __init__(
        self,
        members: Mapping[str, Member],
        by: Literal["domain", "mixture", "sample"],
        seed: int = 0,
        *,
        student_top_k: int = 0,
        shake_hands: Callable[[str, str], Member] | None = None,
    ) -> None:
        self.members = dict(members)
        self._shake_hands = shake_hands
        self._by = by
        self._seed = seed
        self._student_top_k = student_top_k
        self._log_weights = mixture.log_weights([m.weight for m in members.values()])
        self._names = list(members)
        self._of_domain = {
            domain: name
            for name, member in members.items()
            if isinstance(member.config, NamedTeacherConfig)
            for domain in domains_of(name, member.config)
        }
        self._sums: Metrics = {}
        self._asked: SimpleQueue[tuple[str, float, float]] = SimpleQueue()  # teacher, from when, until when

    @property
    def fingerprints(self) -> dict[str, str]:
        return {name: member.info.fingerprint for name, member in self.members.items()}

    @property
    def needs(self) -> Needs:
        """The most that the objective is given of any sample."""
        asked = [member.scorer.options.top_k for member in self.members.values()]
        mixed = self._by == "mixture" and len(asked) > 1
        numbers = [k for k in asked if k != "all"]
        if "all" in asked:
            return Needs("all", self._student_top_k)
        return Needs(sum(numbers) if mixed else max(numbers), self._student_top_k)

    def check_mixture(self) -> None:
        """Raises HandshakeError where a teacher can't answer for what all of them find likely."""
        if self._by != "mixture" or len(self._names) == 1 or not self._is_sparse:
            return
        needs = self.needs
        assert needs.top_k != "all", "one that is sparse has a number"
        union = needs.top_k + needs.student_top_k
        for name, member in self.members.items():
            if "candidates" not in member.info.features or member.info.max_candidates < union:
                offers = member.info.max_candidates if "candidates" in member.info.features else 0
                raise scoring.HandshakeError(
                    f"teachers.{name}: teaching.by mixture asks each teacher for the ids of all, up to {union} "
                    f"candidates per row, this one takes {offers}; lower teachers.*.top_k, or set it to all"
                )

    def teacher_of(self, rollout: Rollout) -> str:
        """The name of the teacher that scores this sample; of one that all of them score, ONLY.

        Raises:
            ValueError: its domain has no teacher.
        """
        if len(self._names) == 1:
            return self._names[0]
        if self._by == "mixture":
            return ONLY
        if self._by == "domain":
            domain = rollout.prompt.domain
            if domain not in self._of_domain:
                raise ValueError(f"sample {rollout.uid}: no teacher has the domain {domain!r} (teachers.NAME.domains)")
            return self._of_domain[domain]
        return self._names[drawn(np.exp(self._log_weights), self._seed, rollout.uid)]

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """The view of its teacher on every completion token, in the order of `rollouts`. Raises as
        TeacherScorer.score."""
        self._sums = {}
        if len(self._names) == 1 or self._by == "mixture":
            found = {scored.rollout.uid: (scored, sums) for scored, sums in self.ask(self._only, rollouts)}
            for rollout in rollouts:
                metrics.add(self._sums, found[rollout.uid][1])
            return [found[rollout.uid][0] for rollout in rollouts]
        chosen = [self.teacher_of(rollout) for rollout in rollouts]
        parts = {n: [r for r, c in zip(rollouts, chosen, strict=True) if c == n] for n in self._names}
        views = self._at_once(lambda member: member.scorer.score(parts[member.name]))
        self._sums = {f"{n}/tokens": float(sum(v.rollout.num_tokens for v in found)) for n, found in views.items()}
        in_order = {name: iter(found) for name, found in views.items()}
        return [next(in_order[name]) for name in chosen]

    @property
    def _only(self) -> str:
        """The queue of all samples, where there is one."""
        return self._names[0] if len(self._names) == 1 else ONLY

    def route(self, rollout: Rollout) -> str:
        """The queue that a sample waits in (pipeline.feed): its teacher's, or that of all of them. Raises as
        `teacher_of`."""
        return self.teacher_of(rollout)

    def widths(self) -> dict[str, Width]:
        """Of each queue. What all of a mixture are sent, each of them may be sent, and keeps each of them busy."""
        widths = {
            name: Width(m.config.max_concurrency, m.config.request_sequences, m.info.batch_tokens)
            for name, m in self.members.items()
        }
        if self._by == "mixture" and len(widths) > 1:
            requests, samples, tokens = zip(*widths.values(), strict=True)
            return {ONLY: Width(min(requests), min(samples), max(tokens) if all(tokens) else 0)}
        return widths

    def ask(self, name: str, rollouts: Sequence[Rollout]) -> Iterator[tuple[ScoredRollout, Metrics]]:
        """The scores of samples of the queue `name`, each as soon as it is there (of a mixture, when all are), and what
        `figures` is to be given the sum of. Threads may share it. Raises as TeacherScorer.score."""
        if self._by == "mixture" and len(self._names) > 1:
            yield from zip(*self._mixed(rollouts), strict=True)
            return
        several, member = len(self._names) > 1, self.members[name]
        with self._span(member):
            for scored in member.scorer.arriving(rollouts):
                yield scored, {f"{name}/tokens": float(scored.rollout.num_tokens)} if several else {}

    def figures(self, sum_metrics: Callable[[Metrics], Metrics], sums: Metrics | None = None) -> Metrics:
        """By teacher: tokens it scored on all ranks, and in a mixture the mean of log q_old(y) − log p(y) and its mass
        on the support, from the sums that `ask` gave (by default, those of the last `score`); and the seconds since the
        last call in which it was asked something on this rank. Nothing where there is one teacher."""
        spans = [self._asked.get() for _ in range(self._asked.qsize())]
        if len(self._names) == 1:
            return {}
        nothing = {f"{name}/tokens": 0.0 for name in self._names}  # of one that no sample of the step fell to
        summed = sum_metrics({**nothing, **(self._sums if sums is None else sums)})
        rows = {key.removeprefix(ROWS_OF): summed.pop(key) for key in list(summed) if key.startswith(ROWS_OF)}
        means = {key: value / rows.get(key, 1.0) for key, value in summed.items() if rows.get(key, 1.0)}
        asked = {name: [(start, stop) for who, start, stop in spans if who == name] for name in self._names}
        return {**means, **{f"{name}/seconds": covered(times) for name, times in asked.items() if times}}

    def reconnect(self, name: str, url: str) -> None:
        """Another teacher takes the place of the one called `name`, after a handshake of its own.

        Raises:
            ValueError, TeacherGone, TeacherError: it can't be reached or used.
        """
        assert self._shake_hands is not None, "connect() gives it"
        self.members[name].scorer.close()
        self.members[name] = self._shake_hands(name, url)
        self.check_mixture()

    def close(self) -> None:
        for member in self.members.values():
            member.scorer.close()

    def _mixed(self, rollouts: Sequence[Rollout]) -> tuple[list[ScoredRollout], list[Metrics]]:
        """Everybody scores everything: once where all answer for the same ids, and else a second time, for the union
        of what each found likely. Only there can the tail of that union be computed."""
        views = self._at_once(lambda member: member.scorer.score(rollouts))
        of_samples = list(zip(*views.values(), strict=True))
        if self._is_sparse:
            unions = [mixture.union(sample) for sample in of_samples]
            views = self._at_once(lambda member: member.scorer.ask(rollouts, unions, _values_alone(member)))
            answers = zip(*views.values(), strict=True)
            mixed = [
                mixture.mix_on_union(sample, asked, answer, self._log_weights)
                for sample, asked, answer in zip(of_samples, unions, answers, strict=True)
            ]
        else:
            mixed = [mixture.mix(sample, self._log_weights) for sample in of_samples]
        sums: list[Metrics] = [
            {key: value for name, view in zip(views, of_one, strict=True) for key, value in _in_the_mixture(name, view)}
            for of_one in zip(*views.values(), strict=True)
        ]
        return [ScoredRollout(r, scores) for r, scores in zip(rollouts, mixed, strict=True)], sums

    @property
    def _is_sparse(self) -> bool:
        return all(member.scorer.options.top_k not in (0, "all") for member in self.members.values())

    def _at_once(self, ask: Callable[[Member], T]) -> dict[str, T]:
        """What `ask` gives for each member, asked in threads of their own. The first failure is raised at once; the
        others' threads end with their clients, so nothing waits for them."""
        futures: dict[concurrent.futures.Future[T], str] = {concurrent.futures.Future(): n for n in self._names}
        for future, name in futures.items():
            threading.Thread(target=self._answer, args=(future, ask, self.members[name]), daemon=True).start()
        found = {futures[future]: future.result() for future in concurrent.futures.as_completed(futures)}
        return {name: found[name] for name in self._names}

    def _answer(self, future: concurrent.futures.Future[T], ask: Callable[[Member], T], member: Member) -> None:
        try:
            result = self._timed(ask, member)
        except BaseException as error:  # carried to the thread that waits
            future.set_exception(error)
            return
        future.set_result(result)

    def _timed(self, ask: Callable[[Member], T], member: Member) -> T:
        with self._span(member):
            return ask(member)

    @contextlib.contextmanager
    def _span(self, member: Member) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._asked.put((member.name, started, time.monotonic()))


def connect(
    config: TrainConfig,
    urls: Mapping[str, str],
    objective: AnyObjective,
    *,
    tokenizer: object,
    longest_tokens: int,
    longest_privileged: int,
    began_with: Mapping[str, str],
) -> tuple[Panel, list[str]]:
    """Shakes hands with every teacher.

    Args:
        urls: by teacher's name.
        tokenizer: the student's.
        longest_tokens: longest sequence that can come up.
        longest_privileged: the same for teachers that see another prompt.
        began_with: fingerprints of the teachers that the run began with, by name.

    Returns:
        The panel, and warnings: things that work, but not exactly.

    Raises:
        ValueError, TeacherGone, TeacherError: a teacher that can't be reached or used; names it.
    """
    needs = {name: objective.needs(one.top_k) for name, one in config.all_teachers.items()}
    most = max(n.student_top_k for n in needs.values())  # the sampler keeps as many, whoever scores
    members: dict[str, Member] = {}
    warnings: list[str] = []
    run_name = Path(config.train.output_dir).name

    def shake_hands(name: str, url: str, began_with: str = "") -> Member:
        one = config.all_teachers[name]
        options = options_of(config, name, needs[name])
        with named(name):
            client, info = scoring.connect(one, url, run_name=run_name, tokenizer=tokenizer, name=name)
            member = Member(name, one, scoring.TeacherScorer(client, url, one, options, name), info)
            try:
                scoring.check_tokenizer(tokenizer, info)
                asked = replace(needs[name], student_top_k=most)
                longest = longest_privileged if one.is_privileged else longest_tokens
                found = scoring.check_teacher(info, asked, options, longest, prefix(name))
                scoring.check_same_teacher(began_with, info, one.accept_new_teacher)
            except BaseException:
                member.scorer.close()
                raise
        warnings.extend(f"{prefix(name)}: {warning}" if name else warning for warning in found)
        return member

    try:
        for name in config.all_teachers:
            members[name] = shake_hands(name, urls[name], began_with.get(name, ""))
        panel = Panel(members, config.teaching.by, config.train.seed, student_top_k=most, shake_hands=shake_hands)
        panel.check_mixture()
    except BaseException:
        for member in members.values():
            member.scorer.close()
        raise
    return panel, list(warnings)


def options_of(config: TrainConfig, name: str, needs: Needs) -> ScoreOptions:
    """What is asked of the teacher `name`. Raises ValueError for an option that the objective leaves idle."""
    one = config.all_teachers[name]
    if one.value_type == "float16" and not needs.top_k:
        raise ValueError(
            f"{prefix(name)}.value_type: got float16, but {config.loss.objective} asks for no top-k values; expected "
            "float32"
        )
    return ScoreOptions(top_k=needs.top_k, temperature=config.loss.teacher_temperature, value_type=one.value_type)


def drawn(shares: npt.ArrayLike, seed: int, uid: int) -> int:
    """The index that falls to sample `uid`, index m with probability shares[m] / Σ shares: a pure function of its
    arguments, independent of the sample's tokens."""
    key = np.array([seed, uid], dtype=np.uint64)
    uniform = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, CHOICE_STREAM])).random()
    upto = np.cumsum(np.asarray(shares, dtype=np.float64))
    return min(int(np.searchsorted(upto, uniform * upto[-1], side="right")), len(upto) - 1)


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Puts the name of the teacher, where there are several, in front of what is wrong with it."""
    try:
        yield
    except scoring.HandshakeError as error:
        raise scoring.HandshakeError(f"teachers.{name}: {error}") if name else error from error


def _values_alone(member: Member) -> ScoreOptions:
    return replace(member.scorer.options, top_k=0, value_type="float32")


def _in_the_mixture(name: str, view: ScoredRollout) -> list[tuple[str, float]]:
    """Sums over the rows of one teacher's view of a sample, and how many they are."""
    rows, sampled = view.rollout.num_tokens, view.rollout.sampled
    delta = (view.rollout.full_logprob - view.scores.token_logprob)[sampled].sum(dtype=np.float64)
    return [
        (f"{name}/tokens", float(rows)),
        (f"{name}/teacher_mass", -float(np.expm1(view.scores.log_tail.astype(np.float64)).sum())),
        (f"{ROWS_OF}{name}/teacher_mass", float(rows)),
        (f"{name}/delta", float(delta)),
        (f"{ROWS_OF}{name}/delta", float(sampled.sum())),
    ]
