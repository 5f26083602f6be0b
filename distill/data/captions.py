"""Videos with captions on disk: a text file beside each video, or one JSONL or CSV file for all of them."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from engine.model.text import check_prompt

Rows = Iterator[tuple[str, dict[str, Any]]]  # where a row stands, and its entries
FILES, TEXTS = ("file", "video", "path"), ("caption", "text", "prompt")
# Names of files that are taken for videos. Others are read where a caption file names them.
SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wmv", ".flv", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts",
            ".3gp", ".ogv", ".y4m", ".gif", ".webp", ".png", ".apng", ".avif", ".jpg", ".jpeg", ".heic")  # fmt: skip


class Video(NamedTuple):
    """A video by its path below the folder of videos, and what it shows."""

    file: str
    caption: str


class Skipped(NamedTuple):
    """A video that gives no clip, or not all of its clips, and why."""

    file: str
    why: str

    def __str__(self) -> str:
        return f"{self.file}: {self.why}"


def find_videos(folder: Path, captions: Path | None) -> tuple[list[Video], list[Skipped]]:
    """The captioned videos of a folder, and those that cannot serve, each in their order.

    `captions` is a .jsonl or .csv file, whose order is kept; None reads NAME.txt beside each video, by name. ValueError
    or FileNotFoundError for a missing folder and for a caption file that cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"videos: got {folder}, expected a folder of videos")
    present = list(files_below(folder))
    videos, skipped, named = list[Video](), list[Skipped](), set[str]()
    for file, caption in [(file, None) for file in present] if captions is None else _listed(captions):
        try:
            if file in named:
                raise ValueError("file: got a second caption, expected one per video")
            named.add(file)
            text = _beside(folder / file) if caption is None else caption
            check_prompt(text, "caption")
            if not (folder / file).is_file():
                raise ValueError(f"file: got no such file in {folder}, expected a video")
            videos.append(Video(file, text.strip()))
        except ValueError as error:
            skipped.append(Skipped(file, str(error)))
    if captions is not None:
        absent = f"caption: got none in {captions.name}, expected one"
        skipped += [Skipped(file, absent) for file in present if file not in named]
    return videos, skipped


def files_below(folder: Path) -> Iterator[str]:
    """Every video below a folder, by its path in it; hidden ones are left out."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                yield (Path(place) / name).relative_to(folder).as_posix()


def _beside(video: Path) -> str:
    path = video.with_suffix(".txt")
    if not path.is_file():
        raise ValueError(f"caption: got no {path.name}, expected it beside the video")
    return _text(path)


def _listed(captions: Path) -> Iterator[tuple[str, str]]:
    readers: dict[str, Callable[[Path], Rows]] = {".jsonl": _lines, ".csv": _rows}
    if captions.suffix.lower() not in readers:
        raise ValueError(f"captions: got {captions}, expected a file in .jsonl or .csv")
    if not captions.is_file():
        raise FileNotFoundError(f"captions: got no file {captions}, expected one")
    for where, row in readers[captions.suffix.lower()](captions):
        file, caption = (next((row[key] for key in keys if key in row), None) for keys in (FILES, TEXTS))
        if not isinstance(file, str) or not file or not isinstance(caption, str):
            raise ValueError(f"{where}: got {', '.join(map(str, row)) or 'nothing'}, expected texts under "
                             f"{'/'.join(FILES)} and {'/'.join(TEXTS)}")  # fmt: skip
        yield os.path.normpath(file), caption


def _lines(path: Path) -> Rows:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where}: got no JSON, expected an object per line ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: got {type(row).__name__}, expected an object per line")
        yield where, row


def _rows(path: Path) -> Rows:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        head = [name.strip().lower() for name in next(reader, [])]
        for cells in reader:
            if cells:
                # A row that ends early has empty cells there.
                yield f"{path}:{reader.line_num}", dict(zip(head, [*cells, *[""] * len(head)], strict=False))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: got no CSV, expected one row per video ({error})") from None


def _text(path: Path) -> str:
    """A text in UTF-8, with or without a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: got a byte at {error.start} that is no UTF-8, expected a text") from None
    except OSError as error:
        raise ValueError(f"{path}: got {error.strerror}, expected a file that can be read") from None
