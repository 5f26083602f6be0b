"""Small studies: videos of two models, their page and key, and raters who answer by a rule."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np

from distill.__main__ import main
from distill.raters.items import ITEMS, QUESTIONS
from distill.raters.study import Prompt, Study

MODELS = ("zebra-model", "yak-model")
PROMPTS = ("a red circle", "a blue square", "a green star")

# (rater, prompt, model) -> score of each item; (rater, prompt, question) -> preferred model
Scores = Callable[[int, int, str], list[int]]
Best = Callable[[int, int, str], str]


def write_video(path: Path, frames: int = 8, level: int = 0, codec: str = "libx264", **metadata: str) -> None:
    """A gray 32 x 32 video at 8 frames a second that gets brighter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        container.metadata.update(metadata)
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(frames):
            picture = np.full((32, 32, 3), 8 * number + level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_videos(folder: Path) -> Path:
    """A folder per model, whose videos tell the model in their metadata; captions beside them."""
    for level, model in enumerate(MODELS):
        for number, prompt in enumerate(PROMPTS, 1):
            path = folder / model / f"{number:02}.mp4"
            write_video(path, 8 * number, 40 * level, title=f"by {model}", comment=f"{model}/{number}")
            path.with_suffix(".txt").write_text(f"{prompt}\n")
    return folder


def make_study(folder: Path) -> Path:
    """What `make` writes of `write_videos`."""
    assert (
        main(["questionnaire", "make", "--videos", str(write_videos(folder / "videos")), "--out", str(folder / "s")])
        == 0
    )
    return folder / "s"


def study_of(prompts: int, models: tuple[str, ...], seconds: float = 4.0) -> Study:
    """A study whose videos are names alone."""
    rows = (
        Prompt(str(n), f"prompt {n}", f"{n}", seconds, {f"v{n}-{m}": name for m, name in enumerate(models)})
        for n in range(prompts)
    )
    return Study("test", "A test", models, tuple(rows))


def answers(study: Study, rater: int, scores: Scores, best: Best) -> dict[str, Any]:
    """What the page would send of a rater who follows a rule; videos are shown in another order for each rater."""
    pages = {}
    for p, prompt in enumerate(study.prompts):
        video = {model: name for name, model in prompt.videos.items()}
        order = list(prompt.videos)
        np.random.default_rng([rater, p]).shuffle(order)
        pages[prompt.id] = {
            "shown": order,
            "scores": {
                name: dict(zip((item.name for item in ITEMS), scores(rater, p, model), strict=True))
                for name, model in prompt.videos.items()
            },
            "best": {question: video[best(rater, p, question)] for question in QUESTIONS},
        }
    return {"format": 1, "study": study.id, "rater": f"{rater:02}", "pages": pages}


def plain_answers(study: Study, rater: int = 1) -> dict[str, Any]:
    """All threes, and the first model is best."""
    return answers(study, rater, lambda *_: [3] * len(ITEMS), lambda *_: study.models[0])


def write_answers(folder: Path, *given: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for one in given:
        (folder / f"{one['rater']}.json").write_text(json.dumps(one))
