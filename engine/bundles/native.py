"""The native backend: streams a bundle from Python through the C++ core (docs/embedding.md).

    pipeline = NativePipeline("sprites.bundle")
    with pipeline.stream("a red circle moving right slowly on a gray background", seed=1) as stream:
        for frame in stream:        # uint8 [H, W, 3], a view of the core's memory
            ...

The interface is that of engine.stream. All streams of a pipeline share weights and graphs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from operator import methodcaller
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from engine.bundles.manifest import read_manifest
from engine.model.text import Tokenizer, check_prompt, clean_prompt
from engine.runtime.handover import HandsOver, Progress
from engine.threads import use


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
        self._bundle = _core().Bundle(
            str(folder), backend=backend, library_dir=library_dir, verify=verify, parallel=parallel
        )
        info = self._bundle.info()
        self.height: int = info["height"]
        self.width: int = info["width"]
        self.notes: tuple[str, ...] = ()
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

    def warm(self) -> None:
        """Do nothing: graphs are already compiled and loaded."""

    def stream(
        self, prompt: str | Tensor, *, seed: int = 0, frames: int | None = None, clip: np.ndarray | None = None,
        latents: Tensor | None = None,
    ) -> "NativeStream":  # fmt: skip
        """An iterator of uint8 frames [H, W, 3]. Arguments and errors are those of engine.stream.Pipeline.stream."""
        if frames is not None and frames < 1:
            raise ValueError(f"frames: got {frames}, expected at least 1")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed: got {seed}, expected 0 to 2^64 - 1")
        return NativeStream(self, prompt, seed, frames, clip, latents)


@dataclass(frozen=True)
class _Progress(Progress):
    kept: tuple[np.ndarray, ...] = ()  # frames [T, H, W, 3] that the core gave and no call has returned
    emitted: int = 0


class NativeStream(HandsOver):
    """One video in progress. Other threads may call `set_prompt` and `cancel` while a chunk is made.

    Python cannot interrupt the core: KeyboardInterrupt comes when its call is done. What the core gave then stays here,
    and the next call returns it. HandsOver tells how a caller loses none. A second thread that asks for frames
    meanwhile gets a ValueError.
    """

    _now: _Progress

    def __init__(
        self, pipeline: NativePipeline, prompt: str | Tensor, seed: int, frames: int | None,
        clip: np.ndarray | None, latents: Tensor | None,
    ) -> None:  # fmt: skip
        super().__init__(_Progress())
        self.pipeline, self.limit = pipeline, frames
        self._closed = False
        self._given: list[np.ndarray] = []  # what the core gave last; in `_now.kept` after that
        self._session = _core().Session(pipeline._bundle, seed)
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

    def set_prompt(self, prompt: str | Tensor, recommit: bool = True) -> None:
        """Switch the prompt, text or embedding [1, rows, text_dim], from the next chunk on.

        `recommit` rewrites the window's keys and values under the new prompt. ValueError for another shape, or a text
        without a visible character. Warns (PromptWarning) of a text that the model does not read to its end.
        """
        if isinstance(prompt, str):
            check_prompt(prompt)
            self._session.set_prompt(prompt, recommit)
            cleaned = clean_prompt(prompt)
            # A character of ASCII is one token at most; an end mark and a space in front may be added.
            if not cleaned.isascii() or len(cleaned) + 2 > self.pipeline.text_rows:
                self.pipeline.tokenizer.warn_if_cut(cleaned)
            return
        expected = (1, self.pipeline.text_rows, self.pipeline.text_dim)
        if tuple(prompt.shape) != expected:
            raise ValueError(f"prompt: got an embedding {list(prompt.shape)}, expected {list(expected)}")
        self._session.set_prompt_embedding(prompt[0].float().cpu().numpy(), recommit)

    def set_adapters(self, strengths: Mapping[str, float], recommit: bool = True) -> None:
        """ValueError: a bundle's weights are fixed."""
        raise ValueError("adapters: got a pipeline without any, expected load(..., adapters=[...]) of a model")

    def next_chunk(self) -> np.ndarray:
        """The next chunk's frames, uint8 [T, H, W, 3], read-only. Raises engine._C.Cancelled after `cancel`."""
        return self._hand_over(self._ready_chunk)

    def rest(self) -> np.ndarray:
        """The frames that an interrupted call has left, uint8 [T, H, W, 3]; T may be 0. It makes no new ones."""
        return self._hand_over(self._ready_rest)

    def cancel(self) -> None:
        """Make the running or next `next_chunk` raise engine._C.Cancelled. The stream can continue afterwards."""
        self._session.cancel()

    def close(self) -> None:
        """Drop the caches and end the stream. Closing twice is fine."""
        self._closed = True
        self._now, self._given = replace(self._now, kept=()), []
        self._session.close()

    def __enter__(self) -> "NativeStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        if self._closed or (self.limit is not None and self.emitted >= self.limit):
            raise StopIteration
        return self._hand_over(self._ready_frame)

    @property
    def emitted(self) -> int:
        """Frames returned by the iterator so far."""
        return self._now.emitted

    def _ready_chunk(self) -> tuple[np.ndarray, _Progress]:
        self._ask("next_chunk")
        return self._now.kept[0], replace(self._now, kept=self._now.kept[1:])

    def _ready_frame(self) -> tuple[np.ndarray, _Progress]:
        self._ask("next_frame")
        first, *others = self._now.kept
        left = (first[1:],) if len(first) > 1 else ()
        return first[0], replace(self._now, kept=(*left, *others), emitted=self.emitted + 1)

    def _ready_rest(self) -> tuple[np.ndarray, _Progress]:
        self._keep()
        nothing = np.zeros((0, self.pipeline.height, self.pipeline.width, 3), np.uint8)
        return np.concatenate([nothing, *self._now.kept]), replace(self._now, kept=())

    def _ask(self, call: str) -> None:
        """Ask the core for a chunk or a frame, unless an interrupted call has left one."""
        self._keep()
        if not self._now.kept:
            # One call of C code asks and stores the answer, so no signal handler comes in between.
            self._given.extend(map(methodcaller(call), (self._session,)))
            self._keep()

    def _keep(self) -> None:
        if self._given:
            self._now = replace(self._now, kept=tuple(x if x.ndim == 4 else x[None] for x in self._given))
            self._given = []
