"""Calls of the function that plays the environment: which one it is, in threads of their own, with a limit on time, and
what it may answer. Knows nothing of tokens.
"""

from __future__ import annotations

import difflib
import inspect
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Any

from student_trainer.imports import import_function
from student_trainer.types import Message

BUILT_IN = {"calculator": "student_trainer.rollout.calculator:calculator"}
KEY = "rollout.environment"
MOST_AT_ONCE = 16
"""Calls in flight; the others wait their turn, and their time does not run."""
STUDENT = "assistant"
"""The role of the student's own turns."""

Function = Callable[..., Any]


class EnvironmentFailed(ValueError):
    """It raised, took too long or gave what is no list of messages; the message says which."""


def function_of(name: str) -> Function:
    """The function that a name of the configuration means.

    Raises:
        ValueError: there is none.
    """
    if ":" not in name and name not in BUILT_IN:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"unknown environment {name!r}; {meant}Known: {', '.join(BUILT_IN)}, or package.module:function "
            "for your own"
        )
    return import_function(BUILT_IN.get(name, name))


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError where the function does not take these options."""
    try:
        signature = inspect.signature(function_of(name))
    except ValueError:  # a callable that has none to look at
        return
    try:
        signature.bind([], **options)
    except TypeError as error:
        raise ValueError(
            f"environment_options: got {dict(options)}, expected what {name} takes beside the messages: {error}"
        ) from None


class Calls:
    """The environment's calls, begun in the order given.

    Args:
        timeout_s: longest time of one call.
    """

    def __init__(self, function: Function, options: Mapping[str, Any], timeout_s: float) -> None:
        self._function, self._options, self._timeout_s = function, dict(options), timeout_s
        self._queue: SimpleQueue[Call | None] = SimpleQueue()
        self._num_threads = 0

    def begin(self, messages: Sequence[Message]) -> Call:
        """Asks for what follows on `messages`, of which the function gets a copy."""
        call = Call(self._function, [dict(m) for m in messages], self._options, self._timeout_s)
        self._queue.put(call)
        if self._num_threads < MOST_AT_ONCE:
            self._num_threads += 1
            # A daemon: a call that never returns must not keep the process from ending.
            threading.Thread(target=self._work, name=f"environment-{self._num_threads}", daemon=True).start()
        return call

    def close(self) -> None:
        for _ in range(self._num_threads):
            self._queue.put(None)
        self._num_threads = 0

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            call.run()


class Call:
    """One call, from when it is asked for to its answer."""

    def __init__(
        self, function: Function, messages: list[dict[str, str]], options: Mapping[str, Any], timeout_s: float
    ) -> None:
        self._function, self._messages, self._options = function, messages, options
        self._timeout_s = timeout_s
        self._began, self._done = threading.Event(), threading.Event()
        self._began_at = 0.0
        self._answer: Any = None
        self._failure = ""

    def run(self) -> None:
        self._began_at = time.monotonic()
        self._began.set()
        try:
            self._answer = self._function(self._messages, **self._options)
        except BaseException as error:  # of somebody else's function, sys.exit() included
            self._failure = _told(error)
        finally:
            self._done.set()

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    def answer(self) -> list[Message]:
        """The messages to append; none where the conversation is over. Calls that began earlier are waited for first.

        Raises:
            EnvironmentFailed: see there.
        """
        if not self._began.wait(self._timeout_s):
            raise EnvironmentFailed(f"not begun within {KEY}_timeout_s {self._timeout_s:g}: earlier calls hang")
        if not self._done.wait(max(0.0, self._began_at + self._timeout_s - time.monotonic())):
            raise EnvironmentFailed(f"no answer within {KEY}_timeout_s {self._timeout_s:g}")
        if self._failure:
            raise EnvironmentFailed(self._failure)
        return _checked(self._answer)


def _checked(answer: Any) -> list[Message]:
    if answer is None:
        return []
    if not isinstance(answer, list | tuple):
        raise EnvironmentFailed(
            f"returned {type(answer).__name__}, expected a list of messages, or nothing to end the conversation"
        )
    for number, message in enumerate(answer):
        fields = dict(message) if isinstance(message, Mapping) else {}
        whole = {"role", "content"} <= fields.keys() and all(
            isinstance(x, str) for pair in fields.items() for x in pair
        )
        if not whole or not fields["role"]:
            raise EnvironmentFailed(
                f"returned message {number} {message!r:.80}, expected text in `role`, `content` and all else"
            )
        if fields["role"] == STUDENT:
            raise EnvironmentFailed(
                f"returned message {number} with role {STUDENT}, expected another: it is the student's"
            )
    return [dict(message) for message in answer]


def _told(error: BaseException) -> str:
    """The exception and the place in the environment that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    message = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {message} ({last.filename}:{last.lineno})"
