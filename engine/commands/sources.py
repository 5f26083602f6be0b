"""--source: where the frames come from that a video follows."""

import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.commands.job import Video
from engine.media.clips import frames_at, piped_frames
from engine.media.inputs import check_file
from engine.media.live import LiveFrames, camera, device_of


@dataclass
class Followed:
    """The source of a run."""

    frames: Generator[np.ndarray, None, None] | LiveFrames
    notes: list[str]  # grows while frames are read

    def close(self) -> None:
        """End its thread, or close its file."""
        self.frames.close()
        if isinstance(self.frames, LiveFrames):
            self.notes.append(self.frames.told())

    @property
    def report(self) -> dict[str, int] | None:
        """What a live source lost; None for a file, of which every frame is used."""
        if not isinstance(self.frames, LiveFrames):
            return None
        return {"taken": self.frames.taken, "dropped": self.frames.dropped, "repeated": self.frames.repeated}


def check_source(name: str) -> None:
    """ValueError or FileNotFoundError for a source that cannot be opened."""
    if _is_camera(name):
        device_of(name)
    elif name == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError("source: got - without a pipe, expected a video on standard input")
    else:
        check_file(Path(name), "source")


def open_source(video: Video, height: int, width: int, fps: float, room: int) -> Followed | None:
    """The frames of --source at the size and rate of the stream, read as they are needed. `room`: of a camera's."""
    name, notes = video.source, list[str]()
    if name is None:
        return None
    check_source(name)
    if _is_camera(name):
        return Followed(camera(str(device_of(name)), height, width, fps, room), notes)
    if name == "-":
        return Followed(piped_frames(sys.stdin.buffer, height, width, fps, notes), notes)
    return Followed(frames_at(Path(name), height, width, fps, notes=notes), notes)


def _is_camera(name: str) -> bool:
    return name == "camera" or name.startswith(("camera:", "/dev/video"))
