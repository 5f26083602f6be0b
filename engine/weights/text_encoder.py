"""A text encoder that is not kept in memory: every prompt reads its weights again, layer by layer."""

import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.model.scaled_linear import ScaledEmbedding
from engine.model.text import ReadAgain
from engine.model.umt5 import Layer, UMT5Config, UMT5Encoder, UMT5Norm
from engine.runtime.device import give_back
from engine.weights.checkpoint import fill_text, load_text_encoder
from engine.weights.sources import FileSource


class ReleasedEncoder(ReadAgain):
    """UMT5's encoder over its files; results have the bits of an encoder that is kept.

    A call holds one layer's weights at a time, and at its end gives all of its memory back to the system. Calls of
    several threads take turns, so that memory holds one layer. ValueError or FileNotFoundError if the files have
    changed since they were opened.
    """

    def __init__(self, source: FileSource, config: UMT5Config, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.source, self.config, self.dtype, self.device = source, config, dtype, device
        self._turn = threading.Lock()
        self._stamps = self._files()

    @torch.inference_mode()
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids and mask (1 where a row counts) int64 [B, rows] -> [B, rows, d_model] on `device`."""
        with self._turn:
            if (found := self._files()) != self._stamps:
                name = next(str(file) for file, stamp in found.items() if stamp != self._stamps[file])
                raise ValueError(f"{name}: got a text encoder that has changed since it was loaded, expected the same")
            try:
                return self._encode(ids.to(self.device), (mask.to(self.device) != 0)[:, None, None, :])
            finally:
                give_back(self.device)

    def _encode(self, ids: Tensor, seen: Tensor) -> Tensor:
        x = self._embed(ids)
        for number in range(self.config.num_layers):
            x = self._opened(lambda: Layer(self.config), f"block.{number}.")(x, seen)
        norm = self._opened(lambda: UMT5Norm(self.config.d_model, self.config.layer_norm_epsilon), "final_layer_norm.")
        return norm(x)

    def _embed(self, ids: Tensor) -> Tensor:
        """Only the rows that are looked up leave the file."""
        _, tensor, scale = next(self.source.read_stored("embed_tokens."))
        return ScaledEmbedding(tensor, scale, self.dtype)(ids.cpu()).to(self.device)

    def _opened(self, make: Callable[[], nn.Module], prefix: str) -> nn.Module:
        with torch.device("meta"):
            part = make()
        fill_text(part, self.source, self.dtype, self.device, prefix)
        return part

    def _files(self) -> dict[Path, tuple[int, int]]:
        missing = [file for file in self.source.files if not file.is_file()]
        if missing:
            raise FileNotFoundError(f"text encoder: got no file {missing[0]}, expected it: every prompt reads it again")
        return {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in self.source.files}

    def kept(self) -> UMT5Encoder:
        """The same encoder, its weights in memory."""
        return load_text_encoder(self.source, self.config, self.dtype, self.device)
