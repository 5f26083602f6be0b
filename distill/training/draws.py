"""Randomness that depends on (seed, step, sample) alone.

A resumed run, and a run on other processes, draw the same numbers for sample i of step n. No generator state is saved.
"""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A fresh generator for a key."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> list[int]:
    return torch.randperm(count, generator=generator(seed, "epoch", epoch)).tolist()


def clip_number(seed: int, position: int, count: int) -> int:
    """The clip, of `count`, at a position of the endless sequence of shuffled epochs."""
    epoch, place = divmod(position, count)
    return _permutation(seed, epoch, count)[place]


class Draws:
    """The draws of one step: `shared` is one generator for the whole batch; the methods draw sample by sample."""

    def __init__(self, seed: int, step: int, samples: list[int]) -> None:
        """`samples` are the numbers of this process's samples in the global batch."""
        self.seed, self.step, self.samples = seed, step, samples
        self.shared = generator(seed, step)
        self._own = [generator(seed, step, sample) for sample in samples]

    def normal(self, *shape: int) -> Tensor:
        """[B, *shape] of standard normal numbers."""
        return torch.stack([torch.randn(shape, generator=own) for own in self._own])

    def uniform(self, *shape: int) -> Tensor:
        """[B, *shape] in [0, 1)."""
        return torch.stack([torch.rand(shape, generator=own) for own in self._own])

    def choice(self, options: int, *shape: int) -> Tensor:
        """[B, *shape] of integers from 0 to `options` - 1."""
        return torch.stack([torch.randint(options, shape, generator=own) for own in self._own])

    def seeds(self) -> list[int]:
        """One seed per sample for the engine's noise."""
        return [int(torch.randint(2**62, (), generator=own)) for own in self._own]

    def clips(self, batch: int, count: int) -> list[int]:
        """The clips of these samples. Every step takes the next `batch` of `count` shuffled clips."""
        return [clip_number(self.seed, self.step * batch + sample, count) for sample in self.samples]
