"""Continuous batching: what is computed and what is not, who enters when, and the tokens of transformers' generate."""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tinymodels import tiny_model
from transformers import LogitsProcessor, LogitsProcessorList

from student_trainer.rollout import continuous
from student_trainer.rollout.config import RolloutConfig
from student_trainer.rollout.slots import SlotDecoder, UnfitError
from student_trainer.rollout.torch_sampler import TorchSampler
from student_trainer.types import Prompt, Rollout

VOCABULARY = 120  # of models 128 wide
STOPS = (1, *range(40, 52))

pytestmark = pytest.mark.slow


def make_prompts(count: int, *, longest: int = 20, seed: int = 0) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    return [
        Prompt(i, rng.integers(2, VOCABULARY, size=n).astype(np.int32))
        for i, n in enumerate(rng.integers(1, longest + 1, size=count))
    ]


def sampler(model: Any, *, stops: tuple[int, ...] = STOPS, **settings: Any) -> TorchSampler:
    config = RolloutConfig(**{"max_new_tokens": 24, **settings})
    made = TorchSampler(model, eos_token_ids=stops, pad_token_id=0, vocabulary_size=VOCABULARY, config=config, seed=3)
    assert made.strategy == "continuous"
    return made


@contextlib.contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Tokens of each forward pass of the trunk."""
    passes: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        yield passes
    finally:
        hook.remove()


def steps_of(lengths: list[int], slots: int) -> int:
    """Passes if each sequence begins in the pass after the one in which a slot got free, in the order given."""
    ends: list[int] = []
    for length in lengths:
        begin = heapq.heappop(ends) if len(ends) == slots else 0
        heapq.heappush(ends, begin + length)
    return max(ends)


@pytest.mark.parametrize("slots", [3, 5, 64])
def test_every_prompt_and_every_token_is_computed_once_and_slots_are_never_idle(slots: int) -> None:
    model = tiny_model(scale=1.0)
    groups, size = make_prompts(7), 4
    prompts = [p for p in groups for _ in range(size)]
    one = sampler(model, batch_sequences=slots)
    with counted(model) as passes:
        rollouts = one.sample(prompts, range(len(prompts)))
    lengths = [r.num_tokens for r in rollouts]
    assert len(set(lengths)) > 5
    # A completion's last token is drawn and goes nowhere; a prompt is there once for its group.
    assert sum(passes) == sum(len(p.token_ids) for p in groups) + sum(lengths) - len(lengths)
    # Where only members of a group enter whose prompt has been computed, and nobody runs, there is no pass at all.
    assert steps_of(lengths, slots) - len(groups) <= len(passes) <= steps_of(lengths, slots)
    assert max(passes) <= slots + sum(len(p.token_ids) for p in groups)


def test_what_has_finished_comes_at_once_while_the_others_go_on() -> None:
    model = tiny_model(scale=1.0)
    prompts = make_prompts(20)
    one = sampler(model, batch_sequences=4)
    whole = one.sample(prompts, range(20))
    order, after = [], []
    with counted(model) as passes:
        for rollout in one.stream(prompts, range(20)):
            order.append(rollout.uid)
            after.append(len(passes))
    begins, ends = {}, []
    for uid in range(20):  # the same schedule by hand: the first four at once, each later one when one has finished
        begins[uid] = heapq.heappop(ends) if len(ends) == 4 else 0
        heapq.heappush(ends, begins[uid] + whole[uid].num_tokens)
    expected = [begins[uid] + whole[uid].num_tokens for uid in order]
    assert after == expected == sorted(expected)
    assert sorted(order) == list(range(20))


def test_prompts_of_more_tokens_than_a_pass_takes_enter_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(scale=1.0)
    prompts = make_prompts(12)
    expected = sampler(model).sample(prompts, range(12))
    monkeypatch.setattr(continuous, "PROMPT_TOKENS", 25)
    one = sampler(model)
    with counted(model) as passes:
        got = one.sample(prompts, range(12))
    assert max(passes) <= 25 + 12
    assert [r.token_ids.tolist() for r in got] == [r.token_ids.tolist() for r in expected]


def test_a_consumer_may_train_between_items_and_changes_nothing() -> None:
    model = tiny_model(scale=1.0)
    model.train()
    model.model.layers[0].eval()
    prompts = make_prompts(10)
    one = sampler(model, batch_sequences=4)
    expected = {r.uid: r for r in one.sample(prompts, range(10), keep_top_k=3)}
    modes = [m.training for m in model.modules()]
    attention = model.config._attn_implementation
    seen = 0
    for rollout in one.stream(prompts, range(10), keep_top_k=3):
        assert [m.training for m in model.modules()] == modes
        assert torch.is_grad_enabled()
        assert model.config._attn_implementation == attention
        model(input_ids=torch.arange(9)[None]).logits.square().mean().backward()
        same(rollout, expected[rollout.uid])
        seen += 1
    assert seen == 10
    assert float(model.model.layers[0].mlp.up_proj.weight.grad.abs().sum()) > 0


def test_a_consumer_that_trains_in_the_same_autocast_gets_gradients() -> None:
    model = tiny_model("llama", scale=1.0).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in sampler(model, batch_sequences=2).stream(make_prompts(3), range(3)):
            model.zero_grad()
            model(input_ids=torch.arange(9)[None]).logits.float().square().mean().backward()
            lacking = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
            assert lacking == []


def same(a: Rollout, b: Rollout) -> None:
    for mine, theirs in (
        (a.token_ids, b.token_ids),
        (a.full_logprob, b.full_logprob),
        (a.behaviour_logprob, b.behaviour_logprob),
        (a.student_topk_ids, b.student_topk_ids),
    ):
        assert mine is not None
        assert theirs is not None
        assert mine.tobytes() == theirs.tobytes()


def test_a_stream_that_nobody_finishes_leaves_the_model_as_it_was() -> None:
    model = tiny_model(scale=1.0).train()
    items = sampler(model, batch_sequences=2).stream(make_prompts(6), range(6))
    next(items)
    items.close()
    assert all(m.training for m in model.modules())
    assert model.config._attn_implementation == "sdpa"


class BelowVocabulary(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.cat([scores[:, :VOCABULARY], torch.full_like(scores[:, VOCABULARY:], -torch.inf)], dim=-1)


def generated(model: Any, prompts: list[Prompt], new_tokens: int) -> list[list[int]]:
    """transformers' own greedy completions, padded on the left, up to and including the first stop id."""
    width = max(len(p.token_ids) for p in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.token_ids) :] = torch.from_numpy(prompt.token_ids)
        mask[row, width - len(prompt.token_ids) :] = 1
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=list(STOPS),
        pad_token_id=0,
        logits_processor=LogitsProcessorList([BelowVocabulary()]),
    )
    completions = []
    for row in out[:, width:].tolist():
        stop = next((i for i, token in enumerate(row) if token in STOPS), len(row) - 1)
        completions.append(row[: stop + 1])
    return completions


NEAR_TIE = 1e-4
"""Of two logits, in float64: both programs' float32 logits are off by less than half of it (the error of logprobs is
held to 1e-5), so that which of two such is the larger may differ, and nothing further apart can."""


def test_greedy_completions_of_a_thousand_prompts_are_those_of_generate() -> None:
    model = tiny_model("llama", scale=3.0)
    prompts = make_prompts(1000, longest=40)
    ours = sampler(model, greedy=True, batch_sequences=96).sample(prompts, range(1000))
    theirs = [c for start in range(0, 1000, 250) for c in generated(model, prompts[start : start + 250], 24)]
    assert len({len(c) for c in theirs}) > 15
    different = [i for i in range(1000) if ours[i].token_ids.tolist() != theirs[i]]
    model.double()
    for i in different:
        mine = ours[i].token_ids.tolist()
        place = next(n for n, (a, b) in enumerate(zip(mine, theirs[i], strict=False)) if a != b)
        before = np.concatenate([prompts[i].token_ids, mine[:place]])
        with torch.no_grad():
            z = model(input_ids=torch.from_numpy(before).long()[None]).logits[0, -1, :VOCABULARY]
        assert float(z.max() - min(z[mine[place]], z[theirs[i][place]])) < NEAR_TIE, f"prompt {i}, token {place}"
    assert len(different) <= 5  # near ties are rare, so that a bug can't hide among them


def test_attention_with_a_soft_cap_is_not_taken_for_plain() -> None:
    """A term that the probe's short sequences would hardly show is known by its name."""
    model = tiny_model("gemma2", sliding_window=4096, layer_types=["full_attention"] * 2)
    decoder = SlotDecoder(model, 1, 8)
    ids = [np.array([5, 6, 7], dtype=np.int32)]
    nothing = torch.zeros(0, dtype=torch.int64)
    with torch.no_grad(), decoder.attending(), pytest.raises(UnfitError, match="softcap"):
        decoder.forward(nothing, nothing, 0, ids, [0])


def test_positions_that_depend_on_the_longest_sequence_are_refused() -> None:
    model = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0})
    with pytest.raises(UnfitError, match="longest sequence"):
        SlotDecoder(model, 1, 8)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16_arithmetic_keeps_keys_and_values_in_it(attention: str) -> None:
    model = tiny_model("llama", scale=1.0)
    model.set_attn_implementation(attention)
    prompts = make_prompts(8)
    one = sampler(model, batch_sequences=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rollouts = one.sample(prompts, range(8))
        for rollout in rollouts:
            ids = torch.from_numpy(np.concatenate([rollout.prompt.token_ids, rollout.token_ids])).long()
            with torch.no_grad():
                logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
            start = len(rollout.prompt.token_ids) - 1
            z = logits[start : start + rollout.num_tokens].log_softmax(-1)
            expected = z[torch.arange(len(z)), torch.from_numpy(rollout.token_ids).long()]
            np.testing.assert_allclose(rollout.full_logprob, expected.numpy(), atol=0.1)
