"""Streams of every kind do the same: frames in order, serials, cancel, flush, close, and the same errors."""

import inspect
import random
import sys
import threading
import time

import numpy as np
import pytest
import torch
from limits import HANG

from engine.bundles.native import NativePipeline, NativeStream
from engine.runtime.streams import Cancelled, Serial, Stream
from engine.stream import Pipeline, PythonStream

PROMPT, OTHER = "a red circle moving right", "a blue square on gray"
CLOSED = "stream: got a closed one, expected an open one"
BUSY = "stream: got a call while another one runs, expected one at a time"
MEMBERS = sorted(name for name in vars(Stream) if not name.startswith("_") or name in ("__next__", "__anext__"))


def chunks_of(pipeline, count, prompt=PROMPT, **options):
    with pipeline.stream(prompt, seed=3, **options) as stream:
        return [stream.next_chunk() for _ in range(count)]


def same(got, expected):
    assert [x.shape for x in got] == [x.shape for x in expected]
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("stream", [PythonStream, NativeStream])
@pytest.mark.parametrize("name", [name for name in MEMBERS if callable(getattr(Stream, name))])
def test_arguments_are_those_of_the_protocol(stream, name):
    ours, protocols = (inspect.signature(getattr(kind, name)).parameters for kind in (stream, Stream))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in protocols.values()]


@pytest.mark.parametrize("name", ["stream", "encode_prompt", "encode_clip", "warm"])
def test_arguments_of_pipelines_are_the_same(name):
    ours, others = (inspect.signature(getattr(kind, name)).parameters for kind in (Pipeline, NativePipeline))
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in others.values()
    ]


def test_all_members_are_there(any_pipeline):
    with any_pipeline.stream(PROMPT) as stream:
        assert {"cancel", "flush", "serial", "limit", "rest"} <= {*MEMBERS, "limit"}
        assert all(hasattr(stream, name) for name in [*MEMBERS, "limit"])


def test_serials(any_pipeline):
    with any_pipeline.stream(PROMPT) as stream:
        assert stream.serial is None
        stream.next_chunk()
        assert stream.serial == Serial(0, 0, 0)
        assert stream.set_prompt(OTHER) == 1
        assert stream.serial == Serial(0, 0, 0)  # of what was returned
        assert next(stream).ndim == 3
        assert stream.serial == Serial(1, 1, 1)
        next(stream)
        assert stream.serial == Serial(2, 1, 1)
        stream.set_prompt(PROMPT)
        assert stream.set_prompt(OTHER, recommit=False) == 3
        assert len(stream.next_chunk()) == 2
        assert stream.serial == Serial(3, 1, 1)
        stream.next_chunk()
        assert stream.serial == Serial(5, 2, 3)
        stream.flush()
        assert stream.serial == Serial(5, 2, 3)
        stream.next_chunk()
        assert stream.serial == Serial(0, 0, 3)
    assert stream.serial == Serial(0, 0, 3)


def test_frames_come_in_order(any_pipeline):
    expected = np.concatenate(chunks_of(any_pipeline, 6))
    with any_pipeline.stream(PROMPT, seed=3) as stream:
        got = [next(stream)[None], next(stream)[None], next(stream)[None], stream.next_chunk(), stream.next_chunk()]
        got += [next(stream)[None], stream.rest(), stream.rest(), stream.next_chunk()]
        assert [len(x) for x in got] == [1, 1, 1, 2, 4, 1, 3, 0, 4]
        assert (stream.emitted, stream.handed, stream.serial.frame) == (4, 9, 13)
    same(np.concatenate(got), expected[:17])


def test_a_limit_is_for_the_iterator(any_pipeline):
    with any_pipeline.stream(PROMPT, seed=3, frames=7) as stream:
        assert (len(list(stream)), stream.emitted, stream.limit) == (7, 7, 7)
        with pytest.raises(StopIteration):
            next(stream)
        stream.flush()
        assert (stream.emitted, len(list(stream))) == (0, 7)


# --- cancel


def test_a_cancel_acts_once_and_loses_nothing(any_pipeline):
    expected = chunks_of(any_pipeline, 4)
    with any_pipeline.stream(PROMPT, seed=3) as stream:
        got = []
        for call in (stream.next_chunk, stream.next_chunk, stream.__next__):
            stream.cancel()
            stream.cancel()
            with pytest.raises(Cancelled, match=r"^stream: cancelled$"):
                call()
            got.append(call())
        got += [stream.next_chunk(), stream.next_chunk()]
    same(np.concatenate([x if x.ndim == 4 else x[None] for x in got]), np.concatenate(expected))


def test_frames_that_are_decoded_are_not_cancelled(any_pipeline):
    with any_pipeline.stream(PROMPT) as stream:
        stream.next_chunk()
        next(stream)
        stream.cancel()
        assert len(stream.rest()) == 3
        with pytest.raises(Cancelled):
            next(stream)


def test_cancels_from_another_thread_lose_nothing(any_pipeline):
    over, until = threading.Event(), time.monotonic() + 10
    with any_pipeline.stream(PROMPT, seed=3) as stream:
        draw = random.Random(1)

        def bother():
            while not over.wait(draw.uniform(0, 2e-3)):
                stream.cancel()

        thread, got, cancelled = threading.Thread(target=bother), [], 0
        thread.start()
        try:
            while len(got) < 24 or (not cancelled and time.monotonic() < until):
                try:
                    got.append(stream.next_chunk())
                except Cancelled:
                    cancelled += 1
                    if cancelled > 200:
                        over.set()
        finally:
            over.set()
            thread.join()
    assert cancelled
    same(got, chunks_of(any_pipeline, len(got)))


class Held:
    """Waits in the middle of a chunk until the test lets it go, and counts the steps that are made."""

    def __init__(self, stages, monkeypatch):
        self.inside, self.go, self.steps = threading.Event(), threading.Event(), 0
        run = stages.run

        def held(step, cache, text_kv):
            if step.kind.timed:
                self.steps += 1
                self.inside.set()
                assert self.go.wait(HANG)
            return run(step, cache, text_kv)

        monkeypatch.setattr(stages, "run", held)


@pytest.mark.parametrize("way", ["cancel", "close"])
def test_a_call_that_runs_ends_within_a_step(any_pipeline, kind, monkeypatch, way):
    if kind == "native":
        pytest.skip("csrc/tests/session_test.cpp cancels the core at every graph")
    stream, caught = any_pipeline.stream(PROMPT, seed=3), []
    expected = chunks_of(any_pipeline, 1)
    held = Held(any_pipeline.stages, monkeypatch)

    def call():
        try:
            stream.next_chunk()
        except (Cancelled, ValueError) as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert held.inside.wait(HANG)
    getattr(stream, way)()
    held.go.set()
    thread.join(HANG)
    assert held.steps == 1
    assert str(caught[0]) == ("stream: cancelled" if way == "cancel" else CLOSED)
    if way == "cancel":
        same([stream.next_chunk()], expected)
    else:
        assert stream.state is None


# --- flush


@pytest.mark.parametrize("before", [0, 1, 3, 7])
def test_flush_starts_over(any_pipeline, before):
    expected = chunks_of(any_pipeline, 6)
    with any_pipeline.stream(PROMPT, seed=3) as stream:
        for _ in range(before):
            stream.next_chunk()
            next(stream)
        stream.cancel()
        stream.flush()
        assert len(stream.rest()) == 0
        same([stream.next_chunk() for _ in range(6)], expected)


@pytest.mark.parametrize("recommit", [True, False])
@pytest.mark.parametrize("shown", [True, False])
def test_flush_keeps_the_last_prompt(any_pipeline, recommit, shown):
    expected = chunks_of(any_pipeline, 5, OTHER)
    with any_pipeline.stream(PROMPT, seed=3) as stream:
        for _ in range(5):
            stream.next_chunk()
        stream.set_prompt(OTHER, recommit)
        if shown:
            stream.next_chunk()
        stream.flush()
        same([stream.next_chunk() for _ in range(5)], expected)


def test_flush_drops_a_clip(any_pipeline):
    size = any_pipeline.height, any_pipeline.width, 3
    clip = np.random.default_rng(1).integers(0, 256, (9, *size), np.uint8)
    expected, began = chunks_of(any_pipeline, 5), chunks_of(any_pipeline, 5, clip=clip)
    assert not np.array_equal(expected[0], began[0])
    for made in (0, 1, 4):
        with any_pipeline.stream(PROMPT, seed=3, clip=clip) as stream:
            same([stream.next_chunk() for _ in range(made)], began[:made])
            stream.flush()
            same([stream.next_chunk() for _ in range(5)], expected)


# --- threads


@pytest.mark.parametrize("call", ["next_chunk", "__next__", "rest"])
def test_a_second_thread_gets_an_error(any_pipeline, call):
    """Whoever asks first gets the frames, the other one is told; no frame is lost or comes twice."""
    stream, got, refused, before = any_pipeline.stream(PROMPT, seed=3), [], [], sys.getswitchinterval()

    def take(name):
        until = time.monotonic() + 30
        while time.monotonic() < until and not (refused and len(got) >= 30):
            try:
                frames = getattr(stream, name)()
                got.extend(frames if frames.ndim == 4 else [frames])
            except ValueError as error:
                refused.append(str(error))

    sys.setswitchinterval(1e-5)  # so that calls overlap
    try:
        threads = [threading.Thread(target=take, args=(name,)) for name in ("next_chunk", call)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG)
    finally:
        sys.setswitchinterval(before)
    got.extend(stream.rest())
    assert set(refused) == {BUSY}
    expected = np.concatenate(chunks_of(any_pipeline, 2 + len(got) // 4))[: len(got)]
    assert sorted(frame.tobytes() for frame in got) == sorted(frame.tobytes() for frame in expected)


@pytest.mark.parametrize("call", ["next_chunk", "__next__", "rest", "flush", "next_latent"])
def test_a_call_inside_a_call_is_refused(any_pipeline, kind, monkeypatch, call):
    """As from a signal handler in the middle of a chunk."""
    if kind == "native":
        pytest.skip("no Python runs inside a call of the core")
    stream, run, said = any_pipeline.stream(PROMPT), any_pipeline.stages.run, []

    def inside(*arguments):
        with pytest.raises(ValueError, match=BUSY) as raised:
            getattr(stream, call)()
        said.append(str(raised.value))
        return run(*arguments)

    monkeypatch.setattr(any_pipeline.stages, "run", inside)
    stream.next_chunk()
    assert set(said) == {BUSY}


def test_a_prompt_is_set_while_a_chunk_is_made(any_pipeline):
    stream, over, numbers = any_pipeline.stream(PROMPT, seed=3), threading.Event(), []

    def switch():
        while not over.is_set():
            numbers.append(stream.set_prompt((PROMPT, OTHER)[len(numbers) % 2]))
            time.sleep(1e-3)

    thread, shown = threading.Thread(target=switch), []
    thread.start()
    try:
        while thread.is_alive() and not numbers:
            time.sleep(1e-3)
        for _ in range(30):
            stream.next_chunk()
            shown.append(stream.serial.prompt)
    finally:
        over.set()
        thread.join()
    stream.next_chunk()
    assert numbers == list(range(1, len(numbers) + 1))
    assert shown == sorted(shown)
    assert shown[-1] > 0
    assert stream.serial.prompt == numbers[-1]
    # What threads set is what a stream that was told in time shows.
    stream.flush()
    last = (PROMPT, OTHER)[(len(numbers) - 1) % 2]
    same([stream.next_chunk() for _ in range(3)], chunks_of(any_pipeline, 3, last))


# --- the end, and errors


def test_numbers_of_prompts_grow_whichever_thread_is_faster(any_pipeline, kind):
    """The number that was given last is that of the prompt that counts."""
    if kind == "native":
        pytest.skip("the core counts under a lock of its own")
    stream, other = any_pipeline.stream(PROMPT), threading.Event()

    class Numbers:
        given = 0

        def __next__(self):
            self.given += 1
            mine = self.given
            if mine == 1:
                other.wait(0.5)  # a second thread that could come in between would be done by then
            return mine

    stream._numbers = Numbers()
    first = threading.Thread(target=stream.set_prompt, args=(OTHER,))
    first.start()
    while not stream._numbers.given:
        time.sleep(1e-3)
    assert stream.set_prompt(PROMPT) == 2
    other.set()
    first.join(HANG)
    stream.next_chunk()
    assert stream.serial.prompt == 2


def test_a_closed_stream(any_pipeline):
    stream = any_pipeline.stream(PROMPT)
    stream.next_chunk()
    stream.close()
    stream.close()
    stream.cancel()
    calls = (stream.next_chunk, stream.rest, stream.flush, lambda: stream.set_prompt(OTHER))
    for call in calls:
        with pytest.raises(ValueError, match=f"^{CLOSED}$"):
            call()
    with pytest.raises(StopIteration):
        next(stream)
    assert stream.last is not None


def forever(stream):
    while True:
        stream.next_chunk()


def test_closing_from_another_thread(any_pipeline):
    for wait in np.linspace(0, 5e-3, 12):
        stream = any_pipeline.stream(PROMPT)
        thread = threading.Thread(target=lambda s=stream, w=wait: (time.sleep(w), s.close()))
        thread.start()
        with pytest.raises(ValueError, match=f"^{CLOSED}$"):
            forever(stream)
        thread.join()


BAD = {
    r"frames: got 0, expected at least 1": {"frames": 0},
    r"seed: got -1, expected 0 to 2\^64 - 1": {"seed": -1},
    r"clip: got uint8 \[1, 3, 3, 3\], expected uint8 \[T, \d+, \d+, 3\]": {"clip": np.zeros((1, 3, 3, 3), np.uint8)},
    r"latents: got \[1, 2, 3, 4, 5\], expected \[1, \d+, F, \d+, \d+\]": {"latents": torch.zeros(1, 2, 3, 4, 5)},
    r"prompt: got .*, expected ": {"prompt": "\u200b"},
    r"prompt: got an embedding \[1, 2, 3\], expected \[": {"prompt": torch.zeros(1, 2, 3)},
}  # fmt: skip


@pytest.mark.parametrize("said", BAD)
def test_bad_input_is_said_in_the_same_words(any_pipeline, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        any_pipeline.stream(**{"prompt": PROMPT, **BAD[said]})
    if "prompt" in BAD[said]:
        with any_pipeline.stream(PROMPT) as stream, pytest.raises(ValueError, match=f"^{said}"):
            stream.set_prompt(BAD[said]["prompt"])


def test_adapters_of_none_are_refused(any_pipeline):
    with (
        any_pipeline.stream(PROMPT) as stream,
        pytest.raises(ValueError, match=r"^adapters: got a pipeline without any"),
    ):
        stream.set_adapters({"style": 1.0})


def test_what_only_python_can_do(formulas):
    clip = np.zeros((1, formulas.height, formulas.width, 3), np.uint8)
    calls = {
        "encode_prompt": lambda: formulas.encode_prompt(PROMPT),
        "encode_clip": lambda: formulas.encode_clip(clip),
        "next_latent": lambda: formulas.stream(PROMPT).next_latent(),
        "noise": lambda: formulas.stream(PROMPT, noise=object()),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^native: got {name}, expected a backend whose loop runs in Python$"):
            call()
