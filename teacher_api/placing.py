"""Which of several equal servers a request goes to. Requests that share a prompt go to one server, which computes it
once and has it in its caches; different ones are divided by the tokens that each server has to do.

New prompts are placed by rendezvous hashing with bounded loads (Thaler and Ravishankar 1998; Mirrokni, Thorup and
Zadimoghaddam 2018): every client and every epoch sends a prompt to the same server, unless that has much more than the
others to do.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from teacher_api.replica import Replica
from teacher_api.v1 import teacher_pb2 as pb

BOUND = 1.25
"""Times the mean of all servers' tokens that one may have for a new prompt to be placed there."""
MOVE_TOKENS = 1 << 17
"""More than the least busy server has, at which a prompt leaves the server that it was on."""
REMEMBERED = 4096  # prompts, the last used
GROUP_REQUESTS, GROUP_S = 64, 60.0
"""A prompt of more requests than that, with no longer pause between them, is everybody's and no group's: its requests
are divided as if they had nothing in common."""


def num_tokens(request: pb.ScoreRequest) -> int:
    """Of all sequences, a shared prompt counted once."""
    return sum(_length(prompt) for prompt in request.prompts) + sum(_length(c.token_ids) for c in request.completions)


def _length(array: pb.Array) -> int:
    return array.shape[0] if array.shape else 0


def groups_of(request: pb.ScoreRequest) -> list[bytes]:
    """What requests have in common that should meet on one server: their prompts, or without any their first tokens."""
    shared = request.prompts or [completion.token_ids for completion in request.completions[:1]]
    return [hashlib.blake2b(array.data, digest_size=16).digest() for array in shared]


@dataclass(slots=True)
class _Home:
    replica: Replica
    requests: int = 0
    used_at: float = 0.0


class Placing:
    """Remembers where prompts are."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._homes: OrderedDict[bytes, _Home] = OrderedDict()
        self._clock = clock

    def choose(self, replicas: Sequence[Replica], groups: Sequence[bytes], tokens: int) -> Replica:
        """One of `replicas`, of which there is at least one."""
        least = min(replica.tokens for replica in replicas)
        homes = [self._homes[group] for group in groups if group in self._homes]
        settled = (home.replica for home in homes if home.requests < GROUP_REQUESTS)
        chosen = next((r for r in settled if r in replicas and r.tokens <= least + MOVE_TOKENS), None)
        chosen = chosen or self._placed(replicas, groups[0] if groups else b"", tokens)
        now = self._clock()
        for group in groups:
            home = self._homes.setdefault(group, _Home(chosen))
            home.requests = home.requests + 1 if now - home.used_at <= GROUP_S else 1
            home.replica, home.used_at = chosen, now
            self._homes.move_to_end(group)
        while len(self._homes) > REMEMBERED:
            self._homes.popitem(last=False)
        return chosen

    def forget(self, replica: Replica) -> None:
        for group in [group for group, home in self._homes.items() if home.replica is replica]:
            del self._homes[group]

    @staticmethod
    def _placed(replicas: Sequence[Replica], group: bytes, tokens: int) -> Replica:
        least = min(replica.tokens for replica in replicas)
        limit = BOUND * (sum(replica.tokens for replica in replicas) + tokens) / len(replicas)
        order = sorted(replicas, key=lambda replica: _weight(replica, group))
        return next(r for r in order if r.tokens == least or r.tokens + tokens <= limit)


def _weight(replica: Replica, group: bytes) -> bytes:
    return hashlib.blake2b(group + str(replica.endpoint).encode(), digest_size=8).digest()
