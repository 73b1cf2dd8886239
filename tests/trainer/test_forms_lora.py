"""Adapters against peft and transformers themselves: what is trained, what is written, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from onestep import bare_run
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from test_train_gradients import reference, samples  # noqa: F401 (samples is a fixture)
from tinymodels import save_tiny
from transformers import AutoModelForCausalLM

from student_trainer import checkpoint
from student_trainer.config import StudentConfig
from student_trainer.forms.loading import load_pretrained
from student_trainer.optim import OptimConfig, Optimizer
from student_trainer.planning import shape
from student_trainer.rollout.config import RolloutConfig
from student_trainer.rollout.torch_sampler import TorchSampler
from student_trainer.student import Student, StudentError, load
from student_trainer.train import accumulate, learn
from student_trainer.types import Prompt
from teacher_server.backends.adapters import read_adapters

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},  # a tied head
    "llama": {"target_modules": ("q_proj", "lm_head"), "rslora": True},
    "gpt2": {"target_modules": ("c_attn", "c_proj")},  # weights the other way round
    "mixtral": {},
    "mamba2": {"exclude_modules": ("out_proj",)},
}


def adapted(model: Path, *, seed: int = 0, **settings: Any) -> Student:
    return load(StudentConfig(model=str(model), lora={"r": 4, "alpha": 8, **settings}), CPU, seed=seed)


def trained(student: Student) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in student.model.named_parameters() if p.requires_grad}


def moved(student: Student) -> Student:
    """With adapters that do something."""
    generator = torch.Generator().manual_seed(5)
    for parameter in trained(student).values():
        parameter.data.normal_(generator=generator).mul_(0.3)
    return student


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("arch", FAMILIES)
def test_adapter_and_merged_weights_compute_what_was_trained(arch: str, tmp_path) -> None:
    base = save_tiny(tmp_path / "base", arch, scale=2.0)
    before = logits(AutoModelForCausalLM.from_pretrained(base))
    student = adapted(base, **FAMILIES[arch])
    assert trained(student).keys() == {n for n, _ in student.model.named_parameters() if ".lora_" in n} != set()
    assert torch.equal(logits(student.model), before)
    expected = logits(moved(student).model)
    assert float((expected - before).abs().max()) > 0.1
    for suffix, model in student.exports().items():
        checkpoint.export(tmp_path / f"final{suffix}", model=model, tokenizer=student.tokenizer)
    assert torch.equal(logits(student.model), expected)  # exporting changes nothing
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    files = {p.name for p in (tmp_path / "final-adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert "model.safetensors" not in files
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "final-adapter")
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=1e-5)
    if arch == "qwen3":  # what `teacher-serve --lora.mine` reads; it takes no head, and fewer families than peft
        assert read_adapters({"mine": str(tmp_path / "final-adapter")}, base)["mine"].rank == 4
    ours = load(StudentConfig(model=str(tmp_path / "final-adapter")), CPU)
    torch.testing.assert_close(logits(ours.model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "student"),
    [
        ({}, {}),
        ({"target_modules": ("q_proj", "down_proj", "lm_head")}, {}),
        ({}, {"gradient_checkpointing": True}),
    ],
    ids=["all linear", "with the head", "checkpointed"],
)
def test_a_steps_gradient_is_that_of_plain_peft(settings, student, samples, tmp_path) -> None:  # noqa: F811
    base = save_tiny(tmp_path / "base", scale=2.0, tie_word_embeddings=False)
    lora = {"r": 4, "alpha": 8, **settings}
    made = load(StudentConfig(model=str(base), lora=lora, **student), CPU)
    run = bare_run(base, student=made, train={"micro_batch_tokens": 30, "loss_chunk_rows": 5})
    moved(run.student)
    checkpoint.export(tmp_path / "adapter", model=run.student.as_saved(), tokenizer=None)
    _, sums, trouble = accumulate(run, samples)
    plain = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base).double(), tmp_path / "adapter", is_trainable=True
    ).double()
    expected_loss, _ = reference(base, samples, {"objective": "reverse_kl"}, student=plain)
    assert trouble == ""
    assert sums["loss"] == pytest.approx(expected_loss, rel=1e-5)
    expected = {n.removeprefix("base_model.model."): p.grad for n, p in plain.named_parameters() if p.requires_grad}
    got = {name: p.grad for name, p in trained(run.student).items()}
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient.double(), expected[name], rtol=1e-4, atol=1e-7, msg=name)
    assert all(p.grad is None for p in run.student.model.parameters() if not p.requires_grad)


@pytest.mark.slow
def test_second_step_is_where_adams_states_are_and_only_adapters_have_any(samples, tmp_path) -> None:  # noqa: F811
    base = save_tiny(tmp_path / "base", scale=2.0)
    run = bare_run(base, student=adapted(base), optim={"learning_rate": 0.01})
    before = {name: p.detach().clone() for name, p in run.student.model.named_parameters()}
    assert run.optimizer.state()[0] == {}
    for step in range(3):
        run.step = step
        assert learn(run, samples)["skipped"] == 0.0
    after = dict(run.student.model.named_parameters())
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == trained(run.student).keys()
    sizes = {key: tensor.nbytes for key, tensor in run.optimizer.state()[0].items() if not key.endswith("/step")}
    assert sum(sizes.values()) == 2 * 4 * sum(p.numel() for p in trained(run.student).values())


def test_saved_adapters_come_back_bit_for_bit(tmp_path) -> None:
    base = save_tiny(tmp_path / "base")
    student = moved(adapted(base))
    saved = checkpoint.export(tmp_path / "saved", model=student.as_saved(), tokenizer=student.tokenizer)
    other = adapted(base, seed=9)
    checkpoint.load_model_weights(saved, other.model)
    assert all(torch.equal(p, trained(other)[name]) for name, p in trained(student).items())
    with pytest.raises(checkpoint.CheckpointError, match="another adapter"):
        checkpoint.load_model_weights(saved, adapted(base, r=5).model)
    with pytest.raises(checkpoint.CheckpointError, match="another adapter"):
        checkpoint.load_model_weights(saved, adapted(base, target_modules=("q_proj",)).model)


def test_an_adapted_head_is_saved_without_the_weights_under_it(tmp_path) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    student = adapted(base, target_modules=("lm_head",))
    saved = checkpoint.export(tmp_path / "saved", model=student.as_saved(), tokenizer=None)
    assert {name.split(".")[-2] for name in load_file(saved / "adapter_model.safetensors")} == {"lora_A", "lora_B"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ({"target_modules": ("1.self_attn.q_proj",)}, ["model.layers.1.self_attn.q_proj"]),
    ],
)
def test_adapters_name_their_layers_as_adapters_do(settings, expected: list[str], tmp_path) -> None:
    """By the ends of the names, where these say it: other programs take an adapter by them."""
    student = adapted(save_tiny(tmp_path / "base"), **settings)
    saved = checkpoint.export(tmp_path / "saved", model=student.as_saved(), tokenizer=None)
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["target_modules"] == expected
    assert (config["base_model_name_or_path"], config["r"]) == (str((tmp_path / "base").resolve()), 4)


def test_fresh_adapters_are_a_function_of_the_seed(tmp_path) -> None:
    base = save_tiny(tmp_path / "base")
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, second, third = (list(trained(adapted(base, seed=seed)).values()) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)  # and nobody else's random numbers change
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, third, strict=True))


def test_adapters_dropout_is_a_function_of_the_sample_and_off_in_sampling(tmp_path) -> None:
    base = save_tiny(tmp_path / "base", "gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    settings = {"target_modules": ("c_attn",)}
    student, plain = (moved(adapted(base, dropout=dropout, **settings)) for dropout in (0.5, 0.0))
    hidden = []
    for uid in (10, 10, 11):
        student.seed_dropout(3, uid)
        hidden.append(student.parts.trunk(IDS).detach())
    assert torch.equal(hidden[0], hidden[1])
    assert not torch.equal(hidden[0], hidden[2])
    assert torch.equal(*(plain.parts.trunk(IDS) for _ in range(2)))  # the model's own dropouts stay off
    prompts = [Prompt(index=0, token_ids=IDS[0].int().numpy())]
    rollouts = [
        TorchSampler(
            s.model,
            eos_token_ids=(1,),
            pad_token_id=0,
            vocabulary_size=120,
            config=RolloutConfig(max_new_tokens=6),
            seed=0,
        ).sample(prompts, [0])[0]
        for s in (student, plain)
    ]
    assert rollouts[0].token_ids.tolist() == rollouts[1].token_ids.tolist()
    assert not torch.equal(*(student.parts.trunk(IDS) for _ in range(2)))  # and on again afterwards


def test_bfloat16_arithmetic_keeps_float32_adapters(tmp_path) -> None:
    base = save_tiny(tmp_path / "base")
    student = load(StudentConfig(model=str(base), lora={"r": 4}, dtype="bfloat16"), CPU)
    optimizer = Optimizer(student.model.named_parameters(), OptimConfig(learning_rate=1e-4), 10)
    with student.arithmetic():
        student.parts.trunk(IDS).float().square().sum().backward()
    optimizer.step(0)
    assert {p.dtype for p in student.model.parameters()} == {torch.float32}
    assert {t.dtype for t in optimizer.state()[0].values()} == {torch.float32}


@pytest.mark.parametrize(
    ("arch", "settings", "words"),
    [
        ("qwen3", {"target_modules": ("q_proj", "z_proj")}, r"lora.target_modules: 'z_proj' matches no linear layer"),
        ("qwen3", {"exclude_modules": ("z_proj",)}, r"lora.exclude_modules: 'z_proj' matches no linear layer"),
        ("qwen3", {"target_modules": ("lm_head",)}, r"got lm_head, whose weights are also the input embedding's"),
        ("qwen3", {"target_modules": ("embed_tokens",)}, r"'embed_tokens' matches no linear layer"),
        ("qwen3", {"target_modules": ("q_proj",), "exclude_modules": ("q_proj",)}, "leaves no layer"),
        ("mamba2", {}, r"peft can't adapt Mamba2ForCausalLM: .*out_proj"),
    ],
)
def test_layers_that_get_no_adapter_are_refused_by_name(arch: str, settings, words: str, tmp_path) -> None:
    base = save_tiny(tmp_path, arch)
    with pytest.raises(StudentError, match=words) as caught:
        adapted(base, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora": {"alpha": 16}}, "alpha: got 16 with r 0, expected none"),
        ({"lora": {"dropout": 0.1}}, "dropout: got 0.1 with r 0"),
        ({"lora": {"r": 4, "target_modules": ("all-linear", "q_proj")}}, "expected it alone"),
        ({"lora": {"r": 4, "target_modules": ()}}, "target_modules: got none"),
        ({"lora": {"r": -1}}, "greater than or equal to 0"),
        ({"lora": {"r": 4}, "freeze": ("mlp",)}, r"freeze: got \['mlp'\] with lora.r 4, expected none"),
    ],
)
def test_settings_without_effect_are_refused(settings, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        StudentConfig(model="x", **settings)


def test_an_adapter_without_a_base_is_one_clear_line(tmp_path) -> None:
    base = save_tiny(tmp_path / "base")
    student = adapted(base)
    saved = checkpoint.export(tmp_path / "saved", model=student.as_saved(), tokenizer=student.tokenizer)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(StudentError, match=r"the base of student.model '.*base' is not a directory"):
        load(StudentConfig(model=str(saved)), CPU)


@pytest.mark.parametrize("what", ["renamed", "fewer", "more", "no safetensors"])
def test_an_adapter_of_other_tensors_than_its_base_is_refused(what: str, tmp_path) -> None:
    """peft would leave the base as it is, or half of it, and only warn."""
    base = save_tiny(tmp_path / "base", "llama")
    student = moved(adapted(base))
    saved = checkpoint.export(tmp_path / "saved", model=student.as_saved(), tokenizer=student.tokenizer)
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    made = {
        "renamed": {n.replace("model.layers", "model.language_model.layers"): t for n, t in tensors.items()},
        "fewer": {n: tensors[n] for n in names[2:]},
        "more": {**tensors, names[0].replace("layers.0", "layers.7"): tensors[names[0]].clone()},
    }
    file.unlink()
    if what in made:
        save_file(made[what], file, metadata={"format": "pt"})
    words = "tensors are missing or have no place" if what in made else r"has no adapter_model\.safetensors"
    with pytest.raises(StudentError, match=words) as caught:
        load(StudentConfig(model=str(saved)), CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("[]", "got list, expected an adapter's settings"),
        ("{", "is no JSON"),
        ("SELF", "got its own directory as base_model_name_or_path"),
    ],
)
def test_damaged_settings_of_an_adapter_are_one_clear_line(settings: str, words: str, tmp_path) -> None:
    itself = json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tmp_path)})
    (tmp_path / "adapter_config.json").write_text(itself if settings == "SELF" else settings)
    for read in (lambda: load_pretrained("student.model", str(tmp_path)), lambda: of_student(tmp_path)):
        with pytest.raises(StudentError, match=words) as caught:
            read()
        assert "\n" not in str(caught.value)


def of_student(model: Path) -> Any:
    return shape.of_student(StudentConfig(model=str(model)))


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "a" * 300, "/" + "b" * 300])
def test_a_name_that_no_directory_can_have_is_one_clear_line(name: str) -> None:
    with pytest.raises(StudentError, match=r"student\.model '.* can't be looked up") as caught:
        load_pretrained("student.model", name)
    assert "\n" not in str(caught.value)
