"""What should make a person look: spikes of loss and gradient norm, and a collapse of entropy or length. The rules look
at figures that are the same on every rank, and their memory is a part of the checkpoint. They never end a run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from student_trainer.types import Metrics
from teacher_api.settings import Section

MAD_TO_SIGMA = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
LEAST_SPREAD = 0.01
"""Of the median: a series that hardly moves has no spread to measure a spike by."""
ALARMS = {"alarm_loss": "loss", "alarm_grad_norm": "grad_norm"}
COLLAPSES = {"alarm_entropy": "student_entropy", "alarm_length": "completion_tokens"}


class GuardsConfig(Section):
    """When the run says that something looks wrong. Each rule compares with the run's own figures; 0 turns it off."""

    window: int = Field(20, ge=4, le=10_000)
    """Steps whose figures a rule looks at. No rule speaks before it has seen so many (the collapses: twice as many).
    Skipped steps are not among them."""
    loss_spike: float = Field(8.0, ge=0, allow_inf_nan=False)
    """alarm_loss: the loss is so many spreads above the median of the last `window` steps. The spread is 1.4826 times
    the median absolute deviation, or 1 % of the median where that is more."""
    grad_norm_spike: float = Field(10.0, ge=0, allow_inf_nan=False)
    """alarm_grad_norm: the gradient's norm, before clipping, is over so many times the median of the last `window`."""
    entropy_collapse: float = Field(0.1, ge=0, lt=1)
    """alarm_entropy: the median of student_entropy over the last `window` steps is under this share of its median over
    the first `window`. An objective of your own must give student_entropy for it."""
    length_collapse: float = Field(0.1, ge=0, lt=1)
    """alarm_length: the same of completion_tokens."""


class Alarms:
    """The rules of GuardsConfig over one run.

    Args:
        state: what `state()` gave at the checkpoint that the run goes on from; empty: it begins.
    """

    def __init__(self, config: GuardsConfig, state: Mapping[str, Any] | None = None) -> None:
        self._config = config
        series: Mapping[str, Any] = (state or {}).get("series", {})
        # A smaller window than before looks at the newest of what there is.
        self._last = {key: list(series.get(key, {}).get("last", []))[-config.window :] for key in _WATCHED}
        self._first = {key: list(series.get(key, {}).get("first", []))[: config.window] for key in COLLAPSES.values()}
        self._on = set((state or {}).get("on", []))

    def state(self) -> dict[str, Any]:
        """JSON from which the rules go on exactly."""
        series = {key: {"last": self._last[key], "first": self._first.get(key, [])} for key in _WATCHED}
        return {"series": series, "on": sorted(self._on)}

    def look(self, figures: Metrics) -> tuple[Metrics, list[str]]:
        """Looks at one step's figures.

        Returns:
            1.0 or 0.0 for each rule that is on, to be logged with the step; and a line for each rule that begins to
            hold with this step.
        """
        if figures.get("skipped"):
            return dict.fromkeys(self._rules(), 0.0), []
        messages = self._spikes(figures)
        for key in _WATCHED:
            self._take(key, figures.get(key))
        messages |= self._collapses()
        begun = [messages[name] for name in messages if name not in self._on]
        self._on = set(messages)
        return {name: float(name in messages) for name in self._rules()}, begun

    def _rules(self) -> list[str]:
        config = self._config
        limits = (config.loss_spike, config.grad_norm_spike, config.entropy_collapse, config.length_collapse)
        return [name for name, limit in zip((*ALARMS, *COLLAPSES), limits, strict=True) if limit]

    def _take(self, key: str, value: float | None) -> None:
        if value is None or not math.isfinite(value):
            return
        first = self._first.get(key)
        if first is not None and len(first) < self._config.window:
            first.append(value)
            return
        self._last[key] = [*self._last[key], value][-self._config.window :]

    def _spikes(self, figures: Metrics) -> dict[str, str]:
        """Against the steps before this one."""
        found = {}
        loss, norm, config = figures.get("loss", math.nan), figures.get("grad_norm", math.nan), self._config
        before = self._last["loss"]
        if config.loss_spike and len(before) == config.window:
            middle = statistics.median(before)
            spread = MAD_TO_SIGMA * statistics.median(abs(value - middle) for value in before)
            spread = max(spread, LEAST_SPREAD * abs(middle))
            if loss > middle + config.loss_spike * spread:
                found["alarm_loss"] = (
                    f"loss spike: {loss:.4g}, {_times(loss - middle, spread)} spreads above the median {middle:.4g} of "
                    f"the last {config.window} steps (guards.loss_spike is {config.loss_spike:g})"
                )
        before = self._last["grad_norm"]
        if config.grad_norm_spike and len(before) == config.window:
            middle = statistics.median(before)
            if norm > config.grad_norm_spike * middle:
                found["alarm_grad_norm"] = (
                    f"gradient norm: {norm:.4g}, {_times(norm, middle)} times the median {middle:.4g} of the last "
                    f"{config.window} steps (guards.grad_norm_spike is {config.grad_norm_spike:g})"
                )
        return found

    def _collapses(self) -> dict[str, str]:
        """The last window, this step included, against the first."""
        found = {}
        config = self._config
        limits = {"alarm_entropy": config.entropy_collapse, "alarm_length": config.length_collapse}
        for name, key in COLLAPSES.items():
            last, first = self._last[key], self._first[key]
            if not limits[name] or len(last) < config.window or len(first) < config.window:
                continue
            now, then = statistics.median(last), statistics.median(first)
            if now < limits[name] * then:
                found[name] = (
                    f"{key} has collapsed: median {now:.4g} over the last {config.window} steps, {then:.4g} over the "
                    f"first (guards.{name.removeprefix('alarm_')}_collapse is {limits[name]:g})"
                )
        return found


_WATCHED = (*ALARMS.values(), *COLLAPSES.values())


def _times(value: float, unit: float) -> str:
    return f"{value / unit:.1f}" if unit else "infinitely many"
