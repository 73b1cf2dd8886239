"""What the tests of the migration table share: tiny models and data sets under the names that people use, one teacher,
runs in this process whose samples are kept, and what a step's loss is by definition.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cachedhub
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
import yaml
from tinymodels import EOS, save_tiny, tiny_tokenizer
from torch import Tensor
from training import PROMPTS, metrics
from transformers import AutoModelForCausalLM

from student_trainer import cli
from student_trainer import metrics as trainer_metrics
from student_trainer.types import ScoredRollout

V, WIDTH = 300, 320
"""Entries of the tokenizer, and columns of the logits: what is between belongs to the tail."""
POSITIONS = 4096
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
STUDENTS = {
    "Qwen/Qwen3-8B": "qwen3",
    "Qwen/Qwen2.5-1.5B-Instruct": "qwen3",
    "sshleifer/tiny-gpt2": "gpt2",
}
ANSWERS = [f" {text} {i}" for i, text in enumerate(PROMPTS)]
PAIRS = list(zip(PROMPTS, ANSWERS, strict=True))
DATASETS: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("pe-nlp/math-cl", "default"): [{"problem": q, "ground_truth_answer": a} for q, a in PAIRS],
    ("zwhe99/DeepMath-103K", "default"): [
        {"question": q, "final_answer": a, "r1_solution_1": f"so{a}"} for q, a in PAIRS
    ],
    ("allenai/tulu-3-sft-mixture", "default"): [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in PAIRS
    ],
    ("HuggingFaceFW/fineweb-edu", "sample-10BT"): [{"text": f"{q}{a}{q}{a}"} for q, a in PAIRS] * 6,
}
"""What the presets name, in the shape that their pages list."""
SMALL = (
    "train.steps=2",
    "train.batch_size=4",
    "train.num_processes=1",
    "train.reference=true",
    "student.device=cpu",
    "rollout.max_new_tokens=8",
    "optim.learning_rate=0.002",
    "tracking.trackers=[]",
    "tracking.samples_every=0",
)
"""The scale of a row's run; what the row says itself is stronger."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What a run left, and what it trained on."""

    directory: Path
    config: dict[str, Any]  # as recorded
    lines: list[dict[str, Any]]
    scored: list[list[ScoredRollout]]  # of every step, kept as it was trained on
    student: str  # as it was before the first step
    teacher: Path

    def states(self) -> list[dict[str, Any]]:
        """Of its checkpoints, oldest first."""
        steps = sorted((self.directory / "checkpoints").glob("step-*"))
        return [json.loads((d / "trainer_state.json").read_text()) for d in steps]

    def has(self, **expected: Any) -> None:
        """Recorded settings: section__key=value."""
        for name, value in expected.items():
            found: Any = self.config
            for part in name.split("__"):
                found = found[part]
            assert found == value, (name, found, value)


def make_place(place: Path) -> Path:
    """Models, prompts and data of every kind, and caches of the hub with the names of people's commands."""
    wide = {"logit_width": WIDTH, "tokenizer_size": V, "max_position_embeddings": POSITIONS, "scale": 2.0}
    save_tiny(place / "teacher", seed=1, **wide)
    save_tiny(place / "deep", seed=3, num_hidden_layers=32, **wide)  # layers 14, 16, 17 and 30 are of it
    for arch in ("qwen3", "llama"):
        save_tiny(place / arch, arch, seed=2, **wide)
    gpt2 = {key: value for key, value in wide.items() if key != "max_position_embeddings"}
    save_tiny(place / "gpt2", "gpt2", seed=2, n_positions=POSITIONS, **gpt2)
    mamba = {key: value for key, value in wide.items() if key != "max_position_embeddings"}
    save_tiny(place / "mamba2", "mamba2", seed=2, num_hidden_layers=32, **mamba)
    save_tiny(place / "bamba", "bamba", seed=2, num_hidden_layers=32, attn_layer_indices=[1], **wide)
    for model in ("teacher", "deep", "qwen3", "llama", "gpt2", "mamba2", "bamba"):
        (place / model / "chat_template.jinja").write_text(CHAT)
    save_tiny(place / "padless", seed=2, pad_token_id=1, **wide)
    tokenizer = copy.deepcopy(tiny_tokenizer(V))
    tokenizer.pad_token = EOS
    tokenizer.save_pretrained(place / "padless")
    for name, arch in STUDENTS.items():
        cachedhub.cached_model(place / "hub", name, place / arch)
    for (name, subset), records in DATASETS.items():
        cachedhub.cached_dataset(place / "datasets", name, subset, records)
    (place / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    keyed = [{"q_zh": q, "a_zh": a, "s_zh": "be brief", "p_zh": f"<{q}>"} for q, a in PAIRS]
    (place / "keyed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in keyed))
    (place / "keyed.json").write_text(json.dumps(keyed))
    pyarrow.parquet.write_table(pa.Table.from_pylist(keyed), place / "keyed.parquet")
    pyarrow.csv.write_csv(pa.Table.from_pylist(keyed), place / "keyed.csv")
    (place / "problems.jsonl").write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in PAIRS))
    texts = [{"text": f"{q}{a} {q}{a}"} for q, a in PAIRS] * 6
    (place / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    (place / "template.txt").write_text("Think: {question} Now:")
    (place / "of_mine.py").write_text(
        "import torch\nfrom student_trainer.losses.base import PerToken\n"
        f"class Rows:\n    def __iter__(self):\n        return iter([{{'question': q}} for q in {PROMPTS[:4]!r}])\n"
        "def seven(inputs, config):\n"
        "    return PerToken(torch.logsumexp(inputs.student_logits.float(), 1) * 0 + config.options['value'])\n"
    )
    return place


def run(arguments: Sequence[str], directory: Path, patch: pytest.MonkeyPatch, teacher: Path, code: int = 0) -> Ran:
    """`student-train` in this process, its samples kept."""
    kept: list[list[ScoredRollout]] = []
    of_rollouts = trainer_metrics.of_rollouts

    def keeping(scored: Sequence[ScoredRollout], *more: Any) -> Any:
        kept.append(list(scored))
        return of_rollouts(scored, *more)

    with patch.context() as patched:
        patched.setattr(trainer_metrics, "of_rollouts", keeping)
        assert cli.run([*arguments, f"--output-dir={directory}"]) == code
    config = yaml.safe_load((directory / "config.yaml").read_text())
    return Ran(directory, config, metrics(directory), kept, config["student"]["model"], teacher)


# -- a step's loss by definition, in float64 from whole distributions


Divergence = Callable[[Tensor, Tensor], Tensor]
"""(log p, log q), both [N, V + 1] with one outcome for all that no token is -> value [N]."""


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return forward_kl(log_q, log_p)


def mixed_kl(weight: float) -> Divergence:
    return lambda log_p, log_q: weight * forward_kl(log_p, log_q) + (1 - weight) * reverse_kl(log_p, log_q)


def jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_r = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=torch.float64))
    return 0.5 * forward_kl(log_p, log_r) + 0.5 * forward_kl(log_q, log_r)


def skewed_forward_kl(skew: float) -> Divergence:
    return lambda log_p, log_q: forward_kl(log_p, (skew * log_p.exp() + (1 - skew) * log_q.exp()).log())


def skewed_reverse_kl(skew: float) -> Divergence:
    return lambda log_p, log_q: forward_kl(log_q, ((1 - skew) * log_p.exp() + skew * log_q.exp()).log())


def adaptive_kl(alpha: float) -> Divergence:
    """Head: the teacher's likeliest ids, the tail's outcome after all of them, until their mass is alpha."""

    def value(log_p: Tensor, log_q: Tensor) -> Tensor:
        p, q = log_p.exp(), log_q.exp()
        order = torch.cat([p[:, :-1].argsort(1, descending=True), torch.full((len(p), 1), p.shape[1] - 1)], 1)
        before = p.gather(1, order).cumsum(1) - p.gather(1, order)
        gap = (p - q).abs().gather(1, order)
        share = (gap * (before < alpha)).sum(1) / gap.sum(1)
        return share * forward_kl(log_p, log_q) + (1 - share) * reverse_kl(log_p, log_q)

    return value


@functools.lru_cache(maxsize=4)
def plain(model: str | Path) -> Any:
    """In float64, by transformers alone."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()


@torch.no_grad()
def log_probs(model: str | Path, scored: ScoredRollout, temperature: float = 1.0) -> Tensor:
    """Of the tokens that are trained on, [N, V + 1]."""
    rollout = scored.rollout
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]]).long()
    logits = plain(model)(ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
    whole = (logits / temperature).log_softmax(-1)
    return torch.cat([whole[:, :V], whole[:, V:].logsumexp(1, keepdim=True)], 1)


def loss_of(
    ran: Ran,
    divergence: Divergence,
    *,
    weights: tuple[float, float] = (0.0, 1.0),
    temperatures: tuple[float, float] = (1.0, 1.0),
) -> float:
    """Mean over the first step's tokens of ce·CE + kl·D.

    Args:
        weights: of cross-entropy, which counts on fixed data, and of the divergence.
        temperatures: the student's and the teacher's.
    """
    total, count = 0.0, 0
    for scored in ran.scored[0]:
        log_q = log_probs(ran.student, scored, temperatures[0])
        log_p = log_probs(ran.teacher, scored, temperatures[1])
        total += weights[1] * float(divergence(log_p, log_q).sum())
        if scored.rollout.source == "fixed" and weights[0]:
            at = torch.from_numpy(scored.rollout.token_ids).long()[:, None]
            total -= weights[0] * float(log_probs(ran.student, scored).gather(1, at).sum())
        count += scored.rollout.num_tokens
    return total / count


def assert_loss(ran: Ran, divergence: Divergence, *, rel: float = 2e-5, **how: Any) -> None:
    assert ran.lines[0]["loss"] == pytest.approx(loss_of(ran, divergence, **how), rel=rel, abs=1e-7)


def mean_advantage(ran: Ran, *, kl_coef: float = 1.0, discount: float = 0.0) -> float:
    """Of the first step's tokens, not centred. The loss is −r·A with r = 1: its samples are of the weights that are
    trained."""
    every: list[float] = []
    for scored in ran.scored[0]:
        at = torch.from_numpy(scored.rollout.token_ids).long()[:, None]
        log_q, log_p = (log_probs(m, scored).gather(1, at)[:, 0] for m in (ran.student, ran.teacher))
        own = (-kl_coef * (log_q - log_p)).tolist()
        every += [sum(discount**j * v for j, v in enumerate(own[t:])) for t in range(len(own))]
    return sum(every) / len(every)
