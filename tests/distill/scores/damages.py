"""What the tests of scores share: the scores of damaged clips, and the damages that fit every task."""

from typing import Any

from torch import Tensor

from distill.data.sprites import BACKGROUNDS, palette
from distill.scores.dimensions import QUALITY, SEMANTIC
from distill.scores.tasks import find_task

FRAMES = 33
NAMES = (*SEMANTIC, *QUALITY)


def following(name: str, choices: object, skip: tuple[str | None, ...] = ()) -> str:
    """The next choice after `name` that is none of `skip`."""
    names = list(choices)  # type: ignore[call-overload]
    while (name := names[(names.index(name) + 1) % len(names)]) in skip:
        pass
    return name


def means(task: str, videos: Tensor, specs: list[Any]) -> dict[str, float]:
    """The mean of every score over clips."""
    return {name: value["mean"] for name, value in find_task(task).score(videos, specs).items()}


def without_objects(video: Tensor, specs: list[Any], frames: slice) -> Tensor:
    """The clips [N, 3, T, 32, 32] with nothing but their background in `frames`."""
    video = video.clone()
    grounds = palette(BACKGROUNDS)[[list(BACKGROUNDS).index(spec.background) for spec in specs]]
    video[:, :, frames] = grounds[:, :, None, None, None]
    return video


def frozen(video: Tensor) -> Tensor:
    return video[:, :, :1].expand_as(video)


def jumping(video: Tensor) -> Tensor:
    """Half-way everything jumps, across its way too."""
    video = video.clone()
    video[:, :, 16:] = video[:, :, 16:].roll((8, 8), (-1, -2))
    return video
