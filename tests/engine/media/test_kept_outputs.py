"""Nothing that plays is lost: errors, signals, full disks, killed processes, and two runs with one target."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from limits import BARE, HANG
from PIL import Image
from videos import decode, files_in, grey_steps, is_grey_steps, is_ordinary_mp4, moving_square

import engine.files
from engine.files import left_over
from engine.media.sinks import open_sink

ROOT = Path(__file__).parents[3]
SIZE = (48, 64)
FILES = ["clip.mp4", "clip.mov", "clip.mkv", "clip.webm", "clip.y4m", "clip.rgb", "clip.gif", "clip.webp", "shots/",
         "shot_%03d.png"]  # fmt: skip
VIDEOS = ["clip.mp4", "clip.mov", "clip.mkv", "clip.webm", "clip.y4m"]


def frames_of(path):
    """What another program reads from a file or a folder of pictures, or a pattern of them; uint8 [H, W, 3] each."""
    path = Path(path)
    if path.suffix == ".rgb":
        return list(np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, *SIZE, 3))
    if path.suffix in (".gif", ".webp"):
        with Image.open(path) as image:
            got = []
            for i in range(image.n_frames):
                image.seek(i)
                got.append(np.asarray(image.convert("RGB")))
            return got
    if path.is_dir() or "%" in path.name:
        names = path.iterdir() if path.is_dir() else path.parent.glob("shot_*.png")
        return [np.asarray(Image.open(name)) for name in sorted(names)]
    return decode(path)[0]


def filled(target, count=20):
    sink = open_sink(target, 16, SIZE)
    for frame in grey_steps(count):
        sink.write(frame)
    return sink


def visible(folder):
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize("target", FILES)
def test_nothing_under_the_name_until_the_end_and_all_of_it_after_an_error(tmp_path, target):
    sink = filled(f"{tmp_path}/{target}")
    assert visible(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 1
    sink.abort()
    sink.abort()
    sink.close()
    got = frames_of(f"{tmp_path}/{target}")
    assert len(got) == sink.frames == 20
    assert is_grey_steps(got)
    assert sink.kept == (tmp_path if "%" in target else tmp_path / target)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    if target in ("clip.mp4", "clip.mov"):
        assert is_ordinary_mp4(tmp_path / target)
    with pytest.raises(ValueError, match="after close"):
        sink.write(grey_steps(1)[0])


@pytest.mark.parametrize("end", ["close", "abort"])
@pytest.mark.parametrize("target", FILES)
def test_without_frames_nothing_is_left_and_nothing_touched(tmp_path, target, end):
    if "." in target and "%" not in target:
        (tmp_path / target).write_bytes(b"old")
    before = files_in(tmp_path)
    getattr(open_sink(f"{tmp_path}/{target}", 16, SIZE), end)()
    assert files_in(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == len(before)
    assert all((tmp_path / name).read_bytes() == b"old" for name in before)


@pytest.mark.parametrize("target", FILES[:8])
def test_an_error_leaves_the_older_file_and_keeps_the_new_one_beside_it(tmp_path, target):
    path = tmp_path / target
    path.write_bytes(b"old")
    for name in ("clip.kept", "clip.kept-1", "clip.kept-2"):
        sink = filled(path)
        sink.abort()
        assert sink.kept == tmp_path / f"{name}{path.suffix}"
        assert is_grey_steps(frames_of(sink.kept))
        assert sink.notes == []
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("target", FILES[:8])
def test_a_whole_file_replaces_and_says_so(tmp_path, target):
    path = tmp_path / target
    path.write_bytes(b"old")
    sink = filled(path)
    assert path.read_bytes() == b"old"
    sink.close()
    assert [f"replaced the older {path}"] == sink.notes
    assert len(frames_of(path)) == 20
    assert files_in(tmp_path) == [target]


def raises(target, frames, error):
    with open_sink(target, 16, SIZE) as sink:
        for frame in frames:
            sink.write(frame)
        raise error


@pytest.mark.parametrize("error", [RuntimeError("the model failed"), MemoryError(), SystemExit(3), KeyboardInterrupt()])
def test_the_context_manager_keeps_what_was_made(tmp_path, error):
    with pytest.raises(type(error)) as raised:
        raises(tmp_path / "clip.mp4", grey_steps(5), error)
    assert len(decode(tmp_path / "clip.mp4")[0]) == 5
    told = getattr(raised.value, "__notes__", [])
    assert told == ([] if isinstance(error, KeyboardInterrupt) else [f"kept 5 frames in {tmp_path}/clip.mp4"])


@pytest.mark.parametrize("target", FILES)
def test_a_name_that_cannot_be_given_leaves_the_frames(tmp_path, target, monkeypatch):
    """The directory refuses every rename: the frames stay under their temporary name."""
    sink = filled(f"{tmp_path}/{target}")

    def fail(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(engine.files.os, "replace", fail)
        with pytest.raises(OSError, match="no space"):
            sink.close()
    if target.startswith("shot"):
        assert len(list(tmp_path.rglob("*.png"))) == 20
    else:
        assert len(decode(sink.kept)[0] if target in VIDEOS else sink.kept.read_bytes()) >= 20
        assert list(tmp_path.iterdir()) == [sink.kept]


@pytest.mark.parametrize("target", ["clip.mp4", "clip.y4m", "clip.gif"])
def test_a_directory_that_takes_the_name_meanwhile(tmp_path, target):
    sink = filled(tmp_path / target)
    (tmp_path / target).mkdir()
    with pytest.raises(IsADirectoryError):
        sink.close()
    assert sink.kept == tmp_path / f"clip.kept{Path(target).suffix}"
    assert len(frames_of(sink.kept)) == 20


@pytest.mark.parametrize("there", [False, True])
def test_frames_of_two_runs_do_not_mix(tmp_path, there):
    """In a new folder the second to end is told so, and its frames are kept in a folder of their own."""
    if there:
        target, second = f"{tmp_path}/shot_%03d.png", tmp_path / "shot"
    else:
        target, second = f"{tmp_path}/shots/", tmp_path / "shots.kept"
    one, two = open_sink(target, 16, SIZE), open_sink(target, 16, SIZE)
    for frame in grey_steps(5):
        one.write(frame)
    for frame in moving_square(8):
        two.write(frame)
    one.close()
    with pytest.raises(OSError):  # noqa: PT011
        two.close()
    assert is_grey_steps(frames_of(target), 0)
    assert len(frames_of(target)) == 5
    assert two.kept == second
    assert len(frames_of(second)) == 8
    assert not list(tmp_path.rglob(".*"))
    with pytest.raises(ValueError, match=r"got .*expected"):
        open_sink(target, 16, SIZE)


WRITER = """
import os, resource, sys
import numpy as np
from engine.media.sinks import open_sink

target, count, limit, level = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
rng = np.random.default_rng(0)
with open_sink(target, 16, (48, 64)) as sink:
    for i in range(count):
        frame = np.full((48, 64, 3), 10 * i % 256 if level == "steps" else int(level), np.uint8)
        if limit:  # noise beside the grey, or the file would stay small
            frame[:, 40:] = rng.integers(0, 256, (48, 24, 3))
        sink.write(frame)
        print(i, flush=True)
"""


def start(target, count, limit=0, level="steps"):
    words = [sys.executable, "-c", BARE + WRITER, str(target), str(count), str(limit), str(level)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes)


def wait_for(process, frame):
    for line in process.stdout:
        if int(line) >= frame:
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "limit", "least"),
    [("clip.mp4", 60_000, 15), ("clip.mkv", 60_000, 15), ("clip.webm", 60_000, 15), ("clip.y4m", 100_000, 10),
     ("clip.rgb", 100_000, 10), ("clip.gif", 60_000, 8)],
)  # fmt: skip
def test_a_limit_on_the_file_size(tmp_path, target, limit, least):
    """As a full disk: the write that fails ends the run, and every whole frame before it is kept."""
    process = start(tmp_path / target, 80, limit)
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == 1, err
    made = len(out.split())
    got = frames_of(tmp_path / target)
    assert least <= len(got) <= made
    assert is_grey_steps(got, 12)
    assert f"kept {len(got)} frames in {tmp_path}/{target}" in err
    assert files_in(tmp_path) == [target]
    if target not in ("clip.gif", "clip.webp"):
        assert len(got) >= made - 1  # the frame in the muxer may be lost with the write that failed


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
@pytest.mark.parametrize("target", ["clip.mp4", "clip.mkv", "clip.y4m", "shots/", "clip.gif"])
def test_a_full_disk(tmp_path, target):
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "small", str(place)], capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        sink = open_sink(f"{place}/{target}", 16, SIZE)
        noise = np.random.default_rng(0)

        def fill():
            for i in range(2000):
                frame = np.full((*SIZE, 3), 10 * i % 256, np.uint8)
                frame[:, 40:] = noise.integers(0, 256, (48, 24, 3))
                sink.write(frame)
                if target == "clip.gif" and i == 120:
                    sink.close()

        with pytest.raises(OSError):  # noqa: PT011
            fill()
        sink.abort()
        got = frames_of(sink.kept)
        assert len(got) == sink.frames >= 20
        assert is_grey_steps(got, 12)
        assert len(list(place.iterdir())) == 1
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("target", VIDEOS)
def test_a_killed_run_leaves_what_plays_and_no_later_run_touches_it(tmp_path, target):
    process = start(tmp_path / target, 1_000_000)
    wait_for(process, 40)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (part,) = tmp_path.iterdir()
    assert part.name.startswith(f".{target}.")
    assert left_over(tmp_path / target) == [part]
    got = frames_of(part)
    assert len(got) >= 40
    assert is_grey_steps(got)
    data = part.read_bytes()
    for _ in range(2):
        sink = filled(tmp_path / target, 2)
        sink.close()
        assert f"left {part}: rename or delete it" in sink.notes[0]
    assert part.read_bytes() == data
    assert sorted(tmp_path.iterdir()) == [part, tmp_path / target]


@pytest.mark.slow
def test_a_killed_run_leaves_its_pictures(tmp_path):
    process = start(f"{tmp_path}/shots/", 1_000_000)
    wait_for(process, 10)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (part,) = tmp_path.iterdir()
    filled(f"{tmp_path}/shots/", 2).close()
    assert len(frames_of(tmp_path / "shots")) == 2
    assert len(list(part.iterdir())) >= 10


@pytest.mark.slow
def test_what_a_killed_run_left_empty_is_cleared(tmp_path):
    process = start(tmp_path / "clip.gif", 1_000_000)
    wait_for(process, 3)
    assert left_over(tmp_path / "clip.gif") == []  # it lives
    process.send_signal(signal.SIGKILL)
    process.communicate()
    sink = filled(tmp_path / "clip.gif", 2)
    sink.close()
    assert sink.notes == []
    assert files_in(tmp_path) == ["clip.gif"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", [VIDEOS[0], *(pytest.param(target, marks=pytest.mark.thorough) for target in VIDEOS[1:])]
)
def test_two_runs_with_one_name_are_both_whole(tmp_path, target):
    """The last one to end wins; neither disturbs the other."""
    one, two = start(tmp_path / target, 30, level=40), start(tmp_path / target, 60, level=200)
    for process, level, count in ((one, 40, 30), (two, 200, 60)):
        wait_for(process, 3)
        assert process.returncode is None, level
        assert count
    seen = set()
    while one.poll() is None or two.poll() is None:
        if (tmp_path / target).exists():
            frames = frames_of(tmp_path / target)
            seen.add((len(frames), round(int(frames[-1][5, 5, 0]), -1)))
        time.sleep(0.01)
    for process in (one, two):
        _, err = process.communicate(timeout=HANG)
        assert process.returncode == 0, err
    frames = frames_of(tmp_path / target)
    seen.add((len(frames), round(int(frames[-1][5, 5, 0]), -1)))
    assert seen <= {(30, 40), (60, 200)}
    assert files_in(tmp_path) == [target]


@pytest.mark.slow
@pytest.mark.parametrize("turns", [(0, 6, 11), pytest.param(range(12), marks=pytest.mark.thorough)])
def test_ctrl_c_at_any_moment_leaves_a_file_that_plays(tmp_path, turns):
    """A library user without the command's handlers: the signal may come inside a write, the end, or the copy."""
    for turn in turns:
        folder = tmp_path / str(turn)
        folder.mkdir()
        process = start(folder / "clip.mp4", 40)
        wait_for(process, 2 + 3 * turn)
        time.sleep(0.003 * turn)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=HANG)
        (name,) = files_in(folder)
        assert len(decode(folder / name)[0]) >= 2 + 3 * turn


def test_the_limits_of_this_process_are_untouched():
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


LIMITED = """
import resource, signal, sys
import numpy as np
from engine.media.sinks import open_sink

size = (48, 64)
noise = np.random.default_rng(0).integers(0, 256, (8, *size, 3), dtype=np.uint8)
for limit in (0, 100, 3000, 30000):
    for target in sys.argv[1:]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
        sink = None
        try:
            sink = open_sink(target, 16, size)
            for i in range(40):
                sink.write(noise[i % 8])
            sink.close()
            said = "nothing"
        except OSError as error:
            if sink is not None:
                sink.abort(error)
            said = f"{type(error).__name__} {error.errno} {error}"
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        print(limit, target, said, sep="|")
"""


def test_a_limit_names_the_output_that_was_asked_for(tmp_path):
    """As a full disk does. The temporary name says nothing to the user, who cannot see the file."""
    targets = [*FILES, "CLIP2.Y4M"]
    ran = subprocess.run([sys.executable, "-c", BARE + LIMITED, *targets], cwd=tmp_path, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=HANG)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    lines = [line.split("|") for line in ran.stdout.splitlines()]
    assert len(lines) == 4 * len(targets)
    for limit, target, said in lines:
        pictures = ".png" in target or target.endswith("/")  # each is a file of its own, of some 9 kB
        if int(limit) < 30000 or not pictures:
            assert said == f"OSError 27 output: got File too large for {target}, expected it to be written"
        else:
            assert said == "nothing"
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_a_folder_that_goes_away_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    target = f"{tmp_path}/folder/clip.y4m"
    sink = filled(target, 2)
    shutil.rmtree(tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match=f"^output: got No such file or directory for {target}, expected it"):
        sink.close()


@pytest.mark.parametrize("target", ["", "a\0b.y4m", "a\0b/c.y4m"])
def test_names_that_are_none(tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^output: got (an empty name|a\\x00b.*), expected a (file )?name"):
        open_sink(target, 16, SIZE)
    assert not list(tmp_path.iterdir())
