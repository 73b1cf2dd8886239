"""The Kubernetes manifests: valid by the API's own schemas, with options that teacher-serve has, probes that it
answers, time to drain, and selectors and ports that meet.
"""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml
from deployed import DEPLOY, documented, server_config
from imagebuild import ROOT, environment_of, setting, stages_of
from serving import serving

from teacher_server.app import CLOSE_S
from teacher_server.config import ServerConfig

pytestmark = pytest.mark.slow

FOLDERS = {"one": DEPLOY / "kubernetes", "multi-node": DEPLOY / "kubernetes/multi-node"}
NOT_FOR_THE_API = {"kustomization.yaml", "custom-metrics.yaml"}
VERSIONS = ("1.31", "1.34", "1.37")
"""From the first in which everything used is stable, to the newest there are schemas of."""


def documents(folder: Path) -> list[dict[str, Any]]:
    files = [path for path in sorted(folder.glob("*.yaml")) if path.name not in NOT_FOR_THE_API]
    return [document for path in files for document in yaml.safe_load_all(path.read_text())]


ALL = [(name, document) for name, folder in FOLDERS.items() for document in documents(folder)]


def of_kind(folder: str, *kinds: str) -> list[dict[str, Any]]:
    return [document for name, document in ALL if name == folder and document["kind"] in kinds]


def named(folder: str, kind: str, name: str) -> dict[str, Any]:
    (found,) = [document for document in of_kind(folder, kind) if document["metadata"]["name"] == name]
    return found


WORKLOADS = [(name, document) for name, document in ALL if document["kind"] in ("Deployment", "StatefulSet")]
each_workload = pytest.mark.parametrize(
    ("folder", "workload"), WORKLOADS, ids=[document["metadata"]["name"] for _, document in WORKLOADS]
)


def pod(workload: dict[str, Any]) -> dict[str, Any]:
    return dict(workload["spec"]["template"]["spec"])


def container(workload: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(workload)["containers"]
    return dict(only)


def configured(folder: str, workload: dict[str, Any], ordinal: int | None = None) -> ServerConfig:
    """What teacher-serve makes of a pod's environment; the pod's number is the first there is, if not said."""
    if ordinal is None:
        ordinal = workload["spec"].get("ordinals", {}).get("start", 0)
    asked = container(workload)
    environment = environment_of(stages_of(DEPLOY / "teacher.Dockerfile"), "gpu")
    for source in asked["envFrom"]:
        environment |= named(folder, "ConfigMap", source["configMapRef"]["name"])["data"]
    fields = {"metadata.labels['apps.kubernetes.io/pod-index']": str(ordinal)}
    for variable in asked["env"]:
        environment[variable["name"]] = variable.get("value") or fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]
    environment |= {"TEACHER_CONFIG": "/dev/null", "TEACHER_API_KEY": "in place of the secret's"}
    return server_config(environment, Path("/dev/null"))


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_is_valid(version: str) -> None:
    assert len(ALL) >= 15
    for _, document in ALL:
        kubernetes_validate.validate(document, version, strict=True)


def test_a_misspelt_field_is_not_valid() -> None:
    wrong = copy.deepcopy(named("one", "Deployment", "teacher"))
    wrong["spec"]["template"]["spec"]["terminationGraceSeconds"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("folder", FOLDERS)
def test_kustomization_names_every_file(folder: str) -> None:
    listed = yaml.safe_load((FOLDERS[folder] / "kustomization.yaml").read_text())
    assert set(listed["resources"]) == {path.name for path in FOLDERS[folder].glob("*.yaml")} - NOT_FOR_THE_API
    assert {image["name"] for image in listed["images"]} == {
        container(workload)["image"].split(":")[0] for name, workload in WORKLOADS if name == folder
    }


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", FOLDERS)
def test_kubectl_builds_the_kustomization(folder: str) -> None:
    done = subprocess.run(["kubectl", "kustomize", FOLDERS[folder]], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    built = list(yaml.safe_load_all(done.stdout))
    assert len(built) == len(documents(FOLDERS[folder]))
    for document in built:
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)
        assert document["metadata"]["labels"]["app.kubernetes.io/part-of"] == "preceptor"


@each_workload
def test_ports_are_those_the_server_listens_on(folder: str, workload: dict[str, Any]) -> None:
    config = configured(folder, workload)
    ports = {port["name"]: port["containerPort"] for port in container(workload).get("ports", [])}
    expected = {
        "http": config.http_port,
        "grpc": config.grpc_port,
        "probes": config.probe_port,
        "metrics": config.metrics_port,
    }
    assert ports == ({} if config.node_rank else expected), "a node other than the first has no port"
    annotations = workload["spec"]["template"]["metadata"].get("annotations", {})
    if "prometheus.io/port" in annotations:
        assert annotations["prometheus.io/port"] == str(config.metrics_port)


@each_workload
def test_three_probes_ask_what_the_server_answers(folder: str, workload: dict[str, Any]) -> None:
    config = configured(folder, workload)
    asked = {kind: container(workload).get(f"{kind}Probe") for kind in ("startup", "liveness", "readiness")}
    if config.node_rank:
        assert asked == dict.fromkeys(asked)
        return
    paths = {kind: probe["httpGet"]["path"] for kind, probe in asked.items()}
    assert paths == {"startup": "/readyz", "liveness": "/livez", "readiness": "/readyz"}
    assert {probe["httpGet"]["port"] for probe in asked.values()} == {"probes"}
    loading_s = asked["startup"]["periodSeconds"] * asked["startup"]["failureThreshold"]
    assert loading_s >= config.engine_start_timeout_s, "a load that may go on is not killed"
    drained_s = asked["readiness"]["periodSeconds"] * asked["readiness"]["failureThreshold"]
    assert drained_s <= config.lame_duck_s, "callers are sent elsewhere while the server still takes their calls"


@each_workload
def test_termination_covers_the_drain(folder: str, workload: dict[str, Any]) -> None:
    config = configured(folder, workload)
    longest = config.lame_duck_s + config.grace_s + CLOSE_S
    assert longest < pod(workload)["terminationGracePeriodSeconds"] <= longest + 10


@each_workload
def test_pods_can_write_to_their_volumes_alone(folder: str, workload: dict[str, Any]) -> None:
    asked, of_pod = container(workload), pod(workload)
    assert asked["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    context = of_pod["securityContext"]
    assert context["runAsNonRoot"] is True
    user = stages_of(DEPLOY / "teacher.Dockerfile")["gpu"].last("USER")
    assert f"{context['runAsUser']}:{context['runAsGroup']}" == user
    assert context["fsGroup"] == context["runAsGroup"], "volumes and keys are the user's"
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert of_pod["automountServiceAccountToken"] is False
    mounts = asked["volumeMounts"]
    image = set(setting(stages_of(DEPLOY / "teacher.Dockerfile"), "gpu", "VOLUME").split())
    assert {mount["mountPath"] for mount in mounts if not mount.get("readOnly")} == {*image, "/tmp", "/dev/shm"}
    volumes = {volume["name"] for volume in of_pod["volumes"]}
    volumes |= {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
    assert volumes == {mount["name"] for mount in mounts}
    assert "hostPath" not in str(of_pod)


@each_workload
def test_keys_come_from_the_secret_that_is_documented(folder: str, workload: dict[str, Any]) -> None:
    (secret,) = [volume["secret"] for volume in pod(workload)["volumes"] if "secret" in volume]
    (mount,) = [mount for mount in container(workload)["volumeMounts"] if mount.get("readOnly")]
    (file,) = [variable["value"] for variable in container(workload)["env"] if variable["name"] == "TEACHER_CONFIG"]
    text = (ROOT / "docs/deployment.md").read_text()
    assert f"kubectl create secret generic {secret['secretName']} --from-file={Path(file).name}" in text
    assert str(Path(file).parent) == mount["mountPath"]
    assert documented(Path(file).name, "yaml")
    assert secret["defaultMode"] == 0o440


def labels(workload: dict[str, Any]) -> dict[str, str]:
    return dict(workload["spec"]["template"]["metadata"]["labels"])


def selected(folder: str, selector: dict[str, str]) -> list[dict[str, Any]]:
    return [w for name, w in WORKLOADS if name == folder and selector.items() <= labels(w).items()]


@pytest.mark.parametrize("folder", FOLDERS)
def test_selectors_and_ports_meet(folder: str) -> None:
    for workload in of_kind(folder, "Deployment", "StatefulSet"):
        assert selected(folder, workload["spec"]["selector"]["matchLabels"]) == [workload]
    for service in of_kind(folder, "Service"):
        behind = selected(folder, service["spec"]["selector"])
        assert behind, service["metadata"]["name"]
        for port in service["spec"].get("ports", []):
            for workload in behind:
                numbers = {p["name"]: p["containerPort"] for p in container(workload)["ports"]}
                assert numbers[port["targetPort"]] == port["port"]
    for budget in of_kind(folder, "PodDisruptionBudget"):
        assert selected(folder, budget["spec"]["selector"]["matchLabels"])
    for policy in of_kind(folder, "NetworkPolicy"):
        for workload in selected(folder, policy["spec"]["podSelector"]["matchLabels"]):
            for port in _opened(policy):
                assert port in {p["name"] for p in container(workload)["ports"]}


def _opened(policy: dict[str, Any]) -> Iterator[str]:
    for rule in policy["spec"]["ingress"]:
        for port in rule.get("ports", []):
            yield port["port"]


@each_workload
def test_network_lets_callers_to_the_calls_and_prometheus_to_the_metrics(folder: str, workload: dict[str, Any]) -> None:
    policies = [
        policy
        for policy in of_kind(folder, "NetworkPolicy")
        if policy["spec"]["podSelector"]["matchLabels"].items() <= labels(workload).items()
    ]
    assert {kind for policy in policies for kind in policy["spec"]["policyTypes"]} == {"Ingress", "Egress"}
    rules = [rule for policy in policies for rule in policy["spec"]["ingress"]]
    opened = {str(peer): [port["port"] for port in rule.get("ports", [])] for rule in rules for peer in rule["from"]}
    for peer, ports in opened.items():
        if "preceptor/engine" in peer:
            assert ports == [], "all of them"
            assert "namespaceSelector" not in peer, "nodes of this namespace alone"
        elif "calls-teacher" in peer:
            assert ports == ["http", "grpc"]
        else:
            assert ports == ["metrics"]
            assert "monitoring" in peer


def test_scaling_goes_by_a_metric_that_the_server_has() -> None:
    scaler = named("one", "HorizontalPodAutoscaler", "teacher")["spec"]
    target = scaler["scaleTargetRef"]
    workload = named("one", target["kind"], target["name"])
    assert "replicas" not in workload["spec"], "a second place would set them back at every change"
    (metric,) = [metric["pods"] for metric in scaler["metrics"]]
    with serving(metrics_port=0) as server:
        text = httpx.get(server.metrics_url).text
    assert re.search(rf"^{metric['metric']['name']} \d", text, re.MULTILINE)
    (rule,) = yaml.safe_load((FOLDERS["one"] / "custom-metrics.yaml").read_text())["rules"]["custom"]
    assert rule["seriesQuery"].startswith(metric["metric"]["name"] + "{")
    assert rule["name"]["as"] == metric["metric"]["name"]
    config = configured("one", workload)
    assert int(metric["target"]["averageValue"]) <= config.queue_tokens * config.high_water / 2, "before it turns away"


def test_nodes_of_one_engine_are_complete() -> None:
    first, other = (named("multi-node", "StatefulSet", name) for name in ("teacher-first", "teacher-other"))
    start = other["spec"]["ordinals"]["start"]
    ranks = [configured("multi-node", first).node_rank]
    ranks += [
        configured("multi-node", other, ordinal).node_rank
        for ordinal in range(start, start + other["spec"]["replicas"])
    ]
    config = configured("multi-node", first)
    assert first["spec"]["replicas"] == 1
    assert ranks == list(range(config.nnodes or 0))
    gpus = [int(container(w)["resources"]["limits"]["nvidia.com/gpu"]) for w in (first, other)]
    assert gpus[0] + gpus[1] * other["spec"]["replicas"] == config.tensor_parallel_size
    assert (config.master_addr or "").split(".") == [f"{first['metadata']['name']}-0", first["spec"]["serviceName"]]
    names = named("multi-node", "Service", first["spec"]["serviceName"])["spec"]
    assert names["clusterIP"] == "None"
    assert names["publishNotReadyAddresses"] is True, "they meet before any is ready"
    assert selected("multi-node", names["selector"]) == [first, other]
    assert first["spec"]["podManagementPolicy"] == other["spec"]["podManagementPolicy"] == "Parallel"


def test_images_are_named_without_a_registry() -> None:
    assert {container(workload)["image"] for _, workload in WORKLOADS} == {"preceptor-teacher:gpu"}
