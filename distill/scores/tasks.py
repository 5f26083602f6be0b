"""Tasks: one interface to the kinds of captioned clips that a model learns to draw, and to their scores."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill.data import scenes, sprites
from distill.data.scenes import Scene, Thing
from distill.scores.dimensions import dimensions, summarise


@dataclass(frozen=True)
class Task:
    """A kind of clips. Its specs are `sprites.Spec` or `scenes.Scene`; each has a `caption`."""

    name: str
    sample: Callable[..., list[Any]]  # (count, generator, hidden=False) -> specs
    render: Callable[[list[Any], int], tuple[Tensor, Tensor]]  # (specs, frames) -> video, coverage
    dimensions: Callable[..., dict[str, float]]  # (video, spec, begins=True) -> scores of one clip

    def draw(self, count: int, seed: int, *, hidden: bool = False) -> list[Any]:
        """Specs from a seed: of the training side, or (`hidden`) held-out ones."""
        return self.sample(count, torch.Generator().manual_seed(seed), hidden=hidden)

    def score(self, videos: Iterable[Tensor], specs: list[Any], **options: Any) -> dict[str, dict[str, float]]:
        """Mean, standard error and number of clips of every dimension and of semantic, quality and total."""
        clips = zip(videos, specs, strict=True)
        return summarise([self.dimensions(video, spec, **options) for video, spec in clips])


def as_scene(spec: sprites.Spec) -> Scene:
    """The scene that states what a sprite's caption states."""
    mover = Thing(spec.colour, spec.shape, spec.radius, spec.centre)
    return Scene(mover, spec.direction, spec.speed, spec.background, sprites.SPEEDS[spec.speed])


def _on_torus(video: Tensor, spec: sprites.Spec, **options: Any) -> dict[str, float]:
    """One object that is always visible. It leaves on one side and comes back on the other."""
    return dimensions(video, as_scene(spec), max_hidden=0, walls=False, **options)


_ALL = (
    Task("sprites", sprites.sample, sprites.render, _on_torus),
    Task("scenes", scenes.sample, scenes.render, partial(dimensions, max_hidden=9, walls=True)),
)
TASKS = {task.name: task for task in _ALL}


def find_task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"task: got {name!r}, expected one of {', '.join(TASKS)}")
    return TASKS[name]
