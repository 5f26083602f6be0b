"""Prompts that blend: the weighted mean of several texts, and the way from one prompt to the next.

The C++ core computes the same bits (csrc/core/blending.cpp). All arithmetic is float32, rounded to the model's type at
the end, in this order:

    mean        e_0 w_0 + e_1 w_1 + ..., from left to right; w_i is weight_i / total, divided in float64
    transition  fma(w, target - start, start) for w < 0.5, else fma(w - 1, target - start, target): torch.lerp
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import isfinite
from numbers import Real

import torch
from torch import Tensor

from engine.runtime.passes import TextKV
from engine.runtime.streams import Words

MOST_CHUNKS = 1 << 20  # of a transition


def check_words(words: Words) -> tuple[tuple[str, float], ...]:
    """Texts and their weights. ValueError (got and expected) unless there is one, and all weights are above 0."""
    try:
        pairs = [(text, weight) for text, weight in words]
        found = tuple((text, float(one)) for text, one in pairs if isinstance(text, str) and isinstance(one, Real))
    except (TypeError, ValueError, OverflowError):
        pairs, found = [], ()
    if not found or len(found) < len(pairs):
        expected = "a text, an embedding, or pairs of a text and a weight"
        raise ValueError(f"prompt: got {str(words)[:100]!r}, expected {expected}")
    weights = [weight for _, weight in found]
    if not all(weight > 0 for weight in weights) or not isfinite(sum(weights)):
        raise ValueError(f"prompt: got weights {weights}, expected them above 0, and a finite sum")
    return found


def mean_of(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean of embeddings of one shape."""
    *_, total = accumulate(weights)
    mean, *rest = (part.float() * (weight / total) for part, weight in zip(parts, weights, strict=True))
    for part in rest:
        mean = mean + part
    return mean.to(parts[0].dtype)


def check_transition(transition: int) -> None:
    """ValueError for a length that is no number of chunks."""
    if type(transition) is not int or not 0 <= transition <= MOST_CHUNKS:
        raise ValueError(f"transition: got {transition!r}, expected 0 to {MOST_CHUNKS} chunks")


@dataclass
class Prompt:
    """A prompt that was set. Some chunks later the stream has reached it."""

    number: int
    text_emb: Tensor  # [B, rows, text_dim]
    text_kv: TextKV | None = None  # None once the stream has taken it over
    strengths: Mapping[str, float] = field(default_factory=dict)  # of the adapters in the weights of text_kv
    recommit: bool = False  # for every chunk on the way
    due: bool = False  # an earlier prompt, which no chunk took over, asked for a recommit
    transition: int = 0  # chunks in which it is reached; 0 and 1: at once

    def check_start(self, *starts: Prompt) -> None:
        """ValueError if a transition from one of these is not possible."""
        for start in starts if self.transition > 1 else ():
            if start.text_emb.shape != self.text_emb.shape:
                got, expected = list(self.text_emb.shape), list(start.text_emb.shape)
                raise ValueError(f"transition: got an embedding {got} after one {expected}, expected the same shape")


@dataclass(frozen=True)
class Course:
    """Where a chunk stands between two prompts."""

    to: Prompt
    start: Tensor | None = None  # the embedding that the transition began with; None once `to` is reached
    step: int = 1

    @property
    def key(self) -> tuple[int, int]:
        """Differs between any two embeddings of a stream."""
        return self.to.number, 0 if self.start is None else self.step

    @property
    def text_emb(self) -> Tensor:
        """The embedding of the chunk."""
        if self.start is None:
            return self.to.text_emb
        target, share = self.to.text_emb, self.step / self.to.transition
        return torch.lerp(self.start.float(), target.float(), share).to(target.dtype)

    @property
    def recommit(self) -> bool:
        """Whether the window is rewritten where the chunk's embedding is a new one."""
        return self.to.recommit or (self.to.due and self.step == 1)

    def after(self, prompt: Prompt) -> Course:
        """That of the next chunk, where `prompt` was set last."""
        if prompt is not self.to:
            return Course(prompt, self.text_emb if prompt.transition > 1 else None)
        if self.start is None:
            return self
        last = self.step + 1 >= prompt.transition
        return Course(prompt, None if last else self.start, self.step + 1)
