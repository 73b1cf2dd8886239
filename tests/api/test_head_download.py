"""The way of a head to a client: pieces that fail a check leave nothing behind, and a cache is used only for the
teacher and the bytes it was made from."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_head import V, a_head, saved

from teacher_api.errors import CorruptResponse
from teacher_api.head import Head, digest_of, metadata_of
from teacher_api.head_download import Receive, head_of
from teacher_api.types import TeacherInfo
from teacher_api.v1 import teacher_pb2 as pb


@pytest.fixture
def served(tmp_path: Path) -> tuple[bytes, TeacherInfo]:
    """A head's file, and the teacher that states it."""
    return a_teacher(tmp_path, "a teacher")


def a_teacher(tmp_path: Path, fingerprint: str) -> tuple[bytes, TeacherInfo]:
    metadata = metadata_of(fingerprint=fingerprint, scale=1.0, soft_cap=None, tokenizer_size=V)
    path = saved(tmp_path / f"served by {fingerprint}", {"weight": a_head().weight}, metadata)
    data = path.read_bytes()
    info = TeacherInfo(
        fingerprint=fingerprint,
        model_name="m",
        tokenizer_fingerprint="",
        tokenizer_size=V,
        logit_width=40,
        max_sequence_tokens=10,
        max_top_k=1,
        max_candidates=1,
        max_completions=1,
        max_request_bytes=1,
        max_response_bytes=1,
        head_digest=digest_of(path, fingerprint),
        head_bytes=len(data),
    )
    return data, info


def pieces(data: bytes, size: int = 100) -> list[pb.HeadChunk]:
    return [pb.HeadChunk(offset=at, data=data[at : at + size]) for at in range(0, len(data), size)]


def download(info: TeacherInfo, cache_dir: Path | None, *attempts: list[pb.HeadChunk]) -> tuple[Head, int]:
    """The head, and how many attempts it took; each attempt but the last must fail."""
    made = 0

    async def stream(chunks: list[pb.HeadChunk]) -> AsyncIterator[pb.HeadChunk]:
        for chunk in chunks:
            yield chunk

    async def ask(receive: Receive) -> None:
        nonlocal made
        for number, chunks in enumerate(attempts, 1):
            made = number
            try:
                return await receive(stream(chunks))
            except CorruptResponse:
                if number == len(attempts):
                    raise
        raise AssertionError("not to be downloaded")

    return asyncio.run(head_of(info, ask, cache_dir)), made


def test_pieces_become_the_head_and_stay_in_the_cache(served: tuple[bytes, TeacherInfo], tmp_path: Path) -> None:
    data, info = served
    head, _ = download(info, tmp_path / "cache", pieces(data))
    np.testing.assert_array_equal(head.weight, a_head().weight)
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.name == f"a teacher-{info.head_digest}.safetensors"
    assert kept.read_bytes() == data
    again, _ = download(info, tmp_path / "cache")  # nothing to download from
    np.testing.assert_array_equal(again.weight, head.weight)
    assert again.fingerprint == "a teacher"


def test_without_a_cache_nothing_stays(
    served: tuple[bytes, TeacherInfo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    head, _ = download(served[1], None, pieces(served[0]))
    np.testing.assert_array_equal(head.weight, a_head().weight)
    assert not list(scratch.iterdir())


def flipped(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: pieces(data)[:-1], "ends after"),
        (lambda data: [], "ends after 0 of"),
        (lambda data: pieces(flipped(data)), "digest does not match"),
        (lambda data: pieces(data)[1:], "at byte 100; expected 0"),
        (lambda data: [*pieces(data)[:2], *pieces(data)[3:]], "at byte 300; expected 200"),
        (lambda data: pieces(data + b"x"), "more than the"),
    ],
)
def test_a_damaged_download_is_found_and_leaves_nothing(
    spoil: Any, message: str, served: tuple[bytes, TeacherInfo], tmp_path: Path
) -> None:
    data, info = served
    with pytest.raises(CorruptResponse, match=message):
        download(info, tmp_path / "cache", spoil(data))
    assert not list((tmp_path / "cache").iterdir())
    head, attempts = download(info, tmp_path / "cache", spoil(data), pieces(data))
    assert attempts == 2
    np.testing.assert_array_equal(head.weight, a_head().weight)


def test_a_damaged_cache_is_downloaded_again(served: tuple[bytes, TeacherInfo], tmp_path: Path) -> None:
    data, info = served
    download(info, tmp_path / "cache", pieces(data))
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(flipped(data))
    download(info, tmp_path / "cache", pieces(data))
    assert kept.read_bytes() == data


def test_the_head_of_another_teacher_is_not_used(served: tuple[bytes, TeacherInfo], tmp_path: Path) -> None:
    data, info = served
    download(info, tmp_path / "cache", pieces(data))
    other_data, other = a_teacher(tmp_path, "another teacher")
    head, attempts = download(other, tmp_path / "cache", pieces(other_data))
    assert attempts == 1
    assert head.fingerprint == "another teacher"
    with pytest.raises(CorruptResponse, match="digest does not match"):
        download(replace(other, head_bytes=len(data)), None, pieces(data))
    (first,) = (path for path in (tmp_path / "cache").iterdir() if path.name.startswith("a teacher"))
    first.rename(tmp_path / "cache" / f"another teacher-{other.head_digest}.safetensors")
    _, attempts = download(other, tmp_path / "cache", pieces(other_data))
    assert attempts == 1  # under its name lay the first one's file


def test_a_digest_of_a_file_that_says_something_else(served: tuple[bytes, TeacherInfo], tmp_path: Path) -> None:
    """A server that states a digest and another teacher's name in the file."""
    data, info = served
    with pytest.raises(CorruptResponse, match="with 36"):
        download(replace(info, tokenizer_size=V - 1), None, pieces(data))
