"""Prompts that are read when they are needed and not kept. A window of `shuffle_buffer` of them is read at a time and
given out in an order of its own; where each window begins is remembered, so that going back, and resuming, reads no
more than one window again.
"""

from __future__ import annotations

import bisect
import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from student_trainer.data.errors import DataError
from student_trainer.data.prompts import Longest, Prompts, digest_of, nothing_left, permuted
from student_trainer.data.reader import Dropped, Position, Reader, Source
from student_trainer.types import Prompt


@dataclass(frozen=True, slots=True)
class Window:
    """Where a window begins; how far it goes is found by reading it."""

    place: int  # of its first prompt in the endless sequence
    epoch: int
    number: int  # in its epoch
    position: Position  # in the source
    dropped: Dropped  # before it


class StreamSource(Prompts):
    """One source as a stream.

    Args:
        buffer: prompts of one window.
        longest: what the limits of the configuration allow.
    """

    def __init__(self, source: Source, *, buffer: int, shuffle: bool, longest: Longest) -> None:
        self.num_prompts = None
        self._source = source
        self._buffer = buffer
        self._shuffle = shuffle
        self.longest = longest
        self._windows = [Window(0, 0, 0, Position(), Dropped())]  # by place, ascending; not all have been read
        self._reader: Reader | None = None
        self._ordered: tuple[int, npt.NDArray[np.int64]] | None = None  # seed and order of the current window
        self._read(self._windows[0])
        if not self._held:
            raise DataError(nothing_left(source.config, self.dropped()))
        self._digest = digest_of(self._held)

    def take(self, start: int, count: int, seed: int) -> list[Prompt]:
        """Each window is given out in a random order, the next one follows; after the last of an epoch the source
        begins again."""
        prompts: list[Prompt] = []
        for place in range(start, start + count):
            self._go_to(place)
            prompts.append(self._held[self._order(seed)[place - self._at.place]])
        return prompts

    def digest(self) -> str:
        """Of the first window."""
        return self._digest

    def dropped(self) -> Dropped:
        """Up to the end of the window that was last read."""
        return self._at.dropped + self._reader_dropped

    def state(self, place: int, seed: int) -> dict[str, Any]:
        """Where the window that holds `place` begins, and a digest of it."""
        self._go_to(place)
        return {**dataclasses.asdict(self._at), "digest": digest_of(self._held)}

    def restore(self, state: dict[str, Any], *, verify: bool = True) -> None:
        """See Prompts.restore."""
        window = Window(
            place=state["place"],
            epoch=state["epoch"],
            number=state["number"],
            position=Position(**state["position"]),
            dropped=Dropped(**state["dropped"]),
        )
        self._reader = None
        self._read(window)
        if not self._held or (verify and digest_of(self._held) != state["digest"]):
            raise DataError(
                f"data.source {self._source.config.source} has changed: record {window.position.record} and what "
                "follows it are not what they were"
            )
        self._windows = [self._windows[0], window] if window.place else [window]

    def _go_to(self, place: int) -> None:
        """Makes the window that holds `place` the current one."""
        if place < self._at.place:
            known = bisect.bisect_right(self._windows, place, key=lambda window: window.place) - 1
            self._reader = None
            self._read(self._windows[known])
        while place >= self._at.place + len(self._held):
            self._read(self._following())

    def _order(self, seed: int) -> npt.NDArray[np.int64]:
        """Of the current window."""
        if self._ordered is None or self._ordered[0] != seed:
            at, number = self._at, self._source.number
            order = permuted(len(self._held), seed, at.epoch, number, at.number, shuffle=self._shuffle)
            self._ordered = (seed, order)
        return self._ordered[1]

    def _following(self) -> Window:
        """The window after the current one: in the next epoch where this one is at its end."""
        assert self._reader is not None, "a window has been read"
        at, place = self._at, self._at.place + len(self._held)
        if len(self._held) == self._buffer:
            return Window(place, at.epoch, at.number + 1, self._reader.position, self.dropped())
        if not self._held and at.number == 0:
            raise DataError(f"data.source {self._source.config.source}: there is nothing in it any more")
        self._reader = None
        return Window(place, at.epoch + 1, 0, Position(), self.dropped())

    def _read(self, window: Window) -> None:
        """Reads one window, which is the current one from then on."""
        if self._reader is None:
            self._reader = self._source.read(window.position)
        reader, before = self._reader, self._reader.dropped
        held: list[Prompt] = []
        for prompt in reader:
            held.append(prompt)
            if len(held) == self._buffer:
                break
        self._at, self._held = window, held
        self._ordered = None
        self._reader_dropped = Dropped(reader.dropped.prompts - before.prompts, reader.dropped.answers - before.answers)
        if window.place > self._windows[-1].place:
            self._windows.append(window)
