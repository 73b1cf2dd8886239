"""Who this server is: what the backend says of its model, completed with the limits of this configuration. Each
adapter is a teacher of its own, with its own weights and so its own fingerprint."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

from teacher_api import compression
from teacher_api.info import teacher_fingerprint
from teacher_api.types import TeacherInfo
from teacher_server.backends.base import ModelFacts
from teacher_server.config import ServerConfig

ADAPTERS = "adapters"
"""The feature of a server that takes `teacher` in a request."""


def _own_features(features: frozenset[str]) -> frozenset[str]:
    """What the server offers beside its backend."""
    own = {compression.FEATURE} if compression.is_available() else set()
    return frozenset(own | ({"hidden_bfloat16"} if "hidden" in features else set()))


def teacher_infos(config: ServerConfig, features: frozenset[str], facts: ModelFacts) -> dict[str, TeacherInfo]:
    """The base's under "", and each adapter's under its name."""
    features = features | {ADAPTERS} if facts.adapters else features
    base = _info(config, features, facts)
    scoring = features - {"generate"}  # the engine that writes has the base alone
    of_adapters = {
        name: replace(_info(config, scoring, replace(facts, weights_digest=digest)), model_name=name)
        for name, digest in facts.adapters.items()
    }
    return {"": base, **of_adapters}


def _info(config: ServerConfig, features: frozenset[str], facts: ModelFacts) -> TeacherInfo:
    return TeacherInfo(
        fingerprint=teacher_fingerprint(
            weights_digest=facts.weights_digest,
            dtype=facts.dtype,
            quantisation=facts.quantisation,
            head_dtype=facts.head_dtype,
            scoring_path=facts.scoring_path,
            engine=facts.engine,
            engine_version=facts.engine_version,
            tokenizer_size=facts.tokenizer_size,
        ),
        model_name=config.display_name,
        tokenizer_fingerprint=facts.tokenizer_fingerprint,
        tokenizer_size=facts.tokenizer_size,
        logit_width=facts.logit_width,
        max_sequence_tokens=facts.max_sequence_tokens,
        max_top_k=min(config.max_top_k, facts.tokenizer_size),
        max_candidates=config.max_candidates,
        max_completions=config.max_completions,
        max_request_bytes=config.max_request_bytes,
        max_response_bytes=min(config.max_response_bytes, config.queue_bytes),
        features=tuple(sorted(features | _own_features(features))),
        server_version=server_version(),
        model_revision=facts.model_revision,
        weights_digest=facts.weights_digest,
        tokenizer_parts=facts.tokenizer_parts,
        dtype=facts.dtype,
        quantisation=facts.quantisation,
        head_dtype=facts.head_dtype,
        engine=facts.engine,
        engine_version=facts.engine_version,
        scoring_path=facts.scoring_path,
        hidden_size=facts.hidden_size,
        teachers=tuple(facts.adapters),
        scoring_path_note=facts.scoring_path_note,
        batch_tokens=facts.batch_tokens,
    )


def server_version() -> str:
    try:
        return version("preceptor")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0"
