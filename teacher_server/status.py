"""What the status page shows, as JSON: the whole server for admins, and for anybody else what is their own tenant's, as
if nobody else were there. Makes it of the service, counts and history; counts nothing itself.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

from teacher_server.cache import SOURCES, Tally
from teacher_server.caller import Caller
from teacher_server.counts import Work
from teacher_server.history import History, Series
from teacher_server.service import TeacherService

MINUTE_S = 60.0
QUANTILES = (0.5, 0.95, 0.99)


def status_of(service: TeacherService, caller: Caller) -> dict[str, Any]:
    """For `caller`. Rates are of the last minute, durations of five, and what is called `hour` of as much of it as the
    server has been up."""
    history, counts = service.history, service.counts
    if caller.is_admin:
        work, series = counts.all, history.all
        names = sorted(counts.tenants)
    else:
        work, series = counts.of(caller.tenant), history.tenants.get(caller.tenant, Series())
        names = [caller.tenant]
    held = service.admission.held_by_tenant()
    ready, live = service.lifecycle.readyz(), service.lifecycle.livez()
    return {
        "now": round(time.time(), 3),
        "version": version("preceptor"),
        "uptime_s": round(time.monotonic() - service.began, 1),
        "state": {"ready": ready.ok, "status": ready.status, "live": live.ok},
        "you": {"tenant": caller.tenant, "admin": caller.is_admin},
        "teacher": _teacher(service),
        "queue": _queue(service, caller),
        "cache": _cache(service, caller),
        **_figures(history, work, series),
        "history": _history(history, series),
        "tenants": [_tenant(service, name, series.computed, held.get(name, 0)) for name in names],
    }


def _teacher(service: TeacherService) -> dict[str, Any] | None:
    """None while the model loads."""
    info = service.known_info
    if info is None:
        return None
    return {
        "model": info.model_name,
        "fingerprint": info.fingerprint,
        "engine": f"{info.engine} {info.engine_version}".strip(),
        "scoring_path": info.scoring_path,
        "note": info.scoring_path_note,
        "dtype": info.dtype,
        "quantisation": info.quantisation,
        "max_sequence_tokens": info.max_sequence_tokens,
        "adapters": list(info.teachers),
    }


def _queue(service: TeacherService, caller: Caller) -> dict[str, Any]:
    admission = service.admission
    if not caller.is_admin:
        return {"tokens": service.admission.held_by_tenant().get(caller.tenant, 0)}
    return {
        "tokens": admission.tokens,
        "limit_tokens": admission.max_tokens,
        "bytes": admission.num_bytes,
        "limit_bytes": admission.max_bytes,
        "share": round(admission.share, 4),
        "streams": service.streams.taken,
        "forwards": service.forwards.running,
        "engine_restarts": service.engine_restarts,
    }


def _cache(service: TeacherService, caller: Caller) -> dict[str, Any]:
    """Sequences since the start by where their scores came from; how much is kept, for admins."""
    cache = service.cache
    tallies = cache.tallies.values() if caller.is_admin else [cache.tallies.get(caller.tenant, Tally())]
    found: dict[str, Any] = {
        "enabled": cache.config.enabled,
        "sequences": {source: sum(tally.sequences[source] for tally in tallies) for source in SOURCES},
    }
    if caller.is_admin:
        found |= {"bytes": cache.memory.num_bytes, "limit_bytes": cache.memory.max_bytes}
        if cache.disk is not None:
            found |= {"disk_bytes": cache.disk.num_bytes, "disk_limit_bytes": cache.disk.max_bytes}
    return found


def _figures(history: History, work: Work, series: Series) -> dict[str, Any]:
    """Of the whole server or of one tenant."""
    minute = series.last(max(round(MINUTE_S / history.step_s), 1))
    span_s = len(minute) * history.step_s or history.step_s
    p50_s, p95_s, p99_s = series.latency_s(work, QUANTILES)
    return {
        "rates": {
            "tokens": sum(point.computed + point.cached for point in minute) / span_s,
            "cached_tokens": sum(point.cached for point in minute) / span_s,
            "requests": sum(point.answered for point in minute) / span_s,
            "refused": sum(point.refused for point in minute) / span_s,
        },
        "latency_s": {"p50": p50_s, "p95": p95_s, "p99": p99_s},
        "hour": {
            "computed_tokens": series.computed,
            "cached_tokens": series.cached,
            "outcomes": series.outcomes(),
        },
        "total": {
            "computed_tokens": work.computed_tokens,
            "cached_tokens": work.cached_tokens,
            "sequences": work.sequences.received,
            "outcomes": {name: number for name, number in work.requests.by_outcome.items() if number},
        },
    }


def _history(history: History, series: Series) -> dict[str, Any]:
    """A second, but for the queue; newest last."""
    step_s = history.step_s
    return {
        "step_s": step_s,
        "computed": [point.computed / step_s for point in series.points],
        "cached": [point.cached / step_s for point in series.points],
        "answered": [point.answered / step_s for point in series.points],
        "refused": [point.refused / step_s for point in series.points],
        "queue_tokens": [point.queued for point in series.points],
    }


def _tenant(service: TeacherService, name: str, total: int, held: int) -> dict[str, Any]:
    """`share` is of the `total` of tokens computed within the hour; `held` is what it has in the queue."""
    history, work = service.history, service.counts.of(name)
    series = history.tenants.get(name, Series())
    figures = _figures(history, work, series)
    computed = figures["hour"]["computed_tokens"]
    return {
        "name": name,
        "weight": service.tenants.weight_of(name),
        "share": computed / total if total else 0.0,
        "queue_tokens": held,
        **{key: figures[key] for key in ("rates", "latency_s", "hour")},
    }
