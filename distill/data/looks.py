"""Pairs of scenes for video-to-video: the motion of one, with the look that another caption names.

The mover's colour and shape and the background are its look. In a share of the training pairs the second object has
another look too. Of training pairs both scenes show training combinations; of held-out ones the wanted does.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from distill.data.scenes import Scene, between, draw_scene, whole
from distill.data.sprites import COLOURS, SHAPES, Spec, combinations, held_out
from distill.data.switches import another

LOOKS = ("colour", "shape", "background")
OTHER_SHARE = 0.3  # share of the training pairs with a second object in which it changes too


class Pair(NamedTuple):
    """What the input shows, and what the prompt asks for: alike but for the look."""

    shown: Scene
    wanted: Scene


def draw_pair(change: Sequence[str] | None, generator: torch.Generator, *, hidden: bool = False) -> Pair:
    """Draw scenes that differ in the facts `change`, of LOOKS; None: in random ones, as in training."""
    pool = combinations(held_out=hidden)
    while True:
        wanted = draw_scene(pool, generator)
        mover, other = wanted.mover, wanted.other
        look = {"colour": mover.colour, "shape": mover.shape, "background": wanted.background}
        names = _some_looks(generator) if change is None else change
        look |= {name: another(name, look[name], generator) for name in names}
        if other is not None and change is None and between(0, 1, generator) < OTHER_SHARE:
            other = replace(other, colour=_one_of(tuple(COLOURS), generator), shape=_one_of(SHAPES, generator))
        alike = other is not None and other.colour == look["colour"]
        if alike or (not hidden and held_out(Spec(direction=wanted.direction, speed=wanted.speed, **look))):
            continue
        mover = replace(mover, colour=look["colour"], shape=look["shape"])
        return Pair(replace(wanted, mover=mover, other=other, background=look["background"]), wanted)


def _some_looks(generator: torch.Generator) -> list[str]:
    """One to all of LOOKS, each number as often."""
    order = torch.randperm(len(LOOKS), generator=generator).tolist()
    return [LOOKS[i] for i in order[: whole(1, len(LOOKS), generator)]]


def _one_of(values: Sequence[str], generator: torch.Generator) -> str:
    return values[whole(0, len(values) - 1, generator)]
