"""Handing results to a caller who may be interrupted anywhere, and one call of an object at a time."""

from __future__ import annotations

import asyncio
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, Self, TypeVar, cast

import numpy as np

from engine.runtime.streams import Cancelled, Serial, SourceEnded, check_process

P = TypeVar("P", bound="Progress")


@dataclass(frozen=True)
class Progress:
    """What calls change. A call assigns the next value as its last act, so an interrupted one changes nothing."""

    handed: int = 0  # results returned so far
    last: Any = None  # the newest of them
    serial: Serial | None = None  # of `last`
    emitted: int = 0  # frames returned by the iterator


class _Turn:
    """A call that runs, and at most one call after it: dict.setdefault is atomic."""

    def __init__(self, frame: FrameType | None) -> None:
        self.frame = frame  # that ends with the call; None once the turn is over
        self.next: dict[str, _Turn] = {}

    def runs(self) -> bool:
        """Whether the call is under way. Its frame tells: a walk over another thread's stack can miss frames."""
        if (frame := self.frame) is None:
            return False
        try:
            frame.clear()
        except RuntimeError:  # "cannot clear an executing frame"
            return True
        self.frame = None  # it would keep its callers, and what they hold
        return False


class Turns:
    """Lets one call at a time use an object. It never waits: a second one, from any thread, gets a ValueError.

    An interrupt can keep a call from giving its turn back. Unlike a lock, the turn then ends with the call's frame.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        self._last = _Turn(None)

    def take(self, frame: FrameType) -> None:
        """Take the turn until `frame` gives it back or ends. ValueError if another call has it, or after a fork."""
        check_process(self.process)
        turn, mine = self._last, _Turn(frame)
        while turn is not mine:
            if turn.runs():
                del turn, mine  # the error may be kept, and would keep every later turn
                raise ValueError("stream: got a call while another one runs, expected one at a time")
            turn = turn.next.setdefault("turn", mine)
        self._last = mine

    def give_back(self, frame: FrameType) -> None:
        """End the turn of `frame`, if it has it."""
        if self._last.frame is frame:
            self._last.frame = None

    @property
    def free(self) -> bool:
        """Whether no call runs."""
        turn = self._last
        while (later := turn.next.get("turn")) is not None:
            turn = later
        return not turn.runs()

    def __enter__(self) -> None:
        self.take(sys._getframe(1))

    def __exit__(self, *_: object) -> None:
        self.give_back(sys._getframe(1))


class HandsOver(ABC):
    """A stream whose calls hand over a result or change nothing, wherever KeyboardInterrupt comes.

    One place is out of its reach: between the call's return and the caller's assignment. There the caller finds the
    result in `last`:

        before = stream.handed
        try:
            chunk = stream.next_chunk()
        except KeyboardInterrupt:
            if stream.handed > before:
                chunk = stream.last
    """

    _now: Progress
    limit: int | None

    def __init__(self, progress: Progress) -> None:
        self._now, self._turns, self._closed = progress, Turns(), False

    @property
    def handed(self) -> int:
        """Number of results that calls have returned: chunks, latents, the iterator's frames."""
        return self._now.handed

    @property
    def last(self) -> Any:
        """The result that was returned last. It stays until another one is returned, also in a closed stream."""
        return self._now.last

    @property
    def serial(self) -> Serial | None:
        """Frame, chunk and prompt of `last`, counted from 0; None before. `rest` tells those of its first frame."""
        return self._now.serial

    @property
    def emitted(self) -> int:
        """Frames returned by the iterator since the start or the last flush."""
        return self._now.emitted

    @abstractmethod
    def cancel(self) -> None:
        """Make the call that runs, or else the next one that has a chunk to make, raise Cancelled once."""

    @abstractmethod
    def close(self) -> None:
        """Drop caches and frames, and end the stream."""

    @abstractmethod
    def _ready_frame(self) -> tuple[np.ndarray, Any]:
        """The iterator's next frame, and the progress after it."""

    @abstractmethod
    def _decode_ahead(self) -> None:
        """Make the iterator's next frame, unless it is there, and leave it to the next call."""

    @abstractmethod
    def _uncancel(self) -> None:
        """Take back a cancel that has not acted."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        if self._over:
            raise StopIteration
        try:
            return self._hand_over(self._ready_frame)
        except SourceEnded:
            raise StopIteration from None

    @property
    def _over(self) -> bool:
        return self._closed or (self.limit is not None and self.emitted >= self.limit)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> np.ndarray:
        """The next frame. A thread makes it, so the event loop stays free.

        If the task is cancelled, the call ends within a step, and no frame is lost.
        """
        if self._over:
            raise StopAsyncIteration
        making = asyncio.ensure_future(asyncio.to_thread(self._decode_ahead))
        try:
            await asyncio.shield(making)
        except SourceEnded:
            raise StopAsyncIteration from None
        except asyncio.CancelledError:
            self.cancel()
            while not making.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([making])
            if making.cancelled() or not isinstance(making.exception(), Cancelled):
                self._uncancel()
            raise
        try:
            return next(self)
        except StopIteration:  # it was closed meanwhile
            raise StopAsyncIteration from None

    def _hand_over(self, ready: Callable[[], tuple[Any, P]]) -> Any:
        """Return the result of ready() -> (result, progress after it), and make that progress.

        `ready` gives the same result again if it is called again.
        """
        before = None
        self._turns.take(sys._getframe())  # no variable holds the frame: it would keep itself, and all caches, alive
        try:
            result, after = ready()
            after = replace(after, handed=self._now.handed + 1, last=result)
            before = self._now
            self._now = cast(Progress, after)  # before another thread may take its turn
            self._turns.give_back(sys._getframe())
            # Python runs signal handlers at calls and loops only: none comes between these lines.
            return result
        except BaseException:
            if before is not None:
                self._now = before
            self._turns.give_back(sys._getframe())
            raise
