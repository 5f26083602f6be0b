"""What `distill.stages.assemble` writes loads in diffusers, PEFT and the engine, and streams what was trained."""

import json
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import PeftModel
from safetensors.torch import load_file

import engine
from distill.models.base import Base
from distill.models.codec import build_vae
from distill.models.rollout import roll_out
from distill.models.student_file import NextChunkConfig, load_student, save_student
from distill.stages.assemble import assemble
from distill.stages.teacher import Teacher
from engine.presets import PRESETS

CONFIG = NextChunkConfig(rank=4, max_position=3, sampling_shift=2.0)
CAUSAL = NextChunkConfig(family="causal", rank=4, chunk=3, window=7, attn_sink=1, solver="renoise", sampling_shift=2.0)
DIAGONAL = replace(CAUSAL, schedule="diagonal", context="last")


@pytest.fixture(scope="module", params=[CONFIG, CAUSAL, DIAGONAL], ids=["greedy", "causal", "diagonal"])
def made(request: pytest.FixtureRequest) -> NextChunkConfig:
    return request.param


@pytest.fixture(scope="module")
def assembled(made: NextChunkConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A pipeline directory of random weights, and the student's trained tensors in it."""
    folder = tmp_path_factory.mktemp("assets")
    torch.manual_seed(0)
    teacher = Teacher()
    torch.nn.init.normal_(teacher.transformer.proj_out.weight, std=0.1)
    teacher.save(folder / "teacher")
    build_vae().save_pretrained(folder / "vae")
    student = made.student(Base(folder / "teacher"))
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.normal_(std=0.1).half())
    state = {name: p.detach() for name, p in student.trained().items()}
    save_student(folder / "student.pt", state, made)
    assemble(folder / "teacher", folder / "vae", folder / "student.pt", folder / "sprites")
    return folder / "sprites", state


def roles_of(folder: Path) -> list[str]:
    return [path.name for path in (folder / "adapters").iterdir()]


def test_stock_libraries_load_it(assembled: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = assembled
    pipeline = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert pipeline.tokenizer.model_max_length == 16
    for name in roles_of(folder):
        base = WanTransformer3DModel.from_pretrained(folder / "transformer")
        model = PeftModel.from_pretrained(base, folder / "adapters" / name)
        assert any("lora_A" in key for key in model.state_dict())


def test_json_names_no_paths(assembled: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = assembled
    for path in folder.rglob("*.json"):
        assert str(folder.parent) not in path.read_text(), path
        assert '"_name_or_path"' not in path.read_text(), path


def test_engine_streams_what_was_trained(
    assembled: tuple[Path, dict[str, torch.Tensor]], made: NextChunkConfig
) -> None:
    """The engine with merged adapters makes the same latents as the student in training."""
    folder, state = assembled
    teacher = Base(folder)
    student = made.student(teacher).eval()
    student.load_trained(state)
    caption = "a red circle moving right slowly on a gray background"
    expected = roll_out(student, teacher.encode([caption]), 9, [3], made.preset)
    with engine.load(folder, device="cpu").stream(caption, seed=3) as stream:
        got = torch.cat([stream.next_latent() for _ in range(9 // made.chunk)], 2)
    assert (got - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_a_model_is_a_student_to_go_on_from(
    assembled: tuple[Path, dict[str, torch.Tensor]], made: NextChunkConfig, tmp_path: Path
) -> None:
    folder, state = assembled
    student, read, _ = load_student(folder)
    assert (read.preset, read.preset_name, read.context) == (made.preset, made.preset_name, made.context)
    for name, parameter in student.trained().items():
        assert torch.equal(parameter, state[name].float()), name
    settings = json.loads((folder / "engine.json").read_text())
    settings["overrides"]["steps"] = [1000, 500, 100]
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "engine.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"got 3, expected a divisor of 1000|expected Preset"):
        load_student(other)


def test_adapters_know_their_base(assembled: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = assembled
    (weights,) = (folder / "transformer").glob("*.safetensors")
    for name in roles_of(folder):
        bound = json.loads((folder / "adapters" / name / "base.json").read_text())
        assert bound == {"base_sha256": sha256(weights.read_bytes()).hexdigest()}


def test_settings_carry_the_preset(assembled: tuple[Path, dict[str, torch.Tensor]], made: NextChunkConfig) -> None:
    folder, _ = assembled
    settings = json.loads((folder / "engine.json").read_text())
    assert settings["overrides"] == made.preset_fields()
    pipeline = engine.load(folder, device="cpu")
    assert (pipeline.preset, pipeline.preset.shift, pipeline.notes) == (made.preset, 2.0, ())
    preset = pipeline.preset
    four, diagonal = ((1000.0, 750.0, 500.0, 250.0),), PRESETS["diagonal"].steps
    found = preset.solver, preset.chunk, preset.window, preset.attn_sink, preset.commit, preset.steps
    assert (
        found
        == {
            "greedy": ("euler", 1, 4, 0, "clean", four),
            "self-forcing": ("renoise", 3, 7, 1, "clean", four),
            "diagonal": ("renoise", 3, 7, 1, "noisy", diagonal),
        }[settings["preset"]]
    )


def test_a_pipeline_as_teacher_gives_its_parts_as_they_are(
    assembled: tuple[Path, dict[str, torch.Tensor]], made: NextChunkConfig, tmp_path: Path
) -> None:
    """Also its size, its frame rate and its fp8_keep; not its adapters and its preset."""
    folder, state = assembled
    teacher, out = tmp_path / "teacher", tmp_path / "out"
    shutil.copytree(folder, teacher)
    shutil.rmtree(teacher / "adapters")
    (teacher / "adapters" / "old").mkdir(parents=True)
    wanted = {"height": 48, "width": 64, "fps": 16.0, "fp8_keep": ["sdd.blocks.0.*"]}
    (teacher / "engine.json").write_text(json.dumps(wanted))
    (teacher / "tokenizer" / "note.txt").write_text("of another tokenizer")
    save_student(tmp_path / "student.pt", state, made)
    assemble(teacher, None, tmp_path / "student.pt", out)
    for part in ("transformer", "text_encoder", "tokenizer", "vae", "scheduler"):
        files = {path.name: path.read_bytes() for path in (teacher / part).iterdir()}
        assert {path.name: path.read_bytes() for path in (out / part).iterdir()} == files
    assert sorted(roles_of(out)) == sorted(roles_of(folder))
    settings = json.loads((out / "engine.json").read_text())
    assert {name: settings[name] for name in wanted} == wanted
    assert settings["overrides"] == made.preset_fields()
    assert engine.load(out, device="cpu").preset == made.preset


def test_another_vae_replaces_that_of_a_pipeline(
    assembled: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, _ = assembled
    torch.manual_seed(1)
    build_vae().save_pretrained(tmp_path / "vae")
    assemble(folder, tmp_path / "vae", None, tmp_path / "out")
    there, trained = (load_file(next((path / "vae").glob("*.safetensors"))) for path in (tmp_path / "out", tmp_path))
    assert all(torch.equal(there[name], value.half()) for name, value in trained.items())
    assert json.loads((tmp_path / "out" / "engine.json").read_text()) == {
        "height": 32, "width": 32, "fps": 8, "preset": "greedy"
    }  # fmt: skip
    assert not (tmp_path / "out" / "adapters").exists()
