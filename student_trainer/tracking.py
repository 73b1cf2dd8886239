"""Where metrics go: `metrics.jsonl` always, and those of accelerate's trackers that are asked for. Where traces go.

Invariant: after a resume at step s the file holds one line for each logged step up to s and none beyond; TensorBoard
shows the same. W&B, MLflow and trackio go on with the run that trackers.json in the output directory names.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from teacher_api.settings import Section
from teacher_api.tracing import Tracing

METRICS_FILE, RUNS_FILE = "metrics.jsonl", "trackers.json"
TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow", "swanlab", "comet_ml", "aim", "clearml", "dvclive"]


TAKERS: dict[str, tuple[TrackerName, ...]] = {
    "project": ("wandb", "trackio", "mlflow", "swanlab", "comet_ml", "clearml"),
    "run_name": ("wandb", "trackio", "mlflow", "aim"),
    "logging_dir": ("tensorboard", "wandb", "aim"),
    "wandb_mode": ("wandb",),
}
"""Which trackers an option reaches."""


class TrackingConfig(Section):
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Besides metrics.jsonl. Each needs its package installed."""
    project: str = "preceptor"
    """Project name, for the trackers that have projects: wandb, trackio, mlflow, swanlab, comet_ml, clearml."""
    run_name: str = ""
    """For wandb, trackio, mlflow and aim, and of the directory in logging_dir. Empty: the name of the output
    directory."""
    logging_dir: str = ""
    """Where tensorboard, wandb and aim write, each run into a directory of its name. Empty: into the output
    directory."""
    wandb_mode: Literal["online", "offline", "disabled"] = "offline"
    """W&B only. offline writes files that `wandb sync` sends later."""
    log_every: int = Field(1, ge=1)
    """Steps between lines of metrics."""
    samples_every: int = Field(10, ge=0)
    """Steps between tables of completions on the console; 0: none."""
    trace_steps: tuple[int, int] | None = None
    """First and last step (counted as in metrics.jsonl) of which output_dir/trace.json shows who was busy when, for
    ui.perfetto.dev or chrome://tracing; further processes write trace-rank1.json and so on. Unset: none is written."""

    otlp_endpoint: str = ""
    """Collector that gets each step as an OpenTelemetry trace, over OTLP/HTTP, such as http://collector:4318 (extra
    `trace`). What a teacher with --otlp-endpoint does for the step is part of it. Empty: none is sent."""

    @model_validator(mode="after")
    def _steps_in_order(self) -> Self:
        if self.trace_steps is not None and not 1 <= self.trace_steps[0] <= self.trace_steps[1]:
            raise ValueError(
                f"trace_steps: got {list(self.trace_steps)}, expected the first and the last step, such as [3, 5]"
            )
        return self

    @model_validator(mode="after")
    def _nothing_idle(self) -> Self:
        for name, takers in TAKERS.items():
            if name == "run_name" and self.logging_dir:
                continue
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default and not set(takers) & set(self.trackers):
                raise ValueError(
                    f"{name}: got {value!r} with trackers {', '.join(self.trackers) or 'none'}, expected one of those "
                    f"that take it: {', '.join(takers)}"
                )
        return self


class Tracker:
    """Writes metrics of one run. Does nothing on ranks other than the main one.

    Args:
        resumed_step: the step whose checkpoint the run goes on from; -1: it begins anew. What was written of later
            steps is dropped, a half-written last line too: it will be written again.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        resolved_config: dict[str, Any],
        *,
        resumed_step: int = -1,
        is_main: bool = True,
    ) -> None:
        self._path = run_dir / METRICS_FILE
        self._trackers: list[Any] = []
        self._is_main = is_main
        if not is_main:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._drop_lines_after(resumed_step)
        self._trackers = [_start(name, run_dir, config, resolved_config, resumed_step) for name in config.trackers]

    def _drop_lines_after(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = [line for line in read_metrics(self._path) if line["step"] <= step]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, self._path)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics. A value that is not finite is written as null: JSON has no NaN."""
        if not self._is_main:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        for tracker in self._trackers:
            tracker.log({name: value for name, value in finite.items() if value is not None}, step=step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()
        self._trackers = []


def open_tracing(config: TrackingConfig) -> Tracing:
    """Raises ValueError where traces are asked for and can't be sent."""
    try:
        return Tracing.to(config.otlp_endpoint, service="student-train")
    except ValueError as error:
        raise ValueError(f"tracking.otlp_endpoint: {error}") from None


def check_installed(config: TrackingConfig) -> None:
    """Raises ValueError for a tracker whose package is not there."""
    if not config.trackers:
        return
    from accelerate.tracking import get_available_trackers

    available = {str(tracker) for tracker in get_available_trackers()}
    for name in config.trackers:
        if name not in available:
            raise ValueError(f"tracking.trackers: {name} is not installed; install it or leave it out")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _start(name: str, run_dir: Path, config: TrackingConfig, resolved_config: dict[str, Any], resumed_step: int) -> Any:
    """One of accelerate's trackers, started and told the configuration."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # the trackers ask it which rank is the main one
    cls = LOGGER_TYPE_TO_CLASS[name]
    run_name = config.run_name or run_dir.resolve().name
    folder = Path(config.logging_dir) / run_name if config.logging_dir else run_dir
    if name in TAKERS["logging_dir"]:
        folder.mkdir(parents=True, exist_ok=True)
    runs = _known_runs(run_dir)
    goes_on = name in runs
    if name == "tensorboard":
        # It can't take events back: a mark in the new file has its readers drop those from purge_step on.
        tracker = cls(".", logging_dir=str(folder / "tensorboard"), purge_step=resumed_step + 1)
    elif name == "wandb":
        same = {}
        if config.wandb_mode != "disabled":
            runs.setdefault(name, secrets.token_hex(4))
            # Steps that it has beyond resumed_step are written again with the values that they had.
            same = {"id": runs[name], "resume": "allow"}
        tracker = cls(config.project, name=run_name, mode=config.wandb_mode, dir=str(folder), **same)
    elif name == "trackio":
        runs.setdefault(name, run_name)
        tracker = cls(config.project, name=runs[name], resume="allow" if goes_on else "never")
    elif name == "mlflow":
        tracker = cls(config.project, run_name=run_name, run_id=runs.get(name))
    elif cls.requires_logging_directory:
        tracker = cls(run_name, logging_dir=str(folder))
    else:
        tracker = cls(config.project)
    _begin(name, tracker, run_dir, runs)
    if name == "tensorboard":  # its hparams plugin takes flat scalars only; text shows the whole configuration
        tracker.writer.add_text("config", f"```json\n{json.dumps(resolved_config, indent=1)}\n```")
    elif name == "mlflow":  # its parameters are text, and never change
        if not goes_on:
            tracker.store_init_configuration(_flat(resolved_config))
    else:
        tracker.store_init_configuration(resolved_config)
    return tracker


def _begin(name: str, tracker: Any, run_dir: Path, runs: dict[str, str]) -> None:
    """Starts it, and notes which run of its own this one is."""
    if name != "mlflow":
        tracker.start()
    else:
        from mlflow.exceptions import MlflowException

        try:
            tracker.start()
        except MlflowException as error:
            known = f"; {run_dir / RUNS_FILE} names the run {runs[name]}: without it another begins"
            raise ValueError(f"tracking.trackers: mlflow: {error}{known if name in runs else ''}") from error
        runs[name] = tracker.active_run.info.run_id
    if runs != _known_runs(run_dir):
        partial = (run_dir / RUNS_FILE).with_suffix(".partial")
        partial.write_text(json.dumps(runs) + "\n")
        os.replace(partial, run_dir / RUNS_FILE)


def _known_runs(run_dir: Path) -> dict[str, str]:
    """What the trackers call this run, by the tracker's name."""
    path = run_dir / RUNS_FILE
    try:
        known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} can't be read: {error}; without it the trackers begin runs of their own") from error
    return known


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """By dotted key."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
