"""Models as they lie on disk: every layout gives the video that diffusers' layout of the same weights gives."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from layouts import HEIGHT, WIDTH, Published, wan_text_names, wan_transformer_names, wan_vae_names
from safetensors.torch import save_file
from tiny import randomize
from transformers import UMT5Config, UMT5EncoderModel

from engine import load
from engine.weights.names import NAMINGS

SIZE = {"height": HEIGHT, "width": WIDTH, "preset": "self-forcing", "precision": "fp32", "threads": 1}


def video_of(model, **options):
    """sha256 of the first frames."""
    pipeline = load(model, **{**SIZE, **options})
    with pipeline.stream("a red circle", seed=3, frames=9) as stream:
        return hashlib.sha256(np.stack(list(stream)).tobytes()).hexdigest()


@pytest.fixture(scope="module")
def expected(folders):
    return video_of(folders["diffusers"])


def translated(name, part, spelling):
    naming = next(n for n in NAMINGS if n.part == part and n.name == spelling)
    return naming.translate(name)


def test_vae_names_equal_diffusers_own_conversion():
    names = wan_vae_names()
    assert len(names) == len(set(names)) == 194
    theirs = {name: ours for ours, name in convert_wan_vae_to_diffusers({name: name for name in names}).items()}
    assert {name: translated(name, "vae", "Wan") for name in names} == theirs
    with torch.device("meta"):
        assert set(theirs.values()) == set(AutoencoderKLWan().state_dict())


def test_transformer_names_equal_diffusers_own_conversion():
    names = wan_transformer_names(3)
    theirs = convert_wan_transformer_to_diffusers({name: torch.tensor(i) for i, name in enumerate(names)})
    assert {ours: list(names)[int(number)] for ours, number in theirs.items()} == {v: k for k, v in names.items()}
    assert {name: translated(name, "transformer", "Wan") for name in names} == names


def test_text_encoder_names_are_transformers_own():
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(vocab_size=8, d_model=4, num_layers=3, num_heads=2, d_kv=2, d_ff=4))
    assert set(wan_text_names(3).values()) | {"encoder.embed_tokens.weight"} == set(model.state_dict())


def test_wans_own_folder(folders, expected):
    assert video_of(folders["wan"]) == expected


@pytest.mark.parametrize("place", ["google/umt5-xxl", "tokenizer", "umt5-xxl", "."])
def test_the_tokenizer_of_wans_own_folder_is_found(folders, expected, tmp_path, place):
    folder = shutil.copytree(folders["wan"], tmp_path / "m", ignore=shutil.ignore_patterns("google"))
    shutil.copytree(folders["wan"] / "google" / "umt5-xxl", folder / place, dirs_exist_ok=True)
    assert video_of(folder) == expected


def test_names_of_files_do_not_matter(folders, published, expected, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(folders["wan"] / "google", folder / "google")
    shutil.copy(folders["wan"] / "config.json", folder)
    torch.save(published.wan("transformer"), folder / "vae.bin")
    save_file(published.wan("vae"), folder / "models_t5.safetensors")
    save_file(published.wan("text"), folder / "a.sft")
    (folder / "._a.sft").write_bytes(b"\x00\x05\x16\x07")  # macOS
    assert video_of(folder) == expected


@pytest.mark.parametrize("index", [True, False])
def test_numbered_files_of_wans_own_folder(folders, published, expected, tmp_path, index):
    folder = shutil.copytree(folders["wan"], tmp_path / "m")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    state = published.wan("transformer")
    names = sorted(state)
    where = {}
    for number in (1, 2, 3):
        file = f"diffusion_pytorch_model-0000{number}-of-00003.safetensors"
        part = names[number - 1 :: 3]
        save_file({name: state[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    if index:
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert video_of(folder) == expected
    (folder / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="diffusion_pytorch_model"):
        load(folder, **SIZE)


@pytest.mark.parametrize("container", ["safetensors", "pt", "legacy", "bin", "ckpt"])
@pytest.mark.parametrize("part", ["transformer", "vae", "text"])
def test_parts_as_files(folders, published, expected, tmp_path, part, container):
    """A directory with other weights, of which a file replaces one; the others come from the right directory."""
    file = tmp_path / f"part.{container}"
    state = published.wan(part)
    if container == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=container != "legacy")
    folder = shutil.copytree(folders["diffusers"], tmp_path / "m")
    component = "text_encoder" if part == "text" else part
    for weights in (folder / component).glob("*.safetensors"):
        save_file({name: torch.zeros_like(t) for name, t in published.state(part).items()}, weights)
    option = {"transformer": "checkpoint", "vae": "vae", "text": "text_encoder"}[part]
    assert video_of(folder, **{option: file}) == expected
    assert video_of(folder) != expected


def test_all_parts_as_files_need_no_directory(folders, published, expected, tmp_path):
    for part in ("transformer", "vae", "text"):
        torch.save(published.wan(part), tmp_path / f"{part}.pth")
    assert video_of(
        None, checkpoint=tmp_path / "transformer.pth", vae=tmp_path / "vae.pth", text_encoder=tmp_path / "text.pth",
        tokenizer=folders["wan"] / "google" / "umt5-xxl",
    ) == expected  # fmt: skip


def test_one_file_with_every_part(folders, published, expected, tmp_path):
    """ComfyUI saves whole checkpoints: each part behind its own prefix."""
    prefixes = {"transformer": "model.diffusion_model.", "vae": "vae.", "text": "text_encoders.umt5xxl.transformer."}
    state = {prefixes[part] + name: t for part in prefixes for name, t in
             (published.state if part == "text" else published.wan)(part).items()}  # fmt: skip
    save_file(state, tmp_path / "all.safetensors")
    file = tmp_path / "all.safetensors"
    tokenizer = folders["wan"] / "google" / "umt5-xxl"
    assert video_of(None, checkpoint=file, vae=file, text_encoder=file, tokenizer=tokenizer) == expected


PREFIXES = [
    "", "model.", "model.diffusion_model.", "diffusion_model.", "module.", "_forward_module.", "generator.model.",
    "generator.", "module.model._fsdp_wrapped_module.", "_orig_mod.", "student.", "net.transformer.",
]  # fmt: skip


@pytest.mark.parametrize("spelling", ["Wan", "diffusers"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(folders, published, expected, tmp_path, prefix, spelling):
    state = published.wan("transformer") if spelling == "Wan" else published.state("transformer")
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "w.safetensors")
    assert video_of(folders["wan"], checkpoint=tmp_path / "w.safetensors") == expected


def other(state):
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def leaves(states):
    for name, what in states.items():
        yield from leaves(what) if isinstance(what, dict) else [(name, what)]


@pytest.mark.parametrize(
    ("states", "preset", "taken"),
    [
        ({"generator_ema": "right", "generator": "other"}, "self-forcing", "generator_ema"),
        ({"generator_ema": "right", "generator": "other"}, "self-forcing-framewise", "generator_ema"),
        ({"generator_ema": "other", "generator": "right"}, "longlive", "generator"),
        ({"generator_ema": "other", "generator": "right"}, "causvid", "generator"),
        ({"generator_ema": "other", "generator": "right"}, "causal-forcing", "generator"),
        ({"generator_ema": "other", "generator": "right"}, "krea-realtime", "generator"),
        ({"generator_ema": "empty", "generator": "right"}, "self-forcing", "generator"),
        ({"generator_ema": "right", "generator": "empty"}, "longlive", "generator_ema"),
        ({"module": "right"}, "self-forcing", "module"),
        ({"student": "right"}, "self-forcing", "student"),
        ({"model": "right", "optimizer": "numbers", "step": "number"}, "self-forcing", "model"),
        ({"generator": "right", "critic": "other", "real_score": "other"}, "self-forcing", "generator"),
        ({"critic": "other", "mine": "right"}, "self-forcing", "mine"),
        ({"state_dict": {"generator": "right", "critic": "other"}}, "self-forcing", "state_dict.generator"),
        ({"model": {"generator_ema": "right", "fake_score": "other"}}, "self-forcing", "model.generator_ema"),
        ({"model": {"generator_ema": "other", "generator": "right"}}, "longlive", "model.generator"),
    ],
)
def test_states_of_training_checkpoints(folders, published, tmp_path, states, preset, taken):
    """The state that the preset's weights were published for, in Self-Forcing's layout; the note says which one."""
    right = published.wan("transformer")
    content = {"right": right, "other": other(right), "empty": {}, "number": 600,
               "numbers": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-5}]}}  # fmt: skip
    (tmp_path / "checkpoint_model_000600").mkdir()
    file = tmp_path / "checkpoint_model_000600" / "model.pt"

    def filled(states):
        return {name: filled(what) if isinstance(what, dict) else content[what] for name, what in states.items()}

    torch.save(filled(states), file)
    expected = video_of(folders["diffusers"], preset=preset)
    (file.parent / "config.json").write_text('{"learning_rate": 2e-6}')  # of the training
    for path in (file, file.parent):
        assert video_of(folders["wan"], checkpoint=path, preset=preset) == expected
    notes = load(folders["wan"], checkpoint=file, **{**SIZE, "preset": preset}).notes
    networks = [what for name, what in leaves(states) if name not in ("critic", "fake_score", "real_score")]
    several = sum(what in ("right", "other") for what in networks) > 1
    assert any(f"took {taken} " in note for note in notes) == several


def test_bystanders(folders, published, expected, tmp_path):
    """Counts of steps, another part in the same file, CLIP and its tokenizer in Wan's own folder."""
    folder = shutil.copytree(folders["wan"], tmp_path / "m")
    torch.save({"textual.blocks.0.attn.q.weight": torch.zeros(2, 2)}, folder / "models_clip.pth")
    shutil.copytree(folder / "google" / "umt5-xxl", folder / "xlm-roberta-large")
    assert video_of(folder) == expected
    state = {**published.wan("transformer"), "global_step": torch.tensor(5)}
    state |= {f"vae.{name}": torch.zeros_like(tensor) for name, tensor in published.wan("vae").items()}
    save_file(state, tmp_path / "w.safetensors")
    assert video_of(folder, checkpoint=tmp_path / "w.safetensors") == expected


def test_a_toml_preset_takes_the_state_of_its_base(folders, published, tmp_path):
    (tmp_path / "mine.toml").write_text('base = "longlive"\nwindow = 9\n')
    right = published.wan("transformer")
    torch.save({"generator_ema": other(right), "generator": right}, tmp_path / "w.pt")
    mine = str(tmp_path / "mine.toml")
    assert video_of(folders["wan"], checkpoint=tmp_path / "w.pt", preset=mine) == video_of(folders["wan"], preset=mine)


def test_the_shape_comes_from_the_file(folders, tmp_path):
    """A wider transformer on a directory that holds a narrow one, as 14B on the directory of 1.3B."""
    wide = Published(num_attention_heads=2, ffn_dim=80, num_layers=3)
    state = {name: wide.state("transformer")[ours] for name, ours in wan_transformer_names(3).items()}
    torch.save({"generator": {f"model.{name}": tensor for name, tensor in state.items()}}, tmp_path / "w.pt")
    folder = shutil.copytree(folders["diffusers"], tmp_path / "m")
    wide.transformer.save_pretrained(tmp_path / "right" / "transformer")
    for name in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(folder / name, tmp_path / "right" / name)
    expected = video_of(tmp_path / "right")
    assert video_of(folder, checkpoint=tmp_path / "w.pt") == expected
    notes = load(folder, checkpoint=tmp_path / "w.pt", **SIZE).notes
    assert any("its own shape is taken" in note and "num_layers 3 instead of 2" in note for note in notes)
    shutil.rmtree(folder / "transformer")  # only VAE and text encoder of it are needed
    assert video_of(folder, checkpoint=tmp_path / "w.pt") == expected


def test_containers_give_equal_bits(folders, published, tmp_path):
    """Tensors of a mapped file may begin anywhere; products on a processor depend on it."""
    state, videos = published.wan("transformer"), set()
    for pad in range(4):  # moves where every tensor begins
        save_file(state, tmp_path / "w.safetensors", metadata={"pad": "x" * pad})
        videos.add(video_of(folders["wan"], checkpoint=tmp_path / "w.safetensors"))
    torch.save(state, tmp_path / "w.pt")
    assert videos == {video_of(folders["wan"], checkpoint=tmp_path / "w.pt")}


def test_a_randomised_model_is_not_constant(expected, folders):
    """The comparisons above mean something: other weights give another video."""
    different = Published(seed=9)
    randomize(different.transformer, 11)
    different.transformer.save_pretrained(folders["wan"].parent / "different")
    assert video_of(folders["wan"], checkpoint=folders["wan"].parent / "different") != expected
