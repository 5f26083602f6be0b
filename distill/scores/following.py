"""Whether a video follows the motion of its input and has the look of its prompt, by exact rules."""

import math

import torch
from torch import Tensor

from distill.data.scenes import Scene, path
from distill.data.sprites import BACKGROUNDS, COLOURS, SHAPES
from distill.scores.dimensions import MAX_MISS, SEMANTIC, hardly_seen, match, motion, share_of
from distill.scores.tracks import read


def follows(video: Tensor, source: Scene, wanted: Scene) -> dict[str, float]:
    """Scores of one clip, float [3, T, 32, 32] in [-1, 1], made from a drawing of `source` under `wanted`'s caption.

    direction   1 if the mover first goes where the input's mover goes; NaN if the motion cannot be read
    place       share of the frames in which its centre is within 3 pixels of the input's
    colour      1 if it has the prompt's colour
    shape       share of the frames in which it has the prompt's shape
    background  share of the frames with the prompt's background
    """
    reading = read(video)
    mover = match(reading, wanted)[0]
    ground = float((reading.grounds == list(BACKGROUNDS).index(wanted.background)).float().mean())
    if mover is None:
        return {"direction": 0.0, "place": 0.0, "colour": 0.0, "shape": 0.0, "background": ground}
    away = (mover.centre - path(source, video.shape[1])).norm(dim=1)
    every = torch.ones_like(mover.found)
    shape = share_of(mover.shape == SHAPES.index(wanted.mover.shape), mover.clear)
    return {
        "direction": math.nan if hardly_seen(mover) else float(motion(mover)[0] == source.direction),
        "place": share_of(mover.found & (away <= MAX_MISS), every),
        "colour": float(mover.colour == list(COLOURS).index(wanted.mover.colour)),
        "shape": 0.0 if math.isnan(shape) else shape,
        "background": ground,
    }


def has_followed(scores: dict[str, float]) -> dict[str, float]:
    """Whether the motion is the input's, and the look the prompt's: 0 or 1 each."""
    looks = scores["colour"] == 1 and scores["shape"] >= SEMANTIC["object_class"]
    return {
        "motion_followed": float(scores["direction"] != 0 and scores["place"] >= 0.9),
        "look_followed": float(looks and scores["background"] >= SEMANTIC["scene"]),
    }
