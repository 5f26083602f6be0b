"""Scenes: truth scores 1 in every dimension, every kind of damage costs the dimensions that name it and no others."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from damages import FRAMES, NAMES, following, frozen, jumping, means, without_objects
from torch import Tensor

from distill.data.scenes import RELATIONS, Scene, render, sample, seen
from distill.data.sprites import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES
from distill.scores.dimensions import QUALITY, SEMANTIC, dimensions, summarise
from distill.scores.tasks import find_task

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def truth() -> tuple[list[Scene], Tensor]:
    scenes = sample(40, torch.Generator().manual_seed(23), hidden=True)
    return scenes, render(scenes, FRAMES)[0]


@pytest.fixture(scope="module")
def single() -> tuple[list[Scene], Tensor]:
    """One object, always seen: what is damaged here is damaged everywhere."""
    scenes = sample(40, torch.Generator().manual_seed(29))
    scenes = [dataclasses.replace(s, other=None, period=0, hidden=0, phase=0) for s in scenes]
    return scenes, render(scenes, FRAMES)[0]


def expect(videos: Tensor, scenes: list[Scene], lost: set[str], at_most: float = 0.1) -> None:
    """`lost` dimensions fall to `at_most` or less, every other one stays at 0.98 or more."""
    got = means("scenes", videos, scenes)
    wrong = {name: got[name] for name in NAMES if name in got and (got[name] <= at_most) != (name in lost)}
    fallen = {name: got[name] for name in NAMES if name in got and name not in lost and got[name] < 0.98}
    assert not wrong, wrong
    assert not fallen, fallen
    assert got["all_right"] == float(not lost & {*SEMANTIC}), got


def test_truth_scores_one(truth: tuple[list[Scene], Tensor]) -> None:
    scenes, video = truth
    assert {s.relation for s in scenes} == {None, *RELATIONS}
    assert any(s.period for s in scenes)
    expect(video, scenes, set())
    got = means("scenes", video, scenes)
    assert min(got["semantic"], got["quality"], got["total"]) >= 0.98
    assert got["all_right"] == 1


def test_truth_survives_mild_noise(truth: tuple[list[Scene], Tensor]) -> None:
    scenes, video = truth
    got = means("scenes", video + 0.01 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0)), scenes)
    assert min(got[name] for name in NAMES) >= 0.98, got


def test_stills_have_no_motion_to_judge(truth: tuple[list[Scene], Tensor]) -> None:
    scenes, video = truth
    got = means("scenes", video[:, :, :1], scenes)
    assert not {"direction", "speed", "motion_smoothness", "dynamic_degree"} & set(got)
    assert got.pop("blink") == 0
    assert min(got.values()) >= 0.98, got
    assert means("scenes", torch.zeros_like(video[:, :, :1]), scenes)["semantic"] < 0.1


def test_long_truth() -> None:
    """Bouncing, blinking and occlusion for 161 frames are still truth."""
    scenes = sample(8, torch.Generator().manual_seed(31))
    got = means("scenes", render(scenes, 161)[0], scenes)
    assert min(got["semantic"], got["quality"]) >= 0.98, got


def test_parts_of_a_long_clip_are_truth() -> None:
    """A part may begin while its mover is unseen; a video may not."""
    task = find_task("scenes")
    scenes = [dataclasses.replace(blinking(s), phase=29) for s in task.draw(6, 41)]
    video = task.render(scenes, 90)[0]
    assert task.score(video[:, :, 30:60], scenes, begins=False)["quality"]["mean"] >= 0.98
    assert task.score(video[:, :, 30:60], scenes)["quality"]["mean"] < 0.98


@pytest.mark.parametrize(
    ("what", "lost"),
    [
        ("colour", {"color"}),
        ("shape", {"object_class"}),
        ("direction", {"direction"}),
        ("speed", {"speed"}),
        ("background", {"scene"}),
    ],
)
def test_one_wrong_fact(single: tuple[list[Scene], Tensor], what: str, lost: set[str]) -> None:
    scenes, _ = single

    def wrong(s: Scene) -> Scene:
        if what in ("colour", "shape"):
            name = following(getattr(s.mover, what), COLOURS if what == "colour" else SHAPES)
            return dataclasses.replace(s, mover=dataclasses.replace(s.mover, **{what: name}))
        if what == "direction":
            back = {v: k for k, v in DIRECTIONS.items()}[tuple(-step for step in DIRECTIONS[s.direction])]
            return dataclasses.replace(s, direction=back, mover=dataclasses.replace(s.mover, centre=(16.0, 16.0)))
        if what == "speed":
            return dataclasses.replace(s, pace=1.0 if s.speed == "slowly" else 0.45)
        return dataclasses.replace(s, background=following(s.background, BACKGROUNDS))

    expect(render([wrong(s) for s in scenes], FRAMES)[0], scenes, lost)


def test_frozen(single: tuple[list[Scene], Tensor]) -> None:
    scenes, video = single
    expect(frozen(video), scenes, {"direction", "speed", "dynamic_degree"})


def test_flicker(single: tuple[list[Scene], Tensor]) -> None:
    """Gone in every second frame: it flickers, nothing can be followed; what is seen is still right."""
    scenes, video = single
    got = means("scenes", without_objects(video, scenes, slice(1, None, 2)), scenes)
    assert got["temporal_flickering"] <= 0.1
    assert max(got["direction"], got["speed"], got["dynamic_degree"]) == 0
    assert min(got["object_class"], got["color"], got["scene"], got["subject_consistency"]) >= 0.98


def test_drifting_colours(single: tuple[list[Scene], Tensor]) -> None:
    """Everything slowly grows brighter, as over-exposed rollouts do: consistency goes, each step is small."""
    scenes, video = single
    video = (video + torch.linspace(0, 0.5, FRAMES).view(1, 1, -1, 1, 1)).clamp(-1, 1)
    kept = [s.background != "white" for s in scenes]  # white cannot grow brighter
    got = means("scenes", video[kept], [s for s, keep in zip(scenes, kept, strict=True) if keep])
    assert got["background_consistency"] <= 0.5
    assert got["subject_consistency"] <= 0.95
    assert min(got["temporal_flickering"], got["motion_smoothness"], got["direction"]) >= 0.95


def test_blurred(single: tuple[list[Scene], Tensor]) -> None:
    scenes, video = single
    frames = video.transpose(1, 2).flatten(0, 1)
    blurred = F.avg_pool2d(F.pad(frames, (2, 2, 2, 2), mode="replicate"), 5, 1)
    got = means("scenes", blurred.unflatten(0, (-1, FRAMES)).transpose(1, 2), scenes)
    assert got["imaging_quality"] <= 0.6
    kept = set(NAMES) - {"imaging_quality", "object_class", "subject_consistency", "spatial_relationship"}
    assert min(got[name] for name in kept) >= 0.98  # blur leaves only the shape uncertain


def test_jump(single: tuple[list[Scene], Tensor]) -> None:
    """A jump across the way, half-way: not smooth from there on, and no steady motion."""
    scenes, video = single
    got = means("scenes", jumping(video), scenes)
    assert got["motion_smoothness"] <= 0.5
    assert got["direction"] == got["speed"] == 0
    assert min(got[name] for name in ("object_class", "color", "scene", "imaging_quality")) >= 0.98


def test_never_comes_back(single: tuple[list[Scene], Tensor]) -> None:
    """An object that fades out for good is no blink: it is missed in every frame that it should be in."""
    scenes, video = single
    got = means("scenes", without_objects(video, scenes, slice(17, None)), scenes)
    for name in ("object_class", "multiple_objects", "color", "subject_consistency"):
        assert got[name] == pytest.approx(17 / 33, abs=0.02), name


def blinking(scene: Scene) -> Scene:
    return dataclasses.replace(scene, other=None, period=20, hidden=8, phase=9)


def test_comes_back_elsewhere(single: tuple[list[Scene], Tensor]) -> None:
    """A blinking object that reappears where it cannot be has been forgotten: only motion smoothness knows."""
    scenes = [blinking(s) for s in single[0]]
    video = render(scenes, FRAMES)[0]
    expect(video, scenes, set())
    shifted = video.clone()
    for i, s in enumerate(scenes):
        axis = -2 if DIRECTIONS[s.direction][0] else -1  # across the way
        shifted[i, :, 17:] = shifted[i, :, 17:].roll(7, axis)
    got = means("scenes", shifted, scenes)
    assert got["motion_smoothness"] <= 0.35
    kept = set(NAMES) - {"motion_smoothness", "direction", "speed", "spatial_relationship"}
    assert min(got[name] for name in kept) >= 0.9, got


def two(scenes: list[Scene]) -> list[Scene]:
    return [s for s in scenes if s.other is not None]


@pytest.mark.parametrize("damage", ["swapped", "missing", "other_class", "other_colour"])
def test_second_object(truth: tuple[list[Scene], Tensor], damage: str) -> None:
    scenes = two(truth[0])
    assert len(scenes) >= 10

    def wrong(s: Scene) -> Scene:
        mover, other = s.mover, s.other
        assert other is not None
        if damage == "missing":
            return dataclasses.replace(s, other=None)
        if damage == "swapped":  # each in the other's place
            return dataclasses.replace(
                s,
                mover=dataclasses.replace(mover, centre=other.centre),
                other=dataclasses.replace(other, centre=mover.centre),
            )
        if damage == "other_class":
            return dataclasses.replace(s, other=dataclasses.replace(other, shape=following(other.shape, SHAPES)))
        colour = following(other.colour, COLOURS, (mover.colour,))
        return dataclasses.replace(s, other=dataclasses.replace(other, colour=colour))

    got = means("scenes", render([wrong(s) for s in scenes], FRAMES)[0], scenes)
    loses = {
        "swapped": {"spatial_relationship": 0.0},
        "missing": {"spatial_relationship": 0.0, "multiple_objects": 0.0, "object_class": 0.5, "color": 0.5},
        "other_class": {"object_class": 0.5},
        "other_colour": {"color": 0.5},
    }[damage]
    assert got["all_right"] == 0
    for name in SEMANTIC:
        if name in loses:
            assert got[name] == pytest.approx(loses[name], abs=0.06), (name, got)
        elif damage != "swapped" or name not in ("direction", "speed"):  # the way may begin at a wall now
            assert got[name] >= 0.95, (name, got)


def test_an_object_too_many(single: tuple[list[Scene], Tensor]) -> None:
    scenes, video = single
    extra = [dataclasses.replace(s, mover=dataclasses.replace(s.mover, radius=3.5)) for s in scenes]
    drawn, cover = render(extra, FRAMES)
    drawn, cover = (x.roll((16, 16), (-1, -2)) for x in (drawn, cover))
    assert means("scenes", torch.where(cover > 0, drawn, video), scenes)["multiple_objects"] <= 0.1


def test_nothing_there(single: tuple[list[Scene], Tensor]) -> None:
    """An empty background keeps the background and earns nothing else."""
    scenes, video = single
    empty = video[:, :, :1, :1, :1].expand_as(video)
    corners = [(s.mover.centre[0] > 10 or s.mover.centre[1] > 10) for s in scenes]
    got = means("scenes", empty[corners], [s for s, keep in zip(scenes, corners, strict=True) if keep])
    for name in ("object_class", "multiple_objects", "color", "direction", "speed", "subject_consistency"):
        assert got[name] == 0, name
    assert got["motion_smoothness"] == got["imaging_quality"] == got["dynamic_degree"] == 0


@pytest.mark.parametrize("noise", [torch.rand, torch.randn])
def test_noise_is_nothing(single: tuple[list[Scene], Tensor], noise: Callable[..., Tensor]) -> None:
    scenes, video = single
    got = means("scenes", noise(video[:8].shape, generator=torch.Generator().manual_seed(0)), scenes[:8])
    assert got["semantic"] <= 0.2, got
    assert got["imaging_quality"] <= 0.2, got


def test_weights_are_vbench() -> None:
    clip = {**dict.fromkeys(SEMANTIC, 0.5), **dict.fromkeys(QUALITY, 1.0), "dynamic_degree": 0.0}
    got = summarise([clip])
    assert got["quality"]["mean"] == pytest.approx(5 / 5.5, abs=1e-4)
    assert got["total"]["mean"] == pytest.approx((4 * 5 / 5.5 + 0.5) / 5, abs=1e-4)
    nowhere = {**clip, "spatial_relationship": float("nan")}
    assert summarise([nowhere])["semantic"]["mean"] == 0.5
    assert "spatial_relationship" not in summarise([nowhere])


def test_bad_input(single: tuple[list[Scene], Tensor]) -> None:
    with pytest.raises(ValueError, match="expected"):
        dimensions(torch.zeros(3, 5, 16, 16), single[0][0])
    with pytest.raises(ValueError, match="empty"):
        summarise([])


def test_blinks_are_seen(truth: tuple[list[Scene], Tensor]) -> None:
    """On drawn clips, wherever an occlusion does not hide the blink itself."""
    scenes, video = truth
    found = [dimensions(clip, scene)["blink"] for clip, scene in zip(video, scenes, strict=True)]
    drawn = [bool(scene.period) and not bool(seen(scene, video.shape[2]).all()) for scene in scenes]
    assert not any(got and not shown for got, shown in zip(found, drawn, strict=True))
    assert sum(found) >= 0.6 * sum(drawn) > 0
    assert means("scenes", torch.zeros_like(video[:4]), scenes[:4])["blink"] == 0
    assert means("scenes", video, scenes)["blink"] == pytest.approx(sum(found) / len(found), abs=1e-4)


def test_blink_hides_whole_latent_frames() -> None:
    """Disappearances keep to latent frames (1, then 4 pixel frames each), and never touch the first two."""
    for scene in sample(60, torch.Generator().manual_seed(3)):
        shown = seen(scene, 33)
        assert bool(shown[:5].all())
        groups = shown[1:].view(-1, 4)
        assert bool((groups.all(1) | ~groups.any(1)).all())
