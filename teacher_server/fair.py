"""Who is next: start-time fair queueing of tokens, over tenants by their weights and over each tenant's experiments
equally (P. Goyal, H. M. Vin, H. Cheng, "Start-time Fair Queueing", 1996; docs/decisions/0037-fair-by-tokens.md).

Each flow has a start tag, in tokens over weight: what it had been served, counted from when it last had to wait, when
the call in service began. The flow with the smallest is next, and keeps its turn until that call has been served, or a
whole batch of it. One that comes back starts at the clock, what the flow in service has been served: nobody saves up
for later, and who was served ahead of its turn waits until the others have had theirs.

Invariants: a flow with work is served before another is served more than one window beyond it; an interactive call goes
before the bulk of its own tenant, and of no other; within an experiment a call is overtaken by smaller ones until they
add up to its own size. Called from the event loop only.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from teacher_server.backends.base import BatchPolicy
from teacher_server.batching import MAX_PADDING, Entry, company
from teacher_server.caller import PRIORITIES

WINDOW = 256  # sequences in fair order among which the first one's company is looked for,
AHEAD = 6.0  # and, where there are several flows, first among those of the next so many batches
MAX_IDLE_EXPERIMENTS = 1024  # of a tenant with work: those that are remembered while they have none


@dataclass(eq=False, slots=True)
class _Experiment:
    rank: int  # of its priority
    number: int  # of its arrival: what equal tags are told apart by
    start: float = 0.0  # tokens
    tag: float = 0.0  # `start` as the call in service began
    served: int = 0  # tokens, while it had work
    taken: int = 0  # sequences of the call in service, in this turn
    light: bool = False  # it, or its tenant, came back after less than its share: as callers do that wait for an answer
    waiting: list[tuple[int, int, Entry]] = field(
        default_factory=list
    )  # by the size of the call behind what came before


@dataclass(eq=False, slots=True)
class _Tenant:
    weight: float
    number: int
    start: float = 0.0  # tokens over weight
    tag: float = 0.0
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
        self._turn_tokens = 0  # most of a call before others have their turn: a batch,
        self._turn_sequences = 1  # or, where those are fewer, the sequences that the engine holds

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
    def turns(self) -> float:
        """How many turns of others there are to each of the flow with the largest share, its own among them: one over
        that share."""
        whole = sum(tenant.weight for tenant in self._busy)
        return min((whole / tenant.weight * len(tenant.busy) for tenant in self._busy), default=1.0)

    @property
    def num_remembered(self) -> int:
        """Flows in memory, those without work among them."""
        return len(self._tenants) + sum(len(tenant.experiments) for tenant in self._tenants.values())

    def put(self, entry: Entry) -> bool:
        """Gives whether its caller uses less than its share: it had nothing waiting, and could have been served
        this call and more since."""
        self._count += 1
        light = False
        tenant = self._tenants.get(entry.caller.tenant)
        if tenant is None:
            tenant = self._tenants[entry.caller.tenant] = _Tenant(1.0, self._count)
        if tenant not in self._busy:
            tenant.weight = self._weight_of(entry.caller.tenant)
            light = self._clock - tenant.start > entry.call_tokens / tenant.weight
            tenant.start = tenant.tag = max(tenant.start, self._clock)
            self._busy[tenant] = None
        rank = PRIORITIES.index(entry.caller.priority)
        key = (rank, entry.caller.experiment)
        experiment = tenant.experiments.get(key)
        if experiment is None:
            experiment = tenant.experiments[key] = _Experiment(rank, self._count)
        if not experiment.waiting:
            experiment.light = light or tenant.clocks[rank] - experiment.start > entry.call_tokens
            experiment.start = experiment.tag = max(experiment.start, tenant.clocks[rank])
            experiment.taken = 0
            tenant.busy[experiment] = None
        place = (experiment.served + entry.call_tokens, self._count, entry)
        insort(experiment.waiting, place, key=_order)
        self._places[entry] = (tenant, experiment, *_order(place))
        tenant.tokens += entry.tokens
        return experiment.light

    def discard(self, entry: Entry) -> None:
        if entry in self._places:
            self._remove(entry)

    def take(self, policy: BatchPolicy) -> list[Entry]:
        """At least one entry, from a queue that is not empty: the first in fair order, and its company. Callers that
        use less than their share have only each other's, so that their batch is as short as what they ask for."""
        self._turn_tokens = max(self._turn_tokens, policy.max_tokens)
        self._turn_sequences = policy.max_sequences * policy.max_concurrent_batches
        near, further = self._window(policy)
        head = near.pop(0)
        tenant, experiment, *_ = self._places[head]
        self._clock = max(self._clock, tenant.start)
        tenant.clocks[experiment.rank] = max(tenant.clocks[experiment.rank], experiment.start)
        if experiment.light:
            near, further = [entry for entry in near if self._places[entry][1].light], []
        batch = company(head, near, policy)
        if sum(entry.job.num_tokens for entry in batch) < (1 - MAX_PADDING) * policy.max_tokens:
            batch = company(head, near, policy, further)
        served = {}
        for entry in batch:
            tenant, experiment, size, _ = self._places[entry]
            self._charge(tenant, experiment, entry.tokens)
            self._remove(entry)
            experiment.taken += 1
            served[experiment] = (tenant, size)
        for experiment, (tenant, size) in served.items():
            goes_on = bool(experiment.waiting) and experiment.waiting[0][0] == size
            is_long = experiment.start - experiment.tag >= self._turn_tokens
            if not goes_on or is_long or experiment.taken >= self._turn_sequences:
                experiment.tag, tenant.tag, experiment.taken = experiment.start, tenant.start, 0
                experiment.light = False
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

    def _in_order(self) -> Iterator[tuple[list[Entry], _Tenant, float, _Experiment, float]]:
        """All turns as they would be served one after another, with the tenant's and the experiment's start by then."""
        tenants = [(tenant.tag, tenant.number, tenant.start, tenant) for tenant in self._busy]
        heapq.heapify(tenants)
        inside: dict[_Tenant, list[tuple[int, float, int, float, _Experiment, Iterator[list[Entry]] | None]]] = {}
        while tenants:
            _, number, start, tenant = tenants[0]
            flows = inside.get(tenant)
            if flows is None:
                flows = inside[tenant] = [(e.rank, e.tag, e.number, e.start, e, None) for e in tenant.busy]
                heapq.heapify(flows)
            if not flows:
                heapq.heappop(tenants)
                continue
            rank, _, order, begun, experiment, waiting = flows[0]
            waiting = waiting or self._turns(experiment)
            found = next(waiting, None)
            if found is None:
                heapq.heappop(flows)
                continue
            yield found, tenant, start, experiment, begun
            tokens = sum(entry.tokens for entry in found)
            begun, start = begun + tokens, start + tokens / tenant.weight
            heapq.heapreplace(flows, (rank, begun, order, begun, experiment, waiting))
            heapq.heapreplace(tenants, (start, number, start, tenant))

    def _window(self, policy: BatchPolicy) -> tuple[list[Entry], list[Entry]]:
        """The first entries in fair order: those of turns that would come up in the next AHEAD batches if everybody had
        work enough, or one turn later, and others. Chosen from the first alone, a flow is never further ahead."""
        batches = AHEAD * policy.max_tokens / sum(tenant.weight for tenant in self._busy)
        size = WINDOW if policy.max_sequences > 1 else 1
        near: list[Entry] = []
        further: list[Entry] = []
        clock: float | None = None
        for turn, tenant, start, experiment, begun in self._in_order():
            clock = start if clock is None else clock
            tokens = sum(entry.tokens for entry in turn)
            part = batches * tenant.weight / len(tenant.busy) + tokens
            is_near = start - clock <= batches + tokens / tenant.weight
            is_near = is_near and begun - tenant.clocks[experiment.rank] <= part
            (near if is_near or not near or self.num_flows == 1 else further).extend(turn)
            if len(near) + len(further) >= size:
                break
        return near[:size], further

    def _turns(self, experiment: _Experiment) -> Iterator[list[Entry]]:
        """What `experiment` has waiting, in the pieces in which it is served: those of one call, at most a batch."""
        turn: list[Entry] = []
        tokens, current, taken = experiment.start - experiment.tag, -1, experiment.taken
        for size, _, entry in experiment.waiting:
            is_full = tokens + entry.tokens > self._turn_tokens or taken + len(turn) >= self._turn_sequences
            if turn and (size != current or is_full):
                yield turn
                turn, tokens, taken = [], 0.0, 0
            turn.append(entry)
            tokens, current = tokens + entry.tokens, size
        if turn:
            yield turn


def _order(place: tuple[int, int, Entry]) -> tuple[int, int]:
    return place[:2]


def within(policy: BatchPolicy, max_tokens: float) -> BatchPolicy:
    """`policy` with batches of at most `max_tokens`."""
    return policy if max_tokens >= policy.max_tokens else replace(policy, max_tokens=max(int(max_tokens), 1))
