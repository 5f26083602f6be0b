"""Encodes the frames of one session, once for all who watch or record it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import Image

BT709 = 1  # ITU-T H.273
LIMITED = 1  # luma from 16 to 235
KEY_SECONDS = 2.0  # a key frame at least so often, to seek to in a download
SHORT_SIDE = 128  # smaller pictures are enlarged to at least this: half the chroma of 32 pixels is too little
MIME = 'video/mp4; codecs="avc1.42C01E"'  # constrained baseline: every browser's decoder takes it

# No encoder looks ahead or makes B-frames, so that it returns each frame at once. One thread: the model has the others.
_ENCODERS = {
    "h264": ("libx264", {"preset": "ultrafast", "tune": "zerolatency", "crf": "20", "profile": "baseline"}),
    "vp8": ("libvpx", {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0", "crf": "10", "b": "4M"}),
}


@dataclass(frozen=True)
class Unit:
    """One coded frame."""

    data: bytes  # H.264: Annex B with SPS and PPS ahead of each key frame
    position: int  # number of the frame since its session began
    key: bool


class Encoder(Protocol):
    """Takes the frames of a session, chunk after chunk."""

    def encode(self, frames: np.ndarray, position: int, key: bool) -> list[Unit]:
        """Code frames uint8 [T, H, W, 3], the first of which is number `position`; `key`: it can be decoded alone."""
        ...


class VideoEncoder:
    """H.264 or VP8 of frames [height, width] at `fps`, each pixel enlarged `scale` times each way."""

    def __init__(self, codec: str, height: int, width: int, fps: float, scale: int) -> None:
        rate = Fraction(fps).limit_denominator(1001)
        name, options = _ENCODERS[codec]
        context = VideoCodecContext.create(name, "w")
        assert isinstance(context, VideoCodecContext)
        context.width, context.height, context.pix_fmt = width * scale, height * scale, "yuv420p"
        context.framerate, context.time_base = rate, 1 / rate
        context.gop_size, context.thread_count = max(1, round(KEY_SECONDS * rate)), 1
        # VP8 has no field for its colours: decoders take BT.601 (RFC 6386, 9.2).
        self._matrix = Colorspace.ITU601 if codec == "vp8" else Colorspace.ITU709
        if codec != "vp8":
            context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED
        context.options = options
        self._context, self._scale, self._colours = context, scale, VideoReformatter()

    def encode(self, frames: np.ndarray, position: int, key: bool) -> list[Unit]:
        units = []
        for number, picture in enumerate(self._pictures(frames), start=position):
            picture.pts, picture.time_base = number, self._context.time_base
            picture.pict_type = PictureType.I if key and number == position else PictureType.NONE
            packets = self._context.encode(picture)
            units.append(Unit(b"".join(map(bytes, packets)), number, any(packet.is_keyframe for packet in packets)))
        return units

    def _pictures(self, frames: np.ndarray) -> Iterator[av.VideoFrame]:
        """The frames in yuv420p, enlarged."""
        if self._scale % 2:
            for frame in enlarged(frames, self._scale):
                yield self._converted(frame, "yuv420p")
            return
        # Colours are converted before pixels are enlarged, all frames at once as one tall picture.
        count, height, width, _ = frames.shape
        tall = self._converted(frames.reshape(count * height, width, 3), "yuv444p").to_ndarray()
        planes = tall.reshape(3, count, height, width)
        for number in range(count):
            flat = [_repeated(planes[0, number], self._scale).reshape(-1, width * self._scale)]
            flat += [_repeated(p[number], self._scale // 2).reshape(-1, width * self._scale) for p in planes[1:]]
            yield av.VideoFrame.from_ndarray(np.concatenate(flat), format="yuv420p")

    def _converted(self, frame: np.ndarray, pix_fmt: str) -> av.VideoFrame:
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        made = self._colours.reformat(
            picture, format=pix_fmt, dst_colorspace=self._matrix, dst_color_range=ColorRange.MPEG
        )
        assert made is not None
        return made


class JpegEncoder:
    """Each frame alone, enlarged."""

    def __init__(self, scale: int) -> None:
        self._scale = scale

    def encode(self, frames: np.ndarray, position: int, key: bool) -> list[Unit]:
        units = []
        for number, frame in enumerate(enlarged(frames, self._scale), start=position):
            buffer = io.BytesIO()
            Image.fromarray(frame).save(buffer, "jpeg", quality=85)
            units.append(Unit(buffer.getvalue(), number, True))
        return units


def make_encoder(codec: str, height: int, width: int, fps: float, scale: int) -> Encoder:
    """The encoder of "h264", "vp8" or "jpeg" for frames [height, width]."""
    return JpegEncoder(scale) if codec == "jpeg" else VideoEncoder(codec, height, width, fps, scale)


def scale_for(height: int, width: int) -> int:
    """How often the pixels of small pictures are repeated: a power of two, 1 from SHORT_SIDE on."""
    scale = 1
    while min(height, width) * scale < SHORT_SIDE:
        scale *= 2
    return scale


def enlarged(frames: np.ndarray, scale: int) -> np.ndarray:
    """Frames [T, H, W, 3] with each pixel `scale` times each way."""
    return frames if scale == 1 else frames.repeat(scale, axis=1).repeat(scale, axis=2)


def _repeated(plane: np.ndarray, times: int) -> np.ndarray:
    return plane if times == 1 else plane.repeat(times, axis=0).repeat(times, axis=1)
