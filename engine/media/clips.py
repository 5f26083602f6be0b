"""Reads a clip as a viewer shows it, on the stream's grid of times: its end, or all of it frame by frame."""

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from engine.media.decoding import MOST_RATE, Damaged, Decoder
from engine.media.frames import Renderer, size_of
from engine.media.inputs import add_once, check_file, reason
from engine.media.pictures import frames_of, kind_of, read_image, shown_size
from engine.media.timeline import Clock, Grid, rounded_to, tolerance_of

Progress = Callable[[float], None]  # receives the share of the work that is done, from 0 to 1
_HELD = 2**30  # bytes of decoded frames that may wait until it is known which of them are taken


class _Wanted(NamedTuple):
    path: Path
    height: int
    width: int
    fps: float
    last: int
    progress: Progress


def read_clip(
    path: Path, height: int, width: int, fps: float, last: int, *, notes: list[str] | None = None,
    progress: Progress | None = None,
) -> np.ndarray:  # fmt: skip
    """The last `last` frames of a video at `fps` frames per second: uint8 [T, height, width, 3], T <= last.

    Time starts with the first frame that is shown: a frame's time is pts * time_base less that frame's. Output frame k
    is the frame that is shown at k / fps: the last one whose time is not after it. The clip ends when its last frame's
    duration is over (where times are rounded to milliseconds, 5 ms earlier, so that jitter adds no frame). What is
    returned is the end of that row of output frames, wherever reading began.

    Pixels are as a viewer shows them: turned and mirrored by the display matrix, with square pixels, in the colours of
    a BT.709 display, alpha over black, scaled to cover and cropped in the middle. Of interlaced frames the upper field
    is used. `notes` receives a line for each change that a user may want to know; `progress` the share that is done.

    Raises FileNotFoundError, or ValueError for what is no file, no video, damaged before its end, encrypted, or larger
    than 67 megapixels.
    """
    made: list[str] = []
    wanted = _Wanted(path, height, width, fps, last, progress or (lambda share: None))
    with _named(path):
        kind = kind_of(path)
        if kind == "picture":
            raise ValueError("a picture, expected a video: pass it as --image")
        clip, total = _animated(wanted, made) if kind == "animation" else _decoded(wanted, made)
    if total > last:
        made.append(f"{path.name}: taken: the last {last} of {total} frames at {fps:g} fps")
    if notes is not None:
        add_once(notes, made)
    return clip


def frames_at(
    path: Path, height: int, width: int, fps: float, *, crop: bool = True, notes: list[str] | None = None
) -> Generator[np.ndarray, None, None]:
    """All frames of a video at `fps`, one by one: what `read_clip` returns of a `last` without end. Holds one of them.

    A picture is a video of one frame. Without `crop` pixels are stretched to the size. `notes` as in `read_clip`.
    ValueError also for a file that is cut off, at once where its container tells its length, else when the reading
    comes there.
    """
    notes = [] if notes is None else notes
    with _named(path):
        kind = kind_of(path)
        if kind == "picture":
            yield from read_image(path, height, width, notes, crop)
        elif kind == "animation":
            grid: Grid[np.ndarray] = Grid(fps, sys.maxsize, tolerance_of(Fraction(1, 1000)))
            time = Fraction(0)
            for duration, _, pixels in frames_of(path, height, width, notes, crop):
                grid.show(time, pixels, lambda shown: shown)
                yield from grid.drain()
                time += duration
            grid.finish(time)
            yield from grid.drain()
        else:
            with Decoder(path, threads=False) as decoder:
                if decoder.is_cut_off(path):
                    raise ValueError("cut off, expected a whole file")
                aspect = decoder.stream.sample_aspect_ratio
                yield from _on_grid(decoder, Renderer(height, width, aspect, path.name, notes, crop), fps)


def rate_of(path: Path) -> float:
    """The frames per second of `stored_frames`, on average; 25 where the file does not tell. Errors as in theirs."""
    with _named(path):
        if _kind_of_video(path) == "animation":
            counts, length = _repeats(path)
            return float(sum(counts) / length)
        with Decoder(path, threads=False) as decoder:
            rate = decoder.stream.average_rate
            return float(rate if rate and rate <= MOST_RATE else 1 / decoder.usual)


def stored_frames(path: Path) -> Generator[np.ndarray, None, None]:
    """The frames of a video one by one, in its own size: uint8 [H, W, 3]. Holds one of them.

    Pixels are as in `read_clip`. Times do not count: each frame of the track comes once. Encoders of animations write
    equal frames as a longer one, so a frame of an animation comes as often as the shortest one fits in its duration.
    ValueError and FileNotFoundError as in `frames_at`, and for a picture.
    """
    with _named(path):
        if _kind_of_video(path) == "animation":
            counts, _ = _repeats(path)
            for count, (_, _, pixels) in zip(counts, frames_of(path, *shown_size(path), [], False), strict=True):
                yield from repeat(pixels, count)
            return
        with Decoder(path, threads=False) as decoder:
            if decoder.is_cut_off(path):
                raise ValueError("cut off, expected a whole file")
            yield from _as_stored(decoder, path.name)


def _kind_of_video(path: Path) -> str:
    kind = kind_of(path)
    if kind == "picture":
        raise ValueError("a picture, expected a video")
    return kind


def _repeats(path: Path) -> tuple[list[int], Fraction]:
    """How often each frame of an animation comes, and how many seconds all of them are shown."""
    lengths = [length for length, _, _ in frames_of(path, 1, 1, [], False)]
    usual = [length for length in lengths if length < Fraction(3, 2) * min(lengths)]
    step = sum(usual, Fraction(0)) / len(usual)
    return [max(1, round(length / step)) for length in lengths], sum(lengths, Fraction(0))


def _as_stored(decoder: Decoder, name: str) -> Iterator[np.ndarray]:
    """Every frame that a decoder has."""
    render, clock = None, Clock(decoder.usual)
    with _placed(clock):
        for stamp, length, frame in decoder.frames(None, lambda share: None):
            clock.at(stamp, length)
            if render is None:
                aspect = decoder.stream.sample_aspect_ratio or Fraction(1)
                render = Renderer(*size_of(frame, aspect), aspect, name, [], crop=False)
            yield render(frame)
        if decoder.lost:
            raise Damaged


def piped_frames(
    file: BinaryIO, height: int, width: int, fps: float, notes: list[str]
) -> Generator[np.ndarray, None, None]:
    """The frames that a pipe delivers, as `frames_at` gives those of a file: y4m, Matroska, MPEG-TS, fragmented MP4."""
    with _named_errors("standard input"), Decoder(file, threads=False) as decoder:
        aspect = decoder.stream.sample_aspect_ratio
        yield from _on_grid(decoder, Renderer(height, width, aspect, "standard input", notes), fps)


def _on_grid(decoder: Decoder, render: Renderer, fps: float) -> Iterator[np.ndarray]:
    """All frames that a decoder has, at `fps`."""
    grid: Grid[Any] = Grid(fps, sys.maxsize, tolerance_of(decoder.time_base))
    clock = Clock(decoder.usual)
    with _placed(clock):
        for stamp, length, frame in decoder.frames(None, lambda share: None):
            grid.show(clock.at(stamp, length), frame, render)
            yield from grid.drain()
        if decoder.lost:
            raise Damaged
    grid.finish(_end(decoder, clock) - _jitter(decoder))
    yield from grid.drain()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors from inside name the video, and what was expected. ValueError for what is no file."""
    check_file(path, "video")
    with _named_errors(path):
        yield


@contextmanager
def _named_errors(path: Path | str) -> Iterator[None]:
    import av

    try:
        yield
    except Damaged as error:
        mend = "expected a whole file (ffmpeg -i IN OUT.mp4 writes what it can decode)"
        raise ValueError(f"video: got {path}, damaged {error}, {mend}") from None
    except (av.FFmpegError, OSError, ValueError) as error:
        why = reason(error)
        why = why.removeprefix("got ") if "expected" in why else f"expected a video that FFmpeg can read ({why})"
        raise ValueError(f"video: got {path}, {why}") from None


@contextmanager
def _placed(clock: Clock) -> Iterator[None]:
    """Damage from inside gets the time at which it is."""
    try:
        yield
    except Damaged:
        raise Damaged(f"after {float(max(clock.time, Fraction(0))):.1f} s") from None


def _end(decoder: Decoder, clock: Clock, whole: bool = True) -> Fraction:
    """When the last frame is over: of a whole file where its track says so, else after the frame's duration."""
    if clock.time < 0:
        raise ValueError("got no frame that can be decoded, expected at least one")
    told = decoder.length(clock.origin or Fraction(0))
    return told if whole and told is not None and told > clock.time else clock.end()


def _jitter(decoder: Decoder) -> Fraction:
    """How much earlier a clip's end counts, so that jitter of its last timestamp adds no output frame."""
    return Fraction(1, 200) if rounded_to(decoder.time_base) else Fraction(0)


def _decoded(wanted: _Wanted, notes: list[str]) -> tuple[np.ndarray, int]:
    """The clip, and how many frames the whole one has. Starts near the end if the container can seek."""
    for back in (*_starts(wanted), None):
        try:
            found = _attempt(wanted, back, threads=True)
        except Damaged:  # read again so that every error belongs to its packet
            found = _attempt(wanted, back, threads=False)
        if found is not None:
            notes += found[2]
            return found[:2]
    raise AssertionError("reading from the begin covers everything")


def _starts(wanted: _Wanted) -> list[tuple[Fraction, Fraction]]:
    """(first timestamp, timestamp to seek) in seconds, to be tried in turn; empty where reading must begin at 0."""
    need = Fraction(wanted.last) / Fraction(wanted.fps)
    with Decoder(wanted.path, threads=False) as decoder:
        first = next(decoder.frames(None, lambda share: None), None) if decoder.seeks() else None
        if first is None or first.stamp is None:
            return []
        length = decoder.length(first.stamp) or decoder.whole(first.stamp) or 0
    backs = need + 1, 2 * need + 15
    return [(first.stamp, first.stamp + length - back) for back in backs if length - back > 2]


def _attempt(
    wanted: _Wanted, start: tuple[Fraction, Fraction] | None, threads: bool
) -> tuple[np.ndarray, int, list[str]] | None:
    """Decode from a timestamp to the end: clip, frames of the whole clip, notes. None if that was not early enough."""
    notes: list[str] = []
    with Decoder(wanted.path, threads) as decoder:
        render = Renderer(wanted.height, wanted.width, decoder.stream.sample_aspect_ratio, wanted.path.name, notes)
        grid: Grid[Any] = Grid(wanted.fps, wanted.last, tolerance_of(decoder.time_base))
        clock = Clock(decoder.usual, start and start[0])
        with _placed(clock):
            for stamp, length, frame in decoder.frames(start and start[1], lambda share: wanted.progress(0.7 * share)):
                time = clock.at(stamp, length)
                wait = wanted.last * frame.width * frame.height * frame.format.padded_bits_per_pixel / 8 <= _HELD
                grid.show(time, frame, (lambda shown: shown) if wait else render)
            if decoder.lost and threads:
                raise Damaged
        if clock.time < 0 and start is not None:
            return None
        cut = decoder.is_cut_off(wanted.path)
        end = _end(decoder, clock, whole=not cut and not decoder.lost)
        grid.finish(end - _jitter(decoder))
        if start is not None and (grid.first is None or grid.first > grid.start):
            return None
        if cut or decoder.lost:
            notes.append(f"{wanted.path.name}: cut off, what is left ends after {float(end):.1f} s")
        return _rendered(wanted, grid, render), grid.total, notes


def _rendered(wanted: _Wanted, grid: Grid[Any], render: Renderer) -> np.ndarray:
    clip = np.empty((grid.total - grid.start, wanted.height, wanted.width, 3), np.uint8)
    at = 0
    for picture, count in grid.pictures():
        clip[at : at + count] = picture if isinstance(picture, np.ndarray) else render(picture)
        at += count
        wanted.progress(0.7 + 0.3 * at / len(clip))
    return clip


def _animated(wanted: _Wanted, notes: list[str]) -> tuple[np.ndarray, int]:
    """The same for a GIF, WebP, PNG or AVIF animation."""
    grid: Grid[np.ndarray] = Grid(wanted.fps, wanted.last, tolerance_of(Fraction(1, 1000)))
    time = Fraction(0)
    for duration, share, pixels in frames_of(wanted.path, wanted.height, wanted.width, notes):
        grid.show(time, pixels, lambda shown: shown)
        time += duration
        wanted.progress(share)
    grid.finish(time)
    clip = np.concatenate([np.repeat(picture[None], count, axis=0) for picture, count in grid.pictures()])
    return clip, grid.total
