"""Layers of one model inside another: against the model they come from, and against a forward pass put together by
hand; and checkpoints that say what is in them.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onestep import bare_run
from pydantic import ValidationError
from test_train_gradients import reference, samples  # noqa: F401 (samples is a fixture)
from tinymodels import save_tiny, tiny_model
from transformers import AutoModelForCausalLM

from student_trainer import checkpoint
from student_trainer.config import StudentConfig
from student_trainer.forms import graft
from student_trainer.rollout.config import RolloutConfig
from student_trainer.rollout.torch_sampler import TorchSampler
from student_trainer.student import Student, StudentError, load
from student_trainer.train import accumulate, learn
from student_trainer.types import Prompt
from teacher_api import causal_lm

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
IDS = (torch.arange(40) * 7 % 120)[None]
PAIRS = [  # a student, whose layers it gets, which
    ("mamba2", "qwen3", (0, 1)),
    ("mamba2", "qwen3", (1,)),
    ("mamba2", "gemma2", (0, 1)),  # a sliding window of 16 in one of them
    ("bamba", "qwen3", (0,)),
    ("bamba", "mixtral", (1,)),  # attention in attention's place
    ("qwen3", "llama", (1,)),
    ("gemma2", "qwen3", (0, 1)),
    ("qwen3", "mamba2", (0,)),  # the other way round
    ("qwen3", "bamba", (0, 1)),
]
NAMES = [f"{student}<{donor}{list(layers)}" for student, donor, layers in PAIRS]


def grafted(folder: Path, student: str, donor: str, layers: tuple[int, ...], **settings: Any) -> Student:
    for name, arch, seed in (("student", student, 1), ("donor", donor, 2)):
        if not (folder / name).exists():
            save_tiny(folder / name, arch, seed=seed, scale=2.0)
    settings = {"layers_from_teacher": layers, "graft_from": str(folder / "donor"), **settings}
    return load(StudentConfig(model=str(folder / "student"), **settings), CPU)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids).logits


# -- what it computes


@pytest.mark.parametrize(("student", "donor", "layers"), PAIRS, ids=NAMES)
def test_layers_inside_answer_as_in_their_own_model(student: str, donor: str, layers, tmp_path) -> None:
    """By hand: embedding, then each layer in the model it comes from, then norm and head."""
    got = logits(grafted(tmp_path, student, donor, layers).model)
    own, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("student", "donor"))
    seen: dict[str, torch.Tensor] = {}

    def layer_alone(model: Any, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's answer to `hidden` while its own model runs, whatever else that model computes."""
        layer = graft.decoder_layers(model)[1][index]
        hooks = [
            layer.register_forward_pre_hook(lambda _m, args, kwargs: ((hidden, *args[1:]), kwargs), with_kwargs=True),
            layer.register_forward_hook(lambda _m, _a, out: seen.update(out=out[0] if isinstance(out, tuple) else out)),
        ]
        logits(model)
        for hook in hooks:
            hook.remove()
        return seen["out"]

    first = graft.decoder_layers(own)[1][0]
    hook = first.register_forward_pre_hook(lambda _m, args: seen.update(embedded=args[0]))
    logits(own)
    hook.remove()
    hidden = seen["embedded"]
    for index in range(2):
        hidden = layer_alone(other if index in layers else own, index, hidden)
    last = graft.decoder_layers(own)[1][1]
    hook = last.register_forward_hook(
        lambda _m, _a, out: (hidden, *out[1:]) if isinstance(out, tuple) else hidden  # then norm and head
    )
    expected = logits(own)
    hook.remove()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("student", ["mamba2", "bamba"])
def test_a_student_all_of_whose_layers_are_the_teachers_is_the_teacher(student: str, tmp_path) -> None:
    """Attention, rotary embeddings and masks come along: with the teacher's embedding, norm and head as well, a
    state-space model gives plain transformers' logits."""
    made = grafted(tmp_path, student, "llama", (0, 1))
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "donor")
    norm = "norm_f" if student == "mamba2" else "final_layernorm"
    with torch.no_grad():
        made.model.get_input_embeddings().weight.copy_(teacher.model.embed_tokens.weight)
        made.model.get_output_embeddings().weight.copy_(teacher.lm_head.weight)
        getattr(made.parts.body, norm).weight.copy_(teacher.model.norm.weight)
    getattr(made.parts.body, norm).variance_epsilon = teacher.model.norm.variance_epsilon
    if student == "mamba2":
        made.model.lm_head.weight = torch.nn.Parameter(teacher.lm_head.weight.detach())  # untied
    torch.testing.assert_close(logits(made.model), logits(teacher), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("student", "donor", "layers"), PAIRS, ids=NAMES)
def test_sampling_with_a_cache_gives_what_the_whole_sequence_gives(student, donor, layers, tmp_path) -> None:
    made = grafted(tmp_path, student, donor, layers)
    rollouts = sampled(made)
    for rollout in rollouts:
        whole = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]]).long()
        log_q = logits(made.model, whole)[0].log_softmax(-1)[len(rollout.prompt.token_ids) - 1 : -1]
        chosen = log_q.gather(1, torch.from_numpy(rollout.token_ids).long()[:, None])[:, 0]
        torch.testing.assert_close(torch.from_numpy(rollout.full_logprob), chosen, atol=2e-5, rtol=1e-4)


def sampled(made: Student) -> list[Any]:
    """Prompts of 3 and 30 tokens together: padding on the left."""
    sampler = TorchSampler(
        made.model,
        eos_token_ids=made.eos_token_ids,
        pad_token_id=made.pad_token_id,
        vocabulary_size=made.vocabulary_size,
        config=RolloutConfig(max_new_tokens=12),
        seed=0,
    )
    assert sampler.strategy == "padded"
    prompts = [Prompt(index=n, token_ids=np.arange(3, 3 + n, dtype=np.int32)) for n in (3, 30, 17)]
    return sampler.sample(prompts, [0, 1, 2])


# -- where only the weights differ


def test_layers_of_the_same_class_and_configuration_are_copied(tmp_path) -> None:
    made = grafted(tmp_path, "qwen3", "qwen3", (1,))
    own, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("student", "donor"))
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(tensor, other[name] if ".layers.1." in name else own[name]), name
    saved = checkpoint.export(tmp_path / "saved", model=made.as_saved(), tokenizer=made.tokenizer)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(saved)), logits(made.model))


@pytest.mark.parametrize(
    "settings",
    [{"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, {"num_attention_heads": 2, "head_dim": 16}],
    ids=["rotary", "heads"],
)
def test_the_same_class_with_another_configuration_moves_over_whole(settings, tmp_path) -> None:
    """Both have tensors of the shapes of what they replace: copying them would load, and be wrong."""
    save_tiny(tmp_path / "student", "qwen2", seed=1, scale=2.0)
    save_tiny(tmp_path / "donor", "qwen2", seed=2, scale=2.0, **settings, num_key_value_heads=2)
    made = grafted(tmp_path, "qwen2", "qwen2", (0, 1))
    donor = AutoModelForCausalLM.from_pretrained(tmp_path / "donor")
    with torch.no_grad():
        made.model.model.embed_tokens.weight.copy_(donor.model.embed_tokens.weight)
        made.model.model.norm.weight.copy_(donor.model.norm.weight)
        made.model.lm_head.weight.copy_(donor.lm_head.weight)
    torch.testing.assert_close(logits(made.model), logits(donor), atol=1e-5, rtol=1e-4)


# -- learning


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
def test_a_steps_gradient_goes_through_grafts(checkpointing: bool, samples, tmp_path) -> None:  # noqa: F811
    grafted(tmp_path, "mamba2", "qwen3", (1,))
    settings = {
        "model": str(tmp_path / "student"),
        "graft_from": str(tmp_path / "donor"),
        "layers_from_teacher": (1,),
        "gradient_checkpointing": checkpointing,
    }
    run = bare_run(
        tmp_path / "student",
        student=load(StudentConfig(**settings), CPU),
        train={"micro_batch_tokens": 30, "loss_chunk_rows": 5},
    )
    plain = copy.deepcopy(load(StudentConfig(**{**settings, "gradient_checkpointing": False}), CPU).model).double()
    expected_loss, expected = reference(tmp_path, samples, {"objective": "reverse_kl"}, student=plain)
    _, sums, _ = accumulate(run, samples)
    assert sums["loss"] == pytest.approx(expected_loss, rel=1e-5)
    got = torch.cat([p.grad.reshape(-1) for p in run.student.model.parameters()]).double()
    assert float((got - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.slow
def test_frozen_grafts_keep_the_teachers_weights(samples, tmp_path) -> None:  # noqa: F811
    grafted(tmp_path, "bamba", "qwen3", (0,))
    settings = {
        "model": str(tmp_path / "student"),
        "graft_from": str(tmp_path / "donor"),
        "layers_from_teacher": (0,),
        "freeze": ("replaced_layers", "mlp"),
    }
    run = bare_run(tmp_path / "student", student=load(StudentConfig(**settings), CPU), optim={"learning_rate": 0.01})
    before = {name: p.detach().clone() for name, p in run.student.model.named_parameters()}
    for step in range(3):
        run.step = step
        assert learn(run, samples)["skipped"] == 0.0
    frozen = {n for n in before if n.startswith("model.layers.0.") or ".feed_forward." in n}
    assert {n for n, p in run.student.model.named_parameters() if torch.equal(before[n], p)} == frozen
    donor = AutoModelForCausalLM.from_pretrained(tmp_path / "donor").model.layers[0].state_dict()
    assert all(torch.equal(t, donor[n]) for n, t in run.student.model.model.layers[0].layer.state_dict().items())


# -- checkpoints


@pytest.mark.slow
@pytest.mark.parametrize(("student", "donor", "layers"), PAIRS, ids=NAMES)
def test_a_checkpoint_says_what_is_in_it(student, donor, layers, tmp_path) -> None:
    """Neither the student's first checkpoint nor the layers' own model is there any more."""
    made = grafted(tmp_path, student, donor, layers)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.add_(0.01)
    expected, tokens = logits(made.model), [r.token_ids.tolist() for r in sampled(made)]
    saved = checkpoint.export(tmp_path / "saved", model=made.as_saved(), tokenizer=made.tokenizer)
    for name in ("student", "donor"):
        (tmp_path / name).rename(tmp_path / f"gone_{name}")
    again = load(StudentConfig(model=str(saved)), CPU)
    assert type(again.model) is type(made.model)
    assert torch.equal(logits(again.model), expected)
    assert [r.token_ids.tolist() for r in sampled(again)] == tokens
    twice = checkpoint.export(tmp_path / "twice", model=again.as_saved(), tokenizer=again.tokenizer)
    assert (twice / "config.json").read_text() == (saved / "config.json").read_text()


def test_a_run_goes_on_without_the_model_that_the_layers_came_from(tmp_path) -> None:
    made = grafted(tmp_path, "mamba2", "qwen3", (1,))
    saved = checkpoint.export(tmp_path / "saved", model=made.as_saved(), tokenizer=made.tokenizer)
    (tmp_path / "donor").rename(tmp_path / "gone")
    settings = StudentConfig(
        model=str(tmp_path / "student"),
        layers_from_teacher=(1,),
        graft_from=str(tmp_path / "donor"),
        freeze=("replaced_layers",),
    )
    again = load(settings, CPU, checkpoint=saved)
    checkpoint.load_model_weights(saved, again.model)
    assert torch.equal(logits(again.model), logits(made.model))
    frozen = {name for name, p in again.model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in again.model.named_parameters() if n.startswith("backbone.layers.1.")} != set()


def test_plain_transformers_refuses_a_grafted_checkpoint(tmp_path) -> None:
    """It would otherwise fill in random layers, and say so in a warning only."""
    made = grafted(tmp_path, "mamba2", "qwen3", (1,))
    saved = checkpoint.export(tmp_path / "saved", model=made.as_saved(), tokenizer=made.tokenizer)
    with pytest.raises(ValueError, match="model type `preceptor_graft`"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_another_version_of_the_entry_is_refused(tmp_path) -> None:
    made = grafted(tmp_path, "mamba2", "qwen3", (1,))
    saved = checkpoint.export(tmp_path / "saved", model=made.as_saved(), tokenizer=made.tokenizer)
    content = json.loads((saved / "config.json").read_text())
    content["preceptor_graft"]["version"] = 2
    (saved / "config.json").write_text(json.dumps(content))
    with pytest.raises(StudentError, match="has graft format 2, this version reads 1"):
        load(StudentConfig(model=str(saved)), CPU)


def test_adapters_go_onto_a_student_with_grafts(tmp_path) -> None:
    made = grafted(tmp_path, "mamba2", "qwen3", (1,))
    saved = checkpoint.export(tmp_path / "saved", model=made.as_saved(), tokenizer=made.tokenizer)
    student = load(StudentConfig(model=str(saved), lora={"r": 4, "target_modules": ("q_proj", "in_proj")}), CPU)
    with torch.no_grad():
        for parameter in (p for p in student.model.parameters() if p.requires_grad):
            parameter.add_(0.1)
    for suffix, model in student.exports().items():
        out = checkpoint.export(tmp_path / f"final{suffix}", model=model, tokenizer=student.tokenizer)
        again = load(StudentConfig(model=str(out)), CPU)
        torch.testing.assert_close(logits(again.model), logits(student.model), atol=1e-5, rtol=1e-4)


# -- what can't be


@pytest.mark.parametrize(
    ("student", "donor", "layers", "words"),
    [
        ({}, {"hidden_size": 64}, (1,), "hidden size 64, the student's 32"),
        ({}, {}, (0, 2), r"got 2, but the student has layers 0 to 1"),
        ({"num_hidden_layers": 3}, {}, (2,), r"got 2, but student.graft_from has layers 0 to 1"),
        ({}, {"tokenizer_size": 117}, (1,), "its tokenizer has 117 entries, the student's 120"),
    ],
    ids=["hidden size", "student's layers", "donor's layers", "vocabulary"],
)
def test_models_that_do_not_fit_are_refused(student, donor, layers, words: str, tmp_path) -> None:
    save_tiny(tmp_path / "student", "llama", **student)
    save_tiny(tmp_path / "donor", "qwen3", **donor)
    with pytest.raises(StudentError, match=words) as caught:
        grafted(tmp_path, "", "", layers)
    assert "\n" not in str(caught.value)


def test_a_layer_that_needs_more_than_a_graft_can_give_is_refused() -> None:
    class Needy(torch.nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, hidden_states: Any, encoder_states: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            return self.layer(hidden_states) + encoder_states

    student, donor = tiny_model("llama", seed=1), tiny_model("mamba2", seed=2)
    needy = donor.backbone.layers[1] = Needy(donor.backbone.layers[1])
    needy.register_forward_pre_hook(lambda _m, args, kwargs: ((*args, 1.0), kwargs), with_kwargs=True)
    with pytest.raises(ValueError, match="layer 1 of Mamba2ForCausalLM needs encoder_states from its own model"):
        graft.graft(student, donor, (1,))


def test_a_layer_that_computes_something_else_outside_its_model_is_refused() -> None:
    student, donor = tiny_model("mamba2", seed=1), tiny_model("llama", seed=2)
    donor.model.register_forward_pre_hook(
        lambda _m, args, kwargs: (args, {**kwargs, "position_ids": 3 * torch.arange(16)[None]}), with_kwargs=True
    )
    with pytest.raises(ValueError, match="layer 1 computes something else outside its model"):
        graft.graft(student, donor, (1,))


def test_a_cache_without_a_place_for_each_layer_is_refused(monkeypatch) -> None:
    """Such as RWKV's list of tensors."""
    step = causal_lm.Parts.step
    monkeypatch.setattr(causal_lm.Parts, "step", lambda self, *a, **k: (step(self, *a, **k)[0], [torch.zeros(3)]))
    with pytest.raises(ValueError, match="keeps its cache in a list of its own"):
        graft.graft(tiny_model("mamba2"), tiny_model("llama"), (1,))


def test_a_second_graft_is_refused(tmp_path) -> None:
    made = grafted(tmp_path, "mamba2", "qwen3", (1,))
    checkpoint.export(tmp_path / "saved", model=made.as_saved(), tokenizer=made.tokenizer)
    with pytest.raises(StudentError, match="has layers of another model in it already"):
        load(
            StudentConfig(model=str(tmp_path / "saved"), layers_from_teacher=(0,), graft_from=str(tmp_path / "donor")),
            CPU,
        )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers_from_teacher": (1,)}, r"got \[1\] without graft_from"),
        ({"graft_from": "x"}, "got 'x' without layers_from_teacher"),
        ({"layers_from_teacher": (1, 1), "graft_from": "x"}, "expected each layer once"),
        ({"layers_from_teacher": (-1,), "graft_from": "x"}, "expected each layer once, counted from 0"),
        ({"layers_from_teacher": (1,), "graft_from": "x", "lora": {"r": 2}}, "with lora.r 2, expected none"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        StudentConfig(model="x", **settings)
