"""The strict evaluator: what a clip shows, read from its pixels and compared with its spec.

Per frame: the background by majority, the largest torus-connected foreground component, its colour by median, its
shape by the best soft IoU against drawn templates (at least `IOU_FLOOR`), its centre by a circular mean. Over the
clip: direction and speed from the trajectory through all frames; one lost frame or one jump loses both.
"""

import math
from dataclasses import asdict, dataclass, fields
from functools import cache

import numpy as np
import torch
from torch import Tensor

from distill.data.sprites import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SIZE, SPEEDS, Spec, coverage, palette

IOU_FLOOR = 0.6
BACKGROUND_RADIUS = 0.35  # colour distance within which a pixel is background, when voting
FOREGROUND_RADIUS = 0.55  # colour distance beyond which a pixel belongs to an object
COLOUR_RADIUS = 0.6
MIN_BACKGROUND = 0.4  # share of the frame
MIN_AREA, MAX_AREA = 30, 400  # pixels of an object
MIN_SECOND = 12  # pixels of a component that counts as another object
MAX_FRAGMENTS = 0.15  # area of all other components against the object's
MAX_STEP = 3.0  # pixels between two frames
MIN_DRIFT = 0.2  # pixels per frame along the main axis
SPEED_TOLERANCE = 0.25


@dataclass(frozen=True)
class Scores:
    """One clip, each in [0, 1]: shares of frames, except for direction, speed and all_right (0 or 1)."""

    background: float
    one_object: float
    colour: float
    shape: float
    direction: float
    speed: float
    all_right: float


@dataclass(frozen=True)
class _Objects:
    """The largest object of every frame of a clip; `found` [T] says where there is one."""

    found: Tensor  # [T] bool
    single: Tensor  # [T] bool
    colour: Tensor  # [T] index into COLOURS, -1 where it is near none
    shape: Tensor  # [T] index into SHAPES, -1 below the IoU floor
    centre: Tensor  # [T, 2] x, y


def from_uint8(frames: list[np.ndarray] | np.ndarray) -> Tensor:
    """uint8 frames [T, 32, 32, 3] -> float video [3, T, 32, 32] in [-1, 1]."""
    stack = np.asarray(frames)
    if stack.ndim != 4 or stack.shape[-1] != 3 or stack.dtype != np.uint8:
        raise ValueError(f"frames: got {stack.dtype} {stack.shape}, expected uint8 [T, H, W, 3]")
    return torch.from_numpy(stack.copy()).permute(3, 0, 1, 2).float() / 127.5 - 1


def _neighbours(mask: Tensor) -> list[Tensor]:
    return [mask.roll(step, axis) for axis in (-1, -2) for step in (1, -1)]


def dilate(mask: Tensor) -> Tensor:
    """A mask and its 4-neighbours on the torus."""
    return torch.stack([mask, *_neighbours(mask)]).any(0)


def label_components(mask: Tensor) -> Tensor:
    """Foreground [T, 32, 32] -> labels [T, 32, 32]: 4-neighbour components on the torus, 0 for background."""
    labels = torch.arange(1, SIZE * SIZE + 1).view(1, SIZE, SIZE) * mask
    while True:
        grown = torch.stack([labels, *_neighbours(labels)]).amax(0) * mask
        if torch.equal(grown, labels):
            return labels
        labels = grown


def circular_mean(weight: Tensor) -> Tensor:
    """Centre [T, 2] (x, y) on the torus of non-negative weights [T, 32, 32]."""
    angle = (torch.arange(SIZE) + 0.5) * 2 * math.pi / SIZE
    axes = torch.stack([weight.sum(1), weight.sum(2)], 1)  # [T, 2, 32]
    return torch.atan2((axes * angle.sin()).sum(-1), (axes * angle.cos()).sum(-1)) * SIZE / (2 * math.pi) % SIZE


@cache
def _templates() -> Tensor:
    """Drawn objects with their centroid at (16, 16): [shapes, radii, 32, 32]."""
    radii = torch.arange(5.5, 9.51, 0.5).view(1, -1, 1, 1)
    shapes = torch.arange(len(SHAPES)).view(-1, 1, 1, 1)
    middle = torch.tensor(SIZE / 2)
    triangle = coverage(middle, middle, torch.tensor(8.0), torch.tensor(SHAPES.index("triangle")))
    rows = torch.arange(SIZE) + 0.5
    lift = ((triangle.sum(1) * rows).sum() / triangle.sum() - middle) / 8.0  # centroid below the centre, per radius
    offset = torch.where(shapes == SHAPES.index("triangle"), lift * radii, 0.0)
    return torch.stack([middle - offset, radii.expand_as(offset), shapes.expand_as(offset).float()])


def _shape_ious(cover: Tensor, centre: Tensor) -> Tensor:
    """Best soft IoU over radii of an object's coverage [T, 32, 32] with every shape at its centre -> [T, shapes]."""
    y, radius, shape = _templates()  # each [shapes, radii, 1, 1]
    x = centre[:, 0].view(-1, 1, 1, 1, 1)
    drawn = coverage(x, y + (centre[:, 1] - SIZE / 2).view(-1, 1, 1, 1, 1), radius, shape)
    cover = cover[:, None, None]
    return (torch.minimum(drawn, cover).sum((-1, -2)) / torch.maximum(drawn, cover).sum((-1, -2))).amax(-1)


def read_background(video: Tensor) -> tuple[Tensor, int]:
    """Per frame the background index (-1 where none covers enough) [T], and the clip's majority."""
    colours = palette(BACKGROUNDS)
    distance, nearest = torch.cdist(video.permute(1, 2, 3, 0).reshape(-1, 3), colours).min(1)
    votes = torch.nn.functional.one_hot(nearest, len(colours)) * (distance < BACKGROUND_RADIUS)[:, None]
    votes = votes.view(video.shape[1], -1, len(colours)).sum(1)  # [T, backgrounds]
    covered, frame = votes.max(1)
    frame = torch.where(covered > MIN_BACKGROUND * SIZE * SIZE, frame, -1)
    return frame, int(votes.sum(0).argmax())


def _objects(video: Tensor, background: int) -> _Objects:
    """Find and measure the largest object in every frame of a video [3, T, 32, 32]."""
    ground = palette(BACKGROUNDS)[background].view(3, 1, 1, 1)
    labels = label_components((video - ground).square().sum(0).sqrt() > FOREGROUND_RADIUS)
    frames = labels.shape[0]
    areas = torch.zeros(frames, SIZE * SIZE + 1, dtype=torch.long)
    areas.scatter_add_(1, labels.flatten(1), torch.ones_like(labels.flatten(1)))
    areas[:, 0] = 0
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
    """Direction of a steady motion through all frames (None if there is none) and its pixels per frame."""
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
    """Score one clip, float [3, T, 32, 32] in [-1, 1], against what its caption says."""
    if video.ndim != 4 or video.shape[0] != 3 or video.shape[2:] != (SIZE, SIZE):
        raise ValueError(f"video: got {tuple(video.shape)}, expected (3, T, {SIZE}, {SIZE})")
    video = video.float().clamp(-1, 1)
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
