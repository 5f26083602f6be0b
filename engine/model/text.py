"""Prompt to text embedding: a Hugging Face tokenizer and a UMT5 encoder, zero-padded to the model's rows."""

import html
import re
from pathlib import Path

import torch
from torch import Tensor, nn

MAX_ROWS = 512  # rows that Wan2.1 was trained with


def clean_prompt(prompt: str) -> str:
    """Resolve HTML entities and fold white space, as Wan's pipeline does."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


class Tokenizer:
    """Turns a prompt into token ids and a mask, padded or cut to `rows`."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer  # takes seconds to import, so import it only here

        self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        # A tokenizer that names no limit reports an astronomical one.
        self.rows = min(int(self._tokenizer.model_max_length), MAX_ROWS)

    def __call__(self, prompt: str) -> tuple[Tensor, Tensor]:
        """ids and mask, each int64 [1, rows]; cuts longer prompts."""
        encoded = self._tokenizer(
            [clean_prompt(prompt)], padding="max_length", max_length=self.rows, truncation=True,
            add_special_tokens=True, return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip
        return encoded.input_ids, encoded.attention_mask


def load_text_encoder(path: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Load the UMT5 encoder of a pipeline directory, memory-mapped, in `dtype` on `device`."""
    from transformers import UMT5EncoderModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = UMT5EncoderModel.from_pretrained(path, dtype=dtype, local_files_only=True)
    return nn.Module.to(model, device).eval().requires_grad_(False)


def encode_text(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """ids, mask [B, rows] -> text_emb [B, rows, text_dim]. Rows after the prompt are zero; attention includes them."""
    hidden = encoder(ids, attention_mask=mask).last_hidden_state
    return hidden * mask[..., None].to(hidden.dtype)
