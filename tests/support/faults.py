"""Faults of a streaming engine, planted on purpose: every gate must see each of them.

A fault changes what the stages are asked to do, as a wrong kernel or a wrong loop would. The other kind, below, is
KeyboardInterrupt at a chosen line of engine code.
"""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import torch

from engine.model.cache import CachedAttention
from engine.runtime import cuda_graphs
from engine.runtime.cuda_graphs import GraphedStages
from engine.runtime.stages import TorchStages


def _changed_pass(change):
    """A patch under which every pass is changed before it runs."""

    @contextmanager
    def planted() -> Iterator[None]:
        inside: list[int] = []
        with (
            mock.patch.object(TorchStages, "run", _before(TorchStages.run, change, inside)),
            mock.patch.object(GraphedStages, "run", _before(GraphedStages.run, change, inside)),
        ):
            yield

    return planted


def _before(run, change, inside):
    """`run` of a changed pass. GraphedStages calls TorchStages: the pass is changed once."""

    def wrapped(self, step, cache, text_kv):
        if inside:
            return run(self, step, cache, text_kv)
        inside.append(1)
        try:
            return run(self, change(step), cache, text_kv)
        finally:
            inside.pop()

    return wrapped


def _forget(step):
    """The last written slot is not attended to."""
    return replace(step, valid=step.valid - 1) if step.valid > step.frames else step


_first: dict[tuple, tuple] = {}


def _stuck(step):
    """Every chunk is rotated as if it were at the first position."""
    tables = _first.setdefault((step.kind.role, step.cos.shape, step.cos.device), (step.cos, step.sin))
    return replace(step, cos=tables[0], sin=tables[1])


@contextmanager
def _attention_zero() -> Iterator[None]:
    def zero(self, layer, q, k, v):
        self.cache.write(layer, self.slot, k, v)
        return torch.zeros_like(q)

    def fused(self, layer, qkv, *rest):
        return torch.zeros_like(inner(self, layer, qkv, *rest))

    inner = CachedAttention.fused
    with mock.patch.multiple(CachedAttention, __call__=zero, fused=fused):
        yield


@contextmanager
def _frozen() -> Iterator[None]:
    """A graph keeps the slot numbers of its capture."""

    def call(self, *args):
        for static, arg in zip(self._static, args, strict=True):
            if isinstance(arg, torch.Tensor):
                static.copy_(arg)
        self._replay()
        return self._output.clone() if isinstance(self._output, torch.Tensor) else self._output

    with mock.patch.object(cuda_graphs._Graph, "__call__", call):
        yield


# name -> a context in which the fault is there
FAULTS = {
    "last slot forgotten": _changed_pass(_forget),
    "rotation stuck": _changed_pass(_stuck),
    "keys to slot 0": _changed_pass(lambda step: replace(step, slot=0)),
    "attention zero": _attention_zero,
}
GRAPH_FAULTS = {"slot numbers frozen": _frozen}


# --- interrupts


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
