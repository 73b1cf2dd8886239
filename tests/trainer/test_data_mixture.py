"""Several domains: how often each comes, in which order, and that nothing of it depends on who asks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinymodels import tiny_tokenizer

from student_trainer.data import DataConfig, DataError, Prompts, load_prompts, open_prompts

pytestmark = pytest.mark.slow

SIZES = {"math": 30, "code": 7, "chat": 100}


def config(folder: Path, *, weights: tuple[float, ...] = (1.0, 1.0, 2.0), streaming: bool = False) -> DataConfig:
    domains = []
    for (name, size), weight in zip(SIZES.items(), weights, strict=False):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"question": f"{name} {i}"}) + "\n" for i in range(size)))
        stream = {"streaming": True, "max_prompt_tokens": 40} if streaming else {}
        domains.append({"name": name, "weight": weight, "source": str(path), "template": "plain", **stream})
    more: dict[str, Any] = {"shuffle_buffer": 5} if streaming else {}
    return DataConfig.model_validate({"domains": domains, **more})


def opened(folder: Path, **settings: Any) -> Prompts:
    return open_prompts(config(folder, **settings), tiny_tokenizer(300), eos_token_ids=(1,))


def seen(prompts: Prompts, start: int, count: int, seed: int = 0) -> list[tuple[str, int]]:
    return [(p.domain, p.index) for p in prompts.take(start, count, seed)]


@pytest.mark.parametrize("streaming", [False, True])
def test_concatenated_multi_domain_data_is_interleaved(tmp_path: Path, streaming: bool) -> None:
    domains = [name for name, _ in seen(opened(tmp_path, streaming=streaming), 0, 4000)]
    shares = {name: count / 4000 for name, count in Counter(domains).items()}
    for name, share in {"math": 0.25, "code": 0.25, "chat": 0.5}.items():
        assert abs(shares[name] - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    for start in range(0, 4000, 64):  # no batch of 64 without one of them: 3·0.75^64 is 3e-8
        assert set(domains[start : start + 64]) == set(SIZES)


@pytest.mark.parametrize("streaming", [False, True])
def test_each_domain_keeps_its_own_epochs_and_its_own_text(tmp_path: Path, streaming: bool) -> None:
    prompts = opened(tmp_path, streaming=streaming)
    taken = prompts.take(0, 400, 3)
    for name, size in SIZES.items():
        own = [p for p in taken if p.domain == name]
        first = own[: len(own) // size * size][:size]
        assert Counter(p.text for p in first) in ({}, Counter(f"{name} {i}" for i in range(size)))
        assert {p.text.split()[0] for p in own} == {name}
    by_index: dict[int, str] = {}
    for prompt in taken:  # one index, one prompt: groups of samples are told apart by it
        assert by_index.setdefault(prompt.index, prompt.text) == prompt.text
    assert len(set(by_index.values())) == len(by_index)
    assert prompts.longest.prompt == (40 if streaming else max(len(p.token_ids) for p in taken))


@pytest.mark.parametrize("streaming", [False, True])
def test_what_a_place_holds_is_a_pure_function_of_place_and_seed(tmp_path: Path, streaming: bool) -> None:
    whole = seen(opened(tmp_path, streaming=streaming), 0, 2600)
    prompts = opened(tmp_path, streaming=streaming)
    for start, count in ((2500, 40), (0, 3), (1020, 9), (1023, 1), (1024, 1), (100, 100)):
        assert seen(prompts, start, count) == whole[start : start + count]
    assert seen(prompts, 0, 100, seed=1) != whole[:100]


def test_a_restored_mixture_of_streams_goes_on(tmp_path: Path) -> None:
    expected = seen(opened(tmp_path, streaming=True), 500, 60)
    before = opened(tmp_path, streaming=True)
    before.take(0, 500, 0)
    state = json.loads(json.dumps(before.state(500, 0)))
    resumed = opened(tmp_path, streaming=True)
    resumed.restore(state)
    assert seen(resumed, 500, 60) == expected
    (tmp_path / "chat.jsonl").write_text('{"question": "other"}\n' * 100)
    changed = open_prompts(DataConfig.model_validate(before_config(tmp_path)), tiny_tokenizer(300), eos_token_ids=(1,))
    with pytest.raises(DataError, match=r"chat\.jsonl has changed"):
        changed.restore(state)


def before_config(folder: Path) -> dict[str, Any]:
    """The streams of `config`, over the files that are there."""
    domains = [
        {
            "name": name,
            "weight": weight,
            "source": str(folder / f"{name}.jsonl"),
            "template": "plain",
            "streaming": True,
            "max_prompt_tokens": 40,
        }
        for name, weight in zip(SIZES, (1.0, 1.0, 2.0), strict=True)
    ]
    return {"domains": domains, "shuffle_buffer": 5}


def test_a_heavy_weight_takes_nearly_all(tmp_path: Path) -> None:
    domains = Counter(name for name, _ in seen(opened(tmp_path, weights=(1.0, 1.0, 1998.0)), 0, 2000))
    assert domains["chat"] > 1980


def test_the_digest_is_of_every_domain(tmp_path: Path) -> None:
    first = opened(tmp_path).digest()
    assert opened(tmp_path).digest() == first
    made = config(tmp_path)
    (tmp_path / "code.jsonl").write_text('{"question": "another"}\n')
    assert open_prompts(made, tiny_tokenizer(300), eos_token_ids=(1,)).digest() != first


def test_orders_of_equally_long_domains_differ(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{i}\n" for i in range(40)))
    domains = [{"name": n, "source": str(tmp_path / f"{n}.txt"), "template": "plain"} for n in ("a", "b")]
    taken = open_prompts(DataConfig.model_validate({"domains": domains}), tiny_tokenizer(300), eos_token_ids=(1,))
    texts: dict[str, list[str]] = {"a": [], "b": []}
    for prompt in taken.take(0, 120, 0):
        texts[prompt.domain].append(prompt.text)
    assert texts["a"][:30] != texts["b"][:30]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "a.txt", "domains": [{"name": "a", "source": "b.txt"}]}, "source: got 'a.txt' beside domains"),
        ({"domains": [{"name": "a", "source": "a.txt"}] * 2}, "domains: got 'a' twice"),
        ({"domains": [{"name": "a"}]}, "domain 'a' has no source"),
        ({"domains": [{"source": "a.txt"}]}, "name"),
        ({"domains": [{"name": "a", "source": "a.txt", "weight": 0}]}, "weight"),
        ({"domains": [{"name": "a", "source": "a.txt", "shuffle": False}]}, "shuffle"),
    ],
)
def test_contradictory_domains_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig.model_validate(settings)


def test_one_source_and_a_mixture_of_one_hold_the_same(tmp_path: Path) -> None:
    made = config(tmp_path, weights=(1.0,))
    mixed = open_prompts(made, tiny_tokenizer(300), eos_token_ids=(1,)).take(0, 60, 5)
    alone = load_prompts(made.domains[0], tiny_tokenizer(300)).take(0, 60, 5)
    assert all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(mixed, alone, strict=True))
