"""Signals that end a stream, but never during the write of a frame or while an output gets its name."""

from types import FrameType

import numpy as np

from engine.media.sinks import Sink
from engine.program import handle, leave, restore


class Interrupt:
    """Ctrl-C, SIGTERM and SIGHUP stop the stream.

    Before the first frame each signal raises KeyboardInterrupt. From then on the first one does, and never during a
    write. Further ones only ask to hurry: what follows must reach the end of the output. On stdout there is nothing to
    end, and its reader may never read again: there the second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.to_stdout = False
        self.writing = False
        self.asked = False  # a signal has come during a write
        self.stopped = False  # a signal has come before the end of the stream
        self.status = 0  # exit status of a run that the first signal ended before its first frame: 128 + its number
        self.hurry = False  # another signal has come: do not write the decoded rest
        self.written = 0  # frames, each counted with its write: a signal cannot come in between
        self._ended = False
        self._ending: Sink | None = None

    def __enter__(self) -> "Interrupt":
        self._before = handle(self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        restore(self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.status and self.to_stdout:
            leave(self.status - 128, frame)
        self.status = self.status or 128 + number
        again = self.stopped or self._ended
        self.stopped = self.stopped or not self._ended
        if self._ending is not None:
            self._ending.hurry = True
        if self.written and again:
            self.hurry = True
        elif self.writing:
            self.asked = True
        elif not self._ended:
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
            self.asked = False
            raise KeyboardInterrupt

    def end(self) -> None:
        """The stream has ended: from now on no signal raises."""
        self._ended = True

    def close(self, sink: Sink) -> None:
        """Give the output its name."""
        self._ending = sink
        sink.close()

    def abort(self, sink: Sink, error: BaseException) -> None:
        """Keep what there is after an error, which gets a note that says where."""
        self._ended, self._ending = True, sink
        sink.abort(error)
