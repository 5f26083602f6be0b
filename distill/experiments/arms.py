"""The arms of a comparison, as data: which stage trains a student from which, and how it streams.

    [ablation]                  # what all arms are scored on
    [next_chunk]                # and [rl], [dmd], ...: a stage's settings in all arms
    [samplings]                 # denoising steps by name. "4" is 1000, 750, 500, 250; "own" are the student's
    ffe = [[1000, 750, 500, 250], [1000]]
    reuse-3 = { rows = [[1000, 750, 500, 250]], reuse = "3:1:1" }   # the preset's `reuse` as well

    [arms.greedy]
    stage = "next_chunk"
    set = { window = 3 }        # replaces entries of the stage's table

    [arms.greedy-dmd]
    parent = "greedy"           # whose student it starts from
    stage = "dmd"

    [arms.guided]               # greedy-guided and greedy-dmd-guided: their parents' students, streamed with guidance
    parents = ["greedy", "greedy-dmd"]
    guidance = 1.5

An arm inherits the steps at inference of its parent, and the `set` if both have the same stage. Parents stand above
their children.
"""

import importlib
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import distill.stages
from distill.models.student_file import NextChunkConfig
from distill.stages.dmd import DmdConfig, even_steps
from distill.stages.rl import RlConfig
from distill.training.loop import FitConfig
from engine.options import option, read, read_toml
from engine.presets import PRESETS, override

Rows = tuple[tuple[float, ...], ...]  # timesteps of the first chunks; the last row is of all others; none: its own


@dataclass(frozen=True)
class AblationConfig:
    """The table [ablation]."""

    title: str = option("Ablation", "of the report")
    task: str = option("scenes", "task of prompts and scores: sprites or scenes")
    vae: str = option("runs/rich/vae/vae", "VAE that decodes the clips")
    seeds: tuple[int, ...] = option((0, 1, 2), "training seeds of an arm that names none")
    steps: tuple[str, ...] = option(("4",), "denoising steps at inference, the main ones first")
    lengths: tuple[tuple[int, int], ...] = option(
        ((9, 48), (41, 12)), "latent frames and held-out prompts of each set of clips, from short to long"
    )
    given: int = option(2, "drawn latent frames that one more set of clips continues; 0: no such set")
    loss: bool = option(True, "also the loss of Eq. 6 on drawn held-out clips")
    window: int = option(32, "pixel frames over which the quality of the longest clips is taken")
    prompt_seed: int = option(5000, "of prompts and noise")

    def __post_init__(self) -> None:
        frames, prompts = [f for f, _ in self.lengths], [n for _, n in self.lengths]
        falls = prompts == sorted(prompts, reverse=True) and min(prompts, default=0) >= 1
        if not frames or frames != sorted(set(frames)) or frames[0] < 1 or not falls:
            got = list(map(list, self.lengths))
            raise ValueError(f"lengths: got {got}, expected rising frames with prompts that do not rise")
        if not self.seeds or not self.steps:
            raise ValueError(
                f"got seeds {list(self.seeds)} and steps {list(self.steps)}, expected at least one of each"
            )
        if not 0 <= self.given < frames[0]:
            raise ValueError(f"given: got {self.given}, expected 0 to {frames[0] - 1}")


@dataclass(frozen=True)
class Arm:
    """The table [arms.NAME]."""

    title: str = option("", "in tables; empty: its name")
    stage: str = option("", "stage that trains it; empty: it streams its parent's student in another way")
    parent: str = option("", "arm above whose student it starts from")
    parents: tuple[str, ...] = option((), "several such: one arm for each, named PARENT-NAME")
    set: dict[str, Any] = field(default_factory=dict, metadata={"help": "entries of the stage's table"})
    guidance: float = option(1.0, "scale of guidance at inference")
    steps: tuple[str, ...] = option((), "denoising steps at inference; empty: its parent's")
    seeds: tuple[int, ...] = option((), "training seeds; empty: those of [ablation]")
    baseline: str = option("", "arm from which its differences are taken; empty: its parent")


@dataclass(frozen=True)
class Plan:
    """All arms of a file, checked."""

    config: AblationConfig
    arms: dict[str, Arm]
    settings: dict[str, FitConfig]  # of every arm that is trained
    samplings: dict[str, Rows]
    reuse: dict[str, str] = field(default_factory=dict)  # the preset's `reuse` of samplings that have it

    @cached_property
    def made(self) -> NextChunkConfig:
        """The config of the first student, whose teacher is that of all."""
        return next(made for made in self.settings.values() if isinstance(made, NextChunkConfig))

    def seeds(self, name: str) -> tuple[int, ...]:
        return self.arms[name].seeds or self.config.seeds

    def steps(self, name: str) -> tuple[str, ...]:
        """The arm's own, its parent's, or those of [ablation]."""
        arm = self.arms[name]
        return arm.steps or (self.steps(arm.parent) if arm.parent else self.config.steps)

    def title(self, name: str) -> str:
        return self.arms[name].title or name

    def owner(self, name: str) -> str:
        """The arm that trains the student which this arm streams."""
        return name if self.arms[name].stage else self.owner(self.arms[name].parent)

    def source(self, name: str) -> str | None:
        """The trained arm whose student a trained arm starts from."""
        return self.owner(self.arms[name].parent) if self.arms[name].parent else None

    def against(self, name: str, steps: str) -> tuple[str, str] | None:
        """Arm and steps from which differences are taken: at the same steps or, without them, at the arm's first."""
        other = self.arms[name].baseline or self.arms[name].parent
        if not other:
            return None
        known = self.steps(other)
        return other, steps if steps in known else known[0]

    def training(self, name: str, seed: int, student: Path | None) -> FitConfig:
        """The settings with which a seed is trained, from a student.

        An arm of a stage that trained one of its parents gets another seed, so that it does not repeat the draws.
        """
        made, stage, above, depth = self.settings[name], self.arms[name].stage, self.source(name), 0
        while above:
            depth += self.arms[above].stage == stage
            above = self.source(above)
        start = {start_field(type(made)): str(student)} if student else {}
        return replace(made, seed=seed + 1000 * depth, **start)

    def guidance(self, name: str) -> float:
        """The guidance with which a teacher judges the student's own clips; 1 where none does."""
        made = self.settings.get(name)
        judged = made is not None and not isinstance(made, NextChunkConfig)
        return float(getattr(made, "guidance", 1.0)) if judged else 1.0

    def twin(self, name: str) -> str | None:
        """The arm that differs from this one in that guidance alone, which is 1 there."""
        wanted, parent = replace(self.settings[name], guidance=1.0), self.arms[name].parent  # type: ignore[call-arg]
        return next(
            (n for n, other in self.settings.items() if other == wanted and self.arms[n].parent == parent), None
        )


def read_plan(path: Path, config: AblationConfig) -> Plan:
    """The arms of a TOML file. ValueError names the table, got and expected."""
    tables = read_toml(path)
    found = tables.get("arms")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path}: got no arms, expected at least one table [arms.NAME]")
    arms: dict[str, Arm] = {}
    made: dict[str, FitConfig] = {}
    sets: dict[str, dict[str, Any]] = {}
    for table, values in found.items():
        what = f"{path} [arms.{table}]"
        if not isinstance(values, dict) or not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", table):
            raise ValueError(f"{what}: got {values!r:.80}, expected a table with a name of a-z, 0-9, ., _ and -")
        for name, arm in _one_per_parent(table, read(Arm, values, what), arms, what):
            if name in arms:
                raise ValueError(f"{what}: got a second arm {name}, expected one")
            arms[name] = arm
            _settle(name, tables, arms, made, sets, what)
    found = _samplings(path, tables.get("samplings", {}), config, arms)
    reuse = {name: sampling.reuse for name, sampling in found.items() if sampling.reuse}
    plan = Plan(config, arms, made, {name: sampling.rows or () for name, sampling in found.items()}, reuse)
    _check(plan, path)
    return plan


def _one_per_parent(table: str, arm: Arm, above: dict[str, Arm], what: str) -> Iterator[tuple[str, Arm]]:
    """The arm itself, or one for each of its parents."""
    if arm.parent and arm.parents:
        raise ValueError(f"{what}: got parent and parents, expected one of them")
    for parent in arm.parents or (arm.parent,):
        if parent and parent not in above:
            raise ValueError(f"{what}: parent: got {parent!r}, expected an arm above: {', '.join(above) or 'none yet'}")
        if not arm.parents:
            yield table, arm
            continue
        title = f"{above[parent].title or parent}, {arm.title or table}"
        yield f"{parent}-{table}", replace(arm, parent=parent, parents=(), title=title)


def _settle(
    name: str,
    tables: dict[str, Any],
    arms: dict[str, Arm],
    made: dict[str, FitConfig],
    sets: dict[str, dict[str, Any]],
    what: str,
) -> None:
    """Read the settings with which an arm is trained into `made`, its `set` with what it inherits into `sets`."""
    arm = arms[name]
    if not arm.stage:
        if arm.set or not arm.parent:
            raise ValueError(f"{what}: got no stage, expected one, or a parent and no set")
        return
    kind = stage_of(arm.stage, what).STAGE.config
    start, owner = start_field(kind), arm.parent
    while owner and not arms[owner].stage:
        owner = arms[owner].parent
    if start == "student" and not owner:
        raise ValueError(f"{what}: parent: got none, expected the arm whose student {arm.stage} starts from")
    elsewhere = {"seed": "seeds"} | ({start: "parent"} if owner else {})  # the first students may start from a file
    if fixed := sorted(elsewhere.keys() & arm.set.keys()):
        raise ValueError(f"{what}: set: got {fixed[0]}, expected it in {elsewhere[fixed[0]]}")
    inherited = sets[owner] if owner and arms[owner].stage == arm.stage else {}
    sets[name] = inherited | arm.set
    try:
        made[name] = read(kind, tables.get(arm.stage, {}) | sets[name], f"[{arm.stage}] with its set")
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def stage_of(name: str, what: str) -> ModuleType:
    """The module of a stage that trains students: it has STAGE and train(config, folder)."""
    if name in {module.name for module in pkgutil.iter_modules(distill.stages.__path__)}:
        module = importlib.import_module(f"distill.stages.{name}")
        if hasattr(module, "train") and start_field(getattr(getattr(module, "STAGE", None), "config", None)):
            return module
    raise ValueError(f"{what}: stage: got {name!r}, expected one that trains students, such as next_chunk, rl or dmd")


def start_field(kind: type | None) -> str:
    """The field of a stage's config that names the student to start from; empty: the stage trains none."""
    if kind is None:
        return ""
    if issubclass(kind, NextChunkConfig):
        return "start"
    return "student" if any(f.name == "student" for f in fields(kind)) else ""


def _samplings(path: Path, table: Any, config: AblationConfig, arms: dict[str, Arm]) -> "dict[str, _Sampling]":
    """The sampling of every name in use."""
    found: dict[str, _Sampling] = {}
    for name in dict.fromkeys([*config.steps, *(step for arm in arms.values() for step in arm.steps)]):
        if name in table:
            given = table[name] if isinstance(table[name], dict) else {"rows": table[name]}
            found[name] = read(_Sampling, given, f"{path} [samplings] {name}")
        elif name == "own":
            found[name] = _Sampling()
        elif name.isdecimal() and int(name) and 1000 % int(name) == 0:
            found[name] = _Sampling((even_steps(int(name)),))
        else:
            raise ValueError(f"{path}: steps: got {name!r}, expected a divisor of 1000, own, or a name in [samplings]")
    return found


@dataclass(frozen=True)
class _Sampling:
    rows: Rows | None = None  # none: the student's own
    reuse: str = ""  # as --reuse takes it

    def __post_init__(self) -> None:
        if self.rows is not None and (not self.rows or not all(self.rows)):
            raise ValueError(f"samplings: got {list(self.rows)}, expected lists of timesteps")
        if self.reuse:  # refuses a wrong one now
            override(PRESETS["greedy"], {"reuse": self.reuse} | ({"steps": self.rows} if self.rows else {}))


def _check(plan: Plan, path: Path) -> None:
    """What can only be told once all arms are there."""
    for name, arm in plan.arms.items():
        if arm.baseline and arm.baseline not in plan.arms:
            raise ValueError(
                f"{path} [arms] {name}: baseline: got {arm.baseline!r}, expected one of {', '.join(plan.arms)}"
            )
    for name, made in plan.settings.items():
        if isinstance(made, NextChunkConfig) and made.teacher != plan.made.teacher:
            raise ValueError(f"{path} [arms] {name}: teacher: got {made.teacher}, expected {plan.made.teacher}")


def frames_with_gradient(made: FitConfig) -> int:
    """The frames whose loss moves the student, over a whole training."""
    if isinstance(made, NextChunkConfig):
        return made.steps * (made.batch * (made.frames - 1) + made.first_batch)
    if isinstance(made, RlConfig):
        return made.batch * (made.steps if made.critic == "self" else -(-made.steps // made.critic_every))
    frames: float = getattr(made, "frames", 1)
    if not isinstance(made, DmdConfig):
        return round(made.steps * made.batch * frames)
    windows = (made.rollout or made.frames) - made.frames + 1
    each = 1 if made.gradient == "one" else frames - (windows - 1) / windows
    return round((made.steps - made.critic_warmup) // made.critic_every * made.batch * each)
