"""What a session's frames become: coded once for each codec that someone wants, and the recording of them."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO

import numpy as np

from serve.core.encoders import Encoder, Unit, make_encoder
from serve.core.fragments import Fragmenter

log = logging.getLogger("serve")


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

    def restart(self) -> None:
        """Forget the pictures so far: the next chunk begins with a key frame."""
        self._encoders = {}

    def close(self) -> None:
        """Let encoders and muxer go."""
        self.restart()
        self._fragmenter = Fragmenter(self._format[2])


class Recording:
    """The fragments of a session in a file without a name, up to `most` bytes. One thread adds, any may read."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._file: IO[bytes] | None = None  # without a name, so it goes however the process ends
        self.bytes = 0
        self.full = most == 0

    def add(self, coded: Coded) -> None:
        """Append a chunk. Once it is full, or the disk is, it stays as it is, so that it has no gap."""
        data = coded.fragment if self.bytes else coded.init + coded.fragment
        with self._lock:
            if self.full or self.bytes + len(data) > self._most:
                self.full = True
                return
            try:
                self._file = self._file or tempfile.TemporaryFile(prefix="greedy-serve-", buffering=0)  # noqa: SIM115
                written = os.pwrite(self._file.fileno(), data, self.bytes)
            except OSError as error:
                log.warning("a recording ends: %s", error.strerror)
                written = 0
            if written < len(data):  # a full disk takes a part
                self.full = True
                return
            self.bytes += written

    def read(self) -> bytes:
        """The mp4 so far: fragmented, of whole chunks; empty if nothing was recorded."""
        with self._lock:
            if self._file is None:
                return b""
            handle, count = os.dup(self._file.fileno()), self.bytes  # the session goes on writing, or closes its file
        try:
            return os.pread(handle, count, 0)
        finally:
            os.close(handle)

    def close(self) -> None:
        with self._lock:
            self.full = True
            if self._file is not None:
                self._file.close()
                self._file = None
