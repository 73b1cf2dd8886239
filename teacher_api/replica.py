"""One server of several with the same teacher, as its client sees it: whether it is up, how much it has to do, and how
carefully it is to be asked after it was away. Asks nothing itself; replicas.py does.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from teacher_api.endpoints import Endpoint
from teacher_api.transport import Transport

PROBE_FIRST_S, PROBE_MAX_S = 0.1, 5.0
"""Pauses before a server that is away is looked at again: they double, and each is random from half to one and a half
times that, so that the clients of one server don't come back together."""
OPEN_WINDOW = 64
"""Calls at a time from which on a server that came back is asked as before."""


@dataclass(eq=False, slots=True)
class Replica:
    """`down`: why it is asked for nothing; empty: it is up. `away`: how often it went without having done anything in
    between. `window`: calls at a time after it came back, doubled by each that succeeds; None: any number."""

    endpoint: Endpoint
    transport: Transport
    down: str = ""
    away: int = 0
    window: int | None = None
    tokens: int = 0  # asked for and not answered
    calls: int = 0
    busy_until: float = 0.0  # event-loop time before which it does not want to be asked
    removed: bool = False  # its name has another address now: it ends what it has
    fingerprints: dict[str, str] = field(default_factory=dict)  # by teacher, as it last said

    @property
    def is_free(self) -> bool:
        """Whether it can be asked for something now."""
        return not self.down and not self.removed and (self.window is None or self.calls < self.window)

    def goes(self, why: str) -> None:
        self.down = why
        self.away += 1

    def comes_back(self, *, was_away: bool) -> None:
        """It answers. Unless only a connection had broken, one call finds out whether it also works, then two, then
        four at a time."""
        self.down, self.busy_until = "", 0.0
        if was_away:
            self.window = 1

    def worked(self) -> None:
        self.away = 0
        if self.window is not None:
            self.window = None if self.window >= OPEN_WINDOW else 2 * self.window

    def pause_s(self, tries: int) -> float:
        """Before the next look at it, after so many that failed; none before the first, for a server that worked."""
        steps = tries + self.away - 2
        if steps < 0:
            return 0.0
        return min(PROBE_FIRST_S * 2.0 ** min(steps, 16), PROBE_MAX_S) * random.uniform(0.5, 1.5)
