"""A stream of a thousand sequences: both sides hold a bounded number of them, whatever the client does, and the memory
of neither grows with the length of the stream."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest
from serving import Server, assembled, channel, serving

from teacher_api import wire
from teacher_api.types import Completion, ScoreOptions, ScoreRequest, Scores
from teacher_api.v1 import teacher_pb2 as pb
from teacher_server.stream import StreamSession

pytestmark = pytest.mark.slow

SEQUENCES, TOKENS, WINDOW = 1000, 101, 8
VOCABULARY = 512
OPTIONS = ScoreOptions(top_k="all")
ANSWER_BYTES = (TOKENS - 1) * VOCABULARY * 4  # 200 KiB each: 200 MiB over the whole stream
MIB = 1 << 20


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[StreamSession]:
    made: list[StreamSession] = []
    original = StreamSession.__init__

    def noted(self: StreamSession, *args: Any) -> None:
        original(self, *args)
        made.append(self)

    monkeypatch.setattr(StreamSession, "__init__", noted)
    return made


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(fake_vocabulary=VOCABULARY, stream_sequences=WINDOW, batch_sequences=4) as running:
        yield running


def one(number: int) -> ScoreRequest:
    tokens = np.random.default_rng(number).integers(0, VOCABULARY, TOKENS).astype(np.int32)
    return ScoreRequest([Completion(f"s{number}", tokens)], options=OPTIONS)


@pytest.mark.slow
def test_a_thousand_sequences_need_bounded_memory_on_both_sides(server: Server, sessions: list[StreamSession]):
    process = psutil.Process()  # client and server live in this process: the bound holds for their sum
    sent = received = most_ahead = 0
    baseline, peak = 0, 0

    def requests() -> Iterator[bytes]:
        nonlocal sent
        for number in range(SEQUENCES):
            sent += 1
            yield wire.encode_request(one(number)).SerializeToString()

    with channel(server) as opened:
        method = opened.stream_stream("/teacher.v1.TeacherService/ScoreStream")
        for data in method(requests(), timeout=300):
            frame = pb.ScoreFrame.FromString(data)
            request = one(int(frame.completion_id[1:]))
            answer = assembled(request, frame.completion_id, [frame], server.fingerprint, VOCABULARY)
            assert isinstance(answer, Scores)
            assert answer.topk_logprob is not None
            assert answer.topk_logprob.nbytes == ANSWER_BYTES
            received += 1
            most_ahead = max(most_ahead, sent - received)
            if received == 100:
                gc.collect()
                baseline = process.memory_info().rss
            elif received > 100 and received % 50 == 0:
                peak = max(peak, process.memory_info().rss)
    assert received == SEQUENCES
    assert sessions[0].most_in_work <= WINDOW
    assert sessions[0].in_work == 0
    # 900 answers of 200 KiB went through after the baseline: 176 MiB if anybody kept them.
    assert peak - baseline < 64 * MIB, f"grew by {(peak - baseline) / MIB:.0f} MiB"


@pytest.mark.slow
def test_a_client_that_does_not_read_stops_the_server_from_reading(server: Server, sessions: list[StreamSession]):
    taken = threading.Semaphore(0)
    count = 0

    def requests() -> Iterator[bytes]:
        nonlocal count
        for number in range(SEQUENCES):
            count += 1
            taken.release()
            yield wire.encode_request(one(number)).SerializeToString()

    with channel(server) as opened:
        frames = opened.stream_stream("/teacher.v1.TeacherService/ScoreStream")(requests(), timeout=300)
        next(frames)
        settled, last = time.monotonic(), -1
        while time.monotonic() - settled < 1.0:  # until no more is taken for a second
            scored = len(server.backend.scored_ids)
            if scored != last:
                settled, last = time.monotonic(), scored
            time.sleep(0.05)
        in_flight_bytes = last * ANSWER_BYTES
        assert sessions[0].most_in_work <= WINDOW
        # Beyond the window only what the two ends' transport buffers hold can have been scored.
        assert in_flight_bytes < 40 * MIB, f"{last} sequences were scored for a client that read one"
        assert last < SEQUENCES / 2
        rest = sum(1 for _ in frames)
        assert rest == SEQUENCES - 1
