"""Bytes <-> numpy: round trips over random requests and answers, refusal of everything damaged, and the bytes that
released versions have put on the wire (golden/)."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_teacher import WIDTH, V, assert_same, expected_scores
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from reliability import holds

from teacher_api import errors, wire
from teacher_api.types import CallMetadata, Candidates, Completion, ScoreOptions, ScoreRequest, Scores, scored_positions
from teacher_api.v1 import teacher_pb2 as pb

GOLDEN = Path(__file__).parent / "golden"


def ids(*values):
    return np.array(values, dtype=np.int32)


@st.composite
def requests(draw):
    token = st.integers(0, V - 1)
    prompts = [np.array(p, np.int32) for p in draw(st.lists(st.lists(token, min_size=1, max_size=5), max_size=2))]
    completions = []
    for i in range(draw(st.integers(1, 3))):
        tokens = np.array(draw(st.lists(token, min_size=2, max_size=9)), np.int32)
        prompt = draw(st.sampled_from([None, *range(len(prompts))]))
        completion = Completion(f"c{i}", tokens, prompt)
        length = 0 if prompt is None else len(prompts[prompt])
        cuts = sorted(draw(st.sets(st.integers(1, length + len(tokens)), max_size=4)))
        ranges = tuple((a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False))
        completion = replace(completion, ranges=ranges)
        if draw(st.booleans()):
            rows = len(scored_positions(completion, length))
            asked = draw(st.lists(st.lists(token, max_size=3), min_size=rows, max_size=rows))
            completion = replace(completion, candidates=Candidates.from_rows(asked))
        completions.append(completion)
    options = ScoreOptions(
        top_k=draw(st.sampled_from([0, 1, 7, V, "all"])),
        temperature=draw(st.sampled_from([1.0, 0.5, 2.0])),
        value_type=draw(st.sampled_from(["float32", "float16"])),
        entropy=draw(st.booleans()),
        rank=draw(st.booleans()),
        hidden=draw(st.booleans()),
    )
    return ScoreRequest(
        completions, prompts, options, "fp", CallMetadata("t", "e", "r"), draw(st.none() | st.just(2.5))
    )


def through_wire(request):
    return wire.decode_request(pb.ScoreRequest.FromString(wire.encode_request(request).SerializeToString()))


def an_answer(request, completion, max_rows_bytes=None):
    tokens, positions = wire.resolve(request, completion)
    scores = expected_scores(tokens, positions, request.options, completion.candidates)
    scores = replace(scores, id=completion.id, computed_tokens=3, cached_tokens=2)
    question = wire.question(request, completion, fingerprint="fp", tokenizer_size=V)
    frames = list(
        wire.encode_scores(
            scores,
            options=request.options,
            candidates=completion.candidates,
            key=question.key,
            max_rows_bytes=max_rows_bytes,
        )
    )
    return scores, question, frames


@given(requests())
@settings(max_examples=60, deadline=None)
def test_requests_survive_the_wire(request):
    got = through_wire(request).request
    assert (got.options, got.metadata, got.timeout_s) == (request.options, request.metadata, request.timeout_s)
    for a, b in zip(got.prompts, request.prompts, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(got.completions, request.completions, strict=True):
        assert (a.id, a.prompt_index, a.ranges) == (b.id, b.prompt_index, b.ranges)
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        assert (a.candidates is None) == (b.candidates is None)
        if a.candidates is not None:
            np.testing.assert_array_equal(a.candidates.ids, b.candidates.ids)
            np.testing.assert_array_equal(a.candidates.row_offsets, b.candidates.row_offsets)


@given(requests(), st.sampled_from([None, 1, 100, 1000]))
@settings(max_examples=60, deadline=None)
def test_answers_survive_the_wire_in_one_frame_or_many(request, max_rows_bytes):
    for completion in request.completions:
        scores, question, frames = an_answer(request, completion, max_rows_bytes)
        if max_rows_bytes == 1:
            assert len(frames) == scores.num_rows
        assembler = wire.Assembler(question)
        results = [assembler.add(pb.ScoreFrame.FromString(f.SerializeToString())) for f in frames]
        assert results[:-1] == [None] * (len(frames) - 1)
        assert_same(results[-1], scores)
        assert (results[-1].computed_tokens, results[-1].cached_tokens) == (3, 2)
        assert results[-1].token_logprob.flags.writeable


@pytest.mark.parametrize(("vocabulary", "most"), [(32_000, 280), (151_936, 350)])
def test_64_of_a_large_vocabulary_take_few_bytes_a_row(vocabulary, most):
    rows, top_k = 4095, 64
    random = np.random.default_rng(0)
    ranked = np.argsort(random.random((rows, 4 * top_k)), axis=1)[:, :top_k] + vocabulary - 4 * top_k
    values = -np.sort(random.uniform(0.1, 12, (rows, top_k))).astype(np.float16)
    request = ScoreRequest(
        [Completion("a completion's id", random.integers(0, vocabulary, rows + 1).astype(np.int32))],
        options=ScoreOptions(top_k=top_k, value_type="float16"),
    )
    question = wire.question(request, request.completions[0], fingerprint="f", tokenizer_size=vocabulary)
    one = np.full(rows, -1.5, np.float32)
    scores = Scores("a completion's id", question.positions, one, one, ranked.astype(np.int32), values)
    for max_rows_bytes in (None, 1 << 18):  # one message, and a stream of several
        assembler = wire.Assembler(question)
        frames = list(
            wire.encode_scores(
                scores, options=request.options, candidates=None, key=question.key, max_rows_bytes=max_rows_bytes
            )
        )
        assert (len(frames) == 1) == (max_rows_bytes is None)
        sent = [pb.ScoreResponse(frames=frames)] if max_rows_bytes is None else frames
        assert sum(5 + message.ByteSize() for message in sent) / rows <= most  # 5: what gRPC puts before a message
        got = [assembler.add(frame) for frame in frames][-1]
    np.testing.assert_array_equal(got.topk_ids, ranked)
    np.testing.assert_array_equal(got.topk_logprob, values)


# ---- damage ----------------------------------------------------------------------------------------------------------


def a_request():
    candidates = Candidates.from_rows([[3], [], [4, 5]])
    return ScoreRequest(
        [Completion("seq-1", ids(5, 6, 7), 0, candidates=candidates)],
        [ids(1, 2)],
        ScoreOptions(top_k=4, entropy=True, rank=True),
    )


def accepts(data: bytes, question) -> bool:
    """As the client does: parse, then assemble."""
    try:
        result = wire.Assembler(question).add(pb.ScoreFrame.FromString(data))
    except (DecodeError, errors.CorruptResponse):
        return False
    return result is not None


def test_no_flipped_bit_is_accepted():
    _, question, (frame,) = an_answer(a_request(), a_request().completions[0])
    data = frame.SerializeToString()
    assert accepts(data, question)
    flips = range(8 * len(data))
    assert len(flips) > 1000
    for bit in flips:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        assert not accepts(bytes(damaged), question), f"bit {bit}"


def test_no_flipped_bit_of_an_error_is_accepted():
    _, question, _ = an_answer(a_request(), a_request().completions[0])
    data = wire.encode_error("seq-1", errors.TooLarge("too long", field="x"), "fp").SerializeToString()
    got = wire.Assembler(question).add(pb.ScoreFrame.FromString(data))
    assert isinstance(got, errors.TooLarge)
    assert (got.message, got.field) == ("too long", "x")
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        assert not accepts(bytes(damaged), question), f"bit {bit}"


def test_no_truncation_is_accepted():
    _, question, (frame,) = an_answer(a_request(), a_request().completions[0])
    data = frame.SerializeToString()
    for length in range(len(data)):
        assert not accepts(data[:length], question), length


OTHER_QUESTIONS = {
    "another token": lambda r: replace(r, completions=[replace(r.completions[0], token_ids=ids(5, 6, 8))]),
    "another prompt": lambda r: replace(r, prompts=[ids(1, 3)]),
    "other candidates": lambda r: replace(
        r, completions=[replace(r.completions[0], candidates=Candidates.from_rows([[3], [4], [5]]))]
    ),
    "no candidates": lambda r: replace(r, completions=[replace(r.completions[0], candidates=None)]),
    "other rows": lambda r: replace(
        r, completions=[replace(r.completions[0], ranges=((1, 4),), candidates=r.completions[0].candidates)]
    ),
    "another temperature": lambda r: replace(r, options=replace(r.options, temperature=1.5)),
    "another top_k": lambda r: replace(r, options=replace(r.options, top_k=5)),
    "no entropy": lambda r: replace(r, options=replace(r.options, entropy=False)),
    "float16": lambda r: replace(r, options=replace(r.options, value_type="float16")),
}


@pytest.mark.parametrize("change", OTHER_QUESTIONS.values(), ids=OTHER_QUESTIONS)
def test_the_answer_to_another_question_is_refused(change):
    request, other = a_request(), change(a_request())
    _, _, (frame,) = an_answer(request, request.completions[0])
    question = wire.question(other, other.completions[0], fingerprint="fp", tokenizer_size=V)
    with pytest.raises(errors.CorruptResponse, match="checksum does not match"):
        wire.Assembler(question).add(frame)


def test_the_answer_of_another_teacher_is_refused():
    request = a_request()
    _, _, (frame,) = an_answer(request, request.completions[0])
    question = wire.question(request, request.completions[0], fingerprint="other", tokenizer_size=V)
    with pytest.raises(errors.CorruptResponse, match="'other'"):
        wire.Assembler(question).add(frame)


def test_frames_out_of_order_or_twice_are_refused():
    request = a_request()
    _, question, frames = an_answer(request, request.completions[0], max_rows_bytes=1)
    with pytest.raises(errors.CorruptResponse, match="expected them to start at 0"):
        wire.Assembler(question).add(frames[1])
    assembler = wire.Assembler(question)
    assembler.add(frames[0])
    with pytest.raises(errors.CorruptResponse, match="expected them to start at 1"):
        assembler.add(frames[0])


# Answers with a valid seal from a server that is wrong: the name of the array -> what it does to the scores.
WRONG_ANSWERS = {
    "log_tail": lambda s: replace(s, log_tail=np.full_like(s.log_tail, np.nan)),
    "token_logprob": lambda s: replace(s, token_logprob=s.token_logprob + 20),
    "topk_ids: row": lambda s: replace(s, topk_ids=np.zeros_like(s.topk_ids)),
    "topk_ids: ids": lambda s: replace(s, topk_ids=s.topk_ids + V),
    "topk_logprob: row": lambda s: replace(s, topk_logprob=s.topk_logprob[:, ::-1]),
    "topk_logprob: value": lambda s: replace(s, topk_logprob=np.full_like(s.topk_logprob, -np.inf)),
    "topk_logprob is": lambda s: replace(s, topk_logprob=s.topk_logprob[:, :-1]),
    "entropy is missing": lambda s: replace(s, entropy=None),
    "hidden is there": lambda s: replace(s, hidden=np.zeros((3, 2), np.float32)),
    "rank: values": lambda s: replace(s, rank=np.zeros_like(s.rank)),
    "candidate_logprob has": lambda s: replace(s, candidate_logprob=s.candidate_logprob[:-1]),
}


@pytest.mark.parametrize("name", WRONG_ANSWERS)
def test_wrong_answers_are_refused_by_name(name):
    request = a_request()
    scores, question, _ = an_answer(request, request.completions[0])
    wrong = WRONG_ANSWERS[name](scores)
    frames = wire.encode_scores(
        wrong, options=request.options, candidates=request.completions[0].candidates, key=question.key
    )
    with pytest.raises(errors.CorruptResponse, match=name):
        wire.Assembler(question).add(next(iter(frames)))


# ---- bad requests ----------------------------------------------------------------------------------------------------


def message():
    return wire.encode_request(a_request())


def u(dtype, shape, data):
    return pb.Array(dtype=dtype, shape=shape, data=data)


BAD_SHARED = {
    "completions": lambda m: m.ClearField("completions"),
    "prompts[0]": lambda m: m.prompts[0].CopyFrom(u(pb.DTYPE_FLOAT32, [1], b"\0\0\0\0")),
    "completions[1].id": lambda m: m.completions.append(m.completions[0]),
    "completions[0].id": lambda m: setattr(m.completions[0], "id", ""),
    "options.temperature": lambda m: setattr(m.options, "temperature", 0.0),
    "options.top_k": lambda m: setattr(m.options, "full_vocabulary", True),
    "options.value_type": lambda m: setattr(m.options, "value_type", pb.DTYPE_UINT16),
    "metadata.tenant": lambda m: setattr(m.metadata, "tenant", "x" * 129),
    "timeout_s": lambda m: setattr(m, "timeout_s", float("nan")),
}


@pytest.mark.parametrize("field", BAD_SHARED)
def test_what_is_shared_fails_the_request(field):
    bad = message()
    BAD_SHARED[field](bad)
    with pytest.raises((errors.InvalidRequest, errors.Unsupported)) as caught:
        wire.decode_request(bad)
    assert caught.value.field == field


C = "completions[0]."
BAD_OWN = {
    "data too short": (C + "token_ids", lambda c: setattr(c.token_ids, "data", c.token_ids.data[:-1])),
    "data too long": (C + "token_ids", lambda c: setattr(c.token_ids, "data", c.token_ids.data + b"\0")),
    "huge shape": (C + "token_ids", lambda c: c.token_ids.shape.__setitem__(0, 2**32 - 1)),
    "two dimensions": (C + "token_ids", lambda c: c.token_ids.shape.append(1)),
    "no shape": (C + "token_ids", lambda c: c.token_ids.ClearField("shape")),
    "float": (C + "token_ids", lambda c: setattr(c.token_ids, "dtype", pb.DTYPE_FLOAT16)),
    "unknown dtype": (C + "token_ids", lambda c: setattr(c.token_ids, "dtype", 99)),
    "above int32": (C + "token_ids", lambda c: c.token_ids.CopyFrom(u(pb.DTYPE_UINT32, [1], b"\xff" * 4))),
    "empty": (C + "token_ids", lambda c: c.ClearField("token_ids")),
    "no such prompt": (C + "prompt_index", lambda c: setattr(c, "prompt_index", 1)),
    "position 0": (C + "ranges", lambda c: c.ranges.add(start=0, stop=2)),
    "empty range": (C + "ranges", lambda c: c.ranges.add(start=2, stop=2)),
    "past the end": (C + "ranges", lambda c: c.ranges.add(start=2, stop=6)),
    "overlap": (C + "ranges", lambda c: (c.ranges.add(start=1, stop=3), c.ranges.add(start=2, stop=4))),
    "offset dtype": (
        C + "candidates.row_offsets",
        lambda c: setattr(c.candidates.row_offsets, "dtype", pb.DTYPE_UINT24),
    ),
    "offsets descend": (
        C + "candidates",
        lambda c: c.candidates.row_offsets.CopyFrom(u(pb.DTYPE_UINT32, [4], struct.pack("<4I", 0, 2, 1, 3))),
    ),
    "offsets end elsewhere": (
        C + "candidates",
        lambda c: c.candidates.row_offsets.CopyFrom(u(pb.DTYPE_UINT32, [4], struct.pack("<4I", 0, 1, 1, 2))),
    ),
    "too few offsets": (
        C + "candidates",
        lambda c: c.candidates.row_offsets.CopyFrom(u(pb.DTYPE_UINT32, [3], struct.pack("<3I", 0, 1, 3))),
    ),
    "no offsets": (C + "candidates.row_offsets", lambda c: c.candidates.ClearField("row_offsets")),
}


@pytest.mark.parametrize("name", BAD_OWN)
def test_what_is_its_own_fails_one_completion_only(name):
    field, spoil = BAD_OWN[name]
    bad = message()
    other = bad.completions.add()
    other.CopyFrom(message().completions[0])
    other.id = "good"
    spoil(bad.completions[0])
    decoded = wire.decode_request(bad)
    assert decoded.ids == ["seq-1", "good"]
    assert isinstance(decoded.entries[0], errors.InvalidRequest)
    assert decoded.entries[0].field == field
    assert [c.id for c in decoded.request.completions] == ["good"]
    assert list(decoded.indices) == [1]


@given(st.binary(max_size=200), st.data())
@settings(max_examples=200, deadline=None)
def test_mutated_requests_fail_cleanly(noise, data):
    """Whatever bytes come: a request, or a TeacherError of the caller's."""
    good = message().SerializeToString()
    at = data.draw(st.integers(0, len(good)))
    try:
        parsed = pb.ScoreRequest.FromString(good[:at] + noise + good[at + len(noise) :])
    except DecodeError:
        return
    try:
        decoded = wire.decode_request(parsed)
    except (errors.InvalidRequest, errors.Unsupported):
        return
    for entry in decoded.entries:
        assert isinstance(entry, Completion | errors.InvalidRequest)


# ---- golden bytes ----------------------------------------------------------------------------------------------------


def array_bytes(kind, values):
    return struct.pack(f"<{len(values)}{kind}", *values)


def reference_key(tokens, positions, options, fingerprint, candidates=None, after=b""):
    """The seal's key from its description in docs/protocol.md, with nothing but struct and hashlib."""
    parts = [struct.pack("<I", len(fingerprint)), fingerprint.encode()]
    for values in (tokens, positions):
        parts += [struct.pack("<I", len(values)), array_bytes("I", values)]
    parts.append(struct.pack("<B", candidates is not None))
    if candidates is not None:
        asked, offsets = candidates
        parts += [struct.pack("<I", len(asked)), array_bytes("I", asked), array_bytes("I", offsets)]
    parts.append(struct.pack("<IBdBBBB", *options) + after)
    return hashlib.blake2b(b"".join(parts), digest_size=32, person=b"teacher.v1.ask").digest()


def test_golden_request(record_property):
    decoded = wire.decode_request(pb.ScoreRequest.FromString((GOLDEN / "v1_request.bin").read_bytes()))
    request = decoded.request
    first, second = request.completions
    assert [p.tolist() for p in request.prompts] == [[1, 2, 70000]]
    assert (first.id, first.token_ids.tolist(), first.prompt_index) == ("a", [5, 6, 7], 0)
    assert first.ranges == ((1, 2), (4, 6))
    assert first.candidates is not None
    assert first.candidates.ids.tolist() == [3, 4, 39]
    assert first.candidates.row_offsets.tolist() == [0, 1, 1, 3]
    assert (second.id, second.token_ids.tolist(), second.prompt_index, second.ranges) == ("b", [8, 9], None, ())
    assert request.options == ScoreOptions(top_k=2, temperature=1.5, value_type="float16", entropy=True, rank=True)
    assert request.metadata == CallMetadata("team", "exp", "run")
    assert (request.timeout_s, request.expect_fingerprint) == (12.5, "fp")
    holds(record_property, "S21", "v1 request decodes")


def test_golden_answer(record_property):
    frame = pb.ScoreFrame.FromString((GOLDEN / "v1_frame.bin").read_bytes())
    options = ScoreOptions(top_k=2, entropy=True, rank=True)
    request = ScoreRequest([Completion("b", ids(8, 9, 1))], options=options)
    question = wire.question(request, request.completions[0], fingerprint="fp", tokenizer_size=V)
    assert question.key == reference_key([8, 9, 1], [1, 2], (2, 0, 1.0, 6, 1, 1, 0), "fp")
    assert frame.checksum == hashlib.sha256(question.key + frame.rows).digest()[:16]
    scores = wire.Assembler(question).add(frame)
    assert scores.positions.tolist() == [1, 2]
    assert scores.token_logprob.tolist() == [-1.5, -0.25]
    assert scores.log_tail.tolist() == [-2.0, -10000.0]
    assert scores.topk_ids.tolist() == [[3, 39], [1, 0]]
    assert scores.topk_logprob.tolist() == [[-0.5, -1.0], [-0.25, -3.0]]
    assert scores.entropy.tolist() == [1.25, 0.5]
    assert scores.rank.tolist() == [3, 1]
    assert (scores.computed_tokens, scores.cached_tokens) == (3, 0)
    holds(record_property, "S21", "v1 answer decodes")


def test_golden_error(record_property):
    frame = pb.ScoreFrame.FromString((GOLDEN / "v1_error.bin").read_bytes())
    key = struct.pack("<I2sI1s", 2, b"fp", 1, b"b")
    key = hashlib.blake2b(key, digest_size=32, person=b"teacher.v1.error").digest()
    assert frame.checksum == hashlib.sha256(key + frame.rows).digest()[:16]
    request = ScoreRequest([Completion("b", ids(8, 9, 1))])
    question = wire.question(request, request.completions[0], fingerprint="fp", tokenizer_size=V)
    error = wire.Assembler(question).add(frame)
    assert isinstance(error, errors.Overloaded)
    assert (error.message, error.retry_after_s, error.request_id) == ("later", 2.5, "r1")
    holds(record_property, "S21", "v1 error decodes")


def test_key_with_candidates():
    request = a_request()
    question = wire.question(request, request.completions[0], fingerprint="fp", tokenizer_size=WIDTH)
    candidates = ([3, 4, 5], [0, 1, 1, 3])
    assert question.key == reference_key([1, 2, 5, 6, 7], [2, 3, 4], (4, 0, 1.0, 6, 1, 1, 0), "fp", candidates)


def test_key_of_hidden_states_in_another_type():
    """A line of the seal that is there only where it is used: older questions keep their keys."""

    def key(**options):
        request = ScoreRequest([Completion("b", ids(8, 9, 1))], options=ScoreOptions(top_k=2, **options))
        return wire.question(request, request.completions[0], fingerprint="fp", tokenizer_size=V).key

    plain = reference_key([8, 9, 1], [1, 2], (2, 0, 1.0, 6, 0, 0, 1), "fp")
    assert key(hidden=True) == key(hidden=True, hidden_type="float32") == plain
    rounded = reference_key([8, 9, 1], [1, 2], (2, 0, 1.0, 6, 0, 0, 1), "fp", after=struct.pack("<B", 5))
    assert key(hidden=True, hidden_type="bfloat16") == rounded


def test_hidden_states_go_as_bfloat16_when_asked():
    options = ScoreOptions(hidden=True, hidden_type="bfloat16")
    request = ScoreRequest([Completion("b", ids(8, 9, 1))], options=options)
    assert through_wire(request).request.options == options
    question = wire.question(request, request.completions[0], fingerprint="fp", tokenizer_size=V)
    zeros = np.zeros(2, np.float32)
    hidden = np.array([[1 + 2**-8, -(1 + 3 * 2**-8)], [1 / 3, 0.0]], np.float32)
    scores = Scores("b", question.positions, zeros, zeros, hidden=hidden)
    (frame,) = wire.encode_scores(scores, options=options, candidates=None, key=question.key)
    got = wire.Assembler(question).add(frame).hidden
    assert got.dtype == np.float32
    assert got.tolist() == [[1.0, -(1 + 2**-6)], [171 / 512, 0.0]]


def test_an_unknown_type_of_hidden_states_is_refused():
    message = wire.encode_request(ScoreRequest([Completion("b", ids(8, 9, 1))], options=ScoreOptions(hidden=True)))
    message.options.hidden_type = pb.DTYPE_FLOAT16
    with pytest.raises(errors.Unsupported, match="hidden_type"):
        wire.decode_request(message)
