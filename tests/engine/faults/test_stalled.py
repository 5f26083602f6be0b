"""A reader or a writer that stalls, an ffmpeg that hangs, a terminal's Ctrl-C: the first signal asks, the second one
ends."""

import fcntl
import os
import signal
import termios
import time
from pathlib import Path

import pytest
from harness import FRAME, ended, frames_in, grown, names, start

pytestmark = [pytest.mark.slow]
PROGRAMS = ["run", "host"]


def stalled(program, build, folder, *words):
    """A program that waits for the reader of its stdout, and the end of the pipe to read from."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    process = start(program, build, folder, "--out", "-", *words, stdout=writing)
    os.close(writing)
    while process.poll() is None:
        if any(fcntl.ioctl(reading, termios.FIONREAD, b"\0\0\0\0")):
            wait_until_it_rests(process)
            return process, reading
        time.sleep(0.1)
    raise AssertionError(process.communicate())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_second_signal_ends_a_program_whose_reader_stalls(native_build, tmp_path, program, number):
    coded = ["--format", "mp4"] if program == "run" and number == signal.SIGTERM else ["--format", "rgb"]
    process, reading = stalled(program, native_build, tmp_path, *coded)
    process.send_signal(number)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(number)
    assert ended(process, 10)[0] == 128 + number
    os.close(reading)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_first_signal_asks_and_whole_frames_arrive(native_build, tmp_path, program):
    process, reading = stalled(program, native_build, tmp_path, "--format", "rgb")
    process.send_signal(signal.SIGTERM)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    assert ended(process)[0] == 0
    assert len(data) > 0
    assert len(data) % FRAME[program] == 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_one_signal_ends_a_program_that_waits_for_its_prompts(native_build, tmp_path, program):
    os.mkfifo(tmp_path / "prompts")  # nobody writes to it
    process = start(program, native_build, tmp_path, "--prompt-file", "prompts", "--out", "video.mp4", prompt=())
    wait_until_it_rests(process)
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 128 + signal.SIGINT
    assert names(tmp_path) == ["prompts"]


def wait_until_it_rests(process):
    """Until a process has used no processor time for half a second."""
    before, used = None, []
    while process.poll() is None and before != used:
        before, used = used, Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        time.sleep(0.5)


def fake_ffmpeg(folder, script):
    (folder / "bin").mkdir()
    (folder / "bin" / "ffmpeg").write_text(f"#!/bin/sh\nfor last; do :; done\n{script}\n")
    (folder / "bin" / "ffmpeg").chmod(0o755)


@pytest.mark.parametrize(
    ("script", "frames"),
    [
        ('head -c 1152 > "$last"; exec sleep 1000', None),  # reads no more
        ('trap "" TERM; head -c 1152 > "$last"; while :; do sleep 1; done', None),  # nor listens
        ('cat > "$last"; exec sleep 1000', 3),  # does not end
    ],
)
def test_an_ffmpeg_that_hangs(native_build, tmp_path, script, frames):
    fake_ffmpeg(tmp_path, script)
    (tmp_path / "video.mp4").write_bytes(b"old")
    some = ["--frames", str(frames)] if frames else []
    process = start("host", native_build, tmp_path, "--out", "video.mp4", *some)
    grown(process, tmp_path, "video.mp4", 1000)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    status, err = ended(process, 20)
    kept = tmp_path / "video.kept.mp4"
    got = "got a second signal before the end of video.mp4, expected it to read all frames"
    assert (status, err) == (1, f"error: ffmpeg: {got}; kept what was made in {kept}\n")
    assert kept.stat().st_size == 3 * FRAME["host"]
    assert (tmp_path / "video.mp4").read_bytes() == b"old"
    assert names(tmp_path) == ["video.kept.mp4", "video.mp4"]


def test_an_ffmpeg_that_ends_in_time_loses_nothing(native_build, tmp_path):
    """Two signals from an impatient user: it has a second to end."""
    fake_ffmpeg(tmp_path, 'cat > "$last"; sleep 0.1')
    process = start("host", native_build, tmp_path, "--out", "video.mkv")
    grown(process, tmp_path, "video.mkv", 4000)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert ended(process) == (0, "")
    assert names(tmp_path) == ["video.mkv"]
    assert (tmp_path / "video.mkv").stat().st_size % FRAME["host"] == 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_in_a_terminal(native_build, tmp_path, program):
    """The terminal sends it to all processes in its foreground, an ffmpeg included if it were among them."""
    if program == "host":
        fake_ffmpeg(tmp_path, 'cat > "$last"')
    ours, theirs = os.openpty()

    def in_front():
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "preexec_fn": in_front}
    process = start(program, native_build, tmp_path, "--out", "video.mp4", **streams)
    os.close(theirs)
    grown(process, tmp_path, "video.mp4", 4000)
    os.write(ours, b"\x03")
    assert ended(process)[0] == 0
    os.close(ours)
    assert names(tmp_path) == ["video.mp4"]
    size = (tmp_path / "video.mp4").stat().st_size
    if program == "host":
        assert size >= 4000
        assert size % FRAME["host"] == 0
    else:
        assert frames_in(tmp_path / "video.mp4") > 0
