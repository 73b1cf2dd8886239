"""The check that a scoring path inside vLLM passes before it is served with: it hooks into parts of vLLM that may
change under it, and a wrong row looks like any other.

Three kinds of answers are known beforehand: what a row's whole distribution says of every other option; that a token
changes the rows after it and none before, whether a prefix came from the cache or not; and, for checkpoints small
enough to be loaded once more, what transformers computes. Adapters are held against the same, in batches in which
they and the base are mixed, after each has left a prefix in the cache.

Shape legend: N rows, W logit width, V tokenizer size.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from teacher_api.types import LOGPROB_FLOOR, Candidates, ScoreOptions, Scores
from teacher_server.backends.adapters import Adapter
from teacher_server.backends.base import ModelFacts, ScoreJob

logger = logging.getLogger(__name__)

Ask = Callable[[Sequence[ScoreJob]], list[Scores]]

LONGEST = 300  # tokens of a check sequence: more than two of the largest blocks of a key-value cache
WHOLE_ROWS = 4
LATE_ROWS = 10  # of a sequence whose beginning may come from the cache
REFERENCE_BYTES = 1 << 30
"""Largest checkpoint for which transformers is asked as well."""
TOLERANCE = {"float32": 2e-4}
HALF_TOLERANCE = 0.1  # nats: a batch of another shape already changes half-precision logits by some 0.01
REFERENCE_TOLERANCE = 0.25
"""Mean |Δ log p| over the rows against a float32 forward, in half precision or quantised; in float32: TOLERANCE."""


def check_answers(ask: Ask, facts: ModelFacts, directory: Path) -> None:
    """Asks for scores of made-up sequences and compares.

    Raises:
        ValueError: one line with the first answer that is not as it must be.
    """
    tolerance, tokens = _tolerance(facts), _tokens(facts)
    try:
        first, again = (_distributions(ask, facts, tokens) for _ in range(2))
        for name in ("token_logprob", "log_tail", "topk_logprob"):
            _close(f"{name} of a sequence whose beginning is cached", again[name], first[name], tolerance)
        _check_options(ask, facts, tokens, tolerance)
        _check_causality(ask, facts, tokens, tolerance)
        _check_reference(first["token_logprob"], facts, tokens, directory)
    except _Wrong as error:
        raise ValueError(f"the answers of the fused path are wrong: {error}") from error


def check_adapters(
    ask: Ask, facts: ModelFacts, directory: Path, features: frozenset[str], adapters: Mapping[str, Adapter]
) -> None:
    """As `check_answers`, for the adapters of an engine, on any path; `features` are the path's."""
    tolerance, tokens = _tolerance(facts), _tokens(facts)
    positions = np.arange(1, len(tokens))
    late = positions[-LATE_ROWS:]
    teachers = ["", *adapters]
    try:
        cold = {name: ask([_job(tokens, positions, teacher=name, top_k=_top_k(facts))])[0] for name in teachers}
        order = [*teachers, *reversed(teachers)]
        mixed = ask([_job(tokens, late, teacher=name, top_k=_top_k(facts)) for name in order])
        for name, scores in zip(order, mixed, strict=True):
            what = f"of teacher {name!r}" if name else "of the base"
            for field in ("token_logprob", "topk_logprob"):
                expected = getattr(cold[name], field)[-len(late) :]
                _close(f"{field} {what} beside the others", getattr(scores, field), expected, tolerance)
        for name in adapters if "candidates" in features else ():
            _check_options(ask, facts, tokens, tolerance, teacher=name)
        _check_merged({name: cold[name].token_logprob for name in adapters}, facts, tokens, directory, adapters)
    except _Wrong as error:
        raise ValueError(f"the answers with LoRA adapters are wrong: {error}") from error


class _Wrong(Exception):
    """What differs."""


def _tolerance(facts: ModelFacts) -> float:
    return TOLERANCE.get(facts.dtype, HALF_TOLERANCE) if not facts.quantisation else HALF_TOLERANCE


def _tokens(facts: ModelFacts) -> np.ndarray:
    length = min(facts.max_sequence_tokens, LONGEST)
    return np.random.default_rng(0).integers(0, facts.tokenizer_size, length).astype(np.int32)


def _job(tokens: np.ndarray, positions: np.ndarray, teacher: str = "", **options: object) -> ScoreJob:
    candidates = options.pop("candidates", None)
    return ScoreJob(
        id="check",
        token_ids=tokens,
        prompt_tokens=1,
        positions=positions.astype(np.int32),
        options=ScoreOptions(**options),  # type: ignore[arg-type]
        candidates=candidates,  # type: ignore[arg-type]
        teacher=teacher,
    )


def _close(what: str, got: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    difference = np.abs(np.asarray(got, np.float64) - expected)
    if got.shape != np.shape(expected) or not (difference <= tolerance).all():
        raise _Wrong(f"{what} is off by {np.max(difference):.3g}, expected at most {tolerance:g}")


def _top_k(facts: ModelFacts) -> int:
    return min(8, facts.tokenizer_size)


def _distributions(ask: Ask, facts: ModelFacts, tokens: np.ndarray) -> dict[str, np.ndarray]:
    (scores,) = ask([_job(tokens, np.arange(1, len(tokens)), top_k=_top_k(facts))])
    assert scores.topk_logprob is not None
    return {name: getattr(scores, name) for name in ("token_logprob", "log_tail", "topk_logprob")}


def _check_options(ask: Ask, facts: ModelFacts, tokens: np.ndarray, tolerance: float, teacher: str = "") -> None:
    """Every option against whole rows, all asked together."""
    rows = np.unique(np.linspace(1, len(tokens) - 1, WHOLE_ROWS).astype(np.int64))
    k, size = _top_k(facts), facts.tokenizer_size
    wanted = np.random.default_rng(1).integers(0, size, (len(rows), 5))
    candidates = Candidates.from_rows(list(wanted))
    mixed = [
        _job(tokens, rows, teacher, top_k="all", entropy=True),
        _job(tokens, rows, teacher, top_k=k, candidates=candidates, rank=True),
        _job(tokens, rows, teacher, top_k="all", temperature=2.0),
        _job(tokens, rows, teacher, top_k=k, temperature=2.0),
    ]
    whole, asked, warm, warm_k = ask(mixed)
    assert whole.topk_logprob is not None
    assert asked.candidate_logprob is not None
    assert warm.topk_logprob is not None
    log_p = whole.topk_logprob.astype(np.float64)
    mass = np.logaddexp(_logsumexp(log_p), whole.log_tail)
    _close("the logarithm of a row's whole mass", mass, np.zeros(len(rows)), 1e-4)
    at = np.arange(len(rows))
    _close("a token's logprob", asked.token_logprob, log_p[at, tokens[rows]], tolerance)
    best = -np.sort(-log_p, axis=1)[:, :k]
    _close("the top-k", asked.topk_logprob, best, tolerance)  # type: ignore[arg-type]
    _close(
        "a candidate's logprob", asked.candidate_logprob.reshape(wanted.shape), log_p[at[:, None], wanted], tolerance
    )
    warm_best = -np.sort(-warm.topk_logprob.astype(np.float64), axis=1)[:, :k]
    _close("the top-k at temperature 2", warm_k.topk_logprob, warm_best, tolerance)  # type: ignore[arg-type]
    likely = log_p > LOGPROB_FLOOR / 2
    ratio = np.where(likely, warm.topk_logprob - log_p / 2, np.nan)
    spread = np.nanmax(ratio, axis=1) - np.nanmin(ratio, axis=1)
    _close("log p at temperature 2 less half of log p, over a row,", spread, np.zeros(len(rows)), tolerance)


def _check_causality(ask: Ask, facts: ModelFacts, tokens: np.ndarray, tolerance: float) -> None:
    """A token in the middle decides what follows it, and nothing before."""
    middle = len(tokens) // 2
    other = tokens.copy()
    other[middle] = (other[middle] + 1) % facts.tokenizer_size
    positions = np.arange(1, len(tokens))
    one, two = ask([_job(t, positions, top_k=_top_k(facts)) for t in (tokens, other)])
    assert one.topk_logprob is not None
    assert two.topk_logprob is not None
    _close("a row before a changed token", two.topk_logprob[:middle], one.topk_logprob[:middle], tolerance)
    after = np.abs(two.topk_logprob[middle:].astype(np.float64) - one.topk_logprob[middle:])
    if len(after) and after[0].max() == 0.0 and facts.tokenizer_size > 1:
        raise _Wrong("a changed token does not change the row after it")


def _check_reference(got: np.ndarray, facts: ModelFacts, tokens: np.ndarray, directory: Path) -> None:
    model = _reference(facts, directory)
    if model is not None:
        _close_to_reference("transformers' own forward", got, _token_log_p(model, tokens), facts)
    del model
    gc.collect()


def _check_merged(
    got: Mapping[str, np.ndarray],
    facts: ModelFacts,
    tokens: np.ndarray,
    directory: Path,
    adapters: Mapping[str, Adapter],
) -> None:
    """Each adapter against transformers' forward of W + scale · B·A."""
    model = _reference(facts, directory)
    for name, adapter in adapters.items() if model is not None else ():
        if adapter.scale is None:
            logger.info("lora.%s has ranks or scales of its modules' own; its answers are not compared", name)
            continue
        kept = {}
        with torch.inference_mode():
            for module, (a, b) in adapter.pairs().items():
                weight = model.get_submodule(module).weight
                kept[module] = weight.clone()
                delta = adapter.scale * (b @ a)
                weight += delta if weight.shape == delta.shape else delta.T
        expected = _token_log_p(model, tokens)
        with torch.inference_mode():
            for module, weight in kept.items():
                model.get_submodule(module).weight.copy_(weight)
        _close_to_reference(f"transformers' forward with lora.{name} merged", got[name], expected, facts)
    del model
    gc.collect()


def _reference(facts: ModelFacts, directory: Path) -> Any:
    """The checkpoint as transformers has it, in float32; None where it is too large for a second copy, or can't be."""
    from transformers import AutoModelForCausalLM

    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    if not 0 < size <= REFERENCE_BYTES or facts.quantisation:
        return None
    try:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    except (ValueError, OSError, RuntimeError, KeyError, ImportError) as error:
        logger.info("transformers can't load the checkpoint; its answers are not compared: %s", error)
        return None


def _token_log_p(model: Any, tokens: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.inference_mode():
        logits = model(input_ids=ids[None]).logits[0, :-1]
        result: np.ndarray = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0].numpy()
    return result


def _close_to_reference(what: str, got: np.ndarray, expected: np.ndarray, facts: ModelFacts) -> None:
    if facts.dtype == "float32":
        _close(f"log p of the tokens, next to {what},", got, expected, 10 * _tolerance(facts))
    else:
        mean = np.abs(got.astype(np.float64) - expected).mean(keepdims=True)
        _close(f"mean |Δ log p| next to {what}", mean, np.zeros(1), REFERENCE_TOLERANCE)


def _logsumexp(values: np.ndarray) -> np.ndarray:
    top = values.max(axis=1)
    result: np.ndarray = top + np.log(np.exp(values - top[:, None]).sum(axis=1))
    return result
