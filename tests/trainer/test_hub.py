"""An export goes to the hub as it is on disk, in one commit; offline nothing is sent. The hub is a stand-in that speaks
its HTTP on this machine; the client is the real one.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from student_trainer import hub
from student_trainer.checkpoint import CheckpointConfig

pytestmark = pytest.mark.slow

FILES = {
    "README.md": b"---\nlibrary_name: transformers\n---\n# s\n",
    "config.json": b"{}",
    "model.safetensors": b"\0\1\2",
}


class Hub(ThreadingHTTPServer):
    """Keeps what it was told; answers `refusal` to everything while that is set."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[tuple[str, str]] = []
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refusal = 0


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self._answer({"id": "me/student", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        server = self.server
        server.asked.append((self.command, self.path))
        server.tokens.add(self.headers["authorization"])
        if server.refusal:
            self._answer({"error": "you may not"}, server.refusal)
        elif self.path == "/api/repos/create":
            server.created.append(json.loads(body))
            self._answer({"url": f"{server.url}/me/student", "name": "me/student"})
        elif self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = {"success": True, "commitOid": "a" * 40, "commitUrl": f"{server.url}/me/student/commit/{'a' * 40}"}
            self._answer(commit)
        else:
            self._answer({"errors": [], "warnings": []})

    def _answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("private", [True, False])
def test_a_student_arrives_as_it_is_on_disk(private: bool, served: Hub, export: Path) -> None:
    config = CheckpointConfig(push_to_hub="me/student", hub_private=private)
    hub.check(config)
    assert hub.push(export, config) == f"{served.url}/me/student"
    assert served.files == FILES
    assert [(repo["name"], repo["organization"], repo["visibility"]) for repo in served.created] == [
        ("student", "me", "private" if private else "public")
    ]
    assert [path for _, path in served.asked].count("/api/models/me/student/commit/main") == 1
    assert served.tokens == {"Bearer hf_secret"}


@pytest.mark.parametrize("status", [401, 403, 400])
def test_a_refusal_says_where_the_student_is(status: int, served: Hub, export: Path) -> None:
    served.refusal = status
    with pytest.raises(hub.PushError, match=rf"me/student could not be written: .*the student is in {export}"):
        hub.push(export, CheckpointConfig(push_to_hub="me/student"))
    assert served.files == {}


def test_a_hub_that_is_not_there_is_one_line(export: Path, served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(hub.PushError, match="run the same command again") as raised:
        hub.push(export, CheckpointConfig(push_to_hub="me/student"))
    assert "\n" not in str(raised.value)


def test_offline_it_is_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.check(CheckpointConfig())
    with pytest.raises(ValueError, match=r"checkpoint\.push_to_hub: got me/student in offline mode"):
        hub.check(CheckpointConfig(push_to_hub="me/student"))


def test_names_that_no_repository_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("a/b/c", "me/-x", "https://somewhere/me"):
        with pytest.raises(ValueError, match="expected user/name"):
            hub.check(CheckpointConfig(push_to_hub=name))
    with pytest.raises(ValueError, match="hub_private: got false without push_to_hub"):
        CheckpointConfig(hub_private=False)
