"""What was used is counted by tenant, experiment and day, and is still there after a restart or a failed write."""

from __future__ import annotations

import asyncio
import re
import socket
import sqlite3
import sys
import threading

import numpy as np
import pytest

from teacher_api.client import TeacherClient
from teacher_api.errors import BackendFailed
from teacher_api.types import Scores
from teacher_api.usage import main, table
from teacher_server import usage as usage_module
from teacher_server.caller import Caller
from teacher_server.usage import MAX_EXPERIMENTS, OTHERS, Usage
from tests.serving import serving

ZEROS = np.zeros(1, np.float32)


def scores(computed: int, cached: int = 0) -> Scores:
    return Scores("x", np.ones(1, np.int32), ZEROS, ZEROS, computed_tokens=computed, cached_tokens=cached)


def test_counts_add_up_and_survive_a_restart(tmp_path):
    path = str(tmp_path / "usage.sqlite")
    for _ in range(2):
        counted = Usage(path)
        counted.served(Caller("a", "x"), scores(10, 5), 0.5)
        counted.served(Caller("a", "x"), BackendFailed("no"), 0.25)
        counted.cached(Caller("a", "y"), 7)
        counted.refused(Caller("b"), 100)
        counted.close()
    again = Usage(path)
    rows = {(row["tenant"], row["experiment"]): row for row in again.rows()}
    assert rows["a", "x"] | {} == {
        "tenant": "a", "experiment": "x", "sequences": 4, "computed_tokens": 20, "cached_tokens": 10,
        "refused_tokens": 0, "engine_s": pytest.approx(1.5),
    }  # fmt: skip
    assert rows["a", "y"]["cached_tokens"] == 14
    assert rows["b", ""]["refused_tokens"] == 200
    assert [row["tenant"] for row in again.rows(by="tenant")] == ["a", "b"]
    assert {row["tenant"] for row in again.rows(tenant="b")} == {"b"}


def test_nothing_is_lost_between_counting_and_writing():
    """Counted on the event loop, while threads write."""
    counted, over, before = Usage(), threading.Event(), sys.getswitchinterval()

    def write() -> None:
        while not over.is_set():
            counted.write()

    writing = threading.Thread(target=write)
    sys.setswitchinterval(1e-6)
    try:
        writing.start()
        for _ in range(50_000):
            counted.cached(Caller("a"), 1)
    finally:
        sys.setswitchinterval(before)
        over.set()
        writing.join()
    assert counted.rows(by="tenant")[0]["cached_tokens"] == 50_000


def test_days_are_told_apart(monkeypatch):
    counted = Usage()
    for day in ("2031-01-30", "2031-01-31", "2031-02-01"):
        monkeypatch.setattr(usage_module, "today", lambda day=day: day)
        counted.served(Caller("a", "x"), scores(10), 0.0)
    assert [row["day"] for row in counted.rows(by="day")] == ["2031-01-30", "2031-01-31", "2031-02-01"]
    assert counted.rows(since="2031-01-31")[0]["computed_tokens"] == 20
    with pytest.raises(ValueError, match="since"):
        counted.rows(since="31.1.2031")


def test_experiments_made_up_without_end_are_counted_together():
    counted = Usage()
    for n in range(MAX_EXPERIMENTS + 500):
        counted.served(Caller("a", f"made-up-{n}"), scores(1), 0.0)
    rows = counted.rows()
    assert len(rows) == MAX_EXPERIMENTS + 1
    assert next(row for row in rows if row["experiment"] == OTHERS)["computed_tokens"] == 500


def test_what_cannot_be_written_is_kept_and_written_later(tmp_path):
    path = str(tmp_path / "usage.sqlite")
    counted = Usage(path)
    other = sqlite3.connect(path)
    other.execute("BEGIN EXCLUSIVE")
    counted._database.execute("PRAGMA busy_timeout = 1")
    counted.served(Caller("a"), scores(10), 0.0)
    counted.write()
    other.rollback()
    counted.served(Caller("a"), scores(5), 0.0)
    assert counted.rows()[0]["computed_tokens"] == 15


def test_a_file_that_is_no_database_stops_the_start_with_one_line(tmp_path):
    path = tmp_path / "usage.sqlite"
    path.write_text("not a database, but long enough to be told from an empty one " * 20)
    with pytest.raises(ValueError, match="usage_file"):
        Usage(str(path))


def test_writing_ends_with_what_was_counted_last(tmp_path):
    path = str(tmp_path / "usage.sqlite")

    async def scenario() -> None:
        counted = Usage(path)
        keeping = asyncio.create_task(counted.keep())
        await asyncio.sleep(0)
        counted.served(Caller("a"), scores(3), 0.0)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)

    asyncio.run(scenario())
    assert Usage(path).rows()[0]["computed_tokens"] == 3


def test_the_table_is_for_reading():
    text = table([{"tenant": "a", "experiment": "", "sequences": 12345, "computed_tokens": 1, "engine_s": 2.04}])
    head, row = text.splitlines()
    assert head.split() == ["tenant", "experiment", "sequences", "computed", "engine", "s"]
    assert row.split() == ["a", "(none)", "12,345", "1", "2.0"]
    assert table([]) == "nothing was used"


@pytest.mark.slow
def test_the_command_asks_a_server(capsys):
    with serving() as server:
        assert main([server.http_url]) == 0
        assert capsys.readouterr().out == "nothing was used\n"
        assert main([server.http_url, "--since", "never"]) == 1
        assert "invalid_request: since" in capsys.readouterr().err
    assert main([server.http_url]) == 3
    assert main(["teacher:8300"]) == 1


@pytest.mark.parametrize("url", ["http://teacher:http", "http://teacher:80/a b"])
def test_the_command_refuses_what_is_no_url_in_one_line(url, capsys):
    assert main([url]) == 1
    assert re.fullmatch(r"teacher-usage: .*expected http://host:port.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [
        (b"", 3, "Remote end closed connection"),
        (
            b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\n",
            1,
            "answers no usage; expected the HTTP address of a teacher-serve",
        ),
    ],
    ids=["nothing", "what a port of gRPC sends"],
)
def test_the_command_says_in_one_line_that_what_is_there_is_no_teacher_over_http(sent, code, said, capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(sent)

        answering = threading.Thread(target=answer)
        answering.start()
        assert main([f"http://127.0.0.1:{listener.getsockname()[1]}"]) == code
        answering.join()
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_key_is_not_sent_on_to_where_a_server_redirects(capsys):
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        to = f"http://localhost:{second.getsockname()[1]}/v1/usage"

        def answer() -> None:
            redirect = f"HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            for listener, said in ((first, redirect), (second, "HTTP/1.1 200 OK\r\n\r\n{}")):
                connection, _ = listener.accept()
                with connection:
                    heard.append(connection.recv(1 << 16))
                    connection.sendall(said.encode())

        answering = threading.Thread(target=answer)
        answering.start()
        assert main([f"http://127.0.0.1:{first.getsockname()[1]}", "--api-key", "only-for-the-first"]) == 1
        answering.join()
    assert b"only-for-the-first" in heard[0]
    assert b"only-for-the-first" not in heard[1]
    assert "answers no usage" in capsys.readouterr().err


@pytest.mark.parametrize("scheme", ["grpc", "http", "usage"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(scheme, capsys):
    key = "pk_only-for-the-server\n"
    if scheme == "usage":
        assert main(["http://127.0.0.1:9", "--api-key", key]) == 1
        said = capsys.readouterr().err
    else:
        with pytest.raises(ValueError, match="api_key") as refused:
            TeacherClient(f"{scheme}://127.0.0.1:9", api_key=key)
        said = str(refused.value)
    assert "expected printable ASCII" in said
    assert "only-for" not in said
