"""Captioned sprite clips: one object moving over a plain background on a torus.

`distill.scores` reads every captioned fact back from the pixels, and so scores generated clips exactly. A clip is
float [3, T, 32, 32] in [-1, 1]; positions are in pixels, time in pixel frames.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor

SIZE = 32
COLOURS = {
    "red": (225, 35, 35),
    "green": (40, 185, 60),
    "blue": (45, 80, 235),
    "yellow": (245, 225, 40),
    "purple": (160, 40, 200),
}
BACKGROUNDS = {
    "black": (12, 12, 12),
    "white": (243, 243, 243),
    "gray": (125, 125, 125),
    "teal": (30, 110, 110),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
SPEEDS = {"slowly": 0.5, "quickly": 1.0}  # pixels per frame
RADII = (6.0, 9.0)
HELD_OUT_SHARE = 0.1


def palette(colours: dict[str, tuple[int, int, int]]) -> Tensor:
    """RGB in 0..255 -> [n, 3] in [-1, 1], in the order of the dict."""
    return torch.tensor(list(colours.values()), dtype=torch.float32) / 127.5 - 1


@dataclass(frozen=True)
class Spec:
    """What a clip shows: five captioned facts, and the radius and first centre that the caption leaves open."""

    colour: str
    shape: str
    direction: str
    speed: str
    background: str
    radius: float = 7.5
    centre: tuple[float, float] = (16.0, 16.0)

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction} {self.speed} on a {self.background} background"

    @property
    def velocity(self) -> tuple[float, float]:
        """Pixels per frame along x and y."""
        dx, dy = DIRECTIONS[self.direction]
        return dx * SPEEDS[self.speed], dy * SPEEDS[self.speed]


@cache
def combinations(held_out: bool | None = None) -> tuple[Spec, ...]:
    """The 480 captioned combinations: all (None), the training ones (False) or the held-out ones (True)."""
    every = tuple(Spec(*facts) for facts in product(COLOURS, SHAPES, DIRECTIONS, SPEEDS, BACKGROUNDS))
    if held_out is None:
        return every
    ranked = sorted(every, key=lambda spec: hashlib.sha256(spec.caption.encode()).digest())
    hidden = {spec.caption for spec in ranked[: round(HELD_OUT_SHARE * len(ranked))]}
    return tuple(spec for spec in every if (spec.caption in hidden) == held_out)


@cache
def _held_out_captions() -> frozenset[str]:
    return frozenset(spec.caption for spec in combinations(held_out=True))


def held_out(spec: Spec) -> bool:
    """Whether no training clip shows this combination of colour, shape, direction, speed and background."""
    return spec.caption in _held_out_captions()


def sample(count: int, generator: torch.Generator, *, hidden: bool = False) -> list[Spec]:
    """Draw specs from the training combinations, or (`hidden`) from the held-out ones.

    Across its direction of motion the object stays inside the picture. Along that direction it starts anywhere.
    """
    pool = combinations(held_out=hidden)
    picks = torch.randint(len(pool), (count,), generator=generator).tolist()
    low, high = RADII
    radii = (low + (high - low) * torch.rand(count, generator=generator)).tolist()
    places = torch.rand(count, 2, generator=generator).tolist()
    specs = []
    for pick, radius, (u, v) in zip(picks, radii, places, strict=True):
        facts = pool[pick]
        margin = radius + 0.5
        inside = [margin + (SIZE - 2 * margin) * place for place in (u, v)]
        x, y = (SIZE * u, inside[1]) if DIRECTIONS[facts.direction][0] else (inside[0], SIZE * v)
        specs.append(Spec(facts.colour, facts.shape, facts.direction, facts.speed, facts.background, radius, (x, y)))
    return specs


def _distance(dx: Tensor, dy: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """Signed distance, negative inside, to a circle, square or triangle; `shape` indexes SHAPES."""
    circle = torch.sqrt(dx * dx + dy * dy + 1e-9) - radius
    square = torch.maximum(dx.abs(), dy.abs()) - 0.88 * radius
    triangle = torch.maximum(dy - 0.75 * radius, 0.866 * dx.abs() - 0.5 * dy - 0.55 * radius)
    return torch.where(shape == 0, circle, torch.where(shape == 1, square, triangle))


def coverage(x: Tensor, y: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """Share of every pixel that an object covers; arguments broadcast as [..., 1, 1] -> [..., 32, 32]."""
    pixels = torch.arange(SIZE) + 0.5
    dx = (pixels[None, :] - x + SIZE / 2) % SIZE - SIZE / 2
    dy = (pixels[:, None] - y + SIZE / 2) % SIZE - SIZE / 2
    return (0.5 - _distance(dx, dy, radius, shape)).clamp(0, 1)


def render(specs: list[Spec], frames: int) -> tuple[Tensor, Tensor]:
    """Draw clips: video [N, 3, T, 32, 32] in [-1, 1] and object coverage [N, 1, T, 32, 32] in [0, 1]."""
    shapes = torch.tensor([SHAPES.index(s.shape) for s in specs])[:, None, None, None]
    radii = torch.tensor([s.radius for s in specs])[:, None, None, None]
    start = torch.tensor([s.centre for s in specs])[:, :, None]  # [N, 2, 1]
    velocity = torch.tensor([s.velocity for s in specs])[:, :, None]
    path = (start + velocity * torch.arange(frames))[..., None, None]  # [N, 2, T, 1, 1]
    cover = coverage(path[:, 0], path[:, 1], radii, shapes)[:, None]
    ground = palette(BACKGROUNDS)[[list(BACKGROUNDS).index(s.background) for s in specs]]
    colour = palette(COLOURS)[[list(COLOURS).index(s.colour) for s in specs]]
    ground, colour = ground[..., None, None, None], colour[..., None, None, None]
    return ground + (colour - ground) * cover, cover
