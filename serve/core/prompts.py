"""The prompt of a session: texts with weights, and the way from one prompt to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.bundles.native import NativePipeline
from engine.model.text import check_prompt
from engine.stream import Pipeline
from serve.core.messages import Words

MOST_WORDS = 16  # texts of one prompt


def check_words(words: Words) -> None:
    """ValueError for a prompt that no model can read, or weights that do not add up to more than 0."""
    if not 1 <= len(words) <= MOST_WORDS:
        raise ValueError(f"prompt: got {len(words)} texts, expected 1 to {MOST_WORDS}")
    for text, _ in words:
        check_prompt(text)
    weights = [weight for _, weight in words]
    if not all(weight >= 0 for weight in weights) or not 0 < sum(weights) < float("inf"):
        raise ValueError(f"prompt: got weights {weights}, expected them >= 0, and a finite sum above 0")


def blends(pipeline: Pipeline | NativePipeline) -> bool:
    """Whether prompts can be mixed: where Python encodes them."""
    return isinstance(pipeline, Pipeline)


def check_blends(pipeline: Pipeline | NativePipeline) -> None:
    """ValueError where prompts cannot be mixed."""
    if not blends(pipeline):
        raise ValueError("transition: got a bundle that the C++ core runs, expected a prompt of one text, at once")


class Direction:
    """Which prompt a stream follows: a text, or embeddings on their way to another prompt.

    A prompt of one text goes to the stream as it is, so that a session's frames are those of a plain run.
    """

    def __init__(self, pipeline: Pipeline | NativePipeline, words: Words) -> None:
        self._pipeline, self.words, self.event = pipeline, words, ""
        self._from: Tensor | None = None  # embedding [1, rows, text_dim] where the transition began
        self._to: Tensor | None = None
        self._step = self._steps = 0

    @property
    def first(self) -> str | Tensor:
        """What a stream begins with."""
        return self._target(self.words)

    def turn_to(self, words: Words, transition: int, event: str) -> None:
        """Make `words` the target, reached in the `transition`th chunk from now; 0 is the next one, at once."""
        if transition or len(words) > 1:
            check_blends(self._pipeline)
        self._from, self._steps = (self._now(), transition) if transition else (None, 1)
        self._to = self._embedding(words) if transition else None
        self._step, self.words, self.event = 0, words, event

    def step(self) -> str | Tensor | None:
        """The prompt of the next chunk; None where it stays."""
        if self._step >= self._steps:
            return None
        self._step += 1
        if self._step == self._steps:
            return self._target(self.words)
        return self._now()

    @property
    def moving(self) -> bool:
        """Whether chunks still go towards the target, the next one included."""
        return self._step < self._steps

    def _now(self) -> Tensor:
        """The embedding of the chunk that was made last, if no other target was named since."""
        if self._from is None or self._to is None or self._step >= self._steps:
            return self._embedding(self.words)
        return torch.lerp(self._from, self._to, self._step / self._steps)

    def _target(self, words: Words) -> str | Tensor:
        return words[0][0] if len(words) == 1 else self._embedding(words)

    def _embedding(self, words: Words) -> Tensor:
        """The weighted mean of the texts' embeddings [1, rows, text_dim]."""
        check_blends(self._pipeline)
        assert isinstance(self._pipeline, Pipeline)
        total = sum(weight for _, weight in words)
        parts = [self._pipeline.encode_prompt(text) * (weight / total) for text, weight in words]
        return torch.stack(parts).sum(0)


def note_of(pipeline: Pipeline | NativePipeline, words: Words) -> str | None:
    """What a user should know about a prompt: that the model does not read its end."""
    tokenizer = pipeline.tokenizer
    cut = [tokenizer.cut(text) for text, _ in words] if tokenizer is not None else []
    return next((note for note in cut if note), None)
