"""`python -m distill evaluate --videos`: folders of videos, what is skipped, and one folder against another."""

import json
import sys

import numpy as np
import pytest

from distill.__main__ import main
from distill.experiments.videos import Progress
from engine.media.sinks import open_sink

SIZE = 32, 48
VIDEOS = ("slow.gif", "below/quick.webm", "still.mp4")


def picture(x):
    """A smooth pattern at a place, float to uint8."""
    across, down = np.meshgrid(np.arange(SIZE[1]) - x, np.arange(SIZE[0]))
    waves = np.sin(across / 3) + np.sin(down / 4 + 1) + np.sin((across + down) / 5)
    return np.repeat((128 + 30 * waves).round().astype(np.uint8)[..., None], 3, 2)


def write(path, places):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_sink(path, 8, SIZE) as sink:
        for x in places:
            sink.write(picture(x))
    return path


def fill(folder, jitter=0.0):
    offsets = jitter * np.array([0, 1, -1, 1, 0, -1, 1, 0, 1, -1, 0])
    for name, pace in zip(VIDEOS, (0.3, 1.5, 0.0), strict=True):
        write(folder / name, pace * np.arange(11) + (offsets if pace else 0))
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("videos"))


def refused(capsys, *words):
    """What evaluate says of bad input; its status is 2, and nothing is on stdout."""
    assert main(["evaluate", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("error: ")
    return err


def scored(capsys, *words):
    assert main(["evaluate", "--json", *map(str, words)]) == 0
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    return json.loads(line), err


@pytest.fixture
def flow():
    pytest.importorskip("cv2", reason="needs OpenCV (extra evaluate)")


@pytest.mark.usefixtures("flow")
def test_every_video_has_a_row(videos, capsys, tmp_path):
    report, err = scored(capsys, "--videos", videos, "--out", tmp_path / "new" / "report.json")
    (found,) = report["folders"]
    rows = {row["file"]: row for row in found["clips"]}
    assert set(rows) == set(VIDEOS)
    assert {(row["frames"], row["height"], row["width"]) for row in rows.values()} == {(11, *SIZE)}
    assert [rows[name]["dynamic_degree"] for name in VIDEOS] == [0, 1, 0]
    assert [rows[name]["static"] for name in VIDEOS] == [0, 0, 1]
    for name, value in found["scores"].items():
        if name != "temporal_flickering_static":
            values = [row[name] for row in rows.values()]
            assert value["mean"] == pytest.approx(np.mean(values), abs=1e-4)
            assert value["se"] == pytest.approx(np.std(values, ddof=1) / 3**0.5, abs=1e-4)
    assert found["scores"]["temporal_flickering_static"]["n"] == 1
    assert found["skipped"] == []
    assert err == ""
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == report


@pytest.mark.usefixtures("flow")
def test_what_cannot_be_scored_is_skipped_and_named(videos, capsys, tmp_path):
    write(tmp_path / "whole.mp4", range(5))
    write(tmp_path / "short.mp4", range(2))
    (tmp_path / "bad.mp4").write_text("no video")
    (tmp_path / "empty.webm").touch()
    (tmp_path / "poster.jpg").write_text("pictures are no videos")
    (tmp_path / "notes.txt").touch()
    report, err = scored(capsys, "--videos", tmp_path)
    (found,) = report["folders"]
    assert [row["file"] for row in found["clips"]] == ["whole.mp4"]
    assert [one["file"] for one in found["skipped"]] == ["bad.mp4", "empty.webm", "short.mp4"]
    assert "got 2 frames, expected at least 3" in found["skipped"][2]["why"]
    assert [line.split(":")[:2] for line in err.splitlines()] == [
        ["skipped", f" {one['file']}"] for one in found["skipped"]
    ]
    assert main(["evaluate", "--videos", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "1 clips, 3 skipped" in table
    assert all(f"skipped: {one['file']}" in table for one in found["skipped"])


@pytest.mark.usefixtures("flow")
def test_two_folders_are_compared_clip_by_clip(videos, capsys, tmp_path):
    fill(tmp_path, jitter=0.6)
    write(tmp_path / "alone.mp4", range(5))
    report, _ = scored(capsys, "--videos", videos, "--videos", tmp_path)
    one, two = ({row["file"]: row for row in found["clips"]} for found in report["folders"])
    assert len(two) == 4
    gaps = [two[name]["motion_smoothness"] - one[name]["motion_smoothness"] for name in VIDEOS]
    found = report["difference"]["motion_smoothness"]
    assert found["n"] == 3
    assert found["mean"] == pytest.approx(np.mean(gaps), abs=1e-4)
    assert found["se"] == pytest.approx(np.std(gaps, ddof=1) / 3**0.5, abs=1e-4)
    assert found["mean"] < -0.002
    assert main(["evaluate", "--videos", str(videos), "--videos", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert f"B: {tmp_path}, 4 clips" in table
    assert f"{found['mean']:.4f} +- {found['se']:.4f} (n = 3)" in table


@pytest.mark.usefixtures("flow")
def test_the_worst_clips_are_named(videos, capsys):
    assert main(["evaluate", "--videos", str(videos)]) == 0
    lines = {line.split(":")[0]: line for line in capsys.readouterr().out.splitlines()}
    order = {name: lines[f"A, least {name}"] for name in ("dynamic_degree", "temporal_flickering")}
    assert order["temporal_flickering"].index("quick.webm") < order["temporal_flickering"].index("slow.gif")
    assert order["dynamic_degree"].index("still.mp4") < order["dynamic_degree"].index("slow.gif")


@pytest.mark.usefixtures("flow")
def test_one_video_is_a_folder_of_one(videos, capsys):
    report, _ = scored(capsys, "--videos", videos / "slow.gif")
    assert [row["file"] for row in report["folders"][0]["clips"]] == ["slow.gif"]


@pytest.mark.usefixtures("flow")
@pytest.mark.parametrize(("words", "told"), [
    (["nowhere"], "videos: got {}/nowhere, expected a folder of videos, or a video"),
    (["empty"], "videos: got no video in {}/empty, expected at least one"),
    (["bad"], "videos: got no clip that can be scored in {}/bad, expected at least one (1 skipped, the first: a.mp4"),
    (["bad/a.mp4"], "videos: got no clip that can be scored in {}/bad/a.mp4, expected at least one"),
    (["good", "empty"], "videos: got no video in {}/empty, expected at least one"),
    (["good", "bad"], "videos: got no clip that can be scored in {}/bad"),
    (["good", "good", "good"], "videos: got 3 folders, expected one or two"),
])  # fmt: skip
def test_bad_input_is_one_line(capsys, tmp_path, words, told):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_text("no video")
    write(tmp_path / "good" / "a.mp4", range(3))
    err = refused(capsys, *(word for name in words for word in ("--videos", tmp_path / name)))
    assert f"error: {told.format(tmp_path)}" in err
    assert len([line for line in err.splitlines() if line.startswith("error")]) == 1


@pytest.mark.parametrize(
    "words", [["--teacher"], ["--prompts", "3"], ["--model", "m"], ["--vbench", "i"], ["--thirds"]]
)
def test_options_for_models_are_refused(videos, capsys, words):
    err = refused(capsys, "--videos", videos, *words)
    assert err == f"error: videos: got {words[0]} beside it, expected only --out, --json and --threads\n"


def test_a_folder_as_report_is_refused_before_any_work(videos, capsys, tmp_path):
    assert "got " + str(tmp_path) in refused(capsys, "--videos", videos, "--out", tmp_path)


def test_the_extra_is_named(videos, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    expected = "error: videos: got no package opencv-python-headless, expected pip install 'greedy-stream[evaluate]'\n"
    assert refused(capsys, "--videos", videos) == expected


def test_long_work_says_how_far_it_is(capsys):
    times = iter([0.0, *(6.0 * number for number in range(1, 11))])
    progress = Progress(4, lambda: next(times))
    for done in range(2):
        list(progress.watch(done, f"{done}.mp4", iter([np.zeros(1)] * 5)))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[0] == "evaluate: 0 of 4 videos, frame 1 of 0.mp4, 0.2 min"
    assert lines[-1] == "evaluate: 1 of 4 videos, frame 4 of 1.mp4, 1.0 min, eta 3.0 min"


def test_help_tells_of_videos(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert "--videos" in capsys.readouterr().out
