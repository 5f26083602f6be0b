"""greedy-stream inspect: what it says of files and directories, and that the command it prints runs."""

import json
import shlex
import shutil

import pytest
import torch
from safetensors.torch import save_file

from engine import cli, load, run
from engine.loader import EMBEDDED
from engine.presets import PRESETS, presets_for


@pytest.fixture
def wan(folders):
    return folders["wan"]


def inspected(capsys, path, status=0):
    capsys.readouterr()
    assert cli.main(["inspect", "--json", str(path)]) == status
    report = json.loads(capsys.readouterr().out)
    assert cli.main(["inspect", str(path)]) == status
    text = capsys.readouterr().out
    assert all(line in text for line in report["lines"])
    assert (report["command"] is None) == (report["problem"] is not None) == (status == 2)
    return report


def runs(command, model):
    """The printed command, with a real directory for DIR, makes a frame."""
    words = shlex.split(command.replace(" DIR", f" {model}").replace("--seconds 5 --out video.mp4", ""))
    assert words[:3] == ["python", "-m", "engine.run"]
    small = ["--frames", "1", "--out", "null", "--height", "32", "--width", "48", "--quiet"]
    return run.main(words[3:] + small) == 0


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("transformer", "transformer: 2 blocks of width 128 (1 heads of 128), 16 channels; Wan names"),
        ("vae", "VAE: 16 latent channels, base 4; Wan names"),
        ("text", "text encoder: UMT5, 2 blocks of width 24, 32 tokens; Wan names"),
    ],
)
@pytest.mark.parametrize("container", ["safetensors", "pth"])
def test_parts(capsys, wan, published, tmp_path, part, said, container):
    file = tmp_path / f"w.{container}"
    save_file(published.wan(part), file) if container == "safetensors" else torch.save(published.wan(part), file)
    report = inspected(capsys, file)
    assert report["kind"] == {"safetensors": "safetensors", "pth": "torch"}[container]
    assert any(line.startswith(said) for line in report["lines"]), report["lines"]
    assert runs(report["command"], wan)


def test_states_of_a_training_checkpoint(capsys, wan, published, tmp_path):
    state = published.wan("transformer")
    (tmp_path / "step").mkdir()
    torch.save({"generator": state, "generator_ema": state, "critic": state}, tmp_path / "step" / "model.pt")
    for path in (tmp_path / "step" / "model.pt", tmp_path / "step"):
        report = inspected(capsys, path)
        for name in ("generator", "generator_ema", "critic"):
            assert any(f"state {name};" in line for line in report["lines"])
        assert runs(report["command"], wan)


def test_the_preset_is_named_only_where_the_file_tells(capsys, wan, published, tmp_path):
    """Any causal preset streams any transformer, so its tensors do not tell."""
    state = published.wan("transformer")
    save_file(state, tmp_path / "w.safetensors")
    report = inspected(capsys, tmp_path / "w.safetensors")
    assert "--preset" not in report["command"]
    line = next(line for line in report["lines"] if line.startswith("preset: "))
    causal = [name for name, preset in PRESETS.items() if preset.family == "causal"]
    assert f"the file does not tell which one its weights were trained for; of width 128 there are {', '.join(causal)}"\
        in line  # fmt: skip
    assert "else self-forcing is taken" in line
    assert load(wan, checkpoint=tmp_path / "w.safetensors", height=32, width=48).preset_name == "self-forcing"
    assert runs(report["command"], wan)
    # W_c belongs into an adapter of greedy: neither a run nor inspect takes it here.
    save_file(state | {"condition_proj.weight": torch.zeros(128, 128)}, tmp_path / "greedy.safetensors")
    assert "extra condition_proj.weight" in inspected(capsys, tmp_path / "greedy.safetensors", 2)["problem"]
    for name in PRESETS:
        with pytest.raises(ValueError, match="extra condition_proj"):
            load(wan, checkpoint=tmp_path / "greedy.safetensors", preset=name, height=32, width=48)


def test_presets_by_the_width_of_public_weights():
    assert presets_for(5120) == ["krea-realtime"]
    assert "krea-realtime" not in presets_for(1536)
    assert {"self-forcing", "longlive", "causvid"} < set(presets_for(1536))
    assert set(presets_for(256)) == set(PRESETS) - {"greedy"}


def test_directories(capsys, wan, published, tmp_path):
    diffusers = published.write_diffusers(tmp_path / "m")
    for folder, names in ((wan, "Wan names"), (diffusers, "diffusers names"), (EMBEDDED, "diffusers names")):
        report = inspected(capsys, folder)
        assert report["kind"] == "model directory"
        assert any(line.startswith("transformer: ") and names in line for line in report["lines"])
        assert any(line.startswith("tokenizer: ") for line in report["lines"])
    assert runs(inspected(capsys, wan)["command"], wan)
    for part, option in (("transformer", "--checkpoint"), ("vae", "--vae"), ("text_encoder", "--text-encoder")):
        report = inspected(capsys, diffusers / part)
        assert f"{option} {diffusers / part}" in report["command"]


@pytest.mark.parametrize(("prefix", "a", "b"), [("diffusion_model.", "lora_A", "lora_B"), ("", "lora_down", "lora_up")])
def test_adapters(capsys, wan, tmp_path, prefix, a, b):
    layer = f"{prefix}blocks.0.self_attn.q"
    state = {f"{layer}.{a}.weight": torch.ones(4, 128), f"{layer}.{b}.weight": torch.ones(128, 4)}
    save_file(state, tmp_path / "style.safetensors")
    report = inspected(capsys, tmp_path / "style.safetensors")
    assert report["kind"] == "adapter"
    assert "changes 1 parameters of a transformer of width 128, in 1 blocks, ranks 4" in report["lines"][0]
    assert runs(report["command"], wan)
    report = inspected(capsys, EMBEDDED / "adapters" / "etm")
    assert "ranks" in report["lines"][0]
    save_file({f"{layer}.{a}.weight": torch.ones(4, 128)}, tmp_path / "half.safetensors")
    assert "expected" in inspected(capsys, tmp_path / "half.safetensors", 2)["problem"]


def test_what_it_lacks(capsys, wan, published, tmp_path):
    state = published.wan("transformer")
    state.pop("blocks.1.ffn.2.bias")
    save_file(state, tmp_path / "w.safetensors")
    assert "missing blocks.1.ffn.net.2.bias" in inspected(capsys, tmp_path / "w.safetensors", 2)["problem"]
    folder = shutil.copytree(wan, tmp_path / "m")
    (folder / "Wan2.1_VAE.pth").unlink()
    assert "got no VAE" in inspected(capsys, folder, 2)["problem"]
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert "1 tensors with other names (a)" in inspected(capsys, tmp_path / "a.safetensors", 2)["problem"]


def test_bad_paths(capsys, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    for path, said in ((tmp_path / "nowhere", "expected an existing file"), (tmp_path / "photo.jpg", "3 bytes")):
        assert cli.main(["inspect", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert said in error
        assert error.count("\n") == 1
