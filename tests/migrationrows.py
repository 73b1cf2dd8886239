"""The rows of docs/migration.md as runs, and how the effect of each is seen."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import migrated
import pytest
import torch
from migrated import PAIRS, Ran, assert_loss, mean_advantage
from training import PROMPTS, weights

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "migration.md").read_text()
SECTIONS = {"NeMo-RL distillation": "nemo", "ROLL DistillPipeline": "roll", "Local on-policy script": "local"}
SECTIONS["Hybrid distillation script"] = "hybrid"
TEXT = "--prompts={place}/prompts.txt"
FILES = "data.source={place}/problems.jsonl"
ON_ANSWERS = f"{FILES} data.on_policy_fraction=0 teacher.top_k=all"
"""Whole sequences known beforehand, all columns compared."""
KEYS = "data.question_key=q_zh data.answer_key=a_zh data.system_key=s_zh data.on_policy_fraction=0"


@dataclass(frozen=True, slots=True)
class Row:
    """A run of one row: what the docs have of it, what it needs besides, and how its effect is seen."""

    says: str
    check: Callable[[Ran], None]
    needs: str = TEXT


def loss_by(divergence: Any, **how: Any) -> Callable[[Ran], None]:
    return lambda ran: assert_loss(ran, divergence, **how)


def fixed_shares(ran: Ran) -> list[float]:
    return [line["fixed_samples"] for line in ran.lines]


def whole_steps(ran: Ran) -> None:
    assert set(fixed_shares(ran)) == {0.0, 1.0}
    assert sum(fixed_shares(ran)) < len(ran.lines) / 2


def single_samples(ran: Ran) -> None:
    assert any(0.0 < share < 1.0 for share in fixed_shares(ran))
    assert 0.1 < sum(fixed_shares(ran)) / len(ran.lines) < 0.5


def untempered(ran: Ran) -> None:
    for scored in ran.scored[0]:
        drawn = migrated.log_probs(ran.student, scored)[:, : migrated.V].log_softmax(1)
        at = torch.from_numpy(scored.rollout.token_ids).long()[:, None]
        assert scored.rollout.behaviour_logprob == pytest.approx(drawn.gather(1, at)[:, 0].numpy(), abs=1e-5)
    assert max(s.rollout.num_tokens for s in ran.scored[0]) == 8


def greedy(ran: Ran) -> None:
    for scored in ran.scored[0]:
        at = torch.from_numpy(scored.rollout.token_ids).long()
        assert torch.equal(migrated.log_probs(ran.student, scored)[:, : migrated.V].argmax(1), at)


def regular(ran: Ran) -> None:
    trained = [line["step"] for line in ran.lines if "loss" in line]
    assert trained == [2, 4]
    assert [line["step"] for line in ran.lines if "eval_accuracy" in line] == [0, 3, 4]
    assert [state["step"] for state in ran.states()] == [3, 4]


def kept(ran: Ran) -> None:
    losses = {line["step"]: line["loss"] for line in ran.lines if "loss" in line}
    assert {state["step"] for state in ran.states()} == {*sorted(losses, key=losses.__getitem__)[:3], 6}
    ran.has(eval__every=20)
    assert [line["step"] for line in ran.lines if "eval_accuracy" in line] == [0, 6]


def small_batches(ran: Ran) -> None:
    ran.has(train__micro_batch_tokens=48, train__packing="on", student__gradient_checkpointing=True)
    assert_loss(ran, migrated.reverse_kl)


def prompts_are(expected: set[str]) -> Callable[[Ran], None]:
    def check(ran: Ran) -> None:
        assert {s.rollout.prompt.text for scored in ran.scored for s in scored} <= expected

    return check


def boxed(ran: Ran) -> None:
    prompts_are({f"{q}\n\nPut the final answer in \\boxed{{}}. " for q in PROMPTS})(ran)


def keyed(ran: Ran) -> None:
    prompts_are({f"be brief {q} " for q in PROMPTS})(ran)
    answers = {a for _, a in PAIRS}
    assert {s.rollout.prompt.answer for s in ran.scored[0]} <= answers
    assert all(s.rollout.source == "fixed" for s in ran.scored[0])


def seven(ran: Ran) -> None:
    assert ran.lines[0]["loss"] == pytest.approx(7.0)


def on_prompt(ran: Ran) -> None:
    for scored in ran.scored[0]:
        assert scored.rollout.scored_prompt_tokens == len(scored.rollout.prompt_ids) - 1
    assert_loss(ran, migrated.reverse_kl)


def top_64(ran: Ran) -> None:
    for scored in ran.scored[0]:
        log_p = migrated.log_probs(ran.teacher, scored)[:, : migrated.V]
        found = torch.from_numpy(scored.scores.topk_ids.copy()).long()
        assert torch.equal(found.sort(1).values, log_p.topk(64).indices.sort(1).values)


def adapters(ran: Ran) -> None:
    written = json.loads((ran.directory / "final-adapter" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (64, 32)
    merged = weights(ran.directory / "final")
    assert set(merged) == set(migrated.plain(ran.student).state_dict()) - {"lm_head.weight"}


def tensorboard(ran: Ran) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(ran.directory / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]


def wandb(ran: Ran) -> None:
    assert list((ran.directory / "wandb").glob("offline-run-*/*.wandb"))


def ends_are_trained_on(ran: Ran) -> None:
    assert all(s.rollout.token_ids[-1] == 1 for s in ran.scored[0])
    assert ran.lines[0]["tokens"] == sum(s.rollout.num_tokens for s in ran.scored[0])
    assert_loss(ran, migrated.reverse_kl)


def policy_gradient(**how: Any) -> Callable[[Ran], None]:
    def check(ran: Ran) -> None:
        assert ran.lines[0]["loss"] == pytest.approx(-mean_advantage(ran, **how), rel=1e-4)

    return check


def centred(ran: Ran) -> None:
    assert abs(mean_advantage(ran)) > 0.01
    assert ran.lines[0]["loss"] == pytest.approx(0.0, abs=1e-5)


def recipe(rank: int) -> Callable[[Ran], None]:
    def check(ran: Ran) -> None:
        ran.has(student__lora__r=rank, rollout__group_size=4, loss__objective="policy_gradient")
        assert len(ran.scored[0]) == 2 * 4

    return check


def own_class(ran: Ran) -> None:
    ran.has(student__model_class="transformers.models.llama.modeling_llama:LlamaForCausalLM")
    assert_loss(ran, migrated.reverse_kl)


def grafted(ran: Ran) -> None:
    layers = (14, 16, 17, 30)
    config = json.loads((ran.directory / "final" / "config.json").read_text())
    assert tuple(config["preceptor_graft"]["layers"]) == layers, "a checkpoint says which layers it has"
    before = migrated.plain(Path(ran.config["student"]["graft_from"])).state_dict()
    after = weights(ran.directory / "final")
    for layer in layers:
        (name,) = (n for n in after if re.search(rf"layers\.{layer}\..*self_attn\.q_proj\.weight", n))
        original = before[f"model.layers.{layer}.self_attn.q_proj.weight"].float()
        assert torch.equal(after[name], original) == bool(ran.config["student"]["freeze"])


def hybrid(ran: Ran) -> None:
    """CE + 0.1·T²·KL on packed text, T = 2."""
    grafted(ran)
    ran.has(loss__scale_by_t2=True, loss__ce_weight=1.0, loss__kl_weight=0.1)
    assert all(s.rollout.source == "fixed" and s.rollout.num_tokens == 24 for s in ran.scored[0])


def packed(ran: Ran) -> None:
    assert all(len(s.rollout.prompt.token_ids) + s.rollout.num_tokens == 25 for s in ran.scored[0])


def decayed(ran: Ran) -> None:
    rates = [line["learning_rate"] for line in ran.lines]
    assert rates[0] == rates[1] == 0.002
    assert rates[2] > rates[3]


def one_epoch(ran: Ran) -> None:
    assert ran.lines[-1]["step"] == 3  # nine prompts, four at a time
    assert [state["step"] for state in ran.states()][-1] == 3


def overridden(ran: Ran) -> None:
    ran.has(train__seed=5, loss__objective="jsd")


SKEWED = "loss.skew_lambda=0.2 loss.objective=skewed_"
BY_LOSS = "checkpoint.keep_last=1 checkpoint.metric=loss checkpoint.mode=min"
ADAPTIVE = "loss.objective=adaptive_kl loss.adaptive_alpha=0.4"
TURNS = "rollout.max_new_tokens=8 data.max_prompt_tokens=100 optim.warmup_steps=1 train.batch_size=2 train.steps=2"
S3 = f"--student={{place}}/qwen3 {TURNS} tracking.trackers=[]"
S4 = (
    "--student={place}/mamba2 student.graft_from={place}/deep student.freeze=[replaced_layers] student.dtype=float32 "
    "teacher.model= teacher.serve_args=[] teacher.visible_devices= teacher.top_k=8 data.source={place}/texts.jsonl "
    "data.seq_length=24 optim.warmup_steps=1 optim.decay_steps=1 train.steps=2 train.batch_size=4 "
    "train.num_processes=1 train.strategy=auto tracking.trackers=[] tracking.wandb_mode=offline"
)
"""What the recipe's own scale is made small by, and its models' names."""
PIECES = "data.seq_length=24 loss.objective=forward_kl"
GRAFT = "--student={place}/bamba student.graft_from={place}/deep --prompts={place}/prompts.txt"
ROWS: dict[str, list[Row]] = {
    "nemo/λ": [
        Row("data.on_policy_fraction=0.7 data.mix=step", whole_steps, f"{FILES} train.steps=10"),
        Row("data.on_policy_fraction=0.7 data.mix=sample", single_samples, f"{FILES} train.steps=6"),
    ],
    "nemo/`kl_type`": [
        Row("loss.objective=forward_kl", loss_by(migrated.forward_kl), ON_ANSWERS),
        Row("loss.objective=reverse_kl", loss_by(migrated.reverse_kl), ON_ANSWERS),
        Row("loss.objective=mixed_kl loss.mixed_weight=0.5", loss_by(migrated.mixed_kl(0.5)), ON_ANSWERS),
    ],
    "nemo/`max_length`": [
        Row("rollout.max_new_tokens=8 rollout.temperature=1", untempered),
        Row("rollout.max_new_tokens=8 rollout.greedy=true", greedy),
    ],
    "nemo/`max_steps`": [
        Row(
            "train.steps=4 eval.every=3 checkpoint.save_every=3 tracking.log_every=2", regular,
            "--prompts={place}/prompts.txt eval.data.source={place}/problems.jsonl eval.num_prompts=2",
        )
    ],
    "nemo/validation": [
        Row(
            "eval.every=20 eval.data.source={place}/problems.jsonl checkpoint.keep_top_k=3", kept,
            f"{TEXT} eval.num_prompts=2 train.steps=6 checkpoint.save_every=1 {BY_LOSS}",
        )
    ],
    "nemo/dynamic": [
        Row(
            "train.micro_batch_tokens=48 train.packing=on student.gradient_checkpointing=true", small_batches,
            f"{ON_ANSWERS} loss.objective=reverse_kl",
        )
    ],
    "nemo/dataset": [
        Row("data.preset=math-cl", boxed, ""),
        Row("data.source=of_mine:Rows", prompts_are({f"{q} " for q in PROMPTS[:4]}), ""),
        Row(
            "data.prompt_template_file={place}/template.txt",
            prompts_are({f"Think: {q} Now: " for q in PROMPTS}),
        ),
    ],
    "nemo/own losses": [Row("loss.objective=of_mine:seven", seven, f'{TEXT} loss.options={{{{"value":7}}}}')],
    "nemo/`--config": [Row("--config={place}/run.yaml train.seed=5", overridden, "")],
    "roll/`distill_loss_weight`": [
        Row(
            "loss.distill_weight=0.85 data.on_policy_fraction=0",
            loss_by(migrated.reverse_kl, weights=(0.15, 0.85)), ON_ANSWERS,
        )
    ],
    "roll/`kd_temperature`": [
        Row(
            "loss.student_temperature=2 loss.teacher_temperature=3",
            loss_by(migrated.reverse_kl, temperatures=(2.0, 3.0)), ON_ANSWERS,
        )
    ],
    "roll/six": [
        Row("loss.objective=forward_kl", loss_by(migrated.forward_kl), ON_ANSWERS),
        Row("loss.objective=jsd", loss_by(migrated.jsd), ON_ANSWERS),
        Row(ADAPTIVE, loss_by(migrated.adaptive_kl(0.4)), ON_ANSWERS),
        Row(f"{SKEWED}forward_kl", loss_by(migrated.skewed_forward_kl(0.2)), ON_ANSWERS),
        Row(f"{SKEWED}reverse_kl", loss_by(migrated.skewed_reverse_kl(0.2)), ON_ANSWERS),
    ],
    "roll/`logits_topk`": [
        Row("teacher.top_k=64", top_64),
        Row("teacher.top_k=all", loss_by(migrated.reverse_kl)),
    ],
    "roll/`distill_on_prompt`": [Row("loss.on_prompt=true", on_prompt, ON_ANSWERS)],
    "roll/JSON": [
        *(Row(f"{KEYS} data.source={{place}}/keyed.{kind}", keyed, "") for kind in ("json", "jsonl", "parquet", "csv")),
        Row("data.prompt_key=p_zh data.source={place}/keyed.json", prompts_are({f"<{q}>" for q in PROMPTS}), ""),
    ],
    "roll/same family": [
        Row("--student={place}/llama", loss_by(migrated.reverse_kl), f"{TEXT} teacher.top_k=all"),
        Row("--student={place}/gpt2", loss_by(migrated.reverse_kl), f"{TEXT} teacher.top_k=all"),
    ],
    "roll/TensorBoard": [Row("tracking.trackers=[tensorboard]", tensorboard)],
    "local/Δ": [
        Row("loss.objective=policy_gradient loss.kl_coef=0.5", policy_gradient(kl_coef=0.5)),
        Row("loss.objective=policy_gradient loss.kl_discount=0.9", policy_gradient(discount=0.9)),
        Row("loss.objective=policy_gradient loss.center=batch", centred),
    ],
    "local/LoRA": [Row("student.lora.r=64 student.lora.alpha=32", adapters)],
    "local/tulu3": [
        Row("data.preset=tulu3", prompts_are({f"{q} " for q in PROMPTS}), ""),
        Row("data.preset=deepmath", boxed, ""),
        Row("--prompts={place}/prompts.txt", prompts_are({f"{q} " for q in PROMPTS}), ""),
    ],
    "local/wandb": [Row("tracking.trackers=[wandb] tracking.wandb_mode=offline", wandb)],
    "local/pad token": [Row("--student={place}/padless", ends_are_trained_on, ON_ANSWERS)],
    "local/settings": [
        Row(f"--config={ROOT}/recipes/s3-lora-1.7b.yaml", recipe(64), S3),
        Row(f"--config={ROOT}/recipes/s3-lora-4b.yaml", recipe(96), S3),
        Row(f"--config={ROOT}/recipes/s3-lora-8b.yaml", recipe(64), S3),
    ],
    "hybrid/another": [
        Row("--student={place}/bamba", loss_by(migrated.reverse_kl), f"{TEXT} teacher.top_k=all"),
        Row(
            "student.model_class=transformers.models.llama.modeling_llama:LlamaForCausalLM", own_class,
            "--student={place}/llama --prompts={place}/prompts.txt teacher.top_k=all",
        ),
    ],
    "hybrid/CE": [Row(f"--config={ROOT}/recipes/s4-hybrid.yaml", hybrid, S4)],
    "hybrid/FineWeb": [
        Row("data.preset=fineweb-edu data.local_files_only=true", packed, PIECES),
        Row("data.preset=fineweb-edu data.streaming=true", packed, f"{PIECES} data.source={{place}}/texts.jsonl"),
    ],
    "hybrid/`--layers`": [Row("student.layers_from_teacher=[14,16,17,30]", grafted, GRAFT)],
    "hybrid/`--freeze_mlp": [
        Row("student.freeze=[mlp,replaced_layers]", grafted, f"{GRAFT} student.layers_from_teacher=[14,16,17,30]")
    ],
    "hybrid/WSD": [Row("optim.schedule=wsd optim.decay_steps=2", decayed, f"{TEXT} train.steps=4")],
    "hybrid/steps": [Row("train.steps=9 train.epochs=1 train.batch_size=4 checkpoint.save_every=2", one_epoch)],
}  # fmt: skip
