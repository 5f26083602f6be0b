"""The prompts of a run: read from the options, checked, in order of time, and given to the stream when they are due."""

import codecs
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

from engine.commands.job import MOST_FRAMES, Video
from engine.commands.notes import Notes
from engine.model.text import check_prompt
from engine.options import real_number, whole_number
from engine.runtime.streams import Words

_MOST_BYTES = 16 << 20  # of a file
# The longer marks first: that of UTF-32 begins as that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_TIME = re.compile(r"\s*\[([-+]?[0-9.]+[sf])\]")  # [3.0s] or [48f] at the beginning of a line


@dataclass(frozen=True)
class Prompt:
    """A text, the frame from which it is asked for, and the option that gave it."""

    frame: int
    text: str
    where: str
    blend: tuple[tuple[str, float], ...] = ()  # texts that are mixed into it, and their weights beside its own of 1

    @property
    def asked(self) -> str | Words:
        """What a stream is told."""
        return ((self.text, 1.0), *self.blend) if self.blend else self.text

    def report(self) -> dict[str, Any]:
        """What a run's record says."""
        texts = [{"text": text, "weight": weight} for text, weight in ((self.text, 1.0), *self.blend)]
        return {"prompt": texts if self.blend else self.text}


class Prompts:
    """The prompts of a run that wait for their frame. `shown` lists those that came, and at which frame."""

    def __init__(self, prompts: list[Prompt], limit: int | None, notes: Notes, transition: int = 0) -> None:
        """Limit is the number of frames, None without end. ValueError for no text, or a time past the end."""
        for prompt in prompts:
            check_prompt(prompt.text, prompt.where)
            for text, _ in prompt.blend:
                check_prompt(text, "--blend")
            if limit is not None and prompt.frame >= limit:
                raise ValueError(f"{prompt.where}: got frame {prompt.frame}, expected one before the end at {limit}")
        self.notes = notes
        self.shown: list[dict[str, Any]] = []
        self._next: dict[str, Any] | None = None
        self._transition, self._left = transition, 0  # chunks of a transition, and those still to come
        # Stable: of several at one frame the last one given wins.
        self._waiting = sorted(prompts, key=lambda prompt: prompt.frame)

    @classmethod
    def of(cls, video: Video, fps: float, limit: int | None, notes: Notes) -> "Prompts":
        """The prompts of the options. ValueError or FileNotFoundError (got and expected) names the option."""
        if video.prompt_file is not None:
            prompts = in_file(video.prompt_file, fps)
        else:
            prompts = [Prompt(0, video.prompt or "", "--prompt", _blend_of(video.blend))]
        for when, text in video.prompt_at:
            prompts.append(Prompt(frame_of(when, fps, "--prompt-at"), text, f"--prompt-at {when}"))
        return cls(prompts, limit, notes, video.transition)

    def due(self, written: int) -> str | Words | None:
        """The prompt of the chunk that begins at frame `written`; None to keep the last one. Never None at frame 0."""
        due = [prompt for prompt in self._waiting if prompt.frame <= written]
        if not due:
            return None
        self._waiting = self._waiting[len(due) :]
        for prompt, after in pairwise(due):
            later = "a later " if after.where == prompt.where else ""
            self.notes.add(f"{prompt.where} has no effect: {later}{after.where} replaces it before a chunk begins")
        self._next = {"frame": written, **due[-1].report()}
        return due[-1].asked

    def took(self, frame: int) -> None:
        """The chunk that begins at this frame is made, under the last prompt that was due."""
        if self._next is not None:
            self._left = self._transition if self.shown and self._transition > 1 else 0
            self.shown.append(self._next | ({"transition": self._left, "reached": None} if self._left else {}))
            self._next = None
        if self._left:
            self._left -= 1
            if not self._left:
                self.shown[-1]["reached"] = frame

    def finish(self) -> None:
        """Note the prompts that came too late for the last chunk."""
        for prompt in self._waiting:
            self.notes.add(f"{prompt.where} has no effect: prompts switch where a chunk begins, "
                           f"and the last one began before frame {prompt.frame}")  # fmt: skip


def _blend_of(given: tuple[tuple[str, str], ...]) -> tuple[tuple[str, float], ...]:
    """Texts and weights of --blend. ValueError for a weight that is no number above 0."""
    found = []
    for text, number in given:
        with suppress(ValueError):
            if (weight := real_number(number)) > 0:
                found.append((text, weight))
                continue
        raise ValueError(f"--blend: got weight {number!r}, expected a number above 0")
    if not isfinite(sum(weight for _, weight in found)):
        raise ValueError("--blend: got weights without a finite sum, expected smaller ones")
    return tuple(found)


def frame_of(when: str, fps: float, where: str) -> int:
    """'3.0s' or '3.0' in seconds, '48f' in frames -> frame number. ValueError that begins with `where`."""
    try:
        value = whole_number(when[:-1]) if when.endswith("f") else round(real_number(when.removesuffix("s")) * fps)
    except (ValueError, OverflowError):
        value = -1
    if not 0 <= value <= MOST_FRAMES:
        raise ValueError(f"{where}: got {when!r}, expected a time such as 3.0s or a frame such as 48f")
    return value


def in_file(name: str, fps: float) -> list[Prompt]:
    """The prompts of a file, `-` for stdin: one text, or several, each after a line that begins with its time."""
    where = f"--prompt-file {name}"
    text = _decoded(_bytes_of(name, where), where)
    found: list[tuple[int, str, list[str]]] = [(0, where, [])]  # frame, where, lines
    for number, line in enumerate(text.splitlines(), start=1):
        if time := _TIME.match(line):
            at = f"{where} line {number}"
            found.append((frame_of(time[1], fps, at), at, []))
            line = line[time.end() :]
        found[-1][2].append(line)
    prompts = [Prompt(frame, "\n".join(lines), at) for frame, at, lines in found]
    if len(prompts) > 1 and not prompts[0].text.strip():  # the first line has a time
        prompts = prompts[1:]
    if all(prompt.frame > 0 for prompt in prompts):
        raise ValueError(f"{prompts[0].where}: got a first prompt at frame {prompts[0].frame}, expected one at [0f]")
    return prompts


def _bytes_of(name: str, where: str) -> bytes:
    if not name:
        raise ValueError(f"{where}: got an empty name, expected a text file")
    try:
        if name == "-":
            if sys.stdin is None:
                raise ValueError(f"{where}: got stdin closed, expected a text file")
            data = sys.stdin.buffer.read(_MOST_BYTES + 1)
        else:
            if "\0" in name:
                raise ValueError(f"{where}: got a name with a NUL character, expected a text file")
            with Path(name).open("rb") as opened:
                data = opened.read(_MOST_BYTES + 1)
    except OSError as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{where}: got {error.strerror or error}, expected a text file") from None
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{where}: got more than {_MOST_BYTES >> 20} MB, expected a text file")
    return data


def _decoded(data: bytes, where: str) -> str:
    """The text of UTF-8, or of UTF-16 or UTF-32 with its mark. ValueError for other bytes."""
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        at = error.start + len(data) - len(error.object)  # the codec of utf-8-sig counts from behind the mark
        got = f"byte {data[at]:#04x} at {at}, which is no {encoding.removesuffix('-sig').upper()}"
        raise ValueError(f"{where}: got {got}, expected text in UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{where}: got a NUL character, expected a text file in UTF-8")
    return text
