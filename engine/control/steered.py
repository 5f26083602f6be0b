"""What a caller changes of a Python stream while it runs. A change acts from the next chunk on."""

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Any

import torch
from torch import Tensor

from engine.control.settings import Settings
from engine.runtime.blending import Course, Prompt, check_transition
from engine.runtime.handover import HandsOver
from engine.runtime.progress import StreamProgress
from engine.runtime.streams import Steps, Words, check_process
from engine.sampling.noise import DrawnAhead
from engine.shared import Shared


class Steered(HandsOver):
    """A stream whose prompt, settings and adapters change. engine.stream has the loop.

    A prompt that is set waits in one field. The next chunk takes it over. The progress keeps how far that chunk is on
    its way to the prompt, so a chunk that is made again has the same embedding.
    """

    _now: StreamProgress
    pipeline: Shared
    state: Any  # engine.generators.base.State; None once it is closed

    def __init__(self, progress: StreamProgress, settings: Settings) -> None:
        super().__init__(progress)
        self._settings = settings  # of the chunks after the next call of _take_changes
        self._use(settings)
        self._ahead: tuple[int, Tensor | Exception] | None = None  # a chunk's number, and the chunk or its error
        self._spoiled = -1  # number of a chunk that cannot be made again, if it is the next one
        self._prompt, self._numbers = progress.course.to, count(1)
        self._setting = threading.RLock()  # of a prompt and its number; a signal handler may come inside

    def set_prompt(self, prompt: str | Tensor | Words, recommit: bool = True, transition: int = 0) -> int:
        """Switch the prompt from the next chunk on: text, weighted texts, or embedding [B, rows, text_dim].

        Returns the prompt's number, which counts from the first chunk on the way to it.

        `transition` is the number of chunks in which the prompt is reached; 0 and 1 are at once. The chunks on the way
        have embeddings in equal steps from the one that acts when the next chunk is made. A prompt that comes on the
        way begins at the blend that acts.

        `recommit` also rewrites the window's keys and values under the new prompt, for every chunk on the way, so that
        the past no longer pulls towards the old one. Without it, a stream that looks ahead has committed the last chunk
        under the old prompt, and so has one whose last call was interrupted, or waits for frames of its source. An
        interrupted switch has happened or not.

        ValueError for another shape, weights that are not above 0, a text without a visible character, a transition
        below 0, or a closed stream.
        """
        check_transition(transition)
        state = self._open_state()
        with torch.inference_mode():
            text_emb, strengths = self.pipeline.embedded(prompt, state.geometry.batch), state.strengths
            with self._weights(strengths):
                text_kv = self.pipeline.stages.prepare_text(text_emb)
        with self._setting:
            before = self._prompt
            due = before.number > state.prompt[0] and (before.recommit or before.due)  # it stays due
            made = Prompt(0, text_emb, text_kv, strengths, recommit, due, transition)
            made.check_start(before, self._now.course.to)
            made.number = next(self._numbers)
            self._prompt = made
        return made.number

    def _take_prompt(self) -> Course:
        """Make the next chunk's prompt act; returns how far it is on its way. Repeating it changes nothing."""
        course, state = self._now.course.after(self._prompt), self.state
        if course.key == state.prompt:
            return course
        prompt, text_emb = course.to, course.text_emb
        with self._weights():
            text_kv = prompt.text_kv if course.start is None and prompt.strengths == state.strengths else None
            if text_kv is None:
                text_kv = self.pipeline.stages.prepare_text(text_emb)
            self._ahead = None  # it has the old prompt; noise depends only on the chunk, so make it again
            self.pipeline.generator.set_text(text_kv, state, course.recommit, text_emb=text_emb, prompt=course.key)
        if course.start is None:
            prompt.text_kv = None
        return course

    def change(self, *, seed: int | None = None, steps: Steps | None = None, window: int | None = None) -> None:
        """Change the seed, the denoising steps and the window from the next chunk on; None leaves a thing as it is.

        All of them change or, with a ValueError, none. A change that is interrupted has happened or not.

        seed    0 to 2^64 - 1. Noise depends on the seed and the chunk alone: the next chunks have that of a stream of
                the new seed
        steps   rows as a preset has them: of chunk 0, of chunk 1, ..., of the rest
        window  latent frames that attention keeps, at most the preset's. The past is written again, so the stream goes
                on as one that was opened with that window and saw the same latents

        ValueError for what the preset or the family does not allow, a seed where the caller gave the source of noise,
        a window that splits chunks where the backend cannot, or a closed stream.
        """
        self._open_state()
        if seed is None and steps is None and window is None:
            raise ValueError("change: got nothing, expected seed, steps or window")
        with self._setting:
            self._settings = self._settings.changed(self.pipeline, seed, steps, window)

    def _take_changes(self) -> Course:
        """Make all that was set act on the next chunk; returns its prompt's course. Repeating it changes nothing."""
        settings, state = self._settings, self.state
        if settings is not self._using:
            self._ahead = None  # it was made with other ones
            if settings.preset.window != state.slots:
                self.pipeline.generator.set_window(settings.preset.window, state)
            self._use(settings)
        return self._take_prompt()

    def _use(self, settings: Settings) -> None:
        self.noise, self.schedule = settings.noise, settings.schedule
        self._ahead_of_time = settings.noise if isinstance(settings.noise, DrawnAhead) else None
        self._using = settings  # last: what is interrupted before it is done again

    def set_adapters(self, strengths: Mapping[str, float], recommit: bool = True) -> None:
        """Set strengths of adapters by name, of this stream alone, from the next chunk on. Others stay as they are.

        `recommit` also rewrites the window's keys and values with the new weights, as in `set_prompt`.

        Streams share the weights. A stream that finds another's strengths in them merges the adapters that differ anew,
        from the base. So streams of different strengths that take turns pay for a merge per chunk: every adapted
        weight of every transformer is read and written, on a GPU from host memory.

        ValueError for an unknown name, a strength that is not finite, weights that are then not finite, a pipeline
        without adapters or of a bundle, or a closed stream; the stream then stays at its strengths.
        """
        with self._turns, torch.inference_mode():
            self._check_open()
            pipeline, adapters, state = self.pipeline, self.pipeline.adapters, self.state
            if adapters is None:
                raise ValueError("adapters: got a pipeline without any, expected load(..., adapters=[...]) of a model")
            self._take_prompt()
            chosen = adapters.checked(strengths, state.strengths)
            with adapters.at(chosen, pipeline.stages.modules()):
                text_kv = pipeline.stages.prepare_text(state.text_emb)
            self._ahead = None  # it has the old weights
            if not recommit and state.pending is not None:
                with self._weights():  # what is pending belongs to the old weights
                    pipeline.generator.set_text(state.text_kv, state, recommit=False)
            pipeline.generator.set_text(text_kv, state, recommit, strengths=chosen)

    def _weights(self, strengths: Mapping[str, float] | None = None) -> AbstractContextManager[None]:
        """Within the block the shared weights are at these strengths, by default this stream's."""
        pipeline, adapters = self.pipeline, self.pipeline.adapters
        if adapters is None:
            return nullcontext()
        return adapters.at(self.state.strengths if strengths is None else strengths, pipeline.stages.modules())

    def _check_open(self) -> None:
        """ValueError if the stream is closed, or if its next chunk cannot be made any more."""
        if not self._usable:
            error = self._refusal()
            self._drop()
            raise error

    @property
    def _usable(self) -> bool:
        return not self._closed and self._spoiled != self._now.made

    def _refusal(self) -> ValueError:
        why = "" if self._closed else f" (chunk {self._spoiled} failed after the caches had moved on)"
        return ValueError(f"stream: got a closed one{why}, expected an open one")

    def _open_state(self) -> Any:
        """The state, for a call of any thread. ValueError if the stream is closed, or in a forked process."""
        check_process(self._turns.process)
        state = self.state
        if self._closed or state is None or (self._turns.free and not self._usable):
            raise self._refusal()
        return state

    def _drop(self) -> None:
        """Drop caches and frames."""
        now = self._now
        self._now = StreamProgress(
            handed=now.handed, last=now.last, serial=now.serial, made=now.made, emitted=now.emitted, course=now.course
        )  # fmt: skip
        self.state = self._ahead = None
