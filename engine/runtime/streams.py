"""A video in progress, whatever makes it: what all streams have in common."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from torch import Tensor

Words = Sequence[tuple[str, float]]  # texts and their weights
Steps = str | Sequence[float] | Sequence[Sequence[float]]  # rows of timesteps, one row, or a text as --steps takes it


class Cancelled(RuntimeError):
    """`cancel` has ended the call. Nothing is lost: the next call makes the same chunk."""


class SourceEnded(EOFError):
    """The source has too few frames left for a chunk. The iterator ends there."""


class Serial(NamedTuple):
    """Which frame it is, of which chunk, under which prompt; each counted from 0."""

    frame: int  # since the start or the last flush; of a chunk, its first frame
    chunk: int  # since the start or the last flush
    prompt: int  # as `set_prompt` numbers them; 0 is the one that the stream began with

    def later(self, frames: int) -> Serial:
        """The serial of the frame that many frames later in the same chunk."""
        return self._replace(frame=self.frame + frames)


class Stream(Protocol):
    """Iterate for frames, or call `next_chunk` for whole chunks. docs/api.md says what each kind can do.

    A call that fails, is cancelled or is interrupted changes nothing: the next one returns the same frames.
    One call at a time: a second one, from any thread, gets a ValueError. At any time any thread may call `set_prompt`,
    `change`, `cancel` and `close`. A closed stream, and one in a forked process, raises ValueError.
    """

    limit: int | None  # frames that the iterator returns; None is no limit

    @property
    def emitted(self) -> int:
        """Frames returned by the iterator since the start or the last flush."""
        ...

    @property
    def handed(self) -> int:
        """Results returned so far: chunks, latents, the iterator's frames."""
        ...

    @property
    def last(self) -> Any:
        """The result that was returned last; None before. It stays in a closed stream."""
        ...

    @property
    def serial(self) -> Serial | None:
        """Frame, chunk and prompt of `last`; None before. `rest` tells those of its first frame."""
        ...

    def next_chunk(self) -> np.ndarray:
        """The next chunk's frames, uint8 [T, H, W, 3]; those that the iterator has left of it, if it began it."""
        ...

    def next_latent(self) -> Tensor:
        """The next chunk's clean latent [B, C, F, h, w], not decoded. ValueError where the C++ core runs."""
        ...

    def rest(self) -> np.ndarray:
        """The frames that are decoded and not returned yet, uint8 [T, H, W, 3]; T may be 0. It makes no new ones."""
        ...

    def set_prompt(self, prompt: str | Tensor | Words, recommit: bool = True, transition: int = 0) -> int:
        """Switch the prompt from the next chunk on: a text, an embedding, or texts with weights above 0.

        Returns the prompt's number, as in `serial`: it counts from the first chunk on the way.

        `transition` is the number of chunks in which the prompt is reached, in equal steps from the embedding that acts
        now; 0 and 1 are at once. `recommit` also rewrites the window's keys and values, for every chunk on the way. Of
        several calls before a chunk the last one counts.
        """
        ...

    def change(self, *, seed: int | None = None, steps: Steps | None = None, window: int | None = None) -> None:
        """Change the seed, the denoising steps and the window from the next chunk on; None leaves a thing as it is.

        All of them change or, with a ValueError, none. `steps` are rows as a preset has them: of chunk 0, of chunk 1,
        ..., of the rest. `window` is at most that of the preset; the past is written again as for a new prompt. Any
        thread may call it. `flush` keeps what was changed.
        """
        ...

    def set_adapters(self, strengths: Mapping[str, float], recommit: bool = True) -> None:
        """Set strengths of adapters by name. ValueError where there are none, as in bundles."""
        ...

    def cancel(self) -> None:
        """Make the call that runs, or else the next one that has a chunk to make, raise Cancelled once.

        It ends within a step. The stream can go on.
        """
        ...

    def flush(self) -> None:
        """Start over at frame 0 with the same seed and the last prompt, which a transition reaches at once.

        Drops caches, frames that wait, what is left of a clip, and a cancel that has not acted.
        """
        ...

    def close(self) -> None:
        """Drop caches and frames, and end the stream. Closing twice is fine. A call that runs gets a ValueError."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def __iter__(self) -> Iterator[np.ndarray]: ...

    def __next__(self) -> np.ndarray: ...

    def __aiter__(self) -> AsyncIterator[np.ndarray]: ...

    async def __anext__(self) -> np.ndarray:
        """The next frame. A thread makes it, so the event loop stays free.

        If the task is cancelled, the call ends within a step, and no frame is lost.
        """
        ...


def check_process(opened: int) -> None:
    """ValueError in another process than the one with this id, which opened a pipeline.

    Threads and locks of the libraries do not survive a fork: a computation could wait for ever.
    """
    if os.getpid() != opened:
        raise ValueError("process: got a fork of the one that opened the pipeline, expected the same one")
