"""Completions from an engine of vLLM in this process, for evaluation. The only module of the trainer that imports vllm;
which distribution its samples come from besides the greedy one is vLLM's business, so it is not for training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from student_trainer.forms.loading import StudentError
from student_trainer.rollout.base import RolloutError
from student_trainer.rollout.config import RolloutConfig
from student_trainer.student import eos_token_ids
from student_trainer.types import Prompt, Rollout
from teacher_api import causal_lm

NEVER = -1e9
"""Added to the logit of an id that the tokenizer does not have."""


class VllmSampler:
    """See RolloutEngine.

    Args:
        arguments: of vLLM's engine, besides model, dtype and seed.

    Raises:
        StudentError: vllm is not installed, or its engine does not take the model or the arguments.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str,
        dtype: str,
        tokenizer: Any,
        config: RolloutConfig,
        seed: int,
        arguments: Mapping[str, Any],
    ) -> None:
        import transformers

        try:
            import vllm
        except ImportError as error:
            raise StudentError(f"engine vllm: vllm can't be imported ({error}); install preceptor[vllm]") from error
        where: dict[str, Any] = {"revision": revision or None, "local_files_only": Path(model).is_dir()}
        try:
            shape = transformers.AutoConfig.from_pretrained(model, **where)
            try:
                generation = transformers.GenerationConfig.from_pretrained(model, **where)
            except OSError:
                generation = transformers.GenerationConfig.from_model_config(shape)
            self._engine = vllm.LLM(
                model=model,
                revision=revision or None,
                dtype=dtype,
                seed=seed,
                disable_log_stats=True,
                **arguments,
            )
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise StudentError(f"engine vllm does not take {model!r}: {' '.join(str(error).split())[:300]}") from error
        self.eos_token_ids = eos_token_ids(_Named(generation), tokenizer)
        self.max_tokens = int(self._engine.llm_engine.model_config.max_model_len)
        self._seed, self._new_tokens = seed, config.max_new_tokens
        width = int(causal_lm.text_config(shape).vocab_size)
        self._parameters = vllm.SamplingParams
        self._settings = {
            "max_tokens": config.max_new_tokens,
            "temperature": 0.0 if config.greedy else config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "stop_token_ids": sorted({*self.eos_token_ids, *config.stop_token_ids}),
            "logit_bias": dict.fromkeys(range(len(tokenizer), width), NEVER) or None,
            "detokenize": False,
        }

    def sample(self, prompts: Sequence[Prompt], uids: Sequence[int], *, keep_top_k: int = 0) -> list[Rollout]:
        """One completion per prompt. Logprobs are not asked for: they are NaN.

        Raises:
            ValueError: a prompt leaves no room for max_new_tokens, or top-k ids are to be kept.
            RolloutError: the engine failed.
        """
        if keep_top_k:
            raise ValueError(f"keep_top_k: got {keep_top_k}, expected 0: this engine is for evaluation")
        limit = self.max_tokens - self._new_tokens
        for prompt in prompts:
            if len(prompt.token_ids) > limit:
                raise ValueError(
                    f"prompt {prompt.index} has {len(prompt.token_ids)} tokens; with rollout.max_new_tokens "
                    f"{self._new_tokens} it exceeds the engine's context of {self.max_tokens}"
                )
        try:
            outputs = self._engine.generate(
                [{"prompt_token_ids": prompt.token_ids.tolist()} for prompt in prompts],
                [self._parameters(**self._settings, seed=self._seed + uid) for uid in uids],
                use_tqdm=False,
            )
        except RuntimeError as error:
            raise RolloutError(f"vLLM failed: {' '.join(str(error).split())[:300]}") from error
        return [
            _rollout(prompt, uid, output.outputs[0]) for prompt, uid, output in zip(prompts, uids, outputs, strict=True)
        ]

    def stream(self, prompts: Sequence[Prompt], uids: Sequence[int], *, keep_top_k: int = 0) -> Iterator[Rollout]:
        """As `sample`, one after the other when all are finished."""
        yield from self.sample(prompts, uids, keep_top_k=keep_top_k)


class _Named:
    """What eos_token_ids reads of a model."""

    def __init__(self, generation_config: Any) -> None:
        self.generation_config = generation_config


def _rollout(prompt: Prompt, uid: int, output: Any) -> Rollout:
    tokens = np.asarray(output.token_ids, dtype=np.int32)
    undefined = np.full(len(tokens), np.nan, dtype=np.float32)
    finish: Literal["eos", "length"] = "eos" if output.finish_reason == "stop" else "length"
    return Rollout(uid, prompt, tokens, finish, behaviour_logprob=undefined, full_logprob=undefined)
