"""Streams whose prompt is switched, and how well they follow (`python -m distill evaluate --switch`)."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.data.switches import FACTS, LATENT, Switch, draw_switch
from distill.scores.dimensions import mean_and_error
from distill.scores.pixels import from_uint8
from distill.scores.switches import followed
from engine.stream import Pipeline

BEGINS, FRAMES = 5, 49  # latent frame of the switch, and pixel frames of a clip
SETS = {**{name: (name,) for name in FACTS}, "all": tuple(FACTS)}


def switched_video(pipeline: Pipeline, switch: Switch, seed: int, frames: int = FRAMES) -> tuple[Tensor, Switch]:
    """Stream a clip and switch its prompt at the first chunk from `switch.begins` on, which is then its `begins`."""
    parts, shown = list[np.ndarray](), 0
    with pipeline.stream(switch.before.caption, seed=seed, frames=frames) as stream:
        while shown < switch.frame:
            parts.append(stream.next_chunk())
            shown += len(parts[-1])
        stream.set_prompt(switch.caption)
        begins = (shown - 1) // LATENT + 1
        while shown < frames:
            parts.append(stream.next_chunk())
            shown += len(parts[-1])
    return from_uint8(np.concatenate(parts)[:frames]), replace(switch, begins=begins)


def switch_scores(pipeline: Pipeline, prompts: int, seed: int, *, hidden: bool = True) -> dict[str, Any]:
    """Scores of `prompts` clips per set of facts: {set: {score: {"mean", "se", "n"}}}; clip i has noise `seed` + i."""
    result = {}
    for number, (name, changed) in enumerate(SETS.items()):
        draws = torch.Generator().manual_seed(1000 * seed + number)
        rows = []
        for i in range(prompts):
            switch = draw_switch(changed, draws, begins=BEGINS, hidden=hidden)
            rows.append(followed(*switched_video(pipeline, switch, seed + i)))
        result[name] = {score: mean_and_error(row[score] for row in rows) for score in rows[0]}
    return result
