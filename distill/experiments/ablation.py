"""A comparison of students: arms by seeds, trained and scored on the same held-out prompts and noise; tables and plots.

    make ablation                     (--config distill/configs/ablation.toml --out runs/experiments/ablation)
    python -m distill ablation --config distill/configs/rl.toml --out runs/experiments/rl --results docs/results/rl

The file says what the arms are (distill/experiments/arms.py). Every arm is a stage on the student of its parent arm,
or another way to stream it. A run skips all that --out already holds and resumes a stopped training, so that it can
end and start again at any time; arms, seeds and steps may be added meanwhile.
"""

import json
import time
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from distill.experiments.arms import AblationConfig, Plan, read_plan, stage_of, start_field
from distill.experiments.jobs import Clock, Job, done_jobs
from distill.experiments.measure import Measure
from distill.experiments.pairs import Scores, clips_name
from distill.experiments.plots import plot
from distill.experiments.tables import write_tables
from distill.training.loop import FitConfig
from distill.training.stage import Stage, TableOptions
from engine.files import read_json, write_json
from engine.options import option

FREE = ("title", "seeds", "steps", "loss")  # entries of [ablation] that may change in a folder
EVERY = 60.0  # seconds, at least, from one report to the next


@dataclass(frozen=True)
class AblationOptions(TableOptions):
    config: Path = option(
        Path("distill/configs/ablation.toml"), "TOML file, also of [arms.NAME] and the stages", metavar="FILE"
    )
    out: Path = option(Path("runs/ablation"), "folder of students and scores")
    results: Path = option(Path("docs/results"), "folder of tables and plots")
    arms: tuple[str, ...] = option((), "train and score this arm only; may be repeated", metavar="ARM")
    jobs: int = option(1, "processes side by side, of --threads each")
    report: bool = option(False, "train nothing; report the scores that --out holds")

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"--jobs: got {self.jobs}, expected at least 1")


def student_file(out: Path, arm: str, seed: int) -> Path:
    return out / f"{arm}-{seed}" / "student.pt"


def scores_file(out: Path, arm: str, seed: int, steps: str) -> Path:
    return out / f"{arm}-{seed}" / f"scores-{steps}.json"


def loss_file(out: Path, arm: str, seed: int) -> Path:
    return out / f"{arm}-{seed}" / "loss.json"


class Runner:
    """Does the jobs of a plan under one folder."""

    def __init__(self, plan: Plan, out: Path) -> None:
        self.plan, self.out = plan, out

    @cached_property
    def measure(self) -> Measure:
        return Measure(self.plan)

    def __call__(self, job: Job) -> str:
        """Train or measure, write the file, and say what came out."""
        if job.kind == "loss":
            loss = self.measure.loss(student_file(self.out, job.arm, job.seed))
            write_json(loss_file(self.out, job.arm, job.seed), loss)
            return f"Eq. 6 {loss['all']:.4f}"
        if job.kind != "scores":
            return self._train(job.arm, job.seed)
        student = student_file(self.out, self.plan.owner(job.arm), job.seed)
        result = self.measure.scores(job.arm, job.seed, job.steps, student)
        write_json(scores_file(self.out, job.arm, job.seed, job.steps), result, indent=0)
        totals = result["clips"][clips_name(self.plan.config.lengths[0][0])]["total"]
        return f"total {100 * sum(totals) / len(totals):.1f}"

    def _train(self, arm: str, seed: int) -> str:
        source, path = self.plan.source(arm), student_file(self.out, arm, seed)
        made = self.plan.training(arm, seed, student_file(self.out, source, seed) if source else None)
        stage_of(self.plan.arms[arm].stage, arm).train(made, path.parent)
        return f"{made.steps} steps"


def jobs_of(plan: Plan, out: Path, only: tuple[str, ...] = ()) -> list[Job]:
    """What is missing in a folder, of the arms `only` or of all: parents before children, seed by seed."""
    found: dict[str, Job] = {}
    for seed in sorted({seed for arm in plan.arms for seed in plan.seeds(arm)}):
        for arm in only or plan.arms:
            if seed in plan.seeds(arm):
                _add_jobs(plan, out, arm, seed, found)
    return list(found.values())


def _add_jobs(plan: Plan, out: Path, arm: str, seed: int, found: dict[str, Job]) -> None:
    owner = plan.owner(arm)
    student = _add_training(plan, out, owner, seed, found)
    needs = (student,) if student else ()
    frames = sum(length * prompts for length, prompts in plan.config.lengths)
    for steps in plan.steps(arm):
        passes = 2 + len(plan.samplings[steps][-1] if plan.samplings[steps] else range(4))
        if not scores_file(out, arm, seed, steps).is_file():
            name, size = f"{arm}-{seed} at {steps} steps", frames * passes * (1 + (plan.arms[arm].guidance != 1))
            found.setdefault(name, Job(name, "scores", size, needs, arm, seed, steps))
    if plan.config.loss and not loss_file(out, owner, seed).is_file():
        name = f"{owner}-{seed} on drawn clips"
        found.setdefault(name, Job(name, "loss", 2 * frames, needs, owner, seed))


def _add_training(plan: Plan, out: Path, arm: str, seed: int, found: dict[str, Job]) -> str:
    """Add the training of an arm, behind those that it starts from; empty: its student is there."""
    if student_file(out, arm, seed).is_file():
        return ""
    name, source, made = f"{arm}-{seed}", plan.source(arm), plan.settings[arm]
    if name not in found:
        needs = _add_training(plan, out, source, seed, found) if source else ""
        frames = getattr(made, "rollout", 0) or getattr(made, "frames", 1)
        size = 3.0 * made.steps * made.batch * frames
        found[name] = Job(name, plan.arms[arm].stage, size, (needs,) if needs else (), arm, seed)
    return name


def check_settings(plan: Plan, out: Path) -> None:
    """Refuse a folder with students or scores of other settings: they do not belong in one table."""
    path, now = out / "settings.json", json.loads(json.dumps(_settings(plan)))
    if path.is_file():
        before = read_json(path)
        for table, entries in now.items():
            shared = entries.keys() & before[table].keys() if table != "ablation" else entries.keys()
            if changed := sorted(name for name in shared if entries[name] != before[table].get(name)):
                raise ValueError(
                    f"{path}: got another {changed[0]} in {table}, expected that of this folder (or another --out)"
                )
            now[table] = before[table] | entries
    write_json(path, now)


def _settings(plan: Plan) -> dict[str, Any]:
    """All that students and scores depend on. Defaults are left out, so that new ones change nothing."""

    def changed(made: FitConfig, also: str) -> dict[str, Any]:
        return {f.name: getattr(made, f.name) for f in fields(made)
                if f.name not in ("seed", also) and getattr(made, f.name) != f.default}  # fmt: skip

    arms = {}
    for name, arm in plan.arms.items():
        made = plan.settings.get(name)
        parents = start_field(type(made)) if made and arm.parent else ""
        arms[name] = {"stage": arm.stage, "parent": arm.parent, "guidance": arm.guidance,
                      "settings": changed(made, parents) if made else {}}  # fmt: skip
    scored = {name: value for name, value in asdict(plan.config).items() if name not in FREE}
    samplings = {name: {"rows": rows, "reuse": plan.reuse[name]} if name in plan.reuse else rows
                 for name, rows in plan.samplings.items()}  # fmt: skip
    return {"ablation": scored, "samplings": samplings, "arms": arms}


def saved_scores(plan: Plan, out: Path) -> Scores:
    """The scores of the plan's arms that a folder holds."""
    every = [(arm, seed) for arm in plan.arms for seed in plan.seeds(arm)]
    paths = [scores_file(out, arm, seed, steps) for arm, seed in every for steps in plan.steps(arm)]
    results = [read_json(path) for path in paths if path.is_file()]
    if not results:
        raise FileNotFoundError(f"scores: got none in {out}, expected some such as {paths[0].relative_to(out)}")
    losses = {(plan.owner(arm), seed): loss_file(out, plan.owner(arm), seed) for arm, seed in every}
    return Scores(plan, results, {key: read_json(path) for key, path in losses.items() if path.is_file()})


def write_report(plan: Plan, out: Path, results: Path) -> None:
    """Tables and plots of all scores that are there."""
    scores = saved_scores(plan, out)
    write_tables(scores, results)
    plot(scores, results)


def run(config: AblationConfig, options: AblationOptions) -> None:
    """Train, score and report every arm and seed; with --report only report."""
    plan = read_plan(options.config, config)
    if unknown := sorted(set(options.arms) - plan.arms.keys()):
        raise ValueError(f"--arms: got {unknown[0]!r}, expected one of {', '.join(plan.arms)}")
    if not options.report:
        check_settings(plan, options.out)
        _work(plan, options)
    write_report(plan, options.out, options.results)


def _work(plan: Plan, options: AblationOptions) -> None:
    """Do what is missing; a line and now and then a report on the way."""
    jobs = jobs_of(plan, options.out, options.arms)
    clock, reported = Clock(jobs, options.jobs), time.monotonic()
    for number, (job, words, seconds) in enumerate(
        done_jobs(jobs, partial(Runner, plan, options.out), options.jobs), 1
    ):
        clock.done(job, seconds)
        left = f"{seconds / 60:.1f} min, eta {clock.left() / 60:.0f} min"
        print(f"ablation {number}/{len(jobs)} {job.name}: {words}; {left}", flush=True)
        if job.kind == "scores" and time.monotonic() - reported > EVERY:
            write_report(plan, options.out, options.results)
            reported = time.monotonic()


STAGE = Stage(AblationOptions, run, AblationConfig, "ablation")
