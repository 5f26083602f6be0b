"""The first half of `dimensions`: background, objects and every object's path, read from the pixels alone.

The cores of foreground regions give the colours of objects. Every foreground pixel then goes to the object whose
mixture with the background explains it best, so that blurred edges do not become objects of another colour. All
geometry is on the torus. That includes scenes with walls, as nothing crosses them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.data.sprites import BACKGROUNDS, COLOURS, SHAPES, SIZE, coverage, palette
from distill.scores.pixels import (
    FOREGROUND_RADIUS,
    check_video,
    circular_mean,
    component_areas,
    dilate,
    label_components,
    read_background,
)

CORE_RADIUS = 0.5  # colour distance within which a core pixel names an object's colour
CORE_PIXELS = 6  # core pixels of a colour that a frame needs to show it
CORE_SHARE = 0.2  # share of the frames that must show a colour to make it an object
MIN_AREA = 16  # pixels of an object
WHOLE_AREA = 0.5  # least share of its median area that a whole object has
WHOLE_IOU = 0.9  # least IoU with a drawing at which a touched object counts as whole
MIN_EXTRA = 10  # pixels of a component that belongs to no object
TRIANGLE = SHAPES.index("triangle")


@dataclass(frozen=True)
class Track:
    """One object through T frames. Measures are meaningful where `found`, shapes where `clear`."""

    colour: int  # index into COLOURS
    found: Tensor  # [T] bool: enough of it is visible
    touched: Tensor  # [T] bool: another object touches it or covers a part
    clear: Tensor  # [T] bool: found whole
    centre: Tensor  # [T, 2] x, y of its centroid
    radius: Tensor  # [T] of the best drawing
    area: Tensor  # [T] pixels, soft
    tone: Tensor  # [T, 3] median colour
    shape: Tensor  # [T] index into SHAPES
    iou: Tensor  # [T] soft IoU with that drawing


@dataclass(frozen=True)
class Reading:
    """A clip: background per frame, objects by falling size, and the frames that show anything else."""

    grounds: Tensor  # [T] index into BACKGROUNDS, -1 where none covers enough
    ground_tone: Tensor  # [T, 3] median colour of the background's pixels
    ground_spread: Tensor  # [T] mean distance of these pixels from it
    ground_change: Tensor  # [T - 1] mean distance of the pixels that are background in two successive frames
    tracks: list[Track]
    extra: Tensor  # [T] bool


def _unit() -> tuple[Tensor, float]:
    """Areas of the shapes at radius 1 [shapes], and the distance of a triangle's centroid below its centre."""
    middle, radius = torch.tensor(SIZE / 2), 8.0
    shapes = torch.arange(len(SHAPES)).view(-1, 1, 1)
    drawn = coverage(middle, middle, torch.tensor(radius), shapes)
    rows = torch.arange(SIZE) + 0.5
    centroid = (drawn[TRIANGLE].sum(1) * rows).sum() / drawn[TRIANGLE].sum()
    return drawn.sum((1, 2)) / radius**2, float(centroid - middle) / radius


UNIT_AREA, TRIANGLE_DROP = _unit()


def _fit(cover: Tensor, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best drawing for coverage [T, 32, 32] around centroid [T, 2]: shape, IoU and radius, each [T]."""
    radius = (cover.sum((1, 2))[:, None] / UNIT_AREA).sqrt().clamp(2, 12)  # [T, shapes]
    drop = torch.zeros(len(SHAPES))
    drop[TRIANGLE] = TRIANGLE_DROP
    x = centre[:, :1].expand_as(radius)[..., None, None]
    y = (centre[:, 1:] - drop * radius)[..., None, None]
    shapes = torch.arange(len(SHAPES)).view(1, -1, 1, 1)
    drawn = coverage(x, y, radius[..., None, None], shapes)
    both, either = torch.minimum(drawn, cover[:, None]), torch.maximum(drawn, cover[:, None])
    iou, shape = (both.sum((2, 3)) / either.sum((2, 3)).clamp(min=1e-6)).max(1)
    return shape, iou, radius.gather(1, shape[:, None])[:, 0]


def _object_colours(video: Tensor, foreground: Tensor) -> list[int]:
    """Colours that enough frames show in the cores of their foreground, most frequent first."""
    core = foreground & ~dilate(~foreground)
    distance, nearest = torch.cdist(video.permute(1, 2, 3, 0), palette(COLOURS)).min(-1)  # [T, 32, 32]
    named = core & (distance < CORE_RADIUS)
    counts = torch.stack([(named & (nearest == index)).sum((1, 2)) for index in range(len(COLOURS))], 1)
    frequent = (counts >= CORE_PIXELS).float().mean(0) >= CORE_SHARE
    order = counts.sum(0).argsort(descending=True).tolist()
    return [index for index in order if frequent[index]]


def _largest(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The largest component of every frame of a mask [T, 32, 32], and its pixels [T]."""
    labels = label_components(mask)
    area, which = component_areas(labels).max(1)
    return (labels == which.view(-1, 1, 1)) & mask, area


def read(video: Tensor) -> Reading:
    """Read a clip, float [3, T, 32, 32] in [-1, 1]."""
    video = check_video(video)
    grounds, background = read_background(video)
    ground = palette(BACKGROUNDS)[background].view(3, 1, 1, 1)
    foreground = (video - ground).square().sum(0).sqrt() > FOREGROUND_RADIUS  # [T, 32, 32]
    colours = _object_colours(video, foreground)
    tones = palette(COLOURS)[colours].view(-1, 3, 1, 1, 1) - ground  # [objects, 3, 1, 1, 1]
    share = ((video - ground) * tones).sum(1) / tones.square().sum(1)  # [objects, T, 32, 32]
    share = share.clamp(0, 1)
    rest = (video - ground - share[:, None] * tones).square().sum(1)
    owner = rest.argmin(0) if colours else torch.zeros_like(foreground, dtype=torch.long)

    bodies, areas = [], []
    for index in range(len(colours)):
        body, area = _largest(foreground & (owner == index))
        bodies.append(body & (area >= MIN_AREA).view(-1, 1, 1))
        areas.append(area)
    known = torch.stack(bodies).any(0) if bodies else torch.zeros_like(foreground)
    left = foreground & ~dilate(known)
    _, other = _largest(left)

    outside = ~dilate(dilate(dilate(foreground)))
    tone = torch.where(outside, video, torch.nan).flatten(2).nanmedian(-1).values.T  # [T, 3]
    away = (video - tone.T[..., None, None]).square().sum(0).sqrt()
    still = outside[1:] & outside[:-1]
    change = (video[:, 1:] - video[:, :-1]).square().sum(0).sqrt()
    return Reading(
        grounds=grounds,
        ground_tone=tone.nan_to_num(),
        ground_spread=(away.nan_to_num() * outside).sum((1, 2)) / outside.sum((1, 2)).clamp(min=1),
        ground_change=(change * still).sum((1, 2)) / still.sum((1, 2)).clamp(min=1),
        tracks=[_track(video, i, colours[i], bodies, share[i]) for i in range(len(colours))],
        extra=other >= MIN_EXTRA,
    )


def _track(video: Tensor, index: int, colour: int, bodies: list[Tensor], share: Tensor) -> Track:
    """Measure object `index`: its pixels are bodies[index] [T, 32, 32], its soft coverage is `share` [T, 32, 32]."""
    body = bodies[index]
    others = [other for i, other in enumerate(bodies) if i != index]
    rest = torch.stack(others).any(0) if others else torch.zeros_like(body)
    touched = (dilate(dilate(body)) & rest).any(2).any(1)
    core = body & ~dilate(~body)
    core = torch.where((core.sum((1, 2)) > 4).view(-1, 1, 1), core, body)
    tone = torch.where(core, video, torch.nan).flatten(2).nanmedian(-1).values.T.nan_to_num()
    cover = share * (dilate(body) & ~rest)
    centre = circular_mean(cover)
    shape, iou, radius = _fit(cover, centre)
    found, area = body.any(2).any(1), cover.sum((1, 2))
    apart = found & ~touched
    usual = area[apart if bool(apart.any()) else found].median()
    clear = found & (area > WHOLE_AREA * usual) & (~touched | (iou > WHOLE_IOU))
    return Track(
        colour=colour,
        found=found,
        touched=touched,
        clear=clear,
        centre=centre,
        radius=radius,
        area=area,
        tone=tone,
        shape=shape,
        iou=iou,
    )
