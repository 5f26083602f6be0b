"""Arms are trained, scored and reported from one file; a second run does nothing, another file is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.__main__ import main
from distill.data.shards import write_index, write_shard
from distill.data.sprites import sample
from distill.experiments.ablation import Runner, jobs_of
from distill.experiments.arms import AblationConfig, read_plan
from distill.experiments.measure import Measure
from distill.models.codec import build_vae
from distill.models.rollout import roll_out
from distill.models.student_file import load_student, read_student
from distill.stages.teacher import SPRITES, Teacher
from engine.options import read_table

pytestmark = pytest.mark.slow

TEXT = """
[next_chunk]
teacher = "FOLDER/teacher"
data = "FOLDER/clips"
steps = 1
batch = 2
first_batch = 2
frames = 3
rank = 2

[dmd]
data = "FOLDER/clips"
steps = 2
batch = 1
frames = 3
critic_warmup = 1
critic_every = 1

[ablation]
vae = "FOLDER/vae"
seeds = [0]
steps = ["1", "ffe"]
lengths = [[3, 2], [5, 1]]
given = 1
window = 8

[samplings]
ffe = [[1000, 500], [1000]]

[arms.causal]
stage = "next_chunk"
set = { family = "causal", window = 3 }
steps = ["1"]

[arms.longer]
parent = "causal"
stage = "next_chunk"

[arms.greedy]
title = "ETM and SDD"
stage = "next_chunk"
baseline = "causal"

[arms.dmd]
parents = ["greedy"]
stage = "dmd"
steps = ["1"]

[arms.guided]
parents = ["causal"]
guidance = 1.5
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small teacher, a VAE, random latents under real captions, and the file of arms."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    teacher = Teacher(replace(SPRITES, num_layers=2, num_attention_heads=2, ffn_dim=128))
    torch.nn.init.normal_(teacher.transformer.proj_out.weight, std=0.1)
    teacher.save(folder / "teacher")
    build_vae().save_pretrained(folder / "vae")
    captions = [spec.caption for spec in sample(4, torch.Generator().manual_seed(0))]
    write_shard(folder / "clips", 0, torch.randn(4, 8, 3, 8, 8).half(), captions)
    write_index(folder / "clips", 1, {})
    (folder / "arms.toml").write_text(TEXT.replace("FOLDER", str(folder)))
    return folder


def command(world: Path, *more: str, file: str = "arms.toml") -> list[str]:
    return [
        "ablation", "--config", str(world / file), "--out", str(world / "out"), "--results", str(world / "docs"), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def done(world: Path) -> Path:
    assert main(command(world)) == 0
    return world


def test_every_arm_is_trained_and_scored(done: Path) -> None:
    scored = {path.parent.name: set() for path in (done / "out").glob("*/scores-*.json")}
    for path in (done / "out").glob("*/scores-*.json"):
        scored[path.parent.name].add(path.stem.removeprefix("scores-"))
    assert scored == {
        "causal-0": {"1"},
        "longer-0": {"1"},
        "greedy-0": {"1", "ffe"},
        "greedy-dmd-0": {"1"},
        "causal-guided-0": {"1"},
    }
    students = {path.parent.name for path in (done / "out").glob("*/student.pt")}
    assert students == {"causal-0", "longer-0", "greedy-0", "greedy-dmd-0"}
    longer = read_student(done / "out/longer-0/student.pt")[1]
    assert (longer.start, longer.family, longer.seed) == (str(done / "out/causal-0/student.pt"), "causal", 1000)
    result = json.loads((done / "out/greedy-0/scores-1.json").read_text())
    assert {name: len(scores["total"]) for name, scores in result["clips"].items()} == {"9": 2, "17": 1, "given": 2}
    assert [window["from"] for window in result["windows"]] == [0, 8]
    losses = {path.parent.name: json.loads(path.read_text()) for path in (done / "out").glob("*/loss.json")}
    assert losses.keys() == students
    assert losses["causal-0"] != losses["greedy-0"]


def test_the_report_names_every_arm(done: Path) -> None:
    text = (done / "docs/ablation.md").read_text()
    for words in ("| ETM and SDD, dmd | ETM and SDD | 3 |", "## 9 frames, 2 prompts", "## 17 frames, 1 prompts",
                  "## Going on from 1 drawn latent frames", "## Held-out loss", "## Quality over time",
                  "## Total against steps, 9 frames", "all right", "dynamic degree", "blink"):  # fmt: skip
        assert words in text, words
    numbers = json.loads((done / "docs/ablation.json").read_text())
    assert len({(row["arm"], row["steps"]) for row in numbers["rows"]}) == 6


def test_a_second_run_only_reports(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "__call__", lambda *_: pytest.fail("done again"))
    before = (done / "docs/ablation.md").read_text()
    for more in ((), ("--report",)):
        (done / "docs/ablation.md").unlink()
        assert main(command(done, *more)) == 0
        assert (done / "docs/ablation.md").read_text() == before


def test_arms_and_seeds_may_be_added(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is new is done; so after a stop."""
    text = (done / "arms.toml").read_text().replace("seeds = [0]", "seeds = [0, 1]")
    (done / "more.toml").write_text(text + '[arms.new]\nparent = "greedy"\nsteps = ["2"]\n')
    asked = []
    monkeypatch.setattr(Runner, "__call__", lambda _, job: asked.append(job.name) or "")
    assert main(command(done, "--arms", "new", file="more.toml")) == 0
    assert asked == [
        "new-0 at 2 steps", "greedy-1", "new-1 at 2 steps", "greedy-1 on drawn clips",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("rank = 2", "rank = 4", "got another causal in arms"),
        ("critic_warmup = 1", "critic_warmup = 0", "got another greedy-dmd in arms"),
        ("guidance = 1.5", "guidance = 2.0", "got another causal-guided in arms"),
        ("[5, 1]", "[6, 1]", "got another lengths in ablation"),
        ("ffe = [[1000, 500]", "ffe = [[1000, 250]", "got another ffe in samplings"),
    ],
)
def test_other_settings_are_refused(
    done: Path, old: str, new: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (done / "arms.toml").read_text()
    assert old in text
    (done / "other.toml").write_text(text.replace(old, new))
    before = (done / "out/settings.json").read_text()
    assert main(command(done, file="other.toml")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert (done / "out/settings.json").read_text() == before


def test_a_stopped_run_goes_on(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is done again, what was done is not."""
    path = world / "arms.toml"
    plan = read_plan(path, read_table(AblationConfig, path, "ablation"))
    train = Runner._train

    def broken(runner: Runner, arm: str, seed: int) -> str:
        if arm == "longer":
            raise OSError("no space left")
        return train(runner, arm, seed)

    monkeypatch.setattr(Runner, "_train", broken)
    options = ["ablation", "--config", str(path), "--out", str(tmp_path), "--results", str(tmp_path / "docs")]
    assert main([*options, "--arms", "longer"]) == 1
    assert [job.name for job in jobs_of(plan, tmp_path, ("longer",))] == [
        "longer-0", "longer-0 at 1 steps", "longer-0 on drawn clips",
    ]  # fmt: skip


def test_shorter_clips_are_the_beginning_of_longer_ones(done: Path) -> None:
    """So that a prompt is streamed once; its noise does not depend on the prompts beside it."""
    path = done / "arms.toml"
    plan = read_plan(path, read_table(AblationConfig, path, "ablation"))
    measure, student = Measure(plan), done / "out/greedy-0/student.pt"
    model, made, _ = load_student(student, measure.base)
    short, long = (measure._stream(model, made.preset, 1.0, frames, 0, 2) for frames in (3, 5))
    alone = measure._stream(model, made.preset, 1.0, 3, 1, 2)
    assert all((a - b[:, :9]).abs().max() < 1e-4 for a, b in zip(short, long, strict=True))
    assert (alone[0] - short[1]).abs().max() < 1e-4
    assert (short[0] - short[1]).abs().max() > 0.01


def test_guidance_of_both_families(done: Path) -> None:
    """With a scale of 1 a guided stream is the plain one; with another it is not."""
    for arm in ("greedy", "causal"):
        student, made, base = load_student(done / "out" / f"{arm}-0" / "student.pt")
        emb = base.encode(["a red circle moving right slowly on a gray background"])
        both = torch.cat([emb, base.encode([""])])
        plain = roll_out(student, emb, 3, [7], made.preset)
        with student.guided(1.0):
            same = roll_out(student, both, 3, [7, 7], made.preset)
        with student.guided(3.0):
            other = roll_out(student, both, 3, [7, 7], made.preset)
        assert (same[:1] - plain).abs().max() < 1e-4
        assert (other[0] - other[1]).abs().max() < 1e-4  # one video
        assert (other[:1] - plain).abs().max() > 1e-3
