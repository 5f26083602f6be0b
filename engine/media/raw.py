"""Sinks of uncompressed frames: RGB and YUV4MPEG2. They need no package."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

from engine.media.base import BaseSink, Encoding, Output, check_pix_fmt


class _BytesSink(BaseSink):
    """Bytes that need no ending: what is written plays."""

    def __init__(self, size: tuple[int, int], path: Path | None) -> None:
        super().__init__(size)
        self.output = Output(path, self.notes)

    def _finish(self) -> None:
        self.output.keep()

    def _rescue(self) -> Path | None:
        return self.output.rescue()

    def _discard(self) -> None:
        self.output.drop()


class RawSink(_BytesSink):
    """RGB bytes, frame after frame, no header."""

    def __init__(self, size: tuple[int, int], rate: Fraction, path: Path | None, encoding: Encoding) -> None:
        encoding.refuse("rgb", "codec", "crf", "pix_fmt")
        super().__init__(size, path)

    def _put(self, frame: np.ndarray) -> None:
        self.output.write(frame.data)


# BT.601, limited range. A y4m has no field for the matrix; readers assume this one.
RGB_TO_YUV = np.array(
    [
        [65.481, 128.553, 24.966],
        [-37.797, -74.203, 112.0],
        [112.0, -93.786, -18.214],
    ],
    dtype=np.float32,
) / np.float32(255)
YUV_OFFSET = np.array([[16], [128], [128]], dtype=np.float32)
# Chroma of 4:2:0 lies between the pixels that it is the mean of, as in a JPEG.
Y4M_SPACE = {"yuv420p": "420jpeg", "yuv422p": "422", "yuv444p": "444"}


class Y4mSink(_BytesSink):
    """YUV4MPEG2, 4:4:4 unless asked otherwise: takes every size, plays everywhere."""

    def __init__(self, size: tuple[int, int], rate: Fraction, path: Path | None, encoding: Encoding) -> None:
        encoding.refuse("y4m", "codec", "crf")
        self.pix_fmt = encoding.pix_fmt or "yuv444p"
        check_pix_fmt(self.pix_fmt, list(Y4M_SPACE), "y4m", size)
        height, width = size
        shape = f"W{width} H{height} F{rate.numerator}:{rate.denominator} Ip A1:1"
        self.header = f"YUV4MPEG2 {shape} C{Y4M_SPACE[self.pix_fmt]} XCOLORRANGE=LIMITED\n".encode()
        super().__init__(size, path)

    def _put(self, frame: np.ndarray) -> None:
        yuv = RGB_TO_YUV @ frame.reshape(-1, 3).T.astype(np.float32) + YUV_OFFSET  # [3, H*W]
        planes = [yuv[0], *(_thinned(plane.reshape(frame.shape[:2]), self.pix_fmt) for plane in yuv[1:])]
        data = b"".join(np.rint(plane).astype(np.uint8).tobytes() for plane in planes)
        self.output.write(self.header + b"FRAME\n" + data)
        self.header = b""


def _thinned(plane: np.ndarray, pix_fmt: str) -> np.ndarray:
    """A chroma plane [H, W] with one value for all pixels that share it."""
    if pix_fmt != "yuv444p":
        plane = (plane[:, ::2] + plane[:, 1::2]) / 2
    return (plane[::2] + plane[1::2]) / 2 if pix_fmt == "yuv420p" else plane
