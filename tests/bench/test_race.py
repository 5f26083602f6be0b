"""The race: limits and progress of the protocol, dropped lanes, red checks; the peer, also as an oracle."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.adapters import flashdreams_wheel, given, lanes
from bench.adapters.lanes import Lane
from bench.adapters.protocol import Adapter, AdapterError, Video
from bench.commands import race
from bench.instruments.header import ROOT

wheel = pytest.mark.skipif(find_spec("flashdreams") is None, reason="no flashdreams: pip install 'greedy-stream[race]'")

# A lane without torch, in one of several states of health. It starts in a fraction of a second.
TOY = """
import json, os, sys, time
kind = sys.argv[1]

def say(**answer):
    print(json.dumps(answer), flush=True)

for line in sys.stdin:
    request = json.loads(line)
    op = request["op"]
    if op == "open":
        if kind == "refuses":
            say(error="no weights")
        elif kind == "dies":
            sys.exit(3)
        else:
            say(ok=True, about=f"toy of {request['dtype']}", fills=2)
    elif op == "latents":
        import numpy as np
        from safetensors.numpy import save_file
        made = np.random.default_rng(0).standard_normal((request["chunks"], 1, 4, 3, 2, 2)).astype(np.float32)
        made = made * {"off": 1.001, "nan": np.nan}.get(kind, 1)
        if kind != "empty":
            save_file({f"chunk_{i}": x for i, x in enumerate(made)}, request["file"])
        say(ok=True)
    elif op == "warm":
        say(ok=True, captured=None)
    elif op == "chunks":
        for made in range(request["chunks"]):
            time.sleep(60 if kind == "hangs" else 0.02 if kind == "slow" else 0.002)
            say(frames=12 * made)
        say(ok=True)
    elif op == "stages":
        names = ("denoise", "context", "decode")[: 2 if kind == "short" else 3]
        say(ok=True, ms={name: [1.0] * request["chunks"] for name in names})
    else:
        say(ok=True)
        break
"""
REPLAYED = {
    "chunk3_global", "chunk1_global", "chunk3_local6_sink0", "chunk3_local6_sink1", "chunk3_local6_sink3",
    "chunk1_local6_sink1", "chunk1_local2_sink1", "chunk1_local3_sink1_sddlike", "chunk3_i2v_init3", "chunk1_1step",
}  # fmt: skip


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Command of a toy of some kind; `ours` is a good one."""
    path = tmp_path / "toy.py"
    path.write_text(TOY)
    monkeypatch.setitem(lanes.LANES, "ours", Lane((sys.executable, str(path), "good")))
    return lambda kind: (sys.executable, str(path), kind)


@pytest.fixture
def raced(toy, capsys):
    """Race `ours` with toys: (exit status, the last line's JSON or None, stderr)."""

    def run(kinds, *options):
        adapters = [part for kind in kinds for part in ("--adapter", f"{kind}={' '.join(toy(kind))}")]
        status = main(["race", "--device", "cpu", "--lanes", "ours", "--rounds", "3", "--json", *adapters, *options])
        out, err = capsys.readouterr()
        return status, json.loads(out) if out else None, err

    return run


def test_lanes_take_turns(raced):
    status, found, err = raced(["slow"])
    assert status == 0, err
    assert (found["rounds"], found["complete"], found["dropped"]) == (3, True, {})
    rows = {row["name"]: row for row in found["lanes"]}
    assert rows["ours"]["about"] == "toy of fp32"
    assert rows["ours"]["stages_ms"]["decode"] == {"median": 1, "q1": 1, "q3": 1, "samples": 9}
    assert rows["ours"]["ms_per_chunk"]["samples"] == 9
    assert rows["ours"]["fps"] == pytest.approx(12e3 / rows["ours"]["ms_per_chunk"]["median"])
    ratio = rows["ours"]["ratios"]["slow"]
    assert ratio["pairs"] == 3
    assert ratio["low"] <= ratio["median"] <= ratio["high"] < 1
    assert rows["slow"]["ratios"] == {}
    assert [c["name"] for c in found["checks"]] == ["latents of slow"]


def test_the_table_says_the_same(raced, capsys, toy):
    assert main(["race", "--device", "cpu", "--lanes", "ours", "--rounds", "1", "--adapter",
                 f"slow={' '.join(toy('slow'))}"]) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "denoise" in out
    assert "/ slow" in out
    assert json.loads(out.splitlines()[-1])["lanes"][0]["name"] == "ours"


@pytest.mark.slow
def test_what_fails_is_dropped_and_the_others_go_on(raced, monkeypatch):
    monkeypatch.setitem(lanes.SHARES, "chunks", 0.02)
    status, found, err = raced(["slow", "dies", "refuses", "hangs", "empty", "short"], "--budget", "60")
    assert status == 1
    assert found["dropped"].keys() == {"dies", "refuses", "hangs", "empty", "short"}
    assert "got no latents in its file" in found["dropped"]["empty"]
    assert found["dropped"]["short"] == "got stages denoise, context, expected denoise, context, decode"
    assert "exit status 3" in found["dropped"]["dies"]
    assert found["dropped"]["refuses"] == "no weights"
    assert "got no answer to chunks in 1 s" in found["dropped"]["hangs"]
    assert "hangs is dropped" in err
    rows = {row["name"]: row for row in found["lanes"]}
    assert rows.keys() == {"ours", "slow"}
    assert rows["ours"]["ratios"]["slow"]["pairs"] == 3


def test_late_red_latents_void_what_was_saved(raced, toy, monkeypatch, tmp_path):
    monkeypatch.setitem(lanes.LANES, "late", Lane(toy("off"), "flashdreams", compiles=True))
    monkeypatch.setattr(flashdreams_wheel, "version", lambda name: "0")
    status, found, err = raced(["slow"], "--lanes", "ours,late", "--save", "--results", str(tmp_path))
    assert (status, found) == (1, None)
    assert "error: latents of late" in err
    (file,) = tmp_path.glob("*.json")
    saved = json.loads(file.read_text())
    assert saved["lanes"] == []
    assert [c["passed"] for c in saved["checks"]] == [True, False]


@pytest.mark.parametrize("kind", ["off", "nan"])
def test_other_latents_have_no_numbers(raced, kind):
    status, found, err = raced([kind, "slow"])
    assert (status, found) == (1, None)
    assert f"error: latents of {kind}: rms error" in err
    assert "so there are no numbers" in err
    assert "ms per chunk" not in err


def test_without_ours_there_is_nothing_to_compare_with(raced, toy, monkeypatch):
    monkeypatch.setitem(lanes.LANES, "ours", Lane(toy("dies")))
    status, found, err = raced(["slow"])
    assert (status, found) == (1, None)
    assert "error: latents of ours: got no answer to open" in err


@pytest.mark.slow
def test_the_budget_ends_it_with_the_numbers_so_far(raced, tmp_path, monkeypatch):
    for op in ("open", "latents"):
        monkeypatch.setitem(lanes.SHARES, op, 0.8)  # so that a machine that is busy drops nobody
    begun = time.perf_counter()
    status, found, _ = raced(["slow"], "--rounds", "100000", "--budget", "8", "--save", "--results", str(tmp_path))
    assert time.perf_counter() - begun < 60
    assert status == 0
    assert not found["complete"]
    assert 0 < found["rounds"] < 1000
    (saved,) = tmp_path.glob("race-cpu-*.json")
    assert json.loads(saved.read_text()) == found


def test_rounds_are_saved_as_they_come(raced, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(race.saved, "store", lambda options, command, report, *_: kept.append(report) or tmp_path)
    assert raced(["slow"], "--save")[0] == 0
    assert [(r["rounds"], r["complete"]) for r in kept] == [(0, False), (1, False), (2, False), (3, False), (3, True)]
    assert all(r["lanes"] for r in kept[1:])


def test_what_compiles_comes_last(raced, toy, monkeypatch):
    monkeypatch.setitem(lanes.LANES, "late", Lane(toy("slow"), "flashdreams", compiles=True))
    monkeypatch.setattr(flashdreams_wheel, "version", lambda name: "0")
    status, found, err = raced(["good"], "--lanes", "ours,late")
    assert status == 0
    lines = [line.split()[2] for line in err.splitlines() if line.startswith("round")]
    assert lines[:2] == ["ours", "good"]
    assert {row["name"]: row["ms_per_chunk"]["samples"] for row in found["lanes"]} == {"ours": 9, "late": 6, "good": 9}
    assert found["lanes"][0]["ratios"]["late"]["pairs"] == 2


def missing(name):
    raise PackageNotFoundError(name)


@pytest.mark.parametrize(("options", "message"), [
    ([], "flashdreams: got no installed wheel, expected one (pip install 'greedy-stream[race]')"),
    (["--peer", "tortoise"], "--peer: got 'tortoise', expected flashdreams"),
    (["--lanes", "ours,hare"], "--lanes: got 'hare', expected some of ours, flashdreams on a processor"),
    (["--lanes", "ours-fp8,flashdreams"], "--lanes: got 'ours-fp8'"),
    (["--lanes", "ours"], "--lanes: got ours, expected ours and at least one of another engine"),
    (["--lanes", "flashdreams"], "--lanes: got flashdreams, expected ours"),
    (["--adapter", "ours=x"], "--adapter: got 'ours=x'"),
    (["--adapter", "x"], "--adapter: got 'x'"),
    (["--shape", "wan2.1-1.3b"], "expected a small --height and --width"),
    (["--height", "33"], "height: got 33, expected a positive multiple of 16"),
    (["--rounds", "0"], "--rounds: got 0, expected at least 1"),
    (["--budget", "0.5"], "--budget: got 0.5, expected at least 1"),
])  # fmt: skip
def test_bad_input(capsys, monkeypatch, options, message):
    monkeypatch.setattr(flashdreams_wheel, "version", missing)
    assert main(["race", "--device", "cpu", *options]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err
    assert len(err.splitlines()) == 1


def test_steady_chunks_of_a_video():
    filling = [(1.0, 9), (3.0, 21), (5.0, 33)]
    steady = [(5.12, 45), (5.24, 57), (5.48, 69)]
    video = Video(69, 5.5, [*filling, *steady])
    assert video.steady_ms_per_frame(fills=3) == pytest.approx(10)
    assert video.steady_ms_per_frame(fills=1) == pytest.approx(20)  # of 167, 167, 10, 10, 20
    assert Video(69, 5.5, [*filling, *steady]).steady_ms_per_frame(fills=20) == video.steady_ms_per_frame(1)
    assert Video(50, 5.0, [(5.0, 50)]).steady_ms_per_frame(fills=7) == pytest.approx(100)
    assert Video(50, 5.0, []).steady_ms_per_frame() == pytest.approx(100)


def test_a_late_answer_ends_the_process_and_what_it_started(tmp_path):
    note = tmp_path / "pid"
    body = 'sleep 600 & echo $! > "$0"; wait'
    with pytest.raises(AdapterError, match="adapter late: got no answer to open in 3 s"):
        Adapter("late", ["sh", "-c", body, str(note)], {}, limit=3)
    child = int(note.read_text())
    for _ in range(50):
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":  # ended; its new parent may not have asked yet
            return
        time.sleep(0.1)
    pytest.fail("the child still runs")


def test_chunks_leave_out_the_first(toy):
    with Adapter("toy", list(toy("slow")), {"dtype": "fp32"}) as adapter:
        assert adapter.fills == 2
        times = adapter.chunks(4)
        assert len(times) == 4
        assert max(times) > 0.01  # a line that is read late makes the next ones seem early
        assert min(times) < 1
        assert adapter.stages(2)["denoise"] == [1, 1]


def test_a_miscount_is_an_error():
    body = ("import json\nfor line in iter(input, ''):\n  print(json.dumps({'frames': 3}), flush=True)\n"
            "  print(json.dumps({'ok': True, 'ms': {'denoise': [1.0]}}), flush=True)")  # fmt: skip
    with Adapter("toy", [sys.executable, "-c", body], {}) as adapter:
        with pytest.raises(AdapterError, match="got 1 lines for chunks, expected 3"):
            adapter.chunks(2)
        with pytest.raises(AdapterError, match="expected 2 milliseconds of each"):
            adapter.stages(2)


def test_a_signal_leaves_as_an_exception_does():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit), race.ended_by_signal():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_latents_of_another_shape_are_red(tmp_path):
    file = str(tmp_path / "latents.safetensors")
    given.write_latents(file, [torch.ones(1, 4, 3, 2, 2), torch.ones(1, 4, 3, 2, 2)])
    truth = given.read_latents(file)
    assert race.compared("x", truth, truth, 0.0).passed
    found = race.compared("x", truth, truth[:1], 1.0)
    assert not found.passed
    assert found.detail.startswith("got [[1, 4, 3, 2, 2], [1, 4, 3, 2, 2]], expected [[1, 4, 3, 2, 2]]")


@pytest.mark.parametrize("weights", [{"shape": "huge"}, {"shape": "tiny", "sed": 1}, {}])
def test_weights_are_named_in_full(weights):
    with pytest.raises(ValueError, match="expected shape"):
        given.random_of({"weights": weights})


@wheel
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.thorough)])
def test_the_race_itself(capsys, precision, tmp_path):
    """Both engines on a processor: in bf16 their latents only agree where ours rounds timesteps as the peer does."""
    line = ["race", "--peer", "flashdreams", "--device", "cpu", "--precision", precision, "--rounds", "2"]
    assert main([*line, "--chunks", "1", "--json", "--logs", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["lanes"]}
    assert rows.keys() == {"ours", "flashdreams"}
    assert rows["ours"]["ratios"]["flashdreams"]["pairs"] == 2
    assert all(ms["median"] > 0 for row in rows.values() for ms in row["stages_ms"].values())
    assert rows["flashdreams"]["about"].startswith(f"flashdreams {version('flashdreams')}, {precision}, eager, 4 steps")
    assert found["checks"][0]["passed"]
    assert found["machine"]["versions"]["flashdreams"]
    assert {path.name for path in tmp_path.iterdir()} == {"ours.log", "flashdreams.log"}


@wheel
@pytest.mark.thorough
def test_the_peer_streams_a_model_from_disk(model_dir):
    """As `bench compare --adapter flashdreams` asks for it: prompts, frames as they come, no shared noise."""
    settings = {"model": str(model_dir), "height": 32, "width": 48, "threads": 1, "device": "cpu", "dtype": "fp32"}
    with Adapter("flashdreams", [sys.executable, "-m", "bench.adapters.flashdreams"], settings) as adapter:
        assert adapter.fills == 7
        for _ in range(2):
            video = adapter.generate("a red circle", 0, 30)
            assert [frames for _, frames in video.progress] == [9, 21, 30]
        with pytest.raises(AdapterError, match="got no text"):
            adapter.ask("warm")


@wheel
@pytest.mark.slow
def test_the_peer_replays_recorded_cases():
    """An independent implementation gives what the public code recorded, and our VAE's frames."""
    command = [sys.executable, str(ROOT / "tests" / "bench" / "peer_oracle.py"), str(ROOT / "tests/data/causal")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    errors = {line["case"]: line["error"] for line in lines if "error" in line}
    # Five passes per chunk. The compiled network sees a full cache alone.
    assert [line for line in lines if line["case"] == "compiled"] == [
        {"case": "compiled", "calls": [[5 * 7, 5 * 6], [2 * 5 * 7, 5 * 6 + 5 * 2]], "same": True}
    ]
    assert errors.pop("vae") <= 2e-5
    assert errors.keys() == REPLAYED
    assert max(errors.values()) <= 2e-5
    assert {line["case"]: line["skipped"] for line in lines if "skipped" in line} == {
        "chunk3_global_b2": "its modulation does not spread over a batch",
        "chunk3_first1": "it has no first chunk of another size",
        "chunk3_bf16": "it rounds timesteps to bf16",
        "diag_chunk3_local12_sink3": "it ends every chunk with a context pass",
        "diag_chunk3_local6_sink3": "it ends every chunk with a context pass",
        "ffe_chunk1_4_1": "it has one list of steps for all chunks",
        "ffe_chunk1_4_2": "it has one list of steps for all chunks",
        "ffe_chunk3_4_1": "it has one list of steps for all chunks",
    }
