"""What `accelerate launch` sets, taken from accelerate's own code, is done or refused by name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands import launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from student_trainer.config import TrainConfig
from student_trainer.distributed import Distributed
from student_trainer.optim import OptimConfig
from student_trainer.parallel import choose as choosing
from student_trainer.parallel.base import Replicated
from student_trainer.parallel.ddp_sharded import DdpSharded
from student_trainer.parallel.fsdp2 import Fsdp2
from student_trainer.parallel.launchers import SIGN, asked_strategy
from student_trainer.parallel.zero import Zero

CONFIGURATIONS = Path(__file__).parents[2] / "deploy" / "accelerate"


def config(**sections: Any) -> TrainConfig:
    needed = {"student": {"model": "m"}, "teacher": {"url": "grpc://unused:1"}, "data": {"source": "unused"}}
    return TrainConfig.model_validate({**needed, **{k: {**needed.get(k, {}), **v} for k, v in sections.items()}})


def environment(name: str, *options: str) -> dict[str, str]:
    """What ranks get that `accelerate launch --config_file NAME OPTIONS` starts."""
    parser = launch.launch_command_parser()
    arguments = ["--config_file", str(CONFIGURATIONS / f"{name}.yaml"), "--num_processes=2", *options]
    parsed, defaults, _ = launch._validate_launch_command(parser.parse_args([*arguments, "script.py"]))
    parsed = argparse.Namespace(**{**vars(parsed), "main_process_port": 0})
    if parsed.use_deepspeed:
        parsed.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        found = prepare_deepspeed_cmd_env(parsed)[1]
    else:
        found = prepare_multi_gpu_env(parsed)
    return {**found, "WORLD_SIZE": "2", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("ddp", None), ("ddp-2-nodes", None), ("fsdp2", "fsdp2"), ("zero2", "zero2"), ("zero3", "zero3")],
)
def test_our_configurations_ask_for_what_they_are_named_after(name: str, strategy: str | None) -> None:
    options = ["--main_process_ip=127.0.0.1"] if name == "ddp-2-nodes" else []
    assert asked_strategy(config(), environment(name, *options)) == strategy


REFUSED = [
    ("ddp", ["--mixed_precision=fp16"], {}, "ACCELERATE_MIXED_PRECISION=fp16"),
    ("ddp", ["--mixed_precision=bf16"], {}, "student.dtype is float32"),
    ("ddp", ["--dynamo_backend=inductor"], {}, "ACCELERATE_DYNAMO_BACKEND=INDUCTOR"),
    ("fsdp2", ["--fsdp_version=1"], {}, "FSDP_VERSION=1"),
    ("fsdp2", ["--fsdp_offload_params=true"], {}, "train.cpu_offload is false"),
    ("fsdp2", ["--fsdp_activation_checkpointing=true"], {}, "student.gradient_checkpointing is false"),
    ("fsdp2", ["--fsdp_reshard_after_forward=false"], {}, "FSDP_RESHARD_AFTER_FORWARD=false"),
    ("fsdp2", ["--fsdp_auto_wrap_policy=SIZE_BASED_WRAP"], {}, "FSDP_AUTO_WRAP_POLICY=SIZE_BASED_WRAP"),
    ("fsdp2", ["--fsdp_cpu_ram_efficient_loading=true"], {}, "FSDP_CPU_RAM_EFFICIENT_LOADING=true"),
    ("fsdp2", ["--fsdp_transformer_layer_cls_to_wrap=Qwen3DecoderLayer"], {}, "FSDP_TRANSFORMER_CLS_TO_WRAP"),
    ("zero2", ["--zero_stage=1"], {}, "ACCELERATE_DEEPSPEED_ZERO_STAGE=1"),
    ("zero2", ["--gradient_accumulation_steps=4"], {}, "train.micro_batch_tokens"),
    ("zero2", ["--gradient_clipping=0.5"], {}, "optim.grad_clip is 1.0"),
    ("zero3", ["--offload_param_device=cpu"], {}, "train.cpu_offload"),
    ("zero3", ["--zero3_init_flag=true"], {}, "ACCELERATE_DEEPSPEED_ZERO3_INIT=true"),
]


@pytest.mark.parametrize(("name", "options", "sections", "words"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_is_not_done_is_refused(name: str, options: list[str], sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"^accelerate launch sets ") as refusal:
        asked_strategy(config(**sections), environment(name, *options))
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_agrees_is_done() -> None:
    both = environment("fsdp2", "--mixed_precision=bf16", "--fsdp_activation_checkpointing=true")
    settings = {"dtype": "bfloat16", "gradient_checkpointing": True}
    assert asked_strategy(config(student=settings), both) == "fsdp2"
    assert asked_strategy(config(optim={"grad_clip": 0.5}), environment("zero2", "--gradient_clipping=0.5")) == "zero2"


def test_tensor_and_context_parallelism_are_refused() -> None:
    asked = {**environment("fsdp2"), "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
    with pytest.raises(ValueError, match="parallelism are not offered"):
        asked_strategy(config(), asked)


def test_one_process_where_several_were_asked_for_is_refused() -> None:
    """Pitfall: `accelerate launch --cpu --num_processes 2` starts one process, and says nothing."""
    with pytest.raises(ValueError, match="started one process where several were asked for"):
        asked_strategy(config(), {SIGN: "no", "MASTER_PORT": "29500", "MASTER_ADDR": "127.0.0.1"})


def chosen(monkeypatch: pytest.MonkeyPatch, strategy: str, world: int = 2, **variables: str) -> Replicated:
    monkeypatch.setattr(choosing.os, "environ", variables)
    monkeypatch.setattr(choosing.importlib.util, "find_spec", lambda name: object())
    return choosing.choose(config(train={"strategy": strategy}), Distributed(0, world, 0, torch.device("cpu")))


def test_each_name_gets_its_strategy(monkeypatch) -> None:
    found = {name: chosen(monkeypatch, name) for name in ("auto", "ddp", "ddp_sharded", "fsdp2", "zero2", "zero3")}
    kinds = {name: type(strategy) for name, strategy in found.items()}
    assert kinds == {
        "auto": Replicated, "ddp": Replicated, "ddp_sharded": DdpSharded, "fsdp2": Fsdp2, "zero2": Zero, "zero3": Zero,
    }  # fmt: skip
    assert {n: s.name for n, s in found.items() if n != "auto"} == {n: n for n in found if n != "auto"}
    asked = environment("fsdp2")
    assert type(chosen(monkeypatch, "auto", **asked)) is Fsdp2
    with pytest.raises(ValueError, match="got ddp, but accelerate launch asks for fsdp2"):
        chosen(monkeypatch, "ddp", **asked)


def test_one_process_has_nothing_to_share(monkeypatch) -> None:
    assert type(chosen(monkeypatch, "auto", world=1)) is Replicated
    with pytest.raises(ValueError, match=r"train\.strategy: got fsdp2 with one process"):
        chosen(monkeypatch, "fsdp2", world=1)


def test_a_package_that_is_missing_is_named(monkeypatch) -> None:
    monkeypatch.setattr(choosing.os, "environ", {})
    monkeypatch.setattr(choosing.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="zero2 needs deepspeed"):
        choosing.choose(config(train={"strategy": "zero2"}), Distributed(0, 2, 0, torch.device("cpu")))


def test_offload_without_a_gpu_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(choosing.os, "environ", {})
    asked = config(train={"strategy": "fsdp2", "cpu_offload": True})
    with pytest.raises(ValueError, match=r"train\.cpu_offload: got true"):
        choosing.choose(asked, Distributed(0, 2, 0, torch.device("cpu")))


@pytest.mark.parametrize("optim", [{"name": "muon"}, {"ema_decay": 0.9}], ids=str)
def test_what_deepspeeds_strategies_do_not_do_is_refused(optim: dict[str, Any]) -> None:
    (key, value) = next(iter(optim.items()))
    strategy = Zero(Distributed(0, 2, 0, torch.device("cpu")), 2)
    with pytest.raises(ValueError, match=rf"optim\.{key}: got {value} with train\.strategy zero2"):
        strategy.spread(None, OptimConfig(**optim), 1)  # type: ignore[arg-type]
