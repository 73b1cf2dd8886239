"""The sampler on every architecture: equal to transformers' own greedy generation, and its logprobs to a plain float64
forward pass of the finished sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tinymodels import ARCHITECTURES, tiny_model
from transformers import LogitsProcessor, LogitsProcessorList

from student_trainer.rollout.base import RolloutError
from student_trainer.rollout.config import RolloutConfig
from student_trainer.rollout.decoding import choose
from student_trainer.rollout.torch_sampler import TorchSampler
from student_trainer.types import Prompt, Rollout

VOCABULARY = 120  # of models 128 wide
EOS = 1

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*causal_conv1d.*", "ignore:.*mamba_ssm.*")]


def make_prompts(count: int, *, longest: int = 20, shortest: int = 1, seed: int = 0) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest + 1, size=count)
    return [Prompt(i, rng.integers(2, VOCABULARY, size=n).astype(np.int32)) for i, n in enumerate(lengths)]


def sampler(
    model: Any, *, seed: int = 0, eos: Sequence[int] = (EOS,), pad: int | None = 0, **settings: Any
) -> TorchSampler:
    config = RolloutConfig(**{"max_new_tokens": 24, **settings})
    return TorchSampler(
        model, eos_token_ids=eos, pad_token_id=pad, vocabulary_size=VOCABULARY, config=config, seed=seed
    )


class BelowVocabulary(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.cat([scores[:, :VOCABULARY], torch.full_like(scores[:, VOCABULARY:], -torch.inf)], dim=-1)


def generated(model: Any, prompt: Prompt, max_new_tokens: int, eos: list[int]) -> list[int]:
    ids = torch.from_numpy(prompt.token_ids).long()[None]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([BelowVocabulary()]),
    )
    return out[0, ids.shape[1] :].tolist()


def plain_logits(model: Any, rollout: Rollout) -> np.ndarray:
    """Logits [N, W] of each completion token: one float64 forward pass, no cache, no padding."""
    sequence = np.concatenate([rollout.prompt.token_ids, rollout.token_ids])
    if hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("eager")  # the grouped kernel has no float64
    with torch.no_grad():
        logits = model.double()(input_ids=torch.from_numpy(sequence).long()[None], use_cache=False).logits[0]
    start = len(rollout.prompt.token_ids) - 1
    return logits[start : start + rollout.num_tokens].double().numpy()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_equals_transformers_generate(arch: str) -> None:
    model = tiny_model(arch)
    prompts = make_prompts(32)
    # Frequent tokens as end tokens, so that rows end at different steps and are dropped on the way.
    eos = [EOS, *np.random.default_rng(5).choice(np.arange(2, VOCABULARY), size=8, replace=False).tolist()]
    rollouts = sampler(model, eos=eos, greedy=True, batch_sequences=20, max_new_tokens=14).sample(prompts, range(32))
    assert [r.token_ids.tolist() for r in rollouts] == [generated(model, p, 14, eos) for p in prompts]
    assert all((r.finish == "eos") == (int(r.token_ids[-1]) in eos) for r in rollouts)
    assert len({r.num_tokens for r in rollouts}) > 2


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logprobs_equal_a_plain_float64_forward_pass(arch: str) -> None:
    model = tiny_model(arch, scale=2.0)
    settings = {"temperature": 0.8, "top_k": 30, "top_p": 0.95}
    rollouts = sampler(model, max_new_tokens=16, **settings).sample(make_prompts(6), range(6), keep_top_k=5)
    for rollout in rollouts:
        z = plain_logits(model, rollout)
        rows = np.arange(rollout.num_tokens)
        full = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
        np.testing.assert_allclose(rollout.full_logprob, full[rows, rollout.token_ids], atol=1e-5)
        for row in rows:
            p = truncated(z[row], **settings)
            assert rollout.behaviour_logprob[row] == pytest.approx(np.log(p[rollout.token_ids[row]]), abs=1e-5)
        assert rollout.student_topk_ids is not None
        best = np.take_along_axis(z, rollout.student_topk_ids.astype(np.int64), axis=-1)
        np.testing.assert_allclose(best, -np.sort(-z[:, :VOCABULARY], axis=-1)[:, :5], atol=1e-4)


def truncated(z: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    z = z[:VOCABULARY] / temperature
    p = np.exp(z - z.max())
    order = np.argsort(-p)
    p[order[top_k:]] = 0.0
    p /= p.sum()
    before = np.concatenate([[0.0], np.cumsum(p[order])[:-1]])
    p[order[before >= top_p]] = 0.0
    return p / p.sum()


def test_untempered_policies_agree_except_for_the_masked_columns() -> None:
    model = tiny_model(scale=2.0)
    for rollout in sampler(model).sample(make_prompts(4), range(4)):
        z = plain_logits(model, rollout)
        shift = np.log(np.exp(z).sum(-1)) - np.log(np.exp(z[:, :VOCABULARY]).sum(-1))
        assert shift.min() > 1e-3
        np.testing.assert_allclose(rollout.behaviour_logprob - rollout.full_logprob, shift, atol=2e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 12},
        {"top_p": 0.8},
        {"temperature": 1.3, "top_k": 30, "top_p": 0.9},
    ],
    ids=str,
)
def test_sampled_completions_follow_the_model_token_by_token(settings: dict[str, float]) -> None:
    """Two tokens from one prompt, many times: the pairs' frequencies against the float64 product of conditionals."""
    model = tiny_model(scale=3.0)
    with torch.no_grad():
        model.model.norm.weight.mul_(4.0)  # sharper, so that single pairs are likely enough to be counted
    prompt = make_prompts(1, shortest=4)[0]
    count = 4000
    rollouts = sampler(model, max_new_tokens=2, eos=(), batch_sequences=1500, **settings).sample(
        [prompt] * count, range(count)
    )
    model.double()
    with torch.no_grad():
        ids = torch.from_numpy(prompt.token_ids).long()
        first = model(input_ids=ids[None]).logits[0, -1].numpy()
        after = torch.cat([ids.expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]], dim=1)
        second = model(input_ids=after).logits[:, -1].numpy()
    policy = {"temperature": 1.0, "top_k": VOCABULARY, "top_p": 2.0, **settings}
    p = (truncated(first, **policy)[:, None] * np.stack([truncated(z, **policy) for z in second])).flatten()
    pairs = [int(r.token_ids[0]) * VOCABULARY + int(r.token_ids[1]) for r in rollouts]
    seen = np.bincount(pairs, minlength=VOCABULARY**2)
    assert not seen[p == 0].any()
    # The 20 likeliest pairs by the model, and everything else as one: 20 degrees of freedom.
    likely = np.argsort(-p)[:20]
    p = np.append(p[likely], 1 - p[likely].sum())
    got = np.append(seen[likely], count - seen[likely].sum())
    assert count * p.min() > 5
    # Exceeded once in 10,000 runs of a true sampler (standard table).
    assert ((got - count * p) ** 2 / (count * p)).sum() < 52.39


def test_a_sample_depends_on_its_uid_and_not_on_its_neighbours() -> None:
    model = tiny_model(scale=2.0)
    prompts = make_prompts(12)
    together = sampler(model).sample(prompts, range(100, 112), keep_top_k=3)
    order = [7, 0, 11, 3]
    apart = sampler(model, batch_sequences=2).sample([prompts[i] for i in order], [100 + i for i in order])
    for i, alone in zip(order, apart, strict=True):
        assert alone.uid == 100 + i
        assert alone.prompt is prompts[i]
        assert np.array_equal(alone.token_ids, together[i].token_ids)
        np.testing.assert_allclose(alone.full_logprob, together[i].full_logprob, atol=1e-5)
    other_seed = sampler(model, seed=1).sample(prompts, range(100, 112))
    assert sum(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(together, other_seed, strict=True)) < 3


def test_the_same_call_gives_the_same_bits_and_leaves_the_random_state_alone() -> None:
    model = tiny_model(scale=2.0)
    state = torch.get_rng_state()
    first, second = (sampler(model).sample(make_prompts(8), range(8), keep_top_k=4) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first, second, strict=True):
        assert a.token_ids.tobytes() == b.token_ids.tobytes()
        assert a.full_logprob.tobytes() == b.full_logprob.tobytes()
        assert a.behaviour_logprob.tobytes() == b.behaviour_logprob.tobytes()
        assert a.student_topk_ids is not None
        assert b.student_topk_ids is not None
        assert a.student_topk_ids.tobytes() == b.student_topk_ids.tobytes()


def test_the_padding_token_changes_nothing() -> None:
    model = tiny_model(scale=2.0)
    by_pad = [sampler(model, pad=pad).sample(make_prompts(8), range(8)) for pad in (0, 17, EOS, None)]
    for rollouts in by_pad[1:]:
        for a, b in zip(by_pad[0], rollouts, strict=True):
            assert np.array_equal(a.token_ids, b.token_ids)
            assert np.array_equal(a.full_logprob, b.full_logprob)


def test_end_tokens_stay_even_where_they_are_the_padding_token() -> None:
    model = tiny_model(scale=0.5)  # nearly uniform: ends come often
    stops = {EOS, *range(20, 40)}
    rollouts = sampler(model, eos=(EOS, 20), pad=EOS, stop_token_ids=tuple(range(20, 40)), max_new_tokens=30).sample(
        make_prompts(40), range(40)
    )
    for rollout in rollouts:
        inside = [t for t in rollout.token_ids[:-1].tolist() if t in stops]
        assert not inside
        assert rollout.finish == ("eos" if int(rollout.token_ids[-1]) in stops else "length")
        assert rollout.finish == "eos" or rollout.num_tokens == 30
    assert {r.finish for r in rollouts} == {"eos"} or len({r.finish for r in rollouts}) == 2
    assert sum(r.finish == "eos" for r in rollouts) > 30


def test_one_new_token_and_no_end_tokens() -> None:
    rollouts = sampler(tiny_model(), max_new_tokens=1, eos=()).sample(make_prompts(3), range(3))
    assert [(r.num_tokens, r.finish) for r in rollouts] == [(1, "length")] * 3


def test_ids_beyond_the_tokenizer_are_never_sampled_nor_kept() -> None:
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] = 0.0
        model.lm_head.weight[VOCABULARY:, 0] = 50.0  # half of the time by far the largest logits
    rollouts = sampler(model, temperature=3.0).sample(make_prompts(16), range(16), keep_top_k=200)
    assert max(int(r.token_ids.max()) for r in rollouts) < VOCABULARY
    assert max(float(r.behaviour_logprob.min() - r.full_logprob.min()) for r in rollouts) > 10
    for rollout in rollouts:
        assert rollout.student_topk_ids is not None
        ids = np.sort(rollout.student_topk_ids, axis=-1)
        assert np.array_equal(ids, np.broadcast_to(np.arange(VOCABULARY), ids.shape))  # all there are, each once


def test_modes_of_all_modules_are_restored_and_dropout_is_off_while_sampling() -> None:
    model = tiny_model("gpt2", scale=2.0)
    before = sampler(model).sample(make_prompts(6), range(6))
    model.train()
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    during = sampler(model).sample(make_prompts(6), range(6))
    assert [m.training for m in model.modules()] == modes
    assert [r.token_ids.tolist() for r in during] == [r.token_ids.tolist() for r in before]
    # The model still trains: nothing was left behind in inference or no-gradient state.
    model(input_ids=torch.arange(8)[None]).logits.sum().backward()
    assert model.transformer.wte.weight.grad is not None


def leaky_mamba2() -> Any:
    """Its input projection has a bias: padded steps then write to the convolution's state."""
    model = tiny_model("mamba2", use_bias=True)
    with torch.no_grad():
        for block in model.backbone.layers:
            block.mixer.in_proj.bias.normal_()
    return model


def without_cache() -> Any:
    """A user's own model: no cache, no mask, no logits_to_keep."""
    inner = tiny_model("llama")

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner
            self.config = inner.config

        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.inner(input_ids=input_ids, use_cache=False)

    return Plain(), inner


def broken_cache() -> Any:
    """A model that takes a cache and doesn't use it."""
    plain, inner = without_cache()

    class Forgetful(type(plain)):  # type: ignore[misc]
        def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
            return self.inner(input_ids=input_ids, use_cache=False)

    model = Forgetful()
    return model, inner


def test_where_padding_is_not_exact_prompts_of_one_length_go_together() -> None:
    model = leaky_mamba2()
    one = sampler(model, greedy=True)
    assert one.strategy == "grouped"
    prompts = make_prompts(10, longest=6)
    rollouts = one.sample(prompts, range(10))
    assert [r.token_ids.tolist() for r in rollouts] == [generated(model, p, 24, [EOS]) for p in prompts]


@pytest.mark.parametrize("make", [without_cache, broken_cache])
def test_models_without_a_usable_cache_are_recomputed(make: Any) -> None:
    model, inner = make()
    one = sampler(model.eval(), greedy=True)
    assert one.strategy == "recompute"
    prompts = make_prompts(6, longest=4)
    rollouts = one.sample(prompts, range(6))
    assert [r.token_ids.tolist() for r in rollouts] == [generated(inner, p, 24, [EOS]) for p in prompts]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shipped_architectures_take_the_fastest_way_that_is_exact(arch: str, dtype: torch.dtype) -> None:
    model = tiny_model(arch, scale=1.0).to(dtype)
    with torch.no_grad():
        # Sliding windows and states: their sequences can't come and go.
        assert choose(model, VOCABULARY) == ("padded" if arch in ("gemma2", "mamba2", "bamba") else "continuous")


def test_broken_weights_are_an_error_and_never_a_sample() -> None:
    model = tiny_model()
    one = sampler(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(RolloutError, match="logits are not finite: sample 5"):
        one.sample(make_prompts(1), [5])
    with pytest.raises(RolloutError, match="weights are broken"):
        sampler(model)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "prompt 3 is empty"),
        ([5, VOCABULARY], "outside the vocabulary of 120"),
        ([-1], "outside the vocabulary of 120"),
        ([5] * 105, "prompt 3 has 105 tokens; with rollout.max_new_tokens 24 it exceeds the student's context of 128"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(ids: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(tiny_model()).sample([Prompt(3, np.array(ids, dtype=np.int32))], [0])


def test_bad_arguments_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="stop token id 120 is outside the vocabulary of 120"):
        sampler(model, eos=(120,))
    with pytest.raises(ValueError, match="seed is -1"):
        sampler(model, seed=-1)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        sampler(model).sample(make_prompts(2), [0])


def test_no_prompts_give_no_rollouts() -> None:
    assert sampler(tiny_model()).sample([], []) == []
