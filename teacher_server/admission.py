"""How much work is accepted: one budget of tokens to be computed and one of answer bytes, of which each experiment that
wants some may hold its share. Work over it, or over its tenant's rate, is refused with a time to come back (unary
calls) or waits its turn (streams, which stop reading meanwhile). Bodies that are still being received: places.py.

Invariants: nothing is held beyond the budgets; a caller alone may hold all of them; none can keep another from holding
its share for longer than the engine takes to answer what was accepted before.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from teacher_api.errors import Overloaded, TooLarge
from teacher_server.caller import SERVER, Caller
from teacher_server.rates import KEPT_S, KEPT_SHARE, TokenRate

RETRY_AFTER_S = (0.05, 60.0)
RETRY_AFTER_UNKNOWN_S = 1.0  # before the first batch tells how fast this teacher is, and for what it does not tell


ACTIVE_S = 10.0
"""For which an experiment that has asked for something, and holds nothing, is expected back."""
SHARED = 0.75
"""Of the budget that is divided among several callers. The rest is for whoever holds nothing: so a newcomer finds room,
and a call that is larger than its caller's share too."""

MAX_PLACES = 4096  # of those who were told to come back, by tenant

Flow = tuple[str, str]  # tenant, experiment


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a call or a sequence, and whose it is."""

    tokens: int
    num_bytes: int
    caller: Caller = SERVER
    call: Hashable = None
    """What the same call has in common with itself when it comes again."""

    @property
    def flow(self) -> Flow:
        return self.caller.tenant, self.caller.experiment

    @property
    def who(self) -> Hashable:
        """By what a call is known when it comes back."""
        return self.caller.experiment, self.caller.run, self.call


@dataclass(slots=True)
class _Held:
    """By a tenant or an experiment."""

    asked_at: float = 0.0
    tokens: int = 0
    num_bytes: int = 0

    @property
    def anything(self) -> bool:
        return bool(self.tokens or self.num_bytes)


@dataclass(frozen=True, slots=True)
class _Place:
    """In the order of those who were told to come back."""

    tokens: int
    at: float
    until: float


class _Line:
    """Those of one tenant who were told to come back, and what they want together. Nothing looks at all of them."""

    def __init__(self) -> None:
        self.tokens = 0
        self._places: dict[Hashable, _Place] = {}
        self._ends: list[tuple[float, int, Hashable]] = []  # a heap; also of places that were left since
        self._added = 0

    def __len__(self) -> int:
        return len(self._places)

    def get(self, who: Hashable) -> _Place | None:
        return self._places.get(who)

    def add(self, who: Hashable, place: _Place) -> None:
        self.leave(who)
        self._places[who] = place
        self.tokens += place.tokens
        self._added += 1
        heapq.heappush(self._ends, (place.until, self._added, who))
        if len(self._ends) > 2 * MAX_PLACES:
            self._ends = [(one.until, n, who) for n, (who, one) in enumerate(self._places.items())]
            heapq.heapify(self._ends)

    def leave(self, who: Hashable) -> None:
        place = self._places.pop(who, None)
        if place is not None:
            self.tokens -= place.tokens

    def forget(self, now: float) -> None:
        """Those who did not come in time."""
        while self._ends and self._ends[0][0] < now:
            until, _, who = heapq.heappop(self._ends)
            place = self._places.get(who)
            if place is not None and place.until == until:
                self.leave(who)


class Admission:
    """The two budgets.

    Args:
        tokens_per_s: speed of the engine, 0 where it is not known yet.
        weight_of: a tenant's share, as a number beside the others'.
        rate_of: tokens per second and burst that a tenant is held to; None: to none.
        clock: that of the event loop.
    """

    def __init__(
        self,
        max_tokens: int,
        max_bytes: int,
        tokens_per_s: Callable[[], float],
        *,
        weight_of: Callable[[str], float] = lambda tenant: 1.0,
        rate_of: Callable[[str], tuple[float, float] | None] = lambda tenant: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_tokens = max_tokens
        self.max_bytes = max_bytes
        self.tokens = 0
        self.num_bytes = 0
        self._tokens_per_s = tokens_per_s
        self._weight_of, self._rate_of, self._clock = weight_of, rate_of, clock
        self._flows: OrderedDict[Flow, _Held] = OrderedDict()  # those that want something, who asked longest ago first
        self._experiments: Counter[str] = Counter()  # among them, by tenant
        self._tenants: dict[str, _Held] = {}
        self._places: dict[str, _Line] = {}  # by tenant
        self._rates: dict[str, TokenRate] = {}
        self._waiting: OrderedDict[Flow, deque[tuple[Cost, asyncio.Future[None]]]] = OrderedDict()

    @property
    def share(self) -> float:
        """Of the budget that is taken, 0 to 1."""
        return max(self.tokens / self.max_tokens, self.num_bytes / self.max_bytes)

    def held_by_tenant(self) -> dict[str, int]:
        """Tokens accepted and not yet answered."""
        held: dict[str, int] = {}
        for (tenant, _), one in self._flows.items():
            held[tenant] = held.get(tenant, 0) + one.tokens
        return held

    @property
    def num_flows(self) -> int:
        """Experiments that want something, or did of late."""
        return len(self._flows)

    def take(self, cost: Cost) -> None:
        """Takes `cost` at once. Raises Overloaded when it doesn't fit now, TooLarge when it never will. Who comes back
        when told to goes before those who came later."""
        self._check(cost)
        self._ask(cost.flow)
        if not self._fits(cost) or not self._is_its_turn(cost):
            raise Overloaded(self._full(cost), retry_after_s=self._come_back_in_s(cost))
        delay_s = self._delay_s(cost)
        if delay_s > 0:
            raise Overloaded(
                f"{cost.tokens} tokens more would pass the rate of tenant {cost.caller.tenant!r}; come back later",
                retry_after_s=delay_s,
            )
        if (line := self._places.get(cost.caller.tenant)) is not None:
            line.leave(cost.who)
        self._add(cost)

    def _is_its_turn(self, cost: Cost) -> bool:
        """Whether nobody of its tenant who was told to come back by now is put off by `cost`. Half a share that is free
        is nobody's."""
        tenant, now = cost.caller.tenant, self._clock()
        places = self._places.get(tenant)
        if not places or not cost.tokens:
            return True
        places.forget(now)
        own = places.get(cost.who)
        if own is not None and own.at <= now:
            return True
        ahead = places.tokens - (own.tokens if own is not None else 0)
        room = self._share_of_tenant(tenant) * self.max_tokens - self._tenants[tenant].tokens - cost.tokens
        return room >= min(ahead, self._share_of_tenant(tenant) * self.max_tokens / 2)

    def _come_back_in_s(self, cost: Cost) -> float:
        """Gives the caller its place behind those of its tenant who were told to come back before."""
        tenant, now, rate = cost.caller.tenant, self._clock(), self._tokens_per_s()
        if rate <= 0:
            return RETRY_AFTER_UNKNOWN_S
        low, high = RETRY_AFTER_S
        places = self._places.setdefault(tenant, _Line())
        own = places.get(cost.who)
        if own is not None:  # it came early, or others are late to leave
            return min(max(own.at - now, low), high)
        share = self._share_of_tenant(tenant)
        ahead = places.tokens
        held = max(self._tenants[tenant].tokens - share * self.max_tokens, self.tokens - self.max_tokens)
        excess = max(ahead + held + cost.tokens, cost.tokens)
        delay_s = min(max(excess / (rate * min(share / SHARED, 1.0)), low), high)
        if len(places) < MAX_PLACES:
            until = now + delay_s + max(KEPT_S, KEPT_SHARE * delay_s)
            places.add(cost.who, _Place(cost.tokens, now + delay_s, until))
        return delay_s

    async def wait(self, cost: Cost) -> None:
        """Takes `cost` when there is room: first come first served among an experiment's own, and among experiments
        who holds least of its share. Raises TooLarge when it never will fit."""
        self._check(cost)
        while (delay_s := self._delay_s(cost)) > 0:
            await asyncio.sleep(delay_s)
        flow = cost.flow
        self._ask(flow)
        if not self._waiting and self._fits(cost):
            self._add(cost)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = (cost, turn)
        self._waiting.setdefault(flow, deque()).append(place)
        self._grant()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(cost)  # it was granted in the moment of the cancellation
            elif place in self._waiting.get(flow, ()):  # unless it was passed over between its end and now
                self._waiting[flow].remove(place)
                self._grant()
            raise

    def adopt(self, cost: Cost) -> None:
        """Counts accepted work whose caller gives its own back: the bound may be passed by as much."""
        self._ask(cost.flow)
        self._add(cost)

    def give(self, cost: Cost) -> None:
        self._ask(cost.flow)
        for one in (self, self._tenants[cost.caller.tenant], self._flows[cost.flow]):
            one.tokens -= cost.tokens
            one.num_bytes -= cost.num_bytes
            assert one.tokens >= 0, "more was given back than taken"
            assert one.num_bytes >= 0, "more was given back than taken"
        self._grant()

    def _grant(self) -> None:
        while True:
            for flow in [flow for flow, places in self._waiting.items() if not places]:
                del self._waiting[flow]
            if not self._waiting:
                return
            for flow in sorted(self._waiting, key=self._use):
                cost, turn = self._waiting[flow][0]
                if self._has_room(cost) and (turn.done() or self._is_within_share(cost)):
                    self._waiting[flow].popleft()
                    if not turn.done():
                        self._add(cost)
                        turn.set_result(None)
                    break
                if self._is_within_share(cost):
                    return  # it waits for room, and nobody takes it from it
            else:
                return

    def _fits(self, cost: Cost) -> bool:
        return self._has_room(cost) and self._is_within_share(cost)

    def _has_room(self, cost: Cost) -> bool:
        tokens, num_bytes = self.tokens + cost.tokens, self.num_bytes + cost.num_bytes
        return (not cost.tokens or tokens <= self.max_tokens) and num_bytes <= self.max_bytes

    def _is_within_share(self, cost: Cost) -> bool:
        """Of its tenant, and of its experiment; who holds nothing may have a first call."""
        tenant, flow = self._tenants[cost.caller.tenant], self._flows[cost.flow]
        share = self._share_of_tenant(cost.caller.tenant)
        parts = ((tenant, share), (flow, share / self._experiments[cost.caller.tenant]))
        return all(
            not held.anything
            or (
                (not cost.tokens or held.tokens + cost.tokens <= part * self.max_tokens)
                and held.num_bytes + cost.num_bytes <= part * self.max_bytes
            )
            for held, part in parts
        )

    def _share_of_tenant(self, tenant: str) -> float:
        """Of the whole budget: by weight among the tenants that want something."""
        if len(self._flows) <= 1:
            return 1.0
        return SHARED * self._weight_of(tenant) / sum(self._weight_of(each) for each in self._experiments)

    def _use(self, flow: Flow) -> float:
        held = self._flows[flow]
        share = self._share_of_tenant(flow[0]) / self._experiments[flow[0]]
        return max(held.tokens / self.max_tokens, held.num_bytes / self.max_bytes) / share

    def _ask(self, flow: Flow) -> None:
        """Notes that `flow` wants something, and forgets who long has not."""
        now = self._clock()
        if flow not in self._flows:
            self._flows[flow] = _Held(now)
            self._experiments[flow[0]] += 1
            self._tenants.setdefault(flow[0], _Held())
        self._flows[flow].asked_at = now
        self._flows.move_to_end(flow)
        while now - (oldest := next(iter(self._flows.items())))[1].asked_at > ACTIVE_S:
            if oldest[1].anything or oldest[0] in self._waiting:
                oldest[1].asked_at = now
                self._flows.move_to_end(oldest[0])
                continue
            del self._flows[oldest[0]]
            tenant = oldest[0][0]
            self._experiments[tenant] -= 1
            if not self._experiments[tenant]:
                del self._experiments[tenant], self._tenants[tenant]
                self._places.pop(tenant, None)

    def _delay_s(self, cost: Cost) -> float:
        """Seconds until the tenant's rate lets `cost` in; 0: it has."""
        tenant = cost.caller.tenant
        limit = self._rate_of(tenant)
        if limit is None or not cost.tokens:
            return 0.0
        rate = self._rates.setdefault(tenant, TokenRate(*limit))
        rate.tokens_per_s, rate.burst_tokens = limit
        return rate.ask(cost.tokens, cost.who, self._clock())

    def _add(self, cost: Cost) -> None:
        for one in (self, self._tenants[cost.caller.tenant], self._flows[cost.flow]):
            one.tokens += cost.tokens
            one.num_bytes += cost.num_bytes

    def _check(self, cost: Cost) -> None:
        if cost.tokens > self.max_tokens or cost.num_bytes > self.max_bytes:
            raise TooLarge(
                f"{cost.tokens} tokens and {cost.num_bytes} bytes of answer at once; this server accepts "
                f"{self.max_tokens} tokens and {self.max_bytes} bytes: send fewer completions, or fewer values of each"
            )

    def _full(self, cost: Cost) -> str:
        if not self._has_room(cost):
            return (
                f"{self.tokens} tokens are in work; {cost.tokens} more would pass the bound of {self.max_tokens} "
                f"tokens or {self.max_bytes} bytes of answers; come back later"
            )
        tenant = cost.caller.tenant
        share = self._share_of_tenant(tenant)
        return (
            f"{self._tenants[tenant].tokens} tokens of tenant {tenant!r} are in work, of its experiments' equal parts "
            f"in {int(share * self.max_tokens)} tokens and {int(share * self.max_bytes)} bytes of answers while others "
            f"want theirs, or were told to come back before; {cost.tokens} more do not fit now; come back later"
        )
