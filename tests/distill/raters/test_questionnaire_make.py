"""The page and the key of a study: nothing that raters get tells a model, and bad input is one line."""

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import pytest
from studies import MODELS, PROMPTS, make_study, write_video

from distill.__main__ import main
from distill.raters.items import GROUPS, ITEMS
from distill.raters.study import KEY, read_key


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture
def videos(study: Path, tmp_path: Path) -> Path:
    """A copy of the videos, to be spoiled."""
    return Path(shutil.copytree(study.parent / "videos", tmp_path / "videos"))


def pictures(path: Path) -> list[tuple[Any, bytes]]:
    with av.open(str(path)) as container:
        return [(frame.time, frame.to_ndarray(format="rgb24").tobytes()) for frame in container.decode(video=0)]


def make(*words: object) -> int:
    return main(["questionnaire", "make", *map(str, words)])


def test_the_questionnaire_is_the_papers() -> None:
    assert [len(group.items) for group in GROUPS] == [6, 5, 4]
    assert len({item.name for item in ITEMS}) == 15


def test_nothing_that_raters_get_tells_the_model(study: Path) -> None:
    files = [path for path in (study / "page").rglob("*") if path.is_file()]
    assert len(files) == len(MODELS) * len(PROMPTS) + 5
    assert KEY not in {path.name for path in files}
    for path in files:
        content = path.name.encode() + path.read_bytes()
        assert not [model for model in MODELS if model.encode() in content], path
    # The videos told it before, and times of files would tell the order of the models.
    assert MODELS[0].encode() in (study.parent / "videos" / MODELS[0] / "01.mp4").read_bytes()
    assert len({os.stat(path).st_mtime for path in files if path.suffix == ".mp4"}) == 1


def test_the_key_names_every_video(study: Path) -> None:
    key = read_key(study)
    assert [prompt.prompt for prompt in key.prompts] == list(PROMPTS)
    assert [prompt.seconds for prompt in key.prompts] == [1, 2, 3]
    assert set(key.models) == set(MODELS)
    for number, prompt in enumerate(key.prompts, 1):
        for blinded, model in prompt.videos.items():
            given = study.parent / "videos" / model / f"{number:02}.mp4"
            assert pictures(study / "page" / "videos" / f"{blinded}.mp4") == pictures(given)


def test_names_are_new_in_every_study_and_do_not_keep_the_models_order(videos: Path, tmp_path: Path) -> None:
    orders, names = set(), set[str]()
    for number in range(4):
        make("--videos", videos, "--out", tmp_path / str(number))
        key = read_key(tmp_path / str(number))
        text = (tmp_path / str(number) / "page" / "study.js").read_text()
        shown = json.loads(text.removeprefix("const STUDY = ").removesuffix(";\n"))
        assert all(a < b for row in shown["prompts"] for a, b in pairwise(row["videos"]))
        orders |= {key.prompts[i].videos[row["videos"][0]] for i, row in enumerate(shown["prompts"])}
        found = {name for prompt in key.prompts for name in prompt.videos}
        assert not names & found
        names |= found
    assert orders == set(MODELS)


def manifest(folder: Path, **changes: Any) -> Path:
    """A manifest of `write_videos`; changes replace models."""
    models = {
        model: [{"prompt": prompt, "file": f"videos/{model}/{n:02}.mp4"} for n, prompt in enumerate(PROMPTS, 1)]
        for model in MODELS
    }
    path = folder / "manifest.json"
    path.write_text(json.dumps({"models": models | changes}))
    return path


@pytest.mark.usefixtures("videos")
def test_a_manifest_names_the_same(tmp_path: Path) -> None:
    turned = [
        {"prompt": prompt, "file": f"videos/{MODELS[1]}/{n:02}.mp4", "seconds": 5.0 * n}
        for n, prompt in enumerate(PROMPTS, 1)
    ][::-1]
    assert make("--manifest", manifest(tmp_path, **{MODELS[1]: turned}), "--out", tmp_path / "s") == 0
    key = read_key(tmp_path / "s")
    assert [(prompt.prompt, prompt.length) for prompt in key.prompts] == list(
        zip(PROMPTS, ("0-5 s", "5-10 s", "over 10 s"), strict=True)
    )
    assert [sorted(prompt.videos.values()) for prompt in key.prompts] == [sorted(MODELS)] * 3


@pytest.mark.usefixtures("videos")
def test_prompts_of_one_text_have_names(tmp_path: Path) -> None:
    rows = {
        model: [{"prompt": "a cat", "file": f"videos/{model}/{n:02}.mp4", "name": f"cat {n}"} for n in (1, 2)]
        for model in MODELS
    }
    assert make("--manifest", manifest(tmp_path, **rows), "--out", tmp_path / "s") == 0
    assert [prompt.name for prompt in read_key(tmp_path / "s").prompts] == ["cat 1", "cat 2"]


def test_one_file_holds_all_captions(videos: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"file": f"{n:02}.mp4", "caption": f"prompt {n}"}) for n in (3, 1, 2)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    captions = ("--captions", tmp_path / "captions.jsonl")
    assert make("--videos", videos, *captions, "--out", tmp_path / "s") == 0
    assert [prompt.prompt for prompt in read_key(tmp_path / "s").prompts] == ["prompt 3", "prompt 1", "prompt 2"]


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libsvtav1"])
def test_other_codecs_that_browsers_play(tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVT_LOG", "1")
    for model in MODELS:
        path = tmp_path / "videos" / model / "1.webm"
        try:
            write_video(path, codec=codec)
        except av.codec.codec.UnknownCodecError:
            pytest.skip(f"PyAV has no {codec}")
        path.with_suffix(".txt").write_text("a prompt")
    assert make("--videos", tmp_path / "videos", "--out", tmp_path / "s") == 0
    for blinded, model in read_key(tmp_path / "s").prompts[0].videos.items():
        made = pictures(tmp_path / "s" / "page" / "videos" / f"{blinded}.mp4")
        assert [frame for _, frame in made] == [frame for _, frame in pictures(tmp_path / "videos" / model / "1.webm")]


def lose(folder: Path) -> None:
    (folder / MODELS[0] / "02.mp4").unlink()


def other_prompt(folder: Path) -> None:
    (folder / MODELS[0] / "02.txt").write_text("another prompt")


def no_prompt(folder: Path) -> None:
    (folder / MODELS[1] / "02.txt").unlink()


def cut_off(folder: Path) -> None:
    path = folder / MODELS[1] / "02.mp4"
    path.write_bytes(path.read_bytes()[:200])


def old_codec(folder: Path) -> None:
    write_video(folder / MODELS[1] / "02.mp4", codec="mpeg4")


def one_model(folder: Path) -> None:
    (folder / MODELS[0]).rename(folder / f".{MODELS[0]}")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose, f"{MODELS[0]}: got no video '02', expected it as of {MODELS[1]}"),
        (other_prompt, "'02': got 'another prompt' for zebra-model, expected the prompt of yak-model, 'a blue square'"),
        (no_prompt, f"{MODELS[1]}/02.mp4: caption: got no 02.txt, expected it beside the video"),
        (cut_off, "02.mp4, expected a video that can be read"),
        (old_codec, "with mpeg4, expected one of h264, vp9, av1"),
        (one_model, "got 1 models, expected 2 to 9"),
    ],
)
def test_bad_videos_are_one_line_and_leave_nothing(
    spoil: Any, message: str, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(videos)
    assert make("--videos", videos, "--out", tmp_path / "s") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["videos"]


@pytest.mark.usefixtures("videos")
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "file": "a.mp4"}, {"prompt": "a", "file": "b.mp4"}], "got 'a' twice"),
        ([{"prompt": "a"}], f"{MODELS[0]}: video 1: got no file"),
        ([{"prompt": "a", "file": "a.mp4", "model": "b"}], "got unknown key model"),
        ([{"prompt": " ", "file": "a.mp4"}], "video 1: prompt: got an empty text"),
        ([{"prompt": "a", "file": "a.mp4", "seconds": 0}], "seconds: got 0"),
        (["a.mp4"], "video 1: got str, expected an object"),
        ([{"prompt": prompt, "file": "none.mp4"} for prompt in PROMPTS], "none.mp4, expected one"),
        ("videos", "got no object `models`"),
    ],
)
def test_bad_manifests_are_one_line(
    rows: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make("--manifest", manifest(tmp_path, **{MODELS[0]: rows}), "--out", tmp_path / "s") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "s").exists()


def test_bad_words_are_one_line(tmp_path: Path, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in study.rglob("*"))
    for words, message in (
        ((), "videos: got neither, expected --videos, or --manifest alone"),
        (("--manifest", tmp_path / "none.json"), "expected one"),
        (("--manifest", manifest(tmp_path), "--captions", "c.csv"), "got --captions with --manifest"),
        (("--videos", tmp_path / "none"), "expected a folder with one sub-folder per model"),
        (("--videos", study.parent / "videos", "--out", study), "which is there already, expected a new folder"),
    ):
        assert make("--out", tmp_path / "s", *words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert sorted(path.name for path in study.rglob("*")) == before
    assert sorted(read_key(study).models) == sorted(MODELS)
