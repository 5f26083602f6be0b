"""Writes csrc/text/text_tables.inc: properties of characters for the C++ tokenizer, from the libraries it must equal.

    python csrc/text/text_tables.py        # needs tokenizers and regex, which come with transformers

Letters, lower case and white space come from the `tokenizers` library, character by character; white space of
prompts from Python; grapheme boundaries from `regex`, which follows Unicode. cleaning_tables.py writes the tables of
prompt cleaning.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import regex
from tokenizers import normalizers, pre_tokenizers

OUT = Path(__file__).parent / "text_tables.inc"
CHARACTERS = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
BREAKS = ["CR", "LF", "Control", "Extend", "ZWJ", "Regional_Indicator", "Prepend", "SpacingMark"]
BREAKS += ["L", "V", "T", "LV", "LVT"]
CONJUNCTS = ["Consonant", "Extend", "Linker"]


def ranges(kinds: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(code, kind) in order -> runs (first, last, kind) without kind 0."""
    runs: list[tuple[int, int, int]] = []
    for code, kind in kinds:
        if kind and runs and runs[-1][1] == code - 1 and runs[-1][2] == kind:
            runs[-1] = (runs[-1][0], code, kind)
        elif kind:
            runs.append((code, code, kind))
    return runs


def classes() -> list[tuple[int, int, int]]:
    """Bits: 1 word character, 2 white space of the tokenizer, 4 white space of Python."""
    words, spaces = pre_tokenizers.Whitespace(), pre_tokenizers.WhitespaceSplit()

    def kind(code: int) -> int:
        text = f"a{chr(code)}a"
        word, pieces = len(words.pre_tokenize_str(text)) == 1, len(spaces.pre_tokenize_str(text))
        return word + 2 * (pieces == 2) + 4 * chr(code).isspace()

    return ranges((code, kind(code)) for code in CHARACTERS)


def lower_case() -> list[tuple[int, str]]:
    lower = normalizers.Lowercase()
    found = [(code, lower.normalize_str(chr(code))) for code in CHARACTERS]
    return [(code, text) for code, text in found if text != chr(code)]


def by_property(names: list[str], pattern: Callable[[str], str]) -> dict[int, int]:
    """Code -> 1 + index of its property in the names."""
    every = "".join(map(chr, CHARACTERS))
    return {
        ord(match): number
        for number, name in enumerate(names, start=1)
        for match in regex.findall(pattern(name), every)
    }


def graphemes() -> list[tuple[int, int, int]]:
    """1 + index in BREAKS, + 32 for a pictogram, + 64 * (1 + index in CONJUNCTS)."""
    breaks = by_property(BREAKS, lambda name: rf"\p{{GCB={name}}}")
    pictograms = by_property(["pictogram"], lambda name: r"\p{Extended_Pictographic}")
    conjuncts = by_property(CONJUNCTS, lambda name: rf"\p{{InCB={name}}}")
    return ranges(
        (code, breaks.get(code, 0) + 32 * pictograms.get(code, 0) + 64 * conjuncts.get(code, 0)) for code in CHARACTERS
    )


def quoted(text: str) -> str:
    """The inside of a C string literal, plain ASCII."""
    return "".join(
        c if " " <= c <= "~" and c not in '"\\?' else "".join(f"\\{b:03o}" for b in c.encode()) for c in text
    )


def table(kind: str, name: str, rows: list[str]) -> str:
    lines, line = [], "   "
    for row in rows:
        if len(line) + len(row) + 2 > 120:
            lines.append(line)
            line = "   "
        line += f" {row},"
    return "\n".join([f"constexpr {kind} {name}[] = {{", *lines, line, "};", ""])


def run_rows(runs: list[tuple[int, int, int]]) -> list[str]:
    return [f"{{{first:#x}, {last:#x}, {kind}}}" for first, last, kind in runs]


def text() -> str:
    return "\n".join([
        "// Written by csrc/text/text_tables.py; not to be edited.",
        table("Run", "kClasses", run_rows(classes())),
        table("Text", "kLower", [f'{{{code:#x}, "{quoted(to)}"}}' for code, to in lower_case()]),
        table("Run", "kGraphemes", run_rows(graphemes())),
    ])  # fmt: skip


if __name__ == "__main__":
    OUT.write_text(text(), encoding="utf-8")
