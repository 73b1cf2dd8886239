"""What the examples need, made on the spot: a small teacher, a smaller student, tasks for the harness, prompts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import models

WORDS = (
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = 512
LOGIT_STD = 1.5  # nats: peaked enough for greedy hits, and sums that float32 has five decimals of
TASKS = ("number_words", "letter_runs", "passages")

# One of each kind of request that the harness makes of a scoring server.
_QUESTIONS = """\
task: number_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: What is {{{{first}}}} plus {{{{second}}}}?\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
_RUNS = """\
task: letter_runs
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood
target_delimiter: ""
doc_to_text: "{{{{start}}}}"
doc_to_target: "{{{{rest}}}}"
metric_list:
  - metric: acc
  - metric: perplexity
"""
_PASSAGES = """\
task: passages
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
"""


def teacher(path: Path) -> Path:
    """A random Qwen3 of 0.36M parameters in float32, with a byte-level tokenizer."""
    return models.make(path, vocabulary=VOCABULARY, hidden=128, layers=2, logit_std=LOGIT_STD)


def student(path: Path, tokenizer: Path | str) -> Path:
    """A random model of another seed, with the tokenizer of the teacher: TRL sends its token ids as they are."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    words = AutoTokenizer.from_pretrained(tokenizer)
    if words.pad_token_id is None:
        words.pad_token = words.eos_token
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    words.save_pretrained(path)
    return path


def tasks(folder: Path, num_questions: int = 40) -> Path:
    """Writes TASKS, a file each with its data beside it, for the harness's `--include_path`."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = list(itertools.product(range(1, 10), repeat=2))
    questions = []
    for n in range(num_questions):
        first, second = pairs[n * 37 % len(pairs)]
        sums = [first + second + shift for shift in (-1, 0, 1, 2)]
        turn = n % 4
        choices = [WORDS[value - 1] for value in sums[turn:] + sums[:turn]]
        label = choices.index(WORDS[first + second - 1])
        questions.append({"first": WORDS[first - 1], "second": WORDS[second - 1], "choices": choices, "label": label})
    runs = [{"start": letter * (3 + n % 5), "rest": letter * (1 + n % 3)} for n, letter in enumerate(LETTERS)]
    passages = [{"text": prompt["prompt"] * (1 + n % 2)} for n, prompt in enumerate(_prompts(8))]
    written: tuple[list[Any], ...] = (questions, runs, passages)
    for template, name, rows in zip((_QUESTIONS, _RUNS, _PASSAGES), TASKS, written, strict=True):
        data = _write(folder / f"{name}.jsonl", rows)
        (folder / f"{name}.yaml").write_text(template.format(data=json.dumps(str(data.resolve()))))
    return folder


def prompts(path: Path, number: int = 64) -> Path:
    """Writes `number` prompts for TRL, one object a line."""
    return _write(path, _prompts(number))


def _prompts(number: int) -> list[dict[str, str]]:
    pairs = itertools.cycle(itertools.product(WORDS[:9], repeat=2))
    return [{"prompt": f"Count from {a} to {b}: "} for a, b in itertools.islice(pairs, number)]


def _write(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
