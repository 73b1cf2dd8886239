"""Dashboard and alerts against a server that works: every metric and label that they name is there, and Prometheus
itself parses and answers each expression. Prometheus is Debian's; without it the first half still runs."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ports import free_port
from prometheus_client.parser import text_string_to_metric_families
from serving import Server, ask_grpc, ask_http, post, request_of, serving
from training import wait_until

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "teacher.json").read_text())
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
OF_PANELS = {f"{panel['title']} {t['refId']}": t["expr"] for panel in PANELS for t in panel["targets"]}
OF_ALERTS = {rule["alert"]: rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]}
NAME = re.compile(r"\b((?:preceptor|process|python)_\w+)")
SELECTOR = re.compile(r"\b((?:preceptor|process)_\w+)\{([^}]*)\}")
MATCHER = re.compile(r'(\w+)(=~|=)"([^"]*)"')
TARGET = {"instance", "job"}  # labels that Prometheus adds
NAN = 401
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="no prometheus here (Debian: apt-get install prometheus)",
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(metrics_port=0, fake_nan_token=NAN, max_sequence_tokens=64) as running:
        yield running


def work(server: Server) -> None:
    ask_http(server, request_of([1, 2, 3], [1, NAN, 2]))
    ask_grpc(server, request_of([1, 2, 3, 4], [5, 6]))
    post(server, b"nonsense")


@pytest.fixture(scope="module")
def scraped(server: Server) -> dict[str, list[dict[str, str]]]:
    """Labels of the samples of each metric."""
    work(server)
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(httpx.get(server.metrics_url, timeout=30).text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


@pytest.mark.parametrize("expr", [*OF_PANELS.values(), *OF_ALERTS.values()], ids=[*OF_PANELS, *OF_ALERTS])
def test_what_is_named_exists(expr: str, scraped: dict[str, list[dict[str, str]]]) -> None:
    names = set(NAME.findall(expr))
    assert names or "up{" in expr
    assert names <= set(scraped)
    for name, matchers in SELECTOR.findall(expr):
        for label, _, wanted in MATCHER.findall(matchers):
            if label in TARGET:
                continue
            values = {labels[label] for labels in scraped[name]}
            assert set(wanted.split("|")) <= values, f"{name} has no {label} {wanted}"
    for labels in re.findall(r"\bby \(([^)]*)\)", expr):
        known = {label for name in names for labels in scraped[name] for label in labels} | TARGET
        assert {label.strip() for label in labels.split(",")} <= known


def test_the_dashboard_is_whole() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    provisioned = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    uids = {source["uid"] for source in provisioned["datasources"]}
    cells = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not own & cells, f"{panel['title']} covers another panel"
        cells |= own
    for panel in PANELS:
        assert panel["description"]
        assert panel["datasource"]["uid"] in uids
        assert {target["datasource"]["uid"] for target in panel["targets"]} <= uids


def test_alerts_say_what_is_wrong_and_where_to_look() -> None:
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            assert set(rule["annotations"]) == {"summary", "description"}
            assert rule["labels"]["severity"] in ("info", "warning", "critical")


@needs_prometheus
def test_alerts_fire_when_they_should_and_not_else() -> None:
    tests = Path(__file__).parent / "alerts_test.yml"
    done = subprocess.run(["promtool", "test", "rules", str(tests)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    silent = {case["alertname"] for case in yaml.safe_load(tests.read_text())["tests"][0]["alert_rule_test"]}
    assert silent == set(OF_ALERTS)  # and as many fire in its second part


@contextlib.contextmanager
def prometheus(folder: Path, target: str) -> Iterator[str]:
    """Prometheus with our rules, scraping `target` each second."""
    scrape = {"job_name": "teacher", "static_configs": [{"targets": [target]}]}
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(DEPLOY / "prometheus" / "alerts.yml")],
        "scrape_configs": [scrape],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    address = f"127.0.0.1:{free_port()}"
    files = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(["prometheus", *files, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


def is_up(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/-/ready", timeout=30).status_code == 200
    return False


def asked(url: str, expr: str) -> list[Any]:
    answer = httpx.get(f"{url}/api/v1/query", params={"query": expr}, timeout=30).json()
    assert answer["status"] == "success", answer
    return answer["data"]["result"]


@needs_prometheus
def test_prometheus_answers_every_expression(server: Server, tmp_path: Path) -> None:
    done = threading.Event()

    def keep_working() -> None:
        while not done.wait(0.2):
            work(server)

    working = threading.Thread(target=keep_working)
    working.start()
    target = server.metrics_url.removeprefix("http://").removesuffix("/metrics")
    try:
        with prometheus(tmp_path, target) as url:
            wait_until(lambda: is_up(url), what="Prometheus' start")
            wait_until(lambda: asked(url, "count_over_time(preceptor_ready[1m]) > 3"), what="four scrapes")
            for title, expr in OF_PANELS.items():
                filled = expr.replace("$instance", ".+").replace("$__rate_interval", "30s")
                assert asked(url, filled), f"the panel {title} shows nothing of a server that works"
            for expr in OF_ALERTS.values():
                asked(url, expr)
            rules = httpx.get(f"{url}/api/v1/rules", timeout=30).json()["data"]["groups"][0]["rules"]
            assert {rule["name"]: rule.get("lastError", "") for rule in rules} == dict.fromkeys(OF_ALERTS, "")
    finally:
        done.set()
        working.join()
