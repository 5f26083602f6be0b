"""Checks that a path given as --image, --video or --source names a file that can be read; says what to do if not."""

import re
import stat
from collections.abc import Iterable
from pathlib import Path


def check_file(path: Path, what: str) -> None:
    """Raise FileNotFoundError, or ValueError for what is no plain file. `what` is "image", "video" or "source".

    These are read more than once, so a pipe or a device cannot serve. Opening one could also wait for ever.
    """
    text = str(path)
    if text == "-":
        raise ValueError(f"{what}: got -, expected a file: save standard input to one first")
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
            raise ValueError(f"{what}: got {text}, a URL, expected a file: download it first") from None
        raise FileNotFoundError(f"{what}: got {text}, expected an existing file") from None
    except (OSError, ValueError) as error:  # no permission, a name too long, a zero byte
        raise ValueError(f"{what}: got {text}, expected a file that can be read ({reason(error)})") from None
    if stat.S_ISDIR(mode):
        raise ValueError(f"{what}: got {text}, a directory, expected a file")
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        raise ValueError(f"{what}: got {text}, a pipe, expected a file: save what it delivers to one first")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{what}: got {text}, a device, expected a file: record from it to one first")
    if path.stat().st_size == 0:
        raise ValueError(f"{what}: got {text}, an empty file, expected a readable {_KIND[what]}")


_KIND = {"image": "picture", "video": "video", "source": "video"}


def reason(error: BaseException) -> str:
    """An exception's text in one line; of the system's and FFmpeg's errors the reason alone."""
    told = getattr(error, "strerror", None) or error
    text = " ".join(str(told).split())
    return text or type(error).__name__


def visible(width: float, height: float, across: int, down: int) -> float:
    """The share of a picture of width x height that is left after a crop to the shape across : down."""
    wide = (width * down) / (height * across)
    return min(wide, 1 / wide)


def note_crop(notes: list[str], name: str, size: tuple[int, int], across: int, down: int) -> None:
    """Add a note where more than a twentieth of a picture of `size`, as shown, is cropped away."""
    share = visible(*size, across, down)
    if share < 0.95:
        text = f"{name}: cropped from {size[0]}x{size[1]} to the shape of {across}x{down}, {share:.0%} of it is left"
        add_once(notes, [text])


def add_once(notes: list[str], texts: Iterable[str]) -> None:
    """Append the texts that are not yet there."""
    notes += [text for text in dict.fromkeys(texts) if text not in notes]
