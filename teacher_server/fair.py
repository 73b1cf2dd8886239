"""Who is next: start-time fair queueing of tokens, over tenants by their weights and over each tenant's experiments
equally (P. Goyal, H. M. Vin, H. Cheng, "Start-time Fair Queueing", 1996; docs/decisions/0037-fair-by-tokens.md).

Each flow has a start tag, in tokens over weight: what it was served, counted from when it last had to wait. The flow
with the smallest is next. One that comes back starts at the clock, the tag of the flow served last: nobody saves up for
later, and who was served ahead of its turn waits until the others have had theirs.

Invariants: a flow with work is served before another is served more than one window beyond it; an interactive call goes
before the bulk of its own tenant, and of no other; within an experiment a call is overtaken by smaller ones until they
add up to its own size. Called from the event loop only.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice

from teacher_server.backends.base import BatchPolicy
from teacher_server.batching import Entry, company
from teacher_server.caller import PRIORITIES

WINDOW = 256  # sequences in fair order among which the first one's company is looked for,
AHEAD = 2.0  # and, while the batch can be filled from them, only those of the next so many batches' tokens
MAX_IDLE_EXPERIMENTS = 1024  # of a tenant with work: those that are remembered while they have none


@dataclass(eq=False, slots=True)
class _Experiment:
    rank: int  # of its priority
    number: int  # of its arrival: what equal tags are told apart by
    start: float = 0.0  # tokens
    served: int = 0  # tokens, while it had work
    waiting: list[tuple[int, int, Entry]] = field(
        default_factory=list
    )  # by the size of the call behind what came before


@dataclass(eq=False, slots=True)
class _Tenant:
    weight: float
    number: int
    start: float = 0.0  # tokens over weight
    tokens: int = 0  # that wait
    clocks: list[float] = field(default_factory=lambda: [0.0] * len(PRIORITIES))
    experiments: dict[tuple[int, str], _Experiment] = field(default_factory=dict)
    busy: dict[_Experiment, None] = field(default_factory=dict)  # those with work


class FairQueue:
    """The queue of a scheduler.

    Args:
        weight_of: a tenant's share of the engine, as a number beside the others'; asked whenever it begins to wait.
    """

    def __init__(self, weight_of: Callable[[str], float] = lambda tenant: 1.0) -> None:
        self._weight_of = weight_of
        self._tenants: dict[str, _Tenant] = {}
        self._busy: dict[_Tenant, None] = {}
        self._places: dict[Entry, tuple[_Tenant, _Experiment, int, int]] = {}
        self._clock = 0.0
        self._count = 0

    def __len__(self) -> int:
        return len(self._places)

    def tokens_of(self) -> dict[str, int]:
        """Tokens that wait, of each tenant that has some."""
        return {name: tenant.tokens for name, tenant in self._tenants.items() if tenant.tokens}

    @property
    def num_flows(self) -> int:
        """Tenants' experiments that wait now."""
        return sum(len(tenant.busy) for tenant in self._busy)

    @property
    def num_remembered(self) -> int:
        """Flows in memory, those without work among them."""
        return len(self._tenants) + sum(len(tenant.experiments) for tenant in self._tenants.values())

    def put(self, entry: Entry) -> None:
        self._count += 1
        tenant = self._tenants.get(entry.caller.tenant)
        if tenant is None:
            tenant = self._tenants[entry.caller.tenant] = _Tenant(1.0, self._count)
        if tenant not in self._busy:
            tenant.weight = self._weight_of(entry.caller.tenant)
            tenant.start = max(tenant.start, self._clock)
            self._busy[tenant] = None
        rank = PRIORITIES.index(entry.caller.priority)
        key = (rank, entry.caller.experiment)
        experiment = tenant.experiments.get(key)
        if experiment is None:
            experiment = tenant.experiments[key] = _Experiment(rank, self._count)
        if not experiment.waiting:
            experiment.start = max(experiment.start, tenant.clocks[rank])
            tenant.busy[experiment] = None
        place = (experiment.served + entry.call_tokens, self._count, entry)
        insort(experiment.waiting, place, key=_order)
        self._places[entry] = (tenant, experiment, *_order(place))
        tenant.tokens += entry.tokens

    def discard(self, entry: Entry) -> None:
        if entry in self._places:
            self._remove(entry)

    def take(self, policy: BatchPolicy) -> list[Entry]:
        """At least one entry, from a queue that is not empty: the first in fair order, and its company."""
        window = list(islice(self._in_order(policy), WINDOW if policy.max_sequences > 1 else 1))
        tenant, experiment, *_ = self._places[window[0]]
        self._clock = max(self._clock, tenant.start)
        tenant.clocks[experiment.rank] = max(tenant.clocks[experiment.rank], experiment.start)
        sums = accumulate(entry.tokens for entry in window)
        near = max(bisect_left(list(sums), AHEAD * policy.max_tokens), 1)
        batch = company(window[0], window[1:near], policy, window[near:])
        for entry in batch:
            self._charge(*self._places[entry][:2], entry.tokens)
            self._remove(entry)
        return batch

    def settle(self, entry: Entry, computed_tokens: int) -> None:
        """After `entry` was served: what it was charged becomes what was computed for it."""
        tenant = self._tenants.get(entry.caller.tenant)
        if tenant is None or computed_tokens == entry.tokens:
            return
        key = (PRIORITIES.index(entry.caller.priority), entry.caller.experiment)
        experiment = tenant.experiments.get(key)
        if experiment is not None:
            self._charge(tenant, experiment, computed_tokens - entry.tokens)

    def _charge(self, tenant: _Tenant, experiment: _Experiment, tokens: int) -> None:
        tenant.start += tokens / tenant.weight
        experiment.start += tokens
        experiment.served += tokens

    def _remove(self, entry: Entry) -> None:
        tenant, experiment, *order = self._places.pop(entry)
        del experiment.waiting[bisect_left(experiment.waiting, tuple(order), key=_order)]
        tenant.tokens -= entry.tokens
        if not experiment.waiting:
            del tenant.busy[experiment]
            self._forget_experiments(tenant)
        if not tenant.busy:
            del self._busy[tenant]
        if not self._busy:
            self._tenants.clear()  # nobody waits, so nobody is ahead of anybody
            self._clock = 0.0

    def _forget_experiments(self, tenant: _Tenant) -> None:
        if not tenant.busy:
            tenant.experiments.clear()
            tenant.clocks = [0.0] * len(PRIORITIES)
        elif len(tenant.experiments) - len(tenant.busy) > MAX_IDLE_EXPERIMENTS:
            keep = tenant.busy
            tenant.experiments = {key: each for key, each in tenant.experiments.items() if each in keep}

    def _in_order(self, policy: BatchPolicy) -> Iterator[Entry]:
        """All entries, as they would be served one at a time; where the engine shares prompts, those of one prompt, as
        many as fit into a batch, as one."""
        tenants = [(tenant.start, tenant.number, tenant) for tenant in self._busy]
        heapq.heapify(tenants)
        inside: dict[_Tenant, list[tuple[int, float, int, Iterator[list[Entry]]]]] = {}
        while tenants:
            start, number, tenant = tenants[0]
            flows = inside.get(tenant)
            if flows is None:
                flows = inside[tenant] = [(e.rank, e.start, e.number, _groups(e, policy)) for e in tenant.busy]
                heapq.heapify(flows)
            if not flows:
                heapq.heappop(tenants)
                continue
            rank, begun, order, waiting = flows[0]
            found = next(waiting, None)
            if found is None:
                heapq.heappop(flows)
                continue
            yield from found
            tokens = sum(entry.tokens for entry in found)
            heapq.heapreplace(flows, (rank, begun + tokens, order, waiting))
            heapq.heapreplace(tenants, (start + tokens / tenant.weight, number, tenant))


def _groups(experiment: _Experiment, policy: BatchPolicy) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    tokens = 0
    for *_, entry in experiment.waiting:
        key = entry.job.prompt_key
        joins = policy.shares_prompts and bool(key) and bool(group) and key == group[0].job.prompt_key
        if group and not (joins and tokens + entry.tokens <= policy.max_tokens):
            yield group
            group, tokens = [], 0
        group.append(entry)
        tokens += entry.tokens
    if group:
        yield group


def _order(place: tuple[int, int, Entry]) -> tuple[int, int]:
    return place[:2]


def within(policy: BatchPolicy, max_tokens: float) -> BatchPolicy:
    """`policy` with batches of at most `max_tokens`."""
    return policy if max_tokens >= policy.max_tokens else replace(policy, max_tokens=max(int(max_tokens), 1))
