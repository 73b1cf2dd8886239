"""The `loss` section: which class reads it, what it refuses and how it says so; what each objective asks for."""

from __future__ import annotations

import sys

import pytest

from student_trainer import losses
from student_trainer.cli import SHORTCUTS
from student_trainer.config import TrainConfig
from student_trainer.losses import registry
from student_trainer.losses.base import Needs, Objective
from student_trainer.losses.config import CustomConfig, DivergenceConfig, LossConfig, LossField, SampledTokenConfig
from teacher_api import settings
from teacher_api.settings import Section


def test_every_objective_parses_from_its_name_and_builds():
    for name in losses.names():
        config = losses.parse_loss({"objective": name})
        assert config.objective == name
        assert losses.parse_loss(config.model_dump()) == config
        assert isinstance(losses.build(config), Objective)
        for key, field in type(config).model_fields.items():
            assert key == "objective" or field.description, f"{name}.{key} has no documentation"


def test_defaults_are_reverse_kl_on_the_union_with_a_bucket():
    config = losses.parse_loss({})
    assert (config.objective, config.support, config.tail, config.normalise) == (
        "reverse_kl",
        "union",
        "bucket",
        "token",
    )
    assert losses.parse_loss({"objective": "forward_kl"}).support == "teacher"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"objective": "reverse_k"}, "unknown objective 'reverse_k'; did you mean 'reverse_kl'"),
        ({"objective": "zzz"}, "unknown objective 'zzz'; Known: .*forward_kl, .*reverse_kl"),
        ({"objective": 3}, "loss.objective: expected a name, got 3"),
        ({"tial": "none"}, r"loss.tial: unknown key; did you mean loss.tail\?"),
        ({"objective": "policy_gradient", "kl_coeff": 1}, r"loss.kl_coeff: unknown key; did you mean loss.kl_coef\?"),
        ({"kl_discount": 0.9}, "not a key of objective 'reverse_kl' .it belongs to policy_gradient"),
        ({"objective": "policy_gradient", "support": "union"}, "belongs to .*forward_kl, .*reverse_kl"),
        ({"tail": "bukket"}, "loss.tail: .*'bucket', 'renormalise' or 'none', got 'bukket'"),
        ({"student_temperature": 0}, "loss.student_temperature: .*greater than 0, got 0"),
        ({"objective": "policy_gradient", "teacher_temperature": 2}, "loss.teacher_temperature: .*T = 1.*got 2"),
        ({"objective": "policy_gradient", "clip": 1.5}, "loss.clip: .*less than 1, got 1.5"),
        ({"objective": "policy_gradient", "center": "prompt"}, "loss.center: .*got 'prompt'"),
        ({"objective": "jsd", "beta": 1.1}, "loss.beta: .*less than or equal to 1, got 1.1"),
        ({"objective": "skewed_forward_kl", "skew_lambda": 1}, "loss.skew_lambda: .*less than 1, got 1"),
        ({"objective": "adaptive_kl", "adaptive_alpha": 0}, "loss.adaptive_alpha: .*greater than 0, got 0"),
        ({"objective": "mixed_kl", "mixed_weight": -0.1}, "loss.mixed_weight: .*got -0.1"),
        ({"objective": "mixed_kl", "beta": 0.1}, r"not a key of objective 'mixed_kl' \(it belongs to jsd\)"),
        ({"objective": "k3", "support": "union"}, "not a key of objective 'k3'"),
        ({"ignore_token_ids": [3, -1]}, "loss.ignore_token_ids.1: .*got -1"),
        ({"objective": "no_such_module:f"}, "can't import 'no_such_module:f'"),
        ({"objective": "math:no_such"}, "can't import 'math:no_such'"),
        ({"objective": "math:pi"}, "'math:pi' is a float; expected a function"),
        ([], r"expected a section of keys and values, got \[\]"),
    ],
)
def test_mistakes_are_refused_in_one_line_that_names_key_and_value(keys, message):
    with pytest.raises(ValueError, match=message) as caught:
        losses.parse_loss(keys)
    assert "\n" not in str(caught.value)


def test_a_field_of_another_section_keeps_the_objectives_own_class():
    class Outer(Section):
        loss: LossField

    outer = Outer.model_validate({"loss": {"objective": "policy_gradient", "clip": 0.2}})
    assert outer.loss.clip == 0.2
    assert outer.model_dump()["loss"]["clip"] == 0.2
    assert Outer.model_validate(outer.model_dump()) == outer


def test_a_function_of_ones_own_is_found_beside_the_user(tmp_path, monkeypatch):
    (tmp_path / "my_losses_module.py").write_text("def f(inputs, config): return None\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    config = losses.parse_loss({"objective": "my_losses_module:f", "options": {"a": [1]}, "tail": "none"})
    assert isinstance(config, CustomConfig)
    assert (config.options, config.tail) == ({"a": [1]}, "none")
    assert losses.build(config).needs(5) == Needs(5, 0)


DIVERGENCES = [n for n in losses.names() if issubclass(registry.get(n).config_class, DivergenceConfig)]
SAMPLED_TOKEN = [n for n in losses.names() if issubclass(registry.get(n).config_class, SampledTokenConfig)]


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(
    ("support", "top_k", "wanted"),
    [
        ("teacher", 8, Needs(8, 0)),
        ("student", 8, Needs(0, 8)),
        ("union", 8, Needs(8, 8)),
        ("teacher", "all", Needs("all", 0)),
        ("student", "all", Needs("all", 0)),
        ("union", "all", Needs("all", 0)),
        ("union", 0, Needs(0, 0)),
    ],
)
def test_divergences_ask_for_the_ids_of_their_support(name, support, top_k, wanted):
    assert losses.build(losses.parse_loss({"objective": name, "support": support})).needs(top_k) == wanted


@pytest.mark.parametrize("tail", ["renormalise", "none"])
def test_a_support_of_one_token_without_the_bucket_is_refused(tail):
    with pytest.raises(ValueError, match=r"loss.tail: .*teacher.top_k is 0; set teacher.top_k to at least 1"):
        losses.build(losses.parse_loss({"tail": tail})).needs(0)


@pytest.mark.parametrize("name", SAMPLED_TOKEN)
def test_objectives_of_the_sampled_token_ask_for_its_logprob_alone(name):
    objective = losses.build(losses.parse_loss({"objective": name}))
    assert objective.needs(64) == objective.needs("all") == Needs(0, 0)


def test_a_name_can_be_registered_once_only():
    class Twice(LossConfig):
        objective: str = "forward_kl"

    losses.names()
    with pytest.raises(TypeError, match="registered twice"):
        registry.register(Twice)(Objective)
    with pytest.raises(TypeError, match="needs a name"):
        registry.register(LossConfig)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("loss.beta=7", "command line: loss.beta: Input should be less than or equal to 1, got 7"),
        ("loss.kl_weight=0", "command line: loss.kl_weight: got 0 without a ce_weight"),
        ("loss.betta=1", "command line: loss.betta: unknown key; did you mean loss.beta?"),
        ("student.lora.alpha=3", "command line: student.lora.alpha: got 3 with r 0"),
        ("data.mix=sample", "command line: data.mix: got 'sample' with on_policy_fraction 1"),
    ],
)
def test_a_refused_key_is_named_once(given: str, said: str) -> None:
    argv = ["--student=x", "--prompts=y", "--teacher-url=grpc://host:1", "loss.objective=jsd", given]
    with pytest.raises(settings.SettingsError) as refused:
        settings.load(TrainConfig, argv, prog="p", description="", env_prefix="S_", environ={}, shortcuts=SHORTCUTS)
    assert str(refused.value).startswith(said)
    assert str(refused.value).count(given.partition("=")[0]) == 1
