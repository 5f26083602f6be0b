"""What a model is trained to draw: one interface to the kinds of captioned clips and to their evaluators."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill import dimensions, evaluator, scenes, sprites


@dataclass(frozen=True)
class Task:
    """Specs are the task's own (`sprites.Spec`, `scenes.Scene`); each has a `caption`."""

    name: str
    sample: Callable[..., list[Any]]  # (count, generator, hidden=False) -> specs
    render: Callable[[list[Any], int], tuple[Tensor, Tensor]]  # (specs, frames) -> video, coverage
    score: Callable[[list[Tensor], list[Any]], dict[str, dict[str, float]]]  # means and standard errors

    def draw(self, count: int, seed: int, *, hidden: bool = False) -> list[Any]:
        return self.sample(count, torch.Generator().manual_seed(seed), hidden=hidden)


_ALL = (
    Task("sprites", sprites.sample, sprites.render, evaluator.score),
    Task("scenes", scenes.sample, scenes.render, dimensions.score),
)
TASKS = {task.name: task for task in _ALL}


def find_task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"task: got {name!r}, expected one of {', '.join(TASKS)}")
    return TASKS[name]
