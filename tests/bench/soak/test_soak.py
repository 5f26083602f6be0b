"""`bench soak` tells a stream that holds from one that leaks, slows down or shows other frames."""

import json
import os
import time
from contextlib import suppress

import numpy as np
import pytest
import torch

from bench.__main__ import main
from bench.report import page
from bench.soak.command import FRESH, Script, soak
from bench.soak.figures import Figures, Sample, growth_mb, verdict

SECONDS = 1.0
SCRIPT = Script(3, ("red", "blue"), 10)


class Stream:
    """Frames that depend on seed, prompt and chunk. `fault(stream)` runs in each chunk, and may change them."""

    def __init__(self, prompt, seed, fault):
        self.prompt, self.seed, self.fault, self.made = prompt, seed, fault, 0

    def set_prompt(self, prompt):
        self.prompt = prompt

    def flush(self):
        self.made = 0

    def next_chunk(self):
        frames = np.full((4, 8, 8, 3), hash((self.seed, self.prompt, self.made)) % 251, np.uint8)
        self.made += 1
        until = time.process_time() + 1e-3
        while time.process_time() < until:
            pass
        return frames + np.uint8(self.fault(self) or 0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Pipeline:
    device = torch.device("cpu")

    def __init__(self, fault=lambda stream: 0):
        self.fault, self.opened = fault, 0

    def stream(self, prompt, seed):
        self.opened += 1
        return Stream(prompt, seed, self.fault)


def red(pipeline):
    """The names of the checks that are red, and the report."""
    report, checks = soak(pipeline, SCRIPT, SECONDS)
    assert report["passed"] == all(check.passed for check in checks)
    return [check.name for check in checks if not check.passed], report


def test_a_stream_that_holds():
    names, report = red(Pipeline())
    assert not names
    assert report["chunks"] == sum(row["chunks"] for row in report["tenths"])
    assert len(report["tenths"]) == 10
    assert report["replayed_chunks"] == report["chunks"]
    assert "10 of 10" in next(check["detail"] for check in report["checks"] if check["name"] == "fresh streams")
    json.dumps(report)


def test_memory_that_grows():
    held = []
    names, report = red(Pipeline(lambda stream: held.append(np.ones(1 << 20, np.uint8)) if stream.made > FRESH else 0))
    assert names == ["memory"]
    assert report["growth"]["memory"]["mb"] > 16


def test_descriptors_that_are_not_closed():
    opened = []
    try:
        names, _ = red(Pipeline(lambda stream: opened.append(os.dup(0)) if stream.made % 20 == 19 else 0))
    finally:
        for descriptor in opened:
            os.close(descriptor)
    assert names == ["descriptors"]


def test_chunks_that_take_longer():
    begun = time.perf_counter()

    def slower(stream):
        if stream.made > FRESH and 0.8 < (time.perf_counter() - begun) / SECONDS < 3:
            until = time.process_time() + 0.02
            while time.process_time() < until:
                pass

    names, report = red(Pipeline(slower))
    assert names == ["p99 of a chunk"]
    assert min(report["late_over_early"].values()) > 2


def test_late_frames_that_are_wrong():
    """Only in the long stream: a fresh one gives others where it comes as far."""
    first = []

    def wrong(stream):
        if stream.made == 1 and len(first) < 2:
            first.append(stream)  # the second one is the long one
        return int(len(first) == 2 and stream is first[1] and stream.made == 30)

    names, report = red(Pipeline(wrong))
    assert names == ["the same again"]
    assert report["replayed_chunks"] == 29


def test_a_stream_that_does_not_start_over(monkeypatch):
    monkeypatch.setattr(Stream, "flush", lambda stream: None)
    assert red(Pipeline())[0] == ["flush"]


def test_fresh_streams_that_begin_otherwise():
    pipeline = Pipeline()
    pipeline.fault = lambda stream: int(pipeline.opened == 5 and stream.made == 2)
    names, _ = red(pipeline)
    assert names == ["fresh streams"]


def test_a_pace_is_held():
    report, _ = soak(Pipeline(), SCRIPT, SECONDS, fps=160.0)
    assert 20 <= report["chunks"] <= 41
    assert report["fps"] == pytest.approx(160, rel=0.5)


def test_growth_is_a_line_through_the_samples():
    samples = [Sample(10.0 * n, 100 + n, 0, 3, 1) for n in range(7)]
    assert growth_mb(samples, "memory_mb") == pytest.approx({"mb": 6, "mb_per_hour": 360})


def test_a_busy_machine_is_no_slow_stream():
    """The clock alone counts what other processes take; both clocks count what the stream loses."""
    figures = Figures(torch.device("cpu"), 1.0)
    figures.samples = [Sample(0.01 * n, 100, 0, 3, 1) for n in range(101)]
    for number in range(100):
        figures.wall.append(10.0 if number < 50 else 90.0)
        figures.cpu.append(10.0)
    assert all(check.passed for check in verdict(figures)[1])
    figures.cpu = figures.wall
    assert [check.name for check in verdict(figures)[1] if not check.passed] == ["p99 of a chunk"]


@pytest.mark.slow
def test_the_command(model_dir, tmp_path, capsys):
    words = ["soak", "--model", str(model_dir), "--minutes", "0.05", "--save", "--results", str(tmp_path)]
    with suppress(SystemExit):
        main(words)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    (file,) = tmp_path.glob("soak-torch-*.json")
    assert json.loads(file.read_text()) == printed
    assert printed["machine"]["versions"]["torch"]
    assert "`torch`, 0 minutes as fast as it could" in page.page(tmp_path, {})
    assert printed["replayed_chunks"] > 20
    assert next(check["passed"] for check in printed["checks"] if check["name"] == "the same again")


@pytest.mark.parametrize("words", [["--minutes", "0"], ["--fps", "-1"], ["--switch", "0"], ["--backend", "aoti"]])
def test_bad_input(words, capsys):
    assert main(["soak", *words]) == 2
    assert capsys.readouterr().err.startswith("error: ")
