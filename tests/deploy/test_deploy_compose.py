"""compose.yaml and what it mounts: both Compose programs take it, every option it sets is one that the programs have,
and nothing is open or writable that need not be.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from deployed import DEPLOY, FORMS, V1, V2, compose, documented, is_v1, seconds, server_config, without_nulls
from imagebuild import ROOT, environment_of, exec_form, setting, stages_of

from student_trainer.config import TrainConfig
from teacher_api import settings
from teacher_server.app import CLOSE_S
from teacher_server.config import ServerConfig
from teacher_server.front import Front
from teacher_server.lifecycle import Lifecycle
from teacher_server.tenants import read_tenants

pytestmark = pytest.mark.slow

TEACHER_IMAGES, STUDENT_IMAGE = (
    stages_of(DEPLOY / "teacher.Dockerfile"),
    stages_of(DEPLOY / "student.Dockerfile"),
)
SECRETS = DEPLOY / "secrets"


@pytest.fixture(scope="module", params=list(FORMS))
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def services(form: str) -> dict[str, Any]:
    return dict(compose(form)["services"])


def configured(form: str, services: dict[str, Any]) -> ServerConfig:
    environment = environment_of(TEACHER_IMAGES, form) | without_nulls(services["teacher"]["environment"])
    return server_config(environment, SECRETS / "teacher.none.yaml")


@pytest.mark.skipif(not is_v1(), reason="Debian's docker-compose (1.29) is not installed")
def test_both_generations_of_compose_read_the_same(form: str) -> None:
    first, second = compose(form, V1)["services"], compose(form, V2)["services"]
    assert first.keys() == second.keys()
    for name, service in first.items():
        other = second[name]
        assert service.get("environment") == other.get("environment"), name
        for key in ("image", "read_only", "runtime", "restart", "cap_drop", "security_opt", "tmpfs", "command"):
            assert service.get(key) == other.get(key), (name, key)
        assert [secret["source"] for secret in service.get("secrets", [])] == [
            secret["source"] for secret in other.get("secrets", [])
        ]
        assert service.get("healthcheck", {}).get("test") == other.get("healthcheck", {}).get("test")
        if "stop_grace_period" in service:
            assert seconds(service["stop_grace_period"]) == seconds(other["stop_grace_period"])
        mounts = {tuple(volume.rsplit(":", 2)[1:]) for volume in service.get("volumes", [])}
        assert mounts == {(v["target"], "ro" if v.get("read_only") else "rw") for v in other.get("volumes", [])}


def test_forms_differ_in_what_needs_a_gpu(form: str, services: dict[str, Any]) -> None:
    teacher = services["teacher"]
    assert set(services) == {"teacher", "student", "prometheus", "grafana"}
    assert teacher["runtime"] == services["student"]["runtime"] == {"gpu": "nvidia", "cpu": "runc"}[form]
    assert teacher["build"]["target"] == form
    assert teacher["image"] == f"preceptor-teacher:{form}"
    assert configured(form, services).backend == {"gpu": "vllm", "cpu": "torch"}[form]
    assert compose(form)["name"] == "preceptor"


def test_up_teacher_starts_the_teacher_alone(services: dict[str, Any]) -> None:
    assert "depends_on" not in services["teacher"]
    assert services["student"]["profiles"] == ["student"]
    assert services["student"]["depends_on"]["teacher"]["condition"] == "service_healthy"


def test_every_option_is_one_that_teacher_serve_has(form: str, services: dict[str, Any]) -> None:
    config = configured(form, services)  # an unknown name or a wrong value raises
    assert config.model == {"gpu": "Qwen/Qwen3-8B", "cpu": "Qwen/Qwen3-0.6B"}[form]
    assert (config.host, config.metrics_host) == ("0.0.0.0", "0.0.0.0")
    settable = compose(form, TEACHER_MAX_SEQUENCE_TOKENS="4096", TEACHER_DTYPE="bfloat16", TEACHER_MODEL_NAME="judge")
    passed = configured(form, settable["services"])
    assert (passed.max_sequence_tokens, passed.dtype, passed.model_name) == (4096, "bfloat16", "judge")
    with pytest.raises(settings.SettingsError, match="max_sequence_tokens"):
        server_config({**services["teacher"]["environment"], "TEACHER_MAX_SEQUENCE_TOKENS": "many"}, Path("/dev/null"))


def test_variables_called_like_options_are_options() -> None:
    text = (
        (ROOT / ".env").read_text() + (DEPLOY / "compose.yaml").read_text() + (DEPLOY / "compose.cpu.yaml").read_text()
    )
    names = set(re.findall(r"\b(TEACHER_\w+)", text)) - {"TEACHER_CONFIG"}
    assert names
    assert {name.removeprefix("TEACHER_").lower().split("__")[0] for name in names} <= ServerConfig.model_fields.keys()


def test_every_option_is_one_that_student_train_has(services: dict[str, Any]) -> None:
    environ = without_nulls(services["student"]["environment"])
    environ["STUDENT_CONFIG"] = str(SECRETS / "student.none.yaml")
    config, _ = settings.load(
        TrainConfig,
        ["student.model=some/model", "data.source=/data/prompts.jsonl"],
        prog="student-train",
        description="",
        env_prefix="STUDENT_",
        environ=environ,
    )
    (url,) = map(urlsplit, config.teacher.url)
    assert url.scheme == "grpc"
    assert url.hostname in services
    assert Path(config.train.output_dir).parts[:2] == ("/", "runs")


def test_ports_are_those_the_server_listens_on(form: str, services: dict[str, Any]) -> None:
    config = configured(form, services)
    published = services["teacher"]["ports"]
    assert {port["target"] for port in published} == {config.http_port, config.grpc_port}
    exposed = {int(port) for port in setting(TEACHER_IMAGES, form, "EXPOSE").split()}
    assert exposed == {config.http_port, config.grpc_port, config.probe_port, config.metrics_port}


def test_published_on_loopback_unless_told_otherwise(form: str) -> None:
    def addresses(**variables: str) -> set[str]:
        services = compose(form, **variables)["services"].values()
        return {port["host_ip"] for service in services for port in service.get("ports", [])}

    assert addresses() == {"127.0.0.1"}
    assert addresses(PUBLISH_ADDRESS="0.0.0.0") == {"127.0.0.1", "0.0.0.0"}  # Prometheus and Grafana stay


def test_stop_grace_covers_the_drain(form: str, services: dict[str, Any]) -> None:
    config = configured(form, services)
    longest = config.lame_duck_s + config.grace_s + CLOSE_S
    assert longest < seconds(services["teacher"]["stop_grace_period"]) <= longest + 10


def test_health_check_asks_a_probe_of_the_server(form: str, services: dict[str, Any]) -> None:
    health = services["teacher"]["healthcheck"]
    in_image = setting(TEACHER_IMAGES, form, "HEALTHCHECK")
    assert exec_form(in_image.split("CMD", 1)[1].strip()) == health["test"][1:]
    url = urlsplit(re.findall(r"http://[^']+", health["test"][-1])[0])
    assert url.port == configured(form, services).probe_port  # without TLS and key, whatever callers need
    front = Front(Lifecycle(stall_s=1.0, high_water=0.5))
    assert url.path == "/readyz"
    assert status(front, url.path) == 503  # starting: a probe, answered before there is an application
    assert seconds(health["start_period"]) >= ServerConfig(model="m", backend="vllm").engine_start_timeout_s


def status(front: Front, path: str) -> int:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(front({"path": path, "type": "http"}, None, send))
    return int(sent[0]["status"])


def test_containers_can_write_to_volumes_and_tmpfs_alone(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "cap_add", "network_mode", "pid", "devices"} & service.keys(), name
        for volume in service["volumes"]:
            assert volume["type"] == "volume" or volume["read_only"], (name, volume)
    for stages in (TEACHER_IMAGES, STUDENT_IMAGE):
        for stage in set(stages) & {"cpu", "gpu", "student"}:
            assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", setting(stages, stage, "USER"))


def test_volumes_are_where_the_programs_write(form: str, services: dict[str, Any]) -> None:
    for stages, stage, name in ((TEACHER_IMAGES, form, "teacher"), (STUDENT_IMAGE, "student", "student")):
        targets = {volume["target"] for volume in services[name]["volumes"] if volume["type"] == "volume"}
        assert targets == set(setting(stages, stage, "VOLUME").split())
        image = environment_of(stages, stage)
        for variable in {"HF_HOME", "NUMBA_CACHE_DIR"} & image.keys():
            assert Path(image[variable]).parts[:2] == ("/", "cache")


def test_secrets_are_files_and_the_ones_shipped_hold_no_key(form: str, services: dict[str, Any]) -> None:
    whole = compose(form)
    for name, service in services.items():
        for secret in service.get("secrets", []):
            target = secret["target"]
            assert target in service["environment"].values(), f"{name} reads {target}"
            file = Path(whole["secrets"][secret["source"]]["file"])
            assert file.parent == SECRETS
            assert file.is_file()
    assert yaml.safe_load((SECRETS / "teacher.none.yaml").read_text()) == {"anonymous": True}
    assert yaml.safe_load((SECRETS / "student.none.yaml").read_text()) is None
    text = (DEPLOY / "compose.yaml").read_text()
    assert not re.search(r"KEY|PASSWORD:", text), "no key or password in the environment"


def test_secrets_as_documented_are_understood(form: str, services: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "teacher.yaml"
    file.write_text(documented("teacher.yaml", "yaml"))
    environment = environment_of(TEACHER_IMAGES, form) | without_nulls(services["teacher"]["environment"])
    keys = {key.get_secret_value() for key in server_config(environment, file).api_keys}
    assert len(keys) == 2
    file.write_text(documented("teacher.yaml for several teams", "yaml"))
    tenants = server_config(environment, file).tenants
    assert tenants["platform"].admin
    assert read_tenants(file) == tenants, "it can also be the tenants_file"
    config, _ = settings.load(
        TrainConfig,
        [f"--config={_written(tmp_path / 'student.yaml', documented('student.yaml', 'yaml'))}"],
        prog="student-train",
        description="",
        env_prefix="STUDENT_",
        environ={
            "STUDENT_TEACHER__URL": "grpc://teacher:8301",
            "STUDENT_STUDENT__MODEL": "m",
            "STUDENT_DATA__SOURCE": "p",
        },
    )
    assert config.teacher.api_key is not None
    assert config.teacher.api_key.get_secret_value() in keys


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_images_are_named_without_a_registry_and_with_a_version(services: dict[str, Any]) -> None:
    bases = {stage.parent for stages in (TEACHER_IMAGES, STUDENT_IMAGE) for stage in stages.values()}
    bases -= TEACHER_IMAGES.keys() | STUDENT_IMAGE.keys()
    for image in {service["image"] for service in services.values()} | bases:
        first, *rest = image.split("/")
        assert not rest or not re.search(r"[.:]", first), f"{image} names a host"
        assert not image.endswith(":latest")
        assert ":" in image or image == "preceptor-student", f"{image} has no version"


def test_override_for_tls_as_documented_is_understood(form: str, tmp_path: Path) -> None:
    override = _written(tmp_path / "compose.tls.yaml", documented("compose.tls.yaml", "yaml"))
    files = FORMS[form] or "deploy/compose.yaml"
    for program in [V2, V1] if is_v1() else [V2]:
        whole = compose(form, program, COMPOSE_FILE=f"{files}:{override}")
        teacher = whole["services"]["teacher"]
        assert [secret["source"] for secret in teacher["secrets"]] == ["teacher", "tls-cert", "tls-key"]
        environment = environment_of(TEACHER_IMAGES, form) | without_nulls(teacher["environment"])
        config = server_config(environment, SECRETS / "teacher.none.yaml")
        assert (config.tls_cert, config.tls_key) == ("/run/secrets/tls-cert", "/run/secrets/tls-key")
        assert whole["services"]["student"]["environment"]["STUDENT_TEACHER__URL"] == "grpcs://teacher:8301"
