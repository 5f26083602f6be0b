"""Reports of made-up scores: means, errors, paired differences and verdicts are those that numpy gives."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.__main__ import main
from distill.experiments.ablation import saved_scores
from distill.experiments.arms import AblationConfig, Plan, read_plan
from distill.experiments.pairs import Scores, Spread, difference, spread
from distill.experiments.tables import cell
from distill.scores.dimensions import QUALITY, SEMANTIC
from engine.files import write_json
from engine.options import read_table

TEXT = """
[ablation]
seeds = [0, 1, 2]
steps = ["1"]
lengths = [[9, 24], [41, 12]]
given = 0

[arms.one]
title = "one step"
stage = "next_chunk"
steps = ["1", "4"]
"""
ARMS = {
    "gain": "lr = 1e-4, guidance = 1.0",
    "noise": "lr = 1e-5, guidance = 1.0",
    "loss": "lr = 1e-6, guidance = 1.0",
    "turned": "lr = 1e-3, guidance = 1.0",
    "g2": "lr = 1e-4, guidance = 2.0",  # as "gain", but for the guidance
    "lucky": "lr = 1e-5, guidance = 2.0",  # as "noise"
}


def numbers(seed: int, shift: float, width: float, prompts: int) -> list[float]:
    """Totals around .9 whose differences between arms have the mean `shift`."""
    own = np.random.default_rng(100 + seed).normal(0.9, 0.03, 24)[:prompts]
    return list(own + shift + np.random.default_rng([seed, round(1000 + 1000 * shift)]).normal(0, width, prompts))


def write_scores(out: Path, arm: str, seed: int, steps: str, totals: dict[str, list[float]]) -> None:
    """A score file whose every score but the totals is made from them; blink is none, a relation often unknown."""
    clips = {}
    for name, values in totals.items():
        shown = dict.fromkeys(("total", "quality", "semantic", *SEMANTIC, *QUALITY), values)
        shown["all_right"], shown["blink"] = [float(v > 0.9) for v in values], [0.0] * len(values)
        shown["spatial_relationship"] = [None if i % 2 else v for i, v in enumerate(values)]  # type: ignore[misc]
        clips[name] = shown
    windows = [{"from": 32 * i, "quality": 0.9 - 0.01 * i + 0.001 * seed, "total": 0.9} for i in range(5)]
    (out / f"{arm}-{seed}").mkdir(parents=True, exist_ok=True)
    result = {"arm": arm, "steps": steps, "seed": seed, "trained": 1_720_000, "passes": 2 + int(steps)}
    write_json(out / f"{arm}-{seed}" / f"scores-{steps}.json", result | {"clips": clips, "windows": windows})
    write_json(out / f"{arm}-{seed}" / "loss.json", {"all": 0.11 + 0.01 * seed - 0.002 * len(arm), "reappearing": 0.3})


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan, dict[str, Any]]:
    """Arms with known differences to their parent, over 33 and over 161 frames."""
    folder, kept = tmp_path_factory.mktemp("made_up"), {}
    text = TEXT
    for name, changes in ARMS.items():
        text += f'[arms.{name}]\nparent = "one"\nstage = "rl"\nset = {{ {changes} }}\nsteps = ["1"]\n'
    shifts = {"one": (0, 0), "gain": (0.03, 0.01), "noise": (0.0, 0.0), "loss": (-0.03, -0.02), "turned": (0.03, -0.01),
              "g2": (0.04, 0.02), "lucky": (0.03, 0.02)}  # fmt: skip
    for arm, (short, long) in shifts.items():
        for seed in range(3):
            kept[arm, seed] = {"33": numbers(seed, short, 0.02, 24), "161": numbers(seed, long, 0.005, 12)}
            write_scores(folder / "out", arm, seed, "1", kept[arm, seed])
    write_scores(folder / "out", "one", 0, "4", {"33": numbers(0, 0.05, 0.02, 24), "161": numbers(0, 0.05, 0.02, 12)})
    (folder / "arms.toml").write_text(text)
    return folder, read_plan(folder / "arms.toml", read_table(AblationConfig, folder / "arms.toml", "ablation")), kept


@pytest.fixture
def scores(made_up: tuple[Path, Plan, dict[str, Any]]) -> Scores:
    return saved_scores(made_up[1], made_up[0] / "out")


def error(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def test_spread_is_over_seeds_or_of_one_over_prompts() -> None:
    values = np.random.default_rng(0).normal(size=(3, 5))
    values[1, 2] = math.nan
    found = spread(torch.tensor(values))
    means = np.nanmean(values, 1)
    assert (found.mean, found.error, found.seeds) == pytest.approx((means.mean(), error(means), 3))
    alone = spread(torch.tensor(values[:1]))
    assert (alone.mean, alone.error) == pytest.approx((values[0].mean(), error(values[0])))
    assert math.isnan(spread(torch.tensor(values[:1, :1])).error)


@pytest.mark.parametrize("by_seed", [True, False])
def test_the_error_of_a_difference_is_the_larger_one(by_seed: bool) -> None:
    draws = np.random.default_rng(1)
    theirs = draws.normal(size=(3, 6))
    gaps = 0.2 + np.zeros((3, 6)) + draws.normal(size=(3, 1) if by_seed else (1, 6))
    found = difference(torch.tensor(theirs + gaps), torch.tensor(theirs))
    expected = error(gaps.mean(1)) if by_seed else error(gaps.mean(0))
    assert (found.mean, found.error) == pytest.approx((gaps.mean(), expected))


def test_differences_are_paired(scores: Scores, made_up: tuple[Path, Plan, dict[str, Any]]) -> None:
    kept = made_up[2]
    gaps = np.array([np.subtract(kept["gain", s]["33"], kept["one", s]["33"]) for s in range(3)])
    found = scores.difference("gain", "1", "33")
    assert found is not None
    assert found.mean == pytest.approx(gaps.mean())
    assert found.error == pytest.approx(max(error(gaps.mean(1)), error(gaps.mean(0))))
    unpaired = np.hypot(*(error(np.array([kept[arm, s]["33"] for s in range(3)]).mean(0)) for arm in ("gain", "one")))
    assert found.error < unpaired
    assert scores.difference("one", "1", "33") is None


def test_loss_differences_are_paired_by_seed(scores: Scores) -> None:
    found = scores.loss("gain", "all", against=True)
    assert found is not None
    assert found.mean == pytest.approx(-0.002)  # "gain" is one letter longer than "one"
    assert found.error == pytest.approx(0, abs=1e-9)
    assert scores.loss("one", "all", against=True) is None


def test_verdicts(scores: Scores) -> None:
    assert {arm: scores.verdict(arm) for arm in scores.plan.arms} == {
        "one": "not judged",
        "gain": "gain",
        "noise": "no gain",
        "loss": "loss",
        "turned": "no gain: turned round at 161 frames",
        "g2": "gain at guidance 2; at 1 gain",
        "lucky": "gain at guidance 2; at 1 no gain",
    }


def test_cells() -> None:
    assert cell(Spread(0.5, 0.1, 3)) == "50.0 ± 10.0"
    assert cell(Spread(0.5, 0.1, 1)) == "50.0 (± 10.0)"
    assert cell(Spread(-0.5, math.nan, 1), 1.0, "+.4f") == "-0.5000"
    assert cell(None) == cell(Spread(math.nan, math.nan, 1)) == ""


def test_report_of_saved_scores(made_up: tuple[Path, Plan, dict[str, Any]], scores: Scores) -> None:
    folder = made_up[0]
    options = ["--config", str(folder / "arms.toml"), "--out", str(folder / "out"), "--results", str(folder / "docs")]
    assert main(["ablation", *options, "--report"]) == 0
    text = (folder / "docs/ablation.md").read_text()
    gap = scores.difference("gain", "1", "33")
    assert gap is not None
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| gain | one step")]
    assert rows[0][3] == f"+{100 * gap.mean:.1f} ± {100 * gap.error:.1f}"
    assert rows[0][5] == "gain |"
    assert "| one step | 90.1 | 89.1 | 88.1 | 87.1 | 86.1 | 0.956 |" in text
    saved = json.loads((folder / "docs/ablation.json").read_text())
    (row,) = [r for r in saved["rows"] if (r["arm"], r["clips"]) == ("gain", "33")]
    assert row["difference"]["mean"] == pytest.approx(gap.mean)
    assert saved["verdicts"]["g2"] == "gain at guidance 2; at 1 gain"


@pytest.mark.slow
def test_plots(made_up: tuple[Path, Plan, dict[str, Any]], scores: Scores, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    from distill.experiments.plots import plot

    plot(scores, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "ablation.png",
        "differences.png",
        "long.png",
        "trade_off.png",
    }
    for path in tmp_path.iterdir():
        assert np.asarray(Image.open(path).convert("L")).std() > 10
