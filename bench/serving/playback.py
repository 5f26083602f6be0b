"""A player, simulated: when each chunk of a live video is shown, which come too late, how long the picture stands."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Arrival:
    """A chunk reached the viewer at `at` seconds, of any clock."""

    at: float
    frames: int


@dataclass(frozen=True)
class Playback:
    """What a viewer saw, chunk by chunk.

    shown  when its first frame was shown, on the clock of the arrivals
    stood  seconds for which the picture stood before it, because it was late; the first chunk has no deadline
    """

    shown: list[float]
    stood: list[float]

    @property
    def deadlines(self) -> int:
        return max(0, len(self.shown) - 1)

    @property
    def underruns(self) -> int:
        return sum(seconds > 0 for seconds in self.stood)

    @property
    def seconds_stood(self) -> float:
        return sum(self.stood)


def played(arrivals: Sequence[Arrival], fps: float, buffer: float) -> Playback:
    """Play chunks at `fps`, from `buffer` seconds after the first arrival on.

    A late chunk is shown when it arrives, and all later ones are due that much later: no frame is skipped.
    """
    shown: list[float] = []
    stood: list[float] = []
    due = arrivals[0].at + buffer if arrivals else 0.0
    for number, arrival in enumerate(arrivals):
        late = max(0.0, arrival.at - due) if number else 0.0
        shown.append(due + late)
        stood.append(late)
        due += late + arrival.frames / fps
    return Playback(shown, stood)


def realtime_factor(arrivals: Sequence[Arrival], fps: float) -> float | None:
    """Seconds of video per second: all chunks but the last, over the time from the first to the last.

    The last chunk plays after its arrival. None for fewer than two chunks, and for chunks that came at once.
    """
    if len(arrivals) < 2 or arrivals[-1].at <= arrivals[0].at:
        return None
    return sum(one.frames for one in arrivals[:-1]) / fps / (arrivals[-1].at - arrivals[0].at)
