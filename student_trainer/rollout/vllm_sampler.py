"""Completions of a saved model from an engine of vLLM in its own processes, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from student_trainer.forms.loading import StudentError
from student_trainer.rollout.base import ByPlace
from student_trainer.rollout.config import RolloutConfig
from student_trainer.rollout.vllm_engine import EngineError, VllmEngine, one_line
from student_trainer.student import eos_token_ids
from student_trainer.types import Prompt, Rollout


class VllmSampler(ByPlace):
    """See RolloutEngine.sample.

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

        where: dict[str, Any] = {"revision": revision or None, "local_files_only": Path(model).is_dir()}
        try:
            shape = transformers.AutoConfig.from_pretrained(model, **where)
            try:
                generation = transformers.GenerationConfig.from_pretrained(model, **where)
            except OSError:
                generation = transformers.GenerationConfig.from_model_config(shape)
        except (OSError, ValueError) as error:
            raise StudentError(f"engine vllm does not take {model!r}: {one_line(error)}") from error
        self.eos_token_ids = eos_token_ids(_Named(generation), tokenizer)
        self._stop_ids = sorted({*self.eos_token_ids, *config.stop_token_ids})
        self._config, self._seed, self._vocabulary_size = config, seed, len(tokenizer)
        own = {"model": model, "revision": revision or None, "dtype": dtype, "seed": 0}
        twice = sorted(own.keys() & arguments.keys())
        if twice:
            raise StudentError(f"vllm: got {twice[0]}, expected none: an option of its own decides it")
        try:
            self._engine = VllmEngine({**own, **arguments}, in_process=False, whose="engine")
        except EngineError as error:
            raise StudentError(str(error)) from error
        self.max_tokens = self._engine.max_tokens

    def _finished(
        self, prompts: Sequence[Prompt], uids: Sequence[int], keep_top_k: int
    ) -> Iterator[tuple[int, Rollout]]:
        return self._engine.stream(
            prompts,
            uids,
            config=self._config,
            seed=self._seed,
            vocabulary_size=self._vocabulary_size,
            stop_ids=self._stop_ids,
            keep_top_k=keep_top_k,
        )


class _Named:
    """What eos_token_ids reads of a model."""

    def __init__(self, generation_config: Any) -> None:
        self.generation_config = generation_config
