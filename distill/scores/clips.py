"""Three of VBench's quality dimensions on any clip: those that need no weights, and optical flow instead of networks.

temporal_flickering  (255 - d) / 255, d the mean absolute difference of successive frames. VBench counts static clips
                     alone; `static` tells them by VBench's rule.
motion_smoothness    (255 - e) / 255, e the mean absolute error of frames 1, 3, 5, ..., each interpolated from its two
                     neighbours.
dynamic_degree       1 if enough pairs of frames, taken at about 8 a second, move far enough, else 0.

Rules and constants are those of VBench's code (arXiv 2311.17982). The flow is OpenCV's DIS: VBench has RAFT for
dynamic degree and for static clips, and AMT interpolates its frames.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

LEAST_SIZE, LEAST_FRAMES = 12, 3  # pixels each way, which DIS needs; frames, of which the middle one is interpolated
SAMPLED_FPS = 8  # of the pairs that show whether a clip is dynamic


Flow = Callable[[np.ndarray, np.ndarray], np.ndarray]  # from RGB frame to RGB frame: float32 [H, W, 2], x and y


class Rule(NamedTuple):
    """When a clip moves."""

    pixels: float  # from one frame to the next, of a picture whose short side is 256
    pairs: int  # of 16 frames
    share: float  # of the pixels: those that move most

    def threshold(self, short_side: int) -> float:
        return self.pixels * short_side / 256

    def count(self, frames: int) -> int:
        return round(self.pairs * frames / 16)


DYNAMIC = Rule(6.0, 4, 0.05)
STATIC = Rule(3.0, 2, 0.02)


class ClipScorer:
    """Scores clips. ValueError where OpenCV is not installed."""

    def __init__(self, threads: int = 1) -> None:
        try:
            import cv2
        except ImportError:
            raise ValueError(
                "videos: got no package opencv-python-headless, expected pip install 'greedy-stream[evaluate]'"
            ) from None
        cv2.setNumThreads(threads)
        self.fine, self.fast = dis_flow("MEDIUM"), dis_flow("FAST")

    def __call__(self, frames: Iterable[np.ndarray], fps: float) -> dict[str, float]:
        """The scores of uint8 frames [H, W, 3], of which at most five are held at a time.

        Beside the dimensions: `frames`, `height`, `width`; `static`, 0 or 1; `flow`, pixels that the fastest 5% move
        from one sampled frame to the next, mean over the pairs; `flow_threshold`. dynamic_degree is NaN for fewer than
        three sampled frames. ValueError for a clip that is too short or too small.
        """
        reading = _Reading(self.fine, self.fast, max(1, round(fps / SAMPLED_FPS)))
        for frame in frames:
            reading.add(frame)
        return reading.scores()


class _Reading:
    """What is known of a clip while its frames come in."""

    def __init__(self, fine: Flow, fast: Flow, step: int) -> None:
        self.fine, self.fast, self.step = fine, fast, step  # step: frames from one sampled frame to the next
        self.count = 0
        self.kept: dict[int, np.ndarray] = {}  # frames by their number
        self.changes: list[float] = []  # between successive frames
        self.errors: list[float] = []  # of interpolated frames
        self.steps: list[float] = []  # pixels between successive frames
        self.moves: list[float] = []  # pixels between sampled frames

    def add(self, frame: np.ndarray) -> None:
        number = self.count
        if number == 0:
            check_size(frame)
        else:
            self.changes.append(difference(self.kept[number - 1], frame))
            self.steps.append(largest(self.fast(self.kept[number - 1], frame), STATIC.share))
            wanted = {back for back in (2, self.step) if number % back == 0}
            ahead = {back: self.fine(self.kept[number - back], frame) for back in wanted}
            if 2 in wanted:
                before, skipped = self.kept[number - 2], self.kept[number - 1]
                self.errors.append(difference(halfway(before, frame, ahead[2], self.fine(frame, before)), skipped))
            if self.step in wanted:
                self.moves.append(largest(ahead[self.step], DYNAMIC.share))
        self.kept[number] = frame
        needed = {0, number - 1, number, number // self.step * self.step}
        self.kept = {n: one for n, one in self.kept.items() if n in needed}
        self.count += 1

    def scores(self) -> dict[str, float]:
        if self.count < LEAST_FRAMES:
            raise ValueError(f"got {self.count} frame{'s' * (self.count != 1)}, expected at least {LEAST_FRAMES}")
        first, last = self.kept[0], self.kept[self.count - 1]
        ends = [largest(self.fast(*pair), STATIC.share) for pair in ((first, last), (last, first))]
        height, width = first.shape[:2]
        short = min(height, width)
        return {
            "frames": self.count, "height": height, "width": width,
            "temporal_flickering": normalised(self.changes),
            "motion_smoothness": normalised(self.errors),
            "dynamic_degree": dynamic_degree(self.moves, short),
            "static": float(is_static(self.steps, ends, short)),
            "flow": float(np.mean(self.moves)) if self.moves else math.nan,
            "flow_threshold": DYNAMIC.threshold(short),
        }  # fmt: skip


def dis_flow(preset: str) -> Flow:
    """OpenCV's DIS with one of its presets."""
    import cv2

    method = cv2.DISOpticalFlow_create(getattr(cv2, f"DISOPTICAL_FLOW_PRESET_{preset}"))

    def flow(before: np.ndarray, after: np.ndarray) -> np.ndarray:
        grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (before, after)]
        return method.calc(*grey, None)

    return flow


def check_size(frame: np.ndarray) -> None:
    height, width = frame.shape[:2]
    if min(height, width) < LEAST_SIZE:
        raise ValueError(f"got {width}x{height} pixels, expected at least {LEAST_SIZE} each way")


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference of two uint8 frames."""
    import cv2

    return float(cv2.absdiff(one, other).mean(dtype=np.float64))


def halfway(before: np.ndarray, after: np.ndarray, ahead: np.ndarray, back: np.ndarray) -> np.ndarray:
    """The uint8 frame between two frames, by the flows from each to the other.

    Their mean is taken for the flow of the frame between. Each frame is moved by half of it, and the two are averaged.
    """
    import cv2

    height, width = before.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    dx, dy = np.moveaxis((ahead - back) / 4, 2, 0)  # half of the mean of `ahead` and `-back`
    moved = [
        cv2.remap(frame.astype(np.float32), x + sign * dx, y + sign * dy, cv2.INTER_CUBIC, None, cv2.BORDER_REPLICATE)
        for frame, sign in ((before, -1), (after, 1))
    ]
    return np.clip(np.rint((moved[0] + moved[1]) / 2), 0, 255).astype(np.uint8)


def largest(flow: np.ndarray, share: float) -> float:
    """Mean length of a flow over that share of the pixels in which it is longest."""
    length = np.hypot(flow[..., 0], flow[..., 1]).ravel()
    count = int(length.size * share)
    return float(np.partition(length, -count)[-count:].mean(dtype=np.float64))


def normalised(errors: list[float]) -> float:
    """Errors in steps of 8 bits -> 1 for none, 0 for 255 everywhere."""
    return (255 - float(np.mean(errors))) / 255


def dynamic_degree(moves: list[float], short_side: int) -> float:
    """1 if enough pairs of sampled frames exceed the threshold, else 0.

    NaN for fewer than three frames, where VBench needs no pair and calls every clip dynamic.
    """
    needed, limit = DYNAMIC.count(len(moves) + 1), DYNAMIC.threshold(short_side)
    return float(sum(move > limit for move in moves) >= needed) if needed else math.nan


def is_static(steps: list[float], ends: list[float], short_side: int) -> bool:
    """Whether few pairs of successive frames exceed the threshold, and first and last frame lie close together."""
    allowed, limit = STATIC.count(len(steps) + 1), STATIC.threshold(short_side)
    return sum(step > limit for step in steps) <= allowed and all(move <= 2 * allowed * limit for move in ends)
