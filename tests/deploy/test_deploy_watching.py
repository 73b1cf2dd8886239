"""Prometheus and Grafana as deploy/ sets them up: what they scrape and show is there, and promtool takes the rules."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from deployed import DEPLOY, compose, promtool, server_config, without_nulls
from imagebuild import environment_of, stages_of


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return dict(compose("gpu")["services"])


def test_prometheus_scrapes_the_metrics_port_and_reads_the_rules(services: dict[str, Any]) -> None:
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    (scrape,) = config["scrape_configs"]
    (found,) = scrape["dns_sd_configs"]
    environment = environment_of(stages_of(DEPLOY / "teacher.Dockerfile"), "gpu")
    environment |= without_nulls(services["teacher"]["environment"])
    assert found["port"] == server_config(environment, DEPLOY / "secrets/teacher.none.yaml").metrics_port
    assert set(found["names"]) <= set(services)
    for rules in config["rule_files"]:
        text = (DEPLOY / "prometheus" / rules).read_text()
        assert yaml.safe_load(text)["groups"]
        assert set(re.findall(r'job="([^"]+)"', text)) == {scrape["job_name"]}
    (at,) = (w.split("=")[1] for w in services["prometheus"]["command"] if w.startswith("--config.file"))
    mounts = {volume["source"]: volume["target"] for volume in services["prometheus"]["volumes"]}
    assert Path(at).parent == Path(mounts[str(DEPLOY / "prometheus")])


@pytest.mark.skipif(promtool() is None, reason="promtool (Debian's prometheus) is not installed")
def test_promtool_accepts_configuration_and_rules() -> None:
    file = DEPLOY / "prometheus/prometheus.yml"
    done = subprocess.run([promtool(), "check", "config", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_grafana_finds_prometheus_and_the_dashboards(services: dict[str, Any]) -> None:
    provisioning = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    assert urlsplit(source["url"]).hostname in services
    assert urlsplit(source["url"]).port in {port["target"] for port in services["prometheus"]["ports"]}
    (provider,) = yaml.safe_load((provisioning / "dashboards/preceptor.yaml").read_text())["providers"]
    mounts = {volume["target"]: Path(volume["source"]) for volume in services["grafana"]["volumes"]}
    dashboards = mounts[provider["options"]["path"]]
    assert list(dashboards.glob("*.json")), "there is a dashboard"
    assert mounts["/etc/grafana/provisioning"] == provisioning
    used = {uid for file in dashboards.glob("*.json") for uid in _uids(json.loads(file.read_text()))}
    assert used == {source["uid"]}


def _uids(node: Any) -> Iterator[str]:
    """Of the data sources anywhere in a dashboard."""
    if isinstance(node, dict) and node.get("type") == "prometheus" and "uid" in node:
        yield node["uid"]
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _uids(inner)
