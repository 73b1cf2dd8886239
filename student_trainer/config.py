"""The trainer's whole configuration: one frozen section per part, each declared by the part that owns it, and the
checks that concern several of them. The defaults written here and there are the only ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from student_trainer.alarms import GuardsConfig
from student_trainer.checkpoint import EVAL_PREFIX, CheckpointConfig
from student_trainer.data.config import DataConfig
from student_trainer.evaluate import EvalConfig
from student_trainer.forms.config import LoraConfig, check_freeze, check_layers
from student_trainer.losses.config import LossField, SampledTokenConfig, parse_loss
from student_trainer.optim import OptimConfig, check_length
from student_trainer.planning.config import PlanConfig
from student_trainer.rollout.config import RolloutConfig
from student_trainer.teachers.config import (
    ONLY,
    NamedTeacherConfig,
    TeacherConfig,
    TeachingConfig,
    check_metric,
    check_teachers,
    check_views,
    prefix,
)
from student_trainer.teachers.past import check_past
from student_trainer.tracking import TrackingConfig
from teacher_api.settings import Section

StrategyName = Literal["auto", "ddp", "ddp_sharded", "fsdp2", "zero2", "zero3"]


class StudentConfig(Section):
    """The model that learns."""

    model: str = ""
    """Directory in Hugging Face format, or hub id. Required. Remote code is never run."""
    revision: str = ""
    """Hub revision (branch, tag or commit); empty: the default branch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward and backward pass. Weights and optimizer state are float32 either way: a small learning
    rate would be lost to rounding in bfloat16 weights."""
    device: str = "auto"
    """auto: a GPU of this process' own if there is one, else cpu; or cpu, cuda, cuda:1."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more time, far less memory."""
    dropout: bool = False
    """Keep the model's own dropout while training. Off, q_now is the distribution that is sampled from."""
    model_class: str = ""
    """package.module:Class to load the model with, for an architecture of your own; empty: what its config.json says.
    A class with from_pretrained and save_pretrained, and the interface of transformers' causal language models."""
    lora: LoraConfig = LoraConfig()
    """Adapters instead of the whole weights, where lora.r is set."""
    layers_from_teacher: tuple[int, ...] = ()
    """Layers, counted from 0, that are replaced by those of graft_from with the same numbers before training."""
    graft_from: str = ""
    """Directory or hub id of the model they come from, such as the teacher's: same hidden size, same tokenizer."""
    freeze: tuple[str, ...] = ()
    """Weights that stay as they are: mlp (feed-forward blocks), replaced_layers, or regular expressions searched for in
    the names of parameters. No optimizer state is kept for them."""

    @model_validator(mode="after")
    def _forms_that_go_together(self) -> StudentConfig:
        check_layers(self.layers_from_teacher, self.graft_from)
        check_freeze(self.freeze, self.layers_from_teacher)
        if self.lora.r and self.freeze:
            raise ValueError(
                f"freeze: got {list(self.freeze)} with lora.r {self.lora.r}, expected none: only adapters are trained; "
                "lora.exclude_modules says where there are none"
            )
        if self.lora.r and self.layers_from_teacher:
            raise ValueError(
                f"layers_from_teacher: got {list(self.layers_from_teacher)} with lora.r {self.lora.r}, expected none: "
                "an adapter's checkpoint names a model on disk; give one that has the layers as student.model"
            )
        return self


class TrainSection(Section):
    """The loop itself."""

    steps: int = Field(1000, ge=1)
    """Optimizer steps of the whole run. A run may be lengthened later where optim.schedule is constant."""
    epochs: float = Field(0.0, ge=0.0, allow_inf_nan=False)
    """Passes over the prompts instead of train.steps, rounded up to whole steps; with train.steps given as well:
    whichever ends first. 0: train.steps alone. For one source whose size is known."""
    batch_size: int = Field(32, ge=1)
    """Prompts per step, over all processes; each is sampled rollout.group_size times."""
    micro_batch_tokens: int = Field(16_384, ge=1)
    """Most tokens of one forward and backward: packed, the sum of its sequences; padded, their number times the
    longest. A longer sequence goes alone."""
    micro_batch_size: int = Field(0, ge=0)
    """Most sequences of one forward and backward; 0: no limit of its own."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Sequences of a micro-batch behind each other in one row, none seeing another, instead of padded to one length.
    auto: where a check at the start proves that this student computes the same; on: refuse a student that doesn't."""
    share_prompt: Literal["auto", "on", "off"] = "auto"
    """Completions of one prompt (rollout.group_size) behind one copy of it in a packed row, its forward and backward
    done once. auto: where the student can and it saves 64 tokens or more; on: always, or refuse."""
    loss_chunk_rows: int = Field(0, ge=0)
    """Positions whose logits exist at a time; 0: as many as fit in 160 MiB, on a CPU at most 256."""
    updates: int = Field(1, ge=1, le=64)
    """Optimizer updates from each step's samples. From the second on they are older than the weights: see
    policy_gradient's clip, loss.staleness and loss.ratio_bounds."""
    schedule: Literal["sequential", "strict", "async"] = "strict"
    """sequential: sample, score, learn, one after the other. strict: each sample goes to its teacher when it is
    finished, and learning begins when the first micro-batch is scored; the results are the same, bit for bit. async:
    the next train.max_staleness steps are sampled meanwhile, from weights that are as many steps older."""
    max_staleness: int = Field(0, ge=0, le=64)
    """With schedule async: most optimizer steps between the weights that sample and those that learn."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Everything random is a pure function of this and of the step or sample number."""
    output_dir: str = "runs/train"
    """Holds checkpoints, metrics.jsonl, config.yaml and, at the end, the student in final/."""
    num_processes: int = Field(0, ge=0, le=1024)
    """Training processes on this machine; 0: one per visible GPU, or one. Under torchrun or accelerate launch
    theirs is the number: 0, or the same."""
    strategy: StrategyName = "auto"
    """What each of several processes holds. ddp: everything; ddp_sharded: all weights, its part of the optimizer's
    state; fsdp2: its part of weights, gradients and state; zero2 and zero3: DeepSpeed's, with whole weights and with
    parts. auto: what accelerate launch was told, else ddp. With one process: auto or ddp, which are the same."""
    cpu_offload: bool = False
    """With fsdp2 on GPUs: weights, gradients and optimizer state wait in the host's memory; slower."""
    threads: int = Field(0, ge=0, le=1024)
    """CPU threads per process; 0: torch's own choice (1 in reference mode)."""
    reference: bool = False
    """Bit-reproducible on the same machine: deterministic kernels, a fixed number of threads."""
    max_bad_steps: int = Field(5, ge=1)
    """Stop with an error after this many steps in a row without a finite loss and gradient. Such steps are skipped."""

    @model_validator(mode="after")
    def _staleness_of_async(self) -> TrainSection:
        if (self.max_staleness > 0) != (self.schedule == "async"):
            expected = "at least 1" if self.schedule == "async" else "0: nothing is sampled ahead"
            raise ValueError(
                f"max_staleness: got {self.max_staleness} with train.schedule {self.schedule}, expected {expected}"
            )
        return self


class TrainConfig(Section):
    """Everything `student-train` can be told."""

    student: StudentConfig = Field(default_factory=StudentConfig)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    teachers: dict[str, NamedTeacherConfig] = Field(default_factory=dict)
    """Instead of `teacher`: several, each under a name of your own with the keys of `teacher`, and `domains` or
    `weight`: teachers.math.url=grpc://…"""
    teaching: TeachingConfig = Field(default_factory=TeachingConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    loss: LossField = Field(default_factory=lambda: parse_loss({}))
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainSection = Field(default_factory=TrainSection)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    guards: GuardsConfig = Field(default_factory=GuardsConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    plan: PlanConfig = Field(default_factory=PlanConfig)

    @property
    def all_teachers(self) -> Mapping[str, TeacherConfig]:
        """By name; a single one has none."""
        return self.teachers or {ONLY: self.teacher}

    def accepting_new_teachers(self) -> TrainConfig:
        """The same, with accept_new_teacher for each."""
        accepting = {"accept_new_teacher": True}
        if not self.teachers:
            return self.model_copy(update={"teacher": self.teacher.model_copy(update=accepting)})
        several = {name: one.model_copy(update=accepting) for name, one in self.teachers.items()}
        return self.model_copy(update={"teachers": several})

    @model_validator(mode="after")
    def _complete(self) -> TrainConfig:
        if not self.student.model:
            raise ValueError("student.model is not set: name a directory or a hub id (--student MODEL)")
        if not self.data.source and not self.data.domains:
            raise ValueError("data.source is not set: name a file of prompts (--prompts FILE), or a data.preset")
        check_past(self.all_teachers, self.optim.ema_decay)
        is_packed = any(source.format == "packed_text" for source in self.data.sources)
        check_views(self.all_teachers, on_prompt=self.loss.on_prompt, packed_text=is_packed)
        check_teachers(self.teacher, self.teachers, self.teaching, [domain.name for domain in self.data.domains])
        if not self.train.epochs:
            check_length(self.optim, self.train.steps)
        return self

    @model_validator(mode="after")
    def _checkpoints_ranked_by_what_is_measured(self) -> TrainConfig:
        if ":" not in self.loss.objective:  # one of the user's own may measure things of any name
            check_metric(self.checkpoint.metric, self.teachers)
        if self.checkpoint.metric.startswith(EVAL_PREFIX) and not self.eval.every:
            for name in ("keep_top_k", "mode"):
                got = getattr(self.checkpoint, name)
                if got not in (0, type(self.checkpoint).model_fields[name].default):
                    raise ValueError(
                        f"checkpoint.{name}: got {got!r} with checkpoint.metric {self.checkpoint.metric}, which needs "
                        "evaluations; expected eval.every above 0, or a metric of the training steps such as loss"
                    )
        return self

    @model_validator(mode="after")
    def _nothing_idle(self) -> TrainConfig:
        """Options that another section leaves without effect."""
        rate = OptimConfig.model_fields["muon_learning_rate"].default
        if self.optim.name != "muon" and self.optim.muon_learning_rate != rate:
            raise ValueError(
                f"optim.muon_learning_rate: got {self.optim.muon_learning_rate} with optim.name {self.optim.name}, "
                "expected none: it is muon's"
            )
        if self.train.epochs and (self.data.domains or self.data.streaming):
            raise ValueError(
                f"train.epochs: got {self.train.epochs:g} with {'data.domains' if self.data.domains else 'streaming'}, "
                "expected train.steps: nobody knows how long an epoch is"
            )
        self._nothing_of_sampling_where_nothing_is_sampled()
        if self.train.share_prompt == "on" and self.rollout.group_size == 1:
            raise ValueError(
                "train.share_prompt: got on with rollout.group_size 1, expected auto or off: each prompt has one "
                "completion"
            )
        self._no_idle_ratios()
        self._schedule_that_can_be()
        rollout = self.rollout
        if rollout.environment and self.eval.max_new_tokens >= (rollout.max_total_tokens or math.inf):
            raise ValueError(
                f"eval.max_new_tokens: got {self.eval.max_new_tokens} with rollout.max_total_tokens "
                f"{rollout.max_total_tokens}, expected less: there would be no second turn"
            )
        if self.eval.data is not None and "every" not in self.eval.model_fields_set:
            raise ValueError(
                "eval.every: not set, but eval.data is; expected the steps between evaluations, or 0 for none"
            )
        return self

    def _nothing_of_sampling_where_nothing_is_sampled(self) -> None:
        """λ < 1: what is fixed data has no sampling policy."""
        fraction = self.data.on_policy_fraction
        cross_entropy = self.loss.totals[0]
        learns_nothing = fraction == 0.0 or not cross_entropy
        if fraction < 1.0 and learns_nothing and isinstance(self.loss, SampledTokenConfig):
            raise ValueError(
                f"data.on_policy_fraction: got {fraction:g} with loss.objective {self.loss.objective}, expected 1 (or "
                "above 0 with loss.distill_weight or loss.ce_weight): it learns from what the student samples, and its "
                "estimate is of nothing on other text"
            )
        if fraction == 1.0 and cross_entropy:
            key = "ce_weight" if self.loss.distill_weight is None else "distill_weight"
            raise ValueError(
                f"loss.{key}: got {getattr(self.loss, key)} with data.on_policy_fraction 1, expected none: "
                "cross-entropy counts on fixed data only"
            )
        if fraction > 0.0 and not self.loss.totals[1]:
            key = "kl_weight" if self.loss.distill_weight is None else "distill_weight"
            raise ValueError(
                f"loss.{key}: got 0 with data.on_policy_fraction {fraction:g}, expected more, or on_policy_fraction 0: "
                "nothing would be learned from what the student samples"
            )
        idle = ["engine", "temperature", "top_p", "top_k", "greedy"] if fraction == 0.0 else []
        if fraction == 0.0 and not self.eval.every:
            idle.append("environment")
        if any(source.format == "packed_text" for source in self.data.sources):
            idle.append("group_size")
        for name in idle:
            value = getattr(self.rollout, name)
            if value != RolloutConfig.model_fields[name].default:
                raise ValueError(
                    f"rollout.{name}: got {value!r} with data.on_policy_fraction {fraction:g}, expected none: nothing "
                    "is sampled"
                )

    def _schedule_that_can_be(self) -> None:
        """async: a part that needs the others to stand still."""
        if self.train.schedule != "async":
            return
        if self.rollout.engine == "vllm":
            raise ValueError(
                "train.schedule: got async with rollout.engine vllm, expected strict: that engine sleeps while the "
                "student learns"
            )
        for name, one in self.all_teachers.items():
            if one.refresh_every:
                raise ValueError(
                    f"train.schedule: got async with {prefix(name)}.refresh_every {one.refresh_every}, expected "
                    "strict: steps that are sampled ahead would be scored by the teacher before"
                )

    def _no_idle_ratios(self) -> None:
        """Corrections for samples of another policy, where all are of the one that is trained or nothing is sampled;
        prompts, where there are none."""
        loss, rollout, data = self.loss, self.rollout, self.data
        if loss.on_prompt and all(source.format == "packed_text" for source in data.sources):
            raise ValueError("loss.on_prompt: got true with data.format packed_text, expected none: it has no prompts")
        for key in ("staleness", "behaviour", "ratio_bounds"):
            value = getattr(loss, key)
            if data.on_policy_fraction == 0.0 and value not in (None, "none"):
                raise ValueError(
                    f"loss.{key}: got {value} with data.on_policy_fraction 0, expected none: nothing is sampled"
                )
        if loss.behaviour == "weight" and (rollout.greedy or rollout.is_untempered):
            how = "greedy takes" if rollout.greedy else "temperature 1 without top_p and top_k samples"
            what = "one token, whose ratio says nothing" if rollout.greedy else "from q_old itself"
            raise ValueError(f"loss.behaviour: got weight, expected none: rollout's {how} {what}")
        dropout = self.student.dropout or self.student.lora.dropout
        in_step = self.train.updates == 1 and self.train.schedule != "async"
        fresh = in_step and rollout.engine == "torch" and not dropout
        for key in ("staleness", "ratio_bounds"):
            value = getattr(loss, key)
            if fresh and value not in (None, "none"):
                raise ValueError(
                    f"loss.{key}: got {value} with train.updates 1, expected none: samples are as new as the weights"
                )


_OF_A_TEACHER = (
    "url", "tokenizer", "model", "name", "serve_args", "visible_devices", "api_key", "timeout_s", "attempt_timeout_s",
    "start_timeout_s", "max_concurrency", "request_sequences", "accept_new_teacher", "compression",
    "prompt_template_file", "experiment", "tls_cert", "tls_key", "tls_ca",
)  # fmt: skip
FREE_TO_CHANGE: dict[str, tuple[str, ...]] = {
    "student": ("device", "gradient_checkpointing"),
    "rollout": ("vllm", "server", "environment_timeout_s"),
    "teacher": _OF_A_TEACHER,
    "teachers": _OF_A_TEACHER,
    "train": (
        "steps", "epochs", "micro_batch_tokens", "micro_batch_size", "packing", "share_prompt", "loss_chunk_rows",
        "output_dir", "num_processes", "threads", "max_bad_steps", "strategy", "cpu_offload", "schedule",
    ),
    "eval": (),
    "checkpoint": ("*",),
    "guards": ("*",),
    "tracking": ("*",),
    "plan": ("*",),
}  # fmt: skip
"""Keys that may differ when a run goes on: where things are, how fast, how long. All others define the experiment. (The
teacher itself is held by its fingerprint.)"""


ROUNDING = 1e-9
"""What epochs · prompts / batch may be over a whole number by for being no binary fraction."""


def steps_of_epochs(config: TrainConfig, num_prompts: int) -> TrainConfig:
    """`config` with train.steps as train.epochs make them."""
    steps = max(1, math.ceil(config.train.epochs * num_prompts / config.train.batch_size - ROUNDING))
    if "steps" in config.train.model_fields_set:
        steps = min(steps, config.train.steps)
    check_length(config.optim, steps)
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})


def experiment(config: TrainConfig) -> dict[str, Any]:
    """The flat `section.key` -> value map of what makes two runs the same experiment, as JSON values."""
    flat: dict[str, Any] = {}
    sections = config.model_dump(mode="json")
    sections |= {f"teachers.{name}": values for name, values in sections.pop("teachers").items()}
    if not config.teachers:
        del sections["teaching"]
    for section, values in sections.items():
        free = FREE_TO_CHANGE.get(section.partition(".")[0], ())
        for key, value in values.items():
            if "*" not in free and key not in free:
                flat[f"{section}.{key}"] = value
    for name, one in config.all_teachers.items():
        if one.is_past:
            flat[f"{prefix(name)}.model"] = one.model
    if config.optim.schedule != "constant":  # the rate at every step depends on where it ends
        flat["optim.schedule"] = f"{config.optim.schedule} over train.steps={config.train.steps}"
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two experiments, one `key: old -> new` each, sorted by key."""
    missing = "(not set)"
    return [
        f"{key}: {old.get(key, missing)!r} -> {new.get(key, missing)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, missing) != new.get(key, missing)
    ]
