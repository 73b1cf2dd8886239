"""How much work is accepted: one budget of tokens and one of answer bytes. Work over the budget is refused with a
time to come back (unary calls) or waits its turn in order (streams, which stop reading meanwhile). Bodies that are
still being received have a budget of their own."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from teacher_api.errors import Overloaded, TooLarge

RETRY_AFTER_S = (0.05, 60.0)
RETRY_AFTER_UNKNOWN_S = 1.0  # before the first batch tells how fast this teacher is, and for what it does not tell


@dataclass(frozen=True, slots=True)
class Cost:
    tokens: int
    num_bytes: int


class Admission:
    def __init__(self, max_tokens: int, max_bytes: int, tokens_per_s: Callable[[], float]) -> None:
        self.max_tokens = max_tokens
        self.max_bytes = max_bytes
        self.tokens = 0
        self.num_bytes = 0
        self._tokens_per_s = tokens_per_s
        self._waiting: deque[tuple[Cost, asyncio.Future[None]]] = deque()

    @property
    def share(self) -> float:
        """Of the budget that is taken, 0 to 1."""
        return max(self.tokens / self.max_tokens, self.num_bytes / self.max_bytes)

    def take(self, cost: Cost) -> None:
        """Takes `cost` at once. Raises Overloaded when it doesn't fit now, TooLarge when it never will."""
        self._check(cost)
        if not self._fits(cost):
            raise Overloaded(
                f"{self.tokens} tokens are in work; {cost.tokens} more would pass the bound of {self.max_tokens} "
                f"tokens or {self.max_bytes} bytes of answers; come back later",
                retry_after_s=self._retry_after_s(cost),
            )
        self._add(cost)

    async def wait(self, cost: Cost) -> None:
        """Takes `cost` when there is room, first come first served. Raises TooLarge when it never will fit."""
        self._check(cost)
        if not self._waiting and self._fits(cost):
            self._add(cost)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = (cost, turn)
        self._waiting.append(place)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(cost)  # it was granted in the moment of the cancellation
            else:
                self._waiting.remove(place)
                self._grant()
            raise

    def give(self, cost: Cost) -> None:
        self.tokens -= cost.tokens
        self.num_bytes -= cost.num_bytes
        assert self.tokens >= 0, "more was given back than taken"
        assert self.num_bytes >= 0, "more was given back than taken"
        self._grant()

    def _grant(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            cost, turn = self._waiting.popleft()
            if not turn.done():
                self._add(cost)
                turn.set_result(None)

    def _fits(self, cost: Cost) -> bool:
        return self.tokens + cost.tokens <= self.max_tokens and self.num_bytes + cost.num_bytes <= self.max_bytes

    def _add(self, cost: Cost) -> None:
        self.tokens += cost.tokens
        self.num_bytes += cost.num_bytes

    def _check(self, cost: Cost) -> None:
        if cost.tokens > self.max_tokens or cost.num_bytes > self.max_bytes:
            raise TooLarge(
                f"{cost.tokens} tokens and {cost.num_bytes} bytes of answer at once; this server accepts "
                f"{self.max_tokens} tokens and {self.max_bytes} bytes: send fewer completions, or fewer values of each"
            )

    def _retry_after_s(self, cost: Cost) -> float:
        rate = self._tokens_per_s()
        if rate <= 0:
            return RETRY_AFTER_UNKNOWN_S
        excess = max(self.tokens + cost.tokens - self.max_tokens, cost.tokens)
        low, high = RETRY_AFTER_S
        return min(max(excess / rate, low), high)


class Receiving:
    """Bytes of request bodies that are being received, over all connections. What has come counts, not what was
    announced: a caller that announces much and sends nothing keeps nobody out."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0

    @contextlib.contextmanager
    def body(self, announced: int) -> Iterator[Callable[[int], None]]:
        """Around the receiving of one body. Gives what must be called with the size of each piece that came.

        Raises:
            Overloaded: there is no room for a body of `announced` bytes, or for the piece.
        """
        held = 0

        def came(num_bytes: int) -> None:
            nonlocal held
            self._check(num_bytes)
            held += num_bytes
            self.num_bytes += num_bytes

        self._check(announced)
        try:
            yield came
        finally:
            self.num_bytes -= held

    def _check(self, more: int) -> None:
        if self.num_bytes + more > self.max_bytes:
            raise Overloaded(
                f"{self.num_bytes} bytes of request bodies are being received; {more} more would pass the bound of "
                f"{self.max_bytes}; come back later",
                retry_after_s=RETRY_AFTER_UNKNOWN_S,
            )
