"""What a session is asked for, what it is told while it runs, and what it answers. Nothing here knows of a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.runtime.streams import Steps
from serve.core.encoders import Unit

Words = tuple[tuple[str, float], ...]  # texts and their weights; one text has weight 1


def shown(words: Words) -> str:
    """A prompt on one line."""
    return words[0][0] if len(words) == 1 else " + ".join(f"{weight:g} x {text}" for text, weight in words)


@dataclass(frozen=True)
class Change:
    """What a viewer changes from the next chunk on. None leaves a thing as it is."""

    event: str = ""  # its id
    prompt: Words | None = None
    transition: int = 0  # chunks over which the prompt reaches its target
    adapters: Mapping[str, float] | None = None
    paused: bool | None = None
    speed: float | None = None
    seed: int | None = None  # starts the video again, with this seed; where `reset` is False it goes on with it
    reset: bool | None = None  # starts it again, with the same one
    steps: Steps | None = None  # of the next chunks, as a preset has them
    window: int | None = None

    @property
    def restarts(self) -> bool:
        return bool(self.reset) or (self.seed is not None and self.reset is None)

    @property
    def settings(self) -> dict[str, Any]:
        """What the stream is told to change. A seed with which the video starts again is not among it."""
        seed = None if self.restarts else self.seed
        asked = {"seed": seed, "steps": self.steps, "window": self.window}
        return {name: value for name, value in asked.items() if value is not None}


@dataclass(frozen=True)
class Past:
    """A change of a video that is made again, at the number of its chunk."""

    chunk: int
    change: Change


@dataclass(frozen=True)
class Follow:
    """How closely a video follows the frames that its viewer sends; as `engine.generators.source.Source` has it."""

    strength: float | None = None
    noise_scale: float | None = None


@dataclass(frozen=True)
class Wish:
    """The video that a session makes."""

    prompt: Words
    seed: int = 0
    frames: int | None = None  # None: until it is stopped
    speed: float = 1.0  # 0: as fast as viewers take it
    clip: np.ndarray | None = None  # uint8 [T, H, W, 3] to start from
    adapters: Mapping[str, float] = field(default_factory=dict)
    history: tuple[Past, ...] = ()  # changes at chunks of this video, in their order
    skip: int = 0  # chunks that are made again, and not shown
    source: Follow | None = None  # follow the viewer's frames


@dataclass(frozen=True)
class Chunk:
    """A chunk as viewers get it."""

    number: int  # since the video began
    take: int  # how often the session has started the video again
    position: int  # of its first frame, since the session began
    frames: np.ndarray  # uint8 [T, H, W, 3], at the model's size
    units: tuple[Unit, ...]  # the same, in the viewer's codec; none for raw frames
    prompt: str
    started: tuple[str, ...]  # events that show first here
    active: tuple[str, ...]
    completed: tuple[str, ...]
    spent: float  # seconds to make it
    cpu: float  # CPU seconds of the session's thread in them
    due: float  # monotonic time at which its first frame is to be shown
    late: float  # seconds that it came too late
    speed: float = 1.0  # seconds of video per second
    skipped: int = 0  # frames that this viewer missed before it
    fragment: bytes = b""  # H.264: moof and mdat, and the ftyp and moov that stand before the first one
    init: bytes = b""


@dataclass(frozen=True)
class Notice:
    """Everything else that a viewer is told: `kind` and its fields."""

    kind: str  # waiting, start, progress, note, error, done
    about: Mapping[str, Any]


Item = Chunk | Notice
