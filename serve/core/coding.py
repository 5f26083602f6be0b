"""What a session's frames become: coded once for each codec that someone wants, and the recording of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from serve.core.encoders import Encoder, Unit, make_encoder
from serve.core.fragments import Fragmenter


@dataclass(frozen=True)
class Coded:
    """One chunk in one codec. H.264 also as a fragment of an mp4 whose first bytes are `init`."""

    units: tuple[Unit, ...]
    fragment: bytes = b""
    init: bytes = b""


class Coding:
    """The encoders of one session, for frames [height, width] at `fps`, enlarged `scale` times."""

    def __init__(self, height: int, width: int, fps: float, scale: int) -> None:
        self._format = height, width, fps, scale
        self._encoders: dict[str, Encoder] = {}
        self._fragmenter = Fragmenter(fps)

    def code(self, frames: np.ndarray, position: int, codecs: Mapping[str, bool]) -> dict[str, Coded]:
        """Code a chunk uint8 [T, H, W, 3] from frame `position` on in `codecs`; their values ask for a key frame.

        An encoder that nobody wants ends.
        """
        self._encoders = {codec: one for codec, one in self._encoders.items() if codec in codecs}
        made = {}
        for codec, key in codecs.items():
            encoder = self._encoders.get(codec) or self._encoders.setdefault(codec, make_encoder(codec, *self._format))
            units = tuple(encoder.encode(frames, position, key))
            if codec == "h264":
                made[codec] = Coded(units, self._fragmenter.fragment(units), self._fragmenter.init)
            else:
                made[codec] = Coded(units)
        return made

    def close(self) -> None:
        """Let the encoders go."""
        self._encoders = {}


class Recording:
    """The fragments of a session in a file without a name, up to `most` bytes. One thread adds, any may read."""

    def __init__(self, most: int) -> None:
        self._most, self._file = most, -1  # no file yet: a session that is refused needs none
        self.bytes = 0
        self.full = most == 0

    def add(self, coded: Coded) -> None:
        """Append a chunk. Once it is full, it stays as it is, so that it has no gap."""
        data = coded.fragment if self.bytes else coded.init + coded.fragment
        if self.full or self.bytes + len(data) > self._most:
            self.full = True
            return
        if self._file < 0:
            self._file = _nameless()
        os.pwrite(self._file, data, self.bytes)
        self.bytes += len(data)

    def read(self) -> bytes:
        """The mp4 so far: fragmented, of whole chunks; empty if nothing was recorded."""
        return b"" if self._file < 0 else os.pread(self._file, self.bytes, 0)

    def close(self) -> None:
        self.full = True
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _nameless() -> int:
    """A file that goes when it is closed, however the process ends."""
    handle, path = tempfile.mkstemp(prefix="greedy-serve-")
    os.unlink(path)
    return handle
