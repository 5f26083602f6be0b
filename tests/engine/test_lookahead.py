"""A stream that makes its next latent while the last one is shown gives the frames of one that waits."""

import asyncio
import threading
from itertools import islice

import numpy as np
import pytest

from engine.runtime.streams import Cancelled
from engine.runtime.transfer import Download

PROMPT, OTHER = "a red circle moving right", "a blue square on gray"
FAMILIES = pytest.mark.parametrize("family", ["pipeline", "causal"])


def stream_of(pipeline, ahead, **options):
    stream = pipeline.stream(PROMPT, **options)
    assert not stream.looks_ahead  # a processor makes one thing at a time
    stream.looks_ahead = ahead
    return stream


@FAMILIES
@pytest.mark.parametrize("given", [False, True])
def test_frames_are_the_same(request, family, given):
    pipeline = request.getfixturevalue(family)
    clip = pipeline.stream(OTHER, frames=21)
    options = {"clip": np.stack(list(clip))} if given else {}
    runs = [list(stream_of(pipeline, ahead, frames=30, **options)) for ahead in (False, True)]
    assert np.array_equal(*runs)


@FAMILIES
def test_a_new_prompt_holds_from_the_next_chunk_on(request, family):
    pipeline = request.getfixturevalue(family)
    runs = []
    for ahead in (False, True):
        with stream_of(pipeline, ahead) as stream:
            frames = list(islice(stream, 20))
            stream.set_prompt(OTHER)
            runs.append([*frames, *islice(stream, 20)])
    assert np.array_equal(*runs)


def test_latents_continue_where_frames_stopped(pipeline):
    latents = []
    for ahead in (False, True):
        with stream_of(pipeline, ahead) as stream:
            for _ in range(3):
                stream.next_chunk()
            latents.append(stream.next_latent().numpy())
    assert np.array_equal(*latents)


def test_nothing_is_made_beyond_the_limit_nor_before_the_first_chunk_is_out(pipeline):
    with stream_of(pipeline, True, frames=9) as stream:
        next(stream)
        assert stream._ahead is None
        assert stream.state.index == 0
        first_chunk = 1 if stream._now.rest is None else len(stream._now.rest[0])
        list(islice(stream, first_chunk))
        assert stream._ahead is not None or stream._now.started >= 9
        list(stream)
        assert stream._ahead is None


@FAMILIES
def test_a_chunk_that_fails_ahead_fails_in_its_own_call_and_can_be_made_again(request, family, monkeypatch):
    pipeline = request.getfixturevalue(family)
    expected = list(stream_of(pipeline, False, frames=40))
    stream = stream_of(pipeline, True, frames=40)
    frames = list(islice(stream, 14))
    real = type(pipeline.generator).denoise

    def fail(*_, **__):
        raise RuntimeError("out of something")

    monkeypatch.setattr(type(pipeline.generator), "denoise", fail)
    with pytest.raises(RuntimeError, match="out of something"):
        frames.extend(stream)  # what was made ahead is still shown
    assert 14 < len(frames) < 40
    monkeypatch.setattr(type(pipeline.generator), "denoise", real)
    assert np.array_equal([*frames, *stream], expected)


@FAMILIES
@pytest.mark.parametrize("ahead", [False, True])
def test_a_chunk_whose_wait_is_interrupted_is_handed_over_by_the_next_call(request, family, ahead, monkeypatch):
    """On a GPU the host spends most of its time there, so that is where Ctrl-C arrives."""
    pipeline = request.getfixturevalue(family)
    expected = list(stream_of(pipeline, False, frames=30))
    real, calls = Download.wait, []

    def wait(self):
        calls.append(self)
        if len(calls) in (1, 3, 4):
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Download, "wait", wait)
    frames, interrupts = [], 0
    stream = stream_of(pipeline, ahead, frames=30)
    while len(frames) < 30:
        try:
            frames.extend(stream)
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 3
    assert np.array_equal(frames, expected)


@FAMILIES
@pytest.mark.parametrize("way", ["task", "flush", "cancel"])
def test_a_cancel_that_comes_while_it_looks_ahead(request, family, way, monkeypatch):
    """The call has its frames. A cancelled task and a flush leave no cancel behind; a cancel acts on the next call."""
    pipeline, came = request.getfixturevalue(family), threading.Event()
    expected = list(stream_of(pipeline, False, frames=30))
    stream, frames = stream_of(pipeline, True), []
    real, cancel = type(stream)._look_ahead, type(stream).cancel

    def look_ahead(self):
        if way != "task":
            self.cancel()
        elif not came.is_set():
            loop.call_soon_threadsafe(task.cancel)
            assert came.wait(60)
        came.set()
        real(self)

    monkeypatch.setattr(type(stream), "_look_ahead", look_ahead)
    monkeypatch.setattr(type(stream), "cancel", lambda self: (cancel(self), came.set()))

    async def take():
        async for frame in stream:
            frames.append(frame)

    async def main():
        nonlocal loop, task
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(take())
        await asyncio.wait([task])

    loop = task = None
    if way == "task":
        asyncio.run(main())
        assert task.cancelled()
    while not came.is_set():
        frames.append(next(stream))
    monkeypatch.undo()
    if way == "flush":
        stream.flush()
        frames = []
    if way == "cancel":
        with pytest.raises(Cancelled):
            frames.extend(stream)
    frames.extend(islice(stream, 30 - len(frames)))
    assert np.array_equal(frames, expected)
