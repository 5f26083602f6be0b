"""Regular expressions of PEFT's configurations, matched without backtracking: time grows with the name, not beyond.

`re` tries every way through a pattern, so one like (a+)+b takes years on a name of 60 letters. Here a part of a
pattern maps the set of places where it may begin to the set of places where it may end.
"""

import re
from collections.abc import Sequence
from re import _parser  # type: ignore[attr-defined]
from typing import Any

MOST_PATTERN = 500  # characters
MOST_DEPTH = 2  # of repeats in each other
_PLAIN = re.compile(r"[\w.\-]+")
_BOUNDARY = re.compile(r"\b")
Places = frozenset[int]


class Pattern:
    """A pattern for whole names. ValueError for one that is no regular expression, or looks around or back."""

    def __init__(self, text: str) -> None:
        if len(text) > MOST_PATTERN:
            raise ValueError(f"{len(text)} characters, at most {MOST_PATTERN} are read")
        self.plain = text if _PLAIN.fullmatch(text) else None
        self._last = text.rpartition(".")[2]
        try:
            self._parts = _parser.parse(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(str(error)) from None
        _ends(self._parts, "", frozenset({0}))  # refuses what is not known here

    def matches(self, name: str) -> bool:
        """As re.fullmatch."""
        return len(name) in _ends(self._parts, name, frozenset({0}))

    def matches_end(self, name: str) -> bool:
        """As re.match(rf"(.*\\.)?({text})$"): whole dotted parts at the end of a name."""
        if self.plain is not None:  # a name, whose dots stand for any letter
            start = len(name) - len(self.plain)
            begins = start == 0 or (start > 0 and name[start - 1] == ".")
            return begins and name.endswith(self._last) and _alike(self.plain, name[start:])
        starts = frozenset({0, *(match.end() for match in re.finditer(r"\.", name))})
        return len(name) in _ends(self._parts, name, starts)


def _alike(plain: str, name: str) -> bool:
    return all(a in (".", b) for a, b in zip(plain, name, strict=True))


def _ends(parts: Sequence[tuple[Any, Any]], name: str, starts: Places, depth: int = 0) -> Places:
    """Where a sequence of parts may end that begins at one of these places."""
    for kind, value in parts:
        starts = _after(str(kind), value, name, starts, depth)
    return starts


def _after(kind: str, value: Any, name: str, starts: Places, depth: int) -> Places:
    if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
        return frozenset(at + 1 for at in starts if at < len(name) and _fits(kind, value, name[at]))
    if kind == "BRANCH":
        return frozenset().union(*[_ends(one, name, starts, depth) for one in value[1]])
    if kind == "SUBPATTERN" and not value[1] and not value[2]:  # no flags inside
        return _ends(value[3], name, starts, depth)
    if kind in ("MAX_REPEAT", "MIN_REPEAT") and depth < MOST_DEPTH:
        least, most, inner = value
        return _repeated(least, most, inner, name, starts, depth + 1)
    if kind == "AT" and str(value) == "AT_BEGINNING":
        return starts & {0}
    if kind == "AT" and str(value) == "AT_END":
        return starts & {len(name)}
    if kind == "AT" and str(value) == "AT_BOUNDARY":
        return frozenset(at for at in starts if _BOUNDARY.match(name, at))
    raise ValueError(f"{kind.lower().replace('_', ' ')}, which is not read in a pattern at this place")


def _repeated(
    least: int, most: int, parts: Sequence[tuple[Any, Any]], name: str, starts: Places, depth: int
) -> Places:  # fmt: skip
    # A part that may be empty adds places until it has all; any other one moves them to the end of the name.
    for _ in range(least):
        before, starts = starts, _ends(parts, name, starts, depth)
        if starts in (before, frozenset()):
            break
    found = new = starts
    for _ in range(most - least):
        new = _ends(parts, name, new, depth) - found
        found |= new
        if not new:
            break
    return found


def _fits(kind: str, value: Any, char: str) -> bool:
    if kind == "ANY":
        return char != "\n"
    if kind == "IN":
        negated = str(value[0][0]) == "NEGATE"
        return any(_among(str(one), about, char) for one, about in value[negated:]) != negated
    return (ord(char) == value) == (kind == "LITERAL")


def _among(kind: str, about: Any, char: str) -> bool:
    if kind == "RANGE":
        return about[0] <= ord(char) <= about[1]
    if kind == "CATEGORY":
        letter = {"DIGIT": "d", "WORD": "w", "SPACE": "s"}[str(about).removeprefix("CATEGORY_").removeprefix("NOT_")]
        return (re.match(rf"\{letter}", char) is not None) != str(about).startswith("CATEGORY_NOT_")
    return ord(char) == about
