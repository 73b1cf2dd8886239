"""chunked.backward through every kind of head and with every objective, against float64 autograd of plain expressions:
all logits at once, log_softmax, gather, logsumexp over what is left. Also how gradients reach parameters, and how much
memory the pass takes.

Shape legend: N positions, H hidden, W logit width, V tokenizer's size, R rows of the head's matrix.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import numpy as np
import peft
import pytest
import torch
from losscases import likeliest, log_softmax, scored_rollout
from torch import Tensor, nn

from student_trainer import losses
from student_trainer.losses import chunked, student_side
from student_trainer.losses.base import AnyObjective, LossInputs, LossRows, PerToken
from student_trainer.losses.heads import Head, is_plain_linear
from student_trainer.losses.rows import loss_rows
from student_trainer.losses.student_side import StudentRows
from teacher_api.causal_lm import Parts

pytestmark = pytest.mark.slow

N, H, W, V, R = 23, 16, 61, 57, 64
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "soft cap": {"soft_cap": 3.0},
    "scale": {"scale": 0.25},
    "all": {"bias": True, "soft_cap": 2.0, "scale": 1.5, "rows": R},
}


def my_raw_logits(inputs: LossInputs, config: object) -> PerToken:
    """Helps itself to the logits, beside one of our functions."""
    rest = student_side.student_rows(inputs, 2.0).log_tail
    return PerToken(inputs.student_logits.square().mean(1) - rest)


def my_two_temperatures(inputs: LossInputs, config: object) -> PerToken:
    """Two cuts of the same logits, and y's own term: the sum of three gradients."""
    soft = student_side.student_rows(inputs, 3.0)
    distance = (inputs.teacher.support_logprob - soft.support_logprob).square().mean(1)
    return PerToken(distance - student_side.token_logprob(inputs) + 0.1 * student_side.student_rows(inputs).log_tail)


OBJECTIVES = [*losses.names(), f"{__name__}:my_raw_logits", f"{__name__}:my_two_temperatures"]


@functools.cache
def case(name: str, top_k: int | str = 4) -> tuple[AnyObjective, LossRows, Tensor, Tensor]:
    """Objective, rows of two completions, weights (some 0), hidden rows as float32 values."""
    objective = losses.build(losses.parse_loss({"objective": name}))
    needs = objective.needs(top_k)
    draw = np.random.default_rng(3)
    scored = []
    for uid, length in enumerate((9, N - 9)):
        log_p = log_softmax(draw.normal(scale=2.0, size=(length, W)))
        log_q = log_softmax(draw.normal(scale=2.0, size=(length, W)))
        tokens = draw.integers(0, V, length)
        ids = likeliest(log_q, needs.student_top_k, V) if needs.student_top_k else None
        scored.append(
            scored_rollout(
                log_p, tokens, vocabulary=V, top_k=needs.top_k, student_ids=ids, uid=uid,
                full_logprob=log_q[np.arange(length), tokens],
            )
        )  # fmt: skip
    advantages = objective.prepare(scored, lambda x: x)
    weights = draw.uniform(0.01, 0.1, N).astype(np.float32)
    weights[[0, 7, 8, 22]] = 0.0
    hidden = draw.normal(size=(N, H)).astype(np.float32)
    return (
        objective,
        loss_rows(scored, objective.config, "cpu", advantages),
        torch.tensor(weights),
        torch.tensor(hidden),
    )


def linear(rows: int = W, bias: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    """Values that float32 holds, in `dtype`."""
    made = nn.Linear(H, rows, bias=bias)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return made.to(dtype)


def head_of(project: nn.Module, *, soft_cap: float | None = None, scale: float = 1.0, autocast: bool = False) -> Head:
    return Head(Parts(None, project, W, H, scale=scale, soft_cap=soft_cap), autocast)


# The reference -----------------------------------------------------------------------------------------------------


def plain_student_rows(inputs: LossInputs, temperature: float = 1.0) -> StudentRows:
    log_q = torch.log_softmax(inputs.student_logits / temperature, -1)
    ids = inputs.teacher.support_ids
    if ids is None:
        ids = torch.arange(inputs.teacher.support_logprob.shape[1]).expand(len(log_q), -1)
    if inputs.teacher.support_mask is not None:
        ids = torch.where(inputs.teacher.support_mask, ids, inputs.target[:, None])
    outside = torch.ones_like(log_q, dtype=torch.bool).scatter(1, ids, False)
    tail = torch.stack([row[mask].logsumexp(0) for row, mask in zip(log_q, outside, strict=True)])
    token = plain_token_logprob(inputs, temperature).detach()
    return StudentRows(log_q.gather(1, ids), tail, token, plain_token_logprob(inputs).detach())


def plain_token_logprob(inputs: LossInputs, temperature: float = 1.0) -> Tensor:
    log_q = torch.log_softmax(inputs.student_logits / temperature, -1)
    return log_q.gather(1, inputs.target[:, None]).squeeze(1)


def plain_student_entropy(inputs: LossInputs) -> Tensor:
    return torch.distributions.Categorical(logits=inputs.student_logits.detach()).entropy()


@pytest.fixture
def plain_student(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Within it, objectives get the student from plain expressions instead of student_side."""

    def install() -> None:
        for module in [m for n, m in sys.modules.items() if n.startswith("student_trainer.losses") or n == __name__]:
            for name in ("student_rows", "token_logprob", "student_entropy"):
                if callable(getattr(module, name, None)):
                    monkeypatch.setattr(module, name, globals()[f"plain_{name}"])

    def run(make: Any) -> Any:
        install()
        try:
            return make()
        finally:
            monkeypatch.undo()

    return run


def reference(
    objective: AnyObjective,
    rows: LossRows,
    weights: Tensor,
    hidden: Tensor,
    head: nn.Linear,
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> list[Tensor]:
    """[loss, hidden gradient, head gradients…]."""
    head = linear_copy(head, dtype)
    hidden = hidden.detach().to(dtype).requires_grad_()
    x = nn.functional.linear(hidden, head.weight, head.bias)[:, :W] * settings.get("scale", 1.0)
    cap = settings.get("soft_cap")
    z = x if cap is None else cap * torch.tanh(x / cap)
    result = objective.per_token(rows.inputs(torch.arange(N), z))
    loss = (result.value * weights.to(dtype))[weights > 0].sum()
    return [loss.detach(), *torch.autograd.grad(loss, [hidden, *head.parameters()])]


def linear_copy(head: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    copy = nn.Linear(H, head.out_features, bias=head.bias is not None, dtype=dtype)
    copy.load_state_dict(head.state_dict())
    return copy


def chunked_gradients(
    objective: AnyObjective, rows: LossRows, weights: Tensor, hidden: Tensor, head: Any, chunk_rows: int
) -> list[Tensor]:
    module = head.parts.project if isinstance(head, Head) else head
    leaf = hidden.detach().clone().requires_grad_()
    loss, _ = chunked.backward(head, leaf, objective, rows, weights, chunk_rows)
    gradients = [p.grad for p in module.parameters()]
    assert leaf.grad is not None
    assert all(g is not None for g in gradients)
    return [torch.tensor(loss, dtype=torch.float64), leaf.grad, *gradients]


def errors(got: list[Tensor], exact: list[Tensor]) -> np.ndarray:
    """By norm, relative."""
    assert [g.shape for g in got] == [e.shape for e in exact]
    return np.array([float((g.double() - e).norm() / e.norm()) for g, e in zip(got, exact, strict=True)])


def assert_close(got: list[Tensor], exact: list[Tensor], relative: float) -> None:
    assert errors(got, exact).max() <= relative


# Every objective, every head ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_every_objective_through_every_head_equals_float64_autograd(name, head, dtype, plain_student):
    """In float32 to 1e-6, or as near as autograd in float32 comes where the numbers themselves don't allow that."""
    objective, rows, weights, hidden = case(name)
    settings = dict(HEADS[head])
    project = linear(settings.pop("rows", W), settings.pop("bias", False), dtype)
    exact, usual = (
        plain_student(lambda dtype=d: reference(objective, rows, weights, hidden, project, dtype, **settings))
        for d in (torch.float64, torch.float32)
    )
    limit = np.maximum(1e-6, 1.5 * errors(usual, exact)) if dtype == torch.float32 else 1e-10
    assert np.all(limit < 3e-6)
    for chunk_rows in (1, 5, 1000):
        project.zero_grad()
        got = chunked_gradients(objective, rows, weights, hidden.to(dtype), head_of(project, **settings), chunk_rows)
        assert np.all(errors(got, exact) <= limit)


@pytest.mark.parametrize("name", losses.names())
def test_whole_vocabulary_scores_through_a_capped_head(name, plain_student, monkeypatch):
    """A few rows at a time, whatever the chunk."""
    objective, rows, weights, hidden = case(name, "all")
    project = linear(bias=True, dtype=torch.float64)
    wanted = plain_student(lambda: reference(objective, rows, weights, hidden, project, soft_cap=3.0))
    monkeypatch.setattr(chunked, "DENSE_BYTES", 3 * 4 * V)
    got = chunked_gradients(objective, rows, weights, hidden.double(), head_of(project, soft_cap=3.0), 8)
    assert_close(got, wanted, 1e-10)


def test_the_passes_over_the_vocabulary_may_be_cut_into_blocks_anywhere(monkeypatch):
    objective, rows, weights, hidden = case("jsd")
    results = []
    for block_bytes in (1, 3 * 4 * W, 1 << 20):
        monkeypatch.setitem(student_side.BLOCK_BYTES, "cpu", block_bytes)
        results.append(chunked_gradients(objective, rows, weights, hidden, head_of(linear(), soft_cap=3.0), 9))
    for got in results[:2]:
        assert all(torch.equal(a, b) for a, b in zip(got, results[2], strict=True))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_bfloat16_arithmetic_rounds_products_only(name):
    """Loss and softmax in float32; the gradient as near to the exact one as autograd's under autocast is."""
    objective, rows, weights, hidden = case(name)
    wanted = reference(objective, rows, weights, hidden, linear(bias=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        project, leaf = linear(bias=True), hidden.clone().requires_grad_()
        z = nn.functional.linear(leaf, project.weight, project.bias).float()
    (objective.per_token(rows.inputs(torch.arange(N), z)).value * weights)[weights > 0].sum().backward()
    theirs = [leaf.grad, project.weight.grad, project.bias.grad]
    project = linear(bias=True)
    got = chunked_gradients(objective, rows, weights, hidden, head_of(project, autocast=True), 6)
    assert all(p.grad.dtype == torch.float32 for p in project.parameters())
    usual = errors(theirs, wanted[1:])
    assert usual.max() < 0.1
    assert np.all(errors(got[1:], wanted[1:]) < 1.2 * usual + 1e-3)


# How gradients reach their parameters ------------------------------------------------------------------------------


def test_gradients_add_to_what_is_there_without_another_matrix():
    objective, rows, weights, hidden = case("reverse_kl")
    project = linear(R, bias=True)
    once = chunked_gradients(objective, rows, weights, hidden, head_of(project), 4)
    once = [g.clone() for g in once]
    memory = project.weight.grad.data_ptr()
    twice = chunked_gradients(objective, rows, weights, hidden, head_of(project), 4)
    assert project.weight.grad.data_ptr() == memory
    assert_close(twice[2:], [2 * g.double() for g in once[2:]], 1e-6)


@pytest.mark.parametrize("kind", ["linear", "other"])
def test_deferred_gradients_come_through_autograd_once_and_together_with_the_trunks(kind):
    """What hangs on hooks (DistributedDataParallel, ZeRO-2) sees each parameter exactly once a micro-batch."""
    objective, rows, weights, hidden = case("reverse_kl")
    project, trunk = linear(bias=True), nn.Linear(H, H)
    module = project if kind == "linear" else nn.Sequential(project)
    seen: list[str] = []
    for name, parameter in [*trunk.named_parameters(), *project.named_parameters(prefix="head")]:
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    results = []
    for deferred in (False, True):
        for parameter in (*trunk.parameters(), *project.parameters()):
            parameter.grad = None
        seen.clear()
        for _ in range(2):
            chunked.backward(head_of(module), trunk(hidden), objective, rows, weights, 4, deferred=deferred)
        results.append([p.grad for p in (*trunk.parameters(), *project.parameters())])
        names = ["bias", "weight", *(["head.bias", "head.weight"] if deferred else [])]
        assert sorted(seen) == sorted(2 * names)
    assert_close(results[1], [g.double() for g in results[0]], 1e-6)
    with pytest.raises(ValueError, match="bare function can't defer"):
        chunked.backward(lambda h: module(h), hidden, objective, rows, weights, 4, deferred=True)


class Tied(nn.Module):
    """Embedding, one layer, and the embedding's matrix again."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(W, H), nn.Linear(H, H)
        self.head = nn.Linear(H, W, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            generator = torch.Generator().manual_seed(5)
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.embed(ids)))


@pytest.mark.parametrize("name", losses.names())
@pytest.mark.parametrize("deferred", [False, True])
def test_a_tied_head_gets_the_embeddings_gradient_as_well(name, deferred, plain_student):
    objective, rows, weights, _ = case(name)
    ids = torch.randint(0, W, (N,), generator=torch.Generator().manual_seed(6))

    def exact() -> dict[str, Tensor]:
        model = Tied().double()
        z = nn.functional.linear(model(ids), model.head.weight)
        value = objective.per_token(rows.inputs(torch.arange(N), z)).value
        (value * weights.double())[weights > 0].sum().backward()
        return {n: p.grad for n, p in model.named_parameters()}

    wanted, model = plain_student(exact), Tied().double()
    chunked.backward(head_of(model.head), model(ids), objective, rows, weights, 4, deferred=deferred)
    assert_close([p.grad for p in model.parameters()], list(wanted.values()), 1e-10)


@pytest.mark.parametrize("name", losses.names())
def test_lora_on_the_head_trains_the_adapter_alone(name, plain_student):
    """Against the merged matrix W + s·B·A, whose gradient G gives sBᵀG and sGAᵀ."""
    objective, rows, weights, hidden = case(name)
    model = peft.get_peft_model(
        nn.ModuleDict({"lm_head": linear(dtype=torch.float64)}),
        peft.LoraConfig(r=3, lora_alpha=6, target_modules=["lm_head"], init_lora_weights=False),
    )
    lora = model.base_model.model["lm_head"].double()
    assert not is_plain_linear(lora)
    a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    merged = linear(dtype=torch.float64)
    with torch.no_grad():
        merged.weight.add_(2.0 * b @ a)
    loss, on_hidden, on_matrix = plain_student(
        lambda: reference(objective, rows, weights, hidden, merged, soft_cap=3.0)
    )
    leaf = hidden.double().requires_grad_()
    got, _ = chunked.backward(head_of(lora, soft_cap=3.0), leaf, objective, rows, weights, 4)
    assert got == pytest.approx(loss.item(), rel=1e-10)
    wanted = [on_hidden, 2.0 * b.detach().T @ on_matrix, 2.0 * on_matrix @ a.detach().T]
    assert_close([leaf.grad, a.grad, b.grad], wanted, 1e-10)
    assert lora.base_layer.weight.grad is None


def allocated_peak(work: Any) -> int:
    """Most bytes that torch's allocator held at a time for `work`, beside what was there."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).max())


def third_step_peak(name: str, soft_cap: float | None, num: int, chunk_rows: int) -> int:
    """Beside the gradients and one chunk of logits; optimizer state is there from the first step on."""
    hidden_size, width = 32, 8_000
    objective = losses.build(losses.parse_loss({"objective": name}))
    draw = np.random.default_rng(0)
    log_p = log_softmax(draw.normal(size=(1, width))).repeat(num, 0)
    ids = draw.integers(0, width, (num, 4)).astype(np.int32)
    scored = [scored_rollout(log_p, ids[:, 0], vocabulary=width, top_k=4, student_ids=ids)]
    rows = loss_rows(scored, objective.config, "cpu", objective.prepare(scored, lambda x: x))
    project = nn.Linear(hidden_size, width, bias=False)
    head = Head(Parts(None, project, width, hidden_size, soft_cap=soft_cap))
    optimizer = torch.optim.AdamW(project.parameters(), fused=True)
    hidden, weights = torch.randn(num, hidden_size, requires_grad=True), torch.full((num,), 1 / num)
    for _ in range(3):
        peak = allocated_peak(lambda: chunked.backward(head, hidden, objective, rows, weights, chunk_rows))
        optimizer.step()
        optimizer.zero_grad()
        hidden.grad = None
    return peak - 4 * (hidden_size * (width + num) + chunk_rows * width)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "soft_cap"), [("reverse_kl", None), ("jsd", 3.0), ("policy_gradient", None)])
def test_memory_is_the_gradients_and_a_chunk_whatever_the_number_of_rows(name, soft_cap, monkeypatch):
    """All logits would be 8 and 24 times the chunk of 500 kB. A memory test must run at least three steps."""
    block = 128 << 10
    monkeypatch.setitem(student_side.BLOCK_BYTES, "cpu", block)
    few, many = (third_step_peak(name, soft_cap, num, 16) for num in (128, 384))
    assert few < 4 * block
    assert many < few + (64 << 10)


def test_only_a_head_nobody_listens_in_on_is_taken_apart():
    hooked, listened = linear(), linear()
    hooked.register_forward_hook(lambda *_: None)
    listened.register_full_backward_hook(lambda *_: None)
    parametrised = nn.utils.parametrizations.weight_norm(linear())
    assert is_plain_linear(linear())
    assert not any(map(is_plain_linear, [hooked, listened, parametrised, nn.Sequential(linear()), nn.Embedding(3, H)]))


def test_an_objective_that_ignores_the_student_is_refused():
    objective, rows, weights, hidden = case(f"{__name__}:my_constant")
    with pytest.raises(ValueError, match="value has no gradient"):
        chunked.backward(linear(), hidden, objective, rows, weights, 4)


def my_constant(inputs: LossInputs, config: object) -> PerToken:
    return PerToken(inputs.teacher.token_logprob)
