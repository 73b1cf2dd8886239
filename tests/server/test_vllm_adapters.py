"""LoRA adapters in a real engine: base and adapters mixed in one batch, each against a float64 model with
W + scale · B·A computed here. On the fused path unless a test says otherwise."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tinymodels import save_adapter
from transformers import AutoModelForCausalLM
from vllm_jobs import check, checkpoint_for_vllm, job, log_p, ragged, random_tokens, score

from teacher_api.types import Scores
from teacher_server.backends.base import ScoreJob, ScoringBackend

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    # vLLM and what it starts, not ours
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::pytest.PytestWarning"),
]

VOCABULARY, WIDTH, POSITIONS = 490, 500, 420
BLOCK = 128  # tokens of vLLM's key-value blocks on a CPU: what can come from the cache
TOLERANCE = 1e-5
TEACHERS = ("", "math", "code")
SMALL = {"max_num_batched_tokens": 100, "max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 27}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "teacher"
    return checkpoint_for_vllm(path, tokenizer_size=VOCABULARY, vocab_size=WIDTH, max_position_embeddings=POSITIONS)


@pytest.fixture(scope="module")
def base(checkpoint: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def places(base: torch.nn.Module, checkpoint: Path) -> dict[str, str]:
    """Of different ranks, scales and modules."""
    math = save_adapter(checkpoint.with_name("math"), base, seed=1, rank=4, alpha=8.0)
    code = save_adapter(
        checkpoint.with_name("code"), base, seed=2, rank=9, alpha=6.0, modules=("q_proj", "down_proj"), use_rslora=True
    )
    return {"math": str(math), "code": str(code)}


@pytest.fixture(scope="module")
def references(base: torch.nn.Module, places: dict[str, str]) -> dict[str, torch.nn.Module]:
    return {"": base, **{name: merged(base, Path(place)) for name, place in places.items()}}


@torch.no_grad()
def merged(base: torch.nn.Module, place: Path) -> torch.nn.Module:
    model = copy.deepcopy(base)
    config = json.loads((place / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    tensors = {name: tensor.double() for name, tensor in load_file(place / "adapter_model.safetensors").items()}
    for name, layer in model.named_modules():
        key = f"base_model.model.{name}.lora_"
        if f"{key}A.weight" in tensors:
            layer.weight += scale * tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]
    return model


@pytest.fixture(scope="module")
def backend(checkpoint: Path, places: dict[str, str]) -> Iterator[ScoringBackend]:
    from teacher_server.backends.vllm_backend import VllmBackend

    backend = VllmBackend(str(checkpoint), scoring_path="fused", engine_args=SMALL, adapters=places)
    backend.facts = backend.load()  # type: ignore[attr-defined]
    yield backend
    asyncio.run(backend.close())


def mixed_jobs() -> list[ScoreJob]:
    """Each sequence for each teacher; half of them with a common beginning."""
    ks = itertools.cycle([0, 1, 16, "all"])
    shared = random_tokens(0, 2 * BLOCK + 10, VOCABULARY)
    jobs = []
    for n in range(8):
        own = random_tokens(n + 1, 2 + 50 * n, VOCABULARY)
        tokens, first = (np.concatenate([shared, own[:60]]), len(shared)) if n % 2 else (own, 1)
        positions = np.arange(first, len(tokens))
        candidates = ragged(100 + n, len(positions), VOCABULARY) if n % 4 else None
        one = job(tokens, positions, top_k=next(ks), temperature=1.0 + n % 3, entropy=True, candidates=candidates)
        jobs += [replace(one, teacher=name) for name in TEACHERS]
    return jobs


def check_all(jobs: list[ScoreJob], answers: list[Scores], references: dict[str, torch.nn.Module]) -> None:
    for asked, scores in zip(jobs, answers, strict=True):
        check(asked, scores, log_p(references[asked.teacher], asked), VOCABULARY, tolerance=TOLERANCE)


def test_says_who_is_there(backend: ScoringBackend) -> None:
    facts: Any = backend.facts  # type: ignore[attr-defined]
    assert facts.scoring_path.startswith("fused")
    assert list(facts.adapters) == ["math", "code"]
    assert len({facts.weights_digest, *facts.adapters.values()}) == 3


@pytest.mark.parametrize("order", ["as they are", "backwards"])
def test_base_and_adapters_in_one_batch(
    backend: ScoringBackend, references: dict[str, torch.nn.Module], order: str
) -> None:
    jobs = mixed_jobs()
    if order == "backwards":
        jobs.reverse()
    check_all(jobs, score(backend, *jobs), references)


def test_no_teacher_reads_what_another_has_cached(
    backend: ScoringBackend, references: dict[str, torch.nn.Module]
) -> None:
    tokens = random_tokens(900, 3 * BLOCK, VOCABULARY)
    cached = []
    for name in (*TEACHERS, *TEACHERS):
        asked = replace(job(tokens, np.arange(2 * BLOCK + 5, len(tokens)), top_k=4), teacher=name)
        (scores,) = score(backend, asked)
        check_all([asked], [scores], references)
        cached.append(scores.cached_tokens)
    assert cached == [0, 0, 0, 2 * BLOCK, 2 * BLOCK, 2 * BLOCK]


def test_two_processes_on_the_path_of_prompt_logprobs(
    checkpoint: Path, places: dict[str, str], references: dict[str, torch.nn.Module]
) -> None:
    """What serves where the fused path cannot: it has to divide a model and hold adapters, too."""
    from teacher_server.backends.vllm_backend import VllmBackend

    small = {**SMALL, "tensor_parallel_size": 2}
    backend = VllmBackend(str(checkpoint), scoring_path="prompt-logprobs", engine_args=small, adapters=places)
    try:
        assert backend.load().scoring_path.startswith("prompt-logprobs full-row")
        jobs = mixed_jobs()
        check_all(jobs, score(backend, *jobs), references)
    finally:
        asyncio.run(backend.close())


def test_wrong_adapters_are_found_before_serving(backend: ScoringBackend, checkpoint: Path) -> None:
    from teacher_server.backends.adapters import read_adapters
    from teacher_server.backends.vllm_check import check_adapters

    facts: Any = backend.facts  # type: ignore[attr-defined]
    adapters = read_adapters({name: str(checkpoint.with_name(name)) for name in ("math", "code")}, checkpoint)

    def swapped(jobs: list[ScoreJob]) -> list[Scores]:
        other = {"": "", "math": "code", "code": "math"}
        return score(backend, *(replace(j, teacher=other[j.teacher]) for j in jobs))

    def leaking(jobs: list[ScoreJob]) -> list[Scores]:
        """The base is taken for an adapter wherever it is asked beside one."""
        wrong = "math" if len({j.teacher for j in jobs}) > 1 else ""
        return score(backend, *(replace(j, teacher=j.teacher or wrong) for j in jobs))

    check_adapters(lambda jobs: score(backend, *jobs), facts, checkpoint, backend.features, adapters)
    for spoiled, cause in ((swapped, "lora.math merged"), (leaking, "of the base beside the others")):
        with pytest.raises(ValueError, match=f"LoRA adapters are wrong: .*{cause}"):
            check_adapters(spoiled, facts, checkpoint, backend.features, adapters)  # type: ignore[arg-type]


def test_an_adapter_that_vllm_refuses_is_named_and_the_engine_lives(
    backend: Any, base: torch.nn.Module, references: dict[str, torch.nn.Module], tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    biased = save_adapter(tmp_path / "biased", base, bias="all")
    host = backend._host
    with pytest.raises(ValueError, match=r"lora\.biased: vLLM can't load it: .*bias is not supported"):
        host.run_blocking(host.load_adapter(LoRARequest("biased", 9, str(biased))), timeout_s=60)
    jobs = mixed_jobs()[:6]
    check_all(jobs, score(backend, *jobs), references)
