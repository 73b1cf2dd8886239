"""From what each measurement took to the figures of benchmarks/scoring.py, and their table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.systems import Taken, Work

Key = tuple[str, str, int, int]
"""System, scenario, k, candidates per position."""
LIMIT: Key = ("limit", "batch", 0, 0)


def figures_of(taken: Mapping[Key, Sequence[Taken]], works: Mapping[str, Work]) -> dict[str, float]:
    """Medians over the rounds. A ratio is the median of the rounds' own ratios: what is compared was measured side by
    side."""
    found: dict[str, float] = {}
    for key, rounds in taken.items():
        name, work = _name(key), works[key[1]]
        found[f"{name}_tokens_per_s"] = work.num_tokens / statistics.median(t.seconds for t in rounds)
        if key[0] != "limit":
            per_1k = [1000 * t.cpu_seconds / work.num_rows for t in rounds]
            found[f"{name}_client_cpu_s_per_1k"] = statistics.median(per_1k)
        if key[0] == "stock":
            found[f"{name}_bytes_per_position"] = rounds[0].num_bytes / work.num_rows
    for system, scenario, k, candidates in taken:
        if system != "grpc" or candidates:
            continue
        ours, stock = (system, scenario, k, 0), ("stock", scenario, k, 0)
        if stock in taken:
            found[f"{scenario}_vs_stock_k{k}"] = _ratio(taken[stock], taken[ours])
            cost = _ratio(taken[ours], taken[stock], "cpu_seconds")
            found[f"{'' if scenario == 'batch' else 'group_'}client_cpu_vs_stock_k{k}"] = cost
        if scenario == "batch":
            found[f"batch_limit_ratio_k{k}"] = _ratio(taken[LIMIT], taken[ours])
    for key in taken:
        if key[3]:
            found["candidates_cost"] = _ratio(taken[key], taken[(*key[:3], 0)]) - 1
    for scenario in ("batch", "group"):
        name = "k256_over_k64" if scenario == "batch" else "group_k256_over_k64"
        found[name] = _ratio(taken["grpc", scenario, 256, 0], taken["grpc", scenario, 64, 0])
    return found


def figures_of_ways(ways: Mapping[str, Sequence[Taken]], stock: Sequence[Taken], work: Work) -> dict[str, float]:
    """What k = 64 costs the client's CPU by each way in, alone and as a share of stock's (medians)."""
    stock_s = statistics.median(t.cpu_seconds for t in stock)
    found: dict[str, float] = {}
    for name, takes in ways.items():
        seconds = statistics.median(t.cpu_seconds for t in takes)
        found[f"{name}_client_cpu_s_per_1k_k64"] = 1000 * seconds / work.num_rows
        found[f"{name}_client_cpu_vs_stock_k64"] = seconds / stock_s
    return found


def _name(key: Key) -> str:
    system, scenario, k, candidates = key
    if system == "limit":
        return f"limit_{scenario}"
    return f"{system}_{scenario}_k{k}" + (f"_candidates{candidates}" if candidates else "")


def _ratio(above: Sequence[Taken], below: Sequence[Taken], of: str = "seconds") -> float:
    ratios = [float(getattr(a, of) / getattr(b, of)) for a, b in zip(above, below, strict=True)]
    return statistics.median(ratios)


def show(model: str, found: Mapping[str, float]) -> None:
    """The figures as tables on stdout."""
    console = Console(width=130)
    speed = Table(title=f"{model} model: submitted tokens per second (median round)")
    for column in ("scenario", "k", "limit", "ours, gRPC", "ours, HTTP", "stock", "ours / limit", "ours / stock"):
        speed.add_column(column, justify="left" if column == "scenario" else "right")
    cost = Table(title=f"{model} model: what an answer costs its client, per scored position")
    for column in ("scenario", "k", "bytes", "bytes, float32", "bytes, stock", "CPU µs", "CPU µs, stock", "CPU ratio"):
        cost.add_column(column, justify="left" if column == "scenario" else "right")

    def cell(key: str, form: str = ",.0f", scale: float = 1.0) -> str:
        return format(found[key] * scale, form) if key in found else ""

    for scenario in ("batch", "group"):
        place = "" if scenario == "batch" else "group_"
        for k in (0, 1, 16, 64, 256):
            speed.add_row(
                scenario,
                str(k),
                cell("limit_batch_tokens_per_s") if scenario == "batch" else "",
                cell(f"grpc_{scenario}_k{k}_tokens_per_s"),
                cell(f"http_{scenario}_k{k}_tokens_per_s"),
                cell(f"stock_{scenario}_k{k}_tokens_per_s"),
                cell(f"{scenario}_limit_ratio_k{k}", ".2f"),
                cell(f"{scenario}_vs_stock_k{k}", ".2f"),
            )
            cost.add_row(
                scenario,
                str(k),
                cell(f"{place}bytes_per_position_k{k}", ".1f"),
                cell(f"{place}bytes_per_position_k{k}_float32", ".1f"),
                cell(f"stock_{scenario}_k{k}_bytes_per_position"),
                cell(f"grpc_{scenario}_k{k}_client_cpu_s_per_1k", ".2f", 1000),
                cell(f"stock_{scenario}_k{k}_client_cpu_s_per_1k", ".1f", 1000),
                cell(f"{place}client_cpu_vs_stock_k{k}", ".4f"),
            )
    console.print(speed)
    console.print(cost)
    rest = Table(show_header=False, title=f"{model} model")
    for key in ("candidates_cost", "k256_over_k64", "group_k256_over_k64", "max_abs_error", "max_float16_error",
                "max_abs_error_as_stock", "stock_max_abs_error", "rank_errors", "unary_client_cpu_vs_stock_k64",
                "stream_client_cpu_vs_stock_k64", "stock_concurrency", "streamed", "rounds"):  # fmt: skip
        rest.add_row(key, format(found[key], ".4g"))
    console.print(rest)
