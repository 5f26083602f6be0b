"""Signals that end a stream, but never during the write of a frame."""

import signal
from types import FrameType

import numpy as np

from engine.media.sinks import Sink


class Interrupt:
    """Ctrl-C and SIGTERM stop the stream, but never during the write of a frame."""

    def __init__(self) -> None:
        self.writing = self.asked = False
        self.written = 0  # frames, each counted with its write: a signal cannot come in between

    def __enter__(self) -> "Interrupt":
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if not self.writing:
            raise KeyboardInterrupt

    def write(self, sink: Sink, frame: np.ndarray) -> None:
        """Write one frame completely, then raise KeyboardInterrupt if a signal has arrived."""
        self.writing = True
        try:
            sink.write(frame)
            self.written += 1
        finally:
            self.writing = False
        if self.asked:
            raise KeyboardInterrupt
