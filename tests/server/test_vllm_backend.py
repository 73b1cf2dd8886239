"""The prompt-logprobs path over a real engine, against a float64 transformers forward of the same float32 checkpoint;
and the engine's life in the server, whatever the path."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from reliability import holds
from transformers import AutoModelForCausalLM
from vllm_jobs import answer, check, checkpoint_for_vllm, job, log_p, ragged, random_tokens, score

from teacher_api import wire
from teacher_api.client import TeacherClient
from teacher_api.errors import BackendFailed, TeacherError
from teacher_api.types import Completion, ScoreOptions, ScoreRequest, Scores
from teacher_api.v1 import teacher_pb2 as pb
from teacher_server.backends.base import ScoreJob, ScoringBackend

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    # vLLM and what it starts, not ours
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::pytest.PytestWarning"),
]

VOCABULARY, WIDTH, POSITIONS = 120, 128, 96
CHUNK = 40  # tokens of a prefill: longer sequences come in pieces
PORTS = ["--http-port=0", "--grpc-port=0"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vllm") / "teacher"
    return checkpoint_for_vllm(path, num_key_value_heads=1, max_position_embeddings=POSITIONS)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64).eval()


def engine(checkpoint: Path, **settings: object) -> ScoringBackend:
    from teacher_server.backends.vllm_backend import VllmBackend

    arguments = {"max_num_batched_tokens": CHUNK, "max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 27}
    return VllmBackend(str(checkpoint), scoring_path="prompt-logprobs", engine_args=arguments, **settings)  # type: ignore[arg-type]


def test_a_hub_token_is_no_engine_argument() -> None:
    from teacher_server.backends.vllm_backend import VllmBackend

    with pytest.raises(ValueError, match="HF_TOKEN") as refused:
        VllmBackend("m", engine_args={"hf_token": "hf_secret"})._check_arguments({"hf_token"})
    assert "hf_secret" not in str(refused.value)


@pytest.fixture(scope="module")
def full_rows(checkpoint: Path) -> Iterator[ScoringBackend]:
    backend = engine(checkpoint)
    backend.load()
    yield backend
    asyncio.run(backend.close())


def test_says_what_it_is(full_rows: ScoringBackend, checkpoint: Path) -> None:
    facts = full_rows._facts  # type: ignore[attr-defined]
    assert (facts.tokenizer_size, facts.logit_width, facts.max_sequence_tokens) == (VOCABULARY, WIDTH, POSITIONS)
    assert (facts.dtype, facts.hidden_size, facts.engine) == ("float32", 32, "vllm")
    assert facts.scoring_path.startswith("prompt-logprobs full-row")
    assert {"candidates", "temperature", "full_vocabulary", "entropy", "rank", "exact_tail"} <= full_rows.features
    assert "hidden" not in full_rows.features
    policy = full_rows.policy
    assert policy.max_sequences == 1
    assert policy.max_concurrent_batches > 1


def test_waits_asleep(full_rows: ScoringBackend) -> None:
    """vLLM by itself polls for a second after each message, in the engine's core and in its worker."""
    score(full_rows, job(random_tokens(0, 8, VOCABULARY)))
    family = [each for each in psutil.Process().children(recursive=True) if each.is_running()]

    def used_s() -> float:
        return sum(sum(each.cpu_times()[:2]) for each in family if each.is_running())

    before = used_s()
    time.sleep(0.8)
    assert used_s() - before < 0.2


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_lengths_from_2_to_the_longest_at_once(
    full_rows: ScoringBackend, reference: torch.nn.Module, temperature: float
) -> None:
    lengths = [2, 3, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 2, 2 * CHUNK + 1, POSITIONS - 1, POSITIONS]
    ks = [0, 1, 16, VOCABULARY, "all", 4, 64, 16, 5]
    jobs = []
    for seed, (length, k) in enumerate(zip(lengths, ks, strict=True)):
        jobs.append(
            job(
                random_tokens(seed, length, VOCABULARY),
                top_k=k,
                temperature=temperature,
                entropy=True,
                rank=True,
                candidates=ragged(100, length - 1, VOCABULARY),
            )
        )
    for asked, scores in zip(jobs, score(full_rows, *jobs), strict=True):
        check(asked, scores, log_p(reference, asked), VOCABULARY)


def test_ranges_with_holes(full_rows: ScoringBackend, reference: torch.nn.Module) -> None:
    asked = job(random_tokens(7, 80, VOCABULARY), positions=[1, 2, 39, 40, 41, 60], top_k=3)
    (scores,) = score(full_rows, asked)
    check(asked, scores, log_p(reference, asked), VOCABULARY)


def test_many_at_once_are_not_mixed_up(full_rows: ScoringBackend, reference: torch.nn.Module) -> None:
    jobs = [job(random_tokens(seed, 5 + seed % 50, VOCABULARY), top_k=2) for seed in range(60)]
    for asked, scores in zip(jobs, score(full_rows, *jobs), strict=True):
        check(asked, scores, log_p(reference, asked), VOCABULARY)


def test_too_long_a_sequence_fails_alone(full_rows: ScoringBackend) -> None:
    good, long = job(random_tokens(1, 10, VOCABULARY)), job(random_tokens(2, POSITIONS + 1, VOCABULARY))
    results = asyncio.run(full_rows.score([good, long]))
    assert isinstance(results[0], Scores)
    assert isinstance(results[1], TeacherError)
    assert not results[1].retryable


def test_a_cancelled_call_leaves_the_engine_usable(full_rows: ScoringBackend, reference: torch.nn.Module) -> None:
    async def cancelled() -> None:
        work = asyncio.gather(*(full_rows.score([job(random_tokens(n, POSITIONS, VOCABULARY))]) for n in range(30)))
        await asyncio.sleep(0)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(cancelled())
    asked = job(random_tokens(3, 12, VOCABULARY))
    (scores,) = score(full_rows, asked)
    check(asked, scores, log_p(reference, asked), VOCABULARY)


def test_top_k_path_then_the_engine_is_killed_and_revived(checkpoint: Path, reference: torch.nn.Module) -> None:
    others = set(psutil.Process().children(recursive=True))  # the module's own engine is one
    backend = engine(checkpoint, full_row_limit=0, max_top_k=64, max_sequence_tokens=60)
    facts = backend.load()
    try:
        assert facts.scoring_path.startswith("prompt-logprobs top-k")
        assert facts.max_sequence_tokens == 60
        assert backend.features == {"top_k", "float16"}
        jobs = [job(random_tokens(n, 2 + n, VOCABULARY), top_k=k) for n, k in enumerate([0, 1, 4, 16, 64, 64])]
        jobs.append(job(random_tokens(9, 60, VOCABULARY), top_k=16))
        jobs.append(replace(jobs[-1], options=ScoreOptions(top_k=16, value_type="float16")))
        results = score(backend, *jobs)
        for asked, scores in zip(jobs[:-1], results[:-1], strict=True):
            # The tail is 1 minus the rest: exact to some 1e-6 of mass, and here no tail is below 1e-3.
            check(asked, scores, log_p(reference, asked), VOCABULARY, tail_tolerance=2e-3)
        assert results[-1].topk_logprob is not None
        assert results[-1].topk_logprob.dtype == np.float16
        np.testing.assert_allclose(results[-1].topk_logprob, results[-2].topk_logprob, rtol=2**-11)
        assert backend.is_up()
        _kill_the_engine(backend)
        with pytest.raises(BackendFailed, match="engine") as failure:
            asyncio.run(asyncio.wait_for(backend.score([jobs[3]]), 60))
        assert failure.value.retryable
        assert not backend.is_up()
        (again,) = asyncio.run(_until_revived(backend, jobs[3]))
        assert backend.is_up()
        assert again.topk_ids is not None
        np.testing.assert_array_equal(again.topk_ids, results[3].topk_ids)
    finally:
        mine = [p for p in psutil.Process().children(recursive=True) if p not in others and _is_engine(p)]
        asyncio.run(asyncio.wait_for(backend.close(), 60))
    assert mine
    _, alive = psutil.wait_procs(mine, timeout=30)
    assert not alive


async def _until_revived(backend: ScoringBackend, asked: ScoreJob) -> list[Scores]:
    async with asyncio.timeout(300):
        while True:
            try:
                return [answer(result) for result in await backend.score([asked])]
            except BackendFailed:
                await asyncio.sleep(0.2)


def _is_engine(process: psutil.Process) -> bool:
    try:
        return "VLLM" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def _kill_the_engine(backend: ScoringBackend) -> None:
    (process,) = backend._host._engine.engine_core.resources.engine_manager.processes  # type: ignore[attr-defined]
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)


def test_an_engine_that_is_stopped_or_killed_and_a_killed_server_that_leaves_none_behind(
    checkpoint: Path, reference: torch.nn.Module, tmp_path: Path, record_property: Any
) -> None:
    announced = tmp_path / "ready.json"
    engines: list[psutil.Process] = []
    started = time.monotonic()
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "teacher_server",
            f"--model={checkpoint}",
            "--backend=vllm",
            *PORTS,
            f"--announce-file={announced}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "stderr.log").open("wb"),
        env={name: value for name, value in os.environ.items() if not name.startswith("VLLM_LOGGING_")},
    )
    try:
        while not announced.exists():
            assert server.poll() is None, "the server ended"
            assert time.monotonic() - started < 400
            time.sleep(0.2)
        engines = [child for child in psutil.Process(server.pid).children(recursive=True) if _is_engine(child)]
        assert engines
        asked = job(random_tokens(4, 50, VOCABULARY), top_k=8)
        with TeacherClient(json.loads(announced.read_text())["grpc_url"]) as client:
            assert client.info().engine == "vllm"
            completion = Completion(id="a", token_ids=asked.token_ids)
            (scores,) = client.score(ScoreRequest([completion], options=asked.options))
        check(asked, scores, log_p(reference, asked), VOCABULARY)
        load_s = time.monotonic() - started
        with httpx.Client(base_url=json.loads(announced.read_text())["http_url"], timeout=60) as http:
            _stopped(http, engines, record_property)
            _killed(http, engines, asked, load_s, record_property)
        engines = [child for child in psutil.Process(server.pid).children(recursive=True) if _is_engine(child)]
        assert engines
    finally:
        server.kill()
        server.wait()
    _, alive = psutil.wait_procs(engines, timeout=30)
    assert not alive
    _logs_are_objects(tmp_path / "stderr.log")


def _logs_are_objects(path: Path) -> None:
    """What was logged by the server and by each of vLLM's processes, before and after the engine died."""
    lines = path.read_text().splitlines()
    said = [json.loads(line) for line in lines if line.startswith("{")]
    assert {"EngineCore", "MainProcess"} <= {line.get("vllm_process_name") for line in said}
    assert any("engine died" in line["event"] for line in said)
    assert all(line["logger"] and line["level"] and line["timestamp"] for line in said)
    rest = "\n".join(line for line in lines if not line.startswith("{"))
    assert not re.search(r"\b(WARNING|ERROR|INFO) \d\d-\d\d ", rest), "a line in vLLM's own form"
    assert "it/s]" not in rest, "a progress bar"


def _until(condition: Callable[[], bool], limit_s: float) -> float:
    """Seconds until `condition` holds."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit_s
        time.sleep(0.1)  # the engine that starts meanwhile needs the processors
    return time.monotonic() - started


def _is_ready(http: httpx.Client) -> bool:
    return http.get("/readyz").status_code == 200


def _stopped(http: httpx.Client, engines: list[psutil.Process], record_property: Any) -> None:
    """S2: vLLM's own health takes a stopped engine for a sound one."""
    for engine in engines:
        engine.suspend()  # SIGSTOP
    try:
        noticed_s = _until(lambda: not _is_ready(http), 10)
        assert "stopped" in http.get("/readyz").json()["status"]
        assert http.get("/livez").status_code == 200
    finally:
        for engine in engines:
            engine.resume()
    _until(lambda: _is_ready(http), 10)
    holds(record_property, "S2", f"vLLM's engine stopped by SIGSTOP: readyz 503 after {noticed_s:.1f} s, and back")


def _killed(
    http: httpx.Client, engines: list[psutil.Process], asked: ScoreJob, load_s: float, record_property: Any
) -> None:
    """S3. The engine is stopped first, so that the call is in flight when it dies."""
    headers = {"content-type": "application/x-protobuf"}

    def body(shift: int) -> bytes:
        """Of sequences that no cache has."""
        completion = Completion(id="a", token_ids=(asked.token_ids + np.int32(shift)) % np.int32(VOCABULARY))
        return wire.encode_request(ScoreRequest([completion], options=asked.options)).SerializeToString()

    with ThreadPoolExecutor(1) as pool:
        for engine in engines:
            engine.suspend()
        inflight = pool.submit(http.post, "/v1/score", content=body(1), headers=headers)
        _until(lambda: not _is_ready(http), 10)
        time.sleep(0.5)  # for the call to be with the engine, of which nothing is seen from outside
        killed = time.monotonic()
        for engine in engines:
            engine.kill()
        answer = inflight.result(60)
        failed_s = time.monotonic() - killed
    (frame,) = pb.ScoreResponse.FromString(answer.content).frames
    error = pb.ScoreRows.FromString(frame.rows).error
    assert (error.kind, error.retryable) == ("backend_failed", True)
    assert failed_s <= 2
    back_s = failed_s + _until(lambda: _is_ready(http), 10 + load_s)
    assert back_s <= 10 + load_s
    again = http.post("/v1/score", content=body(2), headers=headers)
    assert not pb.ScoreRows.FromString(pb.ScoreResponse.FromString(again.content).frames[0].rows).HasField("error")
    holds(
        record_property,
        "S3",
        f"vLLM's engine killed: the call in flight failed as retryable after {failed_s:.2f} s; ready again after "
        f"{back_s:.1f} s (a whole start of the server takes {load_s:.1f} s)",
    )
