"""The frozen teacher of a pipeline directory: its transformer and its text side, read as the engine reads them."""

from pathlib import Path

import torch
from torch import Tensor, nn

from engine.config import TransformerConfig
from engine.files import read_json
from engine.model.text import Tokenizer, encode_text
from engine.runtime.passes import TextKV
from engine.weights.checkpoint import load_transformer, open_text_encoder
from engine.weights.sources import open_source


class Base:
    """A teacher to distil from; `folder` holds transformer/, text_encoder/ and tokenizer/."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"teacher: got {folder}, expected a pipeline directory")
        self.device = torch.device(device)
        config = TransformerConfig.from_dict(read_json(folder / "transformer" / "config.json"))
        self.transformer = load_transformer(config, open_source(folder / "transformer"), dtype, self.device)
        self.transformer.eval().requires_grad_(False)
        self.tokenizer = Tokenizer(folder / "tokenizer")
        self.text_encoder = open_text_encoder(folder / "text_encoder", dtype, self.device)

    @property
    def models(self) -> list[nn.Module]:
        """Every model of the teacher."""
        return [self.transformer, self.text_encoder]

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Tensor:
        """Captions -> text_emb [B, rows, text_dim]."""
        pairs = [self.tokenizer(caption) for caption in captions]
        ids, mask = (torch.cat(parts).to(self.device) for parts in zip(*pairs, strict=True))
        return encode_text(self.text_encoder, ids, mask)

    def prepare(self, captions: list[str]) -> TextKV:
        """Captions -> cross-attention K, V of the teacher."""
        return self.transformer.prepare_text(self.encode(captions))
