"""greedy-host: outputs, prompts and errors, over the bundle of formulas."""

import hashlib
import os
import subprocess
from pathlib import Path

import fake_stages
import numpy as np
import pytest
from csrc_tools import HANG

from engine.media.sinks import open_sink

SIZE = (fake_stages.HEIGHT, fake_stages.WIDTH)


@pytest.fixture
def host(native_build, tmp_path):
    """Runs greedy-host in an empty directory, with a directory of programs that comes first in PATH."""

    def run(*words: str, programs: Path = tmp_path) -> subprocess.CompletedProcess[bytes]:
        env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
        plugins = native_build / "fake_plugin"
        fixed = [fake_stages.RECORDED, "--plugin-dir", plugins, "--quiet", "--prompt", "a red circle"]
        given = [native_build / "greedy-host", *fixed, *words]
        return subprocess.run(given, cwd=tmp_path, env=env, capture_output=True, timeout=HANG)

    return run


def frames_of(host, count: int) -> np.ndarray:
    ran = host("--frames", str(count), "--format", "rgb")
    assert ran.returncode == 0, ran.stderr
    return np.frombuffer(ran.stdout, np.uint8).reshape(count, *SIZE, 3)


def test_y4m_is_pythons(host, tmp_path):
    frames = frames_of(host, 9)
    with open_sink(tmp_path / "python.y4m", 8.0, SIZE) as sink:
        for frame in frames:
            sink.write(frame)
    assert host("--frames", "9", "--out", "host.y4m").returncode == 0
    mine, theirs = ((tmp_path / f"{name}.y4m").read_bytes() for name in ("host", "python"))
    assert len(mine) == len(theirs)
    assert mine.split(b"\n")[0] == theirs.split(b"\n")[0]
    apart = np.frombuffer(mine, np.uint8).astype(int) - np.frombuffer(theirs, np.uint8)
    assert np.abs(apart).max() <= 1
    assert (tmp_path / "host.y4m").exists()
    assert not list(tmp_path.glob(".*.part"))


def test_checksum_is_that_of_the_frames(host):
    ran = host("--frames", "9", "--out", "checksum")
    assert ran.stdout.decode().strip() == hashlib.sha256(frames_of(host, 9).tobytes()).hexdigest()


def test_a_prompt_switch_counts_from_the_next_chunk_on(host):
    plain = frames_of(host, 17)
    ran = host("--frames", "17", "--format", "rgb", "--prompt-at", "7", "teal")
    switched = np.frombuffer(ran.stdout, np.uint8).reshape(plain.shape)
    assert np.array_equal(plain[:9], switched[:9])  # frames 5 to 8 are one chunk
    assert not np.array_equal(plain[9:13], switched[9:13])


def rgb(ran) -> bytes:
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_of_two_prompts_at_one_frame_the_last_one_given_wins(host):
    usual = ["--frames", "17", "--format", "rgb"]
    teal, yellow = (rgb(host(*usual, "--prompt-at", "9", word)) for word in ("teal", "yellow"))
    assert teal != yellow
    assert rgb(host(*usual, "--prompt-at", "9", "teal", "--prompt-at", "9", "yellow")) == yellow
    assert rgb(host(*usual, "--prompt-at", "9", "yellow", "--prompt-at", "9", "teal")) == teal
    in_turn = rgb(host(*usual, "--prompt-at", "5", "teal", "--prompt-at", "13", "yellow"))
    assert rgb(host(*usual, "--prompt-at", "13", "yellow", "--prompt-at", "5", "teal")) == in_turn
    assert rgb(host(*usual, "--prompt-at", "0", "teal")) == rgb(host(*usual, "--prompt", "teal"))


@pytest.mark.parametrize(
    "words",
    [
        ["--prompt", ""],
        ["--prompt", "\u200b"],
        ["--prompt", "&nbsp;\x01"],
        ["--prompt", b"r\xe9d"],
        ["--prompt-at", "5", " "],
        ["--prompt-at", "5", "\u3164"],
        ["--prompt-at", "5", b"r\xe9d"],
        ["--prompt-at", "5", "&amp;" * 5000],
        ["--prompt-at", "9", "teal"],
        ["--prompt-at", "99", "teal"],
    ],
)
def test_prompts_are_checked_before_the_first_frame(host, tmp_path, words):
    ran = host("--frames", "9", "--out", "clip.y4m", *words)
    assert ran.returncode == 2, ran.stderr
    assert b"prompt" in ran.stderr
    assert b"expected" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_notes_about_prompts(native_build):
    long = "teal " * 40
    command = [native_build / "greedy-host", fake_stages.RECORDED, "--plugin-dir", native_build / "fake_plugin"]
    words = ["--out", "null", "--frames", "9", "--prompt", "red", "--prompt-at", "3", "blue", "--prompt-at", "4", long,
             "--prompt-at", "7", "teal"]  # fmt: skip
    ran = subprocess.run([*command, *words], capture_output=True, text=True, timeout=HANG)
    assert ran.returncode == 0, ran.stderr
    assert [line for line in ran.stderr.splitlines() if line.startswith("note: ")] == [
        "note: the prompt has 41 tokens, the model reads 16: the rest is ignored",
        "note: the prompt at frame 3 has no effect: another one replaces it before a chunk begins",
        "note: the prompt at frame 7 has no effect: the last chunk began before it",
    ]


def test_ffmpeg_gets_the_frames(host, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ffmpeg").write_text('#!/bin/sh\nfor last; do :; done\necho "$@" > arguments\ncat > "$last"\n')
    (programs / "ffmpeg").chmod(0o755)
    ran = host("--frames", "9", "--out", "video.mp4", programs=programs)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "video.mp4").read_bytes() == frames_of(host, 9).tobytes()
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[arguments.index("-s") + 1] == "16x8"
    assert arguments[arguments.index("-r") + 1] == "8/1"


@pytest.mark.parametrize("script", ["exit 3", "cat > /dev/null; exit 1", None])
def test_an_ffmpeg_that_fails_is_said(host, tmp_path, script):
    programs = tmp_path / "bin"
    programs.mkdir()
    if script:
        (programs / "ffmpeg").write_text(f"#!/bin/sh\n{script}\n")
        (programs / "ffmpeg").chmod(0o755)
    elif any((Path(place) / "ffmpeg").exists() for place in os.environ["PATH"].split(":")):
        pytest.skip("an ffmpeg is installed")
    ran = host("--frames", "200", "--out", "video.mp4", programs=programs)
    assert ran.returncode == 1
    assert b"ffmpeg: got" in ran.stderr
    assert not (tmp_path / "video.mp4").exists()
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--frames", "0"], "--frames: got 0"),
        (["--frames", "x"], "--frames: got 'x'"),
        (["--frames"], "--frames: got nothing"),
        (["--wrong"], "got --wrong"),
        (["--out", "video.avi"], "output: got video.avi"),
        (["--out", "nowhere/video.y4m"], "expected an existing directory"),
        (["--out", "null", "--format", "rgb"], "expected it only for -"),
        (["--image", "nothing.ppm"], "--image: got nothing.ppm"),
        (["--backend", "tensorrt"], "no backend tensorrt"),
    ],
)
def test_bad_input_is_one_line(host, words, said):
    ran = host("--frames", "1", *words)
    assert ran.returncode in (1, 2)
    assert ran.stderr.decode().startswith("error: ")
    assert said in ran.stderr.decode()
    assert ran.stderr.count(b"\n") == 1


def test_a_picture_comes_first(host, tmp_path):
    picture = np.full((*SIZE, 3), 90, np.uint8)
    (tmp_path / "picture.ppm").write_bytes(b"P6\n16 8\n255\n" + picture.tobytes())
    ran = host("--frames", "5", "--format", "rgb", "--image", "picture.ppm")
    assert ran.returncode == 0, ran.stderr
    assert not np.array_equal(np.frombuffer(ran.stdout, np.uint8).reshape(5, *SIZE, 3), frames_of(host, 5))


def test_a_reader_that_leaves_ends_the_stream(native_build):
    words = f"{native_build}/greedy-host {fake_stages.RECORDED} --plugin-dir {native_build}/fake_plugin --prompt a"
    script = f"{words} --quiet --frames 20000 | head -c 1000 | wc -c; echo ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=HANG)
    assert ran.stdout.split() == ["1000", "0"]
    assert not ran.stderr
