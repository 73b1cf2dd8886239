"""Completions of a student and the teacher's view of them, position by position, for the report. Draws nothing.

Shape legend: T tokens of prompt and completion, N completion tokens, S support ids, W student logit width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from student_trainer.report.model import Choice, CompletionView, TokenView
from student_trainer.types import Rollout
from teacher_api import causal_lm
from teacher_api.types import Candidates, Completion, IntArray, ScoreOptions, ScoreRequest, Scores, TeacherInfo

if TYPE_CHECKING:
    from teacher_api.client import TeacherClient

Array = npt.NDArray[np.float64]

NUM_TOP = 5
FULL_VOCABULARY_MAX = 4096
"""Entries up to which whole distributions are fetched; above, TOP_K of either side and one bucket for the rest."""
TOP_K = 64
CHUNK_ROWS = 64
REQUEST_COMPLETIONS = 8
DECODE_WINDOW_CHARACTERS = 200
"""Text decoded at a time to find what a token adds: enough for any character, little enough to stay linear."""


def is_exact(info: TeacherInfo) -> bool:
    """Whether the report's divergences will be over the full vocabulary."""
    return "full_vocabulary" in info.features and info.tokenizer_size <= FULL_VOCABULARY_MAX


def view(
    rollouts: Sequence[Rollout],
    model: Any,
    tokenizer: Any,
    client: TeacherClient,
    correct: Sequence[bool | None],
) -> list[CompletionView]:
    """Both models' distributions at every token of each rollout.

    Args:
        model: the student that wrote the rollouts, a transformers causal language model.
        correct: per rollout, what a judge said of it.
    Raises:
        TeacherError: the teacher refused or failed.
    """
    info = client.info()
    parts = causal_lm.split(model)
    logprobs = [student_logprobs(parts, rollout) for rollout in rollouts]
    likely = [np.argsort(-rows[:, : info.tokenizer_size], axis=1)[:, :TOP_K].astype(np.int32) for rows in logprobs]
    scores = _ask(rollouts, likely, client, info)
    return [
        CompletionView(_tokens(rollout, rows, ids, score, tokenizer), rollout.finish == "eos", verdict)
        for rollout, rows, ids, score, verdict in zip(rollouts, logprobs, likely, scores, correct, strict=True)
    ]


def student_logprobs(parts: causal_lm.Parts, rollout: Rollout) -> npt.NDArray[np.float32]:
    """log q(. | prompt, completion so far) [N, W] at T = 1, untruncated; row n is the distribution of token n."""
    start = len(rollout.prompt.token_ids)
    tokens_T = np.concatenate([rollout.prompt.token_ids, rollout.token_ids])
    with torch.inference_mode():
        ids = torch.as_tensor(tokens_T, dtype=torch.long, device=next(parts.body.parameters()).device)
        hidden_NH = parts.trunk(ids[None])[0, start - 1 : -1]
        rows = [parts.head(chunk).float().log_softmax(-1).cpu().numpy() for chunk in hidden_NH.split(CHUNK_ROWS)]
    return np.concatenate(rows)


def divergence(student_W: npt.ArrayLike, ids_S: IntArray, teacher_S: npt.ArrayLike, log_tail: float) -> float:
    """KL(q ‖ p) = Σ_S q (log q − log p) + q_rest (log q_rest − log p_rest), in nats, at one position.

    Outside `ids_S` all is one bucket: q_rest from the remaining student columns, p_rest = exp(log_tail). With S
    the whole vocabulary this is the exact divergence, otherwise a lower bound of it (docs/losses.md, "Tail").

    Args:
        student_W: log q over all columns of the student.
        ids_S: distinct ids.
        teacher_S: log p of them.
    """
    q_W = np.asarray(student_W, dtype=np.float64)
    rest = np.ones(len(q_W), dtype=bool)
    rest[ids_S] = False
    log_q = np.append(q_W[ids_S], np.logaddexp.reduce(q_W[rest]) if rest.any() else -np.inf)
    log_p = np.append(np.asarray(teacher_S, dtype=np.float64), log_tail)
    held = log_q > -np.inf
    return float(np.sum(np.exp(log_q[held]) * (log_q[held] - log_p[held])))


def _ask(
    rollouts: Sequence[Rollout], likely: Sequence[IntArray], client: TeacherClient, info: TeacherInfo
) -> list[Scores]:
    """Scores of all rollouts; with a top-k, `likely` [N, C] go along as candidates."""
    exact = is_exact(info)
    options = ScoreOptions(top_k="all" if exact else min(TOP_K, info.max_top_k))
    step = max(1, min(REQUEST_COMPLETIONS, info.max_completions))
    scores: list[Scores] = []
    for start in range(0, len(rollouts), step):
        part = range(start, min(start + step, len(rollouts)))
        completions = [
            Completion(
                id=str(n),
                token_ids=rollouts[n].token_ids,
                prompt_index=n - start,
                candidates=None if exact else Candidates.from_rows(list(likely[n])),
            )
            for n in part
        ]
        scores += client.score(ScoreRequest(completions, [rollouts[n].prompt.token_ids for n in part], options))
    return scores


def _tokens(
    rollout: Rollout, student_NW: npt.NDArray[np.float32], likely_NC: IntArray, scores: Scores, tokenizer: Any
) -> tuple[TokenView, ...]:
    ids_N = rollout.token_ids.tolist()
    views = []
    for n, (text, token) in enumerate(zip(token_texts(tokenizer, ids_N), ids_N, strict=True)):
        ids, teacher = support(scores, n, token, likely_NC[n])
        views.append(
            TokenView(
                text=text,
                kl_nats=max(divergence(student_NW[n], ids, teacher, float(scores.log_tail[n])), 0.0),
                student_probability=float(np.exp(student_NW[n, token])),
                teacher_probability=float(np.exp(scores.token_logprob[n])),
                student_top=_top(np.arange(student_NW.shape[1]), student_NW[n], tokenizer),
                teacher_top=_top(ids, teacher, tokenizer),
            )
        )
    return tuple(views)


def support(scores: Scores, n: int, token: int, candidates_C: IntArray) -> tuple[IntArray, Array]:
    """Distinct ids [S] that the teacher gave at row n, and log p of them: the whole vocabulary, or its top-k with the
    candidates it was asked for and the actual token."""
    if scores.topk_logprob is None:
        raise ValueError(f"scores of {scores.id} carry no top-k")
    row = scores.topk_logprob[n].astype(np.float64)
    if scores.topk_ids is None:
        return np.arange(len(row), dtype=np.int32), row
    ids, values = [scores.topk_ids[n], [token]], [row, scores.token_logprob[n : n + 1]]
    if scores.candidate_logprob is not None:
        ids.append(candidates_C)
        values.append(scores.candidate_logprob.reshape(scores.num_rows, -1)[n])
    distinct, first = np.unique(np.concatenate(ids), return_index=True)
    return distinct.astype(np.int32), np.concatenate(values)[first].astype(np.float64)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text each token adds to the decoded whole. A token that completes no character (part of a longer byte
    sequence) is shown by its name in the vocabulary, and what it belongs to appears with the last of them."""
    texts, done, start = [], "", 0
    for n in range(len(ids)):
        whole = _decode(tokenizer, ids[start : n + 1])
        if whole.endswith("\ufffd"):
            texts.append(f"⟨{tokenizer.convert_ids_to_tokens(int(ids[n]))}⟩")
            continue
        texts.append(whole[len(done) :])
        done = whole
        if len(done) > DECODE_WINDOW_CHARACTERS:
            start, done = n, _decode(tokenizer, ids[n : n + 1])
    return texts


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _top(ids_S: npt.NDArray[Any], logprob_S: npt.NDArray[Any], tokenizer: Any) -> tuple[Choice, ...]:
    best = np.argsort(-logprob_S, kind="stable")[:NUM_TOP]
    return tuple(Choice(_name(tokenizer, int(ids_S[s])), float(np.exp(logprob_S[s]))) for s in best)


def _name(tokenizer: Any, token: int) -> str:
    if token >= len(tokenizer):
        return f"⟨column {token}⟩"
    text = _decode(tokenizer, [token])
    return f"⟨{tokenizer.convert_ids_to_tokens(token)}⟩" if "\ufffd" in text or not text else text
