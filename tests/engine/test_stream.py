"""The Python interface: what an iterator of frames promises."""

from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from tiny import HEIGHT, WIDTH, text_of

import engine
from engine.config import Preset
from engine.loader import settings_of
from engine.presets import override
from engine.sampling.noise import ReplayNoise

PROMPT, OTHER = "a red circle moving right", "a blue square on gray"


def frames_of(pipeline, count=9, prompt=PROMPT, **options):
    with pipeline.stream(prompt, frames=count, **options) as stream:
        return np.stack(list(stream))


def with_preset(pipeline, **fields):
    return replace(pipeline, preset=override(pipeline.preset, fields))


def picture(seed=0, frames=1):
    """Soft blobs that a VAE can carry."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (frames, 2, 3, 3), dtype=np.uint8)
    return small.repeat(HEIGHT // 2, axis=1).repeat(WIDTH // 3, axis=2)


def latent_of(frames, seed=0):
    size = 1, 8, frames, HEIGHT // 4, WIDTH // 4
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_frames_are_rgb_bytes(pipeline):
    with pipeline.stream(PROMPT, frames=6) as stream:
        assert iter(stream) is stream
        frames = list(stream)
    assert len(frames) == 6
    for frame in frames:
        assert frame.shape == (HEIGHT, WIDTH, 3)
        assert frame.dtype == np.uint8
    # The models are random, but not degenerate: otherwise the tests here could not fail.
    assert np.stack(frames).std() > 10
    assert all((a != b).any() for a, b in pairwise(frames))


@pytest.mark.parametrize("frames", [1, 2, 5, 7])
def test_stops_after_so_many_frames(pipeline, frames):
    stream = pipeline.stream(PROMPT, frames=frames)
    assert len(list(stream)) == frames == stream.emitted
    with pytest.raises(StopIteration):
        next(stream)


def test_streams_until_told_to_stop(pipeline):
    with pipeline.stream(PROMPT) as stream:
        assert len(list(islice(stream, 43))) == 43
    assert list(stream) == []


@pytest.mark.parametrize(
    ("preset", "fields", "sizes"),
    [
        ("greedy", {}, [1, 4, 4, 4]),
        ("greedy", {"chunk": 3, "window": 12}, [9, 12, 12]),
        ("self-forcing", {"window": 6}, [9, 12, 12]),
        ("self-forcing", {"window": 6, "first_chunk": 1}, [1, 12, 12]),
        ("self-forcing-framewise", {"window": 3}, [1, 4, 4, 4]),
        ("longlive", {}, [9, 12]),
    ],
    ids=str,
)
def test_frames_a_chunk(model_dir, preset, fields, sizes):
    pipeline = engine.load(model_dir, preset=preset, overrides=fields)
    with pipeline.stream(PROMPT) as stream:
        assert [len(stream.next_chunk()) for _ in sizes] == sizes
    # Frame by frame and chunk by chunk are the same video.
    total = sum(sizes)
    with pipeline.stream(PROMPT) as stream:
        chunks = np.concatenate([stream.next_chunk() for _ in sizes])
    assert np.array_equal(frames_of(pipeline, total), chunks)


@pytest.mark.parametrize("family", ["pipeline", "causal"])
def test_latents_decode_to_the_frames_that_diffusers_decodes(request, model_dir, family):
    pipeline = request.getfixturevalue(family)
    vae = AutoencoderKLWan.from_pretrained(model_dir / "vae")
    with pipeline.stream(PROMPT, seed=3) as stream:
        latents = torch.cat([stream.next_latent() for _ in range(3)], dim=2)
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        video = vae.decode(latents * std + mean).sample[0]
    expected = ((video.permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).numpy()
    got = frames_of(pipeline, len(expected), seed=3)
    assert np.abs(got - expected).max() <= 1  # where rounding falls the other way
    assert (got == expected).mean() > 0.999


@pytest.mark.parametrize("family", ["pipeline", "causal"])
def test_a_seed_is_a_video(request, family):
    pipeline = request.getfixturevalue(family)
    first = frames_of(pipeline, 21, seed=7)
    assert np.array_equal(first, frames_of(pipeline, 21, seed=7))
    assert not np.array_equal(first[:1], frames_of(pipeline, 1, seed=8))
    assert not np.array_equal(first[:1], frames_of(pipeline, 1, OTHER, seed=7))


def test_a_shorter_video_is_the_beginning_of_a_longer_one(pipeline):
    assert np.array_equal(frames_of(pipeline, 6), frames_of(pipeline, 17)[:6])


@pytest.mark.parametrize("family", ["pipeline", "causal"])
def test_streams_of_one_pipeline_share_nothing_that_changes(request, family):
    pipeline = request.getfixturevalue(family)
    alone = {
        "plain": frames_of(pipeline, 40, PROMPT, seed=1),
        "other": frames_of(pipeline, 40, OTHER, seed=2),
        "picture": frames_of(pipeline, 40, PROMPT, seed=1, clip=picture()),
    }
    streams = {
        "plain": pipeline.stream(PROMPT, seed=1),
        "other": pipeline.stream(OTHER, seed=2),
        "picture": pipeline.stream(PROMPT, seed=1, clip=picture()),
    }
    got = {name: [] for name in streams}
    extra = None
    for turn in range(40):
        for name, stream in streams.items():
            got[name].append(next(stream))
        if turn == 11:  # one more comes, switches its prompt, and goes while the others run
            extra = pipeline.stream(OTHER, seed=9)
            next(extra)
            extra.set_prompt(PROMPT)
        if turn == 23:
            next(extra)
            extra.close()
    for name, frames in got.items():
        assert np.array_equal(np.stack(frames), alone[name]), name


def test_a_failed_stream_does_not_hurt_another(pipeline):
    expected = frames_of(pipeline, 9)
    good, bad = pipeline.stream(PROMPT), pipeline.stream(PROMPT, noise=ReplayNoise({}))
    got = [next(good)]
    with pytest.raises(ValueError, match="noise"):
        next(bad)
    got += islice(good, 8)
    assert np.array_equal(np.stack(got), expected)


def test_closing(pipeline):
    with pipeline.stream(PROMPT) as stream:
        next(stream)
        next(stream)
    assert stream.state is None
    stream.close()
    assert next(stream, None) is None
    for call in (stream.next_chunk, stream.next_latent, lambda: stream.set_prompt(OTHER)):
        with pytest.raises(ValueError, match=r"got a closed .*expected"):
            call()


def test_leaving_by_an_error_closes(pipeline):
    def use():
        with pipeline.stream(PROMPT) as stream:
            held.append(stream)
            next(stream)
            raise KeyError

    held = []
    with pytest.raises(KeyError):
        use()
    assert held[0].state is None


@pytest.mark.parametrize("family", ["pipeline", "causal"])
def test_an_image_comes_first_through_the_vae(request, model_dir, family):
    pipeline = request.getfixturevalue(family)
    image = picture(4)
    vae = AutoencoderKLWan.from_pretrained(model_dir / "vae")
    video = torch.from_numpy(image).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        latent = vae.encode(video).latent_dist.mode()
        decoded = vae.decode(latent).sample[0]
    expected = ((decoded.permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).numpy()
    with pipeline.stream(PROMPT, clip=image, seed=1) as stream:
        first = stream.next_chunk()
        second = stream.next_chunk()
    assert first.shape == (1, HEIGHT, WIDTH, 3)
    assert np.abs(first.astype(int) - expected).max() <= 1
    assert len(second) == 4 * pipeline.preset.chunk
    # What follows has seen the image.
    with pipeline.stream(PROMPT, clip=picture(5), seed=1) as stream:
        stream.next_latent()
        other = stream.next_latent()
    with pipeline.stream(PROMPT, clip=image, seed=1) as stream:
        stream.next_latent()
        assert (stream.next_latent() - other).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("family", "given", "kept"),
    [("pipeline", 9, 9), ("pipeline", 12, 9), ("pipeline", 4, 1), ("causal", 9, 9), ("causal", 22, 21)],
)
def test_a_clip_is_continued(request, family, given, kept):
    """Its last 1 + 4k frames come first, re-encoded; the stream goes on from there."""
    pipeline = request.getfixturevalue(family)
    clip = picture(6, given)
    expected = pipeline.stages.vae.decode(pipeline.encode_clip(clip[-kept:]))
    shown = frames_of(pipeline, kept + 4, clip=clip)
    reference = ((expected[0].permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).numpy()
    assert np.abs(shown[:kept].astype(int) - reference).max() <= 1
    assert pipeline.encode_clip(clip).shape[2] == (kept - 1) // 4 + 1
    assert len(shown) == kept + 4


def test_an_image_is_held_where_a_chunk_needs_more(pipeline):
    wide = with_preset(pipeline, chunk=3, window=12)
    image = picture(2)
    latents = wide.encode_clip(image)
    assert latents.shape[2] == 3
    assert torch.equal(latents, pipeline.encode_clip(image.repeat(9, axis=0)))


@pytest.mark.parametrize("family", ["pipeline", "causal"])
@pytest.mark.parametrize("count", [1, 3, 5, 6])
def test_given_latents_come_first(request, family, count):
    pipeline = request.getfixturevalue(family)
    given = latent_of(count)
    with pipeline.stream(PROMPT, latents=given) as stream:
        got = []
        while sum(x.shape[2] for x in got) < count:
            got.append(stream.next_latent())
        assert torch.equal(torch.cat(got, dim=2), given)
        assert stream.next_latent().shape[2] == pipeline.preset.chunk


@pytest.mark.parametrize("family", ["pipeline", "causal"])
def test_own_latents_continue_as_if_never_interrupted(request, family):
    """A stream's own latents, given to another one, lead to the same next chunk."""
    pipeline = request.getfixturevalue(family)
    with pipeline.stream(PROMPT, seed=5) as stream:
        latents = [stream.next_latent() for _ in range(4)]
    with pipeline.stream(PROMPT, seed=5, latents=torch.cat(latents[:3], dim=2)) as stream:
        again = [stream.next_latent() for _ in range(4)]
    assert torch.equal(again[3], latents[3])


@pytest.mark.parametrize("family", ["pipeline", "causal"])
def test_prompt_switch(request, family):
    pipeline = request.getfixturevalue(family)

    def run(switch, recommit=True):
        with pipeline.stream(PROMPT, seed=1) as stream:
            chunks = [stream.next_chunk() for _ in range(2)]
            if switch is not None:
                stream.set_prompt(switch, recommit=recommit)
            return np.concatenate(chunks), np.concatenate([stream.next_chunk() for _ in range(2)])

    before, plain = run(None)
    for switch in (run(OTHER), run(OTHER, recommit=False)):
        assert np.array_equal(switch[0], before)
        assert (switch[1] != plain).mean() > 0.1
    embedding = pipeline.encode_prompt(OTHER)
    assert np.array_equal(run(embedding)[1], run(OTHER)[1])
    # Switching to the same prompt: what is rewritten is what was there.
    assert (np.abs(run(PROMPT)[1].astype(int) - plain) <= 1).all()


def test_frames_already_made_are_still_of_the_old_prompt(pipeline):
    with pipeline.stream(PROMPT) as stream:
        frames = list(islice(stream, 2))
        stream.set_prompt(OTHER)  # in the middle of a chunk
        frames += islice(stream, 3)
    assert np.array_equal(np.stack(frames), frames_of(pipeline, 5))


@pytest.mark.parametrize("bad", ["shape", "rank", "batch", "rows"])
@pytest.mark.parametrize("family", ["pipeline", "causal"])
def test_a_bad_prompt_is_refused_and_changes_nothing(request, family, bad):
    pipeline = request.getfixturevalue(family)
    good = pipeline.encode_prompt(OTHER)
    wrong = {"shape": good[..., :7], "rank": good[0], "batch": good.repeat(2, 1, 1), "rows": good[:, :0]}[bad]
    expected = frames_of(pipeline, 24)
    with pipeline.stream(PROMPT) as stream:
        got = list(islice(stream, 9))
        with pytest.raises(ValueError, match=r"prompt: got .*expected"):
            stream.set_prompt(wrong)
        got += islice(stream, 15)
    assert np.array_equal(np.stack(got), expected)


def test_embeddings_as_prompts(pipeline):
    embedding = pipeline.encode_prompt(PROMPT)
    assert np.array_equal(frames_of(pipeline, 9, embedding), frames_of(pipeline, 9, PROMPT))


@pytest.mark.parametrize("family", ["pipeline", "causal"])
def test_a_batch_is_streams_side_by_side(request, family):
    pipeline = request.getfixturevalue(family)
    texts = [pipeline.encode_prompt(prompt) for prompt in (PROMPT, OTHER)]
    shape = (1, 8, pipeline.preset.chunk, HEIGHT // 4, WIDTH // 4)
    steps = len(pipeline.preset.steps[0])
    torch.manual_seed(0)
    draws = [{(c, n): torch.randn(shape) for c in range(4) for n in range(steps)} for _ in texts]
    both = {key: torch.cat([d[key] for d in draws]) for key in draws[0]}
    with pipeline.stream(torch.cat(texts), noise=ReplayNoise(both)) as stream:
        together = [stream.next_latent() for _ in range(4)]
    for row, (text, noise) in enumerate(zip(texts, draws, strict=True)):
        with pipeline.stream(text, noise=ReplayNoise(noise)) as stream:
            for latent in together:
                alone = stream.next_latent()
                assert (latent[row : row + 1] - alone).abs().max() < 1e-4 * alone.abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {"frames": 0},
        {"frames": -3},
        {"seed": -1},
        {"seed": 2**64},
        {"clip": picture()[0]},
        {"clip": picture().astype(np.float32)},
        {"clip": picture()[:, :8]},
        {"clip": picture()[:0]},
        {"latents": torch.zeros(1, 8, 1, 4, 5)},
        {"latents": torch.zeros(2, 8, 1, 4, 6)},
        {"latents": torch.zeros(8, 1, 4, 6)},
        {"latents": torch.zeros(1, 8, 0, 4, 6)},
    ],
    ids=lambda o: "-".join(f"{k}{getattr(v, 'shape', v)}" for k, v in o.items()),
)
def test_bad_options_are_refused_at_once(pipeline, options):
    with pytest.raises(ValueError, match=r"got .*expected"):
        pipeline.stream(PROMPT, **options)


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_latents_that_are_no_whole_chunks_are_refused_at_once(pipeline, count):
    with pytest.raises(ValueError, match=r"got .*expected"):
        with_preset(pipeline, chunk=3).stream(PROMPT, latents=latent_of(count))


@pytest.mark.parametrize("prompt", [text_of(rows=0, real=0), text_of(dim=23), text_of()[0]], ids=lambda t: str(t.shape))
def test_bad_embeddings_are_refused_at_once(pipeline, prompt):
    with pytest.raises(ValueError, match=r"prompt: got .*expected"):
        pipeline.stream(prompt)


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "greddy"},
        {"preset": "nowhere.toml"},
        {"overrides": {"windows": 3}},
        {"overrides": {"window": "3"}},
        {"overrides": {"window": 2.0}},
        {"overrides": {"warped": 1}},
        {"overrides": {"steps": 5}},
        {"overrides": {"steps": "fast"}},
        {"overrides": {"steps": ["a"]}},
        {"overrides": {"steps": []}},
        {"overrides": {"steps": [250, 500]}},
        {"overrides": {"steps": [1000, 0]}},
        {"overrides": {"steps": [2000]}},
        {"overrides": {"steps": [float("nan")]}},
        {"overrides": {"steps": [937.5]}},
        {"overrides": {"chunk": 0}},
        {"overrides": {"max_position": 1}},
        {"overrides": {"commit": "noisy"}},
        {"overrides": {"solver": "heun"}},
        {"overrides": {"shift": 0.0}},
        {"overrides": {"shift": float("nan")}},
        {"overrides": {"stop_after": -1}},
        {"preset": "longlive", "overrides": {"window": 5}},
        {"preset": "longlive", "overrides": {"attn_sink": -1}},
        {"preset": "self-forcing", "overrides": {"first_chunk": 4}},
        {"height": 30},
        {"height": 0},
        {"width": -24},
        {"fps": -1},
        {"fps": 0},
        {"device": "tpu9"},
        {"precision": "fp12"},
        {"model": "/nowhere"},
        {"checkpoint": "/nowhere.pt"},
        {"adapters": ["/nowhere"]},
    ],
    ids=str,
)
def test_bad_pipelines_are_refused(model_dir, options):
    with pytest.raises((ValueError, FileNotFoundError), match=r"got .*expected") as raised:
        engine.load(**{"model": model_dir, **options})
    assert "\n" not in str(raised.value)


def test_presets_from_a_file(model_dir, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "longlive"\nwindow = 9\nsteps = [[1000, 500], [1000]]\nshift = 3\nwarped = true\n')
    pipeline = engine.load(model_dir, preset=str(path), overrides={"attn_sink": 1})
    assert pipeline.preset == Preset(
        "causal", chunk=3, window=9, attn_sink=1, steps=((1000, 500), (1000,)), shift=3.0
    )  # fmt: skip
    for text in ('base = "none"', "window = ", "windows = 3", "window = '3'", 'base = "greedy"\nchunk = 0'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"got .*expected"):
            engine.load(model_dir, preset=str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"got .*expected"):
        engine.load(model_dir, preset=str(path))


def test_a_models_own_settings(model_dir, tmp_path):
    settings = settings_of(model_dir)
    assert (settings.height, settings.width, settings.fps) == (HEIGHT, WIDTH, 8)
    wan = settings_of(tmp_path)  # without engine.json: Wan2.1's
    assert (wan.height, wan.width, wan.fps) == (480, 832, 16)
    (tmp_path / "engine.json").write_text('{"hight": 3}')
    with pytest.raises(ValueError, match=r"got unknown key hight, expected"):
        settings_of(tmp_path)


def test_size_and_rate_can_be_chosen(model_dir):
    pipeline = engine.load(model_dir, height=24, width=16, fps=5)
    assert frames_of(pipeline, 5).shape == (5, 24, 16, 3)
    assert pipeline.fps == 5


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_streams(model_dir, dtype):
    pipeline = engine.load(model_dir, precision=dtype)
    with pipeline.stream(PROMPT, seed=1) as stream:
        latents = [stream.next_latent() for _ in range(3)]
    assert latents[0].dtype == pipeline.dtype
    exact = engine.load(model_dir)
    with exact.stream(PROMPT, seed=1) as stream:
        reference = stream.next_latent()
    error = (latents[0].float() - reference).square().mean().sqrt() / reference.std()
    assert 0 < error < 0.1
    assert frames_of(pipeline, 9).std() > 10


def test_loading_is_quiet_on_stdout(model_dir, capfd):
    engine.load(model_dir)
    assert capfd.readouterr().out == ""
