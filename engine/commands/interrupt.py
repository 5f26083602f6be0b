"""Signals that end a stream, but never during the write of a frame or while an output gets its name."""

import signal
from types import FrameType

import numpy as np

from engine.media.sinks import Sink


class Interrupt:
    """Ctrl-C, SIGTERM and SIGHUP stop the stream.

    Before the first frame each signal raises KeyboardInterrupt. After it the first one does, never during a write, and
    one that comes while the decoded rest is written. What follows must reach the end of the output: while that ends, a
    signal only makes it hurry.
    """

    def __init__(self) -> None:
        self.writing = False
        self.asked = False  # a signal has come that nobody has acted upon
        self.stopped = False  # a signal has come
        self._raised = 0
        self.written = 0  # frames, each counted with its write: a signal cannot come in between
        self._ending: Sink | None = None

    def __enter__(self) -> "Interrupt":
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup has it ignored
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.stopped = True
        if self._ending is not None:
            self._ending.hurry = True
        elif not self.writing and (self.written == 0 or self._raised < 2):
            self._raised += 1
            raise KeyboardInterrupt

    def heard(self) -> None:
        """The signal is acted upon: writes go on, until another one comes."""
        self.asked = False

    def write(self, sink: Sink, frame: np.ndarray) -> None:
        """Write one frame completely, then raise KeyboardInterrupt if a signal has arrived."""
        self.writing = True
        try:
            sink.write(frame)
            self.written += 1
        finally:
            self.writing = False
        if self.asked:
            self._raised += 1
            raise KeyboardInterrupt

    def close(self, sink: Sink) -> None:
        """Give the output its name."""
        self._ending = sink
        sink.close()

    def abort(self, sink: Sink, error: BaseException) -> None:
        """Keep what there is after an error, which gets a note that says where."""
        self._ending = sink
        sink.abort(error)
