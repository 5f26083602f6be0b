"""`make embedded` and the ablations run their stages in an order in which each finds what it reads."""

import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
TABLES = {"train_vae": "vae", "latents": "bank"}  # tables that are not named as their stages


def commands(target: str) -> list[list[str]]:
    """Stage and options of every command that a target runs when nothing is there yet."""
    printed = subprocess.run(
        ["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = printed.stdout.replace("\\\n", " ").split("\n")
    runs = [line.split(" -m distill ")[1].split(" 2>&1")[0] for line in lines if " -m distill " in line]
    return [shlex.split(run) for run in runs]


def paths_in(value: Any) -> set[str]:
    """All paths under runs/ in the values of a table."""
    if isinstance(value, dict):
        return set().union(*map(paths_in, value.values()))
    return {value} if isinstance(value, str) and value.startswith("runs/") else set()


@pytest.mark.parametrize(("target", "stages"), [("embedded", 17), ("ablation", 2), ("ablation-rl", 2)])
def test_every_stage_finds_what_it_reads(target: str, stages: int) -> None:
    found, made = commands(target), list[str]()
    assert len(found) == stages
    for stage, *options in found:
        given = dict(zip(options[::2], options[1::2], strict=False))
        needed = {path for name, path in given.items() if name in ("--teacher", "--vae", "--student")}
        if config := given.get("--config"):
            tables = tomllib.loads((ROOT / config).read_text())
            needed = paths_in(tables if stage == "ablation" else tables[TABLES.get(stage, stage)])
        if "--model" in given:
            needed.add(given["--model"])
        missing = [path for path in needed if not any(path.startswith(folder) for folder in made)]
        assert not missing, f"{stage}: {missing} of {made}"
        if "--out" in given:
            made.append(given["--out"])
    assert target != "embedded" or "out/sprites" in made
