"""Writes the tables of prompt cleaning for the C++ core, from the libraries it must equal: ftfy, html and unicodedata.

python csrc/text/cleaning_tables.py        # needs ftfy

html_tables.inc      entities of `html`, and those that ftfy also reads in capitals
mojibake_tables.inc  ftfy's heuristic for garbled text as an automaton, its clues, and the encodings that it tries
normal_tables.inc    ftfy's replacements of single characters, decimal digits, what NFC needs, invisible characters
"""

import html.entities
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ftfy.bad_codecs
from ftfy import chardata, fixes
from ftfy.badness import BADNESS_RE
from text_tables import CHARACTERS, quoted, ranges, run_rows, table

from engine.model.text import is_blank

HERE = Path(__file__).parent
UNICODE = unicodedata.unidata_version  # of this Python
_parser: Any = re._parser  # type: ignore[attr-defined]
CLUES = ["utf8_first_of_2", "utf8_first_of_3", "utf8_first_of_4", "utf8_continuation", "utf8_continuation_strict"]

# A pattern is a sequence of steps. A step holds for a set of characters, or ("start", ...) at the start of the text.
Step = tuple[str, Any]


def holds(step: Step, char: str) -> bool:
    """Whether one step of a parsed pattern matches the character."""
    kind, value = str(step[0]), step[1]
    if kind == "LITERAL":
        return ord(char) == value
    if kind == "RANGE":
        return bool(value[0] <= ord(char) <= value[1])
    if kind == "ANY":
        return char != "\n"
    if kind == "CATEGORY":
        return char.isspace() if str(value) == "CATEGORY_SPACE" else char.isalnum() or char == "_"
    if kind == "IN":
        negated = str(value[0][0]) == "NEGATE"
        return any(holds(one, char) for one in value[negated:]) != negated
    raise ValueError(f"badness: got {kind} in the pattern, expected characters and sets")


def sequences(steps: list[Step]) -> Iterator[tuple[bool, list[Step]]]:
    """A parsed alternative without its optional steps: whether it is tied to the start, and its steps."""
    for number, (kind, value) in enumerate(steps):
        if str(kind) == "MAX_REPEAT":
            least, most, inner = value
            if (least, most) != (0, 1):
                raise ValueError(f"badness: got a repetition {least} to {most}, expected 0 to 1")
            yield from sequences([*steps[:number], *steps[number + 1 :]])
            yield from sequences([*steps[:number], *inner, *steps[number + 1 :]])
            return
    tied = bool(steps) and str(steps[0][0]) == "AT"
    yield tied, steps[tied:]


def automaton() -> tuple[dict[int, int], list[list[int]]]:
    """ftfy's badness as an automaton: the class of each character (0 where absent), and [state][class] -> state.

    State 0 is the start of a text, the last state is reached where the text is bad.
    """
    (branch,) = _parser.parse(BADNESS_RE.pattern, BADNESS_RE.flags)
    patterns = [one for alternative in branch[1][1] for one in sequences(list(alternative))]
    steps = {repr(step): step for _, pattern in patterns for step in pattern}
    # Characters that take part in the same steps are of one class.
    numbers: dict[tuple[str, ...], int] = {}
    classes: dict[int, int] = {}
    known: dict[tuple[bool, bool], tuple[str, ...]] = {}
    named = {code for step in steps.values() for code in named_by(step)}
    for code in CHARACTERS:
        char = chr(code)
        kind = char.isspace(), char.isalnum() or char == "_"
        if code in named or kind not in known:
            taken = tuple(name for name, step in steps.items() if holds(step, char))
            if code not in named:
                known[kind] = taken
        else:
            taken = known[kind]
        classes[code] = numbers.setdefault(taken, len(numbers))
    common = classes[0x10FFFF]  # unassigned: no space, no word
    swap = {common: 0, 0: common}
    classes = {code: swap.get(number, number) for code, number in classes.items()}
    takes = {swap.get(number, number): set(taken) for taken, number in numbers.items()}
    return {code: number for code, number in classes.items() if number}, determined(patterns, takes)


def named_by(step: Step) -> Iterator[int]:
    """Codes that a step names, besides whole categories of characters."""
    kind, value = str(step[0]), step[1]
    if kind == "LITERAL":
        yield value
    elif kind == "RANGE":
        yield from range(value[0], value[1] + 1)
    elif kind == "ANY":
        yield 10
    elif kind == "IN":
        for one in value:
            yield from named_by(one)


def determined(patterns: list[tuple[bool, list[Step]]], takes: dict[int, set[str]]) -> list[list[int]]:
    """The subset construction. A place is (pattern, steps done); every pattern may begin at every character."""
    begin = frozenset((p, 0) for p, (tied, _) in enumerate(patterns) if not tied)
    start = begin | {(p, 0) for p, (tied, _) in enumerate(patterns) if tied}
    found, rows = {start: 0}, []
    queue = [start]
    for places in queue:
        row = []
        for number in range(len(takes)):
            after = {(p, done + 1) for p, done in places if repr(patterns[p][1][done]) in takes[number]}
            if any(done == len(patterns[p][1]) for p, done in after):
                row.append(-1)
                continue
            following = begin | after
            if following not in found:
                found[following] = len(found)
                queue.append(following)
            row.append(found[following])
        rows.append(row)
    bad = len(rows)
    return [[bad if one < 0 else one for one in row] for row in rows]


def mojibake() -> str:
    classes, rows = automaton()
    clues = [re.compile(f"[{chardata.UTF8_CLUES[name]}]") for name in CLUES]
    bits = ((code, sum(1 << n for n, clue in enumerate(clues) if clue.match(chr(code)))) for code in range(0x10000))
    upper = bytes(range(0x80, 0x100))
    encodings = [[ord(char) for char in upper.decode(name)] for name in chardata.CHARMAP_ENCODINGS]
    windows = bytes(range(0x80, 0xA0)).decode("windows-1252", errors="replace")
    numbers = [str(len(rows)), str(len(rows[0])), str(len(encodings))]
    return "\n".join([
        f"constexpr std::size_t kStates = {numbers[0]}, kClasses = {numbers[1]}, kEncodings = {numbers[2]};",
        table("Run", "kClassOf", run_rows(ranges(sorted(classes.items())))),
        matrix("std::uint8_t", "kNext", "[kClasses]", rows),
        table("Run", "kClues", run_rows(ranges(bits))),
        matrix("std::uint16_t", "kUpperHalf", "[128]", encodings),
        "constexpr bool kSloppy[] = {"
        + ", ".join(str(name.startswith("sloppy")).lower() for name in chardata.CHARMAP_ENCODINGS) + "};",
        f"constexpr std::size_t kMacRoman = {chardata.CHARMAP_ENCODINGS.index('macroman')};",
        # 0 where strict Windows-1252 has no character.
        table("std::uint16_t", "kWindows1252", [str(0 if char == "\ufffd" else ord(char)) for char in windows]),
    ])  # fmt: skip


def matrix(kind: str, name: str, width: str, rows: list[list[int]]) -> str:
    inner = [table("", "", [str(one) for one in row]).split("\n", 1)[1].rstrip(";\n") for row in rows]
    return f"constexpr {kind} {name}[]{width} = {{\n" + ",\n".join("    {\n" + row for row in inner) + "\n};\n"


def entities() -> str:
    every = sorted(html.entities.html5.items())
    shouted = sorted((name[1:], text) for name, text in chardata.HTML_ENTITIES.items()
                     if name[1:] not in html.entities.html5)  # fmt: skip
    return "\n".join([
        table("Entity", "kEntities", [f'{{"{quoted(name)}", "{quoted(value)}"}}' for name, value in every]),
        table("Entity", "kShouted", [f'{{"{quoted(name)}", "{quoted(value)}"}}' for name, value in shouted]),
    ])  # fmt: skip


def replaced(char: str) -> str:
    """One character after ftfy's steps from C1 controls to quotation marks, without line breaks."""
    for step in (fixes.fix_c1_controls, fixes.fix_latin_ligatures, fixes.fix_character_width, fixes.uncurl_quotes):
        char = step(char)
    return char


def normal() -> str:
    replacements = [(code, replaced(chr(code))) for code in CHARACTERS if replaced(chr(code)) != chr(code)]
    digits = ranges((code, 1) for code in CHARACTERS if re.match(r"\d", chr(code)))
    removed = ranges((code, 1) for code in sorted(chardata.CONTROL_CHARS))
    classes = ranges((code, unicodedata.combining(chr(code))) for code in CHARACTERS)
    hangul = range(0xAC00, 0xD7A4)
    parts = [(code, unicodedata.normalize("NFD", chr(code))) for code in CHARACTERS if code not in hangul]
    pairs = []
    for code in CHARACTERS:
        both = unicodedata.decomposition(chr(code)).split()
        if len(both) == 2 and both[0][0] != "<" and unicodedata.is_normalized("NFC", chr(code)):
            pairs.append((int(both[0], 16), int(both[1], 16), code))
    return "\n".join([
        table("Text", "kReplaced", [f'{{{code:#x}, "{quoted(to)}"}}' for code, to in replacements]),
        table("Run", "kDigits", run_rows(digits)),
        table("Run", "kRemoved", run_rows(removed)),
        table("Run", "kCombining", run_rows(classes)),
        table("Text", "kParts", [f'{{{code:#x}, "{quoted(to)}"}}' for code, to in parts if to != chr(code)]),
        table("Pair", "kPairs", [f"{{{a:#x}, {b:#x}, {code:#x}}}" for a, b, code in sorted(pairs)]),
        table("Run", "kBlank", run_rows(ranges((code, int(is_blank(chr(code)))) for code in CHARACTERS))),
    ])  # fmt: skip


def texts() -> dict[Path, str]:
    """The content of every file, by path."""
    source = f"csrc/text/cleaning_tables.py from ftfy {ftfy.__version__}, Unicode {UNICODE}"
    head = f"// Written by {source}; not to be edited.\n"
    made = {"html": entities, "mojibake": mojibake, "normal": normal}
    return {HERE / f"{name}_tables.inc": head + make() for name, make in made.items()}


if __name__ == "__main__":
    for file, content in texts().items():
        file.write_text(content, encoding="utf-8")
