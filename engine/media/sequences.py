"""Sinks of pictures: a png for every frame, and animations (gif, webp)."""

from __future__ import annotations

import io
import os
import re
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import numpy as np

from engine.media.base import BaseSink, Encoding, Output, need, reserve, shown

HELD_LIMIT = 1 << 30  # bytes of frames that gif and webp may hold: their writer needs all frames at once
WEBP_LONGEST = 16383  # pixels each way
PATTERN = r"[^%]*%(0\d)?d[^%]*"  # a name with one number: frame_%05d.png


class PngSink(BaseSink):
    """Writes one file per frame to a hidden folder, and gives them their names on `close`.

    A new folder appears whole. Into a folder that exists, the files move one by one; they never replace any.
    """

    def __init__(self, size: tuple[int, int], folder: Path, pattern: str | None, encoding: Encoding) -> None:
        super().__init__(size)
        encoding.refuse("png", "codec", "crf", "pix_fmt")
        self.image = need("PIL.Image", "png")
        self.folder, self.pattern = folder, pattern or "%05d.png"
        self.new = not folder.is_dir()
        if pattern is None and not self.new and (names := sorted(os.listdir(folder))):
            holds = f"which holds {len(names)} files such as {shown(names[0])}"
            raise ValueError(f"output: got {shown(folder)}, {holds}, expected a new or an empty directory")
        if older := self._older():
            raise ValueError(
                f"output: got {shown(self.pattern)} beside {shown(older[0])} ({len(older)} such files), "
                "expected no older frames of that pattern"
            )
        self.part = reserve(folder if self.new else folder / self.pattern, self.notes, folder=True)

    def _older(self) -> list[str]:
        """Names in the folder that the pattern can make."""
        start, digits, end = re.split(r"%(?:0(\d))?d", self.pattern)
        number = rf"\d{{{digits},}}" if digits else r"(0|[1-9]\d*)"
        made = re.compile(re.escape(start) + number + re.escape(end))
        return sorted(filter(made.fullmatch, os.listdir(self.folder))) if self.folder.is_dir() else []

    def _put(self, frame: np.ndarray) -> None:
        data = io.BytesIO()
        self.image.fromarray(frame).save(data, format="png", compress_level=1)
        path = self.part.path / (self.pattern % self.frames)
        try:
            path.write_bytes(data.getbuffer())
        except BaseException:  # half a picture is none
            path.unlink(missing_ok=True)
            raise

    def _finish(self) -> None:
        if self._older():
            raise FileExistsError(f"output: got frames in {shown(self.folder)} that came meanwhile, expected none")
        if self.new:
            os.replace(self.part.path, self.part.target)  # fails where a folder with files is
        else:
            for file in sorted(self.part.path.iterdir()):
                os.replace(file, self.folder / file.name)
        self.part.drop()

    def _rescue(self) -> Path | None:
        with suppress(OSError):
            self._finish()
            return self.folder
        if not self.new:
            self.part.target = self.folder / (
                re.sub(r"%(0\d)?d", "", Path(self.pattern).stem).strip("_-. ") or "frames"
            )
        return self.part.keep()

    def _discard(self) -> None:
        self.part.drop()


class AnimationSink(BaseSink):
    """gif or webp, by the suffix. For short clips: all frames stay in memory until the end."""

    def __init__(self, size: tuple[int, int], rate: Fraction, path: Path, encoding: Encoding) -> None:
        super().__init__(size)
        self.kind = path.suffix.lower()[1:]
        encoding.refuse(self.kind, "codec", "crf", "pix_fmt")
        if self.kind == "webp" and max(size) > WEBP_LONGEST:
            height, width = size
            raise ValueError(f"webp output: got {width}x{height} pixels, expected at most {WEBP_LONGEST} each way")
        self.image = need("PIL.Image", self.kind)
        self.rate = rate
        self.output = Output(path, self.notes)
        self.pictures: list = []

    def _put(self, frame: np.ndarray) -> None:
        if (self.frames + 1) * frame.nbytes > HELD_LIMIT:
            raise ValueError(f"{self.kind} output: got more than {self.frames} frames, expected a short clip; use .mp4")
        self.pictures.append(self.image.fromarray(frame.copy()))

    def _finish(self) -> None:
        self._save()
        self.output.keep()

    def _save(self) -> None:
        """Write the animation of `pictures`, in place of what an earlier call wrote."""
        # A gif counts hundredths of a second. Round the times, not the durations, to keep the right speed.
        unit = 10 if self.kind == "gif" else 1
        times = [unit * round(i * 1000 / (unit * self.rate)) for i in range(len(self.pictures) + 1)]
        timing = {"duration": np.diff(times).tolist(), "loop": 0}
        quality = {"quality": 90} if self.kind == "webp" else {}
        data = io.BytesIO()
        first, *rest = self.pictures
        first.save(data, format=self.kind, save_all=True, append_images=rest, **timing, **quality)
        self.output.restart()
        self.output.write(data.getbuffer())

    def _rescue(self) -> Path | None:
        """Keep as many frames, from the first one on, as there is room for."""
        if self.output.file.closed:  # all is written; only the name is missing
            return self.output.rescue()
        while self.pictures:
            try:
                self._save()
            except (OSError, MemoryError):
                self.pictures = self.pictures[: len(self.pictures) // 2]
            else:
                self.frames = len(self.pictures)
                return self.output.rescue()
        self.output.drop()
        return None

    def _discard(self) -> None:
        self.pictures.clear()
        self.output.drop()
