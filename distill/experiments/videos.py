"""Scores folders of videos by `distill.scores.clips`: means, the worst clips, and one folder against another."""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distill.data.captions import Skipped, files_below
from distill.scores.clips import ClipScorer
from distill.scores.dimensions import mean_and_error
from engine.commands.stderr import say
from engine.files import write_json
from engine.media.base import shown
from engine.media.clips import rate_of, stored_frames

DIMENSIONS = ("temporal_flickering", "motion_smoothness", "dynamic_degree")
PICTURES = (".jpg", ".jpeg", ".heic")  # never videos
MOST_WORST = 3
_PAUSE = 10.0  # seconds between two progress lines

Row = dict[str, Any]


@dataclass
class Folder:
    """A folder of videos, or one video: a row for each clip that was scored, and what was skipped."""

    path: Path
    clips: list[Row] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def files(self) -> list[str]:
        """FileNotFoundError for what is not there, ValueError for a folder without videos."""
        if self.path.is_file():
            return [self.path.name]
        if not self.path.is_dir():
            raise FileNotFoundError(f"videos: got {self.path}, expected a folder of videos, or a video")
        found = [name for name in files_below(self.path) if not name.lower().endswith(PICTURES)]
        if not found:
            raise ValueError(f"videos: got no video in {self.path}, expected at least one")
        return found

    def place(self, name: str) -> Path:
        return self.path if self.path.is_file() else self.path / name

    def scores(self) -> dict[str, dict[str, float]]:
        """Mean, standard error and number of clips of every score."""
        rows = [scores_of(row) for row in self.clips]
        return {name: mean_and_error(row[name] for row in rows) for name in rows[0]}

    def worst(self, name: str) -> list[Row]:
        """The clips with the least values of a dimension; of those that do not move, the stillest first."""
        known = [row for row in self.clips if not math.isnan(row[name])]
        return sorted(known, key=lambda row: (row[name], row["flow"] / row["flow_threshold"]))[:MOST_WORST]

    def report(self) -> Row:
        skipped = [one._asdict() for one in self.skipped]
        return {"videos": str(self.path), "scores": self.scores(), "skipped": skipped, "clips": self.clips}


def scores_of(row: Row) -> dict[str, float]:
    """What is averaged of a clip. VBench's temporal flickering is that of static clips alone."""
    flickering = row["temporal_flickering"]
    return {
        "temporal_flickering": flickering,
        "temporal_flickering_static": flickering if row["static"] else math.nan,
        **{name: row[name] for name in (*DIMENSIONS[1:], "static")},
    }


def difference(first: Folder, second: Folder) -> dict[str, dict[str, float]]:
    """Mean, standard error and number of the differences second - first over clips of equal names."""
    names = {row["file"]: scores_of(row) for row in first.clips}
    pairs = [(names[row["file"]], scores_of(row)) for row in second.clips if row["file"] in names]
    return {name: mean_and_error(b[name] - a[name] for a, b in pairs) for name in scores_of(first.clips[0])}


def run_videos(paths: tuple[Path, ...], out: Path | None, as_json: bool, threads: int) -> None:
    """Score the videos of one or two folders; print a table, or a line of JSON, and write the report to `out`."""
    if out is not None and out.is_dir():
        raise ValueError(f"out: got {out}, a folder, expected a file for the report")
    scorer, folders = ClipScorer(threads), [Folder(path) for path in paths]
    wanted = [(folder, name) for folder in folders for name in folder.files()]
    progress = Progress(len(wanted))
    for number, (folder, name) in enumerate(wanted):
        path = folder.place(name)
        try:
            frames = progress.watch(number, name, stored_frames(path))
            folder.clips.append({"file": name, "fps": rate_of(path), **scorer(frames, rate_of(path))})
        except (ValueError, FileNotFoundError) as error:
            folder.skipped.append(Skipped(name, str(error).replace(str(path), name)))
            say(f"skipped: {shown(str(folder.skipped[-1]))}")
    for folder in folders:
        if not folder.clips:
            raise ValueError(f"videos: got no clip that can be scored in {folder.path}, expected at least one "
                             f"({len(folder.skipped)} skipped, the first: {folder.skipped[0]})")  # fmt: skip
    report: Row = {"folders": [folder.report() for folder in folders]}
    if len(folders) == 2:
        report["difference"] = difference(*folders)
    report = without_nan(report)
    print(json.dumps(report) if as_json else "\n".join(table(folders)))
    if out is not None:
        write_json(out, report)


def table(folders: list[Folder]) -> Iterator[str]:
    """A column per folder, and the difference of two; then the worst clips and what was skipped."""
    letters = "AB"[: len(folders)]
    for letter, folder in zip(letters, folders, strict=True):
        yield f"{letter}: {shown(str(folder.path))}, {len(folder.clips)} clips, {len(folder.skipped)} skipped"
    columns = {letter: folder.scores() for letter, folder in zip(letters, folders, strict=True)}
    if len(folders) == 2:
        columns["B - A, paired"] = difference(*folders)
    yield f"{'':26}" + "".join(f"{head:>28}" for head in columns)
    for name in next(iter(columns.values())):
        yield f"{name:>26}" + "".join(f"{cell(found[name]):>28}" for found in columns.values())
    for letter, folder in zip(letters, folders, strict=True):
        for name in DIMENSIONS:
            rows = [f"{shown(row['file'])} {row[name]:.4f}" for row in folder.worst(name)]
            if rows:
                yield f"{letter}, least {name}: {', '.join(rows)}"
        for one in folder.skipped:
            yield f"{letter}, skipped: {shown(str(one))}"


def cell(found: dict[str, float]) -> str:
    if not found["n"]:
        return "none"
    return f"{found['mean']:.4f} +- {found['se']:.4f} (n = {found['n']})"


def without_nan(value: Any) -> Any:
    """As JSON has it: null for NaN."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


class Progress:
    """A line on stderr every few seconds: the video that is read, its frame, and the time left."""

    def __init__(self, videos: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.videos, self.clock = videos, clock
        self.begun = self.last = clock()

    def watch(self, done: int, name: str, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The frames of a video, `done` videos after the first."""
        for number, frame in enumerate(frames):
            now = self.clock()
            if now - self.last >= _PAUSE:
                self.last, spent = now, now - self.begun
                left = f", eta {spent / done * (self.videos - done) / 60:.1f} min" if done else ""
                say(f"evaluate: {done} of {self.videos} videos, frame {number} of {shown(name)}, "
                    f"{spent / 60:.1f} min{left}")  # fmt: skip
            yield frame
