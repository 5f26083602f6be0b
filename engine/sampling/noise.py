"""Noise that depends on (seed, chunk, draw) alone, so that earlier draws and the language do not change a video."""

from collections.abc import Mapping
from concurrent.futures import Executor, Future
from contextlib import suppress
from math import prod
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class NoiseSource(Protocol):
    """Source of a stream's Gaussian noise."""

    def draw(self, chunk: int, count: int, shape: tuple[int, ...]) -> Tensor:
        """The first `count` draws of a chunk: float32 [count, *shape] on the CPU. Draw 0 is the initial latent."""
        ...


class PhiloxNoise:
    """Philox4x64-10 with key (seed, 0) and counter (block + 1, draw, chunk, 0), then Box-Muller in float64.

    A block yields four 64-bit words. Words 2i and 2i + 1 of a draw become its values 2i and 2i + 1 through
    u = ((word >> 11) + 1) * 2^-53, radius = sqrt(-2 ln u0), angle = 2 pi u1, (r cos, r sin).
    numpy's generator advances its counter before the first block, hence block + 1.

    The constructor raises ValueError unless 0 <= seed < 2^64.
    """

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed: got {seed}, expected 0 to 2^64 - 1")
        self._key = np.array([seed, 0], dtype=np.uint64)

    def draw(self, chunk: int, count: int, shape: tuple[int, ...]) -> Tensor:
        size = prod(shape)
        raw = np.empty((count, size + size % 2), dtype=np.uint64)
        for number in range(count):
            raw[number] = self._words(chunk, number, raw.shape[1])
        raw >>= np.uint64(11)
        raw += np.uint64(1)
        uniform = raw * 2.0**-53
        radius, angle = np.log(uniform[:, 0::2]), uniform[:, 1::2] * (2.0 * np.pi)
        radius *= -2.0
        np.sqrt(radius, out=radius)
        values = np.empty(raw.shape, dtype=np.float32)
        np.multiply(radius, np.cos(angle), out=values[:, 0::2], casting="same_kind")
        np.multiply(radius, np.sin(angle), out=values[:, 1::2], casting="same_kind")
        return torch.from_numpy(values[:, :size]).reshape(count, *shape)

    def _words(self, chunk: int, number: int, size: int) -> np.ndarray:
        # A generator of this call alone: calls may be interrupted, or overlap in threads.
        counter = np.array([0, number, chunk, 0], dtype=np.uint64)
        return np.random.Philox(key=self._key, counter=counter).random_raw(size)


class DrawnAhead:
    """A source whose draws can be asked for in advance: a worker thread makes them meanwhile, with the same numbers.

    At full size the draws of a chunk take tens of milliseconds, for which a GPU would wait.
    """

    def __init__(self, source: NoiseSource, worker: Executor) -> None:
        """The source is used by one thread at a time, unless a call of `prepare` was interrupted. The worker is left
        running."""
        self._source, self._worker = source, worker
        # What was asked for, and its draws. One value, so that an interrupted call leaves no half of it.
        self._drawing: tuple[tuple[int, int, tuple[int, ...]], Future[Tensor]] | None = None

    def prepare(self, chunk: int, count: int, shape: tuple[int, ...]) -> None:
        """Begin the draws that the next call of `draw` will want."""
        asked = chunk, count, shape
        if self._drawing is None or self._drawing[0] != asked:
            self._settle()
            self._drawing = None
            with suppress(RuntimeError):  # the interpreter is shutting down: `draw` does it then
                self._drawing = asked, self._worker.submit(self._source.draw, chunk, count, shape)

    def draw(self, chunk: int, count: int, shape: tuple[int, ...]) -> Tensor:
        if self._drawing is None or self._drawing[0] != (chunk, count, shape):
            self._settle()
            return self._source.draw(chunk, count, shape)
        try:
            draws = self._drawing[1].result()
        except Exception:
            self._drawing = None  # the next call draws again
            raise
        self._drawing = None  # not before: an interrupted call would leave the worker drawing unnoticed
        return draws

    def _settle(self) -> None:
        """Wait until the worker does not use the source. An error belongs to the call that asks for these draws."""
        if self._drawing is not None:
            self._drawing[1].exception()


class ReplayNoise:
    """Recorded draws, {(chunk, number): tensor}; `draw` raises ValueError for a missing draw or another shape."""

    def __init__(self, draws: Mapping[tuple[int, int], Tensor]) -> None:
        self.draws = draws

    def draw(self, chunk: int, count: int, shape: tuple[int, ...]) -> Tensor:
        missing = [number for number in range(count) if (chunk, number) not in self.draws]
        if missing:
            raise ValueError(f"noise: got a request for draw {missing[0]} of chunk {chunk}, "
                             f"expected one of {len(self.draws)} recorded draws")  # fmt: skip
        found = torch.stack([self.draws[chunk, number] for number in range(count)])
        if tuple(found.shape[1:]) != tuple(shape):
            raise ValueError(f"noise: got recorded draws of shape {list(found.shape[1:])}, expected {list(shape)}")
        return found
