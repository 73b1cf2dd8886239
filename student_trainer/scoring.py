"""The trainer's side of the teacher: the handshake before the first step, and scores for a step's rollouts. Knows what
must hold between student and teacher; knows nothing of sockets and retries (teacher_api.client) or losses.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from student_trainer.losses.base import Needs
from student_trainer.teachers import privileged
from student_trainer.teachers.config import TeacherConfig
from student_trainer.types import Rollout, ScoredRollout
from teacher_api.client import TeacherClient
from teacher_api.errors import (
    CorruptResponse,
    DeadlineExceeded,
    FingerprintMismatch,
    InvalidBackendOutput,
    TeacherError,
    Unsupported,
)
from teacher_api.info import UNVERIFIED, explain_difference, tokenizer_fingerprint
from teacher_api.openai_info import OpenAIOptions, differences
from teacher_api.tls import ClientTls
from teacher_api.types import CallMetadata, Candidates, Completion, ScoreOptions, ScoreRequest, Scores, TeacherInfo
from teacher_api.wire import MAX_METADATA_CHARS


class HandshakeError(ValueError):
    """This teacher can't teach this student as configured; the message says what differs and what to do."""


class TeacherGone(RuntimeError):
    """The teacher stayed away past its budget. Nothing was lost: the run goes on from its checkpoint."""

    def __init__(self, url: str, seconds: float, cause: TeacherError, name: str = "") -> None:
        who = f"teacher {name}" if name else "teacher"
        super().__init__(f"no {who} at {url} for {seconds:.0f} s ({cause}); run the same command again to go on")
        self.url, self.seconds, self.cause, self.name = url, seconds, cause, name

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.url, self.seconds, self.cause, self.name))


class ScoreError(RuntimeError):
    """The teacher's answer can't be trained on; the message names the sample and the position."""


def connect(
    config: TeacherConfig, url: str, *, run_name: str, tokenizer: object, name: str = ""
) -> tuple[TeacherClient, TeacherInfo]:
    """A client bound to the teacher that answers at `url`, and what it says of itself.

    Args:
        tokenizer: the student's; a stock server's is taken to be equal unless teacher.tokenizer names it.
        name: the run's own for this teacher, where it has several.

    Raises:
        TeacherGone: nobody answered within teacher.start_timeout_s.
        HandshakeError: teacher.tokenizer can't be read, or the server has another; it has no teacher.compression; or a
            file of teacher.tls_cert, tls_key or tls_ca is of no use.
    """
    key = config.api_key.get_secret_value() or None
    tls = _tls_of(config, name)
    stock = _stock_options(config, tokenizer) if url.startswith("openai+") else None
    started = time.monotonic()
    try:
        with TeacherClient(
            url,
            api_key=key,
            timeout_s=config.start_timeout_s,
            teacher=config.name,
            stock=stock,
            compression=config.compression,
            tls=tls,
        ) as first:
            info = first.info()
    except TeacherError as error:
        if isinstance(error, Unsupported) and error.field == "compression":
            raise HandshakeError(f"teacher.compression: {error.message}") from error
        raise _classified(error, url, time.monotonic() - started, name) from error
    client = TeacherClient(
        url,
        api_key=key,
        timeout_s=config.timeout_s,
        attempt_timeout_s=min(config.attempt_timeout_s, config.timeout_s),
        max_concurrency=config.max_concurrency,
        expect_fingerprint=info.fingerprint,
        metadata=_metadata(config, run_name),
        teacher=config.name,
        stock=stock,
        compression=config.compression,
        tls=tls,
    )
    return client, info


def _tls_of(config: TeacherConfig, name: str) -> ClientTls:
    try:
        return ClientTls(config.tls_cert, config.tls_key, config.tls_ca)
    except ValueError as error:
        raise HandshakeError(f"{f'teachers.{name}' if name else 'teacher'}.{error}") from error


def _metadata(config: TeacherConfig, run_name: str) -> CallMetadata:
    """For whom a shared teacher works; a directory's name may hold what it refuses."""
    run = "".join(char if char.isprintable() else "?" for char in run_name)[:MAX_METADATA_CHARS]
    return CallMetadata(experiment=config.experiment or run, run=run)


def _stock_options(config: TeacherConfig, tokenizer: object) -> OpenAIOptions:
    """What the trainer can say of a server that says nothing of its tokenizer."""
    if not config.tokenizer:
        return OpenAIOptions(assumed_tokenizer=tokenizer)
    import transformers

    try:
        return OpenAIOptions(tokenizer=transformers.AutoTokenizer.from_pretrained(config.tokenizer))
    except (OSError, ValueError) as error:
        raise HandshakeError(f"teacher.tokenizer {config.tokenizer!r} can't be read: {error}") from error


def check_tokenizer(tokenizer: object, info: TeacherInfo) -> None:
    """Raises HandshakeError unless both sides mean the same by every token id. What nobody could say (a stock server's)
    passes, and check_teacher warns of it."""
    if info.tokenizer_fingerprint == UNVERIFIED:
        return
    mine, parts = tokenizer_fingerprint(tokenizer)
    if not info.tokenizer_fingerprint:
        raise HandshakeError(
            f"the teacher {info.model_name} has no tokenizer to compare with; put its files beside the model"
        )
    if mine != info.tokenizer_fingerprint:
        what = explain_difference(parts, info.tokenizer_parts)
        raise HandshakeError(f"student and teacher {info.model_name} have different tokenizers: {what}")


def check_teacher(
    info: TeacherInfo, needs: Needs, options: ScoreOptions, longest_tokens: int, key: str = "teacher"
) -> list[str]:
    """Holds what the run will ask for against what the teacher says it can do.

    Args:
        longest_tokens: longest sequence that can come up, prompt and completion.
        key: the section of its configuration.

    Returns:
        Warnings: things that work, but not exactly.

    Raises:
        HandshakeError: the teacher would refuse; says which option and the limit.
    """
    wanted = {
        "full_vocabulary": options.top_k == "all",
        "top_k": options.top_k not in (0, "all"),
        "candidates": needs.student_top_k > 0 and options.top_k != "all",
        "temperature": options.temperature != 1.0,
        "float16": options.value_type == "float16" and options.top_k != 0,
    }
    lacking = [name for name, needed in wanted.items() if needed and name not in info.features]
    if lacking:
        cure = "; with loss.support=teacher no candidates are sent" if "candidates" in lacking else ""
        raise HandshakeError(
            f"the teacher ({info.engine}, {info.scoring_path}) does not offer {', '.join(lacking)}, which loss and "
            f"{key}.top_k={options.top_k} ask for; it offers {', '.join(info.features)}{cure}"
        )
    if isinstance(options.top_k, int) and options.top_k > info.max_top_k:
        raise HandshakeError(f"{key}.top_k is {options.top_k}, this teacher gives at most {info.max_top_k}")
    if wanted["candidates"] and needs.student_top_k > info.max_candidates:
        raise HandshakeError(
            f"loss.support sends {needs.student_top_k} candidates per row, this teacher takes {info.max_candidates}"
        )
    if longest_tokens > info.max_sequence_tokens:
        raise HandshakeError(
            f"prompts and rollout.max_new_tokens make up to {longest_tokens} tokens, this teacher scores at most "
            f"{info.max_sequence_tokens}; shorten one of them"
        )
    warnings = differences(info)
    if info.tokenizer_fingerprint == UNVERIFIED:
        warnings.append(f"set {key}.tokenizer to the directory of the teacher's tokenizer to have it compared")
    if options.top_k not in (0, "all") and "exact_tail" not in info.features:
        warnings.append(
            "this teacher does not compute the tail from its logits (no exact_tail): tail masses are approximate"
        )
    return warnings


def check_same_teacher(began_with: str, info: TeacherInfo, accept_new: bool) -> None:
    """Raises HandshakeError where a run would go on with another teacher than it began with."""
    if began_with and began_with != info.fingerprint and not accept_new:
        raise HandshakeError(
            f"this run began with teacher {began_with}, at {info.model_name} now answers {info.fingerprint}; start "
            "that teacher again, or pass --accept-new-teacher to go on with the new one"
        )


class TeacherScorer:
    """Scores rollouts with one teacher. Answers are bound to the fingerprint its client expects.

    Args:
        name: the run's own for this teacher, where it has several.
    """

    def __init__(
        self, client: TeacherClient, url: str, config: TeacherConfig, options: ScoreOptions, name: str = ""
    ) -> None:
        self._client = client
        self._url = url
        self._request_sequences = config.request_sequences
        self.options = options
        self.name = name
        self._who = f"teacher {name}" if name else "the teacher"

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """The teacher's view of every completion token, in the order of `rollouts`.

        Raises:
            TeacherGone: the teacher stayed away past its budget.
            TeacherError: it refused (a typed error of the contract).
            ScoreError: an answer is missing, doubled, or not finite, or was withheld each time as not finite.
        """
        return in_order(rollouts, self.arriving(rollouts))

    def ask(
        self, rollouts: Sequence[Rollout], candidates: Sequence[Candidates | None], options: ScoreOptions
    ) -> list[ScoredRollout]:
        """As `score`, with candidates of the caller's choice for each rollout."""
        return in_order(rollouts, self.arriving(rollouts, candidates, options))

    def arriving(
        self,
        rollouts: Sequence[Rollout],
        candidates: Sequence[Candidates | None] | None = None,
        options: ScoreOptions | None = None,
    ) -> Iterator[ScoredRollout]:
        """As `ask`, by default with what `score` asks for, each as soon as it is scored."""
        options = self.options if options is None else options
        if candidates is None:
            candidates = [_students(r) if options.top_k != "all" else None for r in rollouts]
        if not rollouts:
            return
        started = time.monotonic()
        open_ones = {str(r.uid): r for r in rollouts}
        by_uid = {r.uid: chosen for r, chosen in zip(rollouts, candidates, strict=True)}
        try:
            for scores in self._client.score_many(self._requests(rollouts, by_uid, options)):
                rollout = open_ones.pop(scores.id, None)
                if rollout is None:
                    raise ScoreError(f"{self._who} answered sample {scores.id} twice")
                yield self._scored(rollout, scores, options)
        except TeacherError as error:
            raise _classified(error, self._url, time.monotonic() - started, self.name) from error
        if open_ones:
            first = next(iter(open_ones))
            raise ScoreError(f"{self._who} left out {len(open_ones)} of {len(rollouts)} samples, such as {first}")

    def _scored(self, rollout: Rollout, scores: Scores, options: ScoreOptions) -> ScoredRollout:
        try:
            aligned = privileged.aligned(rollout, scores, self.name)
            return ScoredRollout(rollout, _checked(rollout, aligned, options), self.name)
        except ValueError as error:  # positions that are not the sample's
            raise ScoreError(str(error)) from error

    def close(self) -> None:
        self._client.close()

    def _requests(
        self, rollouts: Sequence[Rollout], candidates: Mapping[int, Candidates | None], options: ScoreOptions
    ) -> Iterator[ScoreRequest]:
        """Requests of up to `request_sequences` completions; those of one prompt share it on the wire."""
        for group in _grouped(rollouts, self._request_sequences):
            places: dict[int, int] = {}
            for rollout in group:
                places.setdefault(rollout.prompt.index, len(places))
            prompts = {r.prompt.index: privileged.prompt_of(r.prompt, self.name) for r in group}
            yield ScoreRequest(
                prompts=[prompts[index] for index in places],
                completions=[
                    Completion(
                        id=str(r.uid),
                        token_ids=np.asarray(r.token_ids, dtype=np.int32),
                        prompt_index=places[r.prompt.index],
                        candidates=candidates[r.uid],
                    )
                    for r in group
                ],
                options=options,
            )


def in_order(rollouts: Sequence[Rollout], scored: Iterable[ScoredRollout]) -> list[ScoredRollout]:
    """What came in any order, in that of `rollouts`."""
    found = {each.rollout.uid: each for each in scored}
    return [found[rollout.uid] for rollout in rollouts]


def _students(rollout: Rollout) -> Candidates | None:
    """The ids the student found likely when it sampled."""
    ids = rollout.student_topk_ids
    if ids is None:
        return None
    offsets = np.arange(len(ids) + 1, dtype=np.int32) * ids.shape[1]
    return Candidates(np.ascontiguousarray(ids, dtype=np.int32).reshape(-1), offsets)


def _grouped(rollouts: Sequence[Rollout], most: int) -> Iterator[list[Rollout]]:
    """Consecutive rollouts in groups of at most `most`; those of one prompt are split only where they are more."""
    pending: list[Rollout] = []
    for _, same_prompt in itertools.groupby(rollouts, key=lambda r: r.prompt.index):
        members = list(same_prompt)
        if pending and len(pending) + len(members) > most:
            yield pending
            pending = []
        pending.extend(members)
        while len(pending) > most:
            yield pending[:most]
            pending = pending[most:]
    if pending:
        yield pending


def _checked(rollout: Rollout, scores: Scores, options: ScoreOptions) -> Scores:
    """The last look before the loss: every value is there and finite."""
    arrays = {
        "token_logprob": scores.token_logprob,
        "log_tail": scores.log_tail,
        "topk_logprob": scores.topk_logprob,
        "candidate_logprob": scores.candidate_logprob,
    }
    if options.top_k != 0 and scores.topk_logprob is None:
        raise ScoreError(f"sample {rollout.uid}: no top-k values came back, {options.top_k} were asked for")
    for name, array in arrays.items():
        if array is not None and not np.isfinite(array).all():
            flat = int(np.flatnonzero(~np.isfinite(array).reshape(-1))[0])
            row = flat // max(1, array.size // max(1, scores.num_rows))
            position = int(scores.positions[min(row, scores.num_rows - 1)])
            raise ScoreError(f"sample {rollout.uid}, position {position}: the teacher's {name} is not finite")
    return scores


def _classified(error: TeacherError, url: str, seconds: float, name: str) -> Exception:
    """What a failed call means for the run: a teacher that is away, one whose numbers are broken, another teacher, or a
    refusal as it is."""
    if isinstance(error, InvalidBackendOutput | CorruptResponse):
        asked = f", request {error.request_id}" if error.request_id else ""
        who = f"teacher {name}" if name else "the teacher"
        return ScoreError(f"{who} at {url} gives no usable scores, for {seconds:.0f} s{asked}: {error}")
    if error.retryable or isinstance(error, DeadlineExceeded):
        return TeacherGone(url, seconds, error, name)
    if isinstance(error, FingerprintMismatch):
        return HandshakeError(f"the teacher at {url} is not the one this run works with: {error.message}")
    return error
