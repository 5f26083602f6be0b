"""A stream that is interrupted anywhere goes on with the frames of one that was not."""

import asyncio
import random
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from dense_streams import joined
from faults import ENGINE, LOOP, Interrupted, events_of, plain, same, spread, stumbling
from limits import HANG
from tiny import HEIGHT, WIDTH

import engine
from engine.presets import override
from engine.runtime.cuda_graphs import GraphedStages
from engine.runtime.handover import Turns
from engine.runtime.stages import TorchStages
from engine.runtime.transfer import Download
from engine.sampling.noise import DrawnAhead, PhiloxNoise

PROMPT, OTHERS = "a red circle moving right", ("a blue square on gray", "a red square")
FIELDS = {
    "greedy": ("greedy", {}),
    "greedy-chunks": ("greedy", {"chunk": 2, "window": 6, "max_position": 5}),
    "self-forcing": ("self-forcing", {"window": 7, "steps": ((1000, 500),)}),
    "longlive": ("longlive", {"window": 6, "attn_sink": 3, "steps": ((1000, 500),)}),
    "diagonal": ("diagonal", {"window": 6}),
    "uncommitted": ("self-forcing", {"chunk": 1, "window": 3, "commit": "none", "steps": ((1000, 500),)}),
    "first-chunk": ("ffe-2step", {"window": 7}),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(model_dir):
    """Pipelines by a name of FIELDS."""
    kept = {}

    def of(name):
        if name not in kept:
            preset, fields = FIELDS[name]
            kept[name] = engine.load(model_dir, preset=preset, overrides=fields)
        return kept[name]

    return of


def clip(frames=5):
    return np.random.default_rng(2).integers(0, 256, (frames, HEIGHT, WIDTH, 3), dtype=np.uint8)


def chunk(stream):
    return stream.next_chunk()


def latent(stream):
    return stream.next_latent()


def switch(number, recommit=True):
    return lambda stream: stream.set_prompt(OTHERS[number], recommit)


ROUND = [chunk, chunk, switch(0), chunk, next, next, latent, chunk, switch(1, False), next, chunk, chunk, next, next]


def stream_of(pipeline, **options):
    ahead = options.pop("ahead", False)
    stream = pipeline.stream(PROMPT, seed=3, **options)
    stream.looks_ahead = ahead
    return stream


def interrupted_everywhere(pipeline, steps, seed=0, **options):
    expected = plain(stream_of(pipeline, **options), steps)
    assert all((a != b).any() for a, b in pairwise(expected) if a.shape == b.shape and a.ndim > 1)
    counted = stream_of(pipeline)
    counted.next_chunk()
    points = spread(len(steps), counted.next_chunk, seed)
    got, interrupts = stumbling(stream_of(pipeline, **options), steps, points)
    same(got, expected)
    assert interrupts > len(steps) / 3


@pytest.mark.parametrize("name", FIELDS)
def test_every_call_is_interrupted(made, name):
    """In each call once in the loop and once anywhere; over all calls at lines spread over a call."""
    interrupted_everywhere(made(name), ROUND * 2)


@pytest.mark.parametrize("name", ["greedy-chunks", "longlive"])
def test_a_stream_that_starts_from_a_clip(made, name):
    interrupted_everywhere(made(name), [chunk, chunk, next, latent, chunk, switch(0), chunk, chunk] * 2, clip=clip(25))


@pytest.mark.parametrize(("name", "noise_scale"), [("greedy-chunks", None), ("longlive", 0.3)])
def test_a_stream_that_follows_a_source(made, name, noise_scale):
    """Frames that were taken are kept, and encoded again with the same result."""
    steps = [chunk, chunk, next, latent, switch(0), chunk, chunk, next]
    interrupted_everywhere(made(name), steps, source=clip(81), strength=0.9, noise_scale=noise_scale)


@pytest.mark.parametrize("name", ["greedy", "greedy-chunks", "first-chunk"])
def test_passes_that_are_joined(made, name):
    """Greedy rings have room for both; a causal ring too, until it is full."""
    pipeline = joined(made(name))
    if name == "first-chunk":
        pipeline = replace(pipeline, preset=override(pipeline.preset, {"window": 200}))
    interrupted_everywhere(pipeline, [step for step in ROUND if step is not latent] * 2)


@pytest.mark.parametrize("name", ["greedy", "self-forcing", "diagonal"])
def test_a_stream_that_looks_ahead(made, name):
    """As on a GPU: the next latent is made before the frames are handed over, its noise on another thread."""
    with ThreadPoolExecutor(1) as worker:
        steps = [chunk, chunk, switch(0), chunk, next, next, next, chunk, switch(1), chunk, chunk, next, latent] * 2
        pipeline = made(name)
        expected = plain(stream_of(pipeline, ahead=True), steps)
        counted = stream_of(pipeline, ahead=True)
        counted.next_chunk()
        points = spread(len(steps), counted.next_chunk)
        stream = stream_of(pipeline, ahead=True, noise=DrawnAhead(PhiloxNoise(3), worker))
        got, interrupts = stumbling(stream, steps, points)
        same(got, expected)
        assert interrupts > len(steps) / 3


@pytest.mark.parametrize("name", ["greedy", "diagonal"])
def test_single_instructions(made, name):
    """Between a call's last instruction and the caller's assignment, `handed` and `last` tell what was handed over."""
    steps = [chunk] * 40
    expected, counted, draw = plain(stream_of(made(name)), steps), stream_of(made(name)), random.Random(1)
    plain(counted, [chunk] * 6)
    last = events_of(counted.next_chunk, places=LOOP, opcodes=True)
    near_the_end = lambda number: [(last - number, LOOP), (draw.randrange(1, last), LOOP)]  # noqa: E731
    got, interrupts = stumbling(stream_of(made(name)), steps, near_the_end, opcodes=True)
    same(got, expected)
    assert interrupts > len(steps) / 3


def test_the_embedded_model():
    for preset in ("greedy", "longlive"):
        interrupted_everywhere(engine.load(preset=preset), [chunk, switch(0), chunk, next, latent, chunk])


@pytest.mark.parametrize("name", ["greedy", "self-forcing"])
def test_the_constructor(made, name):
    """An interrupted one leaves the pipeline as it was."""
    pipeline = made(name)
    steps = [chunk, chunk]
    expected = plain(stream_of(pipeline, clip=clip()), steps)
    fresh = lambda: replace(pipeline)  # nothing is cached in it yet  # noqa: E731
    lines = events_of(lambda: stream_of(fresh(), clip=clip()), places=LOOP)
    for at in range(1, lines + 1, 1 + lines // 60):
        tried = fresh()
        with pytest.raises(KeyboardInterrupt), Interrupted(at, LOOP):
            stream_of(tried, clip=clip())
        if at % 5 == 1:
            same(plain(stream_of(tried, clip=clip()), steps), expected)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("take", [chunk, next, latent], ids=["chunk", "frame", "latent"])
def test_frames_that_are_awaited_are_kept(made, monkeypatch, take, ahead):
    """On a GPU the host waits there. Nothing is decoded again."""
    pipeline, real, decoded = made("greedy"), Download.wait, []

    class Counted(TorchStages):
        def vae_steady(self, x, cache):
            decoded.append(x)
            return super().vae_steady(x, cache)

    stages = pipeline.stages
    counted = replace(pipeline, stages=Counted(stages.models, stages.vae, stages.text_encoder))
    steps = [chunk, chunk, take, chunk]
    expected = plain(stream_of(pipeline), steps)
    stream = stream_of(counted, ahead=ahead)
    got = plain(stream, steps[:2])

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Download, "wait", interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            stream.next_chunk()
    monkeypatch.setattr(Download, "wait", real)
    assert len(decoded) == 2
    got.append(np.array(take(stream)))
    assert len(decoded) == 2
    same([*got, *plain(stream, [chunk])], expected)
    assert len(stream.rest()) == 0  # the chunk's other frames came with the last call


def test_rest_makes_nothing(made, monkeypatch):
    expected = plain(stream_of(made("greedy")), [chunk] * 4)
    stream = stream_of(made("greedy"))
    assert stream.rest().shape == (0, HEIGHT, WIDTH, 3)
    got = [next(stream)[None], next(stream)[None], stream.rest()]
    monkeypatch.setattr(Download, "wait", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        stream.next_chunk()
    monkeypatch.undo()
    got += [stream.rest(), stream.rest(), stream.next_chunk()]
    assert np.array_equal(np.concatenate(got), np.concatenate(expected))
    stream.close()
    with pytest.raises(ValueError, match="got a closed one"):
        stream.rest()


def test_the_last_result_is_there_after_the_end(made):
    with made("greedy").stream(PROMPT) as stream:
        assert (stream.handed, stream.last) == (0, None)
        first = stream.next_chunk()
        assert (stream.handed, stream.last is first) == (1, True)
        frame = next(stream)
        assert (stream.handed, stream.emitted, stream.last is frame) == (2, 1, True)
    assert stream.last is frame
    assert stream.handed == 2


@pytest.mark.parametrize("inside", [True, False])
def test_a_decoding_whose_cache_moves_in_place(made, inside):
    """A graph's decoding that is interrupted inside ends the stream and says so; one that waits goes on."""
    from bench.instruments.ways import StandIn

    plain_pipeline = made("greedy")
    stages = plain_pipeline.stages
    graphed = GraphedStages(TorchStages(stages.models, stages.vae, stages.text_encoder), StandIn)
    pipeline = replace(plain_pipeline, stages=graphed)
    pipeline.warm()  # the first run of a graph is eager: its last bits may differ
    expected = plain(stream_of(pipeline), [chunk] * 4)
    stream, real = stream_of(pipeline), graphed.vae_steady
    got = plain(stream, [chunk] * 2)

    def interrupted(x, cache):
        real(x, cache)
        raise KeyboardInterrupt

    if inside:
        graphed.vae_steady = interrupted
        with pytest.raises(KeyboardInterrupt):
            stream.next_chunk()
        graphed.vae_steady = real
        for call in (chunk, next, latent, switch(0)):
            with pytest.raises(ValueError, match=r"got a closed one \(chunk 2 failed after the caches had moved on\)"):
                call(stream)
    else:
        with pytest.raises(KeyboardInterrupt), Interrupted(1, (f"{ENGINE}/runtime/transfer.py",)):
            stream.next_chunk()  # before the decoding
        same([*got, *plain(stream, [chunk] * 2)], expected)


# --- real signals


SIGNALS = """
import random, signal, sys, time
import numpy as np
import engine

model, preset, wanted, ahead = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "True"
short = {"window": 6, "attn_sink": 0, "steps": ((1000,),)}
pipeline = engine.load(model, preset=preset, overrides={} if preset == "greedy" else short)
CHUNKS = 30
OTHER = {10: "a blue square on gray", 20: "a red circle"}
def open_():
    stream = pipeline.stream("a red circle moving right", seed=5)
    stream.looks_ahead = ahead
    return stream
stream, expected, begun = open_(), [], time.perf_counter()
for number in range(CHUNKS):
    if number in OTHER:
        stream.set_prompt(OTHER[number])
    expected.append(stream.next_chunk())
longest = 2 * (time.perf_counter() - begun) / CHUNKS  # twice a chunk's time
armed, interrupts, recovered, draw = False, 0, 0, random.Random(7)
def handler(*_):
    global armed
    if armed:
        armed = False
        raise KeyboardInterrupt
signal.signal(signal.SIGALRM, handler)
def attempt(stream, call):
    global armed, interrupts, recovered
    while True:
        before, result = stream.handed, None
        signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-4, longest))
        armed = True
        try:
            result = call()
            armed = False
            return result
        except KeyboardInterrupt:
            interrupts += 1
            if result is not None:
                return result
            if stream.handed > before:
                recovered += 1
                return stream.last
while interrupts < wanted:
    wanted = wanted if time.perf_counter() - begun < 20 or wanted > 200 else 0  # on a busy machine fewer will do
    stream, got = open_(), []
    for number in range(CHUNKS):
        if number in OTHER:
            attempt(stream, lambda: stream.set_prompt(OTHER[number]))
        got.append(attempt(stream, stream.next_chunk))
    signal.setitimer(signal.ITIMER_REAL, 0)
    wrong = [n for n in range(CHUNKS) if not np.array_equal(got[n], expected[n])]
    assert not wrong, (wrong, interrupts)
print(interrupts, recovered)
"""


def signalled(model_dir, preset, wanted, ahead):
    command = [sys.executable, "-c", textwrap.dedent(SIGNALS), str(model_dir), preset, str(wanted), str(ahead)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout.split()[0]) >= min(wanted, 30)


@pytest.mark.parametrize(("preset", "ahead"), [("greedy", False), ("self-forcing", True)])
def test_a_timer_interrupts_a_stream_hundreds_of_times(model_dir, preset, ahead):
    signalled(model_dir, preset, 200, ahead)


@pytest.mark.thorough
@pytest.mark.parametrize(("preset", "ahead"), [("longlive", True), ("diagonal", False)])
def test_a_timer_interrupts_a_stream_thousands_of_times(model_dir, preset, ahead):
    signalled(model_dir, preset, 2000, ahead)


# --- other threads


class Held:
    """Noise that waits in the middle of a chunk until the test lets it go."""

    def __init__(self):
        self.source, self.inside, self.go = PhiloxNoise(3), threading.Event(), threading.Event()

    def draw(self, *request):
        self.inside.set()
        assert self.go.wait(HANG)
        return self.source.draw(*request)


@pytest.mark.parametrize("second", [chunk, next, latent, lambda s: s.rest(), lambda s: s.flush()], ids=range(5))
def test_a_second_thread_gets_an_error(made, second):
    expected = plain(stream_of(made("greedy")), [chunk] * 3)
    noise = Held()
    stream = stream_of(made("greedy"), noise=noise)
    with ThreadPoolExecutor(1) as other:
        first = other.submit(stream.next_chunk)
        assert noise.inside.wait(HANG)
        with pytest.raises(ValueError, match="got a call while another one runs, expected one at a time"):
            second(stream)
        noise.go.set()
        got = [first.result(HANG), *plain(stream, [chunk] * 2)]
    same(got, expected)


def test_tasks_that_share_a_stream(made):
    """Each chunk is shown once, whoever gets it; the other tasks are told."""
    expected = plain(stream_of(made("greedy")), [chunk] * 12)
    stream, got, refused = stream_of(made("greedy")), [], []

    async def task():
        while len(got) < 12:
            try:
                got.append(await asyncio.to_thread(stream.next_chunk))
            except ValueError as error:
                refused.append(str(error))
                await asyncio.sleep(0.001)

    async def main():
        await asyncio.gather(*(task() for _ in range(3)))

    asyncio.run(main())
    sums = [int(frames.astype(int).sum()) for frames in got[:12]]
    assert sorted(sums) == sorted(int(frames.astype(int).sum()) for frames in expected)
    assert all("one at a time" in text for text in refused)


def test_closing_from_another_thread_ends_the_call(made):
    noise = Held()
    stream = stream_of(made("greedy"), noise=noise)
    with ThreadPoolExecutor(1) as other:
        call = other.submit(stream.next_chunk)
        assert noise.inside.wait(HANG)
        stream.close()
        noise.go.set()
        with pytest.raises(ValueError, match="got a closed one"):
            call.result(HANG)
    assert stream.state is None


def test_a_call_inside_a_call_is_refused(made):
    """As from a signal handler, or from a callback of the noise source."""

    class Calls:
        def draw(self, *request):
            stream.next_chunk()

    stream = stream_of(made("greedy"), noise=Calls())
    with pytest.raises(ValueError, match="one at a time"):
        stream.next_chunk()


def test_a_turn_that_was_not_given_back_ends_with_its_call():
    turns, frames = Turns(), []

    def lost():
        frames.append(sys._getframe())
        turns.take(frames[0])
        assert not turns.free

    lost()
    assert turns.free
    with ThreadPoolExecutor(1) as other:
        other.submit(lambda: turns.__enter__()).result(HANG)


def test_interrupts_do_not_keep_caches_alive(made):
    """The turn's frame is not kept, nor is the stream after it is dropped."""
    import gc
    import weakref

    stream = stream_of(made("greedy"))
    stream.next_chunk()
    gone = weakref.ref(stream.state)
    gc.disable()
    try:
        del stream
        assert gone() is None
    finally:
        gc.enable()
    assert torch.is_inference_mode_enabled() is False
