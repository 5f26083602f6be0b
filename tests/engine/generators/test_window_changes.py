"""A window that changes: the stream goes on as one that was opened with it, saw the same latents and had a switch."""

from dataclasses import replace

import pytest
import torch
from dense_streams import SHORT, TEXT, Failing, Fault, greedy, joined, near, poison
from faults import plain, same, spread, stumbling
from tiny import pipeline_of

import engine
from engine.config import LocalHeads, Preset
from engine.presets import override

CASES = [  # a preset, and smaller windows
    (greedy(), (3, 1)),
    (greedy(chunk=2, w=2, max_position=5), (4, 2)),
    (Preset("causal", chunk=1, window=5, attn_sink=1, steps=SHORT), (4, 2)),
    (Preset("causal", chunk=3, window=9, attn_sink=1, steps=SHORT), (7, 4)),  # chunks wrap
    (Preset("causal", chunk=2, window=8, attn_sink=2, steps=SHORT, commit="noisy"), (6, 4)),
    (Preset("causal", chunk=1, window=6, attn_sink=1, steps=SHORT, heads=LocalHeads(4, 1, ((1,), (0, 1)))), (5, 2)),
]
EVERY = pytest.mark.parametrize(
    ("preset", "windows"),
    CASES,
    ids=[f"{p.family}-{p.chunk}-{p.commit}{'-heads' if p.heads else ''}" for p, _ in CASES],
)


def opened_with(pipeline, window, latents, count):
    """`count` latents of a stream of that window which was given the latents, after a switch to the same prompt."""
    other = replace(pipeline, preset=override(pipeline.preset, {"window": window}))
    stream = other.stream(TEXT, seed=4, latents=torch.cat(latents, dim=2))
    for one in latents:
        assert torch.equal(stream.next_latent(), one)
    stream.set_prompt(TEXT)
    return [stream.next_latent() for _ in range(count)]


def equal(got, expected):
    wrong = [at for at, (a, b) in enumerate(zip(got, expected, strict=True)) if not torch.equal(a, b)]
    assert not wrong, wrong


@EVERY
@pytest.mark.parametrize("at", [1, 2, 6])
def test_a_smaller_window_is_that_of_another_stream(preset, windows, at):
    pipeline = pipeline_of(preset)
    for window in windows:
        stream = pipeline.stream(TEXT, seed=4)
        seen = [stream.next_latent() for _ in range(at)]
        stream.change(window=window)
        poison(*([stream.state.cache] if preset.family == "causal" else [stream.state.etm]))  # nothing old is read
        got = [stream.next_latent() for _ in range(5)]
        equal(got, opened_with(pipeline, window, seen, 5))


@EVERY
def test_a_window_grows_back(preset, windows):
    """To what a stream that had kept it would hold, also of latents that the smaller one did not."""
    pipeline = pipeline_of(preset)
    stream = pipeline.stream(TEXT, seed=4)
    seen = [stream.next_latent() for _ in range(6)]
    for window in (windows[1], windows[0], preset.window):
        stream.change(window=window)
        got = [stream.next_latent() for _ in range(2)]
        equal(got, opened_with(pipeline, window, seen, 2))
        seen += got


@EVERY
def test_a_switch_after_a_change_rewrites_the_smaller_window(preset, windows):
    pipeline = pipeline_of(preset)
    stream = pipeline.stream(TEXT, seed=4)
    seen = [stream.next_latent() for _ in range(4)]
    stream.change(window=windows[1])
    seen.append(stream.next_latent())
    stream.set_prompt(TEXT)
    equal([stream.next_latent() for _ in range(3)], opened_with(pipeline, windows[1], seen, 3))


@EVERY
def test_joined_passes_keep_the_smaller_window(preset, windows):
    def run(pipeline):
        stream, made = pipeline.stream(TEXT, seed=4), []
        for number in range(9):
            if number in (3, 6):
                stream.change(window=windows[number == 6])
            made.append(stream.next_latent())
        return torch.cat(made, dim=2)

    pipeline = pipeline_of(preset)
    near(run(joined(pipeline)), run(pipeline))


@EVERY
@pytest.mark.parametrize("call", [7, 8, 10, 12])
def test_a_failure_after_a_change_is_repeated(preset, windows, call):
    pipeline = pipeline_of(preset)

    def run(pipeline):
        stream, made, due = pipeline.stream(TEXT, seed=4), [], True
        while len(made) < 7:
            if len(made) == 3 and due:
                stream.change(window=windows[0], seed=9)
                due = False
            try:
                made.append(stream.next_latent())
            except Fault:
                continue
        return made

    failing = Failing(pipeline.stages, "sdd" if preset.family == "greedy" else "dit", call, 1)
    equal(run(replace(pipeline, stages=failing)), run(pipeline))
    assert failing.fired == 1


def test_windows_that_a_family_or_its_ring_does_not_take():
    stream = pipeline_of(CASES[4][0]).stream(TEXT, seed=4)
    for window, said in ((3, r"preset: got window 3, expected at least attn_sink \+ chunk \(4\)"),
                         (9, "window: got 9, expected at most 8, with which the stream was opened")):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{said}$"):
            stream.change(window=window)
    with pytest.raises(ValueError, match=r"^preset: got window 3, expected a multiple of chunk \(2\)$"):
        pipeline_of(CASES[1][0]).stream(TEXT, seed=4).change(window=3)


def test_rings_that_take_whole_chunks_alone_say_so():
    """As those of a bundle's graphs, and of caches in FP8."""
    pipeline = pipeline_of(CASES[4][0])
    stages = pipeline.stages
    stages.capabilities = replace(stages.capabilities, whole_chunks=True)
    try:
        with pytest.raises(ValueError, match=r"^window: got 5 on torch, expected whole chunks of 2 beside the"):
            pipeline.stream(TEXT, seed=4).change(window=5)
    finally:
        stages.capabilities = replace(stages.capabilities, whole_chunks=False)


CHUNK = lambda stream: stream.next_chunk()  # noqa: E731
CHANGES = [
    lambda stream: stream.change(window=6, seed=8),
    lambda stream: stream.change(steps=(1000.0, 600.0)),
    lambda stream: stream.change(window=9),
    lambda stream: stream.set_prompt("teal", transition=3),
]
CALLS = [
    *(CHUNK, CHUNK, CHUNK, CHANGES[0], CHUNK, next, CHUNK, CHANGES[1], CHUNK),
    *(CHANGES[3], CHUNK, CHANGES[2], CHUNK, CHUNK),
]


@pytest.mark.slow
def test_every_call_is_interrupted(model_dir):
    pipeline = engine.load(model_dir, preset="self-forcing", overrides={"window": 9, "steps": ((1000, 500),)})

    def stream_of():
        stream = pipeline.stream("a red circle moving right", seed=3)
        stream.looks_ahead = True
        return stream

    expected, counted = plain(stream_of(), CALLS), stream_of()
    counted.next_chunk()
    counted.change(window=6)
    got, interrupts = stumbling(stream_of(), CALLS, spread(len(CALLS), counted.next_chunk))
    told = [at for at, call in enumerate(CALLS) if call in CHANGES]
    same(*([one for at, one in enumerate(results) if at not in told] for results in (got, expected)))
    assert interrupts > len(CALLS) / 3
