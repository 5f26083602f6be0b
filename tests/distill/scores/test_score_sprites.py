"""One object on a torus: drawn clips are all right, and every kind of damage costs exactly the facts it touches."""

import dataclasses

import pytest
import torch
from damages import FRAMES, NAMES, following, frozen, jumping, means, without_objects
from torch import Tensor

from distill.data.sprites import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, Spec, render, sample
from distill.scores.dimensions import SEMANTIC, dimensions
from distill.scores.pixels import from_uint8
from distill.scores.tasks import as_scene, find_task

FACTS = (*sorted({*SEMANTIC} - {"spatial_relationship"}), "all_right")


@pytest.fixture(scope="module")
def truth() -> tuple[list[Spec], Tensor]:
    specs = sample(24, torch.Generator().manual_seed(11))
    return specs, render(specs, FRAMES)[0]


def facts(video: Tensor, specs: list[Spec]) -> dict[str, float]:
    got = means("sprites", video, specs)
    return {name: got[name] for name in FACTS}


def expect(scores: dict[str, float], lost: set[str], below: float = 0.05, kept: float = 0.98) -> None:
    """`lost` scores are gone, all others are kept."""
    for name, score in scores.items():
        if name in lost:
            assert score <= below, (name, scores)
        else:
            assert score >= kept, (name, scores)


def test_truth_is_right(truth: tuple[list[Spec], Tensor]) -> None:
    specs, video = truth
    got = means("sprites", video, specs)
    assert {got[name] for name in FACTS} == {1.0}
    assert got["blink"] == 0


def test_truth_survives_mild_noise(truth: tuple[list[Spec], Tensor]) -> None:
    specs, video = truth
    expect(facts(video + 0.1 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0)), specs), set())


@pytest.mark.slow
def test_long_truth() -> None:
    """It leaves on one side and comes back on the other, and is always seen."""
    specs = find_task("sprites").draw(24, 5)
    video = render(specs, 65)[0]
    got = means("sprites", video, specs)
    assert min(got[name] for name in (*FACTS, *NAMES) if name in got) >= 0.98, got
    hidden = means("sprites", without_objects(video, specs, slice(20, 24)), specs)
    assert hidden["multiple_objects"] <= 0.95  # no drawn clip blinks here: it is a fault, and is counted too
    assert hidden["blink"] == 1


@pytest.mark.parametrize(
    ("fact", "choices", "lost"),
    [
        ("colour", COLOURS, {"color", "all_right"}),
        ("shape", SHAPES, {"object_class", "all_right"}),
        ("direction", DIRECTIONS, {"direction", "all_right"}),
        ("speed", ("slowly", "quickly"), {"speed", "all_right"}),
        ("background", BACKGROUNDS, {"scene", "all_right"}),
    ],
)
def test_one_wrong_fact(truth: tuple[list[Spec], Tensor], fact: str, choices: object, lost: set[str]) -> None:
    specs, _ = truth
    wrong = [dataclasses.replace(spec, **{fact: following(getattr(spec, fact), choices)}) for spec in specs]
    expect(facts(render(wrong, FRAMES)[0], specs), lost)


def test_frozen(truth: tuple[list[Spec], Tensor]) -> None:
    specs, video = truth
    expect(facts(frozen(video), specs), {"direction", "speed", "all_right"})


def test_flicker(truth: tuple[list[Spec], Tensor]) -> None:
    """The object is gone in every second frame: half of the frames lose it, and nothing moves steadily."""
    specs, video = truth
    scores = facts(without_objects(video, specs, slice(1, None, 2)), specs)
    assert scores["scene"] == 1
    assert all(0.5 <= scores[name] <= 0.53 for name in ("multiple_objects", "color", "object_class")), scores
    assert scores["direction"] == scores["speed"] == scores["all_right"] == 0


def test_jump(truth: tuple[list[Spec], Tensor]) -> None:
    """A jump across the direction of motion in one frame costs the motion and nothing else."""
    specs, video = truth
    expect(facts(jumping(video), specs), {"direction", "speed", "all_right"})


def test_only_walls_turn_a_mover_round(truth: tuple[list[Spec], Tensor]) -> None:
    """A mover that goes back half-way has no direction on a torus; in a scene, where walls do that, it has one."""
    specs, video = truth
    back = torch.cat([video[:, :, :17], video[:, :, :16].flip(2)], 2)
    expect(facts(back, specs), {"direction", "speed", "all_right"})
    inside = [spec for spec in specs if all(9.5 < place < 22.5 for place in spec.centre)]
    assert len(inside) >= 2
    for clip, spec in zip(back, specs, strict=True):
        if spec in inside:
            assert dimensions(clip, as_scene(spec))["direction"] == 1


def test_shuffled_captions(truth: tuple[list[Spec], Tensor]) -> None:
    specs, video = truth
    scores = facts(video, specs[1:] + specs[:1])
    assert scores["multiple_objects"] == 1
    assert scores["all_right"] == 0
    assert all(scores[name] < 0.6 for name in ("scene", "color", "object_class", "direction")), scores


def test_confetti(truth: tuple[list[Spec], Tensor]) -> None:
    """Every pixel in a random colour of the palettes: nothing is right."""
    specs, video = truth
    colours = torch.tensor(list(COLOURS.values()) + list(BACKGROUNDS.values())) / 127.5 - 1
    picks = torch.randint(len(colours), video[:, 0].shape, generator=torch.Generator().manual_seed(0))
    scores = facts(colours[picks].movedim(-1, 1), specs)
    assert all(score <= 0.1 for score in scores.values()), scores


def test_two_objects(truth: tuple[list[Spec], Tensor]) -> None:
    """A second, smaller object keeps colour, shape and motion of the first, but not the count."""
    specs, video = truth
    video = video.clone()
    for clip, spec in zip(video, specs, strict=True):
        extra = dataclasses.replace(spec, radius=3.0, centre=((spec.centre[0] + 16) % 32, (spec.centre[1] + 16) % 32))
        drawn, cover = render([extra], FRAMES)
        clip.copy_(torch.where(cover[0] > 0, drawn[0], clip))
    expect(facts(video, specs), {"multiple_objects", "all_right"})


def test_late_failure(truth: tuple[list[Spec], Tensor]) -> None:
    """A clip that loses its object in the last third is not right."""
    specs, video = truth
    assert facts(without_objects(video, specs, slice(22, None)), specs)["all_right"] == 0


def test_stills_are_right_without_motion(truth: tuple[list[Spec], Tensor]) -> None:
    specs, video = truth
    got = means("sprites", video[:, :, :1], specs)
    assert got["all_right"] == 1
    assert "direction" not in got


def test_uint8_round_trip(truth: tuple[list[Spec], Tensor]) -> None:
    specs, video = truth
    frames = ((video[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    assert (from_uint8(frames) - video[0]).abs().max() < 0.01
    assert find_task("sprites").dimensions(from_uint8(list(frames)), specs[0])["all_right"] == 1


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="expected"):
        find_task("sprites").dimensions(torch.zeros(3, 5, 16, 16), Spec("red", "circle", "up", "slowly", "gray"))
    with pytest.raises(ValueError, match="expected uint8"):
        from_uint8(torch.zeros(2, 32, 32, 3).numpy())
