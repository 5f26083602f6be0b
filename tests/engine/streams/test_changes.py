"""Seed, steps and window that change while a stream runs: as a stream that was opened that way makes its chunks."""

import threading
import time
from dataclasses import replace

import fake_stages
import numpy as np
import pytest
import torch

from engine.config import Preset
from engine.presets import override
from engine.runtime.streams import Cancelled
from engine.sampling.noise import PhiloxNoise, ReplayNoise

PROMPT, OTHER = "a red circle moving right", "a blue square on gray"
FEW = (1000.0, 400.0)


class TwoSeeds:
    """The noise of seed 3, and from chunk `at` on of another one."""

    def __init__(self, other, at):
        self.sources, self.at = (PhiloxNoise(3), PhiloxNoise(other)), at

    def draw(self, chunk, count, shape):
        return self.sources[chunk >= self.at].draw(chunk, count, shape)


def told(pipeline, count, changes=None, cancels=False, ahead=False, **options):
    """The chunks of a stream; `changes`: the arguments of `change` before a chunk, by its number."""
    made = []
    with pipeline.stream(PROMPT, **({"seed": 3} | options)) as stream:
        stream.looks_ahead = ahead
        for number in range(count):
            if number in (changes or {}):
                stream.change(**changes[number])
            if cancels:
                stream.cancel()
                with pytest.raises(Cancelled):
                    stream.next_chunk()
            made.append(stream.next_chunk())
    return made


def same(got, expected, most=0):
    for number, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        assert np.abs(mine.astype(int) - theirs).max() <= most, number


@pytest.fixture(scope="module")
def plain(any_pipeline, kind):
    """(a pipeline whose loop runs in Python, how far its frames may be from those of any_pipeline)"""
    if kind != "native":
        return any_pipeline, 0
    return fake_stages.fake_pipeline(Preset("greedy", shift=2.0, solver="euler", max_position=4)), 1


def preset_of(pipeline, **fields):
    return replace(pipeline, preset=override(pipeline.preset, fields))


@pytest.mark.parametrize("at", [0, 1, 4])
def test_the_next_chunks_have_the_noise_of_the_new_seed(any_pipeline, plain, at):
    python, most = plain
    got = told(any_pipeline, at + 4, {at: {"seed": 2**64 - 5}})
    same(got, told(python, at + 4, noise=TwoSeeds(2**64 - 5, at)), most)
    assert not np.array_equal(got[at], told(any_pipeline, at + 1)[at])


@pytest.mark.parametrize("at", [0, 1, 4])
@pytest.mark.parametrize("steps", [(FEW,), FEW, "1000,400", [[1000, 400]]], ids=str)
def test_the_next_chunks_take_the_new_steps(any_pipeline, plain, at, steps):
    python, most = plain
    rows = (*python.preset.steps * at, FEW)
    got = told(any_pipeline, at + 4, {at: {"steps": steps}})
    same(got, told(preset_of(python, steps=rows), at + 4), most)
    assert not np.array_equal(got[at], told(any_pipeline, at + 1)[at])


def test_rows_of_steps_count_from_chunk_0(any_pipeline, plain):
    python, most = plain
    rows = ((1000.0,), FEW, (1000.0, 700.0, 300.0), (1000.0, 500.0))
    got = told(any_pipeline, 6, {1: {"steps": rows}})
    expected = (python.preset.steps[0], *rows[1:])
    same(got, told(preset_of(python, steps=expected), 6), most)


def test_both_at_once_and_more_than_once(any_pipeline, plain):
    python, most = plain
    changes = {1: {"seed": 8}, 3: {"seed": 9, "steps": FEW}, 5: {"seed": 3, "steps": python.preset.steps}}

    class Seeds:
        def draw(self, chunk, count, shape):
            seed = 3 if chunk < 1 or chunk > 4 else 8 if chunk < 3 else 9
            return PhiloxNoise(seed).draw(chunk, count, shape)

    rows = (*python.preset.steps * 3, FEW, FEW, *python.preset.steps)
    same(told(any_pipeline, 8, changes), told(preset_of(python, steps=rows), 8, noise=Seeds()), most)


def test_of_several_changes_before_a_chunk_each_field_has_the_last(any_pipeline):
    with any_pipeline.stream(PROMPT, seed=3) as stream:
        got = [stream.next_chunk()]
        stream.change(seed=7)
        stream.change(steps=(1000.0,))
        stream.change(seed=9)
        stream.change(steps=FEW)
        got += [stream.next_chunk() for _ in range(3)]
    same(got, told(any_pipeline, 4, {1: {"seed": 9, "steps": FEW}}))


def test_calls_that_are_cancelled_repeat_the_change(any_pipeline):
    changes = {1: {"seed": 8}, 3: {"steps": FEW}}
    same(told(any_pipeline, 6, changes, cancels=True), told(any_pipeline, 6, changes))


def test_a_flush_keeps_what_was_changed(any_pipeline, plain):
    python, most = plain
    with any_pipeline.stream(PROMPT, seed=3) as stream:
        for _ in range(3):
            stream.next_chunk()
        stream.change(seed=9, steps=FEW)
        stream.flush()
        got = [stream.next_chunk() for _ in range(4)]
    same(got, told(preset_of(python, steps=(FEW,)), 4, seed=9), most)


NUMBERS = r"seed: got .*, expected 0 to 2\^64 - 1"
WRONG = [
    ({}, "change: got nothing, expected seed"),
    *(({"seed": seed}, NUMBERS) for seed in (-1, 2**64, 1.5, "7", True, float("nan"))),
    *(({"steps": steps}, "preset: .*steps.*expected ")
      for steps in ((), ((),), (50.0,), (500, 700), (1000, 0), (1000.5,), (1000, 300.5), "x", "", [[1000], []], 5,
                    (float("nan"),), (1000, "x"))),
    ({"seed": 5, "steps": (1.0,)}, "preset: "),
    ({"seed": -5, "steps": FEW}, NUMBERS),
    ({"seed": 5, "window": 10**6}, "window: got 1000000, expected "),
    *(({"window": window, "seed": 7}, "(preset: |)(got |)window.*expected ")
      for window in (0, -1, 1.5, "3", 10**30)),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "said"), WRONG, ids=str)
def test_what_cannot_change_is_said_and_nothing_changes(any_pipeline, asked, said):
    with any_pipeline.stream(PROMPT, seed=3) as stream:
        got = [stream.next_chunk(), stream.next_chunk()]
        with pytest.raises(ValueError, match=f"^{said}") as raised:
            stream.change(**asked)
        assert "\n" not in str(raised.value)
        got += [stream.next_chunk(), stream.next_chunk()]
    same(got, told(any_pipeline, 4))
    with pytest.raises(ValueError, match=r"^stream: got a closed one, expected an open one$"):
        stream.change(seed=1)


def test_a_source_of_noise_has_no_seed(any_pipeline, kind):
    if kind == "native":
        pytest.skip("the core draws the noise itself")
    shape = any_pipeline.stream(PROMPT).state.geometry
    draws = torch.zeros(1, shape.channels, 1, shape.height, shape.width)
    with any_pipeline.stream(PROMPT, noise=ReplayNoise({(0, 0): draws})) as stream:
        with pytest.raises(ValueError, match=r"^seed: got 5, expected none: the stream was opened with a source of"):
            stream.change(seed=5)
        stream.next_chunk()


def test_the_core_keeps_its_window(any_pipeline, kind):
    if kind != "native":
        pytest.skip("Python limits the ring")
    with (
        any_pipeline.stream(PROMPT) as stream,
        pytest.raises(ValueError, match=r"^window: got 2, expected none: the C\+\+ core keeps that of the bundle"),
    ):
        stream.change(window=2)


def test_a_stream_that_looks_ahead_changes_the_same(any_pipeline, kind):
    """What was made ahead had the old seed, steps or window."""
    if kind == "native":
        pytest.skip("the core makes a chunk when it is asked for")
    changes = {2: {"seed": 9}, 4: {"steps": FEW}, 6: {"window": 2}, 8: {"window": 4, "seed": 1}}
    same(told(any_pipeline, 11, changes, ahead=True), told(any_pipeline, 11, changes))


def test_a_smaller_window_is_what_the_passes_read(any_pipeline, kind, monkeypatch):
    """Also of a bundle, whose graphs take the number of valid rows."""
    if kind == "native":
        pytest.skip("the core keeps its window")
    read, run = [], any_pipeline.stages.run

    def noted(step, cache, text_kv):
        if step.kind.graph == "etm":
            read.append(step.valid)
        return run(step, cache, text_kv)

    monkeypatch.setattr(any_pipeline.stages, "run", noted)
    told(any_pipeline, 10, {5: {"window": 2}, 8: {"window": 4}})
    # One pass per chunk, from chunk 0's; after a change those of the window first.
    assert read == [1, 2, 3, 4, *(1, 2), 2, 2, 2, *(1, 2, 3, 4), 4, 4]


def test_any_thread_may_change_at_any_time(any_pipeline):
    stream, over, count = any_pipeline.stream(PROMPT, seed=3), threading.Event(), [0]

    def bother():
        while not over.is_set():
            count[0] += 1
            stream.change(seed=count[0], steps=((1000.0,), FEW)[count[0] % 2])
            time.sleep(1e-3)

    thread = threading.Thread(target=bother)
    thread.start()
    try:
        for _ in range(20):
            stream.next_chunk()
    finally:
        over.set()
        thread.join()
    assert count[0] > 1
    stream.flush()
    got = [stream.next_chunk() for _ in range(3)]
    same(got, told(any_pipeline, 3, {0: {"seed": count[0], "steps": ((1000.0,), FEW)[count[0] % 2]}}))
