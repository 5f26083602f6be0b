"""A live session without a network: its frames are the engine's, commands act at chunks, limits end it."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from sessions import HANG, OTHER, PROMPT, after, chunks, frames, items, notices, opened, place, plain, wish, words

from serve.core.messages import Change, Chunk, Past
from serve.core.session import MOST_CHANGES, Limits, Session, TooMany
from serve.core.viewers import Viewer


def test_frames_are_those_of_a_plain_stream(pipeline):
    _, viewer = opened(pipeline, wish(frames=18))
    found = items(viewer)
    assert frames(found).shape == (18, pipeline.height, pipeline.width, 3)
    assert (frames(found) == plain(pipeline, 6)[:18]).all()
    assert notices(found, "done") == [{"chunks": 6, "frames": 18, "stopped": False, "reason": "finished"}]
    assert [(c.number, c.position, len(c.frames)) for c in chunks(found)] == [
        (0, 0, 1), (1, 1, 4), (2, 5, 4), (3, 9, 4), (4, 13, 4), (5, 17, 1)
    ]  # fmt: skip


def test_a_prompt_acts_with_the_next_chunk(pipeline):
    session, viewer = opened(pipeline, wish(), Viewer(None, room=1))
    found = items(viewer, after(2))
    session.change(Change("e", words(OTHER)))
    found += items(viewer, after(7))
    session.stop()
    first = next(c.number for c in chunks(found) if "e" in c.started)
    assert first in (3, 4, 5)  # at most one chunk waits, and one is being made
    assert (frames(found) == plain(pipeline, 8, {first: OTHER})).all()
    for chunk in chunks(found):
        new = chunk.number >= first
        assert chunk.prompt == (OTHER if new else PROMPT)
        expected = ("e",) if chunk.number == first else ()
        assert chunk.started == chunk.active == chunk.completed == expected
    assert [(past.chunk, past.change.event) for past in session.history] == [(first, "e")]


def test_a_soft_transition_interpolates_embeddings(pipeline):
    """Chunk k of n has the embedding at k/n of the way; against the engine fed with torch.lerp's."""
    session, viewer = opened(pipeline, wish(), Viewer(None, room=1))
    found = items(viewer, after(1))
    session.change(Change("e", words(OTHER), transition=3))
    found += items(viewer, after(9))
    session.stop()
    first = next(c.number for c in chunks(found) if c.started)
    old, new = pipeline.encode_prompt(PROMPT), pipeline.encode_prompt(OTHER)
    steps = {first + k: torch.lerp(old, new, (k + 1) / 3) for k in range(2)} | {first + 2: OTHER}
    assert (frames(found) == plain(pipeline, 10, steps)).all()
    story = {c.number: (c.started, c.active, c.completed) for c in chunks(found)}
    assert [story[first + k] for k in range(4)] == [
        (("e",), ("e",), ()), ((), ("e",), ()), ((), ("e",), ("e",)), ((), (), ())
    ]  # fmt: skip


def test_a_new_target_starts_where_the_transition_stands(pipeline):
    session, viewer = opened(pipeline, wish(), Viewer(None, room=1))
    found = items(viewer, after(1))
    session.change(Change("a", words(OTHER), transition=4))
    found += items(viewer, lambda item: isinstance(item, Chunk) and "a" in item.started)
    session.change(Change("b", words(PROMPT), transition=2))
    found += items(viewer, after(9))
    session.stop()
    begin = {c.started[0]: c.number for c in chunks(found) if c.started}
    old, new = pipeline.encode_prompt(PROMPT), pipeline.encode_prompt(OTHER)
    steps = {n: torch.lerp(old, new, (n - begin["a"] + 1) / 4) for n in range(begin["a"], begin["b"])}
    steps |= {begin["b"]: torch.lerp(steps[begin["b"] - 1], old, 0.5), begin["b"] + 1: PROMPT}
    assert (frames(found) == plain(pipeline, 10, steps)).all()


def test_weighted_prompts_are_the_mean_of_their_embeddings(pipeline):
    mixed = ((PROMPT, 3.0), (OTHER, 1.0))
    _, viewer = opened(pipeline, replace(wish(frames=9), prompt=mixed))
    found = items(viewer)
    mean = pipeline.encode_prompt(PROMPT) * 0.75 + pipeline.encode_prompt(OTHER) * 0.25
    made = []
    with pipeline.stream(mean, seed=3) as stream:
        made = np.concatenate([stream.next_chunk() for _ in range(3)])
    assert (frames(found) == made).all()
    assert chunks(found)[0].prompt == f"3 x {PROMPT} + 1 x {OTHER}"


def test_a_video_is_made_again_from_a_chunk_on(pipeline):
    """A client that lost its session, or whose server died, gets the frames that it had not seen, bit by bit."""
    session, viewer = opened(pipeline, wish(frames=37), Viewer(None, room=1))
    found = items(viewer, after(1))
    session.change(Change("a", words(OTHER), transition=3))
    found += items(viewer, after(5))
    session.change(Change("b", words(PROMPT)))
    found += items(viewer)
    whole = {c.number: c.frames for c in chunks(found)}
    for skip in (1, 4, 7):
        past = tuple(Past(one.chunk, one.change) for one in session.history)
        _, again = opened(pipeline, wish(frames=37, history=past, skip=skip))
        made = {c.number: c.frames for c in chunks(items(again))}
        assert list(made) == list(range(skip, 10))
        assert all((made[number] == whole[number]).all() for number in made)


def test_a_restart_gives_the_same_video_and_nothing_stale(pipeline):
    session, viewer = opened(pipeline, wish(), Viewer(None, room=2))
    items(viewer, after(3))
    time.sleep(0.2)  # chunks of the old video wait now
    session.change(Change("again", reset=True))
    later = items(viewer, lambda item: isinstance(item, Chunk) and item.take == 1 and item.number == 4)
    fresh = [c for c in chunks(later) if c.take == 1]
    assert (frames(fresh) == plain(pipeline, 5)).all()
    assert fresh[0].started == ("again",)
    assert [c for c in chunks(later) if c.take == 0] == []
    positions = [c.position for c in chunks(later)]
    assert positions == sorted(positions)
    session.change(Change("seed", seed=9))
    later = items(viewer, lambda item: isinstance(item, Chunk) and item.take == 2 and item.number == 2)
    session.stop()
    assert (frames([c for c in chunks(later) if c.take == 2]) == plain(pipeline, 3, seed=9)).all()


def test_of_many_restarts_that_wait_one_is_made(pipeline):
    """The last one, with the seed and the prompt that were asked for last; each event shows."""
    session, viewer = opened(pipeline, wish(), Viewer(None, room=1))
    items(viewer, after(1))
    with session._place.turns.turn(0.0):
        for number in range(20):
            session.change(Change(f"e{number}", words(OTHER) if number == 7 else None, seed=number))
        session.change(Change("last", reset=True))
    found = items(viewer, lambda item: isinstance(item, Chunk) and item.take > 0 and item.number == 3)
    session.stop()
    fresh = [c for c in chunks(found) if "last" in c.started or c.take == found[-1].take]
    assert fresh[0].take <= 2  # one restart may have begun before the others came
    with pipeline.stream(OTHER, seed=19) as stream:
        assert (frames(fresh[:4]) == np.concatenate([stream.next_chunk() for _ in range(4)])).all()
    assert fresh[0].started[-1] == "last"


def test_pause_makes_nothing_and_loses_nothing(pipeline):
    session, viewer = opened(pipeline, wish(speed=50.0))
    found = items(viewer, after(2))
    session.change(Change(paused=True))
    deadline = time.monotonic() + HANG
    while session.state != "paused" and time.monotonic() < deadline:
        time.sleep(0.01)
    while (item := viewer.take()) is not None:
        found.append(item)
    made = session.chunks
    time.sleep(0.5)
    assert session.chunks == made
    assert session.state == "paused"
    session.change(Change(paused=False))
    found += items(viewer, after(made + 2))
    session.stop()
    assert (frames(found) == plain(pipeline, made + 3)).all()


def test_what_the_stream_refuses_leaves_it_as_it_was(pipeline):
    session, viewer = opened(pipeline, wish(), Viewer(None, room=1))
    found = items(viewer, after(1))
    session.change(Change("bad", adapters={"none": 1.0}))
    session.change(Change("bad too", words("\0"), transition=2))
    found += items(viewer, after(6))
    session.stop()
    errors = notices(found, "error")
    assert [(one["event_id"], one["code"]) for one in errors] == [
        ("bad", "interaction_failed"),
        ("bad too", "interaction_failed"),
    ]
    assert "got a pipeline without any" in errors[0]["message"]
    assert (frames(found) == plain(pipeline, 7)).all()
    assert session.history == []


def test_a_long_prompt_is_told(pipeline):
    session, viewer = opened(pipeline, wish("a red circle " * 40))
    found = items(viewer, after(0))
    session.stop()
    assert "the rest, from" in notices(found, "note")[0]["message"]


def test_frames_follow_the_clock(pipeline):
    """At 4 times the speed, 8 fps: chunks of 4 frames come 125 ms apart, not faster."""
    begun = time.monotonic()
    session, viewer = opened(pipeline, wish(speed=4.0, frames=33))
    made = chunks(items(viewer))
    assert 0.75 <= time.monotonic() - begun < 10  # the last chunk's first frame is due after 29/32 s
    due = np.diff([c.due for c in made])
    assert due[1:] == pytest.approx(0.125, abs=1e-6) or any(c.late for c in made)
    assert session.state == "ended"


def test_a_viewer_that_holds_is_waited_for(pipeline):
    session, viewer = opened(pipeline, wish(), Viewer(None, room=2))
    deadline = time.monotonic() + HANG
    while session.chunks < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert session.chunks == 2
    found = items(viewer, after(5))
    session.stop()
    assert (frames(found) == plain(pipeline, 6)).all()


def test_one_who_looks_on_slowly_misses_chunks_and_holds_nobody(pipeline):
    slow = Viewer("h264", holds=False, room=1)
    session, viewer = opened(pipeline, wish())
    session.watch(slow)
    found = items(viewer, after(6))
    first = slow.take(1.0)
    while not isinstance(first, Chunk):
        first = slow.take(1.0)
    found += items(viewer, after(10))
    later = slow.take(1.0)
    session.stop()
    assert (frames(found) == plain(pipeline, 11)).all()
    assert first.units[0].key
    assert later.units[0].key
    assert later.skipped == later.position - first.position - len(first.frames) > 0


def test_a_viewer_that_comes_later_begins_with_a_key_frame(pipeline):
    session, viewer = opened(pipeline, wish(), Viewer("h264", room=1))
    first = items(viewer, after(3))
    late = Viewer("h264", holds=False, room=100)
    session.watch(late)
    items(viewer, after(8))
    session.stop()
    seen = [item for item in iter(late.take, None) if isinstance(item, Chunk)]
    assert seen[0].number >= 3
    assert seen[0].units[0].key
    assert all(unit.key is False for chunk in chunks(first)[1:2] for unit in chunk.units)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(lifetime=0.3), "lifetime"), (Limits(idle=0.3), "idle"), (Limits(stall=0.3), "stalled"),
    ],
)  # fmt: skip
def test_limits_end_a_session(pipeline, limits, reason):
    session, viewer = opened(pipeline, wish(), Viewer(None, room=1), limits=limits)
    if reason == "stalled":
        assert session.join(HANG)
    assert notices(items(viewer), "done")[0]["reason"] == reason


def test_a_session_waits_for_its_viewer_and_then_ends(pipeline):
    session, viewer = opened(pipeline, wish(), limits=Limits(lease=3.0))
    found = items(viewer, after(2))
    session.leave(viewer)
    time.sleep(0.3)
    made = session.chunks
    again = Viewer(None)
    session.watch(again)
    found = items(again, after(made + 1))
    assert chunks(found)[0].number == made  # nothing was made while nobody looked
    session.leave(again)
    assert session.join(HANG)
    assert session.reason == "lease"


def test_a_stop_ends_it_within_a_chunk(pipeline):
    ended = []
    session, viewer = opened(pipeline, wish(), ended=ended)
    items(viewer, after(2))
    begun, before = time.monotonic(), session.chunks
    session.stop()
    assert session.join(HANG)
    assert session.chunks <= before + 1
    assert time.monotonic() - begun < 5
    assert ended == [session]
    assert notices(items(viewer), "done")[0]["reason"] == "stopped"


def test_a_failure_is_told_and_ends_only_its_session(pipeline, monkeypatch):
    _, other = opened(pipeline, wish(frames=25))
    session, viewer = opened(pipeline, wish(), Viewer(None, room=1))
    items(viewer, after(1))

    def fails():
        raise MemoryError("no room left")

    monkeypatch.setattr(session._video._stream, "next_chunk", fails)
    found = items(viewer)
    assert notices(found, "error")[0] == {"code": "out_of_memory", "message": "the video stopped: no room left"}
    assert notices(found, "done")[0]["reason"] == "failed"
    assert (frames(items(other)) == plain(pipeline, 7)).all()


def test_sessions_side_by_side_make_the_same_frames(pipeline):
    viewers = [opened(pipeline, wish(frames=21), parallel=parallel)[1] for parallel in (1, 2, 2)]
    expected = plain(pipeline, 6)
    assert all((frames(items(viewer)) == expected).all() for viewer in viewers)


def test_too_many_changes_are_refused(pipeline):
    session, _viewer = opened(pipeline, wish(), Viewer(None, room=1))

    def storm():
        for _ in range(MOST_CHANGES + 2):
            session.change(Change(paused=True))

    with session._place.turns.turn(0.0), pytest.raises(TooMany, match=f"got more than {MOST_CHANGES} changes"):
        storm()  # while the session cannot go on
    session.stop()
    assert session.join(HANG)


def test_threads_go_with_their_sessions(pipeline):
    before = threading.active_count()
    for _ in range(5):
        session, viewer = opened(pipeline, wish(frames=5))
        items(viewer)
        assert session.join(HANG)
    assert threading.active_count() <= before


def test_a_prompt_that_no_chunk_showed_is_no_start_of_a_transition(pipeline):
    """Nor does the history have it: the video is made again from what was shown."""
    session, viewer = opened(pipeline, wish(), Viewer(None, room=1))
    items(viewer, after(1))
    with session._place.turns.turn(0.0):  # both wait for the same chunk
        session.change(Change("unseen", words("a green triangle")))
        session.change(Change("e", words(OTHER), transition=2))
    found = items(viewer, after(8))
    session.stop()
    first = next(c.number for c in chunks(found) if "e" in c.started)
    old, new = pipeline.encode_prompt(PROMPT), pipeline.encode_prompt(OTHER)
    expected = plain(pipeline, 9, {first: torch.lerp(old, new, 0.5), first + 1: OTHER})
    shown = frames([c for c in chunks(found) if c.number >= first])
    assert (shown == expected[-len(shown) :]).all()
    assert [(past.chunk, past.change.event) for past in session.history] == [(first, "e")]


def test_a_prompt_that_fails_takes_no_earlier_one_out_of_the_history(pipeline, monkeypatch):
    asked = wish(history=(Past(1, Change("", words(OTHER))), Past(2, Change("", words(PROMPT)))))
    session, viewer = opened(pipeline, asked, Viewer(None, room=1))
    items(viewer, after(3))

    def fails(prompt, transition):
        raise FloatingPointError("no number")

    monkeypatch.setattr(session._video._stream, "set_prompt", fails)
    session.change(Change("e", words(OTHER)))
    found = items(viewer, lambda item: not isinstance(item, Chunk) and item.kind == "error")
    session.stop()
    assert notices(found, "error")[0]["event_id"] == "e"
    assert [(past.chunk, past.change.prompt) for past in session.history] == [(1, words(OTHER)), (2, words(PROMPT))]


def test_a_restart_while_a_chunk_is_coded_shows_nothing_of_it(pipeline, monkeypatch):
    """The chunk after it needs no picture that was not sent: it begins with a key frame."""
    session, viewer = opened(pipeline, wish(), Viewer("h264", room=1))
    code, restarted = session._coding.code, threading.Event()

    def slow(frames, position, codecs):
        coded = code(frames, position, codecs)
        if position > 8 and not restarted.is_set():
            session.change(Change("again", reset=True))
            restarted.set()
        return coded

    monkeypatch.setattr(session._coding, "code", slow)
    found = chunks(items(viewer, lambda item: isinstance(item, Chunk) and item.take == 1 and item.number == 2))
    session.stop()
    assert session.join(HANG)
    first = next(c for c in found if c.take == 1)
    assert first.units[0].key
    before = [c for c in found if c.take == 0]
    assert all(c.position <= 8 for c in before)
    assert first.position == sum(len(c.frames) for c in before)  # the one that was coded is not among them
    assert session.recording.read().count(b"moof") == session.chunks


def test_one_that_is_stopped_in_line_never_runs(pipeline):
    """The house starts it in the moment in which it is stopped: it ends once."""
    ended = []
    session, viewer = Session("one", place(pipeline, ended=ended), wish()), Viewer(None)
    session.watch(viewer)
    end = session._end

    def later(reason):
        session.start()  # as the house does, whose line it has not left
        end(reason)

    session._end = later
    session.stop()
    assert session.join(HANG)
    assert session.state == "ended"
    assert ended == [session]
    assert [one["reason"] for one in notices(items(viewer), "done")] == ["stopped"]
    assert viewer.take(0.2) is None


def test_a_stream_that_does_not_close_ends_its_session_all_the_same(pipeline, monkeypatch):
    ended = []
    session, viewer = opened(pipeline, wish(), Viewer(None, room=1), ended=ended)
    items(viewer, after(1))

    def fails():
        raise RuntimeError("a device that is gone")

    monkeypatch.setattr(session._video._stream, "close", fails)
    session.stop()
    assert session.join(HANG)
    assert (session.state, ended) == ("ended", [session])


def test_memory_goes_back_after_the_stream_has_closed(pipeline, monkeypatch):
    story = []
    session, viewer = opened(pipeline, wish(), Viewer(None, room=1))
    items(viewer, after(1))
    close = session._video._stream.close

    def fails():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(session._video._stream, "next_chunk", fails)
    monkeypatch.setattr(session._video._stream, "close", lambda: (story.append("closed"), close()))
    free = session._place.turns
    monkeypatch.setattr("serve.core.video._release", lambda: story.append(("released", free._free)))
    items(viewer)
    assert session.join(HANG)
    assert story == ["closed", ("released", 0)]  # within a turn: no other session captures graphs meanwhile


def test_an_ended_session_keeps_no_picture_and_no_encoder(pipeline):
    clip = np.zeros((1, pipeline.height, pipeline.width, 3), np.uint8)
    session, viewer = opened(pipeline, wish(frames=5, clip=clip), Viewer("h264"))
    items(viewer)
    assert session.join(HANG)
    assert session._video.wish.clip is None
    assert session._coding._encoders == {}
    assert session.recording.read()


def test_frames_are_due_at_the_speed_of_their_chunk(pipeline):
    """Those that wait keep their times when the speed changes."""
    session, viewer = opened(pipeline, wish(speed=4.0))
    chunk = chunks(items(viewer, after(1)))[-1]
    session.change(Change(speed=0.5))
    items(viewer, lambda item: isinstance(item, Chunk) and item.speed == 0.5)
    assert session.frame_due(chunk, 2) == pytest.approx(chunk.due + 2 / 32)
    session.stop()
