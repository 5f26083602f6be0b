"""What calls of a stream return of the chunks that it decodes: whole chunks, single frames, latents, the rest."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from engine.runtime.finite import bad_number
from engine.runtime.handover import HandsOver
from engine.runtime.progress import StreamProgress, Waiting
from engine.runtime.streams import Serial


class HandsOverChunks(HandsOver):
    """The calls of a stream that makes one latent after the other, and decodes it."""

    _now: StreamProgress
    pipeline: Any  # height and width of a frame
    looks_ahead: bool

    @abstractmethod
    def _check_open(self) -> None:
        """ValueError if the stream is closed, or if its next chunk cannot be made any more."""

    @abstractmethod
    def _decoded(self, ahead: bool) -> np.ndarray:
        """The next chunk's frames, the same until a call has returned them. `ahead`: make the latent after it, too."""

    @abstractmethod
    def _latent(self) -> Tensor:
        """The next chunk's latent."""

    @abstractmethod
    def _accepted(self, x: Tensor) -> StreamProgress:
        """The progress with one chunk more."""

    @abstractmethod
    def _not_finite(self) -> Exception:
        """The error of the next chunk, which is not finite."""

    def next_chunk(self) -> np.ndarray:
        """The next chunk, or what the iterator has left of it, uint8 [T, H, W, 3].

        T is 1 + 4 (F - 1) for chunk 0, then 4 F.
        """
        return self._hand_over(self._ready_chunk)

    def next_latent(self) -> Tensor:
        """The next chunk's clean latent [B, C, F, h, w], not decoded. It waits for the device. ValueError if closed."""
        return self._hand_over(self._ready_latent)

    def rest(self) -> np.ndarray:
        """What the iterator has left of its chunk, and the chunk of an interrupted call, uint8 [T, H, W, 3]."""
        return self._hand_over(self._ready_rest)

    def _ready_chunk(self) -> tuple[np.ndarray, StreamProgress]:
        self._check_open()
        if (rest := self._now.rest) is not None:
            return rest[0], replace(self._now, rest=None, serial=rest[1])
        with torch.inference_mode():
            pixels = self._decoded(self.looks_ahead)
        return pixels, self._shown()

    def _shown(self) -> StreamProgress:
        """The progress once the waiting chunk is handed over."""
        now, waiting = self._now, cast(Waiting, self._now.waiting)
        serial = Serial(waiting.before.started, waiting.before.made, now.prompt)
        return replace(now, waiting=None, vae_cache=waiting.vae_cache, serial=serial)

    def _ready_latent(self) -> tuple[Tensor, StreamProgress]:
        self._check_open()
        now = self._now
        if now.waiting is not None:  # an interrupted call has made and decoded it
            serial = Serial(now.waiting.before.started, now.waiting.before.made, now.prompt)
            return cast(tuple[Tensor, bool], now.uncommitted)[0], replace(now, waiting=None, serial=serial)
        with torch.inference_mode():
            x = self._latent()
            if bad_number(x) is not None:
                raise self._not_finite()
        after = self._accepted(x)
        return x, replace(after, serial=Serial(now.started, now.made, after.prompt))

    def _ready_frame(self) -> tuple[np.ndarray, StreamProgress]:
        pixels, after = self._ready_chunk()
        serial = cast(Serial, after.serial)
        rest = (pixels[1:], serial.later(1)) if len(pixels) > 1 else None
        return pixels[0], replace(after, rest=rest, emitted=after.emitted + 1)

    def _ready_rest(self) -> tuple[np.ndarray, StreamProgress]:
        self._check_open()
        now, parts = self._now, [np.zeros((0, self.pipeline.height, self.pipeline.width, 3), np.uint8)]
        first = now.rest
        if first is not None:
            parts.append(first[0])
            now = replace(now, rest=None, serial=first[1])
        if now.waiting is not None:
            with torch.inference_mode():
                parts.append(self._decoded(ahead=False))
            now = replace(self._shown(), rest=None)
            now = now if first is None else replace(now, serial=first[1])
        return np.concatenate(parts), now

    def _decode_ahead(self) -> None:
        with self._turns, torch.inference_mode():
            self._check_open()
            if self._now.rest is None:
                self._decoded(self.looks_ahead)
