"""Own videos as training data: diffusers' own latents, every kind of caption and of bad clip, the same files after a
kill, and two steps of training on them."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image

from distill.__main__ import main
from distill.data.shards import Shards, write_index, write_shard
from distill.data.videos import Cut, clips_of
from distill.stages import dataset
from distill.stages.dataset import DatasetOptions, write_dataset
from engine.loader import EMBEDDED
from engine.media.clips import read_clip
from engine.media.sinks import open_sink

ROOT = Path(__file__).parents[3]
CAPTIONS = [f"a {colour} circle moving right slowly on a gray background" for colour in ("red", "blue", "green")]
FRAMES = 9  # per clip: three latent frames


def film(path: Path, frames: int = 17, seed: int = 0, size: tuple[int, int] = (32, 32)) -> Path:
    """A noisy pattern that moves, at 8 frames per second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (size[0] // 4, size[1] // 4, 3), np.uint8)
    picture = coarse.repeat(4, 0).repeat(4, 1)
    with open_sink(path, 8, size) as sink:
        for number in range(frames):
            sink.write(np.ascontiguousarray(np.roll(picture, 2 * number, 1)))
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos in two folders, with text files beside them. Not to be changed."""
    folder = tmp_path_factory.mktemp("videos")
    for number, (name, caption) in enumerate(zip(("a.mp4", "b.webm", "more/c.gif"), CAPTIONS, strict=True)):
        film(folder / name, seed=number)
        (folder / name).with_suffix(".txt").write_text(caption + "\n")
    return folder


def options(videos: Path, out: Path, **changes: object) -> DatasetOptions:
    given = {"videos": videos, "model": EMBEDDED, "out": out, "frames": FRAMES, "clips": 0, "shard": 2, **changes}
    return DatasetOptions(**given)  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def command(videos: Path, out: Path, *more: str) -> list[str]:
    return ["dataset", "--videos", str(videos), "--model", str(EMBEDDED), "--out", str(out), "--frames", "9", *more]


@pytest.mark.parametrize("size", [(32, 32), (48, 96)], ids=["as they are", "cropped"])
@pytest.mark.parametrize("model", ["embedded", "tiny"])
def test_latents_are_those_of_diffusers(model: str, size: tuple[int, int], tmp_path: Path, model_dir: Path) -> None:
    """The mean of the posterior, normalised, to the rounding of float16."""
    folder = EMBEDDED if model == "embedded" else model_dir
    path = film(tmp_path / "videos" / "a.mp4", 13, size=size)
    path.with_suffix(".txt").write_text("a red circle")
    write_dataset(options(path.parent, tmp_path / "out", model=folder, frames=13))
    latents, captions = Shards(tmp_path / "out").read([0])
    assert captions == ["a red circle"]

    settings = json.loads((folder / "engine.json").read_text())
    clip = torch.from_numpy(read_clip(path, settings["height"], settings["width"], settings["fps"], 13))
    vae = AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        encoded = vae.encode(clip.permute(3, 0, 1, 2)[None].float() / 127.5 - 1).latent_dist.mode()
    expected = (encoded - mean) / std
    assert latents.shape == expected.shape
    assert (latents - expected).abs().max() <= 1e-5 + expected.abs().max() * 2**-11


@pytest.mark.parametrize(
    ("stride", "most", "begins"), [(9, 1, [0]), (9, 0, [0, 9, 18]), (4, 3, [0, 4, 8]), (12, 0, [0, 12])]
)
def test_clips_begin_at_every_stride(stride: int, most: int, begins: list[int], tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", 30)
    whole = read_clip(path, 32, 32, 8, 30)
    clips = list(clips_of(path, Cut(9, 32, 32, 8, stride, most, crop=True)))
    assert np.array_equal(np.stack(clips), np.stack([whole[begin : begin + 9] for begin in begins]))


def test_decoding_ends_with_the_last_wanted_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def endless(*_: object, **__: object):
        while True:
            seen.append(len(seen))
            yield np.full((4, 4, 3), len(seen), np.uint8)

    monkeypatch.setattr("distill.data.videos.frames_at", endless)
    clips = list(clips_of(tmp_path, Cut(9, 4, 4, 8, 5, 2, crop=True)))
    assert [clip[0, 0, 0, 0] for clip in clips] == [1, 6]
    assert len(seen) == 14


def test_frame_rate_is_the_model_s_or_the_given_one(tmp_path: Path) -> None:
    path = film(tmp_path / "v" / "a.mp4", 18)
    path.with_suffix(".txt").write_text(CAPTIONS[0])
    write_dataset(options(path.parent, tmp_path / "own"))
    write_dataset(options(path.parent, tmp_path / "half", fps=4.0))
    assert [len(Shards(tmp_path / name)) for name in ("own", "half")] == [2, 1]


def jsonl(path: Path, rows: list[tuple[str, str]], keys: tuple[str, str]) -> None:
    lines = [json.dumps(dict(zip(keys, row, strict=True)) | {"seconds": 2}) for row in rows]
    path.write_text("\n".join([*lines, "", ""]))


def table(path: Path, rows: list[tuple[str, str]], keys: tuple[str, str]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets write it
        csv.writer(file).writerows([(*keys, "note"), *((*row, "x") for row in rows)])


@pytest.mark.parametrize("write", [jsonl, table])
@pytest.mark.parametrize("keys", [("file", "caption"), ("video", "text"), ("path", "prompt")])
def test_captions_of_one_file(write: Callable, keys: tuple[str, str], videos: Path, tmp_path: Path) -> None:
    """In the file's order, with commas, quotes and line breaks."""
    rows = [("./more/c.gif", 'a "red"\ncircle, moving'), ("a.mp4", "blue é"), ("b.webm", "x")]
    captions = tmp_path / f"captions.{'jsonl' if write is jsonl else 'csv'}"
    write(captions, rows, keys)
    write_dataset(options(videos, tmp_path / "out", captions=captions, clips=1))
    assert Shards(tmp_path / "out").captions([0, 1, 2]) == [caption for _, caption in rows]


def test_captions_beside_the_videos(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dataset, "_PAUSE", 0.0)
    write_dataset(options(videos, tmp_path, clips=1))
    assert Shards(tmp_path).captions([0, 1, 2]) == CAPTIONS
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "dataset: 0 of 3 videos, 1 clips, 0 skipped, 0.0 min"  # no video is done yet
    assert "dataset: 1 of 3 videos, 1 clips, 0 skipped, 0.0 min, eta 0.0 min" in lines


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.jsonl", '{"file": "a.mp4", "caption": "x"}\nnot json\n', r"a\.jsonl:2: got no JSON, expected an object"),
        ("a.jsonl", '["a.mp4", "x"]\n', r"a\.jsonl:1: got list, expected an object per line"),
        (
            "a.jsonl",
            '{"file": "a.mp4", "caption": 3}\n',
            r"a\.jsonl:1: got file, caption, expected texts under file/vid",
        ),
        ("a.jsonl", '{"name": "a.mp4", "caption": "x"}\n', r"a\.jsonl:1: got name, caption, expected texts"),
        ("a.csv", "file;caption\na.mp4;x\n", r"a\.csv:2: got file;caption, expected texts"),
        ("a.csv", 'file,caption\na.mp4,"x\n', r"a\.csv:2: got no CSV, expected one row per video"),
        ("a.csv", b"file,caption\na.mp4,\xff\n", r"a\.csv: got a byte at 19 that is no UTF-8"),
        ("a.tsv", "file\tcaption\n", r"got .*a\.tsv, expected a file in \.jsonl or \.csv"),
        ("b.jsonl", None, r"captions: got no file .*b\.jsonl, expected one"),
    ],
)
def test_a_bad_caption_file_is_one_line(
    name: str, text: str | bytes | None, expected: str, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = tmp_path / name
    if text is not None:
        captions.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(command(videos, tmp_path / "out", "--captions", str(captions))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(expected, line)
    assert not (tmp_path / "out").exists()


def spoil(folder: Path) -> dict[str, str]:
    """One bad video of every kind; what is said of each."""
    for name in ("cut.mp4", "cut.mkv", "cut.gif", "empty_caption.mp4", "blank_caption.mp4", "no_caption.mp4",
                 "caption_in_latin1.mp4", "caption_with_nul.mp4"):  # fmt: skip
        film(folder / name)
        (folder / name).with_suffix(".txt").write_text(CAPTIONS[0])
    for name in ("cut.mp4", "cut.mkv", "cut.gif"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    (folder / "empty_caption.txt").write_text("")
    (folder / "blank_caption.txt").write_text(" \n\u200b\n")
    (folder / "no_caption.txt").unlink()
    (folder / "caption_in_latin1.txt").write_bytes("un cercle \xe9toil\xe9".encode("latin-1"))
    (folder / "caption_with_nul.txt").write_text("a\0b")
    film(folder / "short.webm", 8)
    (folder / "no_video.mp4").write_text("it says so itself")
    (folder / "nothing.mov").write_bytes(b"")
    Image.new("RGB", (32, 32)).save(folder / "still.png")
    for name in ("short", "no_video", "nothing", "still"):
        (folder / f"{name}.txt").write_text(CAPTIONS[0])
    return {
        "cut.mp4": "cut off, expected a whole file",
        "cut.mkv": "expected a whole file",
        "cut.gif": "expected",
        "empty_caption.mp4": "caption: got an empty text, expected words",
        "blank_caption.mp4": "caption: got ",
        "no_caption.mp4": "caption: got no no_caption.txt, expected it beside the video",
        "caption_in_latin1.mp4": "no UTF-8",
        "caption_with_nul.mp4": "got a NUL character",
        "short.webm": "8 frames at 8 fps, expected at least 9",
        "no_video.mp4": "expected",
        "nothing.mov": "got nothing.mov, an empty file",
        "still.png": "1 frame at 8 fps, expected at least 9",
    }


def test_every_kind_of_bad_video_is_skipped_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    film(videos / "good.mp4").with_suffix(".txt").write_text(CAPTIONS[1])
    expected = spoil(videos)
    assert main(command(videos, out)) == 0
    said = capsys.readouterr()
    lines = [line.removeprefix("skipped: ") for line in said.err.splitlines()]
    rows = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert lines == [f"{row['file']}: {row['why']}" for row in rows]
    assert {row["file"] for row in rows} == expected.keys()
    for row in rows:
        assert expected[row["file"]] in row["why"]
    assert Shards(out).captions(range(len(Shards(out)))) == [CAPTIONS[1]]
    report = json.loads((out / "report.json").read_text())
    assert (report["clips"], report["skipped"]) == (1, len(expected))
    assert said.out.splitlines()[-1] == f"dataset: clips 1, skipped videos {len(expected)}, captions cut 0: {out}"

    for name in ("cut.mp4", "no_caption.mp4", "short.webm"):  # each alone, beside the good one
        some = tmp_path / name
        some.mkdir()
        for path in (*videos.glob("good.*"), *videos.glob(f"{name.split('.')[0]}.*")):
            if path.suffix in (".txt", Path(name).suffix) or path.stem == "good":
                os.link(path, some / path.name)
        assert main(command(some, tmp_path / "strict" / name, "--strict")) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {name}: ")
        assert line.endswith("(--strict)")


def test_listed_files_that_cannot_serve(videos: Path, tmp_path: Path) -> None:
    captions = tmp_path / "c.jsonl"
    jsonl(captions, [("a.mp4", "x"), ("gone.mp4", "x"), ("a.mp4", "y"), ("more", "x")], ("file", "caption"))
    write_dataset(options(videos, tmp_path / "out", captions=captions, clips=1))
    rows = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["gone.mp4", "a.mp4", "more", "b.webm", "more/c.gif"]
    assert "second caption" in rows[1]["why"]
    assert "got none in c.jsonl" in rows[3]["why"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--frames", "32"], "frames: got 32, expected 4k + 1, such as 29 or 33"),
        (["--height", "30"], "height: got 30, expected a positive multiple of 4"),
        (["--width", "0"], "width: got 0, expected a positive multiple of 4"),
        (["--fps", "0"], "fps: got 0.0, expected a positive number"),
        (["--stride", "0"], "stride: got 0, expected at least 1"),
        (["--videos", "/no/such"], "videos: got /no/such, expected a folder of videos"),
        (["--model", "/no/such"], "/no/such"),
    ],
)
def test_bad_options_are_one_line(
    words: list[str], expected: str, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(videos, tmp_path / "out"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert expected in line


def test_no_usable_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film(tmp_path / "v" / "a.mp4", 4).with_suffix(".txt").write_text("x")
    assert main(command(tmp_path / "v", tmp_path / "out")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "got no usable clip in" in last
    assert "1 videos skipped, the first: a.mp4: video: got a.mp4, 4 frames at 8 fps" in last


def test_a_caption_that_is_cut_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded model reads 16 tokens; the engine's own note says where the rest begins."""
    film(tmp_path / "v" / "a.mp4").with_suffix(".txt").write_text("red " * 40)
    assert main(command(tmp_path / "v", tmp_path / "out")) == 0
    said = capsys.readouterr()
    assert said.err.startswith("a.mp4: the prompt has 4")
    assert "is ignored" in said.err
    assert "captions cut 1" in said.out


def test_a_stopped_run_goes_on_to_the_same_files(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After whole shards, in the middle of one, and with one shard gone."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    write_dataset(options(videos, whole, stride=4))  # three clips per video: shards begin inside of videos
    expected = files(whole)
    assert len(Shards(whole)) == 9

    write_dataset(options(videos, out, stride=4), stop_at=2)
    assert not (out / "index.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "write_shard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_dataset(options(videos, out, stride=4))
    write_dataset(options(videos, out, stride=4))
    assert files(out) == expected

    (out / "00002.safetensors").unlink()
    encoded = []
    encode = dataset.Encoder.encode
    monkeypatch.setattr(dataset.Encoder, "encode", lambda self, clip: encoded.append(1) or encode(self, clip))
    write_dataset(options(videos, out, stride=4))
    assert files(out) == expected
    assert len(encoded) == 2


@pytest.mark.thorough
def test_a_killed_run_goes_on_to_the_same_files(videos: Path, tmp_path: Path) -> None:
    words = ["--clips", "0", "--stride", "1", "--shard", "3"]
    assert main(command(videos, tmp_path / "whole", *words)) == 0
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-m", "distill", *command(videos, out, *words)], cwd=ROOT)
    end = time.monotonic() + 60
    while not (out / "00001.safetensors").exists() and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / "00001.safetensors").exists()
    assert main(command(videos, out, *words)) == 0
    assert files(out) == files(tmp_path / "whole")


def test_what_changed_is_refused(videos: Path, tmp_path: Path) -> None:
    """Settings, videos and captions of shards that are there; and another stage's shards."""
    folder, out = tmp_path / "videos", tmp_path / "out"
    for number, name in enumerate("ab"):
        film(folder / f"{name}.mp4", seed=number).with_suffix(".txt").write_text(CAPTIONS[number])
    write_dataset(options(folder, out, clips=1, shard=1))
    before = files(out)
    for change in ({"fps": 4.0}, {"stride": 3}, {"resize": "stretch"}, {"precision": "bf16"}, {"height": 40}):
        (name,) = change
        with pytest.raises(ValueError, match=f"00000.safetensors: got a shard made with {name} .*take another --out"):
            write_dataset(options(folder, out, **({"clips": 1, "shard": 1} | change)))
    (folder / "b.txt").write_text("another caption")
    with pytest.raises(ValueError, match=r"00001\.safetensors: got a shard made from other videos or captions"):
        write_dataset(options(folder, out, clips=1, shard=1))
    (folder / "b.txt").write_text(CAPTIONS[1])
    film(folder / "a.mp4", seed=7)
    with pytest.raises(ValueError, match=r"00000\.safetensors: got a shard made from other videos or captions"):
        write_dataset(options(folder, out, clips=1, shard=1))
    assert files(out) == before

    write_shard(tmp_path / "bank", 0, torch.zeros(1, 8, 3, 8, 8), ["x"])
    write_index(tmp_path / "bank", 1, {})
    before = files(tmp_path / "bank")
    with pytest.raises(ValueError, match=r"got a shard without 00000\.json, expected an empty --out"):
        write_dataset(options(videos, tmp_path / "bank"))
    assert files(tmp_path / "bank") == before


def test_videos_that_follow_may_be_added(videos: Path, tmp_path: Path) -> None:
    """Full shards stay; a part-filled one is made anew."""
    folder = tmp_path / "videos"
    for number, name in enumerate("abc"):
        film(folder / f"{name}.mp4", seed=number).with_suffix(".txt").write_text(CAPTIONS[number])
    write_dataset(options(folder, tmp_path / "out", clips=1))
    kept = (tmp_path / "out" / "00000.safetensors").stat().st_mtime_ns
    film(folder / "d.mp4", seed=5).with_suffix(".txt").write_text("a fourth")
    write_dataset(options(folder, tmp_path / "out", clips=1))
    write_dataset(options(folder, tmp_path / "fresh", clips=1))
    assert (tmp_path / "out" / "00000.safetensors").stat().st_mtime_ns == kept
    assert files(tmp_path / "out") == files(tmp_path / "fresh")
    assert len(Shards(tmp_path / "out")) == 4


@pytest.mark.slow
def test_two_steps_of_training(videos: Path, tmp_path: Path) -> None:
    data = tmp_path / "own"
    assert main(command(videos, data)) == 0
    shared = ["--set", f"data={data}", "--set", "steps=2", "--set", "batch=2", "--set", "frames=3"]
    words = ["next_chunk", "--set", f"teacher={EMBEDDED}", "--set", "first_batch=2", "--set", "rank=4", *shared]
    assert main([*words, "--out", str(tmp_path / "student")]) == 0
    words = ["dmd", "--set", f"student={tmp_path / 'student' / 'student.pt'}", "--set", "critic_warmup=0", *shared]
    assert main([*words, "--set", "critic_every=2", "--out", str(tmp_path / "dmd")]) == 0
    for stage, part in (("student", "later"), ("dmd", "dmd")):
        steps = [json.loads(line) for line in (tmp_path / stage / "losses.jsonl").read_text().splitlines()]
        assert [step["step"] for step in steps] == [1, 2]
        assert all(np.isfinite(list(step.values())).all() for step in steps)
        assert part in steps[-1]
