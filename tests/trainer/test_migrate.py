"""`student-migrate` on what users of the other systems have: files and commands in, a configuration that reads out."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from theirs import HYBRID, LOCAL, NEMO, ROLL

from student_trainer.config import TrainConfig
from student_trainer.losses import registry
from student_trainer.migrate import cli, hybrid, local_script, nemo_rl, references, roll
from student_trainer.migrate.base import MigrationError, flat
from teacher_api import settings_text

DOCS = Path(__file__).parents[2] / "docs" / "migration.md"


def migrated(given: str, tmp_path: Path, suffix: str = "") -> tuple[dict[str, Any], list[str]]:
    """Flat settings as they are read back from what is written, and the lines for a person."""
    if suffix:
        path = tmp_path / f"theirs{suffix}"
        path.write_text(given)
        given = str(path)
    migration = cli.migrate(given)
    return flat(yaml.safe_load(cli.as_yaml(migration)) or {}), cli.notes(migration)


def test_nemo_rl_file(tmp_path: Path) -> None:
    found, notes = migrated(NEMO, tmp_path, ".yaml")
    expected = {
        "data.on_policy_fraction": 0.5,
        "data.preset": "math-cl",
        "data.max_prompt_tokens": 4096,
        "loss.objective": "forward_kl",
        "rollout.max_new_tokens": 2048,
        "rollout.greedy": True,
        "teacher.model": "org/teacher-32B",
        "student.model": "org/student-1.5B",
        "student.gradient_checkpointing": True,
        "train.steps": 1000,
        "train.micro_batch_tokens": 8192,
        "train.packing": "on",
        "train.strategy": "fsdp2",
        "train.num_processes": 8,
        "eval.every": 100,
        "eval.data.preset": "gsm8k",
        "eval.data.split": "test",
        "checkpoint.save_every": 500,
        "checkpoint.keep_top_k": 3,
        "checkpoint.metric": "eval_accuracy",
        "checkpoint.mode": "max",
        "tracking.log_every": 10,
        "tracking.trackers": ["wandb"],
        "tracking.project": "distil",
        "tracking.run_name": "org/student-1.5B-run",
        "optim.learning_rate": 2e-5,
        "optim.betas": [0.9, 0.999],
        "optim.warmup_steps": 10,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert "rollout.temperature" not in found
    assert any("rollout.temperature = 0.1" in line for line in notes)  # nothing is dropped in silence
    assert any("policy.dtensor_cfg.tensor_parallel_size = 2" in line for line in notes)


def test_evaluations_are_asked_for_where_there_is_something_to_solve(tmp_path: Path) -> None:
    theirs = (
        "distillation: {{val_period: 50}}\ncheckpointing: {{keep_top_k: 2, metric_name: 'val:accuracy'}}\ndata: {}\n"
    )
    nothing, notes = migrated(theirs.format("{dataset_name: math_cl}"), tmp_path, ".yaml")
    assert not [key for key in nothing if key.startswith(("eval.", "checkpoint.keep_top_k"))]
    assert any("eval.every = 50" in line and "eval.data.source" in line for line in notes)
    own, _ = migrated(theirs.format("{dataset_name: gsm8k}"), tmp_path, ".yaml")
    assert (own["eval.every"], own["eval.data.preset"], own["eval.data.split"]) == (50, "gsm8k", "test")
    file = "{dataset_name: math_cl, validation: {dataset_name: held_out.jsonl}}"
    named, _ = migrated(theirs.format(file), tmp_path, ".yaml")
    assert (named["eval.data.source"], named["checkpoint.keep_top_k"]) == ("held_out.jsonl", 2)
    unknown, notes = migrated(
        theirs.format("{dataset_name: math_cl, validation: {dataset_name: AIME2024}}"), tmp_path, ".yaml"
    )
    assert "eval.every" not in unknown
    assert any("AIME2024" in line for line in notes)
    script, _ = migrated(f"{LOCAL.strip()} --eval_every 5", tmp_path)
    assert "eval.every" not in script


def test_nemo_rl_command_with_overrides(tmp_path: Path) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(NEMO)
    overrides = "distillation.lambda_=0.7 distillation.kl_type=reverse"
    command = f"uv run python examples/run_distillation.py \
 --config {file} \
 {overrides}"
    found, _ = migrated(command, tmp_path)
    assert (found["data.on_policy_fraction"], found["loss.objective"]) == (0.7, "reverse_kl")
    assert found["train.steps"] == 1000
    found, notes = migrated("uv run x/run_distillation.py --config no/such.yaml distillation.kl_type=mixed", tmp_path)
    assert found == {"loss.objective": "mixed_kl"}
    assert any("no/such.yaml" in line and "not found" in line for line in notes)


def test_nemo_rl_engines(tmp_path: Path) -> None:
    """Colocated vLLM is ours; on GPUs of its own it takes servers that nobody can start from here."""
    file = tmp_path / "theirs.yaml"
    file.write_text(NEMO)
    theirs = f"uv run python examples/run_distillation.py --config {file} policy.generation.backend=vllm"
    theirs += " policy.generation.vllm_cfg.gpu_memory_utilization=0.6 policy.generation.vllm_cfg.enforce_eager=true"
    ours = {"engine": "vllm", "vllm.gpu_memory_utilization": 0.6, "vllm.enforce_eager": True}
    found, notes = migrated(theirs, tmp_path)
    assert {key: found.get(f"rollout.{key}") for key in ours} == ours
    for more, expected in (("policy.generation.colocated.enabled=false", True), ("distillation.lambda_=0", False)):
        found, notes = migrated(f"{theirs} {more}", tmp_path)
        assert not [key for key in found if key.startswith(("rollout.engine", "rollout.vllm"))]
        assert any("policy.generation.backend" in line and "rollout-serve" in line for line in notes) == expected
    assert "rollout.engine" not in migrated(NEMO, tmp_path, ".yaml")[0]


def test_roll_file(tmp_path: Path) -> None:
    found, notes = migrated(ROLL, tmp_path, ".yaml")
    expected = {
        "train.seed": 42,
        "train.output_dir": "./output/distill",
        "train.batch_size": 8 * 4 * (8 // 2),
        "train.micro_batch_size": 8,
        "train.num_processes": 8,
        "train.epochs": 1,
        "train.strategy": "ddp_sharded",
        "train.packing": "on",
        "checkpoint.save_every": 100,
        "checkpoint.resume": "never",
        "student.model": "org/student-7B",
        "student.dtype": "bfloat16",
        "student.gradient_checkpointing": True,
        "teacher.model": "org/teacher-14B",
        "teacher.top_k": "all",
        "teacher.visible_devices": "8,9,10,11",
        "teacher.serve_args": ["--backend=vllm", "--tensor-parallel-size=4"],
        "loss.objective": "skewed_reverse_kl",
        "loss.skew_lambda": 0.2,
        "loss.distill_weight": 0.85,
        "loss.student_temperature": 2.0,
        "loss.teacher_temperature": 3.0,
        "loss.on_prompt": True,
        "optim.schedule": "cosine",
        "optim.warmup_steps": 5,
        "data.source": "data/one.json",
        "data.question_key": "question_zh",
        "data.answer_key": "answer_zh",
        "data.on_policy_fraction": 0.0,
        "data.overlong": "drop",
        "tracking.trackers": ["tensorboard"],
    }
    assert {key: found.get(key) for key in expected} == expected
    assert "loss.adaptive_alpha" not in found  # it belongs to another objective
    assert any("student.strategy_args.strategy_config.tensor_model_parallel_size = 2" in line for line in notes)


def test_roll_script_with_variables(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "name.yaml").write_text(ROLL)
    script = tmp_path / "run.sh"
    script.write_text(
        f'#!/bin/bash\nCONFIG_NAME="name"  # a comment\nCONFIG_PATH="{tmp_path}/folder"\n\n'
        "python examples/start_distill_pipeline.py \\\n"
        "  --config_path $CONFIG_PATH \\\n  --config_name ${CONFIG_NAME} \\\n"
        '  "$@"\n'
    )
    found, _ = migrated(str(script), tmp_path)
    assert found["student.model"] == "org/student-7B"


def test_local_script_command(tmp_path: Path) -> None:
    found, notes = migrated(LOCAL, tmp_path)
    assert found == {
        "student.model": "org/student",
        "student.dtype": "bfloat16",
        "student.lora.r": 96,
        "student.lora.alpha": 48,
        "teacher.model": "org/teacher",
        "teacher.serve_args": ["--backend=vllm"],
        "data.preset": "tulu3",
        "train.batch_size": 256,
        "train.steps": 7,
        "train.num_processes": 2,
        "rollout.group_size": 4,
        "rollout.max_new_tokens": 512,
        "loss.objective": "policy_gradient",
        "loss.kl_coef": 0.5,
        "loss.kl_discount": 0.9,
        "optim.learning_rate": 1e-4,
        "checkpoint.save_every": 200,
        "tracking.trackers": ["wandb"],
        "tracking.project": "p",
        "tracking.run_name": "n",
        "tracking.wandb_mode": "offline",
    }
    assert any("teacher_ds_zero3" in line for line in notes)


def test_hybrid_command(tmp_path: Path) -> None:
    found, notes = migrated(HYBRID, tmp_path)
    expected = {
        "student.dtype": "bfloat16",
        "student.layers_from_teacher": [14, 16, 17, 30],
        "student.graft_from": "TEACHER_MODEL",
        "student.freeze": ["mlp", "replaced_layers"],
        "teacher.model": "TEACHER_MODEL",
        "teacher.visible_devices": "4",
        "loss.objective": "forward_kl",
        "loss.ce_weight": 1.0,
        "loss.kl_weight": 0.1,
        "loss.student_temperature": 2.0,
        "loss.teacher_temperature": 2.0,
        "loss.scale_by_t2": True,
        "data.preset": "fineweb-edu",
        "data.seq_length": 512,
        "data.local_files_only": True,
        "train.batch_size": 2 * 3 * 4,
        "train.num_processes": 4,
        "train.strategy": "ddp_sharded",
        "train.steps": 1000,
        "optim.schedule": "wsd",
        "tracking.wandb_mode": "offline",
    }
    assert {key: found.get(key) for key in expected} == expected
    assert "data.streaming" not in found
    text = "\n".join(notes)
    assert "abc123" not in text  # a key is not repeated
    assert "NCCL_ALGO" in text
    assert "TEACHER_MODEL" in text


def test_evaluation_command_names_ours() -> None:
    migration = cli.migrate(
        "CUDA_VISIBLE_DEVICES=7 python x/eval_mmlu_hybrid.py --dtype bfloat16 --layers 1 2 --ckpt out"
    )
    assert not migration.settings
    assert "student-eval --model out/final --dtype bfloat16 --tasks mmlu" in "\n".join(cli.notes(migration))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("no/such/file.yaml", "no such file"),
        ("pip install -r requirements.txt", "'pip' is no program that is known here"),
        ("echo hello", "no command that starts a program"),
        ("python x.py 'unbalanced", "can't read the command"),
    ],
)
def test_what_is_no_systems_is_refused(given: str, says: str) -> None:
    with pytest.raises(MigrationError, match=re.escape(says)):
        cli.migrate(given)


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.yaml"
    file.write_text("services: {web: {image: x}}\n")
    with pytest.raises(MigrationError, match="services"):
        cli.migrate(str(file))


def test_unknown_keys_and_values_are_named(tmp_path: Path) -> None:
    found, notes = migrated("distillation: {kl_type: sideways, invented: 3}\n", tmp_path, ".yaml")
    assert found == {}
    assert any("distillation.kl_type = 'sideways'" in line for line in notes)
    assert any("distillation.invented = 3" in line for line in notes)


NOT_OF_THE_KIND = [
    ("student_pretrain: S\nresume_from_checkpoint: null\n", "resume_from_checkpoint = None"),
    ("student_pretrain: S\nteacher: {model_args: {dtype: auto}}\n", "teacher.model_args.dtype = 'auto'"),
    ("student_pretrain: S\nstudent: {data_args: {file_name: null}}\n", "student.data_args.file_name = None"),
    ("student_pretrain: S\nteacher: {device_mapping: 0}\n", "teacher.device_mapping = 0"),
    (
        "student_pretrain: S\nstudent: {training_args: {per_device_train_batch_size: '${oc.env:N}'}}\n",
        "student.training_args.per_device_train_batch_size = '${oc.env:N}'",
    ),
    ("distillation: {}\ncluster: {gpus_per_node: '${no.such}'}\n", "cluster.gpus_per_node = '${no.such}'"),
    ("distillation: {}\npolicy: {scheduler: [{name: a.LinearLR, kwargs: null}]}\n", "policy.scheduler = ["),
    ("torchrun train_gpus.py --layers a b", "layers = ['a', 'b']"),
    ("torchrun train_gpus.py --batch_size two", "batch_size = 'two'"),
    ("python -m local_distill.train_on_policy_local --steps --batch_size 4", "steps = True"),
]


@pytest.mark.parametrize(("given", "named"), NOT_OF_THE_KIND, ids=[named for _, named in NOT_OF_THE_KIND])
def test_a_value_of_another_kind_is_named_and_left(given: str, named: str, tmp_path: Path) -> None:
    _, notes = migrated(given, tmp_path, ".yaml" if "\n" in given else "")
    assert any(line.startswith(f"Not carried over: {named}") for line in notes), notes


OVERRIDDEN = """
distillation: {max_steps: 30, val_period: "${distillation.max_steps}"}
policy:
  model_name: M
  max_grad_norm: 2.0
  scheduler: [{name: torch.optim.lr_scheduler.CosineAnnealingLR, kwargs: {T_max: 30}}]
data: {dataset_name: gsm8k}
"""


@pytest.mark.parametrize(
    ("word", "changed"),
    [
        ("distillation.max_steps=50", {"train.steps": 50, "eval.every": 50}),
        ("~policy.scheduler", {"optim.schedule": None}),
        ("++policy={model_name: B}", {"student.model": "B"}),
        ("policy.max_grad_norm=1e-1", {"optim.grad_clip": 0.1}),
        ("policy.model_name=[B", {"student.model": "[B"}),
    ],
)
def test_overrides_change_the_file_before_its_references_are_followed(
    word: str, changed: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(OVERRIDDEN)
    plain, _ = migrated(str(file), tmp_path)
    assert (plain["optim.schedule"], plain["eval.every"]) == ("cosine", 30)
    found, notes = migrated(f"python run_distillation.py --config {file} '{word}'", tmp_path)
    assert found == {key: value for key, value in {**plain, **changed}.items() if value is not None}
    assert not any("not carried over" in line for line in notes)


def test_words_that_are_no_overrides_are_named(tmp_path: Path) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(OVERRIDDEN)
    _, notes = migrated(f"python run_distillation.py extra --config {file} --multirun", tmp_path)
    assert [line for line in notes if "not carried over" in line] == [
        "Note: 'extra' of the command is no key=value, and not carried over.",
        "Note: '--multirun' of the command is no key=value, and not carried over.",
    ]


def test_several_files_keep_what_is_said_of_all_of_them(tmp_path: Path) -> None:
    text = (
        "student_pretrain: S\nsequence_length: 512\n"
        "student: {data_args: {file_name: [a/train.json, b/train.json], question_key: q, answer_key: r}}\n"
    )
    path = tmp_path / "theirs.yaml"
    path.write_text(text)
    migration = cli.migrate(str(path))
    assert not migration.left
    ours = yaml.safe_load(cli.as_yaml(migration))
    config = TrainConfig.model_validate({**ours, "teacher": {"url": "grpc://host:1"}})
    assert [(d.name, d.source) for d in config.data.domains] == [
        ("train_0", "a/train.json"),
        ("train_1", "b/train.json"),
    ]
    for domain in config.data.domains:
        assert (domain.question_key, domain.answer_key, domain.max_prompt_tokens) == ("q", "r", 512)
        assert (domain.max_answer_tokens, domain.overlong) == (512, "drop")


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_bytes(b"distillation: {a: '\xe9'}")
    with pytest.raises(MigrationError, match=r"theirs\.yaml: not UTF-8 text"):
        cli.migrate(str(file))


@pytest.mark.parametrize(
    ("given", "suffix"),
    [
        ("kd_objective: forward_kl\nhf_token: hush\ntracker_kwargs: {api_key: hush}", ".yaml"),
        ("kd_objective: forward_kl\nstudent: {training_args: {hub_token: hush, deepspeed_secret: hush}}", ".yaml"),
        ("python train_on_policy_local.py --wandb_api_key hush --db-password=hush --token hush", ""),
        ("HF_TOKEN=hush HF_TOKEN_2=hush WANDB_API_KEY=hush python train_on_policy_local.py --steps 3", ""),
    ],
)
def test_no_secret_is_repeated(given: str, suffix: str, tmp_path: Path) -> None:
    _, notes = migrated(given, tmp_path, suffix)
    assert not any("hush" in note for note in notes), notes
    assert any("= …: " in note for note in notes), notes


def test_a_number_of_tokens_is_no_secret(tmp_path: Path) -> None:
    _, notes = migrated("python train_on_policy_local.py --max_new_tokens many --stop-token-id=x", tmp_path)
    assert any("max_new_tokens = 'many'" in note for note in notes), notes
    assert any("stop-token-id = 'x'" in note for note in notes), notes


PACKING = (
    "policy: {{dynamic_batching: {{enabled: {0}, train_mb_tokens: 4096}}, sequence_packing: {{train_mb_tokens: 8192}}}}"
)


@pytest.mark.parametrize(
    ("given", "key", "value", "named"),
    [
        (
            PACKING.format("true"), "train.micro_batch_tokens", 4096,
            "policy.sequence_packing.train_mb_tokens = 8192: train.micro_batch_tokens is 4096 by "
            "policy.dynamic_batching.train_mb_tokens already, expected one value",
        ),
        (
            PACKING.format("false"), "train.micro_batch_tokens", 8192,
            "policy.dynamic_batching.train_mb_tokens = 4096: policy.dynamic_batching.enabled is false",
        ),
        (
            "policy: {model_name: org/student}\ndistillation: {max_steps: 5, max_num_steps: 9}",
            "train.steps", 5, "distillation.max_num_steps = 9: train.steps is 5 by distillation.max_steps already",
        ),
        (
            "data: {dataset_name: gsm8k, train: {dataset_name: tulu3}}\npolicy: {model_name: org/student}",
            "data.preset", "gsm8k",
            "data.train.dataset_name = 'tulu3': data.preset is 'gsm8k' by data.dataset_name already",
        ),
    ],
)  # fmt: skip
def test_two_keys_for_one_of_ours_are_named(given: str, key: str, value: Any, named: str, tmp_path: Path) -> None:
    found, notes = migrated(given, tmp_path, ".yaml")
    assert found[key] == value
    assert any(f"Not carried over: {named}" in note for note in notes), notes


def test_two_keys_that_say_the_same_need_no_word(tmp_path: Path) -> None:
    found, notes = migrated(
        "policy: {sequence_packing: {train_mb_tokens: 512}}\ntrain_mb_tokens: 512", tmp_path, ".yaml"
    )
    assert found["train.micro_batch_tokens"] == 512
    assert not any("train_mb_tokens" in note for note in notes), notes


def test_references_resolve() -> None:
    tree = {
        "a": {"b": 3, "c": "${a.b}", "d": "${.b}", "e": {"f": "${..b}", "g": "${mul:${a.b}, 2}"}},
        "h": "x-${a.b}-${no.such}",
    }
    found = references.resolved(tree)
    assert found["a"] == {"b": 3, "c": 3, "d": 3, "e": {"f": 3, "g": 6}}
    assert found["h"] == "x-3-${no.such}"


@pytest.mark.parametrize("module", [nemo_rl, roll, local_script, hybrid], ids=lambda module: module.NAME)
def test_every_key_of_ours_in_a_table_exists(module: Any) -> None:
    sections = {registry.get(name).config_class for name in registry.names()}
    losses = {key for section in sections for key in section.model_fields}
    for theirs, rule in module.TABLE.items():
        for key in re.findall(r"`([\w.]+)`", rule.ours):
            section, _, name = key.partition(".")
            if section == "loss":
                assert name in losses, (theirs, key)
            else:
                settings_text.field_at(TrainConfig, tuple(key.split(".")))  # raises where there is none


def test_the_docs_show_the_tables() -> None:
    assert cli.tables() in DOCS.read_text()


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    output = tmp_path / "ours.yaml"
    code = "from student_trainer.migrate.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, LOCAL, "-o", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Not carried over: teacher_ds_zero3" in done.stderr
    written = output.read_text()
    assert yaml.safe_load(written)["loss"] == {"objective": "policy_gradient", "kl_coef": 0.5, "kl_discount": 0.9}
    TrainConfig.model_validate(yaml.safe_load(written))
    refused = subprocess.run([sys.executable, "-c", code, "ls -l"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
