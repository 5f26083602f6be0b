"""The scorer of switches: drawn ones are right, and each damage loses what it should."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import engine
from distill.data import scenes, switches
from distill.data.scenes import Thing
from distill.data.sprites import DIRECTIONS
from distill.data.switches import FACTS, Switch, draw_switch
from distill.experiments.switches import BEGINS, FRAMES, SETS, switch_scores, switched_video
from distill.scores.switches import followed

OPPOSITE = ({"left", "right"}, {"up", "down"})


def drawn(changed: tuple[str, ...], count: int = 8) -> list[Switch]:
    """Switches of one object that never blinks, so that nothing is hidden."""
    generator, found = torch.Generator().manual_seed(1), list[Switch]()
    while len(found) < count:
        switch = draw_switch(changed, generator, begins=BEGINS)
        if switch.before.other is None and not switch.before.period:
            found.append(switch)
    return found


def shown(switch: Switch) -> Tensor:
    return switches.render([switch], FRAMES)[0][0]


@pytest.mark.parametrize("changed", SETS.values(), ids=SETS)
def test_drawn_switches_are_right(changed: tuple[str, ...]) -> None:
    for switch in drawn(changed):
        scores = followed(shown(switch), switch)
        assert scores.pop("quality") > 0.98
        assert all(value == 1 or math.isnan(value) for value in scores.values()), (switch, scores)
        assert scores["right"] == 1


@pytest.mark.parametrize("changed", FACTS)
def test_a_switch_that_is_not_followed_is_wrong(changed: str) -> None:
    for switch in drawn((changed,)):
        scores = followed(scenes.render([switch.before], FRAMES)[0][0], switch)
        against = changed == "direction" and {switch.before.direction, switch.after.direction} in OPPOSITE
        if not against:  # a mover that is to turn round may bounce by itself
            assert scores["right"] == 0
        assert scores["kept"] == 1


def test_too_late_is_wrong() -> None:
    for switch in drawn(("background",), 4):
        video = switches.render([replace(switch, begins=BEGINS + 4)], FRAMES)[0][0]
        assert followed(video, switch)["right"] == 0
        in_time = switches.render([replace(switch, begins=BEGINS + 3)], FRAMES)[0][0]
        assert followed(in_time, switch)["background"] == 1


def with_other(switch: Switch) -> Switch | None:
    """The same switch beside a second object that stands where the mover never comes; None if there is no place."""
    mover = switch.before.mover
    across = int(DIRECTIONS[switch.before.direction][0] != 0)
    centre = [16.0, 16.0]
    centre[across] = 26.5 if mover.centre[across] < 16 else 5.5
    if abs(centre[across] - mover.centre[across]) < mover.radius + 5 + 3:
        return None
    other = Thing("green" if mover.colour != "green" else "purple", "square", 5.0, (centre[0], centre[1]))
    return replace(switch, before=replace(switch.before, other=other), after=replace(switch.after, other=other))


def test_what_should_stay_has_to_stay() -> None:
    """Another size, another place, another background, a second object that goes, moves or changes."""
    for switch in drawn(("colour",), 3):
        mover = switch.after.mover
        x, y = mover.centre
        away = (x + 12 if x < 16 else x - 12, y + 10 if y < 16 else y - 10)
        ground = next(name for name in FACTS["background"] if name != switch.after.background)
        for damage in (
            {"mover": replace(mover, radius=mover.radius * 0.7)},
            {"mover": replace(mover, centre=away)},
            {"background": ground},
        ):
            scores = followed(shown(replace(switch, after=replace(switch.after, **damage))), switch)
            assert scores["kept"] == 0, damage
            assert scores["right"] == 1
    beside = [switch for switch in map(with_other, drawn(("background",), 20)) if switch]
    assert len(beside) >= 3
    for switch in beside[:3]:
        assert followed(shown(switch), switch)["kept"] == 1
        other = switch.after.other
        assert other is not None
        x, y = other.centre
        aside = (x + 6, y) if x == 16 else (x, y + 6)
        for changed in (None, replace(other, centre=aside), replace(other, shape="circle")):
            damaged = replace(switch, after=replace(switch.after, other=changed))
            assert followed(shown(damaged), switch)["kept"] == 0


def test_too_short_a_clip_is_refused() -> None:
    with pytest.raises(ValueError, match="switch: got 30 frames, expected 37 or more"):
        followed(torch.zeros(3, 30, 32, 32), drawn(("colour",), 1)[0])


def test_a_stream_switches_at_its_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The frames before are those of a stream without a switch."""
    pipeline = engine.load("engine/assets/sprites", device="cpu")
    switch = drawn(("background",), 1)[0]
    video, done = switched_video(pipeline, switch, 3, frames=37)
    assert (video.shape[1], done.begins, done.frame) == (37, BEGINS, switch.frame)
    with pipeline.stream(switch.before.caption, seed=3, frames=37) as stream:
        plain = torch.stack([torch.from_numpy(frame.copy()) for frame in stream])
    same = (plain.permute(3, 0, 1, 2) / 127.5 - 1 - video).abs().amax((0, 2, 3)) == 0
    assert same[: switch.frame].all()
    assert not same[switch.frame :].any()
    monkeypatch.setattr("distill.experiments.switches.SETS", {"all": SETS["all"]})
    found = switch_scores(pipeline, 1, 0)
    assert list(found) == ["all"]
    assert found["all"]["background"] == {"mean": 1.0, "se": 0.0, "n": 1}
