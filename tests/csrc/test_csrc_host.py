"""greedy-host: outputs, prompts and errors, over the bundle of formulas."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import av
import fake_stages
import numpy as np
import pytest
from csrc_tools import HANG

from engine.files import left_over
from engine.media.sinks import open_sink

SIZE = (fake_stages.HEIGHT, fake_stages.WIDTH)


@pytest.fixture
def host(native_build, tmp_path):
    """Runs greedy-host in an empty directory, with a directory of programs that comes first in PATH."""

    def run(*words: str, programs: Path = tmp_path, **options) -> subprocess.CompletedProcess[bytes]:
        env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
        plugins = native_build / "fake_plugin"
        fixed = [fake_stages.RECORDED, "--plugin-dir", plugins, "--quiet", "--prompt", "a red circle"]
        given = [native_build / "greedy-host", *fixed, *words]
        return subprocess.run(given, cwd=tmp_path, env=env, capture_output=True, timeout=HANG, **options)

    return run


@pytest.fixture
def start(native_build, tmp_path):
    """Starts greedy-host in the same way, without an end of its own."""

    def begin(*words: str) -> subprocess.Popen[bytes]:
        plugins = native_build / "fake_plugin"
        given = [native_build / "greedy-host", fake_stages.RECORDED, "--plugin-dir", plugins, "--prompt", "a", *words]
        env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
        return subprocess.Popen(given, cwd=tmp_path, env=env, stderr=subprocess.PIPE, start_new_session=True)

    return begin


def grown(process: subprocess.Popen[bytes], folder: Path, name: str, size: int) -> Path:
    """The temporary file of a running process, once it is larger than `size` bytes."""
    while process.poll() is None:
        for part in folder.glob(f".{name}.*.part"):
            if part.stat().st_size > size:
                return part
        time.sleep(0.02)
    raise AssertionError(process.stderr.read())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "bin")


def fake_ffmpeg(folder: Path, script: str) -> Path:
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "ffmpeg").write_text(f"#!/bin/sh\n{script}\n")
    (programs / "ffmpeg").chmod(0o755)
    return programs


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
        "note: --prompt-at 3 has no effect: --prompt-at 4 replaces it before a chunk begins",
        "note: --prompt-at 7 has no effect: prompts switch where a chunk begins, and the last one began before frame 7",
    ]


def test_ffmpeg_gets_the_frames(host, tmp_path):
    programs = fake_ffmpeg(tmp_path, 'for last; do :; done\necho "$@" >> arguments\ncat > "$last"')
    ran = host("--frames", "9", "--out", "video.mp4", programs=programs)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "video.mp4").read_bytes() == frames_of(host, 9).tobytes()  # the copy is no mp4: not taken
    assert names(tmp_path) == ["arguments", "video.mp4"]
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[arguments.index("-s") + 1] == "16x8"
    assert arguments[arguments.index("-r") + 1] == "8/1"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 3", "exit status 3 for video.mp4"),
        ("cat > /dev/null; exit 1", "exit status 1 for video.mp4"),
        ("kill -9 $$", "signal 9 for video.mp4"),
        ('for last; do :; done; echo "[mp4 @ 0x5] $last: no room" >&2; echo more >&2; exit 4',
         "exit status 4 for video.mp4 (video.mp4: no room)"),
        # More messages than a pipe holds must not make it wait.
        ("yes words | head -c 300000 >&2; exit 5", "exit status 5 for video.mp4 (words)"),
    ],
)  # fmt: skip
def test_an_ffmpeg_that_fails_is_said(host, tmp_path, script, said):
    ran = host("--frames", "2000", "--out", "video.mp4", programs=fake_ffmpeg(tmp_path, script))
    assert ran.returncode == 1
    assert ran.stderr.decode() == f"error: ffmpeg: got {said}, expected it to read all frames\n"
    assert names(tmp_path) == []


@pytest.mark.parametrize("found", ["nothing", "no program", "a folder"])
@pytest.mark.parametrize("name", ["video.mp4", "VIDEO.MKV", "video.webm", "video.mov"])
def test_a_missing_ffmpeg_is_said_before_anything_is_loaded(native_build, tmp_path, found, name):
    """The bundle has nothing but its manifest."""
    (tmp_path / "bundle").mkdir()
    shutil.copy(fake_stages.RECORDED / "manifest.json", tmp_path / "bundle")
    (tmp_path / "bin").mkdir()
    if found == "no program":
        (tmp_path / "bin" / "ffmpeg").write_bytes(b"")
    elif found == "a folder":
        (tmp_path / "bin" / "ffmpeg").mkdir()
    words = [native_build / "greedy-host", "bundle", "--prompt", "a", "--frames", "2", "--out"]
    environment = {**os.environ, "PATH": str(tmp_path / "bin")}

    def ran(out):
        return subprocess.run([*words, out], cwd=tmp_path, env=environment, capture_output=True, text=True,
                              timeout=HANG)  # fmt: skip

    kind = Path(name).suffix[1:].lower()
    expected = "expected it installed; .y4m and .rgb need no program"
    got = ran(name)
    assert (got.returncode, got.stderr) == (2, f"error: {kind} output: got no program ffmpeg in PATH, {expected}\n")
    assert "got no plain file inside the bundle" in ran("video.y4m").stderr  # there it does load, and leaves nothing
    assert names(tmp_path) == ["bundle"]


def test_a_size_that_ffmpeg_does_not_code_is_said_before_anything_is_loaded(native_build, tmp_path):
    manifest = json.loads((fake_stages.RECORDED / "manifest.json").read_text())
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps(manifest | {"height": 9, "width": 15, "spatial": 3}))
    fake_ffmpeg(tmp_path, "cat > /dev/null")
    words = [native_build / "greedy-host", "bundle", "--prompt", "a", "--frames", "2", "--out", "video.mp4"]
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    ran = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANG)
    assert ran.returncode == 2
    expected = "expected even numbers; .y4m takes any size"
    assert ran.stderr == f"error: mp4 output: got 15x9 pixels in yuv420p, {expected}\n"


@pytest.mark.parametrize("older", [False, True])
def test_what_a_failing_ffmpeg_wrote_is_kept(host, tmp_path, older):
    if older:
        (tmp_path / "video.mp4").write_bytes(b"old")
    programs = fake_ffmpeg(tmp_path, 'for last; do :; done\nhead -c 1152 > "$last"; exit 1')
    ran = host("--frames", "2000", "--out", "video.mp4", programs=programs)
    assert ran.returncode == 1
    assert ran.stderr.count(b"\n") == 1
    name = "video.kept.mp4" if older else "video.mp4"
    assert f"; kept what was made in {tmp_path}/{name}\n" in ran.stderr.decode()
    assert (tmp_path / name).read_bytes() == frames_of(host, 3).tobytes()
    assert names(tmp_path) == sorted({"video.mp4", name})
    assert not older or (tmp_path / "video.mp4").read_bytes() == b"old"


def real_ffmpeg() -> str | None:
    try:
        import imageio_ffmpeg
    except ImportError:
        return shutil.which("ffmpeg")
    return imageio_ffmpeg.get_ffmpeg_exe()


@pytest.mark.parametrize("name", ["video.mp4", "video.mov", "video.mkv"])
def test_a_real_ffmpeg_makes_an_ordinary_file(host, tmp_path, name):
    if real_ffmpeg() is None:
        pytest.skip("no ffmpeg is installed")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ffmpeg").symlink_to(real_ffmpeg())
    ran = host("--frames", "25", "--out", name, programs=tmp_path / "bin")
    assert (ran.returncode, ran.stderr) == (0, b"")
    frames = frames_of(host, 25)
    with av.open(str(tmp_path / name)) as container:
        got = list(container.decode(video=0))
    assert len(got) == 25
    assert {(f.colorspace, f.color_primaries, f.color_trc, f.color_range) for f in got} == {(1, 1, 1, 1)}
    mean = np.abs(np.stack([f.to_ndarray(format="rgb24") for f in got]).mean((1, 2)) - frames.mean((1, 2)))
    assert mean.max() < 6
    assert names(tmp_path) == [name]
    if name != "video.mkv":
        data = (tmp_path / name).read_bytes()
        assert b"moof" not in data
        assert -1 < data.find(b"moov") < data.find(b"mdat")


@pytest.mark.parametrize("name", ["video.y4m", "video.rgb"])
def test_a_limit_on_the_file_size_keeps_whole_frames(host, tmp_path, name):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    (tmp_path / name).write_bytes(b"old")
    ran = host("--frames", "200", "--out", name, preexec_fn=limit)
    assert ran.returncode == 1
    assert ran.stderr.count(b"\n") == 1
    kept = tmp_path / f"video.kept{Path(name).suffix}"
    assert f"kept what was made in {kept}" in ran.stderr.decode()
    assert (tmp_path / name).read_bytes() == b"old"
    if name.endswith("rgb"):
        assert kept.read_bytes() == frames_of(host, 13).tobytes()  # 13 frames of 384 bytes
    else:
        with av.open(str(kept)) as container:
            assert len(list(container.decode(video=0))) == 12
        assert (kept.stat().st_size - kept.read_bytes().index(b"FRAME")) % 390 == 0


def test_a_whole_file_replaces_and_says_so(host, tmp_path):
    (tmp_path / "video.y4m").write_bytes(b"old")
    plugins = ["--frames", "3", "--out", "video.y4m"]
    assert host(*plugins).stderr == b""
    assert (tmp_path / "video.y4m").read_bytes() != b"old"
    assert names(tmp_path) == ["video.y4m"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
@pytest.mark.parametrize("name", ["video.rgb", "video.mp4"])
def test_a_signal_ends_the_stream(start, tmp_path, number, name):
    """Also where a terminal sends it to the whole group, ffmpeg included."""
    fake_ffmpeg(tmp_path, 'for last; do :; done\ncat > "$last"')
    process = start("--out", name)
    grown(process, tmp_path, name, 4000)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 0, err
    assert names(tmp_path) == [name]
    size = (tmp_path / name).stat().st_size
    assert size >= 4000
    assert size % 384 == 0


def test_a_killed_run_leaves_its_file(start, host, tmp_path):
    process = start("--out", "video.rgb")
    part = grown(process, tmp_path, "video.rgb", 4000)
    assert left_over(tmp_path / "video.rgb") == []  # both programs have one kind of lock
    process.kill()
    process.communicate()
    data = part.read_bytes()
    again = start("--out", "video.rgb", "--frames", "3")
    _, err = again.communicate(timeout=HANG)
    assert f"note: an earlier run was killed and left {part}" in err.decode()
    assert part.read_bytes() == data
    assert names(tmp_path) == sorted([part.name, "video.rgb"])


def test_two_runs_with_one_name(start, tmp_path):
    runs = [start("--out", "video.rgb", "--frames", str(count)) for count in (3000, 5000)]
    for process in runs:
        _, err = process.communicate(timeout=HANG)
        assert process.returncode == 0, err
    assert names(tmp_path) == ["video.rgb"]
    assert (tmp_path / "video.rgb").stat().st_size in (3000 * 384, 5000 * 384)


@pytest.mark.parametrize("name", ["-a.rgb", "100%.rgb", "a b.rgb", "a\nb.rgb", "\udcff.rgb", "x" * 251 + ".rgb"])
def test_odd_names_are_names(host, tmp_path, name):
    assert host("--frames", "2", "--out", name).returncode == 0
    assert os.listdir(tmp_path) == [name]


def test_a_link_is_followed(host, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "video.rgb").symlink_to("far/other.rgb")
    assert host("--frames", "2", "--out", "video.rgb").returncode == 0
    assert (tmp_path / "video.rgb").is_symlink()
    assert names(tmp_path / "far") == ["other.rgb"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--frames", "0"], "--frames: got 0"),
        (["--frames", "x"], "argument --frames: got 'x', expected a valid integer (see --help)"),
        (["--quiet=1"], "--quiet: got a value"),
        (["--frames"], "--frames: got nothing"),
        (["--wrong"], "got --wrong"),
        (["--out", "video.avi"], "output: got video.avi"),
        (["--out", "nowhere/video.y4m"], "expected an existing directory"),
        (["--out", "null", "--format", "rgb"], "expected it for - (stdout)"),
        (["--format", "mp4"], "format: got mp4, expected one of y4m, rgb"),
        (["--out", "/"], "output: got /"),
        (["--out", "folder.y4m"], "which is a directory"),
        (["--out", "video.AVI"], "output: got video.AVI, expected .mp4, .mov, .mkv, .webm, .y4m, .rgb, null"),
        (["--out", "/dev/full.y4m/x.y4m"], "expected an existing directory"),
        (["--out", "x" * 300 + ".y4m"], "a name of 304 bytes"),
        (["--out", "a\nb.avi"], "output: got a\\x0ab.avi"),
        (["--image", "nothing.ppm"], "--image: got nothing.ppm"),
        (["--backend", "tensorrt"], "got no backend tensorrt, expected one of aoti-cpu"),
        (["--backend", "tensorrt_rtx"], "got no backend tensorrt_rtx, expected one of aoti-cpu"),
    ],
)
def test_bad_input_is_one_line(host, tmp_path, words, said):
    (tmp_path / "folder.y4m").mkdir()
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
