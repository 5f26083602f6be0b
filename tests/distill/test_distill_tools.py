"""Teacher sampling, plans and evaluation, on models that were not trained."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from distill.__main__ import main
from distill.data.shards import Shards
from distill.experiments import evaluate
from distill.models.codec import build_vae
from distill.models.discriminator import Discriminator
from distill.models.student import Student
from distill.models.student_file import NextChunkConfig
from distill.scores.tasks import find_task
from distill.stages.consistency import ConsistencyConfig
from distill.stages.dmd import DmdConfig
from distill.stages.plan import ClusterConfig, _passes, estimate, forward_flops
from distill.stages.rl import RlConfig
from distill.stages.sample_teacher import SampleTeacherConfig, write_clips
from distill.stages.teacher import Teacher
from engine.config import TransformerConfig
from engine.model import rope
from engine.model.transformer import WanTransformer
from engine.options import read_table

ROOT = Path(__file__).parents[2]
WAN = ROOT / "distill" / "configs" / "wan2.1-1.3b.toml"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    model = Teacher()
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1)
    model.save(folder / "teacher")
    build_vae().save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def sampled(teacher: Path) -> tuple[SampleTeacherConfig, Path]:
    config = SampleTeacherConfig(
        teacher=str(teacher / "teacher"), task="scenes", clips=5, shard=2, batch=2, frames=3, steps=2
    )
    write_clips(config, teacher / "clips", Accelerator(cpu=True))
    return config, teacher / "clips"


def test_teacher_clips_resume(sampled: tuple[SampleTeacherConfig, Path], tmp_path: Path) -> None:
    config, folder = sampled
    write_clips(config, tmp_path, Accelerator(cpu=True), stop_at=1)
    assert not (tmp_path / "index.json").exists()
    with pytest.raises(FileNotFoundError, match="finished"):
        Shards(tmp_path)
    first = (tmp_path / "00000.safetensors").stat().st_mtime_ns
    write_clips(config, tmp_path, Accelerator(cpu=True))
    assert (tmp_path / "00000.safetensors").stat().st_mtime_ns == first  # not made again
    assert (tmp_path / "index.json").read_text() == (folder / "index.json").read_text()
    for path in folder.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_a_clip_does_not_depend_on_its_batch(sampled: tuple[SampleTeacherConfig, Path], tmp_path: Path) -> None:
    config, folder = sampled
    write_clips(replace(config, batch=1, shard=5), tmp_path, Accelerator(cpu=True))
    whole, alone = (Shards(path).read(range(5)) for path in (folder, tmp_path))
    assert whole[1] == alone[1]
    assert (whole[0] - alone[0]).abs().max() <= 2e-3  # half precision on disk


def test_prompts_from_a_file(tmp_path: Path) -> None:
    from distill.stages.sample_teacher import captions_of

    (tmp_path / "p.txt").write_text("one\n\n two \n")
    config = SampleTeacherConfig(prompts=str(tmp_path / "p.txt"))
    assert captions_of(config, 1, 3) == ["two", "one", "two"]
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        captions_of(replace(config, prompts=str(tmp_path / "none.txt")), 0, 1)


SMALL = TransformerConfig(
    patch_size=(1, 1, 1),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=32,
    ffn_dim=64,
    num_layers=3,
)


def test_planned_flops_are_those_of_torch() -> None:
    """The joint pass against torch's own counter; the embedders, which the plan leaves out, are small change."""
    model, frames, n, rows = WanTransformer(SMALL), 4, 64, 16
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model = WanTransformer(SMALL)
        text = model.prepare_text(torch.empty(2, rows, 16))
        from engine.model.layers import dense_attention

        cos = torch.empty(frames * n, 6)
        model(torch.empty(2, 4, frames, 8, 8), torch.empty(2, frames), text, cos, cos, dense_attention())
    planned = 2 * forward_flops(SMALL, frames * n, (frames * n) ** 2, rows, 1)
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.06)


@pytest.mark.parametrize(
    "made",
    [
        NextChunkConfig(rank=1, window=2, max_position=3),
        NextChunkConfig(family="causal", rank=1, window=5, chunk=3, attn_sink=1),
    ],
)
def test_planned_student_flops_are_those_of_torch(made: NextChunkConfig) -> None:
    frames, rows = 6, 16
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        student = made.student_of(WanTransformer(SMALL))
        latent = torch.empty(1, 4, frames, 8, 8)
        text = student.stages.prepare_text(torch.empty(1, rows, 16))
        student.flow(latent[:, :, : -made.chunk], latent, torch.empty(1, frames), text)
    rope._frequencies.cache_clear()  # tables made on the meta device are of no use to other tests
    rope._spatial.cache_clear()
    planned, _ = _passes(SMALL, made, 64, frames, rows)
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.25)  # adapters and embedders come on top
    assert planned < counter.get_total_flops()


def small_plan(folder: Path) -> tuple[ClusterConfig, NextChunkConfig]:
    shape = folder / "config.json"
    shape.write_text(json.dumps({k: v for k, v in asdict(SMALL).items() if k != "qk_norm"}))
    cluster = ClusterConfig(gpus=1, transformer=str(shape), height=8, width=8, frames=5, text_rows=16)
    return cluster, NextChunkConfig(rank=4, batch=2, first_batch=2, frames=5, max_position=3)


def test_plan_counts_what_is_trained(tmp_path: Path) -> None:
    cluster, made = small_plan(tmp_path)
    plan = estimate(made, made, cluster)
    student = Student(WanTransformer(SMALL), rank=4, max_position=3)
    assert plan.trained == sum(p.numel() for p in student.trained().values())
    both = estimate(RlConfig(batch=2, frames=5, critic="trained"), made, cluster)
    assert both.trained == 2 * plan.trained
    matched = DmdConfig(batch=2, frames=5)
    whole, lora = (estimate(replace(matched, critic_rank=rank), made, cluster) for rank in (0, 4))
    assert whole.trained == plan.trained + sum(p.numel() for p in WanTransformer(SMALL).parameters())
    assert plan.trained < lora.trained < 2 * plan.trained  # one adapter; the student has two and W_c
    assert whole.parameters - whole.trained == lora.parameters - lora.trained - (whole.trained - plan.trained)
    assert estimate(replace(matched, critic_every=4), made, cluster).flops < whole.flops
    assert estimate(replace(matched, loss="sid"), made, cluster).flops > whole.flops
    assert estimate(replace(matched, sampling_steps=(1,)), made, cluster).flops < whole.flops
    causal = replace(made, family="causal", frames=6, chunk=3, window=6)
    six = replace(cluster, frames=6)
    even = estimate(replace(matched, frames=6), causal, six)
    assert even.trained == whole.trained + lora.trained - 2 * plan.trained  # one adapter and no W_c, and the critic
    diagonal = replace(matched, frames=6, schedule="diagonal")
    clean, last = (estimate(replace(diagonal, context=context), causal, six)
                   for context in ("clean", "last"))  # fmt: skip
    assert clean.flops != even.flops
    assert last.flops != clean.flops  # whole loops instead of drawn ones, and no pass over clean chunks
    ends = replace(causal, target="ode")
    ode, forced = (estimate(one, one, six) for one in (ends, causal))
    assert ode.activations < forced.activations  # one sequence of chunks instead of two
    assert ode.flops < forced.flops
    halved = estimate(replace(made, micro=1), made, cluster)
    assert (halved.activations, halved.flops) == (plan.activations // 2, plan.flops)
    assert estimate(replace(made, recompute=True), made, cluster).activations < plan.activations
    two = replace(cluster, gpus=2)
    spread, whole = (estimate(replace(made, shard=shard), made, two) for shard in (True, False))
    frozen = whole.weights - 4 * whole.trained
    embedding = 2 * 2**30  # of the text encoder, in every process
    assert spread.weights - 4 * spread.trained == pytest.approx(embedding + (frozen - embedding) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["next_chunk", "dmd"])
def test_dry_run_of_a_causal_wan(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = WAN.with_name("wan2.1-1.3b-diagonal.toml")
    assert main([stage, "--config", str(config), "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    critic = 1.42e9 if stage == "dmd" else 0
    assert 3e8 < plan["trained"] - critic < 4e8  # rank 256 on every Linear of 30 blocks
    assert plan["memory"] < 80 * 2**30


@pytest.mark.slow
def test_plan_counts_discriminators_and_starts(tmp_path: Path) -> None:
    cluster, made = small_plan(tmp_path)
    plan, matched = estimate(made, made, cluster), DmdConfig(batch=2, frames=5)
    wide = replace(matched, adversarial=1.0, sampling_steps=(1, 4))
    plain, rivals, data = (
        estimate(replace(wide, **other), made, cluster) for other in ({"adversarial": 0.0}, {}, {"opponent": "data"})
    )
    head = Discriminator(SMALL, (), 2, wide.head_width)
    assert rivals.trained - plain.trained == sum(p.numel() for p in head.parameters())
    assert rivals.optimiser > plain.optimiser
    assert rivals.flops > data.flops > plain.flops  # the data cost no second rollout
    assert rivals.activations == data.activations > plain.activations
    flat = estimate(replace(wide, r1=0.0, r2=0.0), made, cluster)
    assert (flat.flops < rivals.flops, flat.activations < rivals.activations) == (True, True)
    few = ConsistencyConfig(batch=2, frames=5)
    alone, guided = (estimate(replace(few, guidance=scale), made, cluster) for scale in (1.0, 2.0))
    assert (alone.trained, alone.weights - plan.weights) == (plan.trained, 4 * plan.trained)  # as they began
    passes = 1 + 2 + 2 * 47 / 48
    assert guided.flops / alone.flops == pytest.approx((passes + 47 / 48) / passes)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["next_chunk", "consistency", "rl", "dmd"])
def test_dry_run_of_wan(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([stage, "--config", str(WAN), "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plan["stage"] == stage
    critic = 1.42e9 if stage == "dmd" else 0  # a whole copy of the teacher
    assert 3e8 < plan["trained"] - critic < 4e8  # rank 128 on every Linear of two copies of 30 blocks, and W_c
    assert plan["memory"] < 80 * 2**30


@pytest.mark.slow
def test_dry_run_of_an_adversary(capsys: pytest.CaptureFixture[str]) -> None:
    """The entries that wan2.1-1.3b.toml names: too much for its machine, unless frozen weights are spread."""
    words = ["dmd", "--config", str(WAN), "--dry-run", "--set", "adversarial=0.03"]
    assert main(words) == 2
    assert "error: memory: got " in capsys.readouterr().err
    assert main([*words, "--set", "shard=true"]) == 0
    assert '"trained": 18' in capsys.readouterr().out


def test_dry_run_refuses_what_cannot_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.toml"
    path.write_text(WAN.read_text().replace("memory_gib = 80.0", "memory_gib = 24.0"))
    assert main(["next_chunk", "--config", str(path), "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: memory: got ")
    assert "expected at most 24" in line


def test_wan_config_is_the_papers() -> None:
    made, tuned = read_table(NextChunkConfig, WAN, "next_chunk"), read_table(RlConfig, WAN, "rl")
    assert (made.batch, made.lr, made.window) == (1024, 1e-5, 3)
    assert (tuned.batch, tuned.lr) == (256, 2e-6)
    assert list(made.preset.steps) == [(1000.0, 750.0, 500.0, 250.0)]
    clips = read_table(ClusterConfig, WAN, "cluster").clips
    assert [round(stage.steps * stage.batch / clips) for stage in (made, tuned)] == [10, 3]
    sampled = read_table(SampleTeacherConfig, WAN, "sample_teacher")
    assert (sampled.height * 8, sampled.width * 8, 4 * sampled.frames - 3) == (480, 832, 81)


def test_thirds_see_a_collapse() -> None:
    task = find_task("scenes")
    specs = task.draw(4, 3)
    video = task.render(specs, 90)[0]
    assert evaluate.thirds(task, list(video), specs)["last_to_first"]["mean"] >= 0.98
    faded = video.clone()
    faded[:, :, 60:] = faded[:, :, 60:].mean((3, 4), keepdim=True)
    assert evaluate.thirds(task, list(faded), specs)["last_to_first"]["mean"] <= 0.5
    with pytest.raises(ValueError, match="at least 39"):
        evaluate.thirds(task, list(video[:, :, :33]), specs)


@pytest.mark.parametrize("task", [None, "sprites"])
@pytest.mark.slow
def test_evaluate_command(task: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """The shipped model, two prompts of its own task or of sprites: the last line is JSON with every dimension."""
    options = ["--prompts", "2", "--frames", "17", "--seed", "3", "--json", *(["--task", task] if task else [])]
    assert main(["evaluate", *options]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["total"] == pytest.approx((4 * result["quality"] + result["semantic"]) / 5, abs=2e-4)
    assert {"object_class", "color", "scene", "motion_smoothness"} <= set(result["dimensions"])
    assert result["dimensions"]["color"]["n"] == 2
    assert result["task"] == (task or "scenes")
    assert 0 <= result["all_right"] <= 1
    assert 0 <= result["blink"] <= 1


@pytest.mark.slow
def test_vbench_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips of its prompts under its names, five each; a stand-in for the package records what it is asked."""
    info = tmp_path / "info.json"
    info.write_text(json.dumps([{"prompt_en": p, "dimension": ["color"]} for p in ("a red circle", "a red circle")]))
    monkeypatch.setitem(sys.modules, "vbench", None)
    with pytest.raises(ValueError, match="no such package"):
        evaluate.run_vbench(ROOT / "engine/assets/sprites", info, tmp_path / "out", 1, 0, 5)
    asked: dict[str, Any] = {}

    class VBench:
        def __init__(self, *arguments: str) -> None:
            asked["made"] = arguments

        def evaluate(self, **arguments: str) -> None:
            asked.update(arguments)

    stand_in = ModuleType("vbench")
    stand_in.VBench = VBench  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vbench", stand_in)
    evaluate.run_vbench(ROOT / "engine/assets/sprites", info, tmp_path / "out", 5, 0, 5)
    assert sorted(p.name for p in (tmp_path / "out/videos").iterdir()) == [f"a red circle-{i}.mp4" for i in range(5)]
    assert asked["videos_path"] == str(tmp_path / "out/videos")
    with pytest.raises(FileNotFoundError, match="VBench_full_info"):
        evaluate.vbench_prompts(tmp_path / "none.json")
