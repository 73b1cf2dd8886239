"""`teacher-generate` against a real server: what it writes, that it goes on where it was stopped, and what it says when
it can't."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Server, ask_http, request_of, serving
from tinymodels import tiny_tokenizer

from teacher_api.errors import CorruptResponse, FingerprintMismatch
from teacher_api.generate import OK, UNREACHABLE, USAGE, WRONG, main
from teacher_api.generated_file import Output, read_prompts
from teacher_api.generation import Sampling, answer_of
from teacher_api.types import Scores

pytestmark = pytest.mark.slow

SIZE = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("names") / "tiny"
    tiny_tokenizer(SIZE).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def server(model: str) -> Iterator[Server]:
    with serving(generate=True, model=model, max_sequence_tokens=64) as running:
        yield running


def prompts_file(path: Path, num: int) -> Path:
    file = path / "prompts.jsonl"
    random = np.random.default_rng(0)
    lines = [{"prompt": random.integers(20, SIZE, 3 + n % 5).tolist(), "answer": n} for n in range(num)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def generate(url: str, prompts: Path, output: Path, *options: str) -> int:
    return main([f"--url={url}", f"--prompts={prompts}", f"--output={output}", *options])


def lines_of(output: Path) -> list[dict[str, Any]]:
    return sorted((json.loads(line) for line in output.read_text().splitlines()), key=lambda line: line["index"])


def test_every_prompt_is_written_with_ids_text_and_logprobs(server: Server, tmp_path: Path, capsys: Any):
    prompts, output = prompts_file(tmp_path, 9), tmp_path / "out.jsonl"
    assert generate(server.http_url, prompts, output, "--max-tokens=7", "--n=2", "--temperature=1.5") == OK
    lines = lines_of(output)
    assert [line["index"] for line in lines] == list(range(9))
    tokenizer = tiny_tokenizer(SIZE)
    for line, asked in zip(lines, map(json.loads, prompts.read_text().splitlines()), strict=True):
        assert line["prompt"] == line["prompt_token_ids"] == asked["prompt"]
        assert line["teacher"] == server.fingerprint
        assert line["settings"]["temperature"] == 1.5
        assert len(line["completions"]) == 2
        for one in line["completions"]:
            ended = one["finish_reason"] == "stop"
            assert len(one["token_ids"]) == 7 or ended
            shown = one["token_ids"][: len(one["token_ids"]) - ended]
            assert one["text"] == tokenizer.decode(shown, skip_special_tokens=True)
            whole = [*asked["prompt"], *one["token_ids"]]
            (scores,) = ask_http(server, request_of(whole), size=SIZE)
            assert isinstance(scores, Scores)
            np.testing.assert_allclose(one["logprobs"], scores.token_logprob[-len(one["token_ids"]) :], rtol=1e-6)
    said = capsys.readouterr().out
    assert "9 prompts written" in said
    assert "18 completions" in said


def test_texts_are_in_the_servers_tokenizer(server: Server, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("the quick fox\n\n  a lazy dog\n")
    output = tmp_path / "out.jsonl"
    assert generate(server.http_url, tmp_path / "prompts.txt", output, "--max-tokens=3") == OK
    texts = ["the quick fox", "  a lazy dog"]
    assert [line["prompt"] for line in lines_of(output)] == texts
    assert [line["prompt_token_ids"] for line in lines_of(output)] == tiny_tokenizer(SIZE)(texts)["input_ids"]


def test_the_same_command_goes_on_and_writes_what_one_run_would(server: Server, tmp_path: Path, capsys: Any):
    prompts, whole, parts = prompts_file(tmp_path, 12), tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    options = ("--max-tokens=5", "--n=3", "--seed=7")
    assert generate(server.http_url, prompts, whole, *options) == OK
    assert generate(server.http_url, prompts_file(tmp_path, 4), parts, *options) == OK
    with parts.open("ab") as file:  # killed within a line
        file.write(b'{"index": 4, "prompt": [5')
    capsys.readouterr()
    assert generate(server.http_url, prompts_file(tmp_path, 12), parts, *options) == OK
    assert "8 prompts written" in capsys.readouterr().out
    assert lines_of(parts) == lines_of(whole)
    before = parts.read_bytes()
    assert generate(server.http_url, prompts, parts, *options) == OK
    assert parts.read_bytes() == before
    drawn = [tuple(one["token_ids"]) for line in lines_of(whole) for one in line["completions"]]
    assert len(set(drawn)) == len(drawn)


def test_a_file_of_something_else_is_not_gone_on_with(server: Server, tmp_path: Path, capsys: Any):
    prompts, output = prompts_file(tmp_path, 3), tmp_path / "out.jsonl"
    assert generate(server.http_url, prompts, output, "--max-tokens=5") == OK
    before = output.read_bytes()
    assert generate(server.http_url, prompts, output, "--max-tokens=6") == USAGE
    assert "max_tokens 5" in capsys.readouterr().err
    other = tmp_path / "other.txt"
    other.write_text("another\nprompt\nfile\n")
    assert generate(server.http_url, other, output, "--max-tokens=5") == USAGE
    assert "another prompt" in capsys.readouterr().err
    with serving(generate=True, fake_vocabulary=300) as stranger:
        assert generate(stranger.http_url, prompts, output, "--max-tokens=5") == USAGE
        assert "by teacher" in capsys.readouterr().err
    assert output.read_bytes() == before
    output.write_bytes(b"{}\n")
    assert generate(server.http_url, prompts, output, "--max-tokens=5") == USAGE
    assert f"{output}:1" in capsys.readouterr().err


def test_a_prompt_that_is_refused_is_named_and_the_others_are_written(server: Server, tmp_path: Path, capsys: Any):
    prompts, output = tmp_path / "prompts.json", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps([[20, 21], [20] * 62, {"prompt": [25]}, [SIZE]]))
    assert generate(server.http_url, prompts, output, "--max-tokens=4") == WRONG
    said = capsys.readouterr()
    assert "prompt 1: " in said.err
    assert "prompt 3: " in said.err
    assert "2 refused" in said.out
    assert [line["index"] for line in lines_of(output)] == [0, 2]


@pytest.mark.parametrize(
    ("option", "status", "named"),
    [
        ("--max-tokens=5000", WRONG, "max_tokens"),
        ("--temperature=-1", WRONG, "temperature"),
        ("--top-p=0", WRONG, "top_p"),
        ("--stop-token-id=500", WRONG, "stop_token_ids"),
        ("--timeout-s=0", USAGE, "timeout_s"),
        ("--prompt-key=text", USAGE, "'text'"),
    ],
)
def test_what_is_wrong_with_the_options_ends_it(
    server: Server, tmp_path: Path, capsys: Any, option: str, status: int, named: str
):
    asked = ("--max-tokens=4", option)
    assert generate(server.http_url, prompts_file(tmp_path, 3), tmp_path / "out.jsonl", *asked) == status
    assert named in capsys.readouterr().err


def test_a_server_that_only_scores_is_told_apart(tmp_path: Path, capsys: Any):
    with serving() as scoring:
        assert generate(scoring.http_url, prompts_file(tmp_path, 1), tmp_path / "out.jsonl") == WRONG
    assert "--generate" in capsys.readouterr().err


def test_other_addresses_are_refused(tmp_path: Path, capsys: Any):
    prompts, output = prompts_file(tmp_path, 1), tmp_path / "out.jsonl"
    assert generate("grpc://127.0.0.1:8301", prompts, output) == USAGE
    assert "http://" in capsys.readouterr().err
    assert generate("http://127.0.0.1:9", prompts, output, "--timeout-s=0.5") == UNREACHABLE
    assert generate("http://127.0.0.1:9", tmp_path / "nothing.txt", output) == USAGE


@pytest.mark.parametrize("content", ["", "\n", "[1, 2", "{}", '{"prompt": ""}', '{"prompt": [1.5]}', "3"])
def test_a_file_that_holds_no_prompts_names_its_line(tmp_path: Path, content: str):
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"prompts\.jsonl"):
        read_prompts(file, "prompt")


def test_a_key_is_sent_from_the_environment(model: str, tmp_path: Path, monkeypatch: Any, capsys: Any):
    with serving(generate=True, model=model, api_keys=["a-secret-key"]) as running:
        prompts, output = prompts_file(tmp_path, 1), tmp_path / "out.jsonl"
        assert generate(running.http_url, prompts, output) == WRONG
        monkeypatch.setenv("TEACHER_API_KEY", "a-secret-key")
        assert generate(running.http_url, prompts, output, "--max-tokens=2") == OK
        for wrong in ("a-secret-key\n", "a-secret-key-\u00e9"):
            monkeypatch.setenv("TEACHER_API_KEY", wrong)
            assert generate(running.http_url, prompts, output, "--max-tokens=2") == USAGE
            assert "api_key" in (said := "".join(capsys.readouterr()))
            assert "a-secret-key" not in said
    assert "a-secret-key" not in "".join(capsys.readouterr())


def test_two_programs_do_not_write_to_one_file(server: Server, tmp_path: Path, capsys: Any):
    prompts, output = prompts_file(tmp_path, 2), tmp_path / "out.jsonl"
    with Output(output, read_prompts(prompts, "prompt"), Sampling(), "another"):
        assert generate(server.http_url, prompts, output) == USAGE
        assert "another program" in capsys.readouterr().err
    assert generate(server.http_url, prompts, output, "--max-tokens=2") == OK


# --- a server that dies ---------------------------------------------------------------------------------------------


def started(tmp_path: Path, port: int) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    announced = tmp_path / f"announced-{time.monotonic_ns()}.json"
    command = [sys.executable, "-m", "teacher_server", "--model=fake", "--backend=fake", "--generate=true"]
    ports = [f"--http-port={port}", "--grpc-port=0", "--fake-latency-s=0.01", f"--announce-file={announced}"]
    child = subprocess.Popen([*command, *ports], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    deadline = time.monotonic() + 120
    while not announced.exists():
        assert child.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.05)
    return child, json.loads(announced.read_text())


@pytest.mark.slow
def test_a_server_killed_in_the_middle_costs_no_prompt(tmp_path: Path):
    prompts, output = prompts_file(tmp_path, 30), tmp_path / "out.jsonl"
    options = ("--max-tokens=20", "--ignore-eos", "--seed=1", "--concurrency=4")
    child, first = started(tmp_path, 0)
    port = int(first["http_url"].rsplit(":", 1)[1])
    statuses: list[int] = []
    try:
        run = threading.Thread(
            target=lambda: statuses.append(generate(first["http_url"], prompts, output, *options, "--timeout-s=120"))
        )
        run.start()
        deadline = time.monotonic() + 60
        while not output.exists() or output.read_bytes().count(b"\n") < 4:
            assert time.monotonic() < deadline, "nothing was written"
        child.send_signal(signal.SIGKILL)
        child.wait(30)
        child, _ = started(tmp_path, port)
        run.join(120)
        assert statuses == [OK]
    finally:
        child.kill()
        child.wait(30)
    lines = lines_of(output)
    assert [line["index"] for line in lines] == list(range(30))
    with serving(generate=True) as other:
        assert other.fingerprint == first["fingerprint"]
        assert generate(other.http_url, prompts, tmp_path / "again.jsonl", *options) == OK
    assert lines == lines_of(tmp_path / "again.jsonl")


# --- answers that are not what was asked for ------------------------------------------------------------------------


def an_answer() -> dict[str, Any]:
    choice = {"index": 0, "text": "x", "token_ids": [5, 6], "prompt_token_ids": [3], "finish_reason": "length"}
    logprobs = {"token_logprobs": [-1.0, -2.0]}
    return {"system_fingerprint": "f", "choices": [{**choice, "stop_reason": None, "logprobs": logprobs}]}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("choices",), []),
        (("choices",), None),
        (("choices", 0, "index"), 1),
        (("choices", 0, "token_ids"), [5]),
        (("choices", 0, "token_ids"), [5, -1]),
        (("choices", 0, "token_ids"), [5, 6, 7]),
        (("choices", 0, "prompt_token_ids"), None),
        (("choices", 0, "logprobs"), None),
        (("choices", 0, "logprobs", "token_logprobs"), [-1.0, None]),
        (("choices", 0, "logprobs", "token_logprobs"), [-1.0, float("nan")]),
        (("choices", 0, "finish_reason"), None),
        (("choices", 0, "text"), None),
    ],
)
def test_an_answer_that_is_not_whole_is_not_taken(path: tuple[Any, ...], value: Any):
    whole = an_answer()
    assert answer_of(whole, Sampling(max_tokens=2), "f").completions[0].token_ids == [5, 6]
    place: Any = whole
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(CorruptResponse):
        answer_of(whole, Sampling(max_tokens=2), "f")


def test_an_answer_of_another_teacher_is_not_taken():
    with pytest.raises(FingerprintMismatch):
        answer_of(an_answer(), Sampling(max_tokens=2), "g")
