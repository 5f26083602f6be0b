"""Decodes the video track of a file, from its begin or from a keyframe near its end."""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

from engine.media.frames import MOST_PIXELS, Frame, too_large

_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own ones leave alpha out
_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD", b"[playlist]", b"v=0")  # what they name may be anywhere
_INTRA = (0, 1)  # picture types: none told, I
MOST_RATE = 240  # frames per second that are believed
_GAP = 4096  # bytes between the packets of a Matroska file in which nothing but headers stands
_TEXT = ("tty", "bin", "xbin", "adf", "idf")  # FFmpeg draws text as a video


class Damaged(ValueError):
    """A part of the file cannot be decoded, and more of it follows."""


class Shown(NamedTuple):
    """A decoded frame, with its timestamp and its duration in seconds where the file has them."""

    stamp: Fraction | None
    length: Fraction | None
    frame: Frame


class Decoder:
    """One reading of a file's best video track: av.VideoStream in `stream`.

    Frames before the first one that can be decoded are left out, as a player does. What cannot be decoded at the end is
    left out too, and `lost` says so. Damage in between raises Damaged.
    """

    def __init__(self, file: Path | BinaryIO, threads: bool) -> None:
        """threads: decode several frames at a time; then damage cannot be told from what is around it.

        Of an open file only `frames` from the begin can be read: it may be a pipe.
        """
        import av

        if isinstance(file, Path):
            with file.open("rb") as opened:
                if opened.read(16).lstrip(b"\xef\xbb\xbf \r\n").startswith(_PLAYLISTS):
                    raise ValueError("got a playlist, expected the video itself")
        # A name with a colon is a file's too. What a pipe delivers may name other files, and opens none.
        where = f"file:{file}" if isinstance(file, Path) else file
        allowed = "file" if isinstance(file, Path) else ""
        self.container = av.open(where, "r", options={"protocol_whitelist": allowed})
        try:
            if self.container.format.name in _TEXT:
                raise ValueError("got text, expected a video")
            self.stream = self._best_stream()
            self.codec = self._codec()
        except BaseException:
            self.container.close()
            raise
        self.stream.thread_type = "AUTO" if threads else "NONE"
        self.lost = False
        self._lost_at: int | None = None
        rate = self.stream.average_rate
        self.usual = 1 / rate if rate and 1 <= rate <= MOST_RATE else Fraction(1, 25)  # seconds per frame
        self.time_base = self.stream.time_base or Fraction(1, 1000)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def _best_stream(self) -> Any:
        import av

        stream = self.container.streams.best("video")
        if stream is None or bool(stream.disposition & av.stream.Disposition.attached_pic):
            sound = "only sound" if self.container.streams.audio else "no video track"
            raise ValueError(f"got {sound}, expected a video track")
        assert isinstance(stream, av.VideoStream)
        if stream.codec_context is None:
            raise ValueError("got a codec that FFmpeg does not know, expected one that it decodes, such as H.264")
        if stream.width * stream.height > MOST_PIXELS:
            raise ValueError(too_large(stream.width, stream.height))
        return stream

    def _codec(self) -> Any:
        """The track's decoder, or another one that knows its alpha."""
        import av

        context = self.stream.codec_context
        if self.stream.metadata.get("alpha_mode") == "1":
            with suppress(av.codec.codec.UnknownCodecError, KeyError):
                decoder = av.VideoCodecContext.create(_ALPHA_DECODERS[context.name], "r")
                assert isinstance(decoder, av.VideoCodecContext)
                decoder.extradata = context.extradata
                return decoder
        return context

    def length(self, first: Fraction) -> Fraction | None:
        """Seconds from the first timestamp to the last frame's end, as the track says; None if it does not."""
        if "mp4" in self.container.format.name and self.stream.duration:
            return self.stream.duration * self.time_base
        whole = self.whole(first)
        if "matroska" in self.container.format.name and whole:
            tag = re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)", self.stream.metadata.get("DURATION", "").strip("\0 ")[:18])
            told = 3600 * int(tag[1]) + 60 * int(tag[2]) + Fraction(tag[3]) - first if tag else None
            return told if told and told <= whole + Fraction(1, 500) else None  # a copy may keep another file's tag
        return None

    def whole(self, first: Fraction) -> Fraction | None:
        """Seconds from the first timestamp to the end of the longest track."""
        known = self.container.duration
        if not known:
            return None
        from_zero = "matroska" in self.container.format.name
        return Fraction(known, 10**6) - (first if from_zero else 0)

    def seeks(self) -> bool:
        """Whether a seek in such a file is exact: it has an index, and timestamps of one clock."""
        return any(name in self.container.format.name for name in ("mp4", "matroska"))

    def is_cut_off(self, path: Path) -> bool:
        """Whether the file ends before the place where its own index or header says that it ends."""
        if "mp4" in self.container.format.name:
            entries = self.stream.index_entries
            return len(entries) > 0 and entries[-1].pos + entries[-1].size > self.container.size
        with path.open("rb") as file:
            return _matroska_end(file.read(4096)) > self.container.size

    def frames(self, start: Fraction | None, progress: Callable[[float], None]) -> Iterator[Shown]:
        """Frames in the order in which they are shown; from the keyframe before `start`, a timestamp in seconds."""
        if start is not None:
            self.container.seek(int(start / self.time_base), stream=self.stream)
        clean = start is None  # after a seek: an intra frame was met, so what follows lacks nothing it refers to
        shown, begin = False, None
        for packet in self._packets():
            if packet.pos is not None and packet.pos >= 0:
                begin = packet.pos if begin is None else begin
                progress(max(0, packet.pos - begin) / max(1, self.container.size - begin))
            for frame in self._decode(packet):
                if frame.is_corrupt:
                    self._lose(frame.pts)
                    continue
                clean = clean or (frame.key_frame and frame.pict_type in _INTRA)
                if not clean:  # leading pictures, or a gradual refresh
                    continue
                if self.lost and not shown:
                    self.lost, self._lost_at = False, None  # before the first frame
                if self.lost and (self._lost_at is None or frame.pts is None or frame.pts > self._lost_at):
                    raise Damaged
                shown = True
                base = frame.time_base or self.time_base
                stamp = None if frame.pts is None else frame.pts * base
                yield Shown(stamp, frame.duration * base if frame.duration else None, frame)

    def _lose(self, at: int | None) -> None:
        """Remember the first timestamp that something is missing at."""
        if not self.lost:
            self.lost, self._lost_at = True, at

    def _packets(self) -> Iterator[Any]:
        """Packets of the track, and one without data at the end. A container that breaks off ends there."""
        import av

        matroska = "matroska" in self.container.format.name
        end, last = None, None
        try:
            # All tracks, to see what Matroska's reader skips without a word because it is damaged.
            for packet in self.container.demux(*([] if matroska else [self.stream])):
                ours = packet.stream_index == self.stream.index
                if packet.has_sidedata("encryption_info"):
                    raise ValueError("got an encrypted video, expected one that can be decoded without a key")
                if matroska and packet.size and packet.pos is not None and packet.pos >= 0:
                    if end is not None and packet.pos - end > _GAP and ours and self._jumps(last, packet.pts):
                        self._lose(last)
                    end = packet.pos + packet.size
                if ours:
                    last = packet.pts if packet.size else last
                    yield packet
        except av.FFmpegError:
            self._lose(last)
            yield av.Packet(0)

    def _jumps(self, last: int | None, now: int | None) -> bool:
        """Whether more than three frames are missing between two timestamps."""
        return last is not None and now is not None and (now - last) * self.time_base > 4 * self.usual

    def _decode(self, packet: Any) -> list[Frame]:
        """The frames that a packet completes; none, and a loss, if it is damaged."""
        import av

        # In a transport stream "corrupt" means a gap before the packet.
        if not (packet.is_corrupt and self.container.format.name != "mpegts"):
            with suppress(av.error.InvalidDataError):
                return list(self.codec.decode(packet if packet.size else None))
        self._lose(packet.pts)
        return []


def _matroska_end(head: bytes) -> int:
    """Where a Matroska file ends by the size of its segment; 0 if that is not told, or if it is another format."""
    at = head.find(b"\x18\x53\x80\x67")
    if not head.startswith(b"\x1a\x45\xdf\xa3") or at < 0 or at + 12 > len(head):
        return 0
    first = head[at + 4]
    count = 9 - first.bit_length()  # bytes of the number
    if count > 8:
        return 0
    size = int.from_bytes(head[at + 4 : at + 4 + count], "big") & ((1 << 7 * count) - 1)
    return 0 if size == (1 << 7 * count) - 1 else at + 4 + count + size
