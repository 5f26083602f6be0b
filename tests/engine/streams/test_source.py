"""Streams that follow input frames: what they take, where their chunks begin, and that no failure loses a frame."""

import asyncio
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from limits import HANG
from tiny import HEIGHT, WIDTH

import engine
from engine.config import Preset
from engine.generators.source import Intake, Source, Start, usual_strength
from engine.presets import override
from engine.runtime.cuda_graphs import GraphedStages
from engine.runtime.stages import TorchStages
from engine.runtime.streams import Cancelled, SourceEnded
from engine.sampling.schedule import Schedule

PROMPT, OTHER = "a red circle moving right", "a blue square on gray"
FAMILIES = {
    "greedy": {},
    "greedy-chunks": {"chunk": 2, "window": 6, "max_position": 5},
    "euler": {"solver": "euler"},
    "causal": {"family": "causal", "chunk": 3, "window": 7, "solver": "renoise", "steps": ((1000, 750, 250),)},
    "first-chunk": {"family": "causal", "chunk": 2, "first_chunk": 1, "window": 5, "solver": "renoise"},
    "noisy": {"family": "causal", "window": 3, "commit": "noisy", "solver": "renoise", "steps": ((1000, 500), (900,))},
}


def frames_of(count, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (count, HEIGHT, WIDTH, 3), dtype=np.uint8))


def moving(count, step):
    """Frames in which everything moves: each differs from the one before by `step` grey levels."""
    return [np.full((HEIGHT, WIDTH, 3), 100 + step * (at % 2), np.uint8) for at in range(count)]


def of_family(model_dir, name):
    fields = dict(FAMILIES[name])
    preset = "self-forcing" if fields.pop("family", "") == "causal" else "greedy"
    return engine.load(model_dir, preset=preset, overrides=fields)


@pytest.fixture(scope="module")
def greedy(model_dir):
    return of_family(model_dir, "greedy")


@pytest.fixture(scope="module")
def chunks_of_two(model_dir):
    return of_family(model_dir, "greedy-chunks")


def taken(pipeline, **options):
    """All chunks of a stream."""
    with pipeline.stream(PROMPT, seed=3, **options) as stream:
        chunks = []
        while True:
            try:
                chunks.append(stream.next_chunk())
            except SourceEnded:
                return chunks


def same(got, expected):
    assert len(got) == len(expected)
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


# --- where chunks begin


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("recommit", [True, False])
def test_strength_1_is_the_plain_stream(model_dir, name, recommit):
    pipeline, runs = of_family(model_dir, name), []
    for options in ({}, {"source": frames_of(81), "strength": 1}):
        with pipeline.stream(PROMPT, seed=3, **options) as stream:
            chunks = [stream.next_chunk() for _ in range(3)]
            stream.set_prompt(OTHER, recommit)
            runs.append([*chunks, *(stream.next_chunk() for _ in range(3))])
    same(*runs)


@pytest.mark.parametrize("name", ["greedy", "causal", "first-chunk"])
def test_input_and_strength_matter(model_dir, name):
    pipeline = of_family(model_dir, name)
    videos = [
        taken(pipeline, source=frames_of(25, seed), strength=strength)
        for seed, strength in ((0, 0.96), (1, 0.96), (0, 0.7), (0, 1.0))
    ]
    for number, video in enumerate(videos):
        assert all((video[0] != other[0]).any() for other in videos[number + 1 :])


def test_the_steps_of_a_strength():
    """sigma of 1000, 750, 500, 250 at shift 5: 1, 0.9375, 0.8333, 0.625."""
    made = Schedule(Preset("causal", steps=((1000, 750, 500, 250), (1000, 500))))
    all_of = [t for t, _ in made.steps(0)]
    for strength, left in ((1, 4), (0.99, 3), (0.9375, 3), (0.93, 2), (0.8333334, 2), (0.8, 1), (0.625, 1)):
        steps = made.steps(0, strength)
        assert [t for t, _ in steps] == all_of[4 - left :]
        assert steps[-1][1] is None
    assert made.steps(7, 0.9) == made.steps(1)[1:]
    # A moved first step keeps to the grid, and steps above it are left out.
    (t, after), *rest = made.steps(0, 0.9375, level=0.9)
    assert t == pytest.approx(900, abs=1)
    assert [after, *(t for t, _ in rest)] == [all_of[2], all_of[2], all_of[3]]
    assert [t for t, _ in made.steps(0, 0.9375, level=0.7)][1:] == [all_of[3]]
    assert made.sigma(made.steps(0, 0.9375, level=0.7)[0][0]) == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize(("solver", "shift", "strength"), [("euler", 5, 0.93), ("unipc", 3, 0.9), ("renoise", 2, 0.7)])
def test_a_chunk_begins_as_in_diffusers(model_dir, solver, shift, strength):
    """The latent is diffusers' own, and so is its noise; the first timestep is the one of that noise."""
    fields = {"solver": solver, "shift": float(shift), "steps": ((1000, 750, 500, 250),), "chunk": 2, "window": 6}
    pipeline = engine.load(model_dir, preset="greedy", overrides=fields)
    begun, frames = [], frames_of(13)

    def denoise(x, t, state, short=False, inner=pipeline.generator.denoise):
        begun.append((x, t))
        return inner(x, t, state, short)

    pipeline.generator.denoise = denoise
    with pipeline.stream(PROMPT, seed=3, source=frames, strength=strength) as stream:
        stream.next_chunk()
        noise = stream.noise.draw(0, 1, (1, 8, 2, HEIGHT // 4, WIDTH // 4))[0]
    vae = AutoencoderKLWan.from_pretrained(model_dir / "vae").eval()
    video = torch.from_numpy(np.stack(frames[:5])).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        mean = vae.encode(video).latent_dist.mean
    scale = [torch.tensor(part).view(1, -1, 1, 1, 1) for part in (vae.config.latents_mean, vae.config.latents_std)]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    x, t = begun[0]
    index = int((scheduler.timesteps - t).abs().argmin())
    assert scheduler.timesteps[index] == pytest.approx(t, abs=0.6)
    expected = scheduler.scale_noise((mean - scale[0]) / scale[1], scheduler.timesteps[index : index + 1], noise)
    assert (x - expected).abs().max() < 2e-3 * expected.abs().max()
    steps = pipeline.preset.steps[0]
    assert len(begun) == sum(shift * s / (1 + (shift - 1) * s) <= strength for s in (one / 1000 for one in steps))


@pytest.mark.parametrize("name", ["greedy", "bundle"])
def test_encoding_in_parts_is_encoding_at_once(request, greedy, name):
    pipeline = request.getfixturevalue("bundled") if name == "bundle" else greedy
    clip = np.stack(frames_of(21))
    whole, cache, parts, begin = pipeline.encode_clip(clip), None, [], 0
    for count in (1, 8, 4, 8):
        latent, cache = pipeline.encoded(clip[begin : begin + count], cache)
        parts.append(latent)
        begin += count
    assert torch.equal(torch.cat(parts, 2), whole)


def test_a_stream_on_graphs_does_not_look_ahead(greedy):
    """It would wait for frames that are not there."""
    from bench.instruments.ways import StandIn

    stages = greedy.stages
    graphed = GraphedStages(TorchStages(stages.models, stages.vae, stages.text_encoder), StandIn)
    pipeline, source = replace(greedy, stages=graphed), frames_of(9)
    pipeline.warm()
    with pipeline.stream(PROMPT, seed=3) as plain, pipeline.stream(PROMPT, seed=3, source=source, strength=1) as stream:
        same([stream.next_chunk() for _ in range(3)], [plain.next_chunk() for _ in range(3)])
        assert not stream.looks_ahead


def test_an_encoder_that_overflows_is_named(greedy, monkeypatch):
    expected, inner = taken(greedy, source=frames_of(9), strength=0.9), greedy.stages.vae_encode_step
    with greedy.stream(PROMPT, seed=3, source=frames_of(9), strength=0.9) as stream:
        chunks = [stream.next_chunk()]
        monkeypatch.setattr(greedy.stages, "vae_encode_step", lambda *args: (inner(*args)[0] / 0, inner(*args)[1]))
        with pytest.raises(FloatingPointError, match=r"chunk 1, vae_encode_step result: got -?(inf|nan) in float32"):
            stream.next_chunk()
        monkeypatch.setattr(greedy.stages, "vae_encode_step", inner)
        chunks += [stream.next_chunk(), stream.next_chunk()]
    same(chunks, expected)


def test_every_kind_of_stream_follows_or_refuses(any_pipeline, kind):
    shape = (any_pipeline.height, any_pipeline.width, 3)
    source = np.random.default_rng(0).integers(0, 256, (9, *shape), dtype=np.uint8)
    if kind == "native":
        with pytest.raises(ValueError, match="native: got source, expected a backend whose loop runs in Python"):
            any_pipeline.stream("a red circle", source=source, strength=0.9, noise_scale=None)
        return
    with any_pipeline.stream("a red circle", source=source, strength=0.9) as stream:
        frames = np.stack(list(stream))
    with any_pipeline.stream("a red circle", source=255 - source, strength=0.9) as stream:
        assert (np.stack(list(stream)) != frames).mean() > 0.5
    assert frames.shape == source.shape


# --- noise that follows the motion


def levels(preset, frames, chunks, **options):
    """The noise levels at which the chunks of 4 frames begin."""
    source, intake, got = Source([], (HEIGHT, WIDTH), 4, preset, **options), Intake(), []
    for number in range(chunks):
        begin = 4 * number
        part = np.stack(frames[begin : begin + 4])
        level = source._average(part, intake, Schedule(preset).level(1, source.strength))
        intake = replace(intake, last=part[-1], level=level)
        got.append(level)
    return got


def test_more_motion_gives_less_noise():
    """s = 0.9 (s_max - span min(d / 0.2, 1)) + 0.1 s_before, from the largest difference of the chunk's frames."""
    preset = Preset("causal", steps=((1000, 750, 500, 250),))
    options = {"strength": 0.95, "noise_scale": 0.2}
    top = Schedule(preset).sigma(937.5)
    assert levels(preset, moving(20, 0), 5, **options) == pytest.approx([top] * 5)
    difference = 10 / 127.5 / 0.2  # of the scale of d
    expected = [top - 0.2 * difference]
    for _ in range(4):
        expected.append(0.9 * (top - 0.2 * difference) + 0.1 * expected[-1])
    assert levels(preset, moving(20, 10), 5, **options) == pytest.approx(expected, abs=1e-5)
    fastest = levels(preset, moving(20, 120), 5, **options)
    assert fastest == pytest.approx([top - 0.2] * 5)
    later = levels(preset, [*moving(8, 0), *moving(12, 120)], 5, **options)
    assert later[1] == pytest.approx(top)
    assert later[2:] == pytest.approx([0.9 * (top - 0.2) + 0.1 * top, *later[3:]])
    assert later[2] > later[3] > later[4] > top - 0.2


@pytest.mark.parametrize("solver", ["euler", "unipc", "renoise"])
def test_motion_changes_the_frames(model_dir, solver):
    pipeline = engine.load(model_dir, preset="greedy", overrides={"solver": solver})
    still, fast = frames_of(1) * 17, frames_of(17)
    for source, changes in ((still, False), (fast, True)):
        videos = [taken(pipeline, source=source, strength=0.95, noise_scale=scale) for scale in (None, 0.4)]
        assert (np.concatenate(videos[0]) != np.concatenate(videos[1])).any() == changes


# --- frames that come, and frames that do not


def test_what_is_left_at_the_end_is_not_shown(chunks_of_two):
    """5 frames for chunk 0, then 8 each."""
    for count, shown in ((4, 0), (5, 5), (12, 5), (13, 13), (20, 13), (21, 21)):
        with chunks_of_two.stream(PROMPT, source=iter(frames_of(count))) as stream:
            assert len(list(stream)) == shown
            assert list(stream) == []
            with pytest.raises(SourceEnded, match=rf"got {(count - shown)} frames before its end, expected"):
                stream.next_chunk()
            assert len(stream.rest()) == 0


def test_the_async_iterator_ends_with_the_source(greedy):
    async def main(stream):
        return [frame async for frame in stream]

    expected = np.concatenate(taken(greedy, source=frames_of(11)))
    with greedy.stream(PROMPT, seed=3, source=frames_of(11)) as stream:
        assert np.array_equal(np.stack(asyncio.run(main(stream))), expected)


def test_a_limit_ends_it_before(greedy):
    source = iter(frames_of(100))
    with greedy.stream(PROMPT, source=source, frames=7) as stream:
        assert len(list(stream)) == 7
    assert len(list(source)) == 100 - 9  # no frame is taken before it is needed


class Faulty:
    """Gives frames, and raises each fault once, before the frame of its number."""

    def __init__(self, frames, faults):
        self.frames, self.faults, self.at = frames, dict(faults), 0

    def __iter__(self):
        return self

    def __next__(self):
        if (fault := self.faults.pop(self.at, None)) is not None:
            raise fault
        self.at += 1
        if self.at > len(self.frames):
            raise StopIteration
        return self.frames[self.at - 1]


@pytest.mark.parametrize("fault", [OSError("unplugged"), KeyboardInterrupt(), StopIteration()])
@pytest.mark.parametrize("at", [0, 1, 3, 6, 8])
def test_an_exception_of_the_source_comes_out_once(greedy, fault, at):
    expected = taken(greedy, source=frames_of(13))
    raised = SourceEnded if isinstance(fault, StopIteration) else type(fault)
    with greedy.stream(PROMPT, seed=3, source=Faulty(frames_of(13), {at: fault})) as stream:
        got, faults = [], 0
        while len(got) < len(expected):
            try:
                got.append(stream.next_chunk())
            except raised:
                faults += 1
    assert faults == 1
    same(got, expected)


@pytest.mark.parametrize("place", ["encoder", "denoising", "decoder"])
@pytest.mark.parametrize(("name", "error"), [("greedy", MemoryError), ("causal", KeyboardInterrupt)])
def test_a_failure_inside_a_chunk_loses_no_frame(model_dir, monkeypatch, name, error, place):
    pipeline = of_family(model_dir, name)
    source = frames_of(25)
    expected = taken(pipeline, source=source, strength=0.95, noise_scale=0.2)
    method = {"encoder": "vae_encode_step", "denoising": "run", "decoder": "vae_steady"}[place]
    inner, calls = getattr(pipeline.stages, method), []

    def failing(*args):
        result = inner(*args)
        calls.append(1)
        if len(calls) % 3 == 0:
            raise error
        return result

    monkeypatch.setattr(pipeline.stages, method, failing)
    got, failures = [], 0
    with pipeline.stream(PROMPT, seed=3, source=iter(source), strength=0.95, noise_scale=0.2) as stream:
        while len(got) < len(expected):
            try:
                got.append(stream.next_chunk())
            except error:
                failures += 1
                if failures > 20:  # a chunk of more than two calls would never end
                    monkeypatch.setattr(pipeline.stages, method, inner)
    assert failures
    same(got, expected)


def test_a_wrong_frame_is_named_and_left_out(greedy):
    good = frames_of(9)
    wrong = [good[0][:-1], good[0].astype(np.float32), good[0][None], "frame"]
    expected = taken(greedy, source=good)
    for bad in wrong:
        with greedy.stream(PROMPT, seed=3, source=[*good[:3], bad, *good[3:]]) as stream:
            first = stream.next_chunk()
            with pytest.raises(ValueError, match=rf"source: got .*, expected uint8 \[{HEIGHT}, {WIDTH}, 3\]"):
                stream.next_chunk()
            same([first, stream.next_chunk(), stream.next_chunk()], expected)


def test_a_source_may_use_its_memory_again(greedy):
    def camera():
        memory = np.empty((HEIGHT, WIDTH, 3), np.uint8)
        for frame in frames_of(13):
            memory[:] = frame
            yield memory

    same(taken(greedy, source=camera()), taken(greedy, source=frames_of(13)))


def test_flush_begins_with_the_next_frames(chunks_of_two):
    source = frames_of(60)
    stream = chunks_of_two.stream(PROMPT, seed=3, source=Faulty(source, {10: OSError("unplugged")}))
    stream.next_chunk()  # 5 frames
    with pytest.raises(OSError, match="unplugged"):
        stream.next_chunk()  # 5 of 8
    stream.flush()
    same([stream.next_chunk() for _ in range(2)], taken(chunks_of_two, source=source[5:18]))
    stream.flush()
    assert np.array_equal(stream.next_chunk(), taken(chunks_of_two, source=source[18:23])[0])
    assert stream.serial == (0, 0, 0)


class Held:
    """Frames of which one waits until the test lets it go."""

    def __init__(self, frames, at):
        self.frames, self.at, self.inside, self.go = frames, at, threading.Event(), threading.Event()

    def __iter__(self):
        for number, frame in enumerate(self.frames):
            if number == self.at:
                self.inside.set()
                assert self.go.wait(HANG)
            yield frame


@pytest.mark.parametrize("act", ["prompt", "cancel", "close"])
def test_what_other_threads_do_while_a_frame_is_awaited(greedy, act):
    source, errors, got = Held(frames_of(9), 3), [], []
    expected_stream = greedy.stream(PROMPT, seed=3, source=frames_of(9))
    expected = [expected_stream.next_chunk()]
    if act == "prompt":
        expected_stream.set_prompt(OTHER)
    expected.append(expected_stream.next_chunk())
    stream = greedy.stream(PROMPT, seed=3, source=source)
    first = stream.next_chunk()

    def call():
        try:
            got.append(stream.next_chunk())
        except (Cancelled, ValueError) as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert source.inside.wait(HANG)
    {"prompt": lambda: stream.set_prompt(OTHER), "cancel": stream.cancel, "close": stream.close}[act]()
    source.go.set()
    thread.join(HANG)
    if act == "prompt":  # the chunk that waited shows it
        same([first, *got], expected)
        assert stream.serial.prompt == 1
    elif act == "cancel":
        assert isinstance(errors[0], Cancelled)
        same([first, stream.next_chunk()], expected)
    else:
        assert "got a closed one" in str(errors[0])


# --- arguments


def test_arguments_that_do_not_fit(greedy):
    frames = frames_of(5)
    cases = [
        ({"source": 5}, "source: got int, expected an iterator of frames"),
        ({"source": frames, "clip": np.stack(frames)}, "source: got a clip or latents as well, expected one of them"),
        ({"source": frames, "latents": torch.zeros(1, 8, 1, 4, 6)}, "source: got a clip or latents as well"),
        ({"strength": 0.5}, "strength, noise_scale: got one of them without a source, expected a source as well"),
        ({"noise_scale": 0.5}, "strength, noise_scale: got one of them without a source"),
        ({"source": frames, "strength": 0}, "strength: got 0, expected a number above 0, up to 1"),
        ({"source": frames, "strength": 1.01}, "strength: got 1.01, expected a number above 0, up to 1"),
        ({"source": frames, "strength": float("nan")}, "strength: got nan, expected a number above 0, up to 1"),
        ({"source": frames, "strength": 0.3}, "strength: got 0.3, expected 0.625 to 1: the last step"),
        ({"source": frames, "noise_scale": 0}, "noise_scale: got 0, expected a number above 0 and below 0.625"),
        ({"source": frames, "noise_scale": 0.7}, "noise_scale: got 0.7, expected a number above 0 and below 0.625"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            greedy.stream(PROMPT, **options)


def test_a_chunk_of_one_step_has_no_strength_but_1(model_dir):
    pipeline = engine.load(model_dir, preset="greedy")
    pipeline = replace(pipeline, preset=override(pipeline.preset, {"steps": ((1000, 500), (1000,))}))
    with pytest.raises(ValueError, match=r"strength: got 0\.5, expected 1 to 1: the last step of this preset begins"):
        pipeline.stream(PROMPT, source=frames_of(5))
    assert len(taken(pipeline, source=frames_of(5), strength=1)) == 2


@pytest.mark.parametrize(("shift", "usual", "level"), [(2, 0.5, 0.4), (5, 0.625, 0.625), (3, 0.5, 0.5)])
def test_the_usual_strength_is_one_that_the_schedule_has(model_dir, shift, usual, level):
    """A half, or the level of the last step: 1000, 750, 500, 250, of which only the last is left."""
    pipeline = engine.load(model_dir, overrides={"shift": shift})
    assert usual_strength(Schedule(pipeline.preset)) == pytest.approx(usual, abs=1e-3)
    assert Schedule(pipeline.preset).level(1, usual) == pytest.approx(level, abs=1e-3)
    left, usually = (taken(pipeline, source=frames_of(9), **given) for given in ({"strength": usual}, {}))
    same(left, usually)


def test_steps_that_the_strength_cannot_follow_are_refused(model_dir):
    pipeline = engine.load(model_dir, preset="greedy")
    with pipeline.stream(PROMPT, seed=3, source=frames_of(13), strength=0.9) as stream:
        before = [stream.next_chunk()]
        with pytest.raises(ValueError, match="steps: got a last one at the noise level 1, expected it up to"):
            stream.change(steps=[1000])
        same([*before, stream.next_chunk()], taken(pipeline, source=frames_of(13), strength=0.9)[:2])


def test_the_level_stays_in_its_span_where_the_steps_change(model_dir):
    """s_max falls from .9375 to .625; the average of before does not lift the next chunk above it."""
    pipeline = engine.load(model_dir, preset="greedy")
    with pipeline.stream(PROMPT, source=moving(13, 0), strength=0.95, noise_scale=0.01) as stream:
        stream.next_chunk()
        before = stream._begun.level
        stream.change(steps=[1000, 250])
        stream.next_chunk()
        assert stream._begun.level == pytest.approx(0.625, abs=1e-3)
        assert stream._begun.level < before


def test_a_closed_stream_keeps_nothing_of_its_source(greedy):
    stream = greedy.stream(PROMPT, source=frames_of(13), strength=0.9)
    stream.next_chunk()
    assert stream._begun.after.cache is not None
    stream.flush()
    assert (stream._begun.latent, stream._begun.after.cache) == (None, None)
    stream.next_chunk()
    stream.close()
    assert (stream._begun.latent, stream._begun.after.cache) == (None, None)


def test_a_start_from_noise_is_the_noise():
    noise = torch.randn(1, 2, 1, 3, 3)
    assert Start([(1000.0, None)]).noised(noise) is noise
    latent = torch.full_like(noise, 2.0)
    assert torch.equal(Start([(500.0, None)], latent, 0.25).noised(noise), 0.75 * latent + 0.25 * noise)
