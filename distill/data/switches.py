"""Scenes whose prompt is switched: from one latent frame on, some facts of the mover or of its background are others.

The mover goes on from its place, with its size. A bounced mover keeps its heading unless the direction is among the
facts that change. The second object stays, and the later caption keeps what the earlier one said about it. In a share
of the training clips the second object comes, goes, or changes instead.

Of training clips both prompts show training combinations of `sprites.combinations`; of held-out ones the later does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.data import scenes
from distill.data.scenes import LATENT, SPEED_RANGES, Scene, Thing, between, draw_scene, path, seen, whole
from distill.data.sprites import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SIZE, SPEEDS, Spec, combinations, held_out

FACTS = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "speed": tuple(SPEEDS),
    "background": tuple(BACKGROUNDS),
}
FIRST, LAST = 2, 5  # latent frames at which training clips switch
ONE_SHARE, ALL_SHARE = 0.5, 0.2  # shares of training switches of one fact and of all; the rest: of some
OTHER_SHARE = 0.2  # share of the training switches that change the second object too
ROOM = 0.4  # share of the way between the walls that is free in a new direction


@dataclass(frozen=True)
class Switch:
    """Two scenes in one clip: `after` begins at latent frame `begins`, where `before` has led the mover."""

    before: Scene
    after: Scene
    begins: int
    changed: tuple[str, ...]  # names in FACTS

    @property
    def caption(self) -> str:
        """The later caption."""
        return self.after.caption

    @property
    def frame(self) -> int:
        """First pixel frame of `after`."""
        return first_frame(self.begins)


def first_frame(latent: int) -> int:
    """The first pixel frame of a latent frame."""
    return max(0, LATENT * (latent - 1) + 1)


def draw_switch(
    changed: Sequence[str] | None, generator: torch.Generator, *, begins: int | None = None, hidden: bool = False
) -> Switch:
    """Draw a switch of the facts `changed`; None: of random ones, and perhaps of the second object, as in training."""
    later = combinations(held_out=hidden)
    while True:
        names = tuple(changed) if changed is not None else _some_facts(generator)
        at = whole(FIRST, LAST, generator) if begins is None else begins
        wanted = later[whole(0, len(later) - 1, generator)]
        earlier = replace(wanted, **{name: another(name, getattr(wanted, name), generator) for name in names})
        if not hidden and held_out(earlier):
            continue
        before = draw_scene((earlier,), generator)
        after = _after(before, wanted, first_frame(at), "direction" in names, "speed" in names, generator)
        if after is None:
            continue
        if changed is None and between(0, 1, generator) < OTHER_SHARE:
            after = _with_another_other(after, generator)
        return Switch(before, after, at, names)


def _some_facts(generator: torch.Generator) -> tuple[str, ...]:
    turn, names = between(0, 1, generator), list(FACTS)
    count = 1 if turn < ONE_SHARE else len(names) if turn < ONE_SHARE + ALL_SHARE else whole(2, 4, generator)
    order = torch.randperm(len(names), generator=generator).tolist()
    return tuple(names[i] for i in sorted(order[:count]))


def another(name: str, value: str, generator: torch.Generator) -> str:
    """Another value of a fact."""
    values = [other for other in FACTS[name] if other != value]
    return values[whole(0, len(values) - 1, generator)]


def _after(
    before: Scene, wanted: Spec, frame: int, turns: bool, paced: bool, generator: torch.Generator
) -> Scene | None:
    """The scene that follows at pixel frame `frame`.

    None if its mover is unseen there, has no room to turn or the colour of the second object.
    """
    centre = path(before, frame + 1)[frame]
    alike = before.other is not None and before.other.colour == wanted.colour
    if alike or not bool(seen(before, frame + 1)[frame]):
        return None
    radius, pace = before.mover.radius, abs(before.pace)
    if paced:
        pace = between(*SPEED_RANGES[wanted.speed], generator)
    if not turns:
        pace *= heading(before, frame)
    elif room(centre, radius, wanted.direction) < ROOM:
        return None
    x, y = centre.tolist()
    return replace(
        before,
        mover=Thing(wanted.colour, wanted.shape, radius, (x, y)),
        direction=wanted.direction,
        speed=wanted.speed,
        background=wanted.background,
        pace=pace,
        phase=before.phase - frame,
        said=before.relation,
    )


def heading(scene: Scene, frame: int) -> int:
    """1 where the mover goes in its scene's direction at a pixel frame, -1 where it has bounced and comes back."""
    axis = int(DIRECTIONS[scene.direction][0] == 0)
    step, span = DIRECTIONS[scene.direction][axis] * scene.pace, SIZE - 2 * scene.mover.radius
    bounced = (scene.mover.centre[axis] - scene.mover.radius + frame * step) % (2 * span) > span
    return -1 if bounced != (scene.pace < 0) else 1


def room(centre: Tensor, radius: float, direction: str) -> float:
    """Share of the way between the walls that lies before a mover at centre [2] which turns to a direction."""
    axis = int(DIRECTIONS[direction][0] == 0)
    behind = (float(centre[axis]) - radius) / (SIZE - 2 * radius)
    return 1 - behind if DIRECTIONS[direction][axis] > 0 else behind


def _with_another_other(scene: Scene, generator: torch.Generator) -> Scene:
    """The same scene, whose second object has gone, has come, or has another colour or shape."""
    free = [colour for colour in COLOURS if colour != scene.mover.colour]
    colour, shape = free[whole(0, len(free) - 1, generator)], SHAPES[whole(0, len(SHAPES) - 1, generator)]
    if scene.other is not None:
        if between(0, 1, generator) < 0.5:
            return replace(scene, other=None, said=None)
        return replace(scene, other=replace(scene.other, colour=colour, shape=shape))
    radius = between(*scenes.RADII, generator)
    for _ in range(20):
        other = Thing(colour, shape, radius, scenes.place(radius, None, generator))
        if scenes.apart(scene.mover, other):
            return replace(scene, other=other, said=None)
    return scene


def with_switches(drawn: Sequence[Scene], share: float, generator: torch.Generator) -> list[Scene | Switch]:
    """The scenes, a share of them replaced by switches of training."""
    count = round(share * len(drawn))
    return [draw_switch(None, generator) for _ in range(count)] + list(drawn[count:])


def render(specs: Sequence[Scene | Switch], frames: int) -> tuple[Tensor, Tensor]:
    """Draw clips: video [N, 3, T, 32, 32] in [-1, 1] and object coverage [N, 1, T, 32, 32] in [0, 1]."""
    parts = []
    for spec in specs:
        if isinstance(spec, Scene):
            parts.append(scenes.render([spec], frames))
            continue
        first = scenes.render([spec.before], min(spec.frame, frames))
        second = scenes.render([spec.after], max(frames - spec.frame, 0))
        parts.append((torch.cat([first[0], second[0]], 2), torch.cat([first[1], second[1]], 2)))
    videos, covers = zip(*parts, strict=True)
    return torch.cat(videos), torch.cat(covers)
