"""Sinks of coded video: mp4, mov, mkv and webm, through PyAV.

While it is recorded, an mp4 is fragmented, one fragment per frame: it plays without its end. After a clean end its
packets are copied into an ordinary file, with duration and index ahead of the pictures.
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from engine.files import Part
from engine.media.base import PIX_FMTS, BaseSink, Encoding, Output, check_pix_fmt, need, publish, reserve


@dataclass(frozen=True)
class Codec:
    """How frames are coded. No encoder looks ahead, so it returns each frame at once."""

    encoders: tuple[str, ...]  # of FFmpeg, the best one first
    crf: int  # constant quality, visually close to lossless
    most: int  # the largest crf
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Container:
    """A file format: FFmpeg's name, the codecs that it holds with its default first, and how it is recorded."""

    muxer: str
    codecs: tuple[str, ...]
    recorded: dict[str, str]
    finished: dict[str, str] | None = None  # options of the copy after a clean end; None: no copy is needed


_X26 = {"preset": "veryfast", "tune": "zerolatency"}
CODECS = {
    "h264": Codec(("libx264", "libopenh264"), 18, 51, _X26),
    "hevc": Codec(("libx265",), 20, 51, _X26 | {"x265-params": "log-level=none:pools=none:frame-threads=1"}),
    "av1": Codec(("libsvtav1",), 24, 63, {"preset": "9", "svtav1-params": "pred-struct=1:lookahead=0:lp=1"}),
    "vp9": Codec(("libvpx-vp9",), 20, 63, {"deadline": "realtime", "cpu-used": "5", "lag-in-frames": "0"}),
}
_FRAGMENTS = {"movflags": "frag_every_frame+empty_moov+default_base_moof", "flush_packets": "1"}
_CLUSTERS = {"cluster_time_limit": "0", "flush_packets": "1"}  # one per frame: a killed file lacks no more than that
_WHOLE = {"movflags": "faststart"}
CONTAINERS = {
    "mp4": Container("mp4", ("h264", "hevc", "av1", "vp9"), _FRAGMENTS, _WHOLE),
    "mov": Container("mov", ("h264", "hevc"), _FRAGMENTS, _WHOLE),
    "mkv": Container("matroska", ("h264", "hevc", "av1", "vp9"), _CLUSTERS),
    "webm": Container("webm", ("vp9", "av1"), _CLUSTERS),
}
BT709 = 1  # ITU-T H.273: matrix, primaries and transfer of sRGB-like pictures have this one number
LIMITED = 1  # FFmpeg's AVCOL_RANGE_MPEG: luma from 16 to 235


class VideoSink(BaseSink):
    """Codes frames into a container, for a file or (path None) stdout."""

    def __init__(self, size: tuple[int, int], rate: Fraction, path: Path | None, encoding: Encoding, kind: str) -> None:
        super().__init__(size)
        av = need("av", kind)
        self.kind, self.container_kind = kind, CONTAINERS[kind]
        codec, encoder, crf = _choice(av, kind, encoding)
        self.pix_fmt = encoding.pix_fmt or "yuv420p"
        check_pix_fmt(self.pix_fmt, _pix_fmts(av, encoder), kind, size)
        self.av, self.time_base = av, 1 / rate
        self.part = reserve(path, self.notes) if path is not None else None
        self.output = Output(None, self.notes) if path is None else None
        try:
            # The library writes a file itself, so that Ctrl-C cannot cut a write short.
            file: Any = self.output or str(self.part and self.part.path)
            options = self.container_kind.recorded
            self.container = av.open(file, "w", format=self.container_kind.muxer, options=options)
            self.video = _stream(av, self.container, codec, encoder, crf, self.pix_fmt, size, rate)
        except BaseException:
            self._drop()
            raise

    def _put(self, frame: np.ndarray) -> None:
        picture = self.av.VideoFrame.from_ndarray(frame, format="rgb24")
        # On several threads FFmpeg's scaler sometimes gets rows between their parts wrong, above 8 bits.
        picture = picture.reformat(format=self.pix_fmt, dst_colorspace="ITU709", dst_color_range="MPEG", threads=1)
        picture.pts, picture.time_base = self.frames, self.time_base
        self._mux(picture)

    def _mux(self, picture: Any) -> None:
        """Write the packets of a picture; None gives those that the encoder still holds."""
        for packet in self.video.encode(picture):
            packet.duration = packet.duration or 1  # libvpx sets none
            self.container.mux(packet)

    def _finish(self) -> None:
        self._mux(None)
        self.container.close()
        if self.output is not None:
            self.output.keep()
        if self.part is not None:
            self._improve(self.part)
            publish(self.part, self.notes)

    def _rescue(self) -> Path | None:
        with suppress(Exception):
            self._mux(None)
        with suppress(Exception):
            self.container.close()
        if self.part is None:
            self._drop()
            return None
        if self.container_kind.finished is not None:
            with suppress(OSError):
                trim(self.part.path)
        self.frames = packets_in(self.av, self.part.path)
        if not self.frames:
            self._drop()
            return None
        self._improve(self.part)
        return self.part.keep()

    def _improve(self, recorded: Part) -> None:
        """Replace the fragmented recording by an ordinary file. If that fails, the recording stays the result."""
        if self.container_kind.finished is None:
            return
        whole = None
        try:
            whole = Part(recorded.target)
            count = self._copy(recorded.path, whole.path)
            if count != self.frames:
                raise OSError(f"{count} of {self.frames} frames were copied")
        except Exception as error:
            if whole is not None:
                whole.drop()
            known = isinstance(error, OSError) and error.errno  # then its text would name a temporary file
            reason = os.strerror(known) if known else (str(error).splitlines() or [type(error).__name__])[0]
            self.notes.append(f"the {self.kind} stays fragmented, it plays but has no index ({reason})")
        except BaseException:
            if whole is not None:
                whole.drop()
            raise
        else:
            self.part = whole
            recorded.drop()

    def _copy(self, source: Path, target: Path) -> int:
        """Copy all packets into a file with the index in front; returns their number."""
        muxer, options, count = self.container_kind.muxer, self.container_kind.finished, 0
        with self.av.open(str(source)) as read, self.av.open(str(target), "w", format=muxer, options=options) as made:
            stream = read.streams.video[0]
            # The copy of the parameters of an encoder-less decoder, such as AV1's, must not look for an encoder.
            video = made.add_stream_from_template(stream, opaque=True)
            _tag(video)
            for packet in read.demux(stream):
                if packet.size:
                    if self.hurry:
                        raise InterruptedError("stopped by a signal")
                    # Not every reader finds it in a fragment; without it the last frame would last no time.
                    packet.duration = packet.duration or round(self.time_base / stream.time_base)
                    packet.stream = video
                    made.mux(packet)
                    count += 1
        return count

    def _discard(self) -> None:
        with suppress(Exception):  # a container without a reader cannot write its trailer
            self.container.close()
        self._drop()

    def _drop(self) -> None:
        for one in (self.output, self.part):
            if one is not None:
                one.drop()


def _choice(av: ModuleType, kind: str, encoding: Encoding) -> tuple[Codec, str, int]:
    """The codec, the name of its encoder, and the quality. ValueError for a choice that is not to be had."""
    names = CONTAINERS[kind].codecs
    found = {name: encoder for name in CODECS if (encoder := _encoder(av, CODECS[name]))}
    possible = [name for name in names if name in found]
    name = encoding.codec or next(iter(possible), names[0])
    if name not in possible:
        raise ValueError(f"codec: got {name} for {kind}, expected {' or '.join(possible) or 'a PyAV with an encoder'}")
    codec, encoder = CODECS[name], found[name]
    if encoding.crf is not None:
        if not 0 <= encoding.crf <= codec.most:
            raise ValueError(f"crf: got {encoding.crf} for {name}, expected 0 (best) to {codec.most}")
        if encoder == "libopenh264":
            raise ValueError(f"crf: got {encoding.crf} for the encoder {encoder}, expected none, or libx264")
    return codec, encoder, codec.crf if encoding.crf is None else encoding.crf


def _encoder(av: ModuleType, codec: Codec) -> str | None:
    for name in codec.encoders:
        with suppress(ValueError):
            return av.codec.Codec(name, "w").name
    return None


def _pix_fmts(av: ModuleType, encoder: str) -> list[str]:
    known = {one.name for one in av.codec.Codec(encoder, "w").video_formats or ()}
    return [name for name in PIX_FMTS if name in known]


def _stream(
    av: ModuleType, container: Any, codec: Codec, encoder: str, crf: int, pix_fmt: str, size: tuple[int, int],
    rate: Fraction,
) -> Any:  # fmt: skip
    """The container's video stream with its encoder open. ValueError where the encoder refuses size or pixel format."""
    if encoder == "libsvtav1":
        os.environ.setdefault("SVT_LOG", "0")  # its log goes to stderr
    height, width = size
    video = container.add_stream(encoder, rate=rate)
    video.width, video.height, video.pix_fmt = width, height, pix_fmt
    context = video.codec_context
    # One thread: the model keeps the other cores. A key frame each second, to seek to.
    context.thread_count, context.gop_size, context.time_base = 1, max(1, round(rate)), 1 / rate
    context.colorspace = context.color_primaries = context.color_trc = BT709
    context.color_range = LIMITED
    if encoder == "libopenh264":
        context.bit_rate = int(height * width * rate / 4)
    else:
        context.bit_rate, video.options = 0, codec.options | {"crf": str(crf)}
    _tag(video)
    try:
        context.open()
    except Exception as error:
        got = f"{width}x{height} pixels in {pix_fmt} at {float(rate):g} frames a second"
        raise ValueError(f"{encoder}: got {got}, expected what it can code ({error})") from None
    return video


def _tag(video: Any) -> None:
    """Name HEVC as Apple's players want it: parameters in the header alone."""
    if video.codec_context.name in ("libx265", "hevc"):
        video.codec_context.codec_tag = "hvc1"


def packets_in(av: ModuleType, path: Path) -> int:
    """Number of whole frames in a file, which may be cut; 0 if it does not open."""
    count = 0
    with suppress(Exception), av.open(str(path)) as container:
        for packet in container.demux(video=0):
            count += packet.size > 0 and not packet.is_corrupt
    return count


def trim(path: Path) -> None:
    """Cut a fragmented mp4 behind its last whole fragment."""
    with path.open("r+b") as file:
        size, at, end = os.fstat(file.fileno()).st_size, 0, 0
        while at + 16 <= size:
            file.seek(at)
            length, name, large = struct.unpack(">I4sQ", file.read(16))
            at += large if length == 1 else length or size
            if at > size or length in range(2, 8):
                break
            if name != b"moof":  # a moof is worth nothing without the mdat behind it
                end = at
        file.truncate(end)
