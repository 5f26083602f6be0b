"""The prompt of a session: texts with weights, and the way from one prompt to the next."""

from __future__ import annotations

from dataclasses import dataclass, replace

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


def prompt_of(words: Words) -> str | Words:
    """The prompt as a stream takes it: texts of weight 0 add nothing."""
    weighted = tuple(one for one in words if one[1] > 0)
    return weighted[0][0] if len(weighted) == 1 else weighted


@dataclass(frozen=True)
class Direction:
    """Which prompt a video follows, and how far it is on its way there; the stream blends."""

    words: Words
    event: str = ""
    transition: int = 1  # chunks until the prompt is reached
    made: int = 1  # of these

    @property
    def moving(self) -> bool:
        """Whether chunks still go towards the prompt, the next one included."""
        return self.made < self.transition

    def later(self) -> Direction:
        """The direction once the next chunk is made."""
        return replace(self, made=self.made + 1) if self.moving else self


def note_of(pipeline: Pipeline | NativePipeline, words: Words) -> str | None:
    """What a user should know about a prompt: that the model does not read its end."""
    tokenizer = pipeline.tokenizer
    cut = [tokenizer.cut(text) for text, _ in words] if tokenizer is not None else []
    return next((note for note in cut if note), None)
