"""Prompt to text embedding: a tokenizer and a UMT5 encoder, zero-padded to the model's rows."""

import html
import re
import unicodedata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.files import read_json

MAX_ROWS = 512  # rows that Wan2.1 was trained with
MOST_GARBLED = 8192  # characters of a prompt with HTML entities or garbled text, for which ftfy takes quadratic time

_PLAIN = re.compile(r"[ -%'-~]*")  # printable ASCII without &
_INVISIBLE = {"Cc", "Cf", "Cs", "Zs", "Zl", "Zp"}  # not the unassigned: emoji newer than this Python are among them
# Letters and marks that show nothing; their categories do not say so.
_UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")


def clean_prompt(prompt: str) -> str:
    """The prompt as Wan's own pipeline and diffusers' WanPipeline read it.

    ftfy repairs garbled text and replaces curly quotes, ligatures and full-width letters; HTML entities are resolved,
    white space is folded. ValueError for a prompt that would take minutes, and where html.unescape raises one.
    """
    text = prompt
    if not _PLAIN.fullmatch(prompt):  # ftfy and html.unescape leave plain text as it is
        import ftfy

        _check_length(prompt)
        text = ftfy.fix_text(prompt)
        try:
            text = html.unescape(html.unescape(text))
        except ValueError:  # of int()
            raise ValueError("prompt: got a character's number of more than 4300 digits, "
                             "expected a shorter one") from None  # fmt: skip
    return re.sub(r"\s+", " ", text).strip()


def _check_length(prompt: str) -> None:
    """ftfy repeats its steps until nothing changes: at worst once per character, for these prompts alone."""
    if len(prompt) <= MOST_GARBLED:
        return
    import ftfy
    from ftfy.badness import is_bad
    from ftfy.chardata import HTML_ENTITY_RE

    def slow(text: str) -> bool:
        return is_bad(text) or HTML_ENTITY_RE.search(text) is not None

    marks = sum(unicodedata.combining(char) != 0 for char in prompt)  # Python sorts them one by one
    characters_alone = {"unescape_html": False, "fix_encoding": False}
    if marks > MOST_GARBLED or slow(prompt) or slow(ftfy.fix_text(prompt, **characters_alone)):
        raise ValueError(f"prompt: got {len(prompt)} characters with HTML entities, garbled text or combining marks, "
                         f"expected at most {MOST_GARBLED}")  # fmt: skip


def is_blank(text: str) -> bool:
    """Whether a text has no visible character: white space, controls, joiners and the like, or nothing at all."""
    return all(unicodedata.category(char) in _INVISIBLE or _UNSEEN.match(char) for char in text)


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


def encode_text(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """ids, mask [B, rows] -> text_emb [B, rows, text_dim]. Rows after the prompt are zero; attention includes them."""
    hidden = encoder(ids, mask)
    return hidden * mask[..., None].to(hidden.dtype)
