"""Every stage goes on after a kill exactly as it would have gone on without one; configs are strict."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distill import next_chunk, teacher, train_vae
from distill.latents import Bank
from distill.next_chunk import NextChunkConfig, segment_target
from distill.rollout import noise_levels
from distill.sampling import guided_flow
from distill.sprites import sample
from distill.teacher import Teacher, TeacherConfig, draw_times
from distill.train_vae import VaeConfig
from distill.training import load_config


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random latents under real captions."""
    folder = tmp_path_factory.mktemp("bank")
    torch.manual_seed(0)
    captions = [spec.caption for spec in sample(16, torch.Generator().manual_seed(0))]
    latents = {"images": torch.randn(16, 8, 1, 8, 8).half(), "clips": torch.randn(16, 8, 3, 8, 8).half()}
    save_file(latents, folder / "bank.safetensors")
    (folder / "bank.json").write_text(json.dumps({"images": captions, "clips": captions}))
    return folder


def assert_same(first: torch.nn.Module, second: torch.nn.Module) -> None:
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_vae_resumes(tmp_path: Path) -> None:
    config = VaeConfig(steps=4, images=2, short=(5, 1), long=((9, 1),), save_every=2, image_share=0.25)
    whole = train_vae.train(config, tmp_path / "whole")
    train_vae.train(config, tmp_path / "cut", stop_at=3)  # its last checkpoint is of step 2
    assert_same(whole, train_vae.train(config, tmp_path / "cut"))


@pytest.fixture(scope="module")
def teacher_config(bank: Path) -> TeacherConfig:
    return TeacherConfig(
        bank=str(bank),
        image_steps=2,
        steps=5,
        images=4,
        cycle=((3, 2), (2, 2)),
        late_cycle=((3, 2),),
        save_every=2,
        score_every=0,
    )


@pytest.fixture(scope="module")
def trained_teacher(teacher_config: TeacherConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Teacher]:
    folder = tmp_path_factory.mktemp("teacher")
    whole = teacher.train(teacher_config, folder)
    whole.save(folder / "teacher")
    return folder / "teacher", whole


def test_teacher_resumes(teacher_config: TeacherConfig, trained_teacher: tuple[Path, Teacher], tmp_path: Path) -> None:
    teacher.train(teacher_config, tmp_path, stop_at=3)
    assert_same(trained_teacher[1], teacher.train(teacher_config, tmp_path))


def test_next_chunk_resumes(bank: Path, trained_teacher: tuple[Path, Teacher], tmp_path: Path) -> None:
    config = NextChunkConfig(
        teacher=str(trained_teacher[0]),
        bank=str(bank),
        steps=4,
        clips=2,
        frames=3,
        images=2,
        rank=2,
        roll_share=1.0,
        roll_from=0.0,
        context_noise=0.1,
        save_every=2,
        score_every=0,
    )
    whole, _ = next_chunk.train(config, tmp_path / "whole")
    next_chunk.train(config, tmp_path / "cut", stop_at=3)
    assert_same(whole, next_chunk.train(config, tmp_path / "cut")[0])
    moved = next_chunk.trained_state(whole)["sdd.condition_proj.weight"]
    assert moved.abs().max() > 0  # the ETM's feature is learned from


@torch.no_grad()
def test_segment_target_of_one_substep_is_the_guided_flow() -> None:
    torch.manual_seed(0)
    model = Teacher()
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1)
    config = NextChunkConfig(substeps=1, sampling_shift=2.0)
    noisy, index = torch.randn(4, 8, 1, 8, 8), torch.arange(4)
    text, empty = model.prepare(["a red circle"] * 4), model.prepare([""] * 4)
    t = noise_levels(config.preset)[index][:, None]
    expected = guided_flow(model.transformer, noisy, t, text, empty, config.guidance)
    got = segment_target(model.transformer, noisy, index, text, empty, config)
    assert (got - expected).abs().max() <= 1e-5
    finer = segment_target(model.transformer, noisy, index, text, empty, replace(config, substeps=4))
    assert (finer - expected).abs().max() > 1e-4


def test_times_are_clean_prefixes_or_not() -> None:
    t, weight = draw_times(200, 5, 3.0, TeacherConfig(), torch.Generator().manual_seed(0))
    assert ((t == 0) == (weight == 0)).all()
    assert 0 <= t.min() <= t.max() <= 1
    assert (weight[:, -1] == 1).all()  # something is always left to learn
    shared = (t == t[:, :1]).all(1).float().mean()
    assert 0.2 < shared < 0.4


def test_bank_refuses_what_does_not_fit(bank: Path) -> None:
    with pytest.raises(ValueError, match="at most 3"):
        Bank.load(bank).draw(1, 5, torch.Generator())
    with pytest.raises(ValueError, match="expected 2"):
        Bank(torch.zeros(2, 8, 1, 8, 8), ["a"], torch.zeros(0, 8, 3, 8, 8), [])


@dataclass(frozen=True)
class Example:
    steps: int = 1


def test_config_is_strict(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[vae]\nsteps = 3\nstep = 4\n")
    with pytest.raises(ValueError, match="unknown keys"):
        load_config(path, "vae", Example)
    with pytest.raises(ValueError, match="expected \\[teacher\\]"):
        load_config(path, "teacher", Example)
    path.write_text("[vae]\nsteps = 'three'\n")
    with pytest.raises(ValueError, match="expected int"):
        load_config(path, "vae", Example)
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "none.toml", "vae", Example)
    path.write_text("[vae]\nsteps = 3\n")
    assert load_config(path, "vae", Example) == Example(3)
