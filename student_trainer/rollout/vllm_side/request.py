"""How a sample is asked of vLLM and how its record comes back, for an engine in this process and for servers alike.
Imports no vllm.

vLLM returns with every token a row of ids, a row of logprobs and a rank. Ours (sampler.py) puts into them:
    ids       y, most likely id, second, …     (K ids; column 1 is there even where K = 0)
    logprobs  log q(y), log b(y), unused …
    rank      version of the weights that made the logits

Shape legend: N new tokens, C columns, K ids kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from student_trainer.rollout.base import RolloutError
from student_trainer.rollout.config import RolloutConfig
from student_trainer.types import Prompt, Rollout
from teacher_api.types import FloatArray, IntArray

KEY = "preceptor"
"""Of SamplingParams.extra_args: marks requests whose tokens our sampler draws."""
UNKNOWN = -1
"""Version of weights that nobody has named."""
PROTOCOL = 1
"""Of a rollout server's routes; raised where they change."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What names weights: a session, which is one start of one run, and the optimizer steps behind them."""

    session: str = ""
    version: int = UNKNOWN


@dataclass(frozen=True, slots=True)
class Draws:
    """Which distribution a completion's tokens come from, and with which random numbers: token n is drawn with the
    n-th uniform number of (seed, uid)."""

    seed: int
    uid: int
    max_new_tokens: int
    vocabulary_size: int  # the tokenizer's; ids from here up are never drawn
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError: inside an engine, a number that can't be used would end it for all."""
        for name, least in (("seed", 0), ("uid", 0), ("max_new_tokens", 1), ("vocabulary_size", 1), ("top_k", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value < 1 << 63:
                raise ValueError(f"draws.{name}: got {value!r}, expected a whole number from {least} to 2**63 - 1")
        for name, most in (("temperature", 100.0), ("top_p", 1.0)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0.0 < value <= most:
                raise ValueError(f"draws.{name}: got {value!r}, expected more than 0 and at most {most:g}")

    @classmethod
    def of(cls, config: RolloutConfig, *, seed: int, uid: int, vocabulary_size: int) -> Draws:
        return cls(
            seed=seed,
            uid=uid,
            max_new_tokens=config.max_new_tokens,
            vocabulary_size=vocabulary_size,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            greedy=config.greedy,
        )


def parameters(draws: Draws, stop_ids: Sequence[int], keep_top_k: int) -> dict[str, Any]:
    """Keyword arguments of vllm.SamplingParams. End tokens are exactly `stop_ids`: not those that the server's copy of
    the model names besides."""
    return {
        "max_tokens": draws.max_new_tokens,
        "stop_token_ids": list(stop_ids),
        "ignore_eos": True,
        "detokenize": False,
        "logprobs": columns(min(keep_top_k, draws.vocabulary_size)) - 1,
        "flat_logprobs": True,
        "extra_args": {KEY: asdict(draws)},
    }


def columns(keep_top_k: int) -> int:
    """C: y's own, and one for each id kept; one at least, for log b."""
    return 1 + max(keep_top_k, 1)


@dataclass(frozen=True, slots=True)
class Record:
    """One completion, as vLLM gave it."""

    token_ids: IntArray  # [N]
    behaviour_logprob: FloatArray  # [N]
    full_logprob: FloatArray  # [N]
    versions: IntArray  # [N]
    topk_ids: IntArray  # [N, K]
    finish: Literal["eos", "length"]

    @classmethod
    def of(cls, output: Any, keep_top_k: int) -> Record:
        """From vLLM's CompletionOutput with the flat logprobs that `parameters` asked for."""
        flat, count, width = output.logprobs, len(output.token_ids), columns(keep_top_k)
        ids_NC = np.asarray(flat.token_ids, dtype=np.int32).reshape(count, width)
        logprobs_NC = np.asarray(flat.logprobs, dtype=np.float32).reshape(count, width)
        record = cls(
            token_ids=np.asarray(output.token_ids, dtype=np.int32),
            behaviour_logprob=logprobs_NC[:, 1].copy(),
            full_logprob=logprobs_NC[:, 0].copy(),
            versions=np.asarray(flat.ranks, dtype=np.int64).reshape(count, width)[:, 0].astype(np.int32),
            topk_ids=ids_NC[:, 1 : 1 + keep_top_k].copy(),
            finish="eos" if output.finish_reason == "stop" else "length",
        )
        if not np.array_equal(record.token_ids, ids_NC[:, 0]):
            raise RolloutError("vLLM's logprobs are not of the tokens that it sampled: its sampler is not ours")
        return record

    def arrays(self) -> dict[str, Any]:
        """Without `finish`: numpy arrays by name."""
        names = ("token_ids", "behaviour_logprob", "full_logprob", "versions", "topk_ids")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any], finish: str) -> Record:
        return cls(**arrays, finish="eos" if finish == "eos" else "length")

    def rollout(self, prompt: Prompt, uid: int) -> Rollout:
        """Raises RolloutError where the model's logits were not finite."""
        if not np.isfinite(self.full_logprob).all():
            position = len(prompt.token_ids) + int(np.flatnonzero(~np.isfinite(self.full_logprob))[0])
            raise RolloutError(f"the student's logits are not finite: sample {uid}, position {position}")
        return Rollout(
            uid=uid,
            prompt=prompt,
            token_ids=self.token_ids,
            finish=self.finish,
            behaviour_logprob=self.behaviour_logprob,
            full_logprob=self.full_logprob,
            student_topk_ids=self.topk_ids if self.topk_ids.shape[-1] else None,
            versions=self.versions,
        )
