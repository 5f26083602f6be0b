"""The tiny decoder: what it is compared with, what it is trained on, and that it learns, resumes and is written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_distill_training import as_toml, launch, losses

import engine
from distill.__main__ import main
from distill.data.shards import Shards, write_index, write_shard
from distill.stages.vae.tiny_decoder import TinyDecoder, TinyDecoderConfig, stream_clips, train
from distill.training.draws import Draws
from distill.training.loop import accelerator_of
from engine.model.tiny_vae import TinyVAE, TinyVAEConfig
from engine.model.vae import VAE

FACTORS = {"upsample_space": (True, True), "upsample_time": (True, True)}


@pytest.fixture(scope="module")
def config(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyDecoderConfig:
    """Of a tiny random model, with six clips of its size."""
    folder = tmp_path_factory.mktemp("bank")
    latents = torch.randn(6, 8, 3, 4, 6, generator=torch.Generator().manual_seed(0)).half()
    write_shard(folder, 0, latents, ["a red circle", "a blue square"] * 3)
    write_index(folder, 1, {})
    return TinyDecoderConfig(
        model=str(model_dir), data=str(folder), steps=6, batch=2, frames=3, streams=3, held=1, widths=(8, 6, 4),
        blocks=1, save_every=2, warmup=1, **FACTORS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def vae(config: TinyDecoderConfig) -> VAE:
    found = engine.load(config.model).stages.modules()["vae"]
    assert isinstance(found, VAE)
    return found


@pytest.fixture(scope="module")
def trained(config: TinyDecoderConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    train(config, out)
    return out


def test_it_resumes_to_the_bit(config: TinyDecoderConfig, trained: Path, tmp_path: Path) -> None:
    """Also with another share of the frames in memory."""
    train(config, tmp_path, stop_at=3)
    assert not (tmp_path / "tiny_vae").exists()
    train(replace(config, remember=0.0), tmp_path)
    assert (tmp_path / "losses.jsonl").read_text() == (trained / "losses.jsonl").read_text()
    name = "tiny_vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()


def test_the_written_decoder_is_the_one_of_the_report(config: TinyDecoderConfig, trained: Path, vae: VAE) -> None:
    """PSNR and change, computed again on the clip that was held back, by the decoder that was written."""
    tiny = TinyVAE(TinyVAEConfig.from_dict(json.loads((trained / "tiny_vae" / "config.json").read_text())))
    weights = load_file(trained / "tiny_vae" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    tiny.load_state_dict({name: value.float() for name, value in weights.items()})
    report = json.loads((trained / "report.json").read_text())
    for name, source, last in (("clips", Path(config.data), 5), ("streams", trained / "streams", 2)):
        latents, _ = Shards(source).read([last])
        with torch.no_grad():
            made, target = tiny.decode(latents), vae.decode(latents)
        error = float((made - target).square().mean())
        assert 4 / error == pytest.approx(10 ** (report[name]["psnr"] / 10), rel=0.01)
        assert report[name]["change"] == pytest.approx(float(made.diff(dim=2).abs().mean()), rel=0.01)
        assert report[name]["change_of_model"] == pytest.approx(float(target.diff(dim=2).abs().mean()), rel=0.01)


def test_the_streams_are_the_models(config: TinyDecoderConfig, trained: Path) -> None:
    streams = Shards(trained / "streams")
    captions = ["a red circle", "a blue square", "a red circle"]
    assert (len(streams), streams.frames) == (3, 3)
    assert streams.captions(range(3)) == captions
    pipeline = engine.load(config.model)
    emb = torch.cat([pipeline.encode_prompt(caption) for caption in captions])
    with pipeline.stream(emb, seed=0) as stream:
        own = torch.cat([stream.next_latent() for _ in range(3)], 2)
    assert torch.equal(streams.read(range(3))[0], own.half().float())


def test_stopped_streaming_goes_on(config: TinyDecoderConfig, trained: Path, tmp_path: Path) -> None:
    many, data, pipeline = replace(config, streams=9), Shards(Path(config.data)), engine.load(config.model)
    stream_clips(pipeline, many, data, tmp_path, accelerator_of(config))
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(whole) == ["00000.safetensors", "00001.safetensors", "index.json", "made.json"]
    (tmp_path / "index.json").unlink()
    (tmp_path / "00001.safetensors").unlink()
    kept = (tmp_path / "00000.safetensors").stat().st_mtime_ns
    stream_clips(pipeline, many, data, tmp_path, accelerator_of(config))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole
    assert (tmp_path / "00000.safetensors").stat().st_mtime_ns == kept


@pytest.mark.parametrize("other", [{"seed": 1}, {"frames": 2}, {"streams": 2}, {"model": "other"}])
def test_streams_of_another_run_are_refused(
    config: TinyDecoderConfig, trained: Path, tmp_path: Path, other: dict[str, Any]
) -> None:
    """Whether or not their folder is finished."""
    shutil.copytree(trained / "streams", tmp_path / "streams")
    (tmp_path / "streams" / "index.json").unlink()
    data, pipeline = Shards(Path(config.data)), engine.load(config.model)
    with pytest.raises(ValueError, match="got streams of"):
        stream_clips(pipeline, replace(config, **other), data, tmp_path / "streams", accelerator_of(config))


def test_streams_belong_to_weights_not_to_a_path(config: TinyDecoderConfig, trained: Path, tmp_path: Path) -> None:
    """The same model elsewhere, with a tiny decoder in it, goes on; other weights at that path are refused."""
    shutil.copytree(trained / "streams", tmp_path / "streams")
    data, model = Shards(Path(config.data)), Path(shutil.copytree(config.model, tmp_path / "model"))
    shutil.copytree(trained / "tiny_vae", model / "tiny_vae")
    pipeline, moved = engine.load(model), replace(config, model=str(model))
    stream_clips(pipeline, moved, data, tmp_path / "streams", accelerator_of(config))
    file = next((model / "transformer").glob("*.safetensors"))
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="got streams of"):
        stream_clips(pipeline, moved, data, tmp_path / "streams", accelerator_of(config))


def test_a_crop_fits_the_streams(config: TinyDecoderConfig, tmp_path: Path) -> None:
    data, pipeline = Shards(Path(config.data)), engine.load(config.model)
    with pytest.raises(ValueError, match="crop: got 99, expected at most the 4 of "):
        stream_clips(pipeline, replace(config, crop=99), data, tmp_path, accelerator_of(config))
    assert not list(tmp_path.iterdir())


def test_the_config_names_its_class(trained: Path) -> None:
    """As docs/weights.md says."""
    assert json.loads((trained / "tiny_vae" / "config.json").read_text())["_class_name"] == "TinyVAE"


def test_what_is_held_back_teaches_nothing(config: TinyDecoderConfig, trained: Path, vae: VAE) -> None:
    """Nor do clips beyond `clips`; the share of streams is kept."""
    data, streams = Shards(Path(config.data)), Shards(trained / "streams")
    objective = TinyDecoder(replace(config, clips=2), vae, data, streams)
    with torch.no_grad():
        for step in range(20):
            objective(Draws(0, step, [0, 1]))
    seen = {(folder == streams.folder, clip) for folder, clip in objective._targets}
    assert seen == {(False, 0), (False, 1), (True, 0), (True, 1)}
    alone = TinyDecoder(replace(config, stream_share=0.0), vae, data, streams)
    with torch.no_grad():
        for step in range(20):
            alone(Draws(0, step, [0, 1]))
    assert {clip for folder, clip in alone._targets if folder == data.folder} == set(range(5))
    assert streams.folder not in {folder for folder, _ in alone._targets}


def test_the_loss(config: TinyDecoderConfig, vae: VAE) -> None:
    """Every term against a plain loop over its differences."""
    objective = TinyDecoder(replace(config, edges=2.0, motion=3.0), vae, Shards(Path(config.data)))
    made, target = torch.randn(2, 1, 3, 2, 3, 4).double()
    error, parts = made - target, objective.errors(made, target)
    across = [(error[..., 1:, :] - error[..., :-1, :]).abs().mean(), (error[..., 1:] - error[..., :-1]).abs().mean()]
    later = (error[:, :, 1] - error[:, :, 0]).abs().mean()
    expected = {"l1": error.abs().mean(), "l2": error.pow(2).mean(), "edges": sum(across), "motion": 3 * later}
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        assert float(parts[name]) == pytest.approx(float(value), rel=1e-9)
    assert not any(objective.errors(target, target).values())


def test_crops_of_latents_and_frames_are_of_one_place(config: TinyDecoderConfig, vae: VAE) -> None:
    objective = TinyDecoder(replace(config, crop=2), vae, Shards(Path(config.data)))
    places = torch.arange(24.0).view(1, 1, 1, 4, 6)
    latents = places.expand(8, 8, 3, 4, 6)
    target = places.repeat_interleave(4, 3).repeat_interleave(4, 4).expand(8, 3, 9, 16, 24)
    cut, seen = objective._cropped(latents, target, Draws(0, 0, list(range(8))))
    assert (tuple(cut.shape), tuple(seen.shape)) == ((8, 8, 3, 2, 2), (8, 3, 9, 8, 8))
    assert torch.equal(seen[:, 0, 0, ::4, ::4], cut[:, 0, 0])
    assert len(cut[:, 0, 0, 0, 0].unique()) > 3


@pytest.mark.thorough
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch's gloo backend")
def test_two_processes_train_as_one(config: TinyDecoderConfig, trained: Path, tmp_path: Path) -> None:
    """They stream their shards in turns, and split every batch."""
    (tmp_path / "c.toml").write_text(as_toml("tiny_decoder", config))
    launch("tiny_decoder", tmp_path / "c.toml", tmp_path / "two")
    for name in ("00000.safetensors", "index.json"):
        assert (tmp_path / "two" / "streams" / name).read_bytes() == (trained / "streams" / name).read_bytes()
    for two, one in zip(losses(tmp_path / "two"), losses(trained), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
def test_it_comes_near_the_model(config: TinyDecoderConfig, trained: Path, tmp_path: Path) -> None:
    train(replace(config, steps=120, lr=1e-2, save_every=120), tmp_path)
    early, late = (json.loads((out / "report.json").read_text()) for out in (trained, tmp_path))
    assert late["streams"]["psnr"] > early["streams"]["psnr"] + 3


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("upsample_space=[true, false]", "got a tiny VAE of scale_factor_spatial 2, expected 4, as the VAE has"),
        ("upsample_time=[true, false]", "got a tiny VAE of scale_factor_temporal 2, expected 4, as the VAE has"),
        ("widths=[8, 4]", "upsample_space: got 2 entries, expected 1, one a stage"),
        ("frames=4", "frames: got 4, expected at most the 3 of "),
        ("held=6", "streams: got 3, expected 0 or more than the 6 held back"),
        ("crop=5", "crop: got 5, expected at most 4"),
        ("recompute=true", "got shard or recompute, expected neither: a decoder this small needs none"),
        ("shard=true", "got shard or recompute, expected neither: a decoder this small needs none"),
        ("blocks=9", "expected sizes of 1 to 1048576 and 1 to 8 blocks"),
        ("stream_share=2.0", "stream_share: got 2.0, expected 0 to 1"),
        ('model="nowhere"', "nowhere"),
    ],
)
def test_bad_entries(
    config: TinyDecoderConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], entry: str, said: str
) -> None:
    table = {"model": config.model, "data": config.data, "frames": 3, "streams": 3, "held": 1, "widths": [8, 6, 4]}
    file = tmp_path / "c.toml"
    file.write_text("[tiny_decoder]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in table.items()))
    assert main(["tiny_decoder", "--config", str(file), "--set", entry, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert said in err
    assert not (tmp_path / "out" / "tiny_vae").exists()
