"""The answers of one rater: read, checked, and kept as one JSON file.

    {"format": 1, "study": ID, "rater": NAME, "pages": {PROMPT: {
        "shown": [VIDEO, ...],                     in their order on the page
        "scores": {VIDEO: {ITEM: 1 to 5, ...}},
        "best": {QUESTION: VIDEO}}}}

Other entries, such as times, are kept and not read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.raters.items import ITEMS, QUESTIONS, SCALE
from distill.raters.study import FORMAT, Prompt, Study
from engine.files import parse_json, read_text
from engine.options import shown

MOST_NAME = 40  # characters of a rater's name
NAMES = f"a name of at most {MOST_NAME} characters without / and \\ that begins with no dot or space"


@dataclass(frozen=True)
class Page:
    """What a rater said about one prompt."""

    shown: tuple[str, ...]
    scores: dict[str, dict[str, int]]
    best: dict[str, str]


@dataclass(frozen=True)
class Answers:
    """What a rater said; `pages` has the prompts that were finished."""

    rater: str
    pages: dict[str, Page]

    def missing(self, study: Study) -> int:
        """How many prompts the rater has not finished."""
        return len(study.prompts) - len(self.pages)


def parse(text: str | bytes, study: Study, what: str) -> Answers:
    """The answers of a JSON text. ValueError, which begins with `what`, for anything that is none of this study."""
    value = parse_json(text, what)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(f"{what}: got no answers, expected a JSON object of format {FORMAT}")
    if value.get("study") != study.id:
        raise ValueError(f"{what}: got study {shown(value.get('study'))}, expected {study.id!r}")
    rater, pages = value.get("rater"), _table(value.get("pages"), f"{what}: pages")
    if not isinstance(rater, str) or not is_name(rater):
        raise ValueError(f"{what}: rater: got {shown(rater)}, expected {NAMES}")
    prompts = {prompt.id: prompt for prompt in study.prompts}
    if unknown := sorted(pages.keys() - prompts.keys()):
        raise ValueError(f"{what}: pages: got prompt {shown(unknown[0])}, expected those of the study")
    found = {id: _page(pages[id], prompt, f"{what}: prompt {id}") for id, prompt in prompts.items() if id in pages}
    return Answers(rater, found)


def is_name(rater: str) -> bool:
    """Whether a rater's name can also name a file."""
    fits = 0 < len(rater) <= MOST_NAME and rater == rater.strip() and rater.isprintable()
    return fits and not rater.startswith(".") and not set(rater) & set("/\\")


def _page(value: Any, prompt: Prompt, what: str) -> Page:
    value = _table(value, what)
    order = value.get("shown")
    texts = isinstance(order, list) and all(isinstance(video, str) for video in order)
    if not texts or sorted(order) != sorted(prompt.videos):
        raise ValueError(f"{what}: shown: got {shown(order)}, expected the videos of the prompt, each once")
    scores = _keyed(value.get("scores"), prompt.videos, f"{what}: scores")
    for video, given in scores.items():
        _keyed(given, [item.name for item in ITEMS], f"{what}: scores: {video}")
        for item, score in given.items():
            if type(score) is not int or not 1 <= score <= len(SCALE):
                raise ValueError(f"{what}: {video}: {item}: got {shown(score)}, expected 1 to {len(SCALE)}")
    best = _keyed(value.get("best"), QUESTIONS, f"{what}: best")
    for question, video in best.items():
        if not isinstance(video, str) or video not in prompt.videos:
            raise ValueError(f"{what}: best: {question}: got {shown(video)}, expected a video of the prompt")
    return Page(tuple(order), scores, best)


def _table(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what}: got {shown(value)}, expected an object")
    return value


def _keyed(value: Any, keys: Any, what: str) -> dict[str, Any]:
    """A table with exactly these keys."""
    found, wanted = _table(value, what), set(keys)
    if unknown := sorted(found.keys() - wanted):
        raise ValueError(f"{what}: got {shown(unknown[0])}, expected one of {', '.join(sorted(wanted))}")
    if lacking := sorted(wanted - found.keys()):
        raise ValueError(f"{what}: got no {lacking[0]}, expected it")
    return found


@dataclass(frozen=True)
class Collected:
    """The answers that count, by the raters' names, and why other files do not."""

    answers: list[Answers]
    skipped: dict[str, str]  # file -> why


def collect(folder: Path, study: Study, incomplete: bool) -> Collected:
    """Read all .json files of a folder. ValueError where two files of one rater differ, or none can be used.

    incomplete: also take the finished prompts of raters who did not finish all
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"answers: got {folder}, expected a folder with one JSON file per rater")
    kept: dict[str, tuple[str, Answers]] = {}
    skipped: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            answers = parse(read_text(path), study, path.name)
            missing = answers.missing(study)
            if not answers.pages or (missing and not incomplete):
                raise ValueError(f"{path.name}: got no answers to {missing} of {len(study.prompts)} prompts, "
                                 "expected all")  # fmt: skip
        except ValueError as error:
            skipped[path.name] = str(error).removeprefix(f"{path.name}: ")
            continue
        first, same = kept.setdefault(answers.rater, (path.name, answers))
        if same != answers:
            raise ValueError(f"answers: got different ones of rater {answers.rater!r} in {first} and {path.name}, "
                             "expected one file; delete the wrong one")  # fmt: skip
        if first != path.name:
            skipped[path.name] = f"got the same answers as {first}, expected each rater once"
    if not kept:
        why = f" ({next(iter(skipped))}: {next(iter(skipped.values()))})" if skipped else ""
        raise ValueError(f"answers: got none in {folder} that count, expected at least one rater{why}")
    return Collected([answers for _, answers in sorted(kept.values(), key=lambda one: one[1].rater)], skipped)
