"""What a stream keeps between two calls beside its caches; each value is replaced as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from engine.runtime.blending import Course
from engine.runtime.handover import Progress
from engine.runtime.streams import Serial
from engine.runtime.transfer import Download


@dataclass(frozen=True)
class Waiting:
    """A chunk that is decoded, and that no call has returned yet."""

    shown: Download
    vae_cache: Any  # the next chunk's
    before: StreamProgress


@dataclass(frozen=True)
class StreamProgress(Progress):
    course: Course = field(kw_only=True)  # of the prompt of the chunk that was made last
    supplied: tuple[Tensor, ...] = ()  # chunks of the clip to start from, the next one first
    made: int = 0  # chunks made: the number of the next one
    uncommitted: tuple[Tensor, bool] | None = None  # the last of them, and whether it was supplied
    vae_cache: Any = None
    waiting: Waiting | None = None
    started: int = 0  # frames of the chunks whose decoding has begun
    intake: Any = None  # what there is of the source's frames, if there is a source
    rest: tuple[np.ndarray, Serial] | None = None  # what the iterator has left of its chunk, never empty

    @property
    def prompt(self) -> int:
        """The number of the prompt of the chunk that was made last."""
        return self.course.to.number
