"""The strict scorer of one object on a torus (`sprites`): does a clip show every fact of its caption?

Per frame it reads the background by majority, and the largest torus-connected foreground component. Of that it reads
the colour by median, the shape by the best soft IoU with drawn templates (at least `IOU_FLOOR`), and the centre by a
circular mean. Over the clip it reads direction and speed from the path through all frames. One lost frame or one jump
loses both.
"""

import math
from dataclasses import asdict, dataclass, fields
from functools import cache

import torch
from torch import Tensor

from distill.data.sprites import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SIZE, SPEEDS, Spec, coverage, palette
from distill.scores.pixels import (
    FOREGROUND_RADIUS,
    check_video,
    circular_mean,
    component_areas,
    dilate,
    label_components,
    read_background,
)

IOU_FLOOR = 0.6
COLOUR_RADIUS = 0.6
MIN_AREA, MAX_AREA = 30, 400  # pixels of an object
MIN_SECOND = 12  # pixels of a component that counts as another object
MAX_FRAGMENTS = 0.15  # area of all other components against the object's
MAX_STEP = 3.0  # pixels between two frames
MIN_DRIFT = 0.2  # pixels per frame along the main axis
SPEED_TOLERANCE = 0.25


@dataclass(frozen=True)
class Scores:
    """Scores of one clip in [0, 1]: shares of frames, but direction, speed and all_right are 0 or 1."""

    background: float
    one_object: float
    colour: float
    shape: float
    direction: float
    speed: float
    all_right: float


@dataclass(frozen=True)
class _Objects:
    """The largest object of every frame of a clip; the rest is meaningful where `found`."""

    found: Tensor  # [T] bool
    single: Tensor  # [T] bool
    colour: Tensor  # [T] index into COLOURS, -1 where it is near none
    shape: Tensor  # [T] index into SHAPES, -1 below the IoU floor
    centre: Tensor  # [T, 2] x, y


@cache
def _templates() -> Tensor:
    """Centre y, radius and shape of drawings whose centroid lies at (16, 16): each [shapes, radii, 1, 1]."""
    radii = torch.arange(5.5, 9.51, 0.5).view(1, -1, 1, 1)
    shapes = torch.arange(len(SHAPES)).view(-1, 1, 1, 1)
    middle = torch.tensor(SIZE / 2)
    triangle = coverage(middle, middle, torch.tensor(8.0), torch.tensor(SHAPES.index("triangle")))
    rows = torch.arange(SIZE) + 0.5
    lift = ((triangle.sum(1) * rows).sum() / triangle.sum() - middle) / 8.0  # centroid below the centre, per radius
    offset = torch.where(shapes == SHAPES.index("triangle"), lift * radii, 0.0)
    return torch.stack([middle - offset, radii.expand_as(offset), shapes.expand_as(offset).float()])


def _shape_ious(cover: Tensor, centre: Tensor) -> Tensor:
    """Best soft IoU, over radii, of an object's coverage [T, 32, 32] with every shape at its centre: [T, shapes]."""
    y, radius, shape = _templates()  # each [shapes, radii, 1, 1]
    x = centre[:, 0].view(-1, 1, 1, 1, 1)
    drawn = coverage(x, y + (centre[:, 1] - SIZE / 2).view(-1, 1, 1, 1, 1), radius, shape)
    cover = cover[:, None, None]
    return (torch.minimum(drawn, cover).sum((-1, -2)) / torch.maximum(drawn, cover).sum((-1, -2))).amax(-1)


def _objects(video: Tensor, background: int) -> _Objects:
    """Find and measure the largest object of every frame of a video [3, T, 32, 32]."""
    ground = palette(BACKGROUNDS)[background].view(3, 1, 1, 1)
    labels = label_components((video - ground).square().sum(0).sqrt() > FOREGROUND_RADIUS)
    frames = labels.shape[0]
    areas = component_areas(labels)
    area, largest = areas.max(1)
    found = (area >= MIN_AREA) & (area <= MAX_AREA)
    others = areas.sum(1) - area
    single = found & ((areas >= MIN_SECOND).sum(1) == 1) & (others < MAX_FRAGMENTS * area)

    body = (labels == largest.view(-1, 1, 1)) & found.view(-1, 1, 1)
    core = ~dilate(~body)
    core = torch.where((core.sum((1, 2)) > 8).view(-1, 1, 1), core, body)
    pixels = torch.where(core, video, torch.nan).flatten(2)
    median = pixels.nanmedian(-1).values.T.nan_to_num()  # [T, 3]
    distance, colour = torch.cdist(median, palette(COLOURS)).min(1)
    tone = palette(COLOURS)[colour].T.view(3, frames, 1, 1) - ground
    cover = ((video - ground) * tone).sum(0) / tone.square().sum(0)
    cover = cover.clamp(0, 1) * dilate(body)
    centre = circular_mean(cover)
    iou, shape = _shape_ious(cover, centre).nan_to_num().max(1)
    return _Objects(
        found=found,
        single=single,
        colour=torch.where(found & (distance < COLOUR_RADIUS), colour, -1),
        shape=torch.where(found & (iou >= IOU_FLOOR), shape, -1),
        centre=centre,
    )


def _motion(objects: _Objects) -> tuple[str | None, float]:
    """Direction of a steady motion through all frames (None without one), and its pixels per frame."""
    if not bool(objects.found.all()) or len(objects.centre) < 2:
        return None, 0.0
    steps = (objects.centre[1:] - objects.centre[:-1] + SIZE / 2) % SIZE - SIZE / 2
    drift = steps.mean(0)
    axes = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)
    best = int((axes @ drift).argmax())
    along = float(drift @ axes[best])
    across = float((drift - along * axes[best]).abs().sum())
    steady = bool(steps.norm(dim=1).max() < MAX_STEP) and along > MIN_DRIFT and across < 0.5 * along
    return (list(DIRECTIONS)[best] if steady else None), along


def evaluate(video: Tensor, spec: Spec) -> Scores:
    """Score one clip, float [3, T, 32, 32] in [-1, 1], against its caption."""
    video = check_video(video)
    grounds, background = read_background(video)
    objects = _objects(video, background)
    direction, pace = _motion(objects)
    right_way = direction == spec.direction
    shares = {
        "background": (grounds == list(BACKGROUNDS).index(spec.background)).float().mean().item(),
        "one_object": objects.single.float().mean().item(),
        "colour": (objects.colour == list(COLOURS).index(spec.colour)).float().mean().item(),
        "shape": (objects.shape == SHAPES.index(spec.shape)).float().mean().item(),
    }
    speed = right_way and abs(pace - SPEEDS[spec.speed]) < SPEED_TOLERANCE
    still = len(grounds) == 1  # a single frame has no motion to judge
    right = all(shares[k] >= 0.8 for k in ("one_object", "colour")) and shares["shape"] >= 0.6
    right = right and shares["background"] >= 0.95 and (still or speed)
    return Scores(**shares, direction=float(right_way), speed=float(speed), all_right=float(right))


def aggregate(scores: list[Scores]) -> dict[str, dict[str, float]]:
    """Mean and standard error of every score over clips: {"shape": {"mean": .., "se": ..}, ..}."""
    if not scores:
        raise ValueError("scores: got an empty list, expected at least one clip")
    rows = torch.tensor([list(asdict(s).values()) for s in scores], dtype=torch.float64)
    error = rows.std(0, correction=1) / math.sqrt(len(scores)) if len(scores) > 1 else torch.zeros(rows.shape[1])
    return {
        field.name: {"mean": round(float(rows[:, i].mean()), 4), "se": round(float(error[i]), 4)}
        for i, field in enumerate(fields(Scores))
    }
