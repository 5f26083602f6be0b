"""Prompt to text embedding: a tokenizer and a UMT5 encoder, zero-padded to the model's rows."""

import html
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.files import read_json

MAX_ROWS = 512  # rows that Wan2.1 was trained with


def clean_prompt(prompt: str) -> str:
    """Resolve HTML entities and fold white space, as Wan's pipeline does."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


class Tokenizer:
    """Turns a prompt into token ids and a mask, padded or cut to `rows`.

    It reads tokenizer.json with the tokenizers library. Only where a folder has none, transformers converts what is
    there, which takes seconds.
    """

    def __init__(self, path: Path) -> None:
        file = path / "tokenizer_config.json"
        settings = read_json(file) if file.is_file() else {}
        # A tokenizer that names no limit reports an astronomical one.
        self.rows = min(int(settings.get("model_max_length") or MAX_ROWS), MAX_ROWS)
        self._core = _core(path)
        pad = settings.get("pad_token") or "<pad>"
        pad = pad["content"] if isinstance(pad, dict) else pad
        number = self._core.token_to_id(pad)
        if number is None:
            raise ValueError(f"{path}: got no token {pad}, expected the pad token among the tokens")
        self.tokens = self._core.get_vocab_size()
        self._core.enable_padding(length=self.rows, pad_id=number, pad_token=pad)
        self._core.enable_truncation(self.rows)

    def __call__(self, prompt: str) -> tuple[Tensor, Tensor]:
        """ids and mask, each int64 [1, rows]; cuts longer prompts."""
        encoded = self._core.encode(clean_prompt(prompt))
        return torch.tensor([encoded.ids]), torch.tensor([encoded.attention_mask])


def _core(path: Path) -> Any:
    """The tokenizers.Tokenizer of a folder. FileNotFoundError without one, ValueError if its file is damaged."""
    file = path / "tokenizer.json"
    if not file.is_file() and not (path / "spiece.model").is_file():
        raise FileNotFoundError(f"{path}: got neither tokenizer.json nor spiece.model, expected one of them")
    try:
        if file.is_file():
            import tokenizers

            return tokenizers.Tokenizer.from_file(str(file))
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, local_files_only=True).backend_tokenizer
    except Exception as error:  # the libraries raise nothing narrower
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file if file.is_file() else path}: got {reason}, expected a tokenizer") from None


class ReadAgain(nn.Module):
    """A text encoder without weights of its own: it reads them for every call. It computes on `device`."""

    device: torch.device

    def kept(self) -> nn.Module:
        """The same encoder, its weights in memory."""
        raise NotImplementedError


def encode_text(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """ids, mask [B, rows] -> text_emb [B, rows, text_dim]. Rows after the prompt are zero; attention includes them."""
    hidden = encoder(ids, mask)
    return hidden * mask[..., None].to(hidden.dtype)
