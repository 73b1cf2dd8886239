"""How many tokens a tenant may have computed per second: a token bucket that makes appointments, so that who comes back
when told to is let in. Knows no queue and no clock: times are given.

Invariant: over any time t no more than `burst + rate · t` tokens are let in, but for one call that is larger than the
burst by itself; it waits until the bucket is full, and those after it until it is paid for.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

KEPT_S = 2.0  # for which an appointment is kept at least,
KEPT_SHARE = 0.5  # and as a share of the delay: callers come late on purpose, so as not to come all at once
MAX_APPOINTMENTS = 1024


@dataclass(frozen=True, slots=True)
class _Appointment:
    tokens: int
    at: float
    until: float


class TokenRate:
    def __init__(self, tokens_per_s: float, burst_tokens: float) -> None:
        self.tokens_per_s = tokens_per_s
        self.burst_tokens = burst_tokens
        self._paid_at = float("-inf")  # when what was let in is paid for
        self._appointments: dict[Hashable, _Appointment] = {}

    def ask(self, tokens: int, who: Hashable, now: float) -> float:
        """0: `tokens` were let in. Otherwise the seconds after which `who` will be let in with as many."""
        self._appointments = {key: one for key, one in self._appointments.items() if one.until >= now}
        own = self._appointments.get(who)
        if own is not None and own.tokens == tokens:
            if now < own.at:
                return own.at - now
            del self._appointments[who]
            self._let_in(tokens, now)
            return 0.0
        promised = sum(one.tokens for one in self._appointments.values())
        room = max(self.burst_tokens, tokens)
        at = max(self._paid_at, now) + (promised + tokens - room) / self.tokens_per_s
        if at <= now:
            self._let_in(tokens, now)
            return 0.0
        if len(self._appointments) < MAX_APPOINTMENTS:
            self._appointments[who] = _Appointment(tokens, at, at + max(KEPT_S, KEPT_SHARE * (at - now)))
        return at - now

    def _let_in(self, tokens: int, now: float) -> None:
        self._paid_at = max(self._paid_at, now) + tokens / self.tokens_per_s
