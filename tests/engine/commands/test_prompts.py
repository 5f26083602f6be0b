"""The prompts of a command line and of a file: which one the stream gets at which frame, and which are refused."""

import codecs
import hashlib
import io
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from limits import HANG

import engine.run
from engine.commands.prompts import Notes, Prompt, Prompts, frame_of, in_file

ROOT = Path(__file__).parents[3]
RED, BLUE, TEAL = "a red circle moving right", "a blue square on gray", "teal"

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error::UserWarning")]


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(model_dir, *arguments):
    try:
        return engine.run.main(["--model", str(model_dir), *map(str, arguments)])
    except SystemExit as stopped:  # argparse
        return stopped.code


def report_of(capfd, model_dir, *arguments):
    code = run(model_dir, "--json", "--out", "checksum", *arguments)
    out, err = capfd.readouterr()
    assert code == 0, err
    report = json.loads(out.strip().splitlines()[-1])
    report["notes"] = [note for note in report["notes"] if "prompt" in note]  # not what others note
    said = [line for line in err.splitlines() if line.startswith("note: ") and "prompt" in line]
    assert said == [f"note: {note}" for note in report["notes"]]
    return report


def checksum(pipeline, frames, switches, recommit=True):
    """Of a stream that gets each prompt at its frame, through the Python interface."""
    shown = []
    with pipeline.stream(switches[0], frames=frames) as stream:
        for at in sorted(set(switches) - {0}):
            shown += islice(stream, at - len(shown))
            stream.set_prompt(switches[at], recommit=recommit)
        shown += stream
    return hashlib.sha256(np.stack(shown).tobytes()).hexdigest()


def test_the_report_says_at_which_frame_each_prompt_came(model_dir, pipeline, capfd):
    report = report_of(
        capfd, model_dir, "--frames", 17, "--prompt", RED, "--prompt-at", "9f", TEAL, "--prompt-at", "6f", BLUE
    )
    assert report["prompts"] == [{"frame": 0, "prompt": RED}, {"frame": 9, "prompt": TEAL}]
    # Frame 6 lies inside the chunk of frames 5 to 8, and at 9 the later one takes its place.
    assert report["notes"] == ["--prompt-at 6f has no effect: --prompt-at 9f replaces it before a chunk begins"]
    assert report["sha256"] == checksum(pipeline, 17, {0: RED, 9: TEAL})


@pytest.mark.parametrize("order", [(BLUE, TEAL), (TEAL, BLUE)])
def test_of_two_at_one_time_the_last_one_given_wins(model_dir, pipeline, capfd, order):
    options = ["--prompt-at", "5f", order[0], "--prompt-at", "0.625s", order[1]]
    report = report_of(capfd, model_dir, "--frames", 9, "--prompt", RED, *options)
    assert report["prompts"][1:] == [{"frame": 5, "prompt": order[1]}]
    assert report["sha256"] == checksum(pipeline, 9, {0: RED, 5: order[1]})
    assert report["notes"] == ["--prompt-at 5f has no effect: --prompt-at 0.625s replaces it before a chunk begins"]


def test_one_at_frame_0_replaces_the_first_and_says_so(model_dir, pipeline, capfd):
    report = report_of(capfd, model_dir, "--frames", 5, "--prompt", RED, "--prompt-at", "0", BLUE)
    assert report["prompts"] == [{"frame": 0, "prompt": BLUE}]
    assert report["notes"] == ["--prompt has no effect: --prompt-at 0 replaces it before a chunk begins"]
    assert report["sha256"] == checksum(pipeline, 5, {0: BLUE})


def test_one_inside_the_last_chunk_is_noted(model_dir, pipeline, capfd):
    report = report_of(capfd, model_dir, "--frames", 9, "--prompt", RED, "--prompt-at", "6f", BLUE)
    assert report["prompts"] == [{"frame": 0, "prompt": RED}]
    (note,) = report["notes"]
    assert note.startswith("--prompt-at 6f has no effect: prompts switch where a chunk begins")
    assert report["sha256"] == checksum(pipeline, 9, {0: RED})


def test_a_transition_is_that_of_the_interface(model_dir, pipeline, capfd):
    """The report says which prompt acted from which frame on, and where it was reached."""
    options = ["--prompt-at", "5f", BLUE, "--prompt-at", "13f", TEAL, "--transition", 2]
    report = report_of(capfd, model_dir, "--frames", 17, "--prompt", RED, "--blend", TEAL, "0.25", *options)
    mixed = [{"text": RED, "weight": 1.0}, {"text": TEAL, "weight": 0.25}]
    assert report["prompts"] == [
        {"frame": 0, "prompt": mixed},
        {"frame": 5, "prompt": BLUE, "transition": 2, "reached": 9},
        {"frame": 13, "prompt": TEAL, "transition": 2, "reached": None},
    ]
    shown = []
    with pipeline.stream([(RED, 1.0), (TEAL, 0.25)], frames=17) as stream:
        for at, prompt in ((5, BLUE), (13, TEAL)):
            shown += islice(stream, at - len(shown))
            stream.set_prompt(prompt, transition=2)
        shown += stream
    assert report["sha256"] == hashlib.sha256(np.stack(shown).tobytes()).hexdigest()


def test_long_prompts_are_noted_each_once(model_dir, capfd):
    options = ["--prompt", "red " * 40, "--prompt-at", "5f", "blue " * 40, "--prompt-at", "9f", "blue " * 40]
    notes = report_of(capfd, model_dir, "--frames", 13, *options)["notes"]
    assert [note[:51] for note in notes] == ["the prompt has 41 tokens, the model reads 16: the r"] * 2
    assert 'from "red red' in notes[0]
    assert 'from "blue blue' in notes[1]
    assert run(model_dir, "--frames", 1, "--prompt", "red " * 40, "--out", "null", "--quiet") == 0
    assert capfd.readouterr().err == ""


FILES = {
    "plain": (RED.encode(), {0: RED}),
    "with a last line feed": (RED.encode() + b"\r\n", {0: RED}),
    "several lines": (b"a red circle\nmoving right\n\n", {0: RED}),
    "UTF-8 with a mark": (codecs.BOM_UTF8 + RED.encode(), {0: RED}),
    "UTF-16 LE": (codecs.BOM_UTF16_LE + RED.encode("utf-16-le"), {0: RED}),
    "UTF-16 BE": (codecs.BOM_UTF16_BE + RED.encode("utf-16-be"), {0: RED}),
    "a time": (f"{RED}\n[5f] {BLUE}\n".encode(), {0: RED, 5: BLUE}),
    "times": (f"[0s]{RED}\n\n[0.625s]\na blue\nsquare on gray\n[9f]\t{TEAL}".encode(), {0: RED, 5: BLUE, 9: TEAL}),
    "times in another order": (f"[0f] {RED}\n[9f] {TEAL}\n [5f] {BLUE}\n".encode(), {0: RED, 5: BLUE, 9: TEAL}),
    "brackets that are no time": (b"[red] a [3s] [4] circle\n[5f] teal", {0: "[red] a [3s] [4] circle", 5: TEAL}),
}


@pytest.mark.parametrize("name", FILES)
def test_prompts_from_a_file(model_dir, pipeline, capfd, tmp_path, name):
    content, switches = FILES[name]
    (tmp_path / "prompts.txt").write_bytes(content)
    report = report_of(capfd, model_dir, "--frames", 13, "--prompt-file", "prompts.txt")
    assert [one["frame"] for one in report["prompts"]] == list(switches)
    assert report["sha256"] == checksum(pipeline, 13, switches)
    assert report["notes"] == []


def test_a_file_and_more_prompts(model_dir, pipeline, capfd, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{RED}\n[5f] {TEAL}")
    report = report_of(capfd, model_dir, "--frames", 9, "--prompt-file", "prompts.txt", "--prompt-at", "5f", BLUE)
    assert report["notes"] == [
        "--prompt-file prompts.txt line 2 has no effect: --prompt-at 5f replaces it before a chunk begins"
    ]
    assert report["sha256"] == checksum(pipeline, 9, {0: RED, 5: BLUE})


def test_prompts_from_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("a réd circle\n[2s] teal".encode())))
    assert in_file("-", 8) == [
        Prompt(0, "a réd circle", "--prompt-file -"), Prompt(16, " teal", "--prompt-file - line 2"),
    ]  # fmt: skip


BLANK = ["", "  ", "\n", "\u200b", "\x01", "\u3164", "&nbsp;"]
BAD = [
    *(["--prompt", text] for text in BLANK),
    *(["--prompt", RED, "--prompt-at", "1s", text] for text in BLANK),
    [],
    ["--prompt", RED, "--prompt-file", "good.txt"],
    ["--prompt", RED, "--prompt-at", "9f", BLUE],
    ["--prompt", RED, "--prompt-at", "10f", BLUE],
    ["--prompt", RED, "--prompt-at", "99s", BLUE],
    ["--prompt", RED, "--prompt-at", "nans", BLUE],
    ["--prompt", RED, "--prompt-at", "", BLUE],
    ["--prompt", "re\udce9d"],
    ["--prompt", RED, "--prompt-at", "1s", "re\udce9d"],
    ["--prompt", "&amp;" * 5000],
    *(["--prompt-file", name] for name in (
        "nowhere.txt", "folder", "empty.txt", "blank.txt", "latin.txt", "binary.bin", "utf16.txt", "half.txt",
        "late.txt", "past.txt", "negative.txt", "hole.txt", "closed.txt",
        "good.txt/inside", "nul.txt",
    )),
]  # fmt: skip


@pytest.fixture
def bad_files(tmp_path):
    (tmp_path / "folder").mkdir()
    for name, content in {
        "good.txt": RED.encode(),
        "empty.txt": b"",
        "blank.txt": b"\n \n\xe2\x80\x8b\n",
        "latin.txt": "a réd circle".encode("latin-1"),
        "binary.bin": bytes(range(256)),
        "utf16.txt": RED.encode("utf-16-le"),  # without a mark it has NUL characters
        "half.txt": codecs.BOM_UTF16_LE + b"a",
        "late.txt": b"[3f] red",
        "past.txt": b"red\n[9f] blue",
        "negative.txt": b"red\n[-1s] blue",
        "hole.txt": b"red\n[2f]\n[5f] blue",
        "nul.txt": b"a red\0 circle",
    }.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "closed.txt").write_text(RED)
    (tmp_path / "closed.txt").chmod(0)
    return tmp_path


@pytest.mark.parametrize("arguments", BAD, ids=lambda arguments: ascii(" ".join(arguments))[:60])
def test_bad_prompts_are_one_line_exit_2_and_no_file(model_dir, bad_files, monkeypatch, capfd, arguments):
    if "closed.txt" in arguments and os.access(bad_files / "closed.txt", os.R_OK):
        pytest.skip("this user may read every file")
    before = sorted(bad_files.iterdir())
    monkeypatch.setattr(engine.run, "_load", None)  # prompts are checked before weights are read
    code = run(model_dir, "--frames", 9, *arguments)
    out, err = capfd.readouterr()
    assert code == 2, err
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith(("error: --prompt", "error: argument --prompt")), err
    assert sorted(bad_files.iterdir()) == before


@pytest.mark.parametrize(
    "options", [["--prompt", b"a r\xe9d circle"], ["--prompt", b"red", "--prompt-at", "1s", b"r\xe9d"]]
)
def test_bytes_of_latin_1_on_a_real_command_line(model_dir, tmp_path, options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "engine.run",
        "--model",
        str(model_dir),
        "--out",
        "null",
        "--frames",
        "1000",
        *options,
    ]
    ran = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path, timeout=HANG)
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.startswith(b"error: argument --prompt")
    assert b"expected text in UTF-8" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize(("when", "frame"), [("3.0s", 24), ("3", 24), ("48f", 48), ("0", 0), ("1e1s", 80)])
def test_times(when, frame):
    assert frame_of(when, 8, "--prompt-at") == frame


def test_a_stream_without_end_takes_prompts_at_any_time():
    notes = Notes(quiet=True)
    prompts = Prompts([Prompt(0, RED, "a"), Prompt(10**9, BLUE, "b"), Prompt(3, TEAL, "c")], None, notes)
    assert [prompts.due(at) for at in (0, 1, 5, 9, 10**9, 10**9 + 4)] == [RED, None, TEAL, None, BLUE, None]
    assert notes == []
