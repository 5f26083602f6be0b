"""Without PyAV, whose wheels bring FFmpeg with libraries under the GPL, pictures and plain video still come out."""

import sys

import pytest

from engine.run import main

WORDS = ["--prompt", "a red circle moving right", "--frames", "9", "--quiet"]


@pytest.fixture(autouse=True)
def no_av(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "av"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "av", None)


@pytest.mark.parametrize("output", ["film.y4m", "film.rgb", "film.gif", "film.webp", "frames/%03d.png"])
def test_these_need_no_av(model_dir, tmp_path, output):
    (tmp_path / output).parent.mkdir(exist_ok=True)
    assert main(["--model", str(model_dir), *WORDS, "--out", str(tmp_path / output)]) == 0
    assert any(file.stat().st_size > 1000 for file in tmp_path.rglob("*") if file.is_file())


def test_a_picture_to_begin_with_needs_no_av(model_dir, tmp_path):
    from PIL import Image

    Image.new("RGB", (24, 16), "red").save(tmp_path / "start.png")
    words = [*WORDS, "--image", str(tmp_path / "start.png"), "--out", str(tmp_path / "film.y4m")]
    assert main(["--model", str(model_dir), *words]) == 0


@pytest.mark.parametrize("output", ["film.mp4", "film.webm"])
def test_these_say_that_they_need_it(model_dir, tmp_path, capfd, output):
    assert main(["--model", str(model_dir), *WORDS, "--out", str(tmp_path / output)]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert "got no package av, expected it installed (pip install av); .y4m and .rgb need no package" in line
    assert not list(tmp_path.iterdir())
