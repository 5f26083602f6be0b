"""A live session whose seed, steps and window change, and one that blends in the C++ core."""

from contextlib import nullcontext
from dataclasses import replace

import fake_stages
import numpy as np
import pytest
from csrc_tools import core_of, open_fake
from sessions import HANG, OTHER, PROMPT, after, chunks, frames, items, notices, opened, plain, wish, words

from serve.core.messages import Change, Chunk, Past
from serve.core.video import Video
from serve.core.viewers import Viewer

FEW = ((1000.0, 400.0),)
SETTINGS = [Change("a", seed=9, reset=False), Change("b", steps=FEW, window=2), Change("c", window=4)]


def changed(pipeline, count, changes, **stream):
    """The frames of the engine's own stream; changes: (chunk, what `change` is told) before that chunk."""
    with pipeline.stream(PROMPT, **{"seed": 3} | stream) as one:
        made = []
        for number in range(count):
            for at, asked in changes:
                if at == number:
                    one.change(**asked)
            made.append(one.next_chunk())
    return np.concatenate(made)


def test_seed_steps_and_window_change_without_a_restart(pipeline):
    """From the next chunk on; and a video that is made again has them, too."""
    session, viewer = opened(pipeline, wish(frames=41), Viewer(None, room=1))
    found = []
    for number, change in enumerate(SETTINGS):
        found += items(viewer, after(1 + 2 * number))
        session.change(change)
    found += items(viewer)
    begin = {event: c.number for c in chunks(found) for event in c.started}
    told = [(begin["a"], {"seed": 9}), (begin["b"], {"steps": FEW, "window": 2}), (begin["c"], {"window": 4})]
    assert (frames(found) == changed(pipeline, 11, told)[:41]).all()
    assert {c.take for c in chunks(found)} == {0}
    whole = {c.number: c.frames for c in chunks(found)}
    for skip in (1, 4, 8):
        past = tuple(Past(one.chunk, one.change) for one in session.history)
        _, again = opened(pipeline, wish(frames=41, history=past, skip=skip))
        made = {c.number: c.frames for c in chunks(items(again))}
        assert list(made) == list(range(skip, 11))
        assert all((made[number] == whole[number]).all() for number in made)


def test_a_restart_keeps_what_was_changed(pipeline):
    session, viewer = opened(pipeline, wish(), Viewer(None, room=1))
    for number, change in enumerate(SETTINGS[:2]):
        items(viewer, after(1 + number))
        session.change(change)
    items(viewer, after(5))
    for take, (change, seed) in enumerate([(Change(reset=True), 9), (Change(seed=4), 4)], start=1):
        session.change(change)
        found = items(viewer, lambda item, take=take: isinstance(item, Chunk) and (item.take, item.number) == (take, 2))
        fresh = [c for c in chunks(found) if c.take == take]
        assert (frames(fresh) == changed(pipeline, 3, [(0, {"steps": FEW, "window": 2})], seed=seed)).all()
        assert session.seed == seed
        assert [past.change.settings for past in session.history] == [{"steps": FEW, "window": 2}]
    session.stop()


@pytest.mark.parametrize(
    "wrong",
    [
        Change("x", window=99),
        Change("x", window=99, reset=True),
        Change("x", steps=((5.0,),)),
        Change("x", window=99, seed=5, reset=False, prompt=words(OTHER), paused=True),
    ],
)
def test_settings_that_are_refused_leave_the_video_as_it_was(pipeline, wrong):
    session, viewer = opened(pipeline, wish(), Viewer(None, room=1))
    found = items(viewer, after(1))
    session.change(wrong)
    found += items(viewer, after(6))
    session.stop()
    (error,) = notices(found, "error")
    assert (error["event_id"], error["code"]) == ("x", "interaction_failed")
    assert "expected" in error["message"]
    assert (frames(found) == plain(pipeline, 7)).all()
    assert session.history == []


def test_settings_and_adapters_change_together_or_not_at_all(pipeline):
    """This pipeline has no adapters."""
    session, viewer = opened(pipeline, wish(), Viewer(None, room=1))
    found = items(viewer, after(1))
    session.change(Change("a", steps=FEW))
    found += items(viewer, after(4))
    session.change(Change("x", steps=((1000.0,),), window=2, seed=8, reset=False, adapters={"style": 1.0}))
    found += items(viewer, after(9))
    session.stop()
    assert [error["event_id"] for error in notices(found, "error")] == ["x"]
    at = next(c.number for c in chunks(found) if "a" in c.started)
    assert (frames(found) == changed(pipeline, 10, [(at, {"steps": FEW})])).all()
    assert [past.change.settings for past in session.history] == [{"steps": FEW}]


def test_settings_of_one_chunk_are_one_entry_of_the_history(pipeline):
    """So a client that asks for much cannot grow it."""
    video = Video(pipeline, wish(), lambda deadline: nullcontext(), lambda notice: None)
    video.begin()
    for number in range(50):
        assert video.apply(Change(steps=FEW, window=2 + 2 * (number % 2)))
    assert video.apply(Change(prompt=words(OTHER)))
    assert video.apply(Change(seed=4, reset=False))
    assert [past.change.settings for past in video.history] == [{"steps": FEW, "window": 4}, {"seed": 4}]
    assert [past.change.prompt for past in video.history] == [None, words(OTHER)]
    video.close()


def test_a_bundle_in_the_core_blends_too(native_build):
    """Mixtures and soft transitions, and what it cannot change is refused while the video goes on."""
    asked = replace(wish(), prompt=((PROMPT, 3.0), (OTHER, 1.0)))
    with core_of(native_build) as core:
        pipeline = open_fake(core, native_build, fake_stages.RECORDED)
        session, viewer = opened(pipeline, asked, Viewer(None, room=1))
        found = items(viewer, after(1))
        session.change(Change("soft", words(OTHER), transition=3))
        session.change(Change("window", window=1))
        found += items(viewer, after(7))
        session.stop()
        assert session.join(HANG)
        first = next(c.number for c in chunks(found) if "soft" in c.started)
        with pipeline.stream([(PROMPT, 3.0), (OTHER, 1.0)], seed=3) as stream:
            made = []
            for number in range(8):
                if number == first:
                    stream.set_prompt(OTHER, transition=3)
                made.append(stream.next_chunk())
        assert (frames(found) == np.concatenate(made)).all()
    assert [c.number for c in chunks(found) if "soft" in c.active] == [first, first + 1, first + 2]
    (error,) = notices(found, "error")
    assert (error["event_id"], error["message"][:26]) == ("window", "window: got 1, expected no")
