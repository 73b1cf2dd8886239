"""`student-eval`: accuracy of a checkpoint on problems with known answers, with a confidence interval; or what
lm-evaluation-harness finds. Under torchrun or accelerate launch the processes share the problems.

Exit codes: 0 evaluated; 1 sampling failed or the result can't be written; 2 the command, a file or the model does not
fit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import Field, model_validator

from student_trainer import distributed, guards, harness, student
from student_trainer.config import StudentConfig
from student_trainer.console import Console
from student_trainer.data.config import PromptConfig
from student_trainer.data.prompts import load_prompts
from student_trainer.distributed import Distributed
from student_trainer.evaluate import Sampler, TaskName, in_order, judged, require_answers, summarise
from student_trainer.harness import HarnessConfig
from student_trainer.rollout.base import RolloutError
from student_trainer.rollout.chat import Chat
from student_trainer.rollout.config import RolloutConfig
from student_trainer.rollout.environment import Conversations, Streams
from student_trainer.rollout.torch_sampler import TorchSampler
from student_trainer.rollout.vllm_sampler import VllmSampler
from student_trainer.types import Prompt
from teacher_api import settings
from teacher_api.settings import Section

PROGRAM = "student-eval"
DESCRIPTION = """Accuracy of a model on problems with known answers (--data), or on tasks of lm-evaluation-harness
(--tasks).

Exit codes: 0 evaluated; 1 sampling failed or the result can't be written; 2 the command, a file or the model does not
fit."""
COLLECTIVE_TIMEOUT_S = 6 * 3600.0
"""How long processes wait for the slowest one's share."""
FAILED, UNUSABLE = 1, 2
SHORTCUTS = {
    "--data": "data.source",
    "--limit": "data.limit",
    "--max-new-tokens": "rollout.max_new_tokens",
    "--json": "output",
    "--tasks": "harness.tasks",
    "--include-path": "harness.include_path",
    "--num-fewshot": "harness.num_fewshot",
}


class GreedyByDefault(RolloutConfig):
    """How the model answers."""

    greedy: bool = True
    """Take the most likely token; false: sample."""


class EvaluationConfig(Section):
    model: str = ""
    """Directory in Hugging Face format, or hub id. Required. Remote code is never run."""
    revision: str = ""
    """Hub revision (branch, tag or commit); empty: the default branch."""
    model_class: str = ""
    """package.module:Class to load the model with; empty: what its config.json says."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass."""
    device: str = "auto"
    """auto: a GPU if there is one, else cpu; or cpu, cuda, cuda:1."""
    data: PromptConfig = PromptConfig()
    """Problems with answers (data.answer_key)."""
    rollout: GreedyByDefault = GreedyByDefault()
    engine: Literal["torch", "vllm"] = "torch"
    """What answers: torch, in this process, or an engine of vLLM."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """With engine vllm: its engine's arguments, by any name it knows: --vllm.tensor_parallel_size 2."""
    harness: HarnessConfig = HarnessConfig()
    """lm-evaluation-harness, instead of data and task."""
    task: TaskName = "final_answer"
    """exact_match: the whole completion; final_answer: what follows the last "Answer:", "####" or stands in \\boxed{};
    numeric_answer: the last number. A completion cut off at rollout.max_new_tokens is never correct."""
    output: str = ""
    """Write the result, with every completion, to this JSON file."""
    seed: int = Field(0, ge=0)
    """Of sampling, where rollout.greedy is off, and of the worked examples that the harness draws."""

    @model_validator(mode="after")
    def _complete(self) -> EvaluationConfig:
        if not self.model:
            raise ValueError("model is not set: name a directory or a hub id (--model MODEL)")
        if not self.data.source and not self.harness.tasks:
            raise ValueError(
                "data.source is not set: name a file of problems (--data FILE), or tasks of lm-evaluation-harness "
                "(--tasks NAME,…)"
            )
        if self.rollout.greedy and self.seed and not self.harness.tasks:
            raise ValueError(f"seed: got {self.seed} with rollout.greedy, expected none: nothing is drawn")
        if self.rollout.group_size != 1:
            raise ValueError(f"rollout.group_size: got {self.rollout.group_size}, expected 1: one answer per problem")
        return self

    @model_validator(mode="after")
    def _nothing_idle(self) -> EvaluationConfig:
        """Options that another leaves without effect."""
        if self.harness.tasks:
            for name in ("data", "rollout", "engine", "task"):
                got, default = getattr(self, name), type(self).model_fields[name].get_default(call_default_factory=True)
                if got != default:
                    raise ValueError(f"{name}: set together with harness.tasks, expected one of them: {_shown(got)}")
        elif self.harness != HarnessConfig():
            raise ValueError("harness: set without harness.tasks, expected both or neither (--tasks NAME,…)")
        if self.rollout.engine != "torch":
            raise ValueError(f"rollout.engine: got {self.rollout.engine}, expected none: engine says what answers")
        if self.vllm and self.engine != "vllm":
            raise ValueError(f"vllm: got {self.vllm} with engine {self.engine}, expected none")
        if self.engine == "vllm" and self.model_class:
            raise ValueError(f"model_class: got {self.model_class} with engine vllm, expected none: vLLM has its own")
        if self.engine == "vllm" and self.device != "auto":
            raise ValueError(f"device: got {self.device} with engine vllm, expected auto: vLLM chooses for itself")
        return self


def _shown(value: object) -> str:
    """What of a section is not as by default."""
    return str(value.model_dump(exclude_defaults=True)) if isinstance(value, Section) else repr(value)


def main() -> NoReturn:
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs the command line and returns its exit code."""
    try:
        config, _ = settings.load(
            EvaluationConfig,
            arguments,
            prog=PROGRAM,
            description=DESCRIPTION,
            env_prefix="PRECEPTOR_EVAL_",
            shortcuts=SHORTCUTS,
        )
        if config.output and not Path(config.output).absolute().parent.is_dir():
            raise ValueError(f"output is {config.output!r}, but its directory is not there; make it first")
        with contextlib.ExitStack() as stack:
            dist = distributed.join(config.device, timeout_s=COLLECTIVE_TIMEOUT_S)
            stack.callback(dist.close)
            lines, content = run_harness(config, dist) if config.harness.tasks else solve(config, dist)
    except guards.FailedElsewhere as error:
        return error.code
    except (ValueError, RolloutError, distributed.RankLost) as error:
        return _say(error, _exit_code(error))
    if not dist.is_main:
        return 0
    print("\n".join(lines))
    if config.output:
        try:
            Path(config.output).write_text(json.dumps({"model": config.model, **content}, indent=1) + "\n")
        except OSError as error:
            return _say(f"can't write the result: {error}", FAILED)
    return 0


def _exit_code(error: Exception) -> int:
    return UNUSABLE if isinstance(error, ValueError) else FAILED


def _say(message: object, code: int) -> int:
    """One line on standard error."""
    print(f"{PROGRAM}: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def solve(config: EvaluationConfig, dist: Distributed) -> tuple[list[str], dict[str, Any]]:
    """Has the model solve the problems, each process its share; lines for people, and the result as JSON.

    Raises:
        ValueError: something does not fit, in one line.
        FailedElsewhere: another process says what.
    """
    console = Console(is_main=dist.is_main, total_steps=1)
    try:
        with guards.told_once(dist, _exit_code):
            solver = _solver(config, dist)
            require_answers(solver.prompts, config.task)
            places = [place for place in range(len(solver.prompts)) if dist.owns(place)]
            with (
                solver.arithmetic,
                console.progress(
                    f"evaluating {config.model}",
                    judged(
                        solver.sampler,
                        solver.prompts,
                        places,
                        config.task,
                        decode=lambda ids: str(solver.tokenizer.decode(list(ids), skip_special_tokens=True)),
                        batch_size=solver.batch_size,
                    ),
                    len(places),
                ) as counted,
            ):
                mine = list(counted)
    finally:
        console.close()
    result = summarise(in_order(dist.gather(mine)))
    line = (
        f"{config.model}: {config.task} {result.accuracy:.1%} "
        f"(95 % interval {result.low:.1%} to {result.high:.1%}, n = {result.num})"
    )
    return [line], {"task": config.task, **dataclasses.asdict(result)}


@dataclasses.dataclass(frozen=True)
class _Solver:
    sampler: Sampler
    prompts: Sequence[Prompt]
    tokenizer: Any
    arithmetic: contextlib.AbstractContextManager[Any]
    batch_size: int


def _solver(config: EvaluationConfig, dist: Distributed) -> _Solver:
    """The model with the problems put to it. Raises ValueError in one line where something does not fit."""
    if config.engine == "vllm":
        return _vllm_solver(config, dist)
    model = student.load(_student_config(config), dist.device)
    student.require_known("rollout.stop_token_ids", config.rollout.stop_token_ids, model.tokenizer)
    sampler = TorchSampler(
        model.model,
        eos_token_ids=model.eos_token_ids,
        pad_token_id=model.pad_token_id,
        vocabulary_size=model.vocabulary_size,
        config=config.rollout,
        seed=config.seed,
    )
    prompts = load_prompts(config.data, model.tokenizer).all()
    solver = _conversing(sampler, config, model.tokenizer, model.eos_token_ids)
    return _Solver(solver, prompts, model.tokenizer, model.arithmetic(), config.rollout.batch_sequences)


def _conversing(sampler: Streams, config: EvaluationConfig, tokenizer: Any, eos_token_ids: Sequence[int]) -> Sampler:
    """`sampler`, or with rollout.environment conversations around it."""
    if not config.rollout.environment:
        return sampler
    return Conversations(sampler, config.rollout, Chat(tokenizer, eos_token_ids))


def _vllm_solver(config: EvaluationConfig, dist: Distributed) -> _Solver:
    if dist.world > 1:
        raise ValueError(
            f"engine: got vllm in {dist.world} processes, expected one: vLLM starts its own "
            "(--vllm.tensor_parallel_size)"
        )
    tokenizer = student.load_tokenizer(_student_config(config))
    student.require_known("rollout.stop_token_ids", config.rollout.stop_token_ids, tokenizer)
    prompts = load_prompts(config.data, tokenizer).all()  # before the engine, which takes its time
    sampler = VllmSampler(
        config.model,
        revision=config.revision,
        dtype=config.dtype,
        tokenizer=tokenizer,
        config=config.rollout,
        seed=config.seed,
        arguments=config.vllm,
    )
    solver = _conversing(sampler, config, tokenizer, sampler.eos_token_ids)
    return _Solver(solver, prompts, tokenizer, contextlib.nullcontext(), len(prompts))


def run_harness(config: EvaluationConfig, dist: Distributed) -> tuple[list[str], dict[str, Any]]:
    """As `solve`, for tasks of lm-evaluation-harness."""
    with guards.told_once(dist, _exit_code):
        model = student.load(_student_config(config), dist.device)
    found = harness.evaluate(model, config.harness, config.seed, dist)
    lines = [
        f"{config.model}: {one.task} {one.metric} {one.value:.4f}"
        + (f" (95 % interval {one.low:.4f} to {one.high:.4f}" if one.low is not None else " (no interval")
        + f", n = {one.num})"
        for one in found
    ]
    return lines, {"tasks": [dataclasses.asdict(one) for one in found]}


def _student_config(config: EvaluationConfig) -> StudentConfig:
    return StudentConfig(
        model=config.model, revision=config.revision, model_class=config.model_class, dtype=config.dtype
    )


if __name__ == "__main__":
    main()
