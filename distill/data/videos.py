"""Clips of equal size cut from videos: decoded frame by frame, so that no more than one clip is in memory."""

from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.media.clips import frames_at


@dataclass(frozen=True)
class Cut:
    """How clips are cut. A video's clips begin at its frames 0, stride, 2 stride, ... at `fps`.

    most   clips per video; 0: as many as fit
    crop   scale to cover and crop in the middle; else stretch
    """

    frames: int
    height: int
    width: int
    fps: float
    stride: int
    most: int
    crop: bool


def clips_of(path: Path, cut: Cut) -> Iterator[np.ndarray]:
    """The clips of a video: uint8 [frames, height, width, 3].

    ValueError or FileNotFoundError for a video that is too short, or damaged before the end of the last wanted clip.
    """
    kept: deque[np.ndarray] = deque(maxlen=cut.frames)
    made = seen = 0
    with closing(frames_at(path, cut.height, cut.width, cut.fps, crop=cut.crop)) as frames:
        for seen, frame in enumerate(frames, 1):
            kept.append(frame)
            begin = seen - cut.frames
            if begin >= 0 and begin % cut.stride == 0:
                yield np.stack(kept)
                made += 1
                if made == cut.most:
                    return
    if not made:
        raise ValueError(f"video: got {path}, {seen} frame{'s' * (seen != 1)} at {cut.fps:g} fps, "
                         f"expected at least {cut.frames}")  # fmt: skip
