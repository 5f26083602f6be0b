"""Prompt to text embedding: a tokenizer and a UMT5 encoder, zero-padded to the model's rows."""

import html
import re
import unicodedata
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.model.token_files import core_of, one_line, settings_of

MAX_ROWS = 512  # rows that Wan2.1 was trained with
# Characters of a prompt: the model reads 512 tokens of at most 16 characters; as many again may be white space.
MOST_CHARACTERS = 16_384
MOST_GARBLED = 2048  # characters of a prompt with HTML entities or garbled text, for which ftfy takes quadratic time

_EXCERPT = 40  # characters of a prompt that a message quotes
_PLAIN = re.compile(r"[ -%'-~]*")  # printable ASCII without &
_INVISIBLE = {"Cc", "Cf", "Cs", "Zs", "Zl", "Zp"}  # not the unassigned: emoji newer than this Python are among them
# Letters and marks that show nothing; their categories do not say so.
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def clean_prompt(prompt: str) -> str:
    """The prompt as Wan's own pipeline and diffusers' WanPipeline read it.

    ftfy repairs garbled text and replaces curly quotes, ligatures and full-width letters; HTML entities are resolved,
    white space is folded. ValueError for a prompt that is too long, and where html.unescape raises one.
    """
    if len(prompt) > MOST_CHARACTERS:
        raise ValueError(f"prompt: got {len(prompt)} characters, expected at most {MOST_CHARACTERS}")
    if _PLAIN.fullmatch(prompt):  # ftfy leaves plain text as it is
        return fold_prompt(prompt)
    import ftfy

    _check_garbled(prompt)
    return fold_prompt(ftfy.fix_text(prompt))


def fold_prompt(prompt: str) -> str:
    """The prompt with HTML entities resolved, twice, and white space folded: clean_prompt without ftfy."""
    try:
        text = html.unescape(html.unescape(prompt))
    except ValueError:  # of int()
        raise ValueError("prompt: got a character's number of more than 4300 digits, expected a shorter one") from None
    return re.sub(r"\s+", " ", text).strip()


def _check_garbled(prompt: str) -> None:
    """ftfy repeats its steps until nothing changes: at worst once per character, for these prompts alone."""
    if len(prompt) <= MOST_GARBLED:
        return
    import ftfy
    from ftfy.badness import is_bad
    from ftfy.chardata import HTML_ENTITY_RE

    def slow(text: str) -> bool:
        return is_bad(text) or HTML_ENTITY_RE.search(text) is not None

    marks = sum(unicodedata.combining(char) != 0 for char in prompt)  # Python sorts them one by one
    if marks > MOST_GARBLED or slow(prompt) or slow(ftfy.fix_text(prompt, unescape_html=False, fix_encoding=False)):
        raise ValueError(f"prompt: got {len(prompt)} characters with HTML entities, garbled text or combining marks, "
                         f"expected at most {MOST_GARBLED}")  # fmt: skip


def check_prompt(prompt: str, what: str = "prompt") -> None:
    """ValueError that begins with `what` for a prompt that no model can read.

    Surrogates (bytes of a command line that are no UTF-8), NUL characters, texts without a visible character once they
    are cleaned, and what clean_prompt refuses.
    """
    if found := re.search("[\ud800-\udfff]", prompt):
        code = ord(found[0])
        got = f"byte {code - 0xDC00:#x}, which is no UTF-8" if 0xDC80 <= code <= 0xDCFF else f"a surrogate {code:#x}"
        raise ValueError(f"{what}: got {got}, expected text in UTF-8")
    if "\0" in prompt:
        raise ValueError(f"{what}: got a NUL character, expected text")
    try:
        cleaned = clean_prompt(prompt)
    except ValueError as error:
        raise ValueError(f"{what}: {str(error).removeprefix('prompt: ')}") from None
    if is_blank(cleaned):
        got = "an empty text" if not prompt.strip() else f"{prompt[:_EXCERPT]!a}, which shows nothing"
        raise ValueError(f"{what}: got {got}, expected words")


def is_blank(text: str) -> bool:
    """Whether a text has no visible character: white space, controls, joiners and the like, or nothing at all."""
    return all(unicodedata.category(char) in _INVISIBLE or _UNSEEN.match(char) for char in text)


class PromptWarning(UserWarning):
    """A prompt of which the model does not read all."""


class Tokenizer:
    """Turns a prompt into token ids and a mask, padded or cut to `rows`: given ones, or the tokenizer's limit.

    It reads tokenizer.json with the tokenizers library. Only where a folder has none, transformers converts what is
    there, which takes seconds.
    """

    def __init__(self, path: Path, rows: int | None = None) -> None:
        self.path = path
        settings = settings_of(path, MAX_ROWS)
        self.rows = rows or settings.rows
        self._core, pad = core_of(path), settings.pad
        number = self._core.token_to_id(pad)
        if number is None:
            raise ValueError(f"{path}: got no token {pad}, expected the pad token among the tokens")
        self._added = self._core.num_special_tokens_to_add(False)  # the end mark
        if not 0 <= self._added < self.rows:
            raise ValueError(f"{path}: got {self._added} tokens around a prompt, expected fewer than {self.rows} rows")
        # One more than the largest id; the vocabulary may have gaps, and the template ids of its own.
        ids = [number, *self._core.get_vocab(with_added_tokens=True).values(), *self._encode("").ids]
        self.tokens = 1 + max(ids)
        self._core.enable_padding(length=self.rows, pad_id=number, pad_token=pad)
        self._core.enable_truncation(self.rows)
        self._encode(" a")  # a damaged table is found here, not in a stream

    def __call__(self, prompt: str) -> tuple[Tensor, Tensor]:
        """ids and mask, each int64 [1, rows]. Cuts a longer prompt, with a PromptWarning."""
        text = clean_prompt(prompt)
        encoded = self._encode(text)
        self._warn(text, encoded)
        return _tensors(encoded)

    def ids(self, text: str) -> tuple[Tensor, Tensor]:
        """The same of a text that needs no cleaning, without a warning."""
        return _tensors(self._encode(text))

    def warn_if_cut(self, text: str) -> None:
        """A PromptWarning for a cleaned text of more tokens than `rows`, for those who encode it elsewhere."""
        self._warn(text, self._encode(text))

    def cut(self, prompt: str) -> str | None:
        """The note of that warning for a prompt as a user gives it; None if the model reads all of it."""
        text = clean_prompt(prompt)
        return self._note(text, self._encode(text))

    def _encode(self, text: str) -> Any:
        """ValueError where the library fails: a table of the file that points outside of itself."""
        with one_line(self.path, "a tokenizer that reads every prompt"):
            return self._core.encode(text)

    def _warn(self, text: str, encoded: Any) -> None:
        if note := self._note(text, encoded):
            warnings.warn(note, PromptWarning, stacklevel=3)

    def _note(self, text: str, encoded: Any) -> str | None:
        """Count the tokens, and quote where the rest begins."""
        if not encoded.overflowing:
            return None
        every = sum(sum(part.attention_mask) - self._added for part in [encoded, *encoded.overflowing]) + self._added
        begin = next(start for start, end in encoded.overflowing[0].offsets if end > start)
        rest = text[begin:].strip()
        quoted = rest if len(rest) <= _EXCERPT else rest[:_EXCERPT] + "..."
        return f'the prompt has {every} tokens, the model reads {self.rows}: the rest, from "{quoted}", is ignored'


def _tensors(encoded: Any) -> tuple[Tensor, Tensor]:
    return torch.tensor([encoded.ids]), torch.tensor([encoded.attention_mask])


class ReadAgain(nn.Module, ABC):
    """A text encoder without weights of its own: it reads them for every call. It computes on `device`."""

    device: torch.device

    @abstractmethod
    def kept(self) -> nn.Module:
        """The same encoder, its weights in memory."""


def encode_text(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """ids, mask [B, rows] -> text_emb [B, rows, text_dim]. Rows after the prompt are zero; attention includes them."""
    hidden = encoder(ids, mask)
    return hidden * mask[..., None].to(hidden.dtype)
