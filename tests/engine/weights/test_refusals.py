"""What contradicts itself, is half a model or another one is refused by name, before weights are read."""

import io
import json
import pickle
import re
import shutil
import zipfile

import pytest
import torch
from layouts import HEIGHT, WIDTH
from safetensors.torch import load_file, save_file

import engine.loader
from engine import load
from engine.run import main
from engine.weights.shapes import transformer_of
from engine.weights.sources import open_source


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch):
    """Every refusal comes before the first tensor is copied."""

    def read(*_, **__):
        raise LookupError("weights were read")

    monkeypatch.setattr(engine.loader, "load_transformer", read)
    monkeypatch.setattr(engine.loader, "fill", read)


def refused(said, model, **options):
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        load(model, **{"height": HEIGHT, "width": WIDTH, "preset": "self-forcing", **options})
    assert "\n" not in str(caught.value)
    assert "got" in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.fixture
def diffusers(folders, tmp_path):
    return shutil.copytree(folders["diffusers"], tmp_path / "m")


@pytest.fixture
def wan(folders, tmp_path):
    return shutil.copytree(folders["wan"], tmp_path / "m")


def edit(file, **changes):
    values = json.loads(file.read_text())
    values.update(changes)
    file.write_text(json.dumps({name: value for name, value in values.items() if value != "absent"}))


def test_the_models_themselves_are_not_refused(folders):
    for folder in folders.values():
        with pytest.raises(LookupError, match="weights were read"):
            load(folder, height=HEIGHT, width=WIDTH, preset="self-forcing")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "transformer_2"),
        ({"boundary_ratio": 0.875}, "boundary_ratio 0.875"),
        ({"expand_timesteps": True}, "expand_timesteps"),
        ({"_class_name": "WanImageToVideoPipeline"}, "WanImageToVideoPipeline.*expected 'WanPipeline'"),
        ({"_class_name": "WanVACEPipeline"}, "WanVACEPipeline"),
        ({"_class_name": "SkyReelsV2Pipeline"}, "SkyReelsV2Pipeline"),
        ({"_class_name": "StableDiffusionPipeline"}, "StableDiffusionPipeline"),
        ({"transformer": ["diffusers", "WanVACETransformer3DModel"]}, "WanVACETransformer3DModel"),
        ({"vae": ["diffusers", "AutoencoderKL"]}, "vae AutoencoderKL"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder T5EncoderModel"),
        ({"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}, "image_encoder"),
    ],
)
def test_pipelines_of_which_only_a_part_would_run(diffusers, changes, said):
    edit(diffusers / "model_index.json", **changes)
    refused(said, diffusers)


@pytest.mark.parametrize("name", ["transformer_2", "image_encoder", "transformer_low_noise"])
def test_a_part_that_the_index_does_not_name(diffusers, name):
    shutil.copytree(diffusers / "transformer", diffusers / name)
    refused(name, diffusers)
    (diffusers / "model_index.json").unlink()
    refused(name, diffusers)


def test_parts_that_are_there_and_not_used_are_named(diffusers, monkeypatch):
    monkeypatch.undo()
    edit(diffusers / "model_index.json", safety_checker=["diffusers", "Checker"], feature_extractor=[None, None])
    (diffusers / "upscaler").mkdir()
    (diffusers / "upscaler" / "config.json").write_text("{}")
    notes = load(diffusers, height=HEIGHT, width=WIDTH, preset="self-forcing").notes
    assert any("safety_checker, upscaler is there and not used" in note for note in notes), notes


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("transformer", {"in_channels": 36}, "in_channels 36, expected 16, the latent channels"),
        ("transformer", {"out_channels": 8}, "out_channels 8, expected 16"),
        ("transformer", {"text_dim": 32}, "text_dim 32, expected 24, the width of the text encoder"),
        ("transformer", {"num_layers": 3}, r"missing blocks\.2"),
        ("transformer", {"num_layers": 1}, r"extra blocks\.1"),
        ("transformer", {"ffn_dim": 64}, "misshapen blocks"),
        ("transformer", {"num_attention_heads": 3}, "num_attention_heads"),
        ("transformer", {"image_dim": 1280}, "image_dim"),
        ("transformer", {"_class_name": "CogVideoXTransformer3DModel"}, "CogVideoXTransformer3DModel"),
        ("vae", {"z_dim": 8, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8}, "expected 8, the latent channels"),
        ("vae", {"base_dim": 8}, "misshapen"),
        ("vae", {"is_residual": True}, "is_residual"),
        ("vae", {"_class_name": "AutoencoderKL"}, "AutoencoderKL"),
        ("text_encoder", {"d_model": 32}, "expected 32, the width of the text encoder"),
        ("text_encoder", {"model_type": "t5"}, "model_type 't5'"),
        ("text_encoder", {"num_layers": 3}, r"missing block\.2"),
        ("text_encoder", {"vocab_size": 8}, "got 13 tokens, expected at most 8"),
    ],
)
def test_configs_against_each_other_and_against_the_tensors(diffusers, part, changes, said):
    edit(diffusers / part / "config.json", **changes)
    refused(said, diffusers)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "i2v"}, "model_type 'i2v'"),
        ({"model_type": "ti2v"}, "model_type 'ti2v'"),
        ({"in_dim": 36}, "in_channels 36"),
        ({"num_layers": 3}, r"missing blocks\.2"),
        ({"dim": 100, "num_heads": 3}, "dim 100 with 3 heads"),
        ({"num_heads": "absent"}, "no num_heads"),
        ({"inject_sample_info": True}, "unknown key inject_sample_info"),
        ({"_class_name": "VaceWanModel", "vace_layers": [0, 2]}, "vace_layers"),
        ({"qk_norm": False}, "qk_norm False"),
    ],
)
def test_configs_of_wans_own_folder(wan, changes, said):
    edit(wan / "config.json", **changes)
    refused(said, wan)


PARTS = {"transformer": "transformer", "vae": "vae", "text_encoder": "text"}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("fault", ["missing", "renamed", "misshapen", "extra", "scaled without scale", "whole numbers"])
def test_every_component_is_strict(diffusers, part, fault):
    file = next((diffusers / part).glob("*.safetensors"))
    state = load_file(file)
    # Not an embedding: those may be in 8 bits without a scale.
    names = [name for name in sorted(state) if state[name].ndim > 1 and not re.search("embed|shared", name)]
    name = names[-1]
    tensor = state.pop(name)
    dtypes = {"scaled without scale": torch.float8_e4m3fn, "whole numbers": torch.int8}
    if fault == "renamed":
        state[f"{name}_old"] = tensor
    elif fault == "misshapen":
        state[name] = tensor[:-1].contiguous()
    elif fault == "extra":
        state |= {name: tensor, "surplus.weight": torch.zeros(1)}
    elif fault in dtypes:
        state[name] = tensor.to(dtypes[fault])
        if fault == "scaled without scale":
            state["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    save_file(state, file)
    refused("got", diffusers)


@pytest.mark.parametrize("gone", ["q", "k", "ffn.0", "modulation", "patch_embedding", "head.head"])
def test_half_a_checkpoint(folders, published, tmp_path, gone):
    state = {name: tensor for name, tensor in published.wan("transformer").items() if gone not in name}
    torch.save({"generator_ema": state}, tmp_path / "w.pt")
    refused("got", folders["wan"], checkpoint=tmp_path / "w.pt")


@pytest.mark.parametrize(("width", "blocks", "right"), [(1536, 30, True), (1536, 29, False), (5120, 40, True),
                                                        (5120, 30, False), (256, 7, True)])  # fmt: skip
def test_a_published_width_has_its_published_depth(width, blocks, right):
    """A file that lacks its last blocks looks whole."""
    shapes = {
        "patch_embedding.weight": (width, 16, 1, 2, 2), "proj_out.weight": (64, width),
        "condition_embedder.text_embedder.linear_1.weight": (width, 4096),
        "condition_embedder.time_embedder.linear_1.weight": (width, 256),
        **{f"blocks.{i}.ffn.net.0.proj.weight": (4 * width, width) for i in range(blocks)},
    }  # fmt: skip
    if right:
        config = transformer_of(shapes, None, "w")
        assert (config.num_layers, config.num_attention_heads, config.out_channels) == (blocks, width // 128, 16)
    else:
        with pytest.raises(ValueError, match=rf"got {blocks} blocks of width {width}, expected"):
            transformer_of(shapes, None, "w")


def keys(*names):
    return {name: torch.zeros(2, 2) for name in names}


OTHERS = {
    "an image-to-video model": lambda wan: wan | keys("blocks.0.cross_attn.k_img.weight", "img_emb.proj.1.weight"),
    "a VACE model": lambda wan: wan | keys("vace_blocks.0.after_proj.weight", "vace_patch_embedding.weight"),
    "a Wan-Animate model": lambda wan: wan | keys("face_adapter.fuser_blocks.0.linear1_kv.weight"),
    "a speech-to-video model": lambda wan: wan | keys("casual_audio_encoder.weights.weight"),
    "a SkyReels-V2 model": lambda wan: wan | keys("fps_embedding.weight"),
    "a Fun-Control model": lambda wan: wan | keys("control_adapter.conv.weight"),
    "FLUX or HunyuanVideo": lambda wan: keys("double_blocks.0.img_attn.qkv.weight"),
    "U-Net": lambda wan: keys("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"),
    "an adapter": lambda wan: keys("diffusion_model.blocks.0.self_attn.q.lora_A.weight"),
    "a tiny autoencoder": lambda wan: keys("encoder.0.weight", "decoder.1.weight"),
    "4 tensors with other names": lambda wan: keys("a", "b", "c", "d"),
    "0 tensors with other names": lambda wan: {},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_are_named(folders, published, tmp_path, kind):
    save_file(OTHERS[kind](published.wan("transformer")), tmp_path / "w.safetensors")
    refused(kind, folders["wan"], checkpoint=tmp_path / "w.safetensors")


@pytest.mark.parametrize(("option", "part"), [("checkpoint", "vae"), ("checkpoint", "text"), ("vae", "transformer"),
                                              ("vae", "text"), ("text_encoder", "vae")])  # fmt: skip
def test_one_part_given_for_another(folders, published, tmp_path, option, part):
    torch.save(published.wan(part), tmp_path / "w.pth")
    words = {"vae": "a VAE", "text": "a text encoder", "transformer": "a transformer"}[part]
    refused(rf"got {words} \(Wan names\), expected a", folders["wan"], **{option: tmp_path / "w.pth"})


def test_several_states_of_which_none_is_known(folders, published, tmp_path):
    state = published.wan("transformer")
    torch.save({"one": state, "two": state}, tmp_path / "w.pt")
    refused("got states one, two, expected one of", folders["wan"], checkpoint=tmp_path / "w.pt")
    torch.save({"critic": state, "real_score": state}, tmp_path / "w.pt")
    refused("got states critic, real_score", folders["wan"], checkpoint=tmp_path / "w.pt")
    torch.save({"generator": {}, "generator_ema": {}, "critic": state}, tmp_path / "w.pt")
    refused("got states critic, expected one of generator_ema", folders["wan"], checkpoint=tmp_path / "w.pt")


def test_two_tables_of_tokens(folders, published, tmp_path):
    """A text encoder may hold its table twice, but not two tables."""
    table = published.state("text")["shared.weight"]
    twice = published.state("text") | {"encoder.embed_tokens.weight": table.clone()}
    save_file(twice, tmp_path / "w.safetensors")
    with pytest.raises(LookupError):
        load(folders["wan"], text_encoder=tmp_path / "w.safetensors", height=HEIGHT, width=WIDTH, preset="self-forcing")
    save_file(twice | {"encoder.embed_tokens.weight": table + 1}, tmp_path / "w.safetensors")
    refused("embed_tokens.weight twice", folders["wan"], text_encoder=tmp_path / "w.safetensors")


@pytest.mark.parametrize("damage", ["cut", "pointer"])
def test_a_damaged_file_of_wans_own_folder_is_named(wan, damage):
    file = wan / "Wan2.1_VAE.pth"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"version https://git-lfs.github.com/spec/v1")
    refused(r"Wan2\.1_VAE\.pth: got .*it may be the VAE", wan)


@pytest.mark.parametrize("weight_map", [[1], {"a": 5}, None])
@pytest.mark.parametrize("layout", ["diffusers", "wan"])
def test_damaged_indexes(folders, tmp_path, layout, weight_map):
    folder = shutil.copytree(folders[layout], tmp_path / "m")
    place = folder / "transformer" if layout == "diffusers" else folder
    (place / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused("got no weight_map of file names", folder)


def test_a_state_without_a_checkpoint(folders, capsys):
    refused("checkpoint_state: got 'generator'", folders["wan"], checkpoint_state="generator")
    assert main(["--prompt", "a", "--checkpoint-state", "generator", "--out", "null"]) == 2
    assert "--checkpoint-state: got generator alone" in capsys.readouterr().err


class Planted:
    def __reduce__(self):
        return (print, ("planted code ran",))


def legacy_pickle(content):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def archive_of_photos():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("photo.jpg", b"\xff\xd8")
    return buffer.getvalue()


DAMAGED = {
    "empty": (lambda whole: b"", "an empty file"),
    "a Git LFS pointer": (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2\n", "LFS"),
    "a web page": (lambda whole: b"\n<!DOCTYPE html><html>", "a web page"),
    "a text": (lambda whole: b"hello, I am no model at all", "27 bytes that start with"),
    "a picture": (lambda whole: b"\x89PNG\r\n\x1a\n" + bytes(100), "108 bytes that start with"),
    "half of a safetensors file": (lambda whole: whole[: len(whole) // 2], "expected safetensors"),
    "a header that promises too much": (lambda whole: b"\xff" * 7 + b"\x7f" + whole[8:], "expected safetensors"),
    "an archive of photos": (lambda whole: archive_of_photos(), "expected a torch checkpoint"),
    "a pickle with code": (lambda whole: pickle.dumps(Planted()), "expected a torch checkpoint"),
    "a torch file with code": (lambda whole: legacy_pickle({"a": Planted()}), "expected a torch checkpoint"),
    "a list": (lambda whole: legacy_pickle([torch.zeros(1)]), "got list, expected a dictionary"),
}


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_damaged_files(folders, tmp_path, kind, name, capsys):
    whole = (folders["wan"] / "diffusion_pytorch_model.safetensors").read_bytes()
    make, said = DAMAGED[kind]
    (tmp_path / name).write_bytes(make(whole))
    refused(said, folders["wan"], checkpoint=tmp_path / name)
    assert "planted" not in capsys.readouterr().out


def test_what_is_no_model_directory(folders, published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(r"hf download Wan-AI/Wan2\.1-T2V-1\.3B-Diffusers --local-dir", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    refused("expected a diffusers pipeline directory", tmp_path / "nowhere")
    torch.save(published.wan("vae"), tmp_path / "w.pth")
    refused("a file, expected a directory", tmp_path / "w.pth")
    (tmp_path / "empty").mkdir()
    refused("got nothing, expected a diffusers pipeline directory", tmp_path / "empty")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    refused("got a.jpg, expected a diffusers pipeline directory", tmp_path / "photos")
    cache = tmp_path / "models--Wan-AI--Wan2.1-T2V-1.3B"
    (cache / "snapshots" / "0123").mkdir(parents=True)
    (cache / "snapshots" / "abcd").mkdir()
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123")
    refused("the root of a download cache, expected .*snapshots/0123", cache)
    (tmp_path / "moe" / "high_noise_model").mkdir(parents=True)
    (tmp_path / "moe" / "low_noise_model").mkdir()
    refused("Wan2.2-A14B", tmp_path / "moe")


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("Wan2.1_VAE.pth", "got no VAE .*--vae FILE"),
        ("models_t5_umt5-xxl-enc-bf16.pth", "got no text encoder .*--text-encoder FILE"),
        ("diffusion_pytorch_model.safetensors", "got no transformer .*--checkpoint FILE"),
        ("google", "got tokenizers none"),
    ],
)
def test_wans_own_folder_without_a_part(wan, gone, said):
    path = wan / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(said, wan)


def test_wans_own_folder_with_a_part_twice(wan, published):
    torch.save(published.wan("vae"), wan / "another_vae.pth")
    refused("several files with a VAE .*Wan2.1_VAE.pth, another_vae.pth.*--vae FILE", wan)
    (wan / "another_vae.pth").unlink()
    torch.save(published.wan("transformer"), wan / "self_forcing_dmd.pt")  # the standard name goes first
    with pytest.raises(LookupError):
        load(wan, height=HEIGHT, width=WIDTH, preset="self-forcing")


def test_the_vae_of_another_model(folders, tmp_path):
    """Wan2.2-5B's VAE has 48 latent channels."""
    state = keys("encoder.downsamples.0.downsamples.0.residual.0.gamma", "decoder.middle.0.residual.0.gamma")
    torch.save(state, tmp_path / "Wan2.2_VAE.pth")
    refused("the VAE of Wan2.2-5B", folders["wan"], vae=tmp_path / "Wan2.2_VAE.pth")


def test_source_names_the_missing_tensor(published, tmp_path):
    state = published.wan("transformer")
    state.pop("patch_embedding.weight")
    save_file(state, tmp_path / "w.safetensors")
    source = open_source(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"without patch_embedding\.weight, expected it"):
        transformer_of(source.shapes(), None, source.label)


@pytest.mark.parametrize("steps", ["4", "2", "4,3,2,1", "1000,500/4", "50"])
def test_a_count_of_steps_is_no_timestep(steps, capsys):
    assert main(["--prompt", "a", "--steps", steps, "--out", "null", "--frames", "1"]) == 2
    assert "expected timesteps that begin near 1000 (four steps: 1000,750,500,250)" in capsys.readouterr().err
