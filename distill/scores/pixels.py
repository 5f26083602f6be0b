"""What is measured on the pixels of a clip: masks, components, centres and backgrounds, all on the torus."""

import math

import numpy as np
import torch
from torch import Tensor

from distill.data.sprites import BACKGROUNDS, SIZE, palette

BACKGROUND_RADIUS = 0.35  # colour distance within which a pixel is background, when voting
FOREGROUND_RADIUS = 0.55  # colour distance beyond which a pixel belongs to an object
MIN_BACKGROUND = 0.4  # share of the frame


def from_uint8(frames: list[np.ndarray] | np.ndarray) -> Tensor:
    """uint8 frames [T, 32, 32, 3] -> float video [3, T, 32, 32] in [-1, 1]."""
    stack = np.asarray(frames)
    if stack.ndim != 4 or stack.shape[-1] != 3 or stack.dtype != np.uint8:
        raise ValueError(f"frames: got {stack.dtype} {stack.shape}, expected uint8 [T, H, W, 3]")
    return torch.from_numpy(stack.copy()).permute(3, 0, 1, 2).float() / 127.5 - 1


def check_video(video: Tensor) -> Tensor:
    """A clip [3, T, 32, 32] as float in [-1, 1]; another shape raises ValueError."""
    if video.ndim != 4 or video.shape[0] != 3 or video.shape[2:] != (SIZE, SIZE):
        raise ValueError(f"video: got {tuple(video.shape)}, expected (3, T, {SIZE}, {SIZE})")
    return video.float().clamp(-1, 1)


def component_areas(labels: Tensor) -> Tensor:
    """Labels [T, 32, 32] -> pixels of every label [T, 1025], none for the background."""
    areas = torch.zeros(len(labels), SIZE * SIZE + 1, dtype=torch.long)
    areas.scatter_add_(1, labels.flatten(1), torch.ones_like(labels.flatten(1)))
    areas[:, 0] = 0
    return areas


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


def read_background(video: Tensor) -> tuple[Tensor, int]:
    """The background index of every frame [T], -1 where none covers enough, and the index that most pixels vote for."""
    colours = palette(BACKGROUNDS)
    distance, nearest = torch.cdist(video.permute(1, 2, 3, 0).reshape(-1, 3), colours).min(1)
    votes = torch.nn.functional.one_hot(nearest, len(colours)) * (distance < BACKGROUND_RADIUS)[:, None]
    votes = votes.view(video.shape[1], -1, len(colours)).sum(1)  # [T, backgrounds]
    covered, frame = votes.max(1)
    frame = torch.where(covered > MIN_BACKGROUND * SIZE * SIZE, frame, -1)
    return frame, int(votes.sum(0).argmax())
