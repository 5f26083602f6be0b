"""--source of engine.run: files, standard input and cameras, what is refused, and what is told at the end."""

import io
import json
import sys

import numpy as np
import pytest

import engine
import engine.commands.sources
import engine.run
from engine.media.clips import frames_at
from engine.media.live import camera
from engine.media.sinks import open_sink

SIZE = 16, 24
PROMPT = "a red circle moving right"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A clip at 20 frames per second in several formats, larger than the stream and of another shape."""
    folder = tmp_path_factory.mktemp("clips")
    ramp = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)[..., None].repeat(3, 2)
    for name in ("a.mp4", "a.mkv", "a.y4m"):
        with open_sink(str(folder / name), 20, (64, 64)) as sink:
            for number in range(60):
                sink.write(ramp + np.uint8(3 * number))
    return folder


def run(capsys, model_dir, *arguments):
    code = engine.run.main(["--prompt", PROMPT, "--model", str(model_dir), *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def report(capsys, model_dir, *arguments):
    code, out, err = run(capsys, model_dir, "--json", "--out", "checksum", "--seed", 3, *arguments)
    assert code == 0, err
    return json.loads(out)


def expected(model_dir, source, **options):
    import hashlib

    with engine.load(model_dir).stream(PROMPT, seed=3, source=source, **options) as stream:
        frames = np.stack(list(stream))
    return len(frames), hashlib.sha256(frames.tobytes()).hexdigest()


@pytest.mark.parametrize("name", ["a.mp4", "a.y4m"])
def test_a_file_at_the_rate_of_the_stream(capsys, model_dir, clips, name):
    """3 s at 8 frames per second are 24 frames, of which 21 fill chunks."""
    made = report(capsys, model_dir, "--source", clips / name, "--strength", 0.9, "--noise-scale", 0.1)
    found = frames_at(clips / name, *SIZE, 8)
    assert (made["frames"], made["sha256"]) == expected(model_dir, found, strength=0.9, noise_scale=0.1)
    assert made["frames"] == 21
    assert made["source"] is None  # nothing is dropped
    assert any("cropped from 64x64" in note for note in made["notes"])


@pytest.mark.parametrize("name", ["a.mkv", "a.y4m"])
def test_standard_input(capsys, model_dir, clips, monkeypatch, name):
    class Pipe(io.RawIOBase):
        """Gives a few bytes at a time, and cannot seek."""

        def __init__(self):
            self.file = (clips / name).open("rb")

        def readable(self):
            return True

        def readinto(self, buffer):
            return self.file.readinto(memoryview(buffer)[:1000])

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Pipe())))
    made = report(capsys, model_dir, "--source", "-", "--strength", 0.9)
    assert (made["frames"], made["sha256"]) == expected(model_dir, frames_at(clips / name, *SIZE, 8), strength=0.9)


def test_standard_input_that_is_no_video(capsys, model_dir, monkeypatch):
    for data in (b"", b"no video at all", b"#EXTM3U\n/etc/passwd\n", b"ffconcat version 1.0\nfile /etc/passwd\n"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        code, _, err = run(capsys, model_dir, "--source", "-", "--out", "null", "--quiet")
        assert code == 2
        assert err.startswith("error: video: got standard input, expected a video that FFmpeg can read (")
        assert len(err.splitlines()) == 1


def test_a_camera_and_what_it_lost(capsys, model_dir, monkeypatch):
    def lavfi(device, *options):
        return camera("testsrc=size=64x64:rate=30:duration=2,realtime", *options, driver="lavfi")

    monkeypatch.setattr(engine.commands.sources, "device_of", lambda name: name)
    monkeypatch.setattr(engine.commands.sources, "camera", lavfi)
    made = report(capsys, model_dir, "--source", "camera", "--strength", 0.9)
    lost = made["source"]
    assert made["frames"] in (9, 13, 17)
    assert made["frames"] <= lost["taken"] < made["frames"] + 4
    assert lost["dropped"] > 30
    assert f"source: dropped {lost['dropped']}, repeated {lost['repeated']} frames" in made["notes"]


def test_a_limit_ends_it_before(capsys, model_dir, clips):
    assert report(capsys, model_dir, "--source", clips / "a.mp4", "--frames", 7)["frames"] == 7


def test_what_is_refused(capsys, model_dir, clips, tmp_path):
    still = tmp_path / "empty.mp4"
    still.touch()
    file = clips / "a.mp4"
    cases = [
        (["--source", file, "--strength", 0], "--strength: got 0, expected a number above 0, up to 1"),
        (["--source", file, "--noise-scale", 2], "--noise-scale: got 2, expected a number above 0, up to 1"),
        (["--source", file, "--strength", 0.1], "strength: got 0.1, expected 0.625 to 1: the last step"),
        (["--strength", 0.9], "--strength: got 0.9 alone, expected --source as well"),
        (["--noise-scale", 0.1], "--noise-scale: got 0.1 alone, expected --source as well"),
        (["--source", tmp_path / "none.mp4"], f"source: got {tmp_path}/none.mp4, expected an existing file"),
        (["--source", tmp_path], f"source: got {tmp_path}, a directory, expected a file"),
        (["--source", still], f"source: got {still}, an empty file, expected a readable video"),
        (["--source", "https://example.org/a.mp4"], "source: got https:/example.org/a.mp4, a URL, expected a file"),
        (["--source", "camera:9"], "source: got camera:9, expected a camera at /dev/video9 ("),
        (["--source", __file__], f"video: got {__file__}, expected a video that FFmpeg can read ("),
    ]
    for arguments, message in cases:
        code, _, err = run(capsys, model_dir, "--out", "null", "--quiet", *arguments)
        assert (code, err.startswith(f"error: {message}")) == (2, True), err
        assert len(err.splitlines()) == 1
    with pytest.raises(SystemExit) as stopped:
        run(capsys, model_dir, "--out", "null", "--source", file, "--image", file)
    assert stopped.value.code == 2
