"""The native backend: streams a bundle from Python through the C++ core (docs/embedding.md).

    pipeline = engine.load_bundle("sprites.bundle", "native")
    with pipeline.stream("a red circle moving right slowly on a gray background", seed=1) as stream:
        for frame in stream:        # uint8 [H, W, 3], a view of the core's memory
            ...

The interface is that of engine.stream. All streams of a pipeline share weights and graphs.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from operator import methodcaller
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from engine.bundles.manifest import read_manifest
from engine.config import Preset
from engine.model.text import Tokenizer, check_prompt, clean_prompt
from engine.presets import override
from engine.runtime.blending import check_transition, check_words
from engine.runtime.handover import HandsOver, Progress
from engine.runtime.streams import Cancelled, Serial, Steps, Words
from engine.threads import use

NOT_HERE = " does not open here: "  # between a backend of a bundle and the reason
_next_chunk = methodcaller("next_chunk")


def _core() -> ModuleType:
    try:
        return import_module("engine._C")
    except ImportError as error:
        expected = "the package installed where a C++ compiler is"
        raise ImportError(f"native: got no engine._C ({error}), expected {expected}") from None


@dataclass(frozen=True)
class NativeStages:
    """Name of the backend that runs the stages; Python cannot call them."""

    name: str


class NativePipeline:
    """An opened bundle.

    backend   aoti, tensorrt or tensorrt_rtx; None is the bundle's first backend that opens on this machine
    verify    compare the sha256 of every file; that of graphs is always compared
    parallel  number of streams that may run one graph at the same time
    threads   the process's number of CPU threads; None keeps it; small graphs use fewer

    Raises ValueError, FileNotFoundError, or ImportError for a missing library (got and expected).
    """

    def __init__(
        self, folder: str | Path, backend: str | None = None, *, verify: bool = True, parallel: int = 1,
        threads: int | None = None,
    ) -> None:  # fmt: skip
        self._folder = Path(folder)
        if threads is not None:
            use(threads)
        found = find_spec("torch")
        library_dir = str(Path(found.origin).parent / "lib") if found and found.origin else None
        self._bundle = _core().open_bundle(
            str(folder), backend=backend, library_dir=library_dir, verify=verify, parallel=parallel
        )
        info = self._bundle.info()
        self.height: int = info["height"]
        self.width: int = info["width"]
        # The core tells what it did while it opened the bundle; of interest is what did not open.
        self.notes: tuple[str, ...] = tuple(line for line in self._bundle.notes() if NOT_HERE in line)
        self.fps: float = info["fps"]
        self.preset_name: str = info["preset"]
        self.dtype: str = {"fp32": "float32", "fp16": "float16"}.get(info["precision"], "bfloat16")
        self.device = torch.device(info["target"].split("-")[0])
        self.stages = NativeStages(f"native-{info['backend']}")
        self.text_rows: int = info["text_rows"]
        self.text_dim: int = info["text_dim"]
        self.latent: tuple[int, int, int, int] = info["latent"]  # of a chunk: channels, frames, height, width

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer in Python. It only counts the tokens of long prompts; the core has its own."""
        return Tokenizer(self._folder / read_manifest(self._folder).tokenizer)

    @cached_property
    def preset(self) -> Preset:
        """How the bundle's streams are generated."""
        return read_manifest(self._folder).preset_value()

    def warm(self) -> None:
        """Do nothing: graphs are already compiled and loaded."""

    def encode_prompt(self, prompt: str) -> Tensor:
        """ValueError: the core keeps embeddings to itself."""
        raise _python_only("encode_prompt")

    def encode_clip(self, clip: np.ndarray) -> Tensor:
        """ValueError: the core keeps latents to itself. A stream begins with `clip=` all the same."""
        raise _python_only("encode_clip")

    def stream(
        self, prompt: str | Tensor | Words, *, seed: int = 0, frames: int | None = None, clip: np.ndarray | None = None,
        latents: Tensor | None = None, noise: object = None, source: object = None,
        strength: object = None, noise_scale: object = None,
    ) -> "NativeStream":  # fmt: skip
        """An iterator of uint8 frames [H, W, 3]. Arguments and errors are those of engine.stream.Pipeline.stream.

        ValueError for a source of noise, as the core draws the seed's own, and for a source of frames.
        """
        python_only = {"noise": noise, "source": source, "strength": strength, "noise_scale": noise_scale}
        for name, got in python_only.items():
            if got is not None:
                raise _python_only(name)
        if frames is not None and frames < 1:
            raise ValueError(f"frames: got {frames}, expected at least 1")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed: got {seed}, expected 0 to 2^64 - 1")
        return NativeStream(self, prompt, seed, frames, clip, latents)


def _python_only(what: str) -> ValueError:
    return ValueError(f"native: got {what}, expected a backend whose loop runs in Python")


@dataclass(frozen=True)
class _Progress(Progress):
    kept: tuple[tuple[np.ndarray, Serial], ...] = ()  # frames [T, H, W, 3] that no call has returned


class NativeStream(HandsOver):
    """A stream of the C++ core. Its interface is engine.runtime.streams.Stream.

    Python cannot interrupt the core: KeyboardInterrupt comes when its call is done. What the core gave then stays here,
    and the next call returns it. HandsOver tells how a caller loses none.
    """

    _now: _Progress

    def __init__(
        self, pipeline: NativePipeline, prompt: str | Tensor | Words, seed: int, frames: int | None,
        clip: np.ndarray | None, latents: Tensor | None,
    ) -> None:  # fmt: skip
        super().__init__(_Progress())
        self.pipeline, self.limit = pipeline, frames
        self._given: list[tuple[Any, ...]] = []  # what the core gave last; in `_now.kept` after that
        self._session = pipeline._bundle.open(seed)
        self.set_prompt(prompt)
        if clip is not None:
            expected = (pipeline.height, pipeline.width, 3)
            if clip.ndim != 4 or clip.shape[1:] != expected or clip.dtype != np.uint8 or not len(clip):
                raise ValueError(f"clip: got {clip.dtype} {list(clip.shape)}, "
                                 f"expected uint8 [T, {pipeline.height}, {pipeline.width}, 3]")  # fmt: skip
            self._session.push_frames(clip)
        elif latents is not None:
            channels, _, height, width = pipeline.latent
            shape = tuple(latents.shape)
            if len(shape) != 5 or (*shape[:2], *shape[3:]) != (1, channels, height, width):
                raise ValueError(f"latents: got {list(shape)}, expected [1, {channels}, F, {height}, {width}]")
            self._session.push_latent(latents[0].float().cpu().numpy())

    def set_prompt(self, prompt: str | Tensor | Words, recommit: bool = True, transition: int = 0) -> int:
        """Switch the prompt from the next chunk on: text, weighted texts, or embedding [1, rows, text_dim].

        Returns the prompt's number. `transition` and `recommit` are those of engine.runtime.streams.Stream.

        ValueError for another shape, weights that are not above 0, a transition below 0, or a text without a visible
        character. Warns (PromptWarning) of a text that the model does not read to its end.
        """
        check_transition(transition)
        number: int
        if isinstance(prompt, Tensor):
            expected = (1, self.pipeline.text_rows, self.pipeline.text_dim)
            if tuple(prompt.shape) != expected:
                raise ValueError(f"prompt: got an embedding {list(prompt.shape)}, expected {list(expected)}")
            number = self._session.set_prompt_embedding(prompt[0].float().cpu().numpy(), recommit, transition)
            return number
        words = check_words(((prompt, 1.0),) if isinstance(prompt, str) else prompt)
        for text, _ in words:
            check_prompt(text)
            cleaned = clean_prompt(text)
            # A character of ASCII is one token at most; an end mark and a space in front may be added. The warning
            # comes first: it may be an error.
            if not cleaned.isascii() or len(cleaned) + 2 > self.pipeline.text_rows:
                self.pipeline.tokenizer.warn_if_cut(cleaned)
        number = self._session.set_prompt(words, recommit, transition)
        return number

    def change(self, *, seed: int | None = None, steps: Steps | None = None, window: int | None = None) -> None:
        """Change the seed and the denoising steps from the next chunk on, both or none; None leaves a thing as it is.

        ValueError for steps that no preset has, and for a window.
        """
        self._check_open()
        if window is not None:
            raise ValueError(f"window: got {window!r}, expected none: the C++ core keeps that of the bundle")
        if seed is None and steps is None:
            raise ValueError("change: got nothing, expected seed or steps")
        if seed is not None and (type(seed) is not int or not 0 <= seed < 2**64):
            raise ValueError(f"seed: got {seed!r}, expected 0 to 2^64 - 1")
        rows = () if steps is None else override(self.pipeline.preset, {"steps": steps}).steps
        self._session.change(seed, rows)

    def set_adapters(self, strengths: Mapping[str, float], recommit: bool = True) -> None:
        """ValueError: a bundle's weights are fixed."""
        raise ValueError("adapters: got a pipeline without any, expected load(..., adapters=[...]) of a model")

    def next_chunk(self) -> np.ndarray:
        """The next chunk's frames, uint8 [T, H, W, 3], read-only; those that the iterator has left, if it began it."""
        return self._hand_over(self._ready_chunk)

    def next_latent(self) -> Tensor:
        """ValueError: the core keeps latents to itself."""
        raise _python_only("next_latent")

    def rest(self) -> np.ndarray:
        """The frames that are decoded and not returned yet, uint8 [T, H, W, 3]; T may be 0. It makes no new ones."""
        return self._hand_over(self._ready_rest)

    def cancel(self) -> None:
        """Make the call that runs, or else the next one that has a chunk to make, raise Cancelled once.

        Any thread may call it. The call ends after the graph that runs, and the next one makes the same chunk.
        """
        self._session.cancel()

    def flush(self) -> None:
        """Start over at frame 0 with the same seed and the last prompt. Repeat it if it was interrupted.

        Drops caches, frames that wait, what is left of a clip, and a cancel that has not acted.
        """
        with self._turns:
            self._check_open()
            self._now = _Progress(handed=self.handed, last=self.last, serial=self.serial)
            self._given = []
            self._session.flush()

    def close(self) -> None:
        """Drop the caches and end the stream. Closing twice is fine.

        A call of another thread ends after the graph that runs, with a ValueError; this one waits for it.
        """
        self._closed = True
        self._session.close()
        if self._turns.free:
            self._now, self._given = replace(self._now, kept=()), []

    def _uncancel(self) -> None:
        """A call that finds a cancel raises it before it computes anything."""
        # ValueError: it is closed, or another call runs, which takes the cancel.
        with suppress(Cancelled, ValueError), self._turns:
            self._check_open()
            self._given.extend(map(_next_chunk, (self._session,)))

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("stream: got a closed one, expected an open one")

    def _ready_chunk(self) -> tuple[np.ndarray, _Progress]:
        self._ask()
        (frames, serial), *others = self._now.kept
        return frames, replace(self._now, kept=tuple(others), serial=serial)

    def _ready_frame(self) -> tuple[np.ndarray, _Progress]:
        frames, after = self._ready_chunk()
        left = ((frames[1:], cast(Serial, after.serial).later(1)),) if len(frames) > 1 else ()
        return frames[0], replace(after, kept=(*left, *after.kept), emitted=self.emitted + 1)

    def _ready_rest(self) -> tuple[np.ndarray, _Progress]:
        self._check_open()
        self._keep()
        kept, nothing = self._now.kept, np.zeros((0, self.pipeline.height, self.pipeline.width, 3), np.uint8)
        serial = kept[0][1] if kept else self.serial
        frames = np.concatenate([nothing, *(frames for frames, _ in kept)])
        return frames, replace(self._now, kept=(), serial=serial)

    def _decode_ahead(self) -> None:
        with self._turns:
            self._ask()

    def _ask(self) -> None:
        """Ask the core for a chunk, unless there are frames that no call has returned."""
        self._check_open()
        self._keep()
        if not self._now.kept:
            try:
                # One call of C code asks and stores the answer, so no signal handler comes in between.
                self._given.extend(map(_next_chunk, (self._session,)))
            except Cancelled:
                self._check_open()  # another thread has closed it
                raise
            self._check_open()
            self._keep()

    def _keep(self) -> None:
        if self._given:
            have = {serial.chunk for _, serial in self._now.kept}
            given = ((frames, Serial(*numbers)) for frames, *numbers in self._given)
            self._now = replace(self._now, kept=(*self._now.kept, *(one for one in given if one[1].chunk not in have)))
            self._given = []
