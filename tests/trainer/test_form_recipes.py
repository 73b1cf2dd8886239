"""The shipped configurations say what their heads promise, and are taken as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from student_trainer import cli

RECIPES = Path(__file__).parents[2] / "recipes"
LORA = sorted(path.name for path in RECIPES.glob("s3-lora-*.yaml"))


@pytest.fixture
def printed(capsys):
    def run(name: str, *more: str) -> dict:
        assert cli.run([f"--config={RECIPES / name}", *more, "--print-config"]) == 0
        return yaml.safe_load(capsys.readouterr().out)

    return run


def test_there_is_one_for_each_size() -> None:
    assert LORA == ["s3-lora-1.7b.yaml", "s3-lora-4b.yaml", "s3-lora-8b.yaml"]


@pytest.mark.parametrize("name", LORA)
def test_lora_recipes_are_in_the_ranges_that_their_users_found(name: str, printed) -> None:
    config = printed(name, "--teacher-url=grpc://host:8301")
    assert config["student"]["model"].lower().endswith(name.removeprefix("s3-lora-").removesuffix(".yaml"))
    assert 64 <= config["student"]["lora"]["r"] <= 96
    assert config["optim"]["learning_rate"] == 1e-4
    assert 256 <= config["train"]["batch_size"] <= 512
    assert 512 <= config["rollout"]["max_new_tokens"] <= 1024
    assert (config["rollout"]["group_size"], config["loss"]["objective"]) == (4, "policy_gradient")
    longest = config["data"]["max_prompt_tokens"] + config["rollout"]["max_new_tokens"]
    assert config["train"]["micro_batch_tokens"] >= longest


def test_the_hybrid_recipe_is_the_command_it_replaces(printed) -> None:
    config = printed("s4-hybrid.yaml", "--student=DIR")
    assert config["student"]["layers_from_teacher"] == [14, 16, 17, 30]
    assert config["student"]["graft_from"] == config["teacher"]["model"]
    assert config["student"]["freeze"] == ["mlp", "replaced_layers"]
    assert (config["loss"]["ce_weight"], config["loss"]["kl_weight"]) == (1.0, 0.1)
    assert config["loss"]["scale_by_t2"]
    assert (config["data"]["format"], config["data"]["seq_length"]) == ("packed_text", 1024)
    assert (config["optim"]["schedule"], config["train"]["strategy"]) == ("wsd", "ddp_sharded")
    assert config["train"]["batch_size"] == 2 * config["train"]["num_processes"]
    assert config["checkpoint"]["save_every"] == 1000
