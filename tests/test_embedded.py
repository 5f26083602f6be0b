"""The model that ships: small enough, whole, and it draws what a prompt that it never saw says."""

import numpy as np
import pytest
import torch

import engine
from distill.evaluator import aggregate, evaluate, from_uint8
from distill.sprites import sample
from engine.loader import EMBEDDED
from engine.stream import Pipeline


@pytest.fixture(scope="module")
def sprites() -> Pipeline:
    return engine.load()


def clips(pipeline: Pipeline, count: int, frames: int) -> tuple[list, list]:
    specs = sample(count, torch.Generator().manual_seed(31), hidden=True)
    videos = []
    for seed, spec in enumerate(specs):
        with pipeline.stream(spec.caption, seed=seed, frames=frames) as stream:
            videos.append(from_uint8(np.stack(list(stream))))
    return specs, videos


def test_size_in_git() -> None:
    assert sum(file.stat().st_size for file in EMBEDDED.rglob("*") if file.is_file()) <= 16e6


def test_it_is_the_greedy_student(sprites: Pipeline) -> None:
    assert sprites.preset.family == "greedy"
    assert [len(steps) for steps in sprites.preset.steps] == [4]
    assert (EMBEDDED / "adapters" / "etm").is_dir()


def test_held_out_prompts_are_drawn(sprites: Pipeline) -> None:
    """Bars below what was measured on many prompts, so that twelve of them decide."""
    specs, videos = clips(sprites, 12, 33)
    scores = {
        name: value["mean"]
        for name, value in aggregate([evaluate(*p) for p in zip(videos, specs, strict=True)]).items()
    }
    bars = {"background": 0.95, "colour": 0.9, "one_object": 0.85, "shape": 0.75, "direction": 0.75}
    assert {name: scores[name] for name, bar in bars.items() if scores[name] < bar} == {}


def test_prompts_do_not_draw_each_other(sprites: Pipeline) -> None:
    """The same clips against the next prompt's facts: the evaluator does not praise anything."""
    specs, videos = clips(sprites, 6, 17)
    pairs = [(video, spec) for video, spec in zip(videos, specs[1:] + specs[:1], strict=True)]
    assert aggregate([evaluate(*pair) for pair in pairs])["all_right"]["mean"] <= 0.2


def test_a_long_stream_keeps_its_object(sprites: Pipeline) -> None:
    """161 frames are five times what was trained."""
    specs, videos = clips(sprites, 2, 161)
    scores = aggregate([evaluate(video[:, -33:], spec) for video, spec in zip(videos, specs, strict=True)])
    assert scores["background"]["mean"] >= 0.95
    assert scores["one_object"]["mean"] >= 0.5
