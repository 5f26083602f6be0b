"""What a TOML file says about arms: who starts from whom, with which settings, and what is refused in one line."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from distill.__main__ import main
from distill.experiments.ablation import jobs_of
from distill.experiments.arms import AblationConfig, Plan, frames_with_gradient, read_plan
from distill.experiments.measure import passes
from distill.models.student_file import NextChunkConfig
from distill.stages.dmd import Dmd, DmdConfig
from distill.stages.rl import RlConfig
from engine.options import read_table
from engine.presets import PRESETS, override

CONFIGS = Path(__file__).parents[3] / "distill" / "configs"
ARMS = """
[ablation]
seeds = [0, 1]
steps = ["4", "ffe", "own"]

[samplings]
ffe = [[1000, 500], [1000]]

[next_chunk]
steps = 30

[arms.greedy]
stage = "next_chunk"
set = { window = 5, frames = 7 }

[arms.causal]
stage = "next_chunk"
set = { family = "causal", rank = 8 }
steps = ["1"]
baseline = "greedy"

[arms.rl]
title = "Eq. 10"
parents = ["greedy", "causal"]
stage = "rl"
set = { guidance = 2.0, lr = 1e-5 }

[arms.g1]
parents = ["greedy"]
stage = "rl"
set = { guidance = 1.0, lr = 1e-5 }

[arms.guided]
parent = "greedy-rl"
guidance = 1.5
seeds = [1]

[arms.longer]
parent = "greedy"
stage = "next_chunk"
set = { steps = 5 }

[arms.longest]
parent = "longer"
stage = "next_chunk"
"""


def plan_of(text: str, folder: Path) -> Plan:
    path = folder / "arms.toml"
    path.write_text(text)
    return read_plan(path, read_table(AblationConfig, path, "ablation"))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return plan_of(ARMS, tmp_path)


def test_arms_with_several_parents(plan: Plan) -> None:
    assert list(plan.arms) == [
        "greedy", "causal", "greedy-rl", "causal-rl", "greedy-g1", "guided", "longer", "longest",
    ]  # fmt: skip
    assert plan.title("causal-rl") == "causal, Eq. 10"
    assert (plan.source("causal-rl"), plan.owner("guided"), plan.source("greedy")) == ("causal", "greedy-rl", None)


def test_settings_of_arms(plan: Plan, tmp_path: Path) -> None:
    """Table, then set, then what an arm of its parent's stage inherits; parent and seed from the run."""
    root = plan.training("greedy", 1, None)
    assert isinstance(root, NextChunkConfig)
    assert (root.steps, root.window, root.frames, root.seed, root.start) == (30, 5, 7, 1, "")
    tuned = plan.training("greedy-rl", 1, tmp_path / "s.pt")
    assert isinstance(tuned, RlConfig)
    assert (tuned.student, tuned.lr, tuned.seed) == (str(tmp_path / "s.pt"), 1e-5, 1)
    longer, longest = (plan.training(name, 1, tmp_path / "s.pt") for name in ("longer", "longest"))
    assert (longer.steps, longer.window, longer.seed) == (5, 5, 1001)  # other draws than its parent's
    assert (longest.steps, longest.seed, longest.start) == (5, 2001, str(tmp_path / "s.pt"))


def test_steps_and_baselines(plan: Plan) -> None:
    assert plan.samplings == {"4": ((1000, 750, 500, 250),), "ffe": ((1000, 500), (1000,)), "own": (), "1": ((1000,),)}
    assert plan.steps("guided") == ("4", "ffe", "own")
    assert plan.steps("causal-rl") == ("1",)  # as its parent's
    assert plan.against("greedy", "4") is None
    assert plan.against("guided", "ffe") == ("greedy-rl", "ffe")
    assert plan.against("causal", "1") == ("greedy", "4")  # greedy has no such steps
    assert (plan.twin("greedy-rl"), plan.twin("causal-rl")) == ("greedy-g1", None)


def test_jobs_are_what_is_missing(plan: Plan, tmp_path: Path) -> None:
    jobs = jobs_of(plan, tmp_path)
    names = [job.name for job in jobs]
    assert len(names) == len(set(names))
    for job in jobs:
        assert all(names.index(need) < names.index(job.name) for need in job.needs)
    (tmp_path / "greedy-1").mkdir()
    (tmp_path / "greedy-1" / "student.pt").touch()
    left = jobs_of(plan, tmp_path, ("guided",))
    assert [job.name for job in left] == [
        "greedy-rl-1",
        "guided-1 at 4 steps",
        "guided-1 at ffe steps",
        "guided-1 at own steps",
        "greedy-rl-1 on drawn clips",
    ]
    assert left[1].needs == ("greedy-rl-1",)


@pytest.mark.parametrize(
    "made",
    [
        DmdConfig(steps=41, critic_warmup=4, critic_every=3, batch=2, frames=5),
        DmdConfig(steps=20, critic_warmup=0, critic_every=1, batch=3, frames=5, rollout=9),
    ],
)
def test_frames_with_gradient_of_dmd(made: DmdConfig) -> None:
    """Counted step by step; the frame with which a window begins late has no gradient."""
    updates = sum(Dmd.learns(SimpleNamespace(config=made), step) for step in range(made.steps))  # type: ignore[arg-type]
    starts = range((made.rollout or made.frames) - made.frames + 1)
    frames = sum(made.frames - (start > 0) for start in starts) / len(starts)
    assert frames_with_gradient(made) == round(updates * made.batch * frames)


def test_frames_with_gradient_of_other_stages() -> None:
    assert frames_with_gradient(NextChunkConfig(steps=3, batch=4, frames=9, first_batch=16)) == 3 * (4 * 8 + 16)
    assert frames_with_gradient(RlConfig(steps=5, batch=8)) == 40
    assert frames_with_gradient(RlConfig(steps=5, batch=8, critic="trained", critic_every=2)) == 24  # steps 0, 2, 4


@pytest.mark.parametrize("name", ["ablation", "rl"])
def test_shipped_files(name: str) -> None:
    path = CONFIGS / f"{name}.toml"
    plan = read_plan(path, read_table(AblationConfig, path, "ablation"))
    assert [4 * frames - 3 for frames, _ in plan.config.lengths] == [33, 161, 301]
    assert len(jobs_of(plan, Path("nowhere"))) > 100


def test_the_rl_experiment_is_fair() -> None:
    """Equal frames with gradient, at guidance 1 and 2, for three students with three seeds each."""
    path = CONFIGS / "rl.toml"
    plan = read_plan(path, read_table(AblationConfig, path, "ablation"))
    tuned = {name: made for name, made in plan.settings.items() if isinstance(made, RlConfig | DmdConfig)}
    for parent in ("one", "causal", "data"):
        assert len(plan.seeds(parent)) == 3
        for name in ("self", "critic", "frame", "dmd", "windows"):
            assert plan.twin(f"{parent}-{name}") == f"{parent}-{name}-g1"
    assert all(abs(frames_with_gradient(made) / 1080 - 1) < 0.02 for made in tuned.values())


ROOT = '[ablation]\n[arms.a]\nstage = "next_chunk"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[ablation]\n", "got no arms"),
        ("[ablation]\narms = 3\n[arms]\na = 3\n", "unknown key arms"),
        ("[ablation]\n[arms]\na = 3\n", "expected a table"),
        ("[ablation]\n[arms.'A/b']\nstage = 'next_chunk'\n", "with a name of a-z"),
        ("[ablation]\n[arms.a]\nstage = 'teacher'\n", "got 'teacher', expected one that trains students"),
        ("[ablation]\n[arms.a]\nstage = 'nothing'\n", "got 'nothing'"),
        ("[ablation]\n[arms.a]\nstage = 'rl'\n", "parent: got none"),
        ("[ablation]\n[arms.a]\n", "got no stage"),
        ("[ablation]\n[arms.a]\nstages = 'rl'\n", "unknown key stages"),
        ("[ablation]\n[arms.a]\nparent = 'b'\n[arms.b]\nstage = 'next_chunk'\n", "expected an arm above: none yet"),
        (ROOT + "set = { windows = 3 }\n", "[arms.a]: [next_chunk] with its set: got unknown key windows"),
        (ROOT + "set = { window = 'x' }\n", "window: got 'x'"),
        (ROOT + "set = { sampling_steps = 3 }\n", "[arms.a]: sampling_steps: got 3"),
        (ROOT + "set = { seed = 3 }\n", "got seed, expected it in seeds"),
        (ROOT + "[arms.b]\nparent = 'a'\nstage = 'next_chunk'\nset = { start = 'c' }\n", "start, expected it in pa"),
        (ROOT + "[arms.b]\nparent = 'a'\nset = { lr = 1.0 }\n", "got no stage"),
        (ROOT + "[arms.b]\nparent = 'a'\nparents = ['a']\n", "expected one of them"),
        (ROOT + "[arms.b]\nparents = ['a', 'a']\n", "a second arm a-b"),
        (ROOT + "steps = ['7']\n", "got '7', expected a divisor of 1000"),
        (ROOT + "steps = ['x']\n[samplings]\nx = [[]]\n", "expected lists of timesteps"),
        (ROOT + "baseline = 'b'\n", "baseline: got 'b'"),
        (ROOT + "[arms.b]\nstage = 'next_chunk'\nset = { teacher = 'other' }\n", "teacher: got other"),
        (ROOT.replace("[ablation]", "[ablation]\nlengths = [[9, 4], [5, 4]]"), "lengths: got [[9, 4], [5, 4]]"),
        (ROOT.replace("[ablation]", "[ablation]\nlengths = [[9, 4], [11, 5]]"), "prompts that do not rise"),
        (ROOT.replace("[ablation]", "[ablation]\nseeds = []"), "at least one of each"),
        (ROOT.replace("[ablation]", "[ablation]\ngiven = 9"), "given: got 9"),
    ],
)  # fmt: skip
def test_bad_files_are_one_line(text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "arms.toml"
    path.write_text(text)
    assert main(["ablation", "--config", str(path), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()


def test_unknown_arms_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.toml").write_text(ROOT)
    options = ["ablation", "--config", str(tmp_path / "a.toml"), "--out", str(tmp_path)]
    assert main([*options, "--arms", "b"]) == 2
    assert "--arms: got 'b', expected one of a" in capsys.readouterr().err
    assert main([*options, "--jobs", "0"]) == 2
    assert main([*options, "--report"]) == 2
    assert "scores: got none" in capsys.readouterr().err.splitlines()[-1]


def test_a_sampling_may_reuse_and_counts_as_part_of_a_pass(tmp_path: Path) -> None:
    arms = (
        ROOT + "steps = ['4', 'short', 'own-short']\n[samplings]\nshort = { rows = [[1000, 750, 250]], reuse = '3' }\n"
    )
    found = plan_of(arms + "own-short = { reuse = '2:1:0' }\n", tmp_path)
    assert found.reuse == {"short": "3", "own-short": "2:1:0"}
    assert found.samplings["short"] == ((1000, 750, 250),)
    assert found.samplings["own-short"] == ()
    with pytest.raises(ValueError, match="got reuse at step 4, expected at most 3"):
        plan_of(arms.replace("'3'", "'4'") + "own-short = { reuse = '2:1:0' }\n", tmp_path)
    greedy = PRESETS["greedy"]
    assert passes(greedy, 4) == 6
    assert passes(override(greedy, {"reuse": "2,4:1:1"}), 4) == 5
    assert passes(override(PRESETS["self-forcing"], {"reuse": "3:1:0"}), 4) == (4 + 1 - 3 / 4) / 3
