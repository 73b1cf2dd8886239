"""Sharing the output head: its file, who may have it, and the check that it is the one that the teacher computes with.

Owns the file while the server runs; teacher_api.head owns what is in it. The head is the teacher's property: without
`share_head` nobody gets it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from teacher_api.errors import PermissionDenied, TeacherError, Unauthenticated
from teacher_api.head import Head, digest_of, logprobs_from_hidden, metadata_of
from teacher_api.types import ScoreOptions, Scores, TeacherInfo
from teacher_server.auth import KeyRing
from teacher_server.backends.base import OutputHead, ScoreJob
from teacher_server.config import ServerConfig

FEATURE = "head"
NEEDED = ("hidden", "full_vocabulary")
CHECK_TOKENS = 8
TOLERANCE = 2e-4  # nats, in float32: the rounding of two products of H terms
HALF_TOLERANCE = 0.1  # nats, as for whole rows in half precision (vllm_check.py)
HALF_RELATIVE = 2.0**-6  # of the largest |log p|: a teacher that rounds its logits to 8 bits


@dataclass(frozen=True, slots=True)
class HeadFile:
    path: Path
    digest: str
    num_bytes: int

    async def pieces(self, piece_bytes: int) -> AsyncGenerator[bytes, None]:
        """The file in order, one piece in memory at a time."""
        file = await asyncio.to_thread(self.path.open, "rb")
        try:
            while piece := await asyncio.to_thread(file.read, piece_bytes):
                yield piece
        finally:
            file.close()


class HeadAccess:
    """Who may download the head."""

    def __init__(self, config: ServerConfig) -> None:
        self._share = config.share_head
        self._keys = KeyRing([key.get_secret_value() for key in config.head_keys])

    def check(self, authorization: str | None) -> None:
        """Raises PermissionDenied, naming the option that says so."""
        if self._share == "none":
            raise PermissionDenied("this teacher does not share its output head (share_head is none)", field="head")
        if self._share == "keys":
            try:
                self._keys.check(authorization)
            except Unauthenticated:
                raise PermissionDenied(
                    "this key may not download the output head (share_head is keys, and it is not among head_keys)",
                    field="authorization",
                ) from None


def write_head(head: OutputHead, info: TeacherInfo, directory: Path) -> HeadFile:
    """The head's file in `directory`: the same bytes wherever the same teacher runs."""
    from safetensors.torch import save_file

    tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    path = directory / "head.safetensors"
    metadata = metadata_of(
        fingerprint=info.fingerprint,
        scale=float(head.scale),
        soft_cap=None if head.soft_cap is None else float(head.soft_cap),
        tokenizer_size=info.tokenizer_size,
    )
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return HeadFile(path, digest_of(path, info.fingerprint), path.stat().st_size)


def offered(info: TeacherInfo, file: HeadFile) -> TeacherInfo:
    """What the teacher says of itself once its head can be had."""
    features = tuple(sorted((*info.features, FEATURE)))
    return replace(info, features=features, head_digest=file.digest, head_bytes=file.num_bytes)


def as_client_has_it(head: OutputHead, info: TeacherInfo) -> Head:
    """The same head as a client reads it from the file, without a copy on a CPU."""
    import torch

    def array(tensor: Any) -> Any:
        tensor = tensor.detach().cpu()
        return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()

    return Head(
        weight=array(head.weight),
        dtype=str(head.weight.dtype).removeprefix("torch."),
        bias=None if head.bias is None else head.bias.detach().float().cpu().numpy(),
        scale=float(head.scale),
        soft_cap=head.soft_cap,
        tokenizer_size=info.tokenizer_size,
        fingerprint=info.fingerprint,
    )


def check_can_share(info: TeacherInfo) -> None:
    """Raises ValueError where a head would be of no use, or could not be checked."""
    missing = [feature for feature in NEEDED if feature not in info.features]
    if missing:
        raise ValueError(
            f"share_head needs a teacher that offers {' and '.join(NEEDED)}; this one ({info.engine}, "
            f"{info.scoring_path}) does not offer {' and '.join(missing)}"
        )


async def check_head(
    head: Head, info: TeacherInfo, ask: Callable[[ScoreJob], Awaitable[Scores | TeacherError]]
) -> None:
    """One short sequence: do the hidden states through this head give the whole rows that the teacher itself gives?

    Raises:
        ValueError: they don't, so that the head does something that is not known here.
    """
    num_tokens = min(CHECK_TOKENS, info.max_sequence_tokens)
    job = ScoreJob(
        id="head-check",
        token_ids=(np.arange(num_tokens) * 7 % info.tokenizer_size).astype(np.int32),
        prompt_tokens=1,
        positions=np.arange(1, num_tokens, dtype=np.int32),
        options=ScoreOptions(top_k="all", hidden=True),
    )
    scores = await ask(job)
    if isinstance(scores, TeacherError):
        raise ValueError(f"the output head could not be checked: {scores}")
    if scores.hidden is None or scores.topk_logprob is None:
        raise ValueError("the output head could not be checked: the engine gave no hidden states or no whole rows")
    hidden, expected = scores.hidden, scores.topk_logprob
    got = await asyncio.to_thread(logprobs_from_hidden, hidden, head)
    difference = float(np.abs(got - expected).max())
    tolerance = TOLERANCE
    if info.dtype != "float32":
        tolerance = max(HALF_TOLERANCE, HALF_RELATIVE * float(np.abs(expected).max()))
    if not difference <= tolerance:
        raise ValueError(
            f"the output head of this model is not understood: log p from hidden states is off by {difference:.3g} "
            f"nats, expected at most {tolerance:.3g}; start without share_head"
        )
