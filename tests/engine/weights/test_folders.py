"""Folders that hold more than the part that is asked for: variants of one set of weights, and whole models."""

import copy
import json
import shutil

import pytest
import torch
from layouts import HEIGHT, WIDTH
from safetensors.torch import load_file, save_file

from engine import load
from engine.model.text import Tokenizer
from engine.run import main
from engine.weights.sources import open_source
from export.write import _copy_tokenizer

SIZE = {"height": HEIGHT, "width": WIDTH, "preset": "self-forcing", "threads": 1}
PARTS = {"transformer": "checkpoint", "vae": "vae", "text_encoder": "text_encoder"}


def halves(state, folder, stem, variant, spelling):
    """Numbered files of a variant with an index, as diffusers, transformers and others name them."""
    names, where = sorted(state), {}
    for number in (1, 2):
        piece = f"-0000{number}-of-00002"
        file = f"{stem}{piece}.{variant}.safetensors" if "late" in spelling else f"{stem}.{variant}{piece}.safetensors"
        save_file({name: state[name] for name in names[number - 1 :: 2]}, folder / file)
        where |= dict.fromkeys(names[number - 1 :: 2], file)
    index = {
        "diffusers": f"{stem}.safetensors.index.{variant}.json", "late": f"{stem}.{variant}.safetensors.index.json",
        "middle": f"{stem}.safetensors.{variant}.index.json",
    }  # fmt: skip
    if "none" not in spelling:
        (folder / index[spelling]).write_text(json.dumps({"weight_map": where}))


@pytest.fixture(params=PARTS)
def component(request, published, folders, tmp_path):
    """A component folder without weights; its state."""
    part = request.param
    folder = shutil.copytree(folders["diffusers"] / part, tmp_path / part)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    return part, folder, stem, published.state("text" if part == "text_encoder" else part)


def constant(state, value, dtype=torch.float32):
    return {name: torch.full_like(tensor, value).to(dtype) for name, tensor in state.items()}


def taken(folder, part, dtype):
    """The constant in the variant that is taken, and the notes."""
    source = open_source(folder, part=part, dtype=dtype)
    values = {float(tensor.flatten()[0]) for _, tensor in source.read()}
    assert len(values) == 1
    return values.pop(), " ".join(source.notes)


ORDER = [
    ({"": 1, "fp16": 2, "bf16": 3}, torch.float16, ""), ({"fp16": 2, "bf16": 3}, torch.bfloat16, "bf16"),
    ({"fp16": 2, "bf16": 3}, torch.float16, "fp16"), ({"fp16": 2, "bf16": 3}, torch.float32, "bf16"),
    ({"fp16": 2, "bf16": 3, "fp32": 4}, torch.float32, "fp32"), ({"fp16": 2, "ema": 3}, torch.float32, "fp16"),
    ({"non_ema": 2, "ema": 3}, torch.bfloat16, "ema"), ({"fp16": 2}, torch.bfloat16, "fp16"),
]  # fmt: skip


@pytest.mark.parametrize(("variants", "dtype", "right"), ORDER)
def test_variants_beside_each_other(component, variants, dtype, right):
    part, folder, stem, state = component
    for variant, value in variants.items():
        save_file(constant(state, value), folder / ".".join(filter(None, (stem, variant, "safetensors"))))
    value, notes = taken(folder, part, dtype)
    assert value == variants[right]
    for variant in variants:
        name = ".".join(filter(None, (stem, variant, "safetensors")))
        assert (name in notes) == (len(variants) > 1)


@pytest.mark.parametrize("spelling", ["diffusers", "late", "middle", "none", "none late"])
def test_variants_in_numbered_files(component, spelling):
    part, folder, stem, state = component
    for variant, value in (("fp16", 2), ("bf16", 3)):
        halves(constant(state, value), folder, stem, variant, spelling)
    assert taken(folder, part, torch.float16)[0] == 2
    assert taken(folder, part, torch.bfloat16)[0] == 3
    next(folder.glob("*bf16*-00002-of-*" if "late" not in spelling else "*-00002-of-*bf16*")).unlink()
    assert taken(folder, part, torch.float16)[0] == 2
    with pytest.raises(FileNotFoundError, match="expected"):
        open_source(folder, part=part, dtype=torch.bfloat16)


def test_a_plain_bin_goes_before_a_variant(component):
    """As diffusers without variant=: the variant is another file, the suffix only another container."""
    part, folder, stem, state = component
    torch.save(constant(state, 1), folder / ("pytorch_model.bin" if stem == "model" else f"{stem}.bin"))
    save_file(constant(state, 2), folder / f"{stem}.fp16.safetensors")
    assert taken(folder, part, torch.float16)[0] == 1
    save_file(constant(state, 3), folder / f"{stem}.safetensors")
    assert taken(folder, part, torch.float16)[0] == 3


def test_diffusers_reads_the_same_variant(published, tmp_path):
    """What diffusers writes and reads as variant=... is what the precision takes."""
    from diffusers import AutoencoderKLWan

    for variant, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        copy.deepcopy(published.vae).to(dtype).save_pretrained(tmp_path, variant=variant, max_shard_size="40KB")
    for variant, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        theirs = AutoencoderKLWan.from_pretrained(tmp_path, variant=variant, torch_dtype=dtype).state_dict()
        ours = dict(open_source(tmp_path, part="vae", dtype=dtype).read())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_precision_of_a_run_decides(folders, published, tmp_path):
    folder = shutil.copytree(folders["diffusers"], tmp_path / "m")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    for name in ("fp16", "bf16"):
        shutil.copy(file, file.with_name(f"diffusion_pytorch_model.{name}.safetensors"))
    file.unlink()
    for precision, name in (("bf16", "bf16"), ("fp32", "bf16")):
        notes = load(folder, precision=precision, **SIZE).notes
        assert any(f"took diffusion_pytorch_model.{name}.safetensors" in note for note in notes), notes
    wan = shutil.copytree(folders["wan"], tmp_path / "w")
    plain = wan / "diffusion_pytorch_model.safetensors"
    for name in ("fp16", "bf16"):
        shutil.copy(plain, wan / f"diffusion_pytorch_model.{name}.safetensors")
    plain.unlink()
    notes = load(wan, **SIZE).notes
    assert any("took diffusion_pytorch_model.bf16.safetensors (not used: diffus" in note for note in notes), notes


def comfy(published, root, models):
    """ComfyUI's folders: in its own folder, in its models, or as they are published."""
    base = root / models
    for part, place in (("transformer", "diffusion_models"), ("vae", "vae"), ("text", "text_encoders")):
        (base / place).mkdir(parents=True)
        save_file(published.wan(part), base / place / f"wan_{part}.safetensors")
    (base / "loras").mkdir()
    return root


@pytest.fixture(params=["wan", "diffusers", "models", "split_files", "."])
def whole(request, published, folders, tmp_path):
    """A folder with a whole model."""
    if request.param in folders:
        return folders[request.param]
    return comfy(published, tmp_path / "ComfyUI", request.param)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_whole_folder(whole, folders, published, tmp_path, part, capsys):
    expected = published.state("text" if part == "text_encoder" else part)
    source = open_source(whole, part=part)
    found = dict(source.read())
    assert len(found) == len(expected) == len(source.shapes())
    names = {name.removeprefix("encoder.") if part == "text_encoder" else name: name for name in expected}
    names |= {"embed_tokens.weight": "shared.weight"} if part == "text_encoder" else {}
    assert all(torch.equal(tensor, expected[names[name]]) for name, tensor in found.items())
    # The directory's own part is damaged: the run needs the other one.
    folder = shutil.copytree(folders["diffusers"], tmp_path / "m")
    for file in (folder / part).glob("*.safetensors"):
        file.write_bytes(b"")
    arguments = ["--model", folder, f"--{PARTS[part].replace('_', '-')}", whole, "--preset", "self-forcing"]
    arguments += ["--prompt", "a", "--frames", "1", "--out", "checksum", "--height", "32", "--width", "48", "--quiet"]
    assert main([str(word) for word in arguments]) == 0
    model = ["--model", folders["diffusers"], *arguments[4:]]
    there = capsys.readouterr().out
    assert main([str(word) for word in model]) == 0
    assert capsys.readouterr().out == there


def test_every_part_of_one_folder(folders, capsys):
    """With all four no directory is read."""
    for folder in (folders["wan"], folders["diffusers"]):
        options = [
            word for name in ("checkpoint", "vae", "text-encoder", "tokenizer") for word in (f"--{name}", folder)
        ]
        arguments = [*options, "--preset", "self-forcing", "--prompt", "a", "--frames", "1", "--out", "null"]
        assert main([str(word) for word in [*arguments, "--height", 32, "--width", 48]]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("part", PARTS)
def test_several_candidates_are_named(published, tmp_path, part, capsys):
    root = comfy(published, tmp_path / "ComfyUI", "models")
    place = {"transformer": "diffusion_models", "vae": "vae", "text_encoder": "text_encoders"}[part]
    there = next((root / "models" / place).glob("*.safetensors"))
    (there.parent / "deeper").mkdir()
    shutil.copy(there, there.parent / "deeper" / "other.safetensors")
    option = f"--{PARTS[part].replace('_', '-')}"
    assert main([option, str(root), "--prompt", "a", "--frames", "1", "--out", "null"]) == 2
    error = capsys.readouterr().err
    assert f"models/{place}/deeper/other.safetensors, models/{place}/{there.name}" in error
    assert f"{option} FILE" in error
    assert error.count("\n") == 1
    shutil.rmtree(there.parent)
    assert main([option, str(root), "--prompt", "a", "--frames", "1", "--out", "null"]) == 2
    error = capsys.readouterr().err
    assert "got no " in error
    assert error.count("\n") == 1


def test_tokenizers(folders, tmp_path, capsys):
    """A folder that holds one, however deep Wan's own folder has it; two are refused by name."""
    given = ["--prompt", "a", "--frames", "1", "--out", "null", "--height", "32", "--width", "48"]
    model = ["--model", str(folders["diffusers"]), "--preset", "self-forcing"]
    for folder in (folders["wan"], folders["diffusers"], folders["wan"] / "google", folders["wan"] / "google/umt5-xxl"):
        assert main([*model, "--tokenizer", str(folder), *given]) == 0, capsys.readouterr().err
    for name in ("one", "two"):
        shutil.copytree(folders["wan"] / "google" / "umt5-xxl", tmp_path / name)
    capsys.readouterr()
    assert main([*model, "--tokenizer", str(tmp_path), *given]) == 2
    error = capsys.readouterr().err
    assert "got tokenizers one, two, expected one" in error
    assert error.count("\n") == 1


TEXT_LEN = [
    (12, None), (16, None), (31, None), (0, "text_len 0"), (513, "text_len 513"), (True, "text_len T"),
    ("512", "text_len '512'"), (512.0, "text_len 512.0"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "said"), TEXT_LEN)
def test_text_len_sets_the_rows_of_a_prompt(folders, tmp_path, rows, said):
    folder = shutil.copytree(folders["wan"], tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"text_len": rows}))
    if said is not None:
        with pytest.raises(ValueError, match=f"got {said}.*expected a whole number"):
            load(folder, **SIZE)
        return
    pipeline = load(folder, **SIZE)
    assert pipeline.tokenizer.rows == rows
    _copy_tokenizer(pipeline.tokenizer.path, tmp_path / "bundle", rows)  # bundles take the limit from its files
    assert Tokenizer(tmp_path / "bundle").rows == rows
    embedding = pipeline.encode_prompt("a red circle")
    assert embedding.shape[1] == rows
    # The text encoder sees the end of the prompt, not the padding: the values are those of another length.
    plain = load(folders["diffusers"], **SIZE).encode_prompt("a red circle")
    words = min(4, rows)
    torch.testing.assert_close(embedding[:, :words].float(), plain[:, :words].float(), atol=2e-2, rtol=2e-2)


def test_a_vae_beside_a_file_that_cannot_be_read(folders, published, tmp_path):
    state = load_file(folders["diffusers"] / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(state, tmp_path / "b.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"")
    assert open_source(tmp_path, part="vae").files == [tmp_path / "b.safetensors"]
    save_file(published.wan("transformer"), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"an empty file.*; it may be the VAE"):
        open_source(tmp_path, part="vae")


def pieces(state, way):
    """The tensors in two files: the first and the last ones, or in turn."""
    names = sorted(state)
    return (names[: len(names) // 2], names[len(names) // 2 :]) if way == "halves" else (names[::2], names[1::2])


@pytest.mark.parametrize("way", ["halves", "in turn"])
@pytest.mark.parametrize("names", [
    ("a", "b"), ("{}", "more"), ("{}_1", "{}_2"), ("{}.part1", "{}.part2"), ("x_1_of_2", "x_2_of_2"), ("0", "1"),
    ("x-00000-of-00002", "x-00001-of-00002"),
])  # fmt: skip
def test_weights_in_several_files_without_an_index(component, names, way):
    """One set: each file has tensors of the part alone, and none of them twice."""
    part, folder, stem, state = component
    expected = dict(sorted(state.items()))
    for name, keys in zip(names, pieces(state, way), strict=True):
        save_file({key: state[key] for key in keys}, folder / f"{name.format(stem)}.safetensors")
    save_file({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(1, 2)}, folder / "lora.safetensors")
    found = dict(open_source(folder, part=part).read())
    assert len(found) == len(expected)
    assert sorted(float(t.float().sum()) for t in found.values()) == sorted(
        float(t.float().sum()) for t in expected.values()
    )
    if "{}" not in names:  # else the one with the standard name is taken, and lacks tensors
        save_file(constant(state, 1), folder / "other.safetensors")  # now there are two sets
        with pytest.raises(ValueError, match="got"):
            open_source(folder, part=part)


def test_wans_own_folder_with_pieces(folders, published, tmp_path, capsys):
    folder = shutil.copytree(folders["wan"], tmp_path / "w")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    state = published.wan("transformer")
    for name, keys in zip("ab", pieces(state, "halves"), strict=True):
        save_file({key: state[key] for key in keys}, folder / f"{name}.safetensors")
    words = ["--preset", "self-forcing", "--prompt", "a", "--frames", "1", "--out", "checksum", "--height", "32"]
    shown = []
    for model in (folder, folders["wan"]):
        assert main(["--model", str(model), *words, "--width", "48", "--json", "--quiet"]) == 0
        shown.append(json.loads(capsys.readouterr().out)["sha256"])
    assert shown[0] == shown[1]


def test_two_sets_of_one_name(component):
    """A whole file beside numbered ones, or two numberings: nothing tells which one is meant."""
    part, folder, stem, state = component
    for number, keys in enumerate(pieces(state, "halves"), start=1):
        save_file({key: state[key] for key in keys}, folder / f"{stem}-0000{number}-of-00002.safetensors")
    assert len(open_source(folder, part=part).shapes()) == len(state)
    save_file(constant(state, 1), folder / f"{stem}.safetensors")
    with pytest.raises(ValueError, match="got several files"):
        open_source(folder, part=part)
