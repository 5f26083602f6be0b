"""Tokenizers of text encoders: read from their folder as data, of which nothing is run or looked up elsewhere."""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from engine.files import check_marks, plain_file, read_json, read_text

MOST_FILE = 64 << 20  # bytes of tokenizer.json or spiece.model; UMT5's have 17 and 5 MB
MOST_PAD = 100  # characters
MOST_EXTRA = 1000  # tokens that a configuration adds; T5 has 100, UMT5 300
# One letter or class, and one repeat at most: no way through such a pattern needs a second try.
_PLAIN_REGEX = re.compile(
    r"([^\\\[\](){}.*+?^$|]|\\[sdwpSDW.]|\[(?:[^\[\]\\]|\\[sdwnrtSDW.-]){1,60}\])([*+?]|\{\d{1,3}(,\d{0,3})?\})?"
)
# Entries of tokenizer_config.json that say which tokens there are. Names of classes, modules, templates are not read.
_OF_TOKENS = ("pad_token", "eos_token", "unk_token", "additional_special_tokens", "extra_special_tokens",
              "added_tokens_decoder", "extra_ids", "legacy", "model_max_length")  # fmt: skip
_SENTENCEPIECE = (None, "T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")


class TokenSettings(NamedTuple):
    rows: int
    pad: str


def settings_of(folder: Path, most: int) -> TokenSettings:
    """What a tokenizer_config.json says of rows (`most`, if it names no limit) and padding. ValueError if damaged."""
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if plain_file(file) else {}
    length = settings.get("model_max_length") or most
    # A tokenizer that names no limit reports an astronomical one.
    if not isinstance(length, int | float) or isinstance(length, bool) or not length >= 1:
        raise ValueError(f"{file}: got model_max_length {str(length)[:40]!r}, expected a positive number")
    pad = settings.get("pad_token") or "<pad>"
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if not isinstance(pad, str) or len(pad) > MOST_PAD or not pad.isprintable():
        raise ValueError(f"{file}: got pad_token {str(pad)[:40]!a}, expected up to {MOST_PAD} characters")
    return TokenSettings(int(min(length, most)), pad)


def core_of(folder: Path) -> Any:
    """The tokenizers.Tokenizer of a folder. FileNotFoundError without one, ValueError if its file is damaged."""
    file = folder / "tokenizer.json"
    file = file if plain_file(file) else folder / "spiece.model"
    if not plain_file(file):
        raise FileNotFoundError(f"{folder}: got neither tokenizer.json nor spiece.model, expected one of them")
    if (size := file.stat().st_size) > MOST_FILE:
        raise ValueError(f"{file}: got {size} bytes, expected a tokenizer of at most {MOST_FILE}")
    if file.name == "tokenizer.json":
        text = read_text(file)
        check_marks(text, str(file))
    # One prompt at a time feeds no threads; where none can be started the library's pool would end the process.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with one_line(file, "a tokenizer"):
        core = _converted(folder) if file.name == "spiece.model" else _parsed(text)
    for pattern in _patterns(core):
        if not _PLAIN_REGEX.fullmatch(pattern):
            raise ValueError(f"{file}: got the pattern {pattern[:60]!a}, expected one letter or class, repeated once")
    return core


@contextmanager
def one_line(file: Path, expected: str) -> Iterator[None]:
    """ValueError in place of what the libraries raise, which is nothing narrow, and in Rust a panic."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{file}: got {reason}, expected {expected}") from None


def _parsed(text: str) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_str(text)


def _patterns(core: Any) -> Iterator[str]:
    """The regular expressions of a tokenizer."""
    waiting = [json.loads(part.__getstate__()) for part in (core.normalizer, core.pre_tokenizer) if part is not None]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if isinstance(pattern := one.get("Regex"), str):
                yield pattern
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def _converted(folder: Path) -> Any:
    """The tokenizer of a spiece.model, which transformers converts.

    It is given a folder of its own. There it finds the model and the settings of tokens, and no name of a class, no
    module and no template.
    """
    from transformers import AutoTokenizer

    config = folder / "tokenizer_config.json"
    given = read_json(config) if plain_file(config) else {}
    if (name := given.get("tokenizer_class")) not in _SENTENCEPIECE:
        raise ValueError(f"tokenizer_class {str(name)[:60]!r}, which is no T5Tokenizer")
    settings = {key: given[key] for key in _OF_TOKENS if key in given}
    for key in _OF_TOKENS[3:]:
        value = settings.get(key, 0)
        if (key == "extra_ids" and not (type(value) is int and 0 <= value <= MOST_EXTRA)) or (
            isinstance(value, list | dict) and len(value) > MOST_EXTRA
        ):
            raise ValueError(f"{key} {str(value)[:40]!r}, more than {MOST_EXTRA} tokens")
    with tempfile.TemporaryDirectory(prefix="greedy-tokenizer-") as own:
        (Path(own) / "spiece.model").symlink_to((folder / "spiece.model").resolve())
        (Path(own) / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "T5Tokenizer"}))
        return AutoTokenizer.from_pretrained(own, local_files_only=True, trust_remote_code=False).backend_tokenizer
