"""A tiny VAE as the decoder: files as they are published, a model's own part, and every refusal."""

import copy
import json
import re
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from flashdreams.recipes.taehv.impl import TAEHV
from safetensors.torch import save_file

import engine
from engine import cli
from engine.loader import EMBEDDED
from engine.model.tiny_vae import TinyVAE, TinyVAEConfig
from engine.model.vae import SplitVAE
from engine.run import main
from engine.weights.shapes import tiny_vae_of
from engine.weights.sources import open_source

SMALL = TinyVAEConfig(widths=(16, 8, 8, 8), encoder_width=8)  # taew2_1, but for its widths
SPRITES = TinyVAEConfig(8, (12, 8, 8), (True, True), (True, True), encoder_width=8)
RUN = ["--preset", "self-forcing", "--prompt", "a", "--frames", "1", "--out", "null", "--height", "32", "--width", "48",
       "--quiet"]  # fmt: skip
LOAD = {"preset": "self-forcing", "height": 32, "width": 48, "device": "cpu"}


def scattered(config, seed=3):
    torch.manual_seed(seed)
    return TinyVAE(config).eval().requires_grad_(False)


def write(file, module, prefix="", wrapped=False):
    state = {prefix + name: tensor.clone() for name, tensor in module.state_dict().items()}
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state} if wrapped else state, file)
    return file


def write_part(folder, module):
    (folder / "tiny_vae").mkdir()
    write(folder / "tiny_vae" / "diffusion_pytorch_model.safetensors", module)
    config = {"_class_name": "TinyVAE"} | json.loads(json.dumps(asdict(module.config)))
    (folder / "tiny_vae" / "config.json").write_text(json.dumps(config))
    return folder


def line_of(capsys, arguments, status=2):
    """The one line on stderr of a run that is refused."""
    capsys.readouterr()
    assert main([str(word) for word in arguments]) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def latents(config, frames=3):
    torch.manual_seed(1)
    return torch.randn(1, config.z_dim, frames, 4, 6)


@pytest.fixture(scope="module")
def tiny():
    return scattered(SMALL)


@pytest.mark.parametrize("name", ["taew2_1.pth", "renamed.safetensors"])
@pytest.mark.parametrize("prefix", ["", "taehv.", "vae."])
def test_published_files_decode(folders, tiny, tmp_path, name, prefix):
    file = write(tmp_path / name, tiny, prefix, wrapped=prefix == "vae.")
    for given in (file, tmp_path) if not prefix else (file,):
        pipeline = engine.load(folders["wan"], vae_decoder=given, **LOAD)
        vae = pipeline.stages.vae
        assert isinstance(vae, SplitVAE)
        assert not hasattr(vae.encodes, "decoder")  # whose weights are not in memory
        z = latents(SMALL)
        first, cache = pipeline.stages.vae_first(z[:, :, :1])
        steady, _ = pipeline.stages.vae_steady(z[:, :, 1:2], cache)
        assert torch.equal(torch.cat([first, steady], dim=2), tiny.decode(z[:, :, :2]))


def test_only_the_decoders_tensors_are_needed(folders, tiny, tmp_path):
    alone = copy.deepcopy(tiny)
    del alone.encoder
    pipeline = engine.load(folders["diffusers"], vae_decoder=write(tmp_path / "decoder.pth", alone), **LOAD)
    assert torch.equal(pipeline.stages.vae.decode(latents(SMALL)), tiny.decode(latents(SMALL)))


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_pictures_are_encoded_by_the_full_vae(folders, tiny, tmp_path, layout):
    """The tiny encoder needs three frames more than a latent has."""
    file = write(tmp_path / "taew2_1.pth", tiny)
    full = engine.load(folders[layout], **LOAD)
    other = engine.load(folders[layout], vae_decoder=file, **LOAD)
    video = torch.rand(1, 3, 5, 32, 48) * 2 - 1
    assert torch.equal(other.stages.vae.encode(video), full.stages.vae.encode(video))


def test_lighttae_takes_latents_that_are_not_normalised(folders, tiny, tmp_path):
    pipeline = engine.load(folders["wan"], vae_decoder=write(tmp_path / "lighttaew2_1.pth", tiny), **LOAD)
    assert any("lighttaew2_1.pth: it takes latents that are not normalised" in note for note in pipeline.notes)
    z, full = latents(SMALL), engine.load(folders["wan"], **LOAD).stages.vae.config
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (full.latents_mean, full.latents_std))
    assert torch.equal(pipeline.stages.vae.decode(z), tiny.decode(z * std + mean))
    # A folder's config.json tells instead, whatever the file is called.
    (tmp_path / "config.json").write_text(json.dumps(asdict(SMALL)))
    plain = engine.load(folders["wan"], vae_decoder=tmp_path, **LOAD)
    assert torch.equal(plain.stages.vae.decode(z), tiny.decode(z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_older_files_double_frames_in_more_stages(folders, tiny, tmp_path, capsys, dtype):
    """As lighttaew2_1.pth, whose decoder.7 has twice the rows; FlashDreams' loader, too, keeps the last ones."""
    state = {name: tensor.to(dtype) for name, tensor in tiny.state_dict().items()}
    torch.save(state, tmp_path / "newer.pth")
    rows = state["decoder.7.conv.weight"]
    state["decoder.7.conv.weight"] = torch.cat([torch.randn_like(rows), rows])
    torch.save(state, tmp_path / "older.pth")
    z, theirs = latents(SMALL), TAEHV(None, channels=SMALL.widths, use_cuda_graph=False)
    theirs.load_from_checkpoint(str(tmp_path / "older.pth"))
    newer, older = (engine.load(folders["wan"], vae_decoder=tmp_path / f"{age}.pth", **LOAD)
                    for age in ("newer", "older"))  # fmt: skip
    assert any("the last 16 of 32 rows of decoder.7.conv.weight are used" in note for note in older.notes)
    got = older.stages.vae.decode(z)
    assert torch.equal(got, newer.stages.vae.decode(z))
    expected = theirs.float().decode(z.transpose(1, 2)).mul(2).sub(1).transpose(1, 2)
    assert (got - expected).abs().max() < 1e-5
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "older.pth")]) == 0
    assert "8 in space, 4 in time" in capsys.readouterr().out


@pytest.mark.parametrize("kept", [(), ("widths", "blocks"), ("z_dim", "upsample_space")])
def test_a_config_may_leave_the_shape_to_the_tensors(folders, tiny, tmp_path, kept):
    """Its latents_mean and latents_std count; a config.json of other parts does not."""
    moments = {"latents_mean": [0.5] * 16, "latents_std": [2.0] * 16}
    write(tmp_path / "taew2_1.pth", tiny)
    told = {key: value for key, value in asdict(SMALL).items() if key in kept} | moments
    (tmp_path / "config.json").write_text(json.dumps(told))
    z = latents(SMALL)
    pipeline = engine.load(folders["wan"], vae_decoder=tmp_path, **LOAD)
    assert torch.equal(pipeline.stages.vae.decode(z), tiny.decode(z * 2 + 0.5))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan", "z_dim": 16} | moments))
    pipeline = engine.load(folders["wan"], vae_decoder=tmp_path, **LOAD)
    assert torch.equal(pipeline.stages.vae.decode(z), tiny.decode(z))


@pytest.mark.parametrize("config", [
    SMALL, TinyVAEConfig(), TinyVAEConfig(48, (16, 8, 8, 8), patch=2, encoder_width=None), SPRITES,
    TinyVAEConfig(128, (16, 8, 8, 8), upsample_time=(True, True, True), blocks=2, patch=4, encoder_width=8),
], ids=["small", "taew2_1", "taew2_2", "sprites", "taeltx"])  # fmt: skip
def test_the_shape_is_read_from_the_tensors(tmp_path, config):
    with torch.device("meta"):
        state = {name: torch.empty(1).expand(p.shape) for name, p in TinyVAE(config).state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name.startswith("decoder.")}
    assert tiny_vae_of(shapes, "file") == replace(config, encoder_width=None)


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    """The embedded model with a tiny VAE of its own."""
    folder = tmp_path_factory.mktemp("models") / "sprites"
    shutil.copytree(EMBEDDED, folder)
    shutil.rmtree(folder / "tiny_vae", ignore_errors=True)
    return write_part(folder, scattered(SPRITES))


def test_a_models_own_tiny_vae(sprites, capfd):
    full, tiny = engine.load(sprites, device="cpu"), engine.load(sprites, decoder="tiny", device="cpu")
    assert not isinstance(full.stages.vae, SplitVAE)
    assert not [note for note in full.notes if "tiny_vae" in note]
    expected = scattered(SPRITES)
    assert torch.equal(tiny.stages.vae.decode(latents(SPRITES)), expected.decode(latents(SPRITES)))
    run = ["--model", str(sprites), "--prompt", "a", "--frames", "9", "--out", "checksum"]
    sums = []
    for options in ([], ["--decoder", "tiny"]):
        assert main([*run, *options]) == 0
        shown = capfd.readouterr()
        sums += re.findall(r"\b[0-9a-f]{64}\b", shown.out + shown.err)
    assert len({*sums}) == 2
    assert cli.main(["inspect", str(sprites)]) == 0
    assert "tiny VAE: 8 latent channels, widths 12, 8, 8; 4 in space, 4 in time" in capfd.readouterr().out


def test_a_tiny_vae_inside_wans_own_folder(folders, tiny, tmp_path, capsys):
    """With its config.json, which tells that latents are not normalised."""
    folder = shutil.copytree(folders["wan"], tmp_path / "wan")
    moments = {"latents_mean": (0.5,) * 16, "latents_std": (2.0,) * 16}
    write_part(folder, tiny)
    (folder / "tiny_vae" / "config.json").write_text(json.dumps({"_class_name": "TinyVAE", **asdict(SMALL), **moments}))
    z = latents(SMALL)
    pipeline = engine.load(folder, decoder="tiny", **LOAD)
    assert torch.equal(pipeline.stages.vae.decode(z), tiny.decode(z * 2 + 0.5))
    assert not isinstance(engine.load(folder, **LOAD).stages.vae, SplitVAE)
    assert cli.main(["inspect", str(folder)]) == 0
    assert "tiny VAE: 16 latent channels, widths 16, 8, 8, 8" in capsys.readouterr().out


@pytest.mark.parametrize(("damage", "said"), [
    ({"config.json": b"{"}, "config.json"),
    ({"config.json": b'{"z_dim": 8, "widths": [8, 8, 8]}'}, "with misshapen decoder.1.weight"),
    ({"diffusion_pytorch_model.safetensors": b"no"}, "diffusion_pytorch_model.safetensors"),
])  # fmt: skip
def test_inspect_notes_a_tiny_vae_that_does_not_fit(sprites, tmp_path, capsys, damage, said):
    """The model runs without it."""
    folder = shutil.copytree(sprites, tmp_path / "sprites")
    for name, content in damage.items():
        (folder / "tiny_vae" / name).write_bytes(content)
    assert cli.main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    (note,) = [line for line in shown.splitlines() if "--decoder tiny does not run: " in line]
    assert said in note
    assert f"runs with: python -m engine.run --model {folder}" in shown
    assert said in line_of(capsys, ["--model", folder, "--decoder", "tiny", "--prompt", "a", "--frames", "1",
                                    "--out", "null"])  # fmt: skip


def test_every_part_as_a_file_and_the_models_tiny_vae(sprites):
    """The directory is read for it."""
    files = {"checkpoint": sprites / "transformer", "vae": sprites / "vae", "text_encoder": sprites / "text_encoder",
             "tokenizer": sprites / "tokenizer"}  # fmt: skip
    pipeline = engine.load(sprites, **files, preset="greedy", decoder="tiny", device="cpu")
    assert torch.equal(pipeline.stages.vae.decode(latents(SPRITES)), scattered(SPRITES).decode(latents(SPRITES)))


def test_memory_counts_one_decoder(sprites):
    full, tiny = engine.plan_of(sprites, device="cpu"), engine.plan_of(sprites, decoder="tiny", device="cpu")

    def weights(plan, what):
        return sum(need.bytes + need.mapped for need in plan.needs if need.what == f"weights of the {what}")

    stages = engine.load(sprites, decoder="tiny", device="cpu").stages
    both = [4 * sum(p.numel() for p in part.parameters()) for part in (stages.vae.encodes, stages.vae.decodes)]
    assert [weights(tiny, "VAE"), weights(tiny, "tiny VAE")] == both
    assert weights(full, "tiny VAE") == 0
    assert sum(both) < weights(full, "VAE")


def test_no_tiny_vae_there(folders, tmp_path, capsys):
    for model, said in (
        (folders["diffusers"], f"decoder: got tiny, but {folders['diffusers']} has no tiny_vae/, expected it, or"),
        (folders["wan"], "got no tiny VAE ("),
    ):
        error = line_of(capsys, ["--model", model, "--decoder", "tiny", *RUN])
        assert said in error
        assert "--vae-decoder FILE" in error


def test_both_options_at_once(folders, tiny, tmp_path, capsys):
    file = write(tmp_path / "taew2_1.pth", tiny)
    with pytest.raises(SystemExit) as ended:
        main(["--decoder", "tiny", "--vae-decoder", str(file), *RUN])
    assert ended.value.code == 2
    assert "not allowed with argument --decoder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="decoder: got tiny and a vae_decoder, expected one of them"):
        engine.load(folders["wan"], vae_decoder=file, decoder="tiny", **LOAD)
    with pytest.raises(ValueError, match="decoder: got 'big', expected 'full' or 'tiny'"):
        engine.load(folders["wan"], decoder="big", **LOAD)


@pytest.mark.parametrize(("config", "said"), [
    (replace(SMALL, z_dim=12), "z_dim 12, expected 16, as the VAE has"),
    (replace(SMALL, widths=(16, 8, 8), upsample_space=(True, True), upsample_time=(True, True)),
     "scale_factor_spatial 4, expected 8, as the VAE has"),
    (replace(SMALL, patch=2), "scale_factor_spatial 16, expected 8, as the VAE has"),
    (replace(SMALL, upsample_time=(False, False, True)), "scale_factor_temporal 2, expected 4, as the VAE has"),
])  # fmt: skip
def test_another_size_than_the_models(folders, tmp_path, capsys, config, said):
    file = write(tmp_path / "taew.safetensors", scattered(config))
    error = line_of(capsys, ["--model", folders["wan"], "--vae-decoder", file, *RUN])
    assert error == f"error: {file}: got a tiny VAE of {said}\n"


def test_damaged_files(folders, tiny, tmp_path, capsys):
    state = tiny.state_dict()
    cases = {
        "missing decoder.4.conv.2.bias": {k: v for k, v in state.items() if k != "decoder.4.conv.2.bias"},
        "extra decoder.40.weight": state | {"decoder.40.weight": torch.zeros(1)},
        "misshapen decoder.9.conv.2.weight [8, 8, 1, 1] instead of [8, 8, 3, 3]":
            state | {"decoder.9.conv.2.weight": torch.zeros(8, 8, 1, 1)},
        "without decoder.1.weight, expected it": {k: v for k, v in state.items() if k != "decoder.1.weight"},
        "got a tiny VAE of [3] blocks a stage and 4 channels of pixels, expected TAEHV's layout":
            state | {"decoder.22.weight": torch.zeros(4, 8, 3, 3)},
        "without decoder.16.weight": {k: v for k, v in state.items() if not k.startswith("decoder.15.")},
        "without decoder.6.conv.weight": {k: v for k, v in state.items() if not k.startswith("decoder.5.")},
        "got a tiny autoencoder of another layout than TAEHV's, expected a tiny VAE":  # as TAESD
            {k: v for k, v in state.items() if ".conv.weight" not in k},
    }  # fmt: skip
    for said, tensors in cases.items():
        torch.save(tensors, tmp_path / "w.pth")
        assert said in line_of(capsys, ["--model", folders["wan"], "--vae-decoder", tmp_path / "w.pth", *RUN])


@pytest.mark.parametrize(
    ("name", "prefix"), [("taew2_1.safetensors", ""), ("lighttaew2_1.pth", "taehv."), ("decoder.pth", "vae.")]
)
def test_elsewhere_they_say_how_they_are_used(folders, tiny, tmp_path, capsys, name, prefix):
    given = copy.deepcopy(tiny)
    if name == "decoder.pth":
        del given.encoder
    file = write(tmp_path / name, given, prefix, wrapped=True)
    said = "a tiny VAE (TAEHV, TAEW, LightTAE or the like); pass it as --vae-decoder"
    for option in ("--checkpoint", "--vae", "--text-encoder"):
        for place in (file, tmp_path):
            assert f"got {said}, expected a" in line_of(capsys, ["--model", folders["wan"], option, place, *RUN])
    assert said in line_of(capsys, ["--model", file, *RUN])
    assert f"{name}: {said}" in line_of(capsys, ["--model", tmp_path, *RUN])
    for place in (file, tmp_path):
        assert cli.main(["inspect", str(place)]) == 0
        shown = capsys.readouterr().out
        assert "tiny VAE: 16 latent channels, widths 16, 8, 8, 8; 8 in space, 4 in time; TAEHV names" in shown
        assert f"--vae-decoder {place} " in shown


def test_other_parts_are_no_tiny_vae(folders, published, tmp_path, capsys):
    save_file(published.state("vae"), tmp_path / "vae.safetensors")
    error = line_of(capsys, ["--model", folders["wan"], "--vae-decoder", tmp_path / "vae.safetensors", *RUN])
    assert "got a VAE (diffusers names), expected a tiny VAE" in error
    missing = tmp_path / "nowhere.pth"
    error = line_of(capsys, ["--model", folders["wan"], "--vae-decoder", missing, *RUN])
    assert error == f"error: tiny VAE: got {missing}, expected an existing file or folder\n"


def test_it_lies_beside_other_files(folders, published, tiny, tmp_path):
    """ComfyUI's folders, and a download with every variant in one folder."""
    (tmp_path / "vae_approx").mkdir()
    (tmp_path / "vae").mkdir()
    write(tmp_path / "vae_approx" / "taew2_1.safetensors", tiny)
    save_file(published.wan("vae"), tmp_path / "vae" / "wan_2.1_vae.safetensors")
    assert open_source(tmp_path, part="tiny_vae").files == [tmp_path / "vae_approx" / "taew2_1.safetensors"]
    assert open_source(tmp_path, part="vae").files == [tmp_path / "vae" / "wan_2.1_vae.safetensors"]
    write(tmp_path / "vae" / "taew2_1.safetensors", tiny)
    assert open_source(tmp_path / "vae", part="vae").files == [tmp_path / "vae" / "wan_2.1_vae.safetensors"]
    assert open_source(tmp_path / "vae", part="tiny_vae").files == [tmp_path / "vae" / "taew2_1.safetensors"]
