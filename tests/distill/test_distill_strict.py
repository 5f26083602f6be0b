"""The strict scorer gives truth full marks, and every kind of damage costs exactly the facts it touches."""

import dataclasses

import pytest
import torch
from torch import Tensor

from distill.data.sprites import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, Spec, render, sample
from distill.scores.pixels import from_uint8
from distill.scores.strict import aggregate, evaluate

FRAMES = 33
NAMES = ("background", "one_object", "colour", "shape", "direction", "speed", "all_right")


def other(name: str, choices: object) -> str:
    """The next choice after `name`."""
    names = list(choices)
    return names[(names.index(name) + 1) % len(names)]


@pytest.fixture(scope="module")
def truth() -> tuple[list[Spec], Tensor]:
    specs = sample(24, torch.Generator().manual_seed(11))
    return specs, render(specs, FRAMES)[0]


def means(videos: Tensor, specs: list[Spec]) -> dict[str, float]:
    scores = aggregate([evaluate(video, spec) for video, spec in zip(videos, specs, strict=True)])
    return {name: value["mean"] for name, value in scores.items()}


def expect(scores: dict[str, float], lost: set[str], below: float = 0.05, kept: float = 0.98) -> None:
    """`lost` scores are gone, all others are kept."""
    for name in NAMES:
        if name in lost:
            assert scores[name] <= below, (name, scores)
        else:
            assert scores[name] >= kept, (name, scores)


def test_truth_is_right(truth: tuple[list[Spec], Tensor]) -> None:
    specs, video = truth
    expect(means(video, specs), set())


def test_truth_survives_mild_noise(truth: tuple[list[Spec], Tensor]) -> None:
    specs, video = truth
    noisy = video + 0.1 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    expect(means(noisy, specs), set())


@pytest.mark.parametrize(
    ("fact", "choices", "lost"),
    [
        ("colour", COLOURS, {"colour", "all_right"}),
        ("shape", SHAPES, {"shape", "all_right"}),
        ("direction", DIRECTIONS, {"direction", "speed", "all_right"}),
        ("speed", ("slowly", "quickly"), {"speed", "all_right"}),
        ("background", BACKGROUNDS, {"background", "all_right"}),
    ],
)
def test_one_wrong_fact(truth: tuple[list[Spec], Tensor], fact: str, choices: object, lost: set[str]) -> None:
    specs, _ = truth
    wrong = [dataclasses.replace(spec, **{fact: other(getattr(spec, fact), choices)}) for spec in specs]
    expect(means(render(wrong, FRAMES)[0], specs), lost)


def test_frozen(truth: tuple[list[Spec], Tensor]) -> None:
    specs, video = truth
    expect(means(video[:, :, :1].expand_as(video), specs), {"direction", "speed", "all_right"})


def test_flicker(truth: tuple[list[Spec], Tensor]) -> None:
    """The object is gone in every second frame: half of the frames lose it, and nothing moves steadily."""
    specs, video = truth
    grounds = torch.stack([video[i, :, 0].flatten(1).mode(1).values for i in range(len(specs))])
    video = video.clone()
    video[:, :, 1::2] = grounds[:, :, None, None, None]
    scores = means(video, specs)
    assert scores["background"] == 1
    assert all(0.5 <= scores[name] <= 0.53 for name in ("one_object", "colour", "shape")), scores
    assert scores["direction"] == scores["speed"] == scores["all_right"] == 0


def test_jump(truth: tuple[list[Spec], Tensor]) -> None:
    """A jump across the direction of motion in one frame costs the motion and nothing else."""
    specs, video = truth
    video = video.clone()
    video[:, :, 16:] = video[:, :, 16:].roll((8, 8), (-1, -2))
    expect(means(video, specs), {"direction", "speed", "all_right"})


def test_shuffled_captions(truth: tuple[list[Spec], Tensor]) -> None:
    specs, video = truth
    scores = means(video, specs[1:] + specs[:1])
    assert scores["one_object"] == 1
    assert scores["all_right"] == 0
    assert all(scores[name] < 0.6 for name in ("background", "colour", "shape", "direction")), scores


def test_confetti(truth: tuple[list[Spec], Tensor]) -> None:
    """Every pixel in a random colour of the palettes: nothing is right."""
    specs, video = truth
    colours = torch.tensor(list(COLOURS.values()) + list(BACKGROUNDS.values())) / 127.5 - 1
    picks = torch.randint(len(colours), video[:, 0].shape, generator=torch.Generator().manual_seed(0))
    scores = means(colours[picks].movedim(-1, 1), specs)
    assert all(scores[name] <= 0.1 for name in NAMES), scores


def test_two_objects(truth: tuple[list[Spec], Tensor]) -> None:
    """A second, smaller object keeps colour, shape and motion of the first, but not the count."""
    specs, video = truth
    video = video.clone()
    for clip, spec in zip(video, specs, strict=True):
        extra = dataclasses.replace(spec, radius=3.0, centre=((spec.centre[0] + 16) % 32, (spec.centre[1] + 16) % 32))
        drawn, cover = render([extra], FRAMES)
        clip.copy_(torch.where(cover[0] > 0, drawn[0], clip))
    expect(means(video, specs), {"one_object", "all_right"})


def test_late_failure(truth: tuple[list[Spec], Tensor]) -> None:
    """A clip that loses its object in the last third is not right."""
    specs, video = truth
    video = video.clone()
    video[:, :, 22:] = video[:, :, :1, :1, :1]
    assert means(video, specs)["all_right"] == 0


def test_uint8_round_trip(truth: tuple[list[Spec], Tensor]) -> None:
    specs, video = truth
    frames = ((video[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    assert (from_uint8(frames) - video[0]).abs().max() < 0.01
    assert evaluate(from_uint8(list(frames)), specs[0]).all_right == 1


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="expected"):
        evaluate(torch.zeros(3, 5, 16, 16), Spec("red", "circle", "up", "slowly", "gray"))
    with pytest.raises(ValueError, match="expected uint8"):
        from_uint8(torch.zeros(2, 32, 32, 3).numpy())
