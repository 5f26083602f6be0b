"""Scores of video-to-video on clips that were drawn: those that follow input and prompt, and those that do not."""

from dataclasses import replace

import pytest

from distill.__main__ import main
from distill.data.scenes import Scene, Thing, render
from distill.experiments.following import pairs
from distill.scores.following import follows, has_followed

SOURCE = Scene(Thing("red", "circle", 6.0, (9.0, 16.0)), "right", "quickly", "gray", 0.9)
WANTED = replace(SOURCE, mover=replace(SOURCE.mover, colour="blue", shape="square"))


def scored(scene, wanted=WANTED):
    scores = follows(render([scene], 33)[0][0], SOURCE, wanted)
    return scores, has_followed(scores)


def test_the_input_under_the_prompts_look():
    scores, followed = scored(WANTED)
    assert all(value >= 0.97 for value in scores.values())
    assert followed == {"motion_followed": 1.0, "look_followed": 1.0}


@pytest.mark.parametrize(
    ("change", "lost", "kept"),
    [
        ({"direction": "left"}, "place", "colour"),
        ({"direction": "down"}, "direction", "shape"),
        ({"background": "white"}, "background", "place"),
        ({"mover": SOURCE.mover}, "colour", "place"),
        ({"mover": replace(WANTED.mover, shape="triangle")}, "shape", "colour"),
        ({"mover": replace(WANTED.mover, centre=(9.0, 24.0))}, "place", "direction"),
        ({"pace": 0.3}, "place", "direction"),
        ({"period": 12, "hidden": 8, "phase": 9}, "place", "colour"),
    ],
)
def test_what_does_not_follow(change, lost, kept):
    scores, followed = scored(replace(WANTED, **change))
    assert scores[lost] < 0.75
    assert scores[kept] >= 0.95
    assert 0.0 in followed.values()


def test_pairs_differ_in_what_is_asked_for_alone():
    for change in ({"colour"}, {"shape"}, {"background"}, {"colour", "shape", "background"}):
        for shown, wanted in pairs(8, 1, tuple(change)):
            facts = {
                "colour": (shown.mover.colour, wanted.mover.colour),
                "shape": (shown.mover.shape, wanted.mover.shape),
                "background": (shown.background, wanted.background),
            }
            assert {name for name, (one, other) in facts.items() if one != other} == change
            assert (shown.direction, shown.pace, shown.mover.centre) == (
                wanted.direction, wanted.pace, wanted.mover.centre,
            )  # fmt: skip
            assert shown.other is None
            assert not shown.period
    assert all(a.direction != b.direction for a, b in pairs(8, 1, ("colour",), opposite=True))


@pytest.mark.parametrize(("words", "said"), [
    (["--clips", "0"], "--clips: got 0, expected at least 1"),
    (["--frames", "6"], "--frames: got 6, expected whole chunks (5 or 9)"),
    (["--frames", "0"], "--frames: got 0, expected whole chunks"),
    (["--picture", "/dev/null/no/p.png"], "/dev/null/no"),
])  # fmt: skip
def test_bad_options(words, said, capsys):
    assert main(["following", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
