"""Every stage goes on after a kill exactly as it would have gone on without one; two processes train as one does."""

import copy
import json
import os
import pickle
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import in_processes
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from limits import HANG

from distill.data.shards import Shards
from distill.models.base import Base
from distill.models.rollout import noise_levels
from distill.models.sampling import guided_flow
from distill.models.student_file import NextChunkConfig, load_student
from distill.stages import consistency, dmd, next_chunk, rl, teacher
from distill.stages.consistency import ConsistencyConfig
from distill.stages.dmd import LOSSES, DmdConfig
from distill.stages.latents import Bank
from distill.stages.next_chunk import segment_target
from distill.stages.rl import RlConfig
from distill.stages.sample_teacher import SampleTeacherConfig, write_clips
from distill.stages.teacher import Teacher, TeacherConfig, draw_sigmas
from distill.stages.vae import train_vae
from distill.stages.vae.train_vae import VaeConfig
from distill.training.draws import Draws
from distill.training.loop import split

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support")))


def assert_same(first: torch.nn.Module, second: torch.nn.Module) -> None:
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
def test_vae_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validate = train_vae.validate
    monkeypatch.setattr(train_vae, "validate", lambda vae, task, frames, clips: validate(vae, task, frames, 1))
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
        batch=4,
        cycle=((3, 2), (2, 2)),
        late_cycle=((3, 2),),
        save_every=2,
        score_every=0,
    )


@pytest.fixture(scope="module")
def trained_teacher(teacher_config: TeacherConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Teacher]:
    folder = tmp_path_factory.mktemp("teacher")
    whole = teacher.train(teacher_config, folder)
    louder = copy.deepcopy(whole)  # five steps leave it almost silent, and what is silent tests nothing
    torch.nn.init.normal_(louder.transformer.proj_out.weight, std=0.1)
    louder.save(folder / "teacher")
    return folder / "teacher", whole


def test_teacher_resumes(teacher_config: TeacherConfig, trained_teacher: tuple[Path, Teacher], tmp_path: Path) -> None:
    teacher.train(teacher_config, tmp_path, stop_at=3)
    assert_same(trained_teacher[1], teacher.train(teacher_config, tmp_path))


def losses(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert (value - second[name]).abs().max() <= tolerance, name


def test_next_chunk_resumes(next_chunk_config: NextChunkConfig, student_file: Path, tmp_path: Path) -> None:
    next_chunk.train(next_chunk_config, tmp_path, stop_at=3)
    assert [line["step"] for line in losses(tmp_path)] == [1, 2, 3]
    again = next_chunk.train(next_chunk_config, tmp_path)  # its last checkpoint is of step 2
    assert losses(tmp_path) == losses(student_file.parent)
    assert_equal(torch.load(student_file)["student"], again)
    assert again["sdd.condition_proj.weight"].abs().max() > 0  # the ETM's feature is learned from


def test_micro_batches_change_nothing(next_chunk_config: NextChunkConfig, student_file: Path, tmp_path: Path) -> None:
    config = replace(next_chunk_config, micro=1, recompute=True)
    assert_equal(torch.load(student_file)["student"], next_chunk.train(config, tmp_path), 2e-5)


def assert_resumes(stage: ModuleType, config: Any, folder: Path) -> list[dict[str, float]]:
    """A student is trained whole and with a cut: it has learnt, to the same bits. Returns the losses."""
    whole = stage.train(config, folder / "whole")
    stage.train(config, folder / "cut", stop_at=3)
    assert_equal(whole, stage.train(config, folder / "cut"))
    assert losses(folder / "whole") == losses(folder / "cut")
    before, made = torch.load(config.student)["student"], load_student(Path(config.student))[1]
    assert any((whole[name] - before[name]).abs().max() > 1e-6 for name in before)
    streamed = dmd.streamed_by(config, made) if isinstance(config, DmdConfig) else made
    assert load_student(folder / "whole" / "student.pt")[1] == streamed
    return losses(folder / "cut")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("greedy", {"critic_every": 2}),
        ("greedy", {"loss": "sid", "critic_rank": 2, "critic_every": 3, "recompute": True}),
        ("causal", {"frames": 2, "rollout": 4, "sampling_steps": (1, 2), "first_steps": 4}),
        ("causal", {"frames": 4, "schedule": "diagonal", "context": "last", "motion": 0.5}),
        ("greedy", {"adversarial": 0.5, "sampling_steps": (1, 2), "first_steps": 4, "gradient": "one"}),
        (
            "causal",
            {"adversarial": 0.5, "opponent": "data", "loss": "sid", "critic_rank": 2, "head_lr": 2.0, "frames": 4},
        ),
    ],
)
def test_dmd_resumes(
    request: pytest.FixtureRequest, bank: Path, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    student = request.getfixturevalue("student_file" if family == "greedy" else "causal_file")
    config = DmdConfig(
        **{"student": str(student), "data": str(bank / "clips"), "steps": 5, "batch": 2, "frames": 3,
           "critic_warmup": 1, "save_every": 2} | options
    )  # fmt: skip
    lines = assert_resumes(dmd, config, tmp_path)
    learning = [step >= 1 and step % config.critic_every == 0 for step in range(5)]  # after one of the critic alone
    assert [config.loss in line for line in lines] == learning
    assert ["generator" in line for line in lines] == [config.adversarial > 0 and x for x in learning]


@pytest.mark.parametrize(
    ("family", "options"), [("greedy", {"guidance": 2.0}), ("causal", {"levels": 2, "recompute": True, "frames": 4})]
)
def test_consistency_resumes(
    request: pytest.FixtureRequest, bank: Path, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    student = request.getfixturevalue("student_file" if family == "greedy" else "causal_file")
    config = ConsistencyConfig(
        **{"student": str(student), "data": str(bank / "clips"), "steps": 5, "batch": 2, "frames": 3,
           "save_every": 2} | options
    )  # fmt: skip
    assert_resumes(consistency, config, tmp_path)


@pytest.mark.parametrize(
    "options", [{}, {"critic": "trained", "critic_every": 2}, {"scores": "literal", "context": "noised"}]
)
def test_rl_resumes(student_file: Path, bank: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    config = RlConfig(
        student=str(student_file), data=str(bank / "clips"), steps=4, batch=2, frames=3, save_every=2, **options
    )
    lines = assert_resumes(rl, config, tmp_path)
    if options.get("critic"):
        assert ["rl" in line for line in lines] == [True, False, True, False]


def test_bf16(next_chunk_config: NextChunkConfig, student_file: Path, bank: Path, tmp_path: Path) -> None:
    """Frozen weights and products in bf16, trained weights in fp32: nearly the losses of fp32, in every stage."""
    shared: dict[str, Any] = {
        "student": str(student_file), "data": str(bank / "clips"), "steps": 1, "batch": 2, "frames": 3,
        "recompute": True,
    }  # fmt: skip
    tuned, few = RlConfig(**shared), ConsistencyConfig(**shared, guidance=2.0)
    matched = {loss: DmdConfig(**shared, critic_warmup=0, critic_every=1, loss=loss) for loss in LOSSES}
    matched["asd"] = replace(matched["dmd"], adversarial=0.5, sampling_steps=(1, 2))
    for precision in ("bf16", "fp32"):
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            made = replace(next_chunk_config, precision=precision, steps=2)
            trained = next_chunk.train(made, tmp_path / precision)
            rl.train(replace(tuned, precision=precision), tmp_path / f"rl-{precision}")
            consistency.train(replace(few, precision=precision), tmp_path / f"consistency-{precision}")
            for name, config in matched.items():
                dmd.train(replace(config, precision=precision), tmp_path / f"{name}-{precision}")
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        assert {value.dtype for value in trained.values()} == {torch.float32}
    for stage in ("", "rl-", "consistency-", "dmd-", "sid-", "asd-"):
        for low, high in zip(losses(tmp_path / f"{stage}bf16"), losses(tmp_path / f"{stage}fp32"), strict=True):
            assert low["loss"] == pytest.approx(high["loss"], rel=0.2 if stage == "rl-" else 0.03)


def in_two_processes(command: list[str]) -> str:
    """Run a command of Python's in two processes; what they printed.

    Gloo itself may abort while a process starts or ends (pytorch/gloo#514, pytorch/pytorch#179291), which says nothing
    of what is tested: that, and only that, is tried once more, with a warning that shows where it was.
    """
    for attempt in (1, 2):
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS, "PYTHONFAULTHANDLER": "1"},
            capture_output=True,
            text=True,
            timeout=HANG,
        )
        if done.returncode == 0 or "(SIGABRT)" not in done.stderr or attempt == 2:
            break
        warnings.warn(f"two processes, aborted and tried again: {done.stdout}{done.stderr}", stacklevel=2)
    assert done.returncode == 0, done.stderr
    return done.stdout


def launch(stage: str, config: Path, out: Path) -> str:
    """Run the stage in two processes; what it printed."""
    printed = in_two_processes(["-m", "distill", stage, "--config", str(config), "--out", str(out)])
    assert f"{out.name}: 2 processes" in printed
    return printed


def as_toml(section: str, config: object) -> str:
    lines = [f"[{section}]"]
    for name, value in asdict(config).items():
        lines.append(f"{name} = {json.dumps(list(value) if isinstance(value, tuple) else value)}")
    return "\n".join(lines) + "\n"


@pytest.mark.thorough
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch's gloo backend")
def test_two_processes_teach_as_one(
    teacher_config: TeacherConfig, trained_teacher: tuple[Path, Teacher], tmp_path: Path
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(as_toml("teacher", teacher_config))
    launch("teacher", path, tmp_path / "two")
    for two, one in zip(losses(tmp_path / "two"), losses(trained_teacher[0].parent), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_goes_on_from_a_student(next_chunk_config: NextChunkConfig, student_file: Path, tmp_path: Path) -> None:
    config = replace(next_chunk_config, start=str(student_file), steps=1, lr=0.0)
    assert_equal(next_chunk.train(config, tmp_path / "on"), torch.load(student_file)["student"], 0.0)
    with pytest.raises(ValueError, match="with rank = "):
        next_chunk.train(replace(config, rank=config.rank + 1), tmp_path / "other")


def test_learning_rates_have_factors(student_file: Path, bank: Path, tmp_path: Path) -> None:
    """The critic's is the config's of today, also in a run that goes on."""
    config = RlConfig(
        student=str(student_file), data=str(bank / "clips"), steps=2, batch=2, frames=3, critic="trained", save_every=1
    )
    for factor, steps in ((2.0, 1), (5.0, 2)):
        rl.train(replace(config, critic_lr=factor), tmp_path, stop_at=steps)
        student, critic = torch.load(tmp_path / "state.pt")["optimizers"][0]["param_groups"]
        assert critic["lr"] == pytest.approx(factor * student["lr"])


def test_a_batch_that_does_not_split_is_refused_at_once(teacher_config: TeacherConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="divisor of the 3"):
        teacher.train(replace(teacher_config, micro=2, late_cycle=((3, 3),)), tmp_path)
    assert not (tmp_path / "losses.jsonl").exists()


def test_a_checkpoint_of_another_version_is_refused(teacher_config: TeacherConfig, tmp_path: Path) -> None:
    torch.save({"teacher": {}, "rng": torch.get_rng_state()}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="expected a checkpoint of this version"):
        teacher.train(teacher_config, tmp_path)


@dataclass(frozen=True)
class Together:
    """Stages that were trained in one launch of two processes, each into a folder of its name."""

    folder: Path
    tuned: dict[str, tuple[ModuleType, RlConfig | DmdConfig | ConsistencyConfig]]
    sample: SampleTeacherConfig

    def printed(self, name: str, process: int = 0) -> str:
        return (self.folder / f"jobs.{name}.{process}").read_text()


@pytest.fixture(scope="module")
def together(
    next_chunk_config: NextChunkConfig,
    student_file: Path,
    causal_file: Path,
    bank: Path,
    small_teacher: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Together:
    """One launch, because starting two processes takes longer than what they do here."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("needs torch's gloo backend")
    folder = tmp_path_factory.mktemp("together")
    shared: dict[str, Any] = {
        "student": str(student_file), "data": str(bank / "clips"), "steps": 2, "batch": 2, "frames": 3
    }  # fmt: skip
    tuned: dict[str, tuple[ModuleType, Any]] = {
        "rl": (rl, RlConfig(**shared, critic="trained")),
        "dmd": (dmd, DmdConfig(**shared, critic_warmup=0)),  # the critic's step, then one of both
        "sid": (dmd, DmdConfig(**shared, critic_warmup=0, critic_every=1, loss="sid", critic_rank=2)),
        "consistency": (consistency, ConsistencyConfig(**shared, guidance=2.0)),
        "asd": (dmd, DmdConfig(**shared, critic_warmup=0, critic_every=1, adversarial=0.5, sampling_steps=(1, 2))),
    }
    diagonal: dict[str, Any] = {"student": str(causal_file), "frames": 4, "schedule": "diagonal", "context": "last"}
    tuned["diagonal"] = dmd, DmdConfig(**shared | diagonal, motion=0.5, critic_warmup=0, critic_every=1)
    sampled = SampleTeacherConfig(teacher=str(small_teacher), clips=4, shard=1, batch=1, frames=2, steps=2)
    jobs: list[tuple[str, Any, tuple]] = [
        ("freed", in_processes.sharding_frees_what_it_gathered, ()),
        ("sample", in_processes.with_accelerator, (write_clips, sampled, folder / "sample")),
    ]
    for stage, (module, config) in {"next_chunk": (next_chunk, next_chunk_config), **tuned}.items():
        for shard in (False, True):
            name = f"{stage}-{shard}"
            jobs.append((name, module.train, (replace(config, shard=shard), folder / name)))
    (folder / "jobs").write_bytes(pickle.dumps(jobs))
    in_two_processes([in_processes.__file__, str(folder / "jobs")])
    return Together(folder, tuned, sampled)


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_train_as_one(student_file: Path, together: Together, shard: bool) -> None:
    """The same global batch over two processes, frozen weights whole or spread: the same losses, the same weights."""
    name = f"next_chunk-{shard}"
    assert f"{name}: 2 processes" in together.printed(name)
    assert ("frozen layers spread" in together.printed(name)) == shard
    for two, one in zip(losses(together.folder / name), losses(student_file.parent), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    shared = torch.load(together.folder / name / "student.pt")["student"]
    assert_equal(torch.load(student_file)["student"], shared, 1e-4)


@pytest.fixture(scope="module")
def fine_tuned_alone(together: Together, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for stage, (module, config) in together.tuned.items():
        module.train(config, folder / stage)
    return folder


@pytest.mark.parametrize("stage", ["rl", "dmd", "sid", "asd", "consistency", "diagonal"])
@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_fine_tune_as_one(together: Together, fine_tuned_alone: Path, stage: str, shard: bool) -> None:
    name = f"{stage}-{shard}"
    assert f"{name}: 2 processes" in together.printed(name)
    assert ("frozen layers spread" in together.printed(name)) == shard
    for two, one in zip(losses(together.folder / name), losses(fine_tuned_alone / stage), strict=True):
        assert two == pytest.approx(one, rel=1e-3)


def test_two_processes_sample_as_one(together: Together, tmp_path: Path) -> None:
    assert "sample: 2 processes" in together.printed("sample")
    write_clips(together.sample, tmp_path / "one", Accelerator(cpu=True))
    one, two = (Shards(folder).read(range(4)) for folder in (tmp_path / "one", together.folder / "sample"))
    torch.testing.assert_close(two[0], one[0])
    assert two[1] == one[1]


def test_sharding_frees_what_it_gathered(together: Together) -> None:
    """After a forward pass without gradients, as of a teacher or a rollout, only the shards stay."""
    assert [together.printed("freed", process) for process in (0, 1)] == ["freed\n"] * 2


def test_split_over_processes() -> None:
    assert split(8, 2, 1, 2) == [[4, 5], [6, 7]]
    assert split(4, 0, 0, 1) == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match="multiple of the 3"):
        split(8, 0, 0, 3)
    with pytest.raises(ValueError, match="divisor of the 4"):
        split(8, 3, 0, 2)


def test_draws_do_not_depend_on_who_draws() -> None:
    whole, half = Draws(1, 5, [0, 1, 2, 3]), Draws(1, 5, [2, 3])
    assert torch.equal(whole.normal(2, 3)[2:], half.normal(2, 3))
    assert torch.equal(whole.uniform()[2:], half.uniform())
    assert not torch.equal(Draws(1, 5, [2]).normal(4), Draws(1, 6, [2]).normal(4))
    assert not torch.equal(Draws(1, 5, [2]).normal(4), Draws(2, 5, [2]).normal(4))
    seen = [clip for step in range(4) for clip in Draws(1, step, [0, 1, 2, 3]).clips(4, 16)]
    assert sorted(seen) == list(range(16))  # every clip once an epoch


@torch.no_grad()
def test_segment_target_of_one_substep_is_the_guided_flow(trained_teacher: tuple[Path, Teacher]) -> None:
    model = Base(trained_teacher[0])
    config = NextChunkConfig(substeps=1, sampling_shift=2.0)
    noisy, index = torch.randn(4, 8, 1, 8, 8), torch.arange(4)
    text, empty = model.prepare(["a red circle"] * 4), model.prepare([""] * 4)
    sigma = noise_levels(config.preset)[index][:, None]
    expected = guided_flow(model.transformer, noisy, sigma, text, empty, config.guidance)
    got = segment_target(model.transformer, noisy, index, text, empty, config)
    assert (got - expected).abs().max() <= 1e-5
    finer = segment_target(model.transformer, noisy, index, text, empty, replace(config, substeps=4))
    assert (finer - expected).abs().max() > 1e-6


def test_sigmas_are_clean_prefixes_or_not() -> None:
    sigma, weight = draw_sigmas(5, 3.0, TeacherConfig(), Draws(0, 0, list(range(200))))
    assert ((sigma == 0) == (weight == 0)).all()
    assert 0 <= sigma.min() <= sigma.max() <= 1
    torch.testing.assert_close(weight.sum(1), torch.ones(200))  # something is always left to learn
    shared = (sigma == sigma[:, :1]).all(1).float().mean()
    assert 0.2 < shared < 0.4


def test_bank_refuses_what_does_not_fit(bank: Path) -> None:
    with pytest.raises(ValueError, match="at most 4"):
        Bank.load(bank).draw(Draws(0, 0, [0]), 5)
