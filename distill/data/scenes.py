"""Richer captioned clips: a moving object, often a second one that stands still, and motion that no caption states.

    "a red circle moving right slowly left of a blue square on a gray background"

The caption states class, colour, first direction, coarse speed, background and, at the first frame, where the mover
stands relative to the other object. It does not state exact speed, sizes and places, or that the mover bounces off the
walls. Nor does it state whether the mover passes in front of the other object, or whether it blinks: a blinking mover
goes on unseen for some frames. The text and one other frame therefore do not determine a frame: the past matters.

A clip is float [3, T, 32, 32] in [-1, 1]; positions are in pixels, time in pixel frames.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.data.sprites import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SIZE, Spec, combinations, coverage, palette

SPEED_RANGES = {"slowly": (0.3, 0.6), "quickly": (0.8, 1.2)}  # pixels per frame
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # mover minus other
RADII = (5.0, 7.5)
TWO_SHARE = 0.5  # share of the clips with a second object
CROSS_SHARE = 0.4  # share of the drawn scenes with crossing objects that are kept
BLINK_SHARE = 0.35  # share of the clips whose mover blinks
LATENT = 4  # pixel frames per latent frame; a mover blinks for whole latent frames
HIDDEN = (1, 2)  # latent frames unseen in a row
PERIOD = (3, 5)  # latent frames from one disappearance to the next
MIN_OFFSET = 6.0  # pixels between the centres along the stated relation
FIRST_LEG = 0.45  # the mover starts within this share of its way, so that its first direction is seen


@dataclass(frozen=True)
class Thing:
    """One drawn object: two captioned facts, and a radius and a first centre (x, y) that the caption leaves open."""

    colour: str
    shape: str
    radius: float
    centre: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """What a clip shows. `in_front`, the blinking and `pace` are not in the caption.

    `pace` [pixels per frame] is negative where the mover has bounced and comes back.
    """

    mover: Thing
    direction: str
    speed: str
    background: str
    pace: float
    other: Thing | None = None
    in_front: bool = True  # the mover hides the other object where they overlap
    period: int = 0  # frames between two disappearances; 0 never blinks
    hidden: int = 0  # frames unseen of every period
    phase: int = 0  # first frame of the first disappearance
    said: str | None = None  # relation that the caption states; None: the one that holds at the first frame

    @property
    def relation(self) -> str | None:
        """Which of RELATIONS the caption states; None with one object."""
        if self.other is None:
            return None
        if self.said is not None:
            return self.said
        dx, dy = (a - b for a, b in zip(self.mover.centre, self.other.centre, strict=True))
        along_x = abs(dx) >= abs(dy)
        sign = (1 if dx > 0 else -1, 0) if along_x else (0, 1 if dy > 0 else -1)
        return next(name for name, step in RELATIONS.items() if step == sign)

    @property
    def caption(self) -> str:
        text = f"a {self.mover.colour} {self.mover.shape} moving {self.direction} {self.speed}"
        if self.other is not None:
            text += f" {self.relation} a {self.other.colour} {self.other.shape}"
        return f"{text} on a {self.background} background"


def between(low: float, high: float, generator: torch.Generator) -> float:
    """A number in [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def whole(low: int, high: int, generator: torch.Generator) -> int:
    """A whole number from low to high."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def place(radius: float, direction: str | None, generator: torch.Generator) -> tuple[float, float]:
    """A centre inside the walls; with a direction, on the first part of the path along it."""
    centre = []
    for step in DIRECTIONS[direction] if direction else (0, 0):
        share = between(0, 1, generator)
        share = share if step == 0 else FIRST_LEG * share if step > 0 else 1 - FIRST_LEG * share
        centre.append(radius + (SIZE - 2 * radius) * share)
    return centre[0], centre[1]


def apart(mover: Thing, other: Thing) -> bool:
    """Whether the objects do not touch and one of RELATIONS clearly holds."""
    dx, dy = (abs(a - b) for a, b in zip(mover.centre, other.centre, strict=True))
    clear = max(dx, dy) >= MIN_OFFSET and max(dx, dy) >= 1.3 * min(dx, dy)
    return clear and (dx * dx + dy * dy) ** 0.5 >= mover.radius + other.radius + 1


def _cross(mover: Thing, direction: str, other: Thing) -> bool:
    """Whether the mover's path leads over the other object."""
    across = 1 if DIRECTIONS[direction][0] else 0
    return abs(mover.centre[across] - other.centre[across]) < mover.radius + other.radius


def draw_scene(pool: tuple[Spec, ...], generator: torch.Generator) -> Scene:
    """A scene whose mover has the facts of one of `pool`."""
    facts = pool[whole(0, len(pool) - 1, generator)]
    mover_radius = between(*RADII, generator)
    other = None
    two = between(0, 1, generator) < TWO_SHARE
    colours = [name for name in COLOURS if name != facts.colour]
    while True:
        mover = Thing(facts.colour, facts.shape, mover_radius, place(mover_radius, facts.direction, generator))
        if not two:
            break
        radius = between(*RADII, generator)
        colour = colours[whole(0, len(colours) - 1, generator)]
        shape = SHAPES[whole(0, len(SHAPES) - 1, generator)]
        other = Thing(colour, shape, radius, place(radius, None, generator))
        kept = not _cross(mover, facts.direction, other) or between(0, 1, generator) < CROSS_SHARE
        if kept and apart(mover, other):
            break
    blinks = between(0, 1, generator) < BLINK_SHARE
    hidden, period = LATENT * whole(*HIDDEN, generator), LATENT * whole(*PERIOD, generator)
    phase = 1 + LATENT * whole(1, period // LATENT, generator)  # not in the first two latent frames
    return Scene(
        mover,
        facts.direction,
        facts.speed,
        facts.background,
        between(*SPEED_RANGES[facts.speed], generator),
        other,
        in_front=between(0, 1, generator) < 0.5,
        period=period if blinks else 0,
        hidden=hidden if blinks else 0,
        phase=phase if blinks else 0,
    )


def sample(count: int, generator: torch.Generator, *, hidden: bool = False) -> list[Scene]:
    """Draw scenes whose mover is a training combination of `sprites.combinations`, or (`hidden`) a held-out one."""
    pool = combinations(held_out=hidden)
    return [draw_scene(pool, generator) for _ in range(count)]


def path(scene: Scene, frames: int) -> Tensor:
    """Centre (x, y) of the mover in every frame, bouncing between the walls: [T, 2]."""
    start, span = torch.tensor(scene.mover.centre), SIZE - 2 * scene.mover.radius
    step = torch.tensor(DIRECTIONS[scene.direction]) * scene.pace
    way = (start - scene.mover.radius + torch.arange(frames)[:, None] * step) % (2 * span)
    return scene.mover.radius + torch.minimum(way, 2 * span - way)


def seen(scene: Scene, frames: int) -> Tensor:
    """Whether the mover is drawn: bool [T]."""
    since = torch.arange(frames) - scene.phase
    if not scene.period:
        return torch.ones(frames, dtype=torch.bool)
    return (since < 0) | (since % scene.period >= scene.hidden)


def _cover(thing: Thing, centre: Tensor) -> Tensor:
    """Coverage [T, 32, 32] of an object at centre [T, 2]."""
    x, y = centre[:, 0, None, None], centre[:, 1, None, None]
    return coverage(x, y, torch.tensor(thing.radius), torch.tensor(SHAPES.index(thing.shape)))


def render(scenes: list[Scene], frames: int) -> tuple[Tensor, Tensor]:
    """Draw clips: video [N, 3, T, 32, 32] in [-1, 1] and object coverage [N, 1, T, 32, 32] in [0, 1]."""
    colours, grounds = palette(COLOURS), palette(BACKGROUNDS)
    videos, covers = [], []
    for scene in scenes:
        video = grounds[list(BACKGROUNDS).index(scene.background)].view(3, 1, 1, 1).expand(3, frames, SIZE, SIZE)
        layers = [(scene.mover, _cover(scene.mover, path(scene, frames)) * seen(scene, frames)[:, None, None])]
        if scene.other is not None:
            centre = torch.tensor(scene.other.centre).expand(frames, 2)
            layers.insert(0 if scene.in_front else 1, (scene.other, _cover(scene.other, centre)))
        cover = torch.zeros(frames, SIZE, SIZE)
        for thing, part in layers:
            colour = colours[list(COLOURS).index(thing.colour)].view(3, 1, 1, 1)
            video = video + (colour - video) * part
            cover = torch.maximum(cover, part)
        videos.append(video)
        covers.append(cover[None])
    return torch.stack(videos), torch.stack(covers)
