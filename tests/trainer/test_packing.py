"""Packed rows against plain transformers, one sequence at a time: hidden rows, losses, gradients, whole steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from onestep import bare_run, relative
from tinymodels import ATTENTION, SPECIAL_IDS, save_tiny, tiny_model
from transformers import AutoModelForCausalLM

from student_trainer import packing_check
from student_trainer.config import StudentConfig, TrainConfig
from student_trainer.packing import PADDED, Packing, Row
from student_trainer.packing_check import applied, choose
from student_trainer.student import Student, load
from student_trainer.train import accumulate, learn
from student_trainer.types import Prompt, Rollout, ScoredRollout
from teacher_api import causal_lm
from teacher_api.types import Scores

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
V = 120
ATTENDING = ["qwen3", "llama", "gemma2", "gpt2", "mixtral", "mistral"]
WINDOWED = {"mistral": {"sliding_window": 8}, "mixtral": {"sliding_window": 8}}
"""Beside gemma2, whose every second layer has a window of 16."""
PACKED = Packing(packed=True)
SHARED = Packing(packed=True, shared=True, min_saved_tokens=0)


def made_up(lengths: list[int], group: int = 1, prompt_tokens: int = 5) -> list[ScoredRollout]:
    """Samples of these lengths, `group` after each other of one prompt, with a random teacher over the vocabulary."""
    draw = np.random.default_rng(7)
    scored = []
    prompts = [Prompt(i, draw.integers(2, V, prompt_tokens + 3 * i).astype(np.int32)) for i in range(len(lengths))]
    for uid, num in enumerate(lengths):
        prompt = prompts[uid // group]
        log_p = np.log(draw.dirichlet(np.full(V, 0.2), num) + 1e-9).astype(np.float32)
        tokens = draw.integers(2, V, num).astype(np.int32)
        own = np.full(num, -4.0, dtype=np.float32)
        scores = Scores(
            id=str(uid),
            positions=np.arange(num, dtype=np.int32) + len(prompt.token_ids),
            token_logprob=log_p[np.arange(num), tokens],
            log_tail=np.full(num, -1e9, dtype=np.float32),
            topk_logprob=log_p,
        )
        scored.append(ScoredRollout(Rollout(uid, prompt, tokens, "length", own, own), scores))
    return scored


def rollouts_of(scored: list[ScoredRollout]) -> list[Rollout]:
    return [s.rollout for s in scored]


SKEWED = made_up([3, 1, 30, 4, 12, 2])
GROUPS = made_up([3, 1, 30, 4, 12, 2, 7, 7], group=4, prompt_tokens=11)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("students")
    return {arch: save_tiny(folder / arch, arch, scale=2.0, **WINDOWED.get(arch, {})) for arch in ATTENDING}


def packed_student(path: Path, implementation: str = "sdpa", **settings: Any) -> Student:
    student = load(StudentConfig(model=str(path), **settings), CPU)
    student.model.set_attn_implementation(implementation)
    packing = choose(student.model, student.parts, CPU, "on", "on")
    assert packing == SHARED
    return dataclasses.replace(student, packing=packing)


# -- hidden rows


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", ATTENDING)
@pytest.mark.parametrize(("scored", "packing"), [(SKEWED, PACKED), (GROUPS, PACKED), (GROUPS, SHARED)])
def test_hidden_rows_and_gradients_are_those_of_each_sequence_alone(
    scored: list[ScoredRollout], packing: Packing, arch: str, implementation: str, checkpoints
) -> None:
    """The longest sequence crosses the sliding windows of mistral, mixtral and gemma2."""
    student = dataclasses.replace(packed_student(checkpoints[arch], implementation), packing=packing)
    rollouts = rollouts_of(scored)
    got_NH = student.hidden_rows(rollouts)
    weights_NH = torch.randn(got_NH.shape, generator=torch.Generator().manual_seed(0))
    (got_NH * weights_NH).sum().backward()
    got = [p.grad for p in student.model.base_model.parameters()]

    plain = AutoModelForCausalLM.from_pretrained(checkpoints[arch], attn_implementation=implementation)
    rows = []
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
        rows.append(plain.base_model(ids).last_hidden_state[0, len(rollout.prompt.token_ids) - 1 : -1])
    expected_NH = torch.cat(rows)
    (expected_NH * weights_NH).sum().backward()
    assert relative(got_NH.detach(), expected_NH.detach()) < 1e-5
    largest = max(float(p.grad.norm()) for p in plain.base_model.parameters() if p.grad is not None)
    for mine, theirs in zip(got, plain.base_model.parameters(), strict=True):
        if theirs.grad is None:  # an expert that no token chose
            assert mine is None or not mine.any()
        else:
            assert float((mine - theirs.grad).norm()) < 1e-5 * largest


@pytest.mark.parametrize("arch", ATTENDING)
def test_packed_neighbours_do_not_see_each_other(arch: str, checkpoints) -> None:
    """Bit for bit, whatever the other sequences of the row say."""
    student = dataclasses.replace(packed_student(checkpoints[arch]), packing=PACKED)
    before = rollouts_of(SKEWED)
    other = dataclasses.replace(before[2], token_ids=before[2].token_ids[::-1].copy())
    with torch.no_grad():
        got, changed = student.hidden_rows(before), student.hidden_rows([*before[:2], other, *before[3:]])
    start, stop = 3 + 1, 3 + 1 + 30
    assert torch.equal(got[:start], changed[:start])
    assert torch.equal(got[stop:], changed[stop:])
    assert not torch.equal(got[start + 1 : stop], changed[start + 1 : stop])


def test_a_shared_prompt_is_in_the_row_once() -> None:
    rollouts = rollouts_of(GROUPS)
    tokens = [r.num_tokens - 1 for r in rollouts]
    prompts = len(rollouts[0].prompt.token_ids) + len(rollouts[4].prompt.token_ids)
    assert len(Row.of(rollouts, PACKED).token_ids) == 4 * prompts + sum(tokens)
    assert len(Row.of(rollouts, SHARED).token_ids) == prompts + sum(tokens)


# -- whole steps


def step_of(student: Student, scored: list[ScoredRollout], **train: int) -> tuple[float, torch.Tensor]:
    run = bare_run(Path(), student=student, train=train)
    _, sums, trouble = accumulate(run, scored)
    assert not trouble
    gradient = [p.grad.reshape(-1) for p in student.model.parameters() if p.grad is not None]
    return sums["loss"], torch.cat(gradient).double()


@pytest.mark.parametrize("arch", ["qwen3", "gemma2", "mixtral", "gpt2", "llama"])
@pytest.mark.parametrize("train", [{}, {"micro_batch_tokens": 60}, {"micro_batch_size": 1}], ids=str)
def test_packing_sharing_and_micro_batches_do_not_show_in_a_step(train: dict[str, int], arch: str, checkpoints) -> None:
    loss, gradient = step_of(load(StudentConfig(model=str(checkpoints[arch])), CPU), GROUPS, micro_batch_size=1)
    for packing in (PADDED, PACKED, SHARED):
        student = dataclasses.replace(packed_student(checkpoints[arch]), packing=packing)
        got_loss, got = step_of(student, GROUPS, **train)
        assert got_loss == pytest.approx(loss, rel=1e-5)
        assert relative(got, gradient) < 1e-5


def test_prompt_length_and_order_of_the_samples_do_not_show(checkpoints) -> None:
    """The same completion behind its prompt has the same rows next to a longer prompt, or after it."""
    student = packed_student(checkpoints["qwen3"])
    short, long = rollouts_of(made_up([9, 9], prompt_tokens=2)), rollouts_of(made_up([9, 9], prompt_tokens=60))
    with torch.no_grad():
        alone = student.hidden_rows(short[:1])
        assert relative(student.hidden_rows([short[0], long[1]])[:9], alone) < 1e-5
        assert relative(student.hidden_rows([long[1], short[0]])[9:], alone) < 1e-5


@pytest.mark.parametrize("packing", [PACKED, SHARED])
def test_gradient_checkpointing_recomputes_the_same_row(packing: Packing, checkpoints) -> None:
    plain = load(StudentConfig(model=str(checkpoints["gemma2"])), CPU)
    student = packed_student(checkpoints["gemma2"], gradient_checkpointing=True)
    loss, gradient = step_of(plain, GROUPS)
    got_loss, got = step_of(dataclasses.replace(student, packing=packing), GROUPS)
    assert got_loss == pytest.approx(loss, rel=1e-5)
    assert relative(got, gradient) < 1e-5


def test_several_packed_steps_end_where_padded_ones_do(checkpoints) -> None:
    weights = {}
    for packing in (PADDED, PACKED, SHARED):
        student = dataclasses.replace(packed_student(checkpoints["qwen3"]), packing=packing)
        run = bare_run(Path(), student=student, optim={"learning_rate": 1e-3, "eps": 1e-3})
        for _ in range(5):
            assert not learn(run, GROUPS)["skipped"]
            run.step += 1
        weights[packing] = torch.cat([p.detach().reshape(-1) for p in student.model.parameters()])
    assert relative(weights[PACKED], weights[PADDED]) < 1e-5
    assert relative(weights[SHARED], weights[PADDED]) < 1e-5


# -- which students


def hybrid(name: str, **settings: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**{**SPECIAL_IDS, **ATTENTION, "vocab_size": 128, **settings})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


STATEFUL = {
    "mamba2": lambda: tiny_model("mamba2"),
    "bamba": lambda: hybrid(
        "Bamba", attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=16
    ),
    "qwen3_next": lambda: hybrid(
        "Qwen3Next", num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "lfm2": lambda: hybrid("Lfm2", layer_types=["conv", "full_attention"], block_multiple_of=8),
}  # fmt: skip


@pytest.mark.parametrize("name", STATEFUL)
def test_students_that_carry_a_state_are_not_packed(name: str) -> None:
    model = STATEFUL[name]()
    parts = causal_lm.split(model)
    before = model.config._attn_implementation
    packing = choose(model, parts, CPU, "auto", "auto")
    assert (packing.packed, packing.shared) == (False, False)
    assert type(model).__name__ in packing.reason
    with pytest.raises(ValueError, match=rf"train.packing: got on, expected auto or off .*{type(model).__name__}"):
        choose(model, parts, CPU, "on", "auto")
    with pytest.raises(ValueError, match=r"train.share_prompt: got on, expected auto or off"):
        choose(model, parts, CPU, "auto", "on")
    assert model.config._attn_implementation == before


class Leaking(torch.nn.Module):
    """A layer that mixes a little of the token before into each, as convolutions and token shifts do."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.layer(hidden + 0.01 * hidden.roll(1, dims=1), *args, **kwargs)


def test_the_check_finds_what_leaks_between_neighbours() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = Leaking(model.model.layers[1].mlp)
    parts = causal_lm.split(model)
    assert "gives hidden states that differ by" in choose(model, parts, CPU, "auto", "auto").reason
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match=r"train.packing: got on, .* gives hidden states that differ by"):
        choose(model, parts, CPU, "on", "auto")


def test_a_model_that_makes_its_own_mask_is_not_packed(monkeypatch) -> None:
    """Its layers get no segments, so all sequences of a row would attend to each other."""
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **_: None)
    model = tiny_model("llama")
    assert "hidden states that differ" in choose(model, causal_lm.split(model), CPU, "auto", "auto").reason


def test_positions_that_depend_on_the_longest_sequence_are_not_packed() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_model("llama", rope_parameters=rope)
    assert "rotary positions of type dynamic" in choose(model, causal_lm.split(model), CPU, "auto", "auto").reason


def test_what_the_sampler_and_evaluation_compute_is_left_as_it_was(checkpoints) -> None:
    plain = AutoModelForCausalLM.from_pretrained(checkpoints["gemma2"])
    student = packed_student(checkpoints["gemma2"])
    ids = torch.arange(2, 32).view(2, 15)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        got = student.model(ids, attention_mask=mask, position_ids=mask.cumsum(1).sub(1).clamp_min(0))
        expected = plain(ids, attention_mask=mask, position_ids=mask.cumsum(1).sub(1).clamp_min(0))
    assert torch.equal(got.logits, expected.logits)


def test_nothing_of_it_is_written_into_a_checkpoint(checkpoints, tmp_path) -> None:
    student = packed_student(checkpoints["qwen3"])
    student.model.save_pretrained(tmp_path)
    assert "segmented" not in (tmp_path / "config.json").read_text()


# -- options


def configured(train: dict[str, str], group_size: int = 4) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "student": {"model": "unused"},
            "teacher": {"url": "grpc://unused:1"},
            "data": {"source": "unused"},
            "rollout": {"group_size": group_size},
            "train": train,
        }
    )


@pytest.mark.parametrize(
    ("train", "group_size", "expected"),
    [
        ({}, 4, Packing(packed=True, shared=True)),
        ({}, 1, PACKED),
        ({"share_prompt": "off"}, 4, PACKED),
        ({"share_prompt": "on"}, 4, SHARED),
        ({"packing": "off"}, 4, PADDED),
    ],
)
def test_the_options_choose(train: dict[str, str], group_size: int, expected: Packing, checkpoints) -> None:
    student = load(StudentConfig(model=str(checkpoints["qwen3"])), CPU)
    assert applied(student, configured(train, group_size)).packing == expected


def test_options_that_contradict_each_other_are_refused(checkpoints) -> None:
    with pytest.raises(ValueError, match=r"train.share_prompt: got on with rollout.group_size 1, expected auto or off"):
        configured({"share_prompt": "on"}, group_size=1)
    student = load(StudentConfig(model=str(checkpoints["qwen3"])), CPU)
    with pytest.raises(ValueError, match=r"train.share_prompt: got on with train.packing off"):
        applied(student, configured({"packing": "off", "share_prompt": "on"}))


@pytest.mark.parametrize("settings", [{"dropout": True}, {"dropout": True, "gradient_checkpointing": True}], ids=str)
def test_dropout_is_left_out_of_the_check_alone(settings: dict[str, bool], tmp_path) -> None:
    path = save_tiny(tmp_path, "gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    student = packed_student(path, **settings)
    first, second = (student.hidden_rows(rollouts_of(GROUPS)) for _ in range(2))
    assert not torch.equal(first, second)


def test_a_check_that_raises_is_a_reason(monkeypatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no such mask")

    monkeypatch.setattr(packing_check.Row, "hidden", broken)
    model = tiny_model("llama")
    assert "can't take it: no such mask" in choose(model, causal_lm.split(model), CPU, "auto", "auto").reason
