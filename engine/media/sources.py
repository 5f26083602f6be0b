"""Reads images and clips: decodes them, crops them to the stream's shape and resamples them to its frame rate."""

from collections import deque
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError


def _fit(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Scale to cover [height, width], crop the middle: uint8 [height, width, 3]."""
    scale = max(width / image.width, height / image.height)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.convert("RGB").resize(size, Image.Resampling.LANCZOS) if image.size != size else image.convert("RGB")
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.array(image.crop((left, top, left + width, top + height)))  # torch needs a writable array, so copy


def read_image(path: Path, height: int, width: int) -> np.ndarray:
    """A picture as a clip of one frame: uint8 [1, height, width, 3]. FileNotFoundError, or ValueError if unreadable."""
    if not path.is_file():
        raise FileNotFoundError(f"image: got {path}, expected an existing file")
    try:
        with Image.open(path) as image:
            return _fit(image, height, width)[None]
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"image: got {path}, expected a readable picture ({error})") from None


def read_clip(path: Path, height: int, width: int, fps: float, last: int) -> np.ndarray:
    """The last `last` frames of a video, resampled to `fps`: uint8 [T, height, width, 3], T <= last.

    Raises FileNotFoundError, or ValueError if the video is unreadable or empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"video: got {path}, expected an existing file")
    import av

    frames: deque[np.ndarray] = deque(maxlen=last)
    due = 0.0  # time of the next output frame, in seconds
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or fps)
            for number, frame in enumerate(container.decode(stream)):
                # A frame is shown until the next one, so repeat it for every due time in between.
                until = (number + 1) / rate
                if until <= due + 1e-9:
                    continue
                picture = _fit(frame.to_image(), height, width)
                while due < until - 1e-9:
                    frames.append(picture)
                    due += 1 / fps
    except (av.FFmpegError, IndexError, OSError) as error:
        raise ValueError(f"video: got {path}, expected a readable video ({error})") from None
    if not frames:
        raise ValueError(f"video: got {path} without frames, expected at least one")
    return np.stack(frames)
