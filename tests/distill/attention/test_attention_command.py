"""python -m distill attention: its files, on a model of any size and on the embedded one, and bad input."""

import json
from pathlib import Path

import pytest
import torch
from frames import write_clips
from PIL import Image
from safetensors.torch import load_file
from tiny import write_pipeline

from distill.__main__ import main
from distill.attention.report import markdown


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("data"), 4)


@pytest.mark.slow
def test_a_model_of_any_size(model: Path, data: Path, tmp_path: Path) -> None:
    """Teacher, ETM and SDD on own latents, two of six queries; what is written holds together."""
    words = ["--model", str(model), "--data", str(data), "--prompts", "2", "--frames", "13", "--queries", "2"]
    words += ["--levels", "0.3", "--levels", "0.8", "--replace", "distant", "--replace", "constant"]
    assert main(["attention", *words, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["captions"] == ["a red circle", "a blue square"]
    assert (report["latent_frames"], report["tokens"], report["queries"]) == (4, 6, 2)
    assert list(report["roles"]) == ["teacher", "etm", "sdd"]
    tensors = load_file(tmp_path / "mass.safetensors")
    for role in report["roles"]:
        mean = tensors[f"{role}.mean"]
        assert mean.shape == (2, 2, 4, 4)
        assert torch.allclose(mean.nansum(-1), torch.ones(2, 2, 4), atol=1e-5)
        with Image.open(tmp_path / f"heads-{role}.png") as picture:
            assert picture.width > 100
    diagonal = tensors["teacher.mean"].diagonal(0, -2, -1).mean()
    assert report["roles"]["teacher"]["by_distance"][0] == pytest.approx(float(diagonal), abs=1e-5)
    assert set(report["replacements"]["teacher"]["distant"]["errors"]) == {"0.3", "0.8"}
    assert set(report["replacements"]["student"]) == {"distant", "constant"}
    text = (tmp_path / "report.md").read_text()
    for named in ("distance.png", "errors.png", "heads-sdd.png"):
        assert f"({named})" in text
        assert (tmp_path / named).stat().st_size < 200_000
    assert "**sdd**" in text
    assert "| distant |" in text


@pytest.mark.slow
def test_the_embedded_model_is_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A replacement of nothing makes the same clips, of the same scores; one of everything does not."""
    words = ["--prompts", "1", "--frames", "9", "--levels", "0.5", "--sampling-steps", "1", "--score", "1"]
    words += ["--replace", "steady", "--replace", "constant", "--threshold", "-1"]
    assert main(["attention", *words, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    for name in ("teacher", "student"):
        found, scores = report["replacements"][name], report["scores"][name]
        assert set(found["steady"]["errors"].values()) == {0.0}
        assert set(found["steady"]["entries"].values()) == {0.0}
        assert min(found["constant"]["errors"].values()) > 0.1
        assert scores["steady"] == scores["plain"] | {"difference": 0.0}
        assert scores["constant"]["difference"] > 1
    assert "| plain |" in markdown(report, [])
    assert capsys.readouterr().out.endswith("report.md\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompts", "0"], "--prompts: got 0, expected at least 1"),
        (["--queries", "0"], "--queries: got 0, expected at least 1"),
        (["--levels", "1.5"], "--levels: got 1.5, expected more than 0 and at most 1"),
        (["--frames", "6"], "--frames: got 6, expected whole chunks (5 or 9)"),
        (["--replace", "all"], "--replace"),
        (["--score", "2"], "--score: got no replacement to score, expected --replace"),
        (["--score", "9", "--replace", "steady"], "--score: got 9, expected at most the number of --prompts (8)"),
        (["--score", "1", "--replace", "steady", "--data", "x"], "--score: got --data, expected drawn clips"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--data", "/nowhere"], "latents: got /nowhere without index.json, expected a finished folder"),
        (["--out", "/dev/null/no"], "/dev/null/no"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["attention", *words])
    except SystemExit as ended:  # argparse ends by itself
        status = ended.code
    assert status == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_data_must_fit_the_model(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attention", "--model", str(model)]) == 2
    assert "--data: got none for a model of 16 x 24 pixels, expected captioned latents" in capsys.readouterr().err
    for words in (["--frames", "17", "--prompts", "2"], ["--prompts", "3", "--frames", "13"]):
        assert main(["attention", "--model", str(model), "--data", str(data), *words]) == 2
        assert "--data: got 2 clips of [8, 4, 4, 6], expected at least" in capsys.readouterr().err
    assert main(["attention", "--data", str(data), "--prompts", "2", "--frames", "13"]) == 2
    assert "expected at least 2 of [8, 4, 8, 8]" in capsys.readouterr().err
