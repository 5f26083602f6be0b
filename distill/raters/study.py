"""A study: its prompts, the blinded names of their videos, and the key that tells the models.

STUDY/page/       what raters get
STUDY/key.json    which name is which model
STUDY/answers/    one JSON file per rater
STUDY/results/    tables and plots
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.files import read_json
from engine.options import read

FORMAT = 1
PAGE, KEY, ANSWERS, RESULTS = "page", "key.json", "answers", "results"
# Upper ends in seconds of the paper's lengths of videos; the last one is open.
LENGTHS = {"0-5 s": 5.0, "5-10 s": 10.0, "over 10 s": float("inf")}


@dataclass(frozen=True)
class Prompt:
    """A prompt as raters see it; `videos` is blinded name -> model, one video of each model."""

    id: str
    prompt: str
    name: str  # in the manifest
    seconds: float  # of the longest of its videos
    videos: dict[str, str]

    @property
    def length(self) -> str:
        """Which of LENGTHS the prompt's videos have."""
        return next(name for name, end in LENGTHS.items() if self.seconds <= end)


@dataclass(frozen=True)
class Study:
    """Everything about a study but its answers. `id` is random; answers carry it."""

    id: str
    title: str
    models: tuple[str, ...]
    prompts: tuple[Prompt, ...]


def read_key(folder: Path) -> Study:
    """The study of a folder that `make` wrote. FileNotFoundError or ValueError names the file."""
    path = folder / KEY
    if not path.is_file():
        raise FileNotFoundError(f"study: got no {path}, expected a folder that `questionnaire make` wrote")
    content = read_json(path)
    if content.pop("format", None) != FORMAT:
        raise ValueError(f"{path}: got another format, expected {FORMAT}")
    prompts = content.get("prompts")
    if not isinstance(prompts, list) or not all(isinstance(row, dict) for row in prompts):
        raise ValueError(f"{path}: got no list of prompts, expected one")
    rows = tuple(_prompt(row, f"{path}: prompt {number}") for number, row in enumerate(prompts, 1))
    study = read(Study, content | {"prompts": []}, str(path))
    for row in rows:
        if sorted(row.videos.values()) != sorted(study.models):
            raise ValueError(f"{path}: prompt {row.id}: got {len(row.videos)} videos, expected one of each model")
    return Study(study.id, study.title, study.models, rows)


def _prompt(row: dict[str, Any], what: str) -> Prompt:
    prompt = read(Prompt, row, what)
    if not all(isinstance(model, str) for model in prompt.videos.values()):
        raise ValueError(f"{what}: got videos without models, expected name -> model")
    return prompt
