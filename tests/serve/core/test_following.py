"""A session that follows frames: its chunks are the engine's, made when their frames are there, and no sooner."""

import time

import numpy as np
import pytest
from sessions import HANG, OTHER, PROMPT, chunks, frames, items, notices, opened, place, wish, words

from serve.core.messages import Change, Chunk, Follow, Notice
from serve.core.session import Limits, Session
from serve.core.viewers import Viewer


def pictures(pipeline, count, seed=0):
    shape = (count, pipeline.height, pipeline.width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def feed(session, source, begin=0.0):
    """Give frames at the rate of the model, all at once."""
    for number, frame in enumerate(source):
        session.input.put(frame, begin + number / 8)
    session.wake()


def after(number):
    return lambda item: isinstance(item, Chunk) and item.number == number


def following(pipeline, **options):
    return opened(pipeline, wish(source=Follow(**options)))


@pytest.mark.parametrize("family", ["pipeline", "causal"])
def test_chunks_are_those_of_the_engine(request, family):
    pipeline = request.getfixturevalue(family)
    source = pictures(pipeline, 49)
    with pipeline.stream(PROMPT, seed=3, source=source, strength=0.9, noise_scale=0.1) as stream:
        expected = [stream.next_chunk() for _ in range(3)]
    session, viewer = following(pipeline, strength=0.9, noise_scale=0.1)
    begin, found = 0, []
    for number, chunk in enumerate(expected):  # as many frames as the chunk takes
        feed(session, source[begin : begin + len(chunk)], begin / 8)
        begin += len(chunk)
        found += items(viewer, after(number))
    session.stop()
    assert (frames(found) == np.concatenate(expected)).all()
    assert notices(items(viewer), "done")[0]["source"] == {"taken": begin, "dropped": 0, "repeated": 0}


def test_no_chunk_is_made_before_its_frames_are_there(pipeline):
    session, viewer = following(pipeline, strength=0.9)
    source = pictures(pipeline, 9)
    feed(session, source[:1])
    found = items(viewer, after(0))
    feed(session, source[1:4], 1 / 8)
    assert viewer.take(0.7) is None
    feed(session, source[4:5], 4 / 8)
    found += items(viewer, after(1))
    session.stop()
    assert len(frames(found)) == 5


def test_a_slow_session_gets_the_newest_frames(pipeline):
    session, viewer = following(pipeline, strength=0.9)
    source = pictures(pipeline, 41)
    session.change(Change("p", paused=True))
    while session.state != "paused":
        time.sleep(0.01)
    feed(session, source)
    session.change(Change("p", paused=False))
    found = items(viewer, after(0))
    with pipeline.stream(PROMPT, seed=3, source=source[37:], strength=0.9) as stream:
        assert (frames(found) == stream.next_chunk()).all()
    session.stop()
    assert notices(items(viewer), "done")[0]["source"] == {"taken": 1, "dropped": 37, "repeated": 0}


def test_prompts_and_restarts_act_as_ever(pipeline):
    session, viewer = following(pipeline, strength=0.9)
    source = pictures(pipeline, 10)
    feed(session, source[:1])
    items(viewer, after(0))
    session.change(Change("e", words(OTHER)))
    feed(session, source[1:5], 1 / 8)
    (chunk,) = chunks(items(viewer, after(1)))
    assert (chunk.prompt, chunk.started) == (OTHER, ("e",))
    session.change(Change("r", reset=True))
    feed(session, source[5:6], 5 / 8)
    (chunk,) = chunks(items(viewer, lambda item: isinstance(item, Chunk) and item.take == 1))
    with pipeline.stream(OTHER, seed=3, source=source[5:6], strength=0.9) as stream:
        assert (chunk.frames == stream.next_chunk()).all()
    session.stop()


def test_the_end_of_its_input_ends_it(pipeline):
    session, viewer = following(pipeline, strength=0.9)
    for frame in pictures(pipeline, 4):
        session.input.put(frame, 0.0)
    session.input.close()
    session.wake()
    done = notices(items(viewer), "done")[0]
    assert (done["frames"], done["reason"], done["stopped"]) == (1, "finished", False)


def test_a_session_without_frames_ends_and_says_why(pipeline):
    viewer = Viewer(None)
    session = Session("one", place(pipeline, limits=Limits(stall=0.3)), wish(source=Follow()))
    session.watch(viewer)
    session.start()
    begun = time.monotonic()
    assert notices(items(viewer), "done")[0]["reason"] == "no_frames"
    assert time.monotonic() - begun < HANG / 4


def test_the_wait_in_line_is_not_a_lack_of_frames(pipeline):
    """Pictures come once the video has begun, however long that took."""
    viewer = Viewer(None)
    session = Session("one", place(pipeline, limits=Limits(stall=1.0)), wish(source=Follow(strength=0.9)))
    session.watch(viewer)
    time.sleep(1.2)
    session.start()
    found = items(viewer, lambda item: isinstance(item, Notice) and item.kind == "start")
    feed(session, pictures(pipeline, 1))
    found += items(viewer, after(0))
    session.stop()
    assert len(frames(found)) == 1
