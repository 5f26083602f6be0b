"""Scores of heads against masses worked out by hand; python -m distill heads on a small causal model; bad input."""

import json
from pathlib import Path

import pytest
import torch
from frames import write_clips
from tiny import write_pipeline

import engine
from distill.__main__ import main
from distill.attention.heads import HeadOptions, drawn, head_table, largest
from engine.config import LocalHeads, Preset
from engine.presets import find_preset


def masses(*heads: list[list[float]]) -> torch.Tensor:
    """M [prompts, levels, layers, heads, F, F] of one layer, the same for two prompts."""
    return torch.tensor([[[heads]]], dtype=torch.float32).repeat(2, 1, 1, 1, 1, 1)


def test_a_score_is_the_share_on_the_frames_that_a_local_head_keeps() -> None:
    nan = float("nan")
    near = [[1, nan, nan, nan], [0.4, 0.6, nan, nan], [0.1, 0.2, 0.7, nan], [0.4, 0.1, 0.2, 0.3]]
    far = [[1, nan, nan, nan], [0.5, 0.5, nan, nan], [0.8, 0.1, 0.1, nan], [0.2, 0.6, 0.1, 0.1]]
    mass, preset = masses(near, far), Preset("causal", window=4, attn_sink=1)
    # Frames 2 and 3 have seen more than two frames. Rows sum to 1.
    found = HeadOptions(local_window=2, local_sink=0).scores(mass, preset)
    assert torch.allclose(found, torch.tensor([[(0.9 + 0.5) / 2, (0.2 + 0.2) / 2]], dtype=torch.float64))
    # Frame 0 is left out: of the others a head keeps the newest.
    found = HeadOptions(local_window=2, local_sink=1).scores(mass, preset)
    assert torch.allclose(found, torch.tensor([[(0.7 + 0.3) / (0.9 + 0.6), (0.1 + 0.1) / (0.2 + 0.8)]]).double())


def test_a_chunk_is_seen_whole() -> None:
    """Chunks of 2: the query frames 2 and 3 both see frames 0 to 3, and a local head frames 1 to 3 or 2 and 3."""
    rows = [[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]]
    found = HeadOptions(local_window=2, local_sink=0).scores(masses(rows), Preset("causal", chunk=2, window=4))
    assert found.item() == pytest.approx((0.7 + 0.3) / 2)


def test_tables() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.5, 0.7]])
    assert head_table(largest(scores, 2), 3, 1) == LocalHeads(3, 1, ((0,), (1,)))
    assert head_table(largest(-scores, 1), 3, 1) == LocalHeads(3, 1, ((1,), ()))
    tables = [drawn((8, 8), 20, seed) for seed in (0, 0, 1)]
    assert all(int(table.sum()) == 20 for table in tables)
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_pipeline(tmp_path_factory.mktemp("model"))
    settings = json.loads((folder / "engine.json").read_text())
    overrides = {"window": 4, "attn_sink": 1, "steps": [1000, 500]}
    (folder / "engine.json").write_text(
        json.dumps(settings | {"preset": "self-forcing-framewise", "overrides": overrides})
    )
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("data"), 6)


@pytest.mark.slow
def test_the_commands_on_a_model_of_any_size(model: Path, data: Path, tmp_path: Path) -> None:
    words = ["--model", str(model), "--data", str(data), "--prompts", "2", "--frames", "21"]
    words += ["--local-window", "3", "--local-sink", "1"]
    assert main(["heads", *words, "--share", "0.5", "--random", "2", "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    rows = {row["table"]: row for row in report["tables"]}
    assert list(rows) == ["local", "reverse", "random 0", "random 1"]
    assert all(row["heads"] == 2 and row["error"] > 0 for row in rows.values())
    chosen = find_preset("self-forcing-framewise", {
        "window": 4, "attn_sink": 1, "heads": str(tmp_path / "out/heads-0.5.json")
    }).heads  # fmt: skip
    assert chosen is not None
    assert sum(chosen.counts) == 2
    scores = torch.tensor(report["scores"])
    assert head_table(largest(scores, 2), 3, 1) == chosen
    text = (tmp_path / "out/report.md").read_text()
    assert "| 0.5 | 2 of 4 | local |" in text
    assert "(heads-left.png)" in text
    assert (tmp_path / "out/heads-left.png").stat().st_size < 200_000

    table = tmp_path / "heads.json"
    limit = float(scores.flatten().sort().values[1:3].mean())
    words += ["--heads", str(table), "--above", str(limit), "--levels", "0.5", "--out", str(tmp_path / "attention")]
    assert main(["attention", *words]) == 0
    assert json.loads(table.read_text())["layers"] == [list(heads) for heads in chosen.layers]
    narrow = tmp_path / "narrow.toml"
    narrow.write_text(f'base = "self-forcing-framewise"\nwindow = 4\nattn_sink = 1\nheads = "{table}"\n')
    for command in ("heads", "attention"):
        assert main([command, *words[: 2 * 6], "--preset", str(narrow), "--out", str(tmp_path / "none")]) == 2
    pipeline = engine.load(model, overrides={"heads": str(table)})
    with pipeline.stream("a red circle", seed=1, frames=21) as stream:
        assert len(list(stream)) == 21


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "heads: got a student of the greedy family, expected a causal one"),
        (["--preset", "longlive", "--local-window", "12"], "--local-window: got 12 with --local-sink 0, expected at"),
        (["--preset", "longlive", "--local-window", "2"], "--local-window: got 2 with --local-sink 0, expected at"),
        (["--preset", "longlive", "--local-window", "9", "--local-sink", "4"], "a sink of 0 to 3"),
        (["--preset", "longlive", "--local-window", "9"], "--frames: got 33, expected more than --local-window keeps"),
        (["--preset", "self-forcing-framewise", "--share", "0.01"], "--share: got 0.01 of 16 heads, expected at least"),
        (["--share", "1"], "--share: got 1, expected more than 0 and less than 1"),
        (["--random", "0"], "--random: got 0, expected at least 1"),
        (["--prompts", "0"], "--prompts: got 0, expected at least 1"),
        (["--score", "9"], "--score: got 9, expected at most the number of --prompts (8)"),
    ],
)
def test_bad_input(words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if "0.01" in words:
        words = [*words, "--prompts", "1", "--queries", "1"]
    assert main(["heads", *words, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
