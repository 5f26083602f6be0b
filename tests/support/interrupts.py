"""KeyboardInterrupt at a chosen line of engine code, and streams that are interrupted in every call."""

import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

ENGINE = str(Path(__file__).parents[2] / "engine")
# The loop and what it changes; the rest of engine/ computes.
LOOP = tuple(
    f"{ENGINE}/{name}" for name in ("stream.py", "generators", "runtime", "bundles", "sampling", "model/cache.py")
)


class Interrupted:
    """Within the block, raises KeyboardInterrupt before the `at`-th event of code in `places`; counts all events.

    Events are lines, or with `opcodes` single instructions.
    """

    def __init__(self, at: int | None, places: tuple[str, ...] = (ENGINE,), opcodes: bool = False) -> None:
        self.at, self.places, self.opcodes, self.seen = at, places, opcodes, 0

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.places):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = self.opcodes, not self.opcodes
        return self._inside

    def _inside(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event in ("line", "opcode"):
            self.seen += 1
            if self.seen == self.at:
                raise KeyboardInterrupt
        return self._inside

    def __enter__(self) -> "Interrupted":
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)


def events_of(call: Callable[[], object], **options: Any) -> int:
    """How many events a call has."""
    with Interrupted(None, **options) as counted:
        call()
    return counted.seen


Step = Callable[[Any], Any]  # a call of a stream; returns frames, a latent or None


def plain(stream: Any, steps: Sequence[Step]) -> list[np.ndarray]:
    """The results of calls that nobody interrupts."""
    return [np.array(step(stream)) for step in steps]


def stumbling(
    stream: Any, steps: Sequence[Step], points: Callable[[int], Sequence[tuple[int, tuple[str, ...]]]],
    opcodes: bool = False,
) -> tuple[list[np.ndarray], int]:  # fmt: skip
    """The results of the same calls. Call number n is interrupted at every (event, places) of points(n), then repeated.

    Returns the results and the number of interrupts.
    """
    results, interrupts = [], 0
    for number, step in enumerate(steps):
        for at, places in (*points(number), (None, ())):
            before = stream.handed
            try:
                with Interrupted(at, places or (ENGINE,), opcodes) if at else Interrupted(None, ("nowhere",)):
                    results.append(np.array(step(stream)))
                break
            except KeyboardInterrupt:
                interrupts += 1
                if opcodes and stream.handed > before:  # between the call's last instruction and the assignment here
                    results.append(np.array(stream.last))
                    break
    return results, interrupts


def same(got: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    """Equal to the bit; says which call was not."""
    wrong = [at for at, (a, b) in enumerate(zip(got, expected, strict=True)) if not np.array_equal(a, b)]
    assert not wrong, f"calls {wrong[:5]} of {len(expected)}"


def spread(calls: int, call: Callable[[], object], seed: int = 0) -> Callable[[int], list[tuple[int, tuple[str, ...]]]]:
    """Points for `stumbling`: over all calls at even distances in the loop's lines of `call`, and anywhere in it."""
    draw = random.Random(seed)
    lines, everywhere = events_of(call, places=LOOP), events_of(call)
    order = [1 + at * lines // calls for at in range(calls)]
    draw.shuffle(order)
    return lambda number: [(order[number], LOOP), (draw.randrange(1, everywhere), (ENGINE,))]
