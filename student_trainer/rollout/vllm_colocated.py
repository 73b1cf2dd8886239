"""Samples from an engine of vLLM in the trainer's own process: it gets the weights of each update from memory, is held
to the trainer's own forward pass after each, and gives the memory of a GPU back while the student learns.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from student_trainer.config import TrainConfig
from student_trainer.forms import lora
from student_trainer.rollout import handover
from student_trainer.rollout.base import ByPlace, RolloutError
from student_trainer.rollout.config import CPU_CACHE_GIB, VllmConfig
from student_trainer.rollout.vllm_engine import EngineError, VllmEngine, one_line, refuse_unfit_for_vllm
from student_trainer.rollout.vllm_side import worker as side
from student_trainer.student import Student
from student_trainer.types import Metrics, Prompt, Rollout

WHOSE = "rollout.engine"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Of adapters, that vLLM has room for."""
ADAPTER, ADAPTER_NAME = 1, "student"
OURS = frozenset(
    {
        "model", "dtype", "seed", "load_format", "runner", "tokenizer", "skip_tokenizer_init", "enable_lora",
        "max_lora_rank", "max_loras", "enable_sleep_mode", "worker_extension_cls", "logits_processors", "max_logprobs",
        "distributed_executor_backend", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
        "speculative_config", "disable_log_stats", "async_scheduling", "max_num_seqs", *VllmConfig.model_fields,
    }
)  # fmt: skip
"""Engine arguments that other options, or the hand-over of weights, decide."""


class ColocatedSampler(ByPlace):
    """See RolloutEngine. The engine starts at the first `update`, which every rank calls at the same point.

    Args:
        student: as it was loaded; its weights are read in `update` only, or by a `sample` of weights that the engine
            dropped when it went to sleep.
        longest_tokens: longest prompt with its completion that can come up.
        world: number of ranks, each of which has an engine on its own device.
    Raises:
        ValueError: an option or a student that it can't be.
    """

    def __init__(self, config: TrainConfig, student: Student, *, longest_tokens: int, world: int) -> None:
        self._rollout, self._options = config.rollout, config.rollout.vllm
        self._student, self._dtype = student, config.student.dtype
        self._seed, self._world = config.train.seed, world
        self._max_tokens = self._options.max_model_len or longest_tokens
        self._stop_ids = tuple(sorted({*student.eos_token_ids, *config.rollout.stop_token_ids}))
        self._tolerance = handover.tolerance(self._options.logprob_tolerance, self._dtype)
        self._adapted = lora.is_adapted(student.model)
        self._check(config, longest_tokens)
        self._engine: VllmEngine | None = None
        self._lora: Any = None  # vLLM's request of the adapter
        self._version = -1
        self._has_base = self._has_all = self._asleep = False
        self._error = 0.0

    def update(self, version: int) -> None:
        """See RolloutEngine.update. The same version again hands nothing over.

        Raises:
            RolloutError: the engine can't be started, or computes something else than the trainer afterwards.
        """
        if version == self._version:
            return
        if self._engine is None:
            try:
                self._engine = self._started()
            except EngineError as error:
                raise RolloutError(str(error)) from error
        self._has_all = False
        self._wake(self._engine)
        self._engine.set_version(version)
        ids = handover.known_text(self._student.vocabulary_size, self._engine.max_tokens - 1)
        theirs = self._engine.logprobs(ids, self._lora)
        mine = handover.logprobs(self._student, ids)
        self._error = handover.difference(mine, theirs, self._tolerance, f"{WHOSE} vllm", version)
        self._version = version

    def figures(self) -> Metrics:
        """See RolloutEngine.figures: the largest difference that the last hand-over left, in nats."""
        return {"handover_gap": self._error}

    def close(self) -> None:
        """See RolloutEngine.close."""
        engine, self._engine, self._version = self._engine, None, -1
        if engine is not None:
            engine.close()

    def _finished(
        self, prompts: Sequence[Prompt], uids: Sequence[int], keep_top_k: int
    ) -> Iterator[tuple[int, Rollout]]:
        if self._engine is None:
            raise RolloutError(f"{WHOSE} vllm has no weights yet: update comes before sampling")
        self._wake(self._engine)
        try:
            yield from self._engine.stream(
                prompts,
                uids,
                config=self._rollout,
                seed=self._seed,
                vocabulary_size=self._student.vocabulary_size,
                stop_ids=self._stop_ids,
                keep_top_k=keep_top_k,
                lora=self._lora,
            )
        finally:
            self._sleep(self._engine)

    def _sleep(self, engine: VllmEngine) -> None:
        """Frees the cache, and the weights: those under adapters wait in the host's memory, others come again."""
        if self._student.device.type == "cuda" and not self._asleep:
            engine.sleep(1 if self._adapted else 2)
            self._has_all = self._has_all and self._adapted
            self._asleep = True

    def _wake(self, engine: VllmEngine) -> None:
        """Awake and with the student's weights as they are."""
        if self._asleep:
            engine.wake_up("weights")
        if not self._has_all:
            if not (self._has_base and self._adapted):
                self._hand_over(engine)
            if self._adapted:
                self._hand_over_adapter(engine)
            self._has_base = self._has_all = True
        if self._asleep:
            engine.wake_up("kv_cache")
        self._asleep = False

    def _hand_over(self, engine: VllmEngine) -> None:
        from vllm.config import set_current_vllm_config

        worker = engine.worker
        model = worker.model_runner.get_model()
        try:
            with set_current_vllm_config(worker.vllm_config), torch.no_grad():
                side.begin(model)
                side.load(model, handover.weights(self._student.model).items())
                side.finish(model, worker.model_config)
        except (RuntimeError, ValueError, KeyError, AttributeError) as error:
            raise RolloutError(f"{WHOSE}: vLLM does not take the student's weights: {one_line(error)}") from error

    def _hand_over_adapter(self, engine: VllmEngine) -> None:
        """vLLM's own loading of an adapter, with our tensors where it reads files."""
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper
        from vllm.lora.request import LoRARequest

        manager = engine.worker.model_runner.lora_manager
        model = engine.worker.model_runner.get_model()
        mapper = getattr(model, "hf_to_vllm_mapper", None)

        def from_memory(request: Any) -> Any:
            described = PEFTHelper.from_dict(lora.settings(self._student.model))
            described.validate_legal(manager.lora_config)
            # Copies: vLLM scales what it is given in place.
            copies = {name: tensor.clone() for name, tensor in lora.tensors(self._student.model).items()}
            return LoRAModel.from_lora_tensors(
                request.lora_int_id,
                copies,
                described,
                device="cpu",
                dtype=manager.lora_config.lora_dtype,
                model_vocab_size=manager.vocab_size,
                weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
                skip_prefixes=getattr(model, "lora_skip_prefixes", None),
            )

        manager._load_adapter = from_memory
        self._lora = LoRARequest(ADAPTER_NAME, ADAPTER, "(in memory)")
        try:
            with torch.no_grad():
                manager.add_adapter(LoRARequest(ADAPTER_NAME, ADAPTER, "(in memory)", load_inplace=True))
        except (RuntimeError, ValueError) as error:
            raise RolloutError(f"{WHOSE}: vLLM does not take the student's adapter: {one_line(error)}") from error

    def _started(self) -> VllmEngine:
        """An engine of this student's shape, with weights of no meaning."""
        shape = self._student.model.config
        with tempfile.TemporaryDirectory(prefix="student-") as folder, _architecture_named(self._student.model):
            shape.save_pretrained(folder)
            arguments: dict[str, Any] = {
                "model": folder,
                "load_format": "dummy",
                "skip_tokenizer_init": True,
                "runner": "generate",
                "dtype": self._dtype,
                "seed": 0,
                "max_model_len": self._max_tokens,
                "max_num_seqs": self._rollout.batch_sequences,
                "enforce_eager": self._options.enforce_eager,
                "gpu_memory_utilization": self._options.gpu_memory_utilization,
                "enable_prefix_caching": True,
                "async_scheduling": False,
                **self._options.arguments,
            }
            cache_gib = self._options.kv_cache_gib
            if self._student.device.type == "cuda":
                arguments["enable_sleep_mode"] = True
            else:
                cache_gib = cache_gib or CPU_CACHE_GIB
            if cache_gib:
                arguments["kv_cache_memory_bytes"] = int(cache_gib * 2**30)
            if self._world > 1:
                arguments["distributed_executor_backend"] = "external_launcher"
            if self._adapted:
                rank = int(lora.settings(self._student.model)["r"])
                arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": min(r for r in RANKS if r >= rank)}
            return VllmEngine(arguments, in_process=True, whose=WHOSE)

    def _check(self, config: TrainConfig, longest_tokens: int) -> None:
        """Everything that can be refused before an engine starts."""
        refuse_unfit_for_vllm(config, self._student, WHOSE)
        ours = sorted(OURS & self._options.arguments.keys())
        if ours:
            raise ValueError(f"rollout.vllm.arguments: got {ours[0]}, expected none: other options decide it")
        if self._max_tokens < longest_tokens:
            raise ValueError(
                f"rollout.vllm.max_model_len: got {self._max_tokens}, expected {longest_tokens} or more: the longest "
                "prompt and completion that can come up"
            )
        rank = int(lora.settings(self._student.model)["r"]) if self._adapted else 0
        if rank > RANKS[-1]:
            raise ValueError(f"student.lora.r: got {rank} with {WHOSE} vllm, expected {RANKS[-1]} at most")
        device = self._student.device
        if device.type != "cuda":
            return
        if config.train.reference:
            raise ValueError(
                "train.reference: got true with rollout.engine vllm on a GPU, whose kernels promise no bits"
            )
        if self._world == 1 and device.index:
            raise ValueError(
                f"student.device: got {device} with rollout.engine vllm, expected cuda: choose it by "
                f"CUDA_VISIBLE_DEVICES={device.index}"
            )


@contextlib.contextmanager
def _architecture_named(model: Any) -> Iterator[None]:
    """A configuration that nobody loaded does not say of which class its model is."""
    before = model.config.architectures
    model.config.architectures = before or [type(model).__name__]
    try:
        yield
    finally:
        model.config.architectures = before
