"""What a backend gives back is checked before anybody sees it, by the same rules as the client checks what arrives.
Nothing that fails here reaches the wire; it becomes `invalid_backend_output`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from teacher_api.errors import InvalidBackendOutput, TeacherError
from teacher_api.types import LOGPROB_FLOOR, Scores
from teacher_api.wire import check_scores
from teacher_server.backends.base import ScoreJob

LOGPROBS = ("token_logprob", "log_tail", "topk_logprob", "candidate_logprob")


def checked(job: ScoreJob, answer: Scores | TeacherError, vocabulary: int) -> Scores | TeacherError:
    """`answer` with every logprob floored at LOGPROB_FLOOR, or the error that says what is wrong with it."""
    if isinstance(answer, TeacherError):
        return answer
    if answer.id != job.id:
        return InvalidBackendOutput("the engine answered another sequence than the one asked")
    floored = {name: _floored(getattr(answer, name)) for name in LOGPROBS if getattr(answer, name) is not None}
    answer = replace(answer, **floored)
    try:
        check_scores(answer, job.options, job.candidates, job.positions, vocabulary)
    except ValueError as error:
        return InvalidBackendOutput(f"the engine's answer was withheld: {error}")
    return answer


def _floored(values: Any) -> Any:
    """NaN stays NaN, for the check to find."""
    return np.maximum(values, np.asarray(LOGPROB_FLOOR, values.dtype))
