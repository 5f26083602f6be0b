"""What a session shows: the engine's stream, the changes that act on it, and their history to make it again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from engine.bundles.native import NativePipeline
from engine.media.live import LiveFrames
from engine.runtime.streams import Stream
from engine.stream import Pipeline
from serve.core.messages import Change, Notice, Past, Wish, Words, shown
from serve.core.prompts import Direction, check_words, note_of, prompt_of

OUT_OF_MEMORY = (MemoryError, torch.cuda.OutOfMemoryError)
Turn = Callable[[float | None], AbstractContextManager[None]]


@dataclass(frozen=True)
class Made:
    """A chunk as the video has made it."""

    number: int  # since the video began
    take: int  # how often it has started again
    frames: np.ndarray  # uint8 [T, H, W, 3]
    prompt: str
    started: tuple[str, ...]  # events that show first here
    active: tuple[str, ...]
    completed: tuple[str, ...]
    spent: float  # seconds
    cpu: float  # CPU seconds of the session's thread in them


class Video:
    """A stream, and what it is told. One thread uses it.

    turn  gives a block in which the stream may compute, by a deadline; None is the session's own next one
    tell  gives every viewer a notice
    """

    def __init__(
        self, pipeline: Pipeline | NativePipeline, wish: Wish, turn: Turn, tell: Callable[[Notice], None]
    ) -> None:  # fmt: skip
        self.wish = wish
        self.history: list[Past] = []  # changes since the video began
        self.take = self.number = self.frames = 0  # number of the next chunk, frames made so far, both of this take
        self._pipeline, self._turn, self._tell = pipeline, turn, tell
        self._stream: Stream | None = None
        self._settings: dict[str, Any] = {}  # seed, steps and window that were changed since the video began
        self._direction = self._reached = Direction(wish.prompt)  # _reached: of the chunk made last
        self._started: list[str] = []  # events that show with the next chunk
        self.input: LiveFrames | None = None  # what the video follows
        if wish.source is not None:
            assert isinstance(pipeline, Pipeline)
            room = pipeline.preset.pixel_frames(1, pipeline.temporal)
            self.input = LiveFrames(pipeline.fps, room)

    @property
    def _running(self) -> Stream:
        assert self._stream is not None  # between `begin` and `close`
        return self._stream

    @property
    def seed(self) -> int:
        """The one that the video began with."""
        return self.wish.seed

    @property
    def prompt(self) -> str:
        """The active prompt on one line."""
        return shown(self._direction.words)

    @property
    def finished(self) -> bool:
        """Whether all frames of the wish are made, or the input has ended."""
        ended = self.input is not None and self.input.closed and self._lacks > 0
        return ended or (self.wish.frames is not None and self.frames >= self.wish.frames)

    @property
    def hungry(self) -> bool:
        """Whether the next chunk lacks frames of its input."""
        return self.input is not None and self._lacks > 0

    @property
    def _lacks(self) -> int:
        assert isinstance(self._pipeline, Pipeline)
        assert self.input is not None
        need = self._pipeline.preset.pixel_frames(self.number, self._pipeline.temporal)
        return need - self.input.waiting

    def begin(self) -> None:
        """Open the stream of the wish."""
        wish, prompt = self.wish, prompt_of(self.wish.prompt)
        self.close()  # first, so that the new one has the memory
        with self._turn(None):
            begin = partial(self._pipeline.stream, prompt, seed=wish.seed, frames=wish.frames, clip=wish.clip)
            if wish.source is not None:
                begin = partial(begin, source=self.input, **vars(wish.source))
            self._stream = begin()
            if wish.adapters:
                self._stream.set_adapters(wish.adapters)
        self._direction = self._reached = Direction(wish.prompt)
        self._settings, self.number, self.frames, self.history = {}, 0, 0, []
        self._note(wish.prompt)

    def close(self, release: bool = False) -> None:
        """Close the stream, if one is open; `release` gives its memory back to the device."""
        stream, self._stream = self._stream, None
        if stream is None and not release:
            return
        with self._turn(time.monotonic()):
            if stream is not None:
                stream.close()
            del stream
            if release:
                _release()

    def forget(self) -> None:
        """Let go what only a running video needs."""
        self.wish = replace(self.wish, clip=None)
        self._direction = self._reached = Direction(self._direction.words)

    def apply(self, change: Change) -> bool:
        """Change what is shown from the next chunk on. What the stream refuses is told and leaves it as it was: False.

        An error of a restart itself is raised: the old video is gone.
        """
        settings, adapters, prompt = change.settings, change.adapters, change.prompt
        try:
            if prompt is not None:
                check_words(prompt)
            with self._turn(None) if settings or adapters is not None else nullcontext():
                self._set(settings, adapters)
        except (ValueError, *OUT_OF_MEMORY) as error:
            self._refused(change.event, error)
            return False
        self._settings |= settings
        if adapters is not None:  # a restart keeps them, as it keeps the prompt
            self.wish = replace(self.wish, adapters={**self.wish.adapters, **adapters})
        if change.restarts:
            self._restart(change)
        else:
            if prompt is not None:
                self._turn_to(prompt, change)
            self._remember(change)
        if change.event:
            self._started.append(change.event)
        return True

    def _set(self, settings: Mapping[str, Any], adapters: Mapping[str, float] | None) -> None:
        """Change settings and adapters of the stream, both or neither."""
        stream = self._running
        if settings:
            stream.change(**settings)
        if adapters is None:
            return
        try:
            stream.set_adapters(adapters)
        except (ValueError, *OUT_OF_MEMORY):
            if settings:
                preset = self._pipeline.preset
                own: dict[str, Any] = {"seed": self.seed, "steps": preset.steps, "window": preset.window}
                before = own | self._settings
                stream.change(**{name: before[name] for name in settings})
            raise

    def _remember(self, change: Change) -> None:
        """Note what lasts of a change in the history. Settings of one chunk are one entry."""
        settings = change.settings
        if change.prompt is None and change.adapters is None and not settings:
            return
        if self.history and self.history[-1].chunk == self.number and change.prompt is None and change.adapters is None:
            last = self.history.pop().change
            lasting = replace(last, **settings)
        else:
            lasting = replace(change, paused=None, speed=None, seed=settings.get("seed"), reset=False)
        self.history.append(Past(self.number, lasting))

    def next(self, deadline: float | None = None) -> Made:
        """Make the next chunk."""
        with self._turn(deadline):
            begun, used = time.monotonic(), time.thread_time()
            moving = self._steer()
            frames = self._running.next_chunk()
            spent, cpu = time.monotonic() - begun, time.thread_time() - used
        if self.wish.frames is not None:
            frames = frames[: self.wish.frames - self.frames]
        direction = self._direction
        event = (direction.event,) if moving and direction.event else ()
        started = tuple(self._started)
        others = tuple(one for one in started if one not in event)
        done = (*others, *(event if not direction.moving else ()))
        active = tuple(dict.fromkeys((*started, *event)))
        made = Made(self.number, self.take, frames, self.prompt, started, active, done, spent, cpu)
        self.number, self.frames = self.number + 1, self.frames + len(frames)
        return made

    def saw(self) -> None:
        """The chunk that was made last is shown, and with it the events that it started."""
        self._started.clear()

    def _restart(self, change: Change) -> None:
        """Begin the video again."""
        words, kept = change.prompt or self._direction.words, self._settings
        seed = kept.pop("seed", self.seed) if change.seed is None else change.seed
        self.wish = replace(self.wish, prompt=words, seed=seed)
        self.begin()
        if kept := {name: value for name, value in kept.items() if name != "seed"}:
            with self._turn(None):
                self._running.change(**kept)
            self._settings = kept
            self.history.append(Past(0, Change(reset=False, **kept)))
        if self.wish.adapters:
            self.history.append(Past(0, Change(adapters=self.wish.adapters)))
        self.take += 1

    def _turn_to(self, words: Words, change: Change) -> None:
        if (unseen := self._direction.event) and unseen in self._started:
            self._started.remove(unseen)
            message = "this prompt has no effect: a newer one came before the next chunk"
            self._tell(Notice("note", {"message": message, "event_id": unseen}))
        if self._direction is not self._reached:
            self._forget_prompt()
        self._direction = Direction(words, change.event, max(change.transition, 1), 0)
        self._note(words)

    def _steer(self) -> bool:
        """Give the stream the prompt of its next chunk; whether that is one on the way to a new target."""
        direction = self._direction
        if not direction.moving:
            self._reached = direction
            return False
        if not direction.made:  # else the stream is on its way
            try:
                self._running.set_prompt(prompt_of(direction.words), transition=direction.transition)
            except (ValueError, FloatingPointError, *OUT_OF_MEMORY) as error:
                # A call that fails changes nothing: the stream still follows the prompt of its last chunk.
                before = self._reached
                self._direction = self._reached = before.later()
                self._started = [one for one in self._started if one != direction.event]
                self._forget_prompt()
                self._refused(direction.event, error)
                return before.moving
        self._direction = self._reached = direction.later()
        return True

    def _forget_prompt(self) -> None:
        """Take the newest prompt out of the history, as no chunk shows it."""
        for place in reversed(range(len(self.history))):
            past = self.history[place]
            if past.change.prompt is not None:
                rest = replace(past.change, prompt=None)
                lasts = rest.adapters is not None or rest.settings
                self.history[place : place + 1] = [Past(past.chunk, rest)] if lasts else []
                return

    def _note(self, words: Words) -> None:
        if note := note_of(self._pipeline, words):
            self._tell(Notice("note", {"message": note}))

    def _refused(self, event: str, error: BaseException) -> None:
        self._tell(Notice("error", {"code": "interaction_failed", "event_id": event, "message": line_of(error)}))


def line_of(error: BaseException) -> str:
    """An error on one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _release() -> None:
    """Give freed memory back to the device, so that a smaller stream can have it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
