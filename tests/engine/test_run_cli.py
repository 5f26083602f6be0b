"""The command line: what it reports, what it refuses, and how it ends when it is interrupted."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from limits import HANG
from PIL import Image
from safetensors.torch import save_file

import engine.commands.interrupt
import engine.run
from engine.media.clips import read_clip
from engine.media.pictures import read_image

ROOT = Path(__file__).parents[2]
PROMPT = "a red circle moving right"
SIZE = 16, 24


# A warning would be printed among the progress.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error::UserWarning")]


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(model_dir, *arguments, prompt=PROMPT):
    given = ["--prompt", prompt] if prompt is not None else []
    try:
        return engine.run.main([*given, "--model", str(model_dir), *map(str, arguments)])
    except SystemExit as stopped:  # argparse
        return stopped.code


def report_of(capfd, model_dir, *arguments, **options):
    code = run(model_dir, "--json", *arguments, **options)
    out, err = capfd.readouterr()
    assert code == 0, err
    return json.loads(out.strip().splitlines()[-1])


def checksum(frames):
    return hashlib.sha256(np.stack(list(frames)).tobytes()).hexdigest()


def decode(path):
    with av.open(str(path)) as container:
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_report(model_dir, tmp_path, capfd):
    report = report_of(capfd, model_dir, "--frames", 10, "--seed", 5, "--out", "clip.mp4")
    for key in ("frames", "fps", "ttff_ms", "ms_per_chunk", "peak_memory_mb", "preset", "backend", "device", "seed"):
        assert key in report
    assert (report["frames"], report["preset"], report["seed"]) == (10, "greedy", 5)
    assert (report["backend"], report["device"], report["precision"]) == ("torch", "cpu", "float32")
    assert 0 < report["ms_per_chunk"]["p50"] <= report["ms_per_chunk"]["p99"]
    assert report["ttff_ms"] > 0
    assert report["fps"] > 0
    assert 50 < report["peak_memory_mb"] < 20_000
    assert len(decode(tmp_path / "clip.mp4")) == 10
    assert listing(tmp_path) == ["clip.mp4"]


@pytest.mark.slow
def test_stdout_holds_the_report_alone(model_dir, capfd):
    assert run(model_dir, "--frames", 1, "--out", "null") == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert "1 frames" in err
    assert run(model_dir, "--frames", 1, "--out", "null", "--quiet", "--json") == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert len(out.splitlines()) == 1


def test_checksum_is_that_of_the_python_frames(model_dir, pipeline, capfd):
    report = report_of(capfd, model_dir, "--frames", 9, "--seed", 3, "--out", "checksum")
    with pipeline.stream(PROMPT, seed=3, frames=9) as stream:
        assert report["sha256"] == checksum(stream)


@pytest.mark.parametrize(("seconds", "frames"), [("1", 8), ("0.3", 2), ("0.01", 1)])
def test_seconds(model_dir, capfd, seconds, frames):
    assert report_of(capfd, model_dir, "--seconds", seconds, "--out", "null")["frames"] == frames


@pytest.mark.parametrize(("when", "recommit"), [("1.0s", True), ("1", True), ("8f", False)])
@pytest.mark.slow
def test_prompt_switch(model_dir, pipeline, capfd, when, recommit):
    other = "a blue square on gray"
    more = [] if recommit else ["--no-recommit"]
    report = report_of(capfd, model_dir, "--frames", 17, "--out", "checksum", "--prompt-at", when, other, *more)
    with pipeline.stream(PROMPT, frames=17) as stream:
        frames = list(islice(stream, 9))  # frame 8 is the last of its chunk
        stream.set_prompt(other, recommit=recommit)
        assert report["sha256"] == checksum(frames + list(stream))


@pytest.mark.slow
def test_presets_and_their_fields(model_dir, tmp_path, capfd):
    report = report_of(capfd, model_dir, "--preset", "self-forcing", "--window", 6, "--frames", 9, "--out", "checksum")
    pipeline = engine.load(model_dir, preset="self-forcing", overrides={"window": 6})
    with pipeline.stream(PROMPT, frames=9) as stream:
        assert report["sha256"] == checksum(stream)
    (tmp_path / "mine.toml").write_text('base = "self-forcing"\nwindow = 6\n')
    again = report_of(capfd, model_dir, "--preset", "mine.toml", "--frames", 9, "--out", "checksum")
    assert again["sha256"] == report["sha256"]
    options = ["--steps", "1000,500/1000", "--solver", "euler", "--shift", "3", "--no-warped", "--stop-after", "1"]
    fields = {"steps": "1000,500/1000", "solver": "euler", "shift": 3.0, "warped": False, "stop_after": 1}
    report = report_of(capfd, model_dir, *options, "--frames", 9, "--out", "checksum")
    with engine.load(model_dir, overrides=fields).stream(PROMPT, frames=9) as stream:
        assert report["sha256"] == checksum(stream)


def test_image_to_video(model_dir, pipeline, tmp_path, capfd):
    picture = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    Image.fromarray(picture).save("start.png")
    report = report_of(capfd, model_dir, "--image", "start.png", "--frames", 5, "--out", "checksum")
    with pipeline.stream(PROMPT, frames=5, clip=read_image(tmp_path / "start.png", *SIZE)) as stream:
        assert report["sha256"] == checksum(stream)


@pytest.mark.slow
def test_a_clip_is_continued(model_dir, pipeline, tmp_path, capfd):
    assert run(model_dir, "--frames", 12, "--out", "start.mp4") == 0
    capfd.readouterr()
    options = ["--video", "start.mp4", "--video-frames", 6, "--frames", 11]
    report = report_of(capfd, model_dir, *options, "--out", "checksum")
    clip = read_clip(tmp_path / "start.mp4", *SIZE, 8, 6)
    with pipeline.stream(PROMPT, frames=11, clip=clip) as stream:
        assert report["sha256"] == checksum(stream)


@pytest.mark.slow
def test_what_was_changed_is_said(model_dir, capfd):
    """A name that begins with -, a picture that lies on its side, and an alpha channel."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 4), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save("-start.png", exif=exif)
    options = ["--model", str(model_dir), "--image", "-start.png", "--frames", "1", "--out", "checksum", "--json"]
    assert engine.run.main(["--prompt", PROMPT, *options]) == 0
    out, err = capfd.readouterr()
    notes = json.loads(out.splitlines()[-1])["notes"]
    assert notes == [
        "-start.png: turned upright (EXIF orientation 6)",
        "-start.png: transparent, laid over black",
        "-start.png: cropped from 50x40 to the shape of 24x16, 83% of it is left",
    ]
    assert [line for line in err.splitlines() if line.startswith("note: -start")] == [f"note: {note}" for note in notes]
    assert engine.run.main(["--prompt", PROMPT, "--quiet", *options]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out.splitlines()[-1])["notes"] == notes
    assert err == ""


@pytest.mark.slow
def test_pixels_can_be_enlarged(model_dir, tmp_path, capfd):
    assert run(model_dir, "--frames", 2, "--out", "big.rgb", "--scale", 2) == 0
    assert run(model_dir, "--frames", 2, "--out", "small.rgb") == 0
    big = np.frombuffer((tmp_path / "big.rgb").read_bytes(), np.uint8).reshape(2, 32, 48, 3)
    small = np.frombuffer((tmp_path / "small.rgb").read_bytes(), np.uint8).reshape(2, 16, 24, 3)
    assert np.array_equal(big[:, ::2, ::2], small)
    assert np.array_equal(big[:, 1::2, 1::2], small)


def test_help_says_what_there_is(capfd):
    with pytest.raises(SystemExit) as stopped:
        engine.run.main(["--help"])
    assert stopped.value.code == 0
    text = capfd.readouterr().out
    for word in ("--prompt-at", "--image", "--video", "--seconds", "--checkpoint", "--adapter", "--json", "longlive"):
        assert word in text


BAD = [
    ["--preset", "greddy"],
    ["--preset", "nowhere.toml"],
    ["--preset", "unknown.toml"],
    ["--preset", "broken.toml"],
    ["--steps", "fast"],
    ["--steps", "250,500"],
    ["--steps", "1000,0"],
    ["--steps", "1000,nan"],
    ["--steps", ""],
    ["--chunk", "0"],
    ["--chunk", "many"],
    ["--window", "-1"],
    ["--solver", "heun"],
    ["--stop-after", "-1"],
    ["--commit", "noisy"],
    ["--shift", "-5"],
    ["--preset", "longlive", "--window", "4"],
    ["--height", "30"],
    ["--height", "0"],
    ["--width", "-24"],
    ["--width", "wide"],
    ["--fps", "0"],
    ["--fps", "nan"],
    ["--fps", "inf"],
    ["--model", "nowhere"],
    ["--model", "text.txt"],
    ["--model", "empty"],
    ["--image", "nowhere.png"],
    ["--image", "text.txt"],
    ["--image", "empty"],
    ["--image", "cut.png"],
    ["--video", "nowhere.mp4"],
    ["--video", "text.txt"],
    ["--video", "empty"],
    ["--video", "picture.png"],
    ["--video", "-"],
    ["--video", "https://host/clip.mp4"],
    ["--video", "/dev/zero"],
    ["--video", "-nowhere.mp4"],
    ["--image", "-nowhere.png"],
    ["--image", "/dev/zero"],
    ["--image", "picture.png", "--video", "nowhere.mp4"],
    ["--video-frames", "0"],
    ["--frames", "0"],
    ["--frames", "-3"],
    ["--frames", "2.5"],
    ["--seconds", "0"],
    ["--seconds", "-1"],
    ["--seconds", "nan"],
    ["--seconds", "inf"],
    ["--seconds", "1", "--frames", "2"],
    ["--seed", "-1"],
    ["--seed", "18446744073709551616"],
    ["--seed", "lucky"],
    ["--prompt-at", "soon", "a"],
    ["--prompt-at", "-1s", "a"],
    ["--prompt-at", "infs", "a"],
    ["--prompt-at", "1.5f", "a"],
    ["--prompt-at", "1s"],
    ["--prompt-at", "1s", "-a"],
    ["--out", "clip.avi"],
    ["--out", "clip"],
    ["--out", "nowhere/clip.mp4"],
    ["--out", "text.txt/clip.mp4"],
    ["--out", "full/"],
    ["--format", "mp4"],
    ["--format", "mov", "--out", "-"],
    ["--codec", "theora"],
    ["--codec", "h264", "--out", "clip.webm"],
    ["--crf", "99"],
    ["--crf", "20", "--out", "clip.y4m"],
    ["--pix-fmt", "yuv420"],
    ["--pix-fmt", "yuv420p", "--out", "clip.gif"],
    ["--out", "empty.mp4"],
    ["--out", "old_%02d.png"],
    ["--out", "x" * 300 + ".mp4"],
    ["--out", "-", "--json"],
    ["--adapter", "nowhere"],
    ["--adapter", "empty"],
    ["--adapter", "text.txt"],
    ["--adapter", "broken.pt"],
    ["--checkpoint", "nowhere.pt"],
    ["--checkpoint", "broken.pt"],
    ["--checkpoint", "other.pt"],
    ["--checkpoint", "other.safetensors"],
    ["--checkpoint", "text.txt"],
    ["--checkpoint", "other.pt", "--checkpoint-state", "generator_ema"],
    ["--vae-decoder", "nowhere.pt"],
    ["--vae-decoder", "broken.pt"],
    ["--decoder", "small"],
    ["--device", "tpu9"],
    ["--precision", "fp12"],
    ["--backend", "magic"],
    ["--threads", "0"],
    ["--scale", "0"],
    ["--frobnicate"],
    ["surplus"],
]


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "text.txt").write_text("not what you think\n")
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "holiday.png").touch()
    (folder / "empty.mp4").mkdir()
    (folder / "old_00.png").touch()
    (folder / "unknown.toml").write_text("windows = 3\n")
    (folder / "broken.toml").write_text("window = \n")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "picture.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:3000])
    (folder / "broken.pt").write_bytes(b"PK\x03\x04 and then nothing")
    torch.save({"generator": {"head.head.bias": torch.zeros(3)}}, folder / "other.pt")
    save_file({"head.head.bias": torch.zeros(3)}, folder / "other.safetensors")
    return folder


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_bad_input_is_one_line_exit_2_and_no_file(model_dir, bad_files, monkeypatch, capfd, arguments):
    monkeypatch.chdir(bad_files)
    before = listing(bad_files)
    given = arguments if "--out" in arguments else ["--out", "video.mp4", *arguments]
    code = run(model_dir, *given)
    out, err = capfd.readouterr()
    assert code == 2, err
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert listing(bad_files) == before


LATIN_1 = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    "option", ["--prompt", "--image", "--video", "--model", "--checkpoint", "--checkpoint-state", "--adapter",
               "--preset", "--height", "--seed", "--bundle", "--backend", "--device", "--precision", "--out",
               "--format", "--fps"],
)  # fmt: skip
def test_bytes_that_are_no_text_are_one_line_exit_2(model_dir, tmp_path, capfd, option):
    try:
        code = engine.run.main(["--prompt", PROMPT, "--out", "null", option, LATIN_1])
    except SystemExit as stopped:
        code = stopped.code
    err = capfd.readouterr().err
    assert code == 2, err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")


def test_bytes_that_are_no_text_on_a_real_command_line(tmp_path):
    words = [sys.executable, "-m", "engine.run", "--prompt", b"caf\xe9", "--out", "null"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True)
    assert done.returncode == 2
    assert done.stderr == b"error: argument --prompt: got 'caf\\udce9', expected text in UTF-8 (see --help)\n"


@pytest.mark.parametrize("prompt", ["", "  ", None])
def test_a_prompt_is_needed(model_dir, tmp_path, capfd, prompt):
    assert run(model_dir, "--frames", 1, prompt=prompt) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert listing(tmp_path) == []


def test_an_old_file_survives_bad_input_and_failure(model_dir, tmp_path, capfd, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(b"old")
    assert run(model_dir, "--frames", 0, "--out", "clip.mp4") == 2
    assert run(model_dir, "--preset", "greddy", "--out", "clip.mp4") == 2
    calls = []

    def fail(self, latent, cache):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the kernel\nfailed")
        return real(self, latent, cache)

    real = engine.runtime.stages.TorchStages.vae_steady
    monkeypatch.setattr(engine.runtime.stages.TorchStages, "vae_steady", fail)
    capfd.readouterr()
    assert run(model_dir, "--frames", 50, "--out", "clip.mp4", "--quiet") == 1
    assert capfd.readouterr().err == f"error: the kernel; kept 9 frames in {tmp_path}/clip.kept.mp4\n"
    assert (tmp_path / "clip.mp4").read_bytes() == b"old"
    assert listing(tmp_path) == ["clip.kept.mp4", "clip.mp4"]
    assert len(decode(tmp_path / "clip.kept.mp4")) == 9


@pytest.mark.parametrize("target", ["clip.mp4", "clip.webm", "clip.y4m", "clip.gif", "shots/", "shot_%03d.png"])
@pytest.mark.parametrize("error", [ValueError, MemoryError, PermissionError], ids=lambda kind: kind.__name__)
def test_a_failure_in_mid_run_keeps_what_was_made(model_dir, tmp_path, capfd, monkeypatch, target, error):
    """Exit status 1 also for errors that mean bad input at the start."""
    calls = []

    def fail(self, latent, cache):
        calls.append(1)
        if len(calls) == 4:
            raise error("got NaN, expected numbers")
        return real(self, latent, cache)

    real = engine.runtime.stages.TorchStages.vae_steady
    monkeypatch.setattr(engine.runtime.stages.TorchStages, "vae_steady", fail)
    assert run(model_dir, "--frames", 50, "--out", target, "--quiet") == 1
    where = tmp_path if target.startswith("shot_") else tmp_path / target
    assert capfd.readouterr().err == f"error: got NaN, expected numbers; kept 13 frames in {where}\n"
    made = listing(tmp_path)
    assert len([name for name in made if name.endswith("png")]) == 13 if "shot" in target else made == [target]
    if target.startswith("clip") and not target.endswith("gif"):
        assert len(decode(tmp_path / target)) == 13


def test_replacing_is_said(model_dir, tmp_path, capfd):
    assert run(model_dir, "--frames", 1, "--out", "clip.mp4") == 0
    assert "note: replaced" not in capfd.readouterr().err
    assert run(model_dir, "--frames", 1, "--out", "clip.mp4") == 0
    assert f"note: replaced the older {tmp_path}/clip.mp4\n" in capfd.readouterr().err
    assert run(model_dir, "--frames", 1, "--out", "clip.mp4", "--quiet") == 0
    assert capfd.readouterr().err == ""


def test_options_of_the_encoder(model_dir, tmp_path):
    options = ["--codec", "vp9", "--pix-fmt", "yuv444p", "--crf", 10]
    assert run(model_dir, "--frames", 2, "--out", "clip.mkv", *options) == 0
    with av.open("clip.mkv") as container:
        assert container.streams.video[0].codec_context.codec.canonical_name == "vp9"
        assert next(container.decode(video=0)).format.name == "yuv444p"


def test_debug_shows_the_traceback(model_dir):
    with pytest.raises(ValueError, match=r"got 'greddy'"):
        run(model_dir, "--preset", "greddy", "--debug")


def test_signal_handlers_are_given_back(model_dir):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert run(model_dir, "--frames", 1, "--out", "null", "--quiet") == 0
    assert run(model_dir, "--frames", 0, "--out", "null", "--quiet") == 2
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def start(model_dir, *arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "engine.run", "--prompt", PROMPT, "--model", str(model_dir), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options)
    process.cwd = options["cwd"]
    return process


def part_of(process, name, size):
    """The file of a running process beside `name`, once it is larger than `size` bytes."""
    for _ in range(20 * HANG):
        for path in Path(process.cwd).glob(f".{name}.*.part"):
            if path.stat().st_size > size:
                return path
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError(f"{name} did not grow")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
@pytest.mark.slow
def test_ctrl_c_closes_the_file(model_dir, tmp_path, number):
    process = start(model_dir, "--out", "clip.mp4", "--json", cwd=tmp_path)
    part_of(process, "clip.mp4", 20_000)
    process.send_signal(number)
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == 0, err
    assert b"Traceback" not in err
    report = json.loads(out.splitlines()[-1])
    assert report["stopped"] is True
    assert listing(tmp_path) == ["clip.mp4"]
    assert len(decode(tmp_path / "clip.mp4")) == report["frames"] > 10


@pytest.mark.slow
def test_many_signals_at_once(model_dir, tmp_path):
    """An impatient user, or a terminal that closes while Ctrl-C is handled."""
    process = start(model_dir, "--out", "clip.mp4", "--json", cwd=tmp_path)
    part_of(process, "clip.mp4", 20_000)
    for turn in range(30):
        with suppress(ProcessLookupError):
            process.send_signal((signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[turn % 3])
        time.sleep(0.002)
    out, err = process.communicate(timeout=HANG)
    assert listing(tmp_path) == ["clip.mp4"], err
    frames = len(decode(tmp_path / "clip.mp4"))
    assert frames > 10
    if process.returncode == 0:
        assert json.loads(out.splitlines()[-1])["frames"] == frames
    else:  # the last signals met the interpreter's exit
        assert process.returncode < 0


@pytest.mark.slow
def test_a_terminal_that_closes(model_dir, tmp_path):
    """Its hang-up comes while stderr refuses every write: the file is closed all the same."""
    ours, theirs = os.openpty()
    words = [sys.executable, "-m", "engine.run", "--prompt", PROMPT, "--model", str(model_dir), "--out", "clip.mp4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    process = subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=tmp_path, start_new_session=True
    )
    os.close(theirs)
    process.cwd = tmp_path
    part_of(process, "clip.mp4", 20_000)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=HANG) == 0
    assert listing(tmp_path) == ["clip.mp4"]
    assert len(decode(tmp_path / "clip.mp4")) > 10


def test_nohup_keeps_its_meaning():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with engine.commands.interrupt.Interrupt():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_two_runs_to_one_name(model_dir, tmp_path):
    runs = [start(model_dir, "--out", "clip.mp4", "--frames", n, cwd=tmp_path) for n in (17, 41)]
    for process in runs:
        _, err = process.communicate(timeout=HANG)
        assert process.returncode == 0, err
    assert listing(tmp_path) == ["clip.mp4"]
    assert len(decode(tmp_path / "clip.mp4")) in (17, 41)


def test_a_signal_during_a_write_still_counts_the_frame():
    class Interrupted:
        def write(self, frame):
            signal.raise_signal(signal.SIGINT)

    with engine.commands.interrupt.Interrupt() as interrupt:
        with pytest.raises(KeyboardInterrupt):
            interrupt.write(Interrupted(), None)
        assert interrupt.written == 1


def interrupted_at(monkeypatch, owner, name, call):
    """A signal arrives in call number `call` of a method."""
    real, calls = getattr(owner, name), []

    def method(*args, **options):
        calls.append(name)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **options)

    monkeypatch.setattr(owner, name, method)


@pytest.mark.parametrize(
    ("owner", "name", "call", "frames"),
    [
        (engine.runtime.transfer.Download, "wait", 3, 9),  # chunks of 1 and 4 frames: the third is decoded
        (engine.media.sinks.RawSink, "write", 3, 5),  # in the second chunk: the rest of it is written
        (engine.runtime.stages.TorchStages, "run", 14, None),  # while the next chunk is denoised
        (engine.stream.PythonStream, "set_prompt", 1, 5),
    ],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_an_interrupt_writes_what_is_decoded(model_dir, tmp_path, monkeypatch, pipeline, owner, name, call, frames):
    interrupted_at(monkeypatch, owner, name, call)
    words = ["--out", "clip.rgb", "--seed", 2, "--frames", 40, "--quiet", "--prompt-at", "5f", "a blue square"]
    assert run(model_dir, *words) == 0
    monkeypatch.undo()
    got = np.fromfile(tmp_path / "clip.rgb", np.uint8).reshape(-1, *SIZE, 3)
    with pipeline.stream(PROMPT, seed=2) as stream:
        expected = [stream.next_chunk(), stream.next_chunk()]
        stream.set_prompt("a blue square")
        expected = np.concatenate([*expected, *(stream.next_chunk() for _ in range(3))])
    assert len(got) == frames or (frames is None and len(got) % 4 == 1)
    assert np.array_equal(got, expected[: len(got)])


def test_a_second_interrupt_ends_the_writing(model_dir, tmp_path, monkeypatch):
    for call in (3, 4):
        interrupted_at(monkeypatch, engine.media.sinks.RawSink, "write", call)
    assert run(model_dir, "--out", "clip.rgb", "--frames", 40, "--quiet") == 0
    assert (tmp_path / "clip.rgb").stat().st_size == 4 * SIZE[0] * SIZE[1] * 3


@pytest.mark.slow
def test_a_killed_run_leaves_something_to_watch(model_dir, tmp_path):
    process = start(model_dir, "--out", "clip.mp4", cwd=tmp_path)
    part = part_of(process, "clip.mp4", 20_000)
    process.kill()
    process.communicate(timeout=HANG)
    assert listing(tmp_path) == [part.name]
    frames = decode(part)
    assert len(frames) > 10
    assert frames[0].shape == (*SIZE, 3)


@pytest.mark.slow
def test_piped_to_a_reader(model_dir, pipeline, tmp_path):
    """Another process makes the same frames, and a reader that leaves ends the stream in peace."""
    process = start(model_dir, "--out", "-", "--format", "rgb", "--seed", 2, cwd=tmp_path)
    size = SIZE[0] * SIZE[1] * 3
    data = process.stdout.read(21 * size)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=HANG) == 0, err
    assert b"Traceback" not in err
    assert b"Broken" not in err
    with pipeline.stream(PROMPT, seed=2, frames=21) as stream:
        assert data == np.stack(list(stream)).tobytes()
