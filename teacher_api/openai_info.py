"""What a stock `vllm serve` is to us: where it is, what it says of itself as a TeacherInfo, what it can't do, and what
its errors mean. Knows no sockets (transport_openai.py) and no answers (openai_rows.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from teacher_api import errors
from teacher_api.errors import FingerprintMismatch, InvalidRequest, NotFound, TeacherError, TooLarge, Unsupported
from teacher_api.info import UNVERIFIED, digest, tokenizer_fingerprint
from teacher_api.transport import MAX_MESSAGE_BYTES
from teacher_api.types import ScoreRequest, TeacherInfo

SCHEMES = ("openai+http", "openai+https")
EXPECTED_URL = "openai+http://host:port/v1 or openai+https://…"
ENGINE = "vllm serve"
SCORING_PATH = "openai"
FEATURES = ("float16", "rank", "top_k")
KNOWN_TEXT = "The 3 quick  brown foxes' naïve café:\n\tdef f(x): return x**2  # 12,345.67 — 東京, Москва, 🙂\r\n"
"""For a tokenizer to be held against the server's: words, digits, spaces, several scripts, bytes beyond most merges."""


@dataclass(frozen=True, slots=True)
class OpenAIOptions:
    """What a stock server does not say of itself."""

    model: str = ""
    """Its name for the teacher, where it serves several; empty: the only one."""
    tokenizer: Any = None
    """The teacher's, as a transformers tokenizer made from its own files. Its fingerprint becomes the teacher's."""
    assumed_tokenizer: Any = None
    """Instead: one that the teacher's is taken to be equal to. The teacher's stays "unverified"."""

    def __post_init__(self) -> None:
        if self.tokenizer is not None and self.assumed_tokenizer is not None:
            raise ValueError("got tokenizer and assumed_tokenizer; expected one of them")

    @property
    def any_tokenizer(self) -> Any:
        return self.assumed_tokenizer if self.tokenizer is None else self.tokenizer


@dataclass(frozen=True, slots=True)
class Place:
    root: str  # http://host:port, perhaps with a path before /v1
    model: str  # of `?model=`, or ""


def place_of(url: str) -> Place:
    """Where `openai+http://host:port/v1?model=NAME` is; `/v1` and `?model=` may be left out.

    Raises:
        ValueError: the URL has another scheme, no host, or more in its query.
    """
    split = urlsplit(url)
    query = dict(parse_qsl(split.query, keep_blank_values=True))
    if split.scheme not in SCHEMES or not split.hostname or query.keys() - {"model"} or split.fragment:
        raise ValueError(f"teacher URL {url!r}: expected {EXPECTED_URL}, with ?model=NAME where it serves several")
    path = split.path.rstrip("/").removesuffix("/v1")
    return Place(urlunsplit((split.scheme.removeprefix("openai+"), split.netloc, path, "", "")), query.get("model", ""))


# ---- who is there ----------------------------------------------------------------------------------------------------


def chosen_card(models: Any, wanted: str) -> Mapping[str, Any]:
    """The entry of `GET /v1/models` for the teacher.

    Raises:
        NotFound: it is not among them.
        InvalidRequest: there are several and none was named.
        Unsupported: no answer as vLLM gives it.
    """
    cards = models.get("data") if isinstance(models, dict) else None
    if not isinstance(cards, list) or not all(isinstance(c, dict) and isinstance(c.get("id"), str) for c in cards):
        raise Unsupported("GET /v1/models has no list of models; expected a `vllm serve`")
    names = [card["id"] for card in cards]
    if not wanted and len(cards) != 1:
        raise InvalidRequest(f"the server has {', '.join(names) or 'no models'}; name one (?model=NAME)", field="model")
    for card in cards:
        if not wanted or card["id"] == wanted:
            if not (isinstance(card.get("max_model_len"), int) and card["max_model_len"] > 2):
                raise Unsupported(
                    f"the server says max_model_len {card.get('max_model_len')!r}; expected vLLM's number"
                )
            return dict(card)
    raise NotFound(f"the server has no model {wanted!r:.80}; it has {', '.join(names)}", field="model")


_LIMITS = re.compile(r"prompt logprobs of (\d+)\b.*max allowed: (\d+)")


def limits_of_refusal(error: InvalidRequest) -> tuple[int, int]:
    """(logit width, --max-logprobs) from vLLM's refusal of all logprobs (`prompt_logprobs: -1`).

    Raises:
        Unsupported: it says neither.
    """
    found = _LIMITS.search(error.message)
    if found is None:
        raise Unsupported(
            f"the server does not say how many prompt logprobs it gives ({error.message:.200}); expected a "
            "`vllm serve` that knows prompt_logprobs -1"
        ) from error
    return int(found[1]), int(found[2])


def info_of(
    card: Mapping[str, Any], version: str, *, logit_width: int, max_logprobs: int, options: OpenAIOptions
) -> TeacherInfo:
    """The server as a teacher. Its fingerprint digests what it says of itself, not its weights: it can't be asked for
    those. A sequence may have all but one of its positions: vLLM must generate a token."""
    size = logit_width
    if options.any_tokenizer is not None:
        size = min(1 + max(options.any_tokenizer.get_vocab().values()), logit_width)
    parts: dict[str, str] = {}
    fingerprint = UNVERIFIED
    if options.tokenizer is not None:
        fingerprint, parts = tokenizer_fingerprint(options.tokenizer)
    facts = {name: card.get(name) for name in ("id", "root", "parent", "max_model_len")}
    facts |= {"version": version, "tokenizer_size": size, "logit_width": logit_width}
    whole = ("full_vocabulary",) if max_logprobs >= logit_width else ()
    return TeacherInfo(
        fingerprint="stock-" + digest(json.dumps(facts, sort_keys=True)),
        model_name=card["id"],
        tokenizer_fingerprint=fingerprint,
        tokenizer_parts=parts,
        tokenizer_size=size,
        logit_width=logit_width,
        max_sequence_tokens=card["max_model_len"] - 1,
        max_top_k=min(max_logprobs, size),
        max_candidates=0,
        max_completions=1,  # a request of its own each, so that each has its own attempts
        max_request_bytes=MAX_MESSAGE_BYTES,
        max_response_bytes=MAX_MESSAGE_BYTES,
        features=tuple(sorted((*FEATURES, *whole))),
        dtype="unknown",
        quantisation="unknown",
        head_dtype="unknown",
        engine=ENGINE,
        engine_version=version,
        scoring_path=SCORING_PATH,
    )


def check_known_text(tokenizer: Any, theirs: Any) -> None:
    """Raises FingerprintMismatch unless the server's `/tokenize` of KNOWN_TEXT, `theirs`, has the tokenizer's ids."""
    mine = [int(i) for i in tokenizer.encode(KNOWN_TEXT, add_special_tokens=False)]
    if theirs != mine:
        raise FingerprintMismatch(
            f"the server's tokenizer makes other ids of a known text: {theirs!s:.120}; expected {mine!s:.120}"
        )


def differences(info: TeacherInfo) -> list[str]:
    """What of this teacher a caller should know, a line each: of a stock server, or of a slower scoring path."""
    if info.scoring_path != SCORING_PATH:
        return [f"scoring path {info.scoring_path}: {info.scoring_path_note}"] if info.scoring_path_note else []
    found = [
        f"{info.model_name} is a stock vLLM server: its weights can't be identified, other weights under the same name "
        "would not be noticed; prompts are computed again for each of their completions"
    ]
    if info.tokenizer_fingerprint == UNVERIFIED:
        found.append(
            f"the tokenizer of {info.model_name} is unverified: that ids mean the same there is taken on trust"
        )
    return found


# ---- what it can't do ------------------------------------------------------------------------------------------------


def check_request(request: ScoreRequest, info: TeacherInfo) -> None:
    """Refuses what a stock server would ignore or can't give.

    Raises:
        Unsupported, TooLarge: names the field.
    """
    options = request.options
    asked = {
        "temperature": options.temperature != 1.0,
        "entropy": options.entropy,
        "hidden": options.hidden,
        "full_vocabulary": options.top_k == "all",
    }
    for feature, is_asked in asked.items():
        if is_asked and feature not in info.features:
            where = "top_k" if feature == "full_vocabulary" else feature
            cure = f"; its --max-logprobs is below {info.logit_width}" if feature == "full_vocabulary" else ""
            raise Unsupported(
                f"a stock vLLM server does not offer {feature}; it offers {', '.join(info.features)}{cure}",
                field=f"options.{where}",
            )
    if options.top_k != "all" and options.top_k > info.max_top_k:
        raise TooLarge(
            f"got {options.top_k}; this server gives at most {info.max_top_k} (--max-logprobs)", field="options.top_k"
        )
    for i, completion in enumerate(request.completions):
        if completion.candidates is not None:
            raise Unsupported(
                "a stock vLLM server does not offer candidates: it scores no ids of the client's choice",
                field=f"completions[{i}].candidates",
            )


# ---- its errors ------------------------------------------------------------------------------------------------------

_BY_STATUS: dict[int, type[TeacherError]] = {
    400: errors.InvalidRequest,
    401: errors.Unauthenticated,
    403: errors.PermissionDenied,
    404: errors.NotFound,
    413: errors.TooLarge,
    422: errors.InvalidRequest,
    429: errors.Overloaded,
    500: errors.BackendFailed,
    501: errors.Unsupported,
}
_TOO_LONG = re.compile(r"maximum context length|maximum model length|max_tokens must be at least 1")
"""The last is what vLLM 0.32 says of a prompt as long as its limit, which leaves no room to generate a token."""


def error_of(status: int, body: bytes, retry_after_s: float | None) -> TeacherError:
    """The error that an answer other than 200 stands for. A 500 of vLLM is an engine that failed: worth a retry."""
    text = " ".join(_message(body).split())
    cls = _BY_STATUS.get(status, errors.Unavailable if status >= 500 else errors.InternalError)
    if status == 400 and _TOO_LONG.search(text):
        cls = errors.TooLarge
    if status == 404 and text in ("", "Not Found"):
        text = "no such path here; expected the base URL of a `vllm serve` that generates"
    return cls(f"HTTP {status}: {text or 'empty body'}", retry_after_s=retry_after_s)


def _message(body: bytes) -> str:
    """vLLM's `{"error": {"message"}}`, older `{"message"}`, `{"error": "Unauthorized"}`, or what a proxy wrote."""
    try:
        document = json.loads(body)
    except ValueError:
        document = None
    for _ in range(2):
        if isinstance(document, dict):
            document = document.get("error") or document.get("message") or document.get("detail")
    return document if isinstance(document, str) else body[:200].decode("utf-8", "replace")
