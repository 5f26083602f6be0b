"""Noise that depends on (seed, chunk, draw) alone: the same video whatever was drawn before, in any language."""

from collections.abc import Mapping
from math import prod
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class NoiseSource(Protocol):
    """Where a stream's Gaussian noise comes from."""

    def draw(self, chunk: int, number: int, shape: tuple[int, ...]) -> Tensor:
        """Draw `number` of a chunk (0 is its initial latent): float32 of the given shape, on the CPU."""
        ...


class PhiloxNoise:
    """Philox4x64-10 with key (seed, 0) and counter (block + 1, draw, chunk, 0), then Box-Muller in float64.

    Block b gives four 64-bit words; words 2i and 2i + 1 become values 2i and 2i + 1 through
    u = ((word >> 11) + 1) * 2^-53, radius = sqrt(-2 ln u0), angle = 2 pi u1, (r cos, r sin).
    numpy's generator advances its counter before the first block, hence block + 1.
    """

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed: got {seed}, expected 0 to 2^64 - 1")
        self.seed = seed

    def draw(self, chunk: int, number: int, shape: tuple[int, ...]) -> Tensor:
        count = prod(shape)
        words = np.array([0, number, chunk, 0], dtype=np.uint64)
        key = np.array([self.seed, 0], dtype=np.uint64)
        raw = np.random.Philox(key=key, counter=words).random_raw(count + count % 2)
        uniform = ((raw >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53
        radius = np.sqrt(-2.0 * np.log(uniform[0::2]))
        angle = 2.0 * np.pi * uniform[1::2]
        values = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(-1)
        return torch.from_numpy(values[:count].astype(np.float32)).reshape(shape)


class ReplayNoise:
    """Recorded draws, {(chunk, number): tensor}; asking for another one, or another shape, is an error."""

    def __init__(self, draws: Mapping[tuple[int, int], Tensor]) -> None:
        self.draws = draws

    def draw(self, chunk: int, number: int, shape: tuple[int, ...]) -> Tensor:
        if (chunk, number) not in self.draws:
            raise ValueError(f"noise: got a request for draw {number} of chunk {chunk}, "
                             f"expected one of {len(self.draws)} recorded draws")  # fmt: skip
        found = self.draws[chunk, number]
        if tuple(found.shape) != tuple(shape):
            raise ValueError(f"noise: got a recorded draw of shape {list(found.shape)}, expected {list(shape)}")
        return found
