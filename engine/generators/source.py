"""Video-to-video: input frames, taken chunk by chunk, encoded, and noised to a middle step of the schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from engine.config import Preset
from engine.runtime.streams import SourceEnded
from engine.sampling.schedule import Schedule

_USUAL = 0.5  # strength; what the embedded model follows best
_FASTEST = 0.2  # difference of two frames in [-1, 1], root of the mean square, from which motion counts in full
_NEWEST = 0.9  # weight of the newest chunk in the moving average


def usual_strength(schedule: Schedule) -> float:
    """0.5, or the noise level of the schedule's last step where that is higher, as at shift 5."""
    last = schedule.last_level
    return max(_USUAL, last) if last < 0.99 else _USUAL  # refused: nothing is followed from noise alone


@dataclass(frozen=True)
class Intake:
    """What a stream has of its source before it makes a chunk. Only `frames` grows, as they are taken."""

    frames: list[np.ndarray] = field(default_factory=list)  # that no chunk has used
    cache: Any = None  # of the VAE's encoder
    last: np.ndarray | None = None  # the frame before these
    level: float | None = None  # the moving average of the noise level

    def restarted(self) -> Intake:
        """The same frames as the first ones of a video."""
        return Intake(self.frames)


@dataclass(frozen=True)
class Start:
    """Where a chunk begins: steps (t, next t), input latent [1, C, F, h, w], its noise level, and what is left."""

    steps: list[tuple[float, float | None]]
    latent: Tensor | None = None
    level: float = 1.0
    after: Intake = field(default_factory=Intake)

    def noised(self, noise: Tensor) -> Tensor:
        """x = (1 - sigma) latent + sigma noise, shaped as noise [B, C, F, h, w]; noise alone at the level 1."""
        if self.latent is None or self.level == 1:
            return noise
        return ((1 - self.level) * self.latent + self.level * noise).to(noise.dtype)


class Source:
    """Frames to follow, and how closely.

    strength     Chunks begin at the first step of the preset's schedule whose noise level (sigma) is at most this:
                 x = (1 - sigma) latent + sigma noise. The remaining steps follow. 1 begins with noise alone, as without
                 a source. The smaller it is, the closer the video stays to its source. None: usual_strength.
    noise_scale  How far motion lowers that first level, in sigma; None: not at all. With s_max, the level of the first
                 step, and d, the largest root-mean-square difference of two successive frames in [-1, 1] up to the
                 chunk's end, the level is s = 0.9 (s_max - noise_scale min(d / 0.2, 1)) + 0.1 s_before. More motion
                 gives less noise, so that fast objects stay where the source has them. The level lies between
                 s_max - noise_scale and s_max. Steps above it are left out.
                 (Motion-aware noise scheduler of StreamDiffusionV2, arXiv 2511.07399, section 4.1; its code has a span
                 of 0.1 below 0.7, scope 0.2 below 0.8.)
    """

    def __init__(
        self, frames: Iterable[np.ndarray], size: tuple[int, int], temporal: int, preset: Preset,
        strength: float | None = None, noise_scale: float | None = None,
    ) -> None:  # fmt: skip
        """size: height and width of a frame; temporal: frames per latent frame, after the first.

        ValueError for frames that are no iterable, and for numbers that do not fit the preset's schedule.
        """
        schedule = Schedule(preset)
        self.strength, self.noise_scale = usual_strength(schedule) if strength is None else strength, noise_scale
        self.check(schedule)
        if not isinstance(frames, Iterable):
            raise ValueError(f"source: got {type(frames).__name__}, expected an iterator of frames")
        self._preset, self._temporal, self._shape = preset, temporal, (*size, 3)
        self._frames = map(np.array, frames)  # copies: a camera may use its memory again

    def check(self, schedule: Schedule) -> None:
        """ValueError for a strength or a noise_scale that does not fit the schedule."""
        strength, noise_scale = self.strength, self.noise_scale
        if not 0 < strength <= 1:
            raise ValueError(f"strength: got {strength}, expected a number above 0, up to 1")
        if strength < (least := schedule.last_level):
            raise ValueError(f"strength: got {strength}, expected {least:.3g} to 1: the last step of this preset "
                             f"begins at the noise level {least:.3g}")  # fmt: skip
        lowest = min(schedule.level(chunk, strength) for chunk in range(schedule.rows))
        if noise_scale is not None and not 0 < noise_scale < lowest:
            raise ValueError(f"noise_scale: got {noise_scale}, expected a number above 0 and below {lowest:.3g}, "
                             "the noise level that chunks begin at")  # fmt: skip

    def take(self, intake: Intake, chunk: int) -> None:
        """Take the frames that a chunk lacks. SourceEnded if there are not enough; what was taken stays.

        ValueError for a wrong frame, which is left out.
        """
        need, frames = self._preset.pixel_frames(chunk, self._temporal), intake.frames
        # One call of C code takes and stores: no signal handler comes in between.
        frames.extend(islice(self._frames, max(0, need - len(frames))))
        for at, frame in enumerate(frames):
            if frame.shape != self._shape or frame.dtype != np.uint8:
                del frames[at]
                raise ValueError(f"source: got {frame.dtype} {list(frame.shape)}, expected uint8 {list(self._shape)}")
        if len(frames) < need:
            raise SourceEnded(f"source: got {len(frames)} frames before its end, expected {need} for the next chunk")

    def start(
        self, intake: Intake, chunk: int, schedule: Schedule, encode: Callable[[np.ndarray, Any], tuple[Tensor, Any]]
    ) -> Start:
        """Encode the frames of a chunk. It can be repeated: `intake` stays as it is.

        encode  (frames [T, H, W, 3], cache) -> latents, next cache
        """
        need = self._preset.pixel_frames(chunk, self._temporal)
        frames = np.stack(intake.frames[:need])
        latent, cache = encode(frames, intake.cache)
        average = self._average(frames, intake, schedule.level(chunk, self.strength))
        after = Intake(intake.frames[need:], cache, frames[-1], average)
        moved = None if self.noise_scale is None else average
        steps = schedule.steps(chunk, self.strength, moved)
        level = schedule.sigma(steps[0][0]) if self.strength < 1 or moved is not None else 1.0
        return Start(steps, latent, level, after)

    def _average(self, frames: np.ndarray, intake: Intake, highest: float) -> float:
        """The moving average of the noise level, this chunk included. highest: that of the chunk's first step."""
        if self.noise_scale is None:
            return highest
        pictures = [*([] if intake.last is None else [intake.last]), *frames]
        moves = np.diff(np.stack(pictures).astype(np.float32) / 127.5, axis=0)
        most = float(np.sqrt((moves**2).mean((1, 2, 3)).max(initial=0)))
        newest = highest - self.noise_scale * min(most / _FASTEST, 1.0)
        average = newest if intake.level is None else _NEWEST * newest + (1 - _NEWEST) * intake.level
        return min(max(average, highest - self.noise_scale), highest)  # the first step may have been changed meanwhile
