"""zstd around rows and requests: what comes out is what was sealed, and what can't be read is refused, bounded."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import numpy as np
import pytest
from client_calls import run
from fake_teacher import FakeTeacher, V, assert_same, expected_scores
from google.protobuf.message import DecodeError

from teacher_api import compression, errors, wire
from teacher_api.client import TeacherClient
from teacher_api.types import Completion, ScoreOptions, ScoreRequest
from teacher_api.v1 import teacher_pb2 as pb

pytestmark = pytest.mark.slow

TOKENS = 61
zstd = importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


def an_answer(max_rows_bytes=None, value="zstd"):
    """60 rows, top 8: the scores, the question, and its frames."""
    tokens = (np.arange(TOKENS) * 7 % V).astype(np.int32)
    request = ScoreRequest([Completion("x", tokens)], options=ScoreOptions(top_k=8, entropy=True))
    question = wire.question(request, request.completions[0], fingerprint="fp", tokenizer_size=V)
    scores = expected_scores(tokens, question.positions, request.options)
    frames = wire.encode_scores(
        scores,
        options=request.options,
        candidates=None,
        key=question.key,
        max_rows_bytes=max_rows_bytes,
        compression=value,
    )
    return scores, question, list(frames)


@pytest.mark.parametrize("max_rows_bytes", [None, 2000])
def test_compressed_frames_hold_the_same_rows_under_the_same_seal(max_rows_bytes):
    scores, question, frames = an_answer(max_rows_bytes)
    _, _, plain = an_answer(max_rows_bytes, "none")
    assembler, result = wire.Assembler(question), None
    for frame, other in zip(frames, plain, strict=True):
        assert frame.checksum == other.checksum
        if len(other.rows) < compression.LEAST_BYTES:
            assert frame == other
        else:
            assert frame.compression == pb.COMPRESSION_ZSTD
            assert zstd.decompress(frame.rows) == other.rows
            assert len(frame.rows) < len(other.rows)
        result = assembler.add(pb.ScoreFrame.FromString(frame.SerializeToString()))
    assert_same(result, scores)


def test_what_gets_no_smaller_stays_as_it_is():
    noise = np.random.default_rng(0).integers(0, 1 << 30, (1, 1000), dtype=np.uint32).view(np.float32)
    request = ScoreRequest([Completion("x", np.zeros(2, np.int32))], options=ScoreOptions(hidden=True))
    question = wire.question(request, request.completions[0], fingerprint="fp", tokenizer_size=V)
    scores = replace(expected_scores(np.zeros(2, np.int32), question.positions, request.options), hidden=noise)
    (frame,) = wire.encode_scores(
        scores, options=request.options, candidates=None, key=question.key, compression="zstd"
    )
    assert frame.compression == pb.COMPRESSION_NONE
    assert_same(wire.Assembler(question).add(frame), scores)


def test_no_flipped_bit_of_a_compressed_frame_changes_an_answer():
    """The seal is over the content: a bit that zstd itself ignores may flip, one that changes the content may not."""
    scores, question, (frame,) = an_answer()
    data = frame.SerializeToString()
    survived = 0
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            got = wire.Assembler(question).add(pb.ScoreFrame.FromString(bytes(damaged)))
        except (DecodeError, errors.CorruptResponse):
            continue
        assert_same(got, scores)
        survived += 1
    assert survived < 16, "only unused bits of the zstd header"


def test_no_truncation_is_accepted():
    _, question, (frame,) = an_answer()
    for length in range(len(frame.rows)):
        cut = pb.ScoreFrame(
            completion_id="x", rows=frame.rows[:length], checksum=frame.checksum, compression=pb.COMPRESSION_ZSTD
        )
        with pytest.raises(errors.CorruptResponse):
            wire.Assembler(question).add(cut)


def test_the_answer_to_another_question_is_refused_compressed_as_well():
    _, question, _ = an_answer()
    other = ScoreRequest([Completion("x", np.arange(TOKENS, dtype=np.int32) % V)], options=question.options)
    asked = wire.question(other, other.completions[0], fingerprint="fp", tokenizer_size=V)
    _, _, (frame,) = an_answer()
    with pytest.raises(errors.CorruptResponse, match="checksum does not match"):
        wire.Assembler(asked).add(frame)


def test_an_unknown_compression_is_refused():
    _, question, (frame,) = an_answer()
    frame.compression = 7
    with pytest.raises(errors.CorruptResponse, match="compression 7; expected none or zstd"):
        wire.Assembler(question).add(frame)
    request = wire.encode_request(ScoreRequest([Completion("x", np.array([1, 2], np.int32))]))
    request.compression = 7
    with pytest.raises(errors.Unsupported) as caught:
        wire.decode_request(request)
    assert caught.value.field == "compression"


# ---- bytes -----------------------------------------------------------------------------------------------------------


def bomb(size: int) -> bytes:
    """A frame of `size` zeros whose header does not say so."""
    writer = zstd.ZstdCompressor()
    pieces = [writer.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join([*pieces, writer.flush()])


def wide_window() -> bytes:
    option = zstd.CompressionParameter.window_log
    writer = zstd.ZstdCompressor(options={option: compression.WINDOW_LOG + 1})
    return writer.compress(bytes(1000)) + writer.flush()


def test_nothing_beyond_the_limit_is_made():
    data = bomb(256 << 20)
    assert len(data) < 64 << 10
    with pytest.raises(compression.TooMuch, match="more than 1000 bytes"):
        compression.decompress(data, 1000)
    assert compression.decompress(zstd.compress(bytes(1000)), 1000) == bytes(1000)
    assert max(len(piece) for piece in compression.Reader().pieces(data)) <= compression.PIECE_BYTES


BAD_FRAMES = {
    "no frame": (b"hello, this is text", "no zstd frame"),
    "empty": (b"", "ends early"),
    "cut": (zstd.compress(b"abc" * 100)[:-1], "ends early"),
    "more after it": (zstd.compress(b"abc") + b"x", "bytes after the end"),
    "two": (zstd.compress(b"abc") * 2, "bytes after the end"),
    "window": (wide_window(), "too much memory"),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_what_is_no_frame_is_refused(name):
    data, reason = BAD_FRAMES[name]
    with pytest.raises(ValueError, match=reason):
        compression.decompress(data, 1 << 20)


def test_pieces_can_be_read_as_soon_as_they_are_written():
    writer, reader = compression.Writer(), compression.Reader()
    for text in (b"first" * 1000, b"", b"second" * 100_000):
        assert b"".join(reader.pieces(writer.write(text))) == text
    with pytest.raises(ValueError, match="ends early"):
        reader.end()
    assert list(reader.pieces(writer.end())) == []
    reader.end()


# ---- requests --------------------------------------------------------------------------------------------------------


def a_request(tokens=1000):
    return wire.encode_request(ScoreRequest([Completion("x", np.arange(tokens, dtype=np.int32) % V)]))


def test_large_requests_travel_in_an_envelope():
    message = a_request()
    envelope = pb.ScoreRequest.FromString(compression.pack_request(message))
    assert pb.ScoreRequest.FromString(zstd.decompress(envelope.packed)) == message
    assert compression.unpack_request(envelope, message.ByteSize()) == message
    with pytest.raises(errors.TooLarge):
        compression.unpack_request(envelope, message.ByteSize() - 1)
    with pytest.raises(errors.InvalidRequest) as caught:
        wire.decode_request(envelope)
    assert caught.value.field == "packed"
    assert compression.pack_request(a_request(3)) == a_request(3).SerializeToString()


BAD_ENVELOPES = {
    "no zstd frame": pb.ScoreRequest(packed=b"hello"),
    "ends early": pb.ScoreRequest(packed=zstd.compress(bytes(100))[:-1]),
    "no teacher.v1.ScoreRequest": pb.ScoreRequest(packed=zstd.compress(b"\xff" * 100)),
    "timeout_s is set beside it": pb.ScoreRequest(packed=zstd.compress(b""), timeout_s=1.0),
    "envelope in an envelope": pb.ScoreRequest(packed=zstd.compress(pb.ScoreRequest(packed=b"x").SerializeToString())),
}


@pytest.mark.parametrize("reason", BAD_ENVELOPES)
def test_what_is_no_envelope_is_refused(reason):
    with pytest.raises(errors.InvalidRequest, match=reason) as caught:
        compression.unpack_request(BAD_ENVELOPES[reason], 1 << 20)
    assert caught.value.field == "packed"


# ---- the client's option ---------------------------------------------------------------------------------------------


def test_a_teacher_without_the_feature_is_refused(serve):
    with pytest.raises(errors.Unsupported, match="does not offer zstd") as caught:
        run(serve, FakeTeacher(), lambda client: client.info(), compression="zstd")
    assert caught.value.field == "compression"


def test_without_the_library_the_client_names_the_extra(monkeypatch):
    monkeypatch.setattr(compression, "_library", lambda: None)
    with pytest.raises(ValueError, match=r"preceptor\[zstd\]"):
        TeacherClient("http://127.0.0.1:1", compression="zstd")
    TeacherClient("http://127.0.0.1:1").close()
    _, question, _ = an_answer(value="none")
    frame = pb.ScoreFrame(completion_id="x", rows=b"x", checksum=bytes(16), compression=pb.COMPRESSION_ZSTD)
    with pytest.raises(errors.CorruptResponse, match=r"preceptor\[zstd\]"):
        wire.Assembler(question).add(frame)
    asking = a_request(3)
    asking.compression = pb.COMPRESSION_ZSTD
    with pytest.raises(errors.Unsupported, match="no zstd"):
        wire.decode_request(asking)


def test_wrong_values_and_stock_servers_are_refused():
    with pytest.raises(ValueError, match="expected 'none' or 'zstd'"):
        TeacherClient("http://127.0.0.1:1", compression="gzip")
    with pytest.raises(ValueError, match="a stock server has none"):
        TeacherClient("openai+http://127.0.0.1:1/v1", compression="zstd")
