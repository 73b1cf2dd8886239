"""The one thread that touches a model in this process. Knows neither models nor jobs."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class ModelThread:
    """Runs work in the order it came, but for short work, which goes between the steps of long work: where that calls
    `between`, one piece of short work is done."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._short: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Short work."""
        future: Future[T] = Future()
        self._short.put((work, future))
        self._pool.submit(self.between)
        return future

    def submit_long(self, work: Callable[[], T]) -> Future[T]:
        return self._pool.submit(work)

    def between(self) -> None:
        """For long work, in this thread: does the oldest piece of short work, if there is one."""
        with suppress(queue.Empty):
            work, future = self._short.get_nowait()
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:  # handed to the caller, whatever it is
                future.set_exception(error)

    def close(self) -> None:
        """Waits for the work under way; what has not begun is cancelled."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        with suppress(queue.Empty):
            while True:
                self._short.get_nowait()[1].cancel()
