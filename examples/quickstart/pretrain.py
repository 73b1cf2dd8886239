"""Makes the two checkpoints of the quickstart from scratch: a teacher that can do the task and a smaller student that
has only begun to. Supervised training on worked solutions; the distillation that follows never sees one.

Shape legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from examples.quickstart import task
from student_trainer.muon import Muon

IGNORED = -100
Encode = Callable[[Sequence[task.Problem], PreTrainedTokenizerFast], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A model and how it is trained from scratch."""

    layers: int
    hidden: int
    heads: int
    feed_forward: int
    steps: int
    batch_sequences: int = 32
    matrix_lr: float = 0.02  # Muon, for the matrices of the layers
    other_lr: float = 3e-3  # AdamW, for embeddings and norms
    warmup_steps: int = 10
    min_lr_ratio: float = 0.1
    stop_at_accuracy: float = 2.0
    """Training ends at the first check whose accuracy reaches this share; above 1: never."""
    check_every: int = 10


TEACHER = Recipe(layers=3, hidden=128, heads=4, feed_forward=384, steps=240, check_every=60)
STUDENT = Recipe(layers=3, hidden=96, heads=3, feed_forward=256, steps=300, stop_at_accuracy=0.12, check_every=5)


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 of the recipe's size."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.feed_forward,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            head_dim=recipe.hidden // recipe.heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode(problems: Sequence[task.Problem], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Right-padded ids [B, T] and targets [B, T]: the next token where it belongs to the solution (its end included),
    IGNORED elsewhere."""
    prompts = tokenizer([task.prompt_text(p) for p in problems])["input_ids"]
    solutions = tokenizer([p.solution for p in problems])["input_ids"]
    rows = [a + b + [tokenizer.eos_token_id] for a, b in zip(prompts, solutions, strict=True)]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    target = torch.full((len(rows), width), IGNORED)
    for n, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids[n, : len(row)] = torch.tensor(row)
        target[n, len(prompt) - 1 : len(row) - 1] = torch.tensor(row[len(prompt) :])
    return ids, target


@torch.no_grad()
def share_solved(model: Qwen3ForCausalLM, ids: Tensor, target: Tensor) -> float:
    """Share of problems whose whole solution is the model's greedy choice at every token, so that greedy decoding
    would write exactly it: a lower bound of the accuracy, from a single forward."""
    scored = target != IGNORED
    wrong = (model(input_ids=ids).logits.argmax(-1) != target) & scored
    return float((~wrong.any(-1)).float().mean())


def learning_rate_factor(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine to `min_lr_ratio`."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(recipe.steps - recipe.warmup_steps, 1)
    return recipe.min_lr_ratio + (1 - recipe.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))


def _optimizers(model: Qwen3ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    return [
        Muon(matrices, lr=recipe.matrix_lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=recipe.other_lr, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def train(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[task.Problem],
    check: Sequence[task.Problem],
    *,
    seed: int,
    encode: Encode = encode,
    progress: Callable[[int, dict[str, float]], Any] = lambda step, metrics: None,
) -> Qwen3ForCausalLM:
    """Trains a new model by cross-entropy on the solutions of `examples`, each seen once, and watches `check`.
    `progress(step, metrics)` hears of each step; `encode` makes ids and targets of problems.

    Raises:
        ValueError: fewer than steps * batch_sequences examples.
    """
    needed = recipe.steps * recipe.batch_sequences
    if len(examples) < needed:
        raise ValueError(f"got {len(examples)} examples, expected {needed} for {recipe.steps} steps")
    model = new_model(recipe, tokenizer, seed)
    checked = encode(check, tokenizer)
    optimizers = _optimizers(model, recipe)
    peaks = [o.param_groups[0]["lr"] for o in optimizers]
    model.train()
    for step in range(recipe.steps):
        start = step * recipe.batch_sequences
        ids, target = encode(examples[start : start + recipe.batch_sequences], tokenizer)
        loss = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * learning_rate_factor(recipe, step)
            optimizer.step()
            optimizer.zero_grad()
        metrics = {"loss": float(loss.detach())}
        if (step + 1) % recipe.check_every == 0 or step + 1 == recipe.steps:
            metrics["solved"] = share_solved(model, *checked)
        progress(step + 1, metrics)
        if metrics.get("solved", 0.0) >= recipe.stop_at_accuracy:
            break
    return model.eval()
