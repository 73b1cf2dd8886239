"""The trackers themselves, offline: what W&B, trackio and MLflow have written is read back from their files. W&B online
alone has a stand-in, where the package would reach out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from student_trainer.tracking import Tracker, TrackingConfig

REAL = ("wandb", "trackio", "mlflow")
installed = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in REAL),
    reason="preceptor[trackers] is not installed",
)
CONFIG = {"optim": {"learning_rate": 0.5, "betas": [0.9, 0.95]}, "student": {"model": "small"}}
SCRIPT = """
import json, os, socket, sys
from pathlib import Path
outside = []
connect = socket.socket.connect
def watched(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        outside.append(str(address))
        raise OSError("no network in this test")
    return connect(self, address)
socket.socket.connect = watched
from student_trainer.tracking import Tracker, TrackingConfig
names, run_dir, config = json.loads(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
tracking = TrackingConfig(trackers=names, project="project", run_name="named")
tracker = Tracker(run_dir, tracking, config)
tracker.log(1, {"loss": 2.0, "grad_norm": float("nan")})
tracker.log(2, {"loss": 1.0, "grad_norm": 0.5})
tracker.close()
for resumed in (1, 2):  # killed after step 2, whose checkpoint it had not yet; then in the middle of nothing
    tracker = Tracker(run_dir, tracking, {**config, "more": resumed}, resumed_step=resumed)
    tracker.log(resumed + 1, {"loss": 2.0 - resumed, "grad_norm": 0.5})
    tracker.close()
found = {"outside": outside}
if "mlflow" in names:
    from mlflow.tracking import MlflowClient
    client = MlflowClient()
    experiment = client.get_experiment_by_name("project")
    [run] = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    norms = client.get_metric_history(run.info.run_id, "grad_norm")
    found["mlflow"] = [run.info.run_name, run.data.params, [[m.step, m.value] for m in history],
                       [[m.step, m.value] for m in norms], run.info.status]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What one run wrote to all three, in a process of its own, and what MLflow's client says of it."""
    place = tmp_path_factory.mktemp("trackers")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))},
        "HOME": str(place),
        "PYTHONPATH": os.getcwd(),
        "TRACKIO_DIR": str(place / "trackio"),
        "MLFLOW_TRACKING_URI": f"file:{place / 'mlflow'}",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "HF_HUB_OFFLINE": "1",
    }
    arguments = [json.dumps(REAL), str(place / "run"), json.dumps(CONFIG)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env=environment,
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return place, json.loads(line)


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of a .wandb file: LevelDB's log format (blocks of 32 KiB, records in pieces) behind 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, pieces = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left_in_block = 32768 - at % 32768
        if left_in_block < 7:
            at += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        pieces += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the only piece, or the last
            yield wandb_internal_pb2.Record.FromString(pieces)
            pieces = b""


@installed
@pytest.mark.slow
def test_wandb_offline_writes_the_run_and_reaches_nobody(written: tuple[Path, dict[str, Any]]) -> None:
    place, found = written
    assert found["outside"] == []
    files = sorted(place.glob("run/wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    started = [next(r.run for r in wandb_records(file) if r.WhichOneof("record_type") == "run") for file in files]
    assert [(run.project, run.display_name) for run in started] == [("project", "named")] * 3
    ids = {run.run_id for run in started}
    assert ids == {json.loads((place / "run" / "trackers.json").read_text())["wandb"]}, "a resumed run is the same run"
    records = list(wandb_records(files[0]))
    history = [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(line["_step"], line["loss"]) for line in history] == [(1, 2.0), (2, 1.0)]
    assert ["grad_norm" in line for line in history] == [False, True]
    config = {
        u.key: json.loads(u.value_json) for r in records for u in (*r.config.update, *r.run.config.update) if u.key
    }
    assert config["optim"] == CONFIG["optim"]


@installed
@pytest.mark.slow
def test_trackio_keeps_the_run_on_disk(written: tuple[Path, dict[str, Any]]) -> None:
    [database] = (written[0] / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        lines = connection.execute("select run_name, step, metrics from metrics order by step").fetchall()
        config = json.loads(connection.execute("select config from configs").fetchone()[0])
    connection.close()
    assert [(name, step, json.loads(values)["loss"]) for name, step, values in lines] == [
        ("named", 1, 2.0),
        ("named", 2, 1.0),
        ("named", 2, 1.0),
        ("named", 3, 0.0),
    ]
    assert config["optim"] == CONFIG["optim"]


@installed
@pytest.mark.slow
def test_mlflow_has_parameters_by_dotted_key_and_every_step(written: tuple[Path, dict[str, Any]]) -> None:
    name, parameters, losses, norms, status = written[1]["mlflow"]
    assert (name, status) == ("named", "FINISHED")
    assert parameters == {"optim.learning_rate": "0.5", "optim.betas": "[0.9, 0.95]", "student.model": "small"}
    assert losses == [[1, 2.0], [2, 1.0], [2, 1.0], [3, 0.0]], "a resumed run is the same run"
    assert norms == [[2, 0.5], [2, 0.5], [3, 0.5]]


@installed
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "offline", "disabled"])
def test_wandb_is_started_as_asked(mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in where the package would connect."""
    import wandb

    started: list[dict[str, Any]] = []

    class Stopped(Exception):
        pass

    def init(**settings: Any) -> None:
        started.append(settings)
        raise Stopped

    monkeypatch.setattr(wandb, "init", init)
    config = TrackingConfig(trackers=("wandb",), project="p", wandb_mode=mode, logging_dir=str(tmp_path / "logs"))
    with pytest.raises(Stopped):
        Tracker(tmp_path / "run7", config, {})
    same = {name: started[0].pop(name, None) for name in ("id", "resume")}
    assert started == [{"project": "p", "name": "run7", "mode": mode, "dir": str(tmp_path / "logs" / "run7")}]
    assert (same["resume"] == "allow" and len(same["id"]) == 8) if mode != "disabled" else not any(same.values())


def test_logging_dir_holds_each_run_under_its_name(tmp_path: Path) -> None:
    for run_name in ("", "experiment"):
        config = TrackingConfig(logging_dir=str(tmp_path / "logs"), run_name=run_name)
        tracker = Tracker(tmp_path / "run7", config, {})
        tracker.log(1, {"loss": 1.0})
        tracker.close()
    assert sorted(p.name for p in (tmp_path / "logs").iterdir()) == ["experiment", "run7"]
    assert len(list((tmp_path / "logs").glob("*/tensorboard/events.*"))) == 2
    assert (tmp_path / "run7" / "metrics.jsonl").exists()
    assert not (tmp_path / "run7" / "tensorboard").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trackers": (), "logging_dir": "logs"}, "logging_dir: got 'logs' with trackers none"),
        (
            {"trackers": ("mlflow",), "logging_dir": "logs"},
            "expected one of those that take it: tensorboard, wandb, aim",
        ),
        ({"run_name": "x"}, "run_name: got 'x' with trackers tensorboard"),
        ({"wandb_mode": "online"}, "wandb_mode: got 'online' with trackers tensorboard"),
    ],
)
def test_an_option_that_no_tracker_takes_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrackingConfig(**settings)
