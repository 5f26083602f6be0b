"""Statistics, saved results, diff, the page."""

import json
import re
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.commands.concurrent import fairness, largest
from bench.instruments.header import ROOT
from bench.instruments.spread import (
    bootstrap,
    interleaved,
    line_fit,
    paired_ratio,
    power_fit,
    quartiles,
    summary,
    table,
)
from bench.report import page, saved
from bench.report.diff import Timing, compare
from bench.report.gpu import newest_checks, read_lines
from engine.files import write_json

MACHINE = {
    "device": "cpu: Test", "processor": "Test", "cores": 2, "threads": 1, "memory_gb": 8.0, "load_average": 0.1,
    "system": "Linux 6", "versions": {"torch": "2.13.0"}, "commit": "abc", "date": "2026-01-02",
}  # fmt: skip


def test_summary_and_quartiles():
    values = [float(v) for v in range(1, 101)]
    assert summary(values)["p50"] == 50.5
    assert summary(values)["max"] == 100
    assert summary(values)["p99"] == pytest.approx(99.01)
    assert quartiles(values) == {"median": 50.5, "q1": 25.75, "q3": 75.25, "samples": 100}
    with pytest.raises(ValueError, match="expected at least one"):
        summary([])


def test_intervals_hold_the_median_and_narrow():
    few, many = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0] * 20
    for values in (few, many):
        low, high = bootstrap(values)
        assert low <= 3 <= high
    assert bootstrap(many)[1] - bootstrap(many)[0] < bootstrap(few)[1] - bootstrap(few)[0]


def test_pairs_cancel_a_slow_spell():
    spell = [1.0, 1.0, 5.0, 5.0, 5.0, 1.0]
    found = paired_ratio([0.5 * s for s in spell], spell)
    assert found == {"median": 0.5, "low": 0.5, "high": 0.5, "pairs": 6}
    with pytest.raises(ValueError, match="expected as many of both"):
        paired_ratio([1.0], [])


def test_interleaving_gives_everyone_every_place():
    order = [name for _, name, _ in interleaved({"a": int, "b": int, "c": int}, 3)]
    assert order == list("abcbcacab")


def test_fits():
    assert line_fit([1, 2, 3], [5, 7, 9]) == pytest.approx({"slope": 2, "intercept": 3, "r2": 1})
    assert power_fit([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_table_aligns():
    lines = table([{"name": "a", "ms": 1.23456}, {"name": "long", "ms": None}]).splitlines()
    assert lines[0].split() == ["name", "ms"]
    assert len({len(line) for line in lines[:2]}) == 1


@pytest.mark.parametrize("true", [0, 1, 2, 3, 5, 8, 13, 16])
def test_largest_load(true):
    asked = []

    def holds(n):
        asked.append(n)
        return n <= true

    assert largest(holds, 16) == true
    assert len(asked) == len(set(asked)) <= 8


def test_fairness():
    assert fairness([3.0, 3.0, 3.0]) == pytest.approx(1)
    assert fairness([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)


def pytest_benchmark_json(medians):
    stats = {name: {"median": m, "q1": m * 0.98, "q3": m * 1.02} for name, m in medians.items()}
    return {"machine_info": {"cpu": {"brand_raw": "x"}}, "benchmarks": [
        {"fullname": name, "stats": s} for name, s in stats.items()]}  # fmt: skip


def test_diff_flags_what_leaves_the_noise(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(pytest_benchmark_json({"same": 1.0, "slow": 1.0, "quick": 1.0, "gone": 1.0})))
    new.write_text(json.dumps(pytest_benchmark_json({"same": 1.05, "slow": 1.2, "quick": 0.8, "fresh": 1.0})))
    assert main(["diff", str(old), str(new), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {c["name"]: c["verdict"] for c in found["changes"]} == {"same": "", "slow": "slower", "quick": "faster"}
    assert main(["diff", str(old), str(new), "--threshold", "0.3"]) == 0
    out = capsys.readouterr().out
    assert "only in old.json: gone" in out
    assert "only in new.json: fresh" in out
    assert main(["diff", str(new), str(old)]) == 1


def test_diff_forgives_noise():
    wide, later = {"x": Timing(1.0, 0.8, 1.3)}, {"x": Timing(1.2, 1.0, 1.5)}
    assert compare(wide, later)[0].verdict == ""
    assert compare({"x": Timing(1.0, 0.99, 1.01)}, {"x": Timing(1.2, 1.19, 1.21)})[0].verdict == "slower"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"timings": {}}'])
def test_diff_of_something_else(tmp_path, capsys, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    assert main(["diff", str(path), str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["diff", str(tmp_path / "none.json"), str(path)]) == 2


def stream_result(preset="greedy", date="2026-01-02", **changes):
    roofline = {"vae": {}, "sdd": {"gflop": 1.0, "mb": 2.0, "floor_ms": 3.0, "mfu": 0.5}}
    return {
        "machine": MACHINE | {"date": date},
        "stream": {"model": "embedded sprites", "layers": 4, "dim": 128, "preset": preset, "family": "greedy",
                   "width": 32, "height": 32, "precision": "float32", "backend": "torch"},
        "fps": 100.0, "fps_without_vae": 150.0, "fps_without_text": 101.0, "ttff_ms": 30.0, "ttff_warm_ms": 20.0,
        "ms_per_chunk": {"p50": 40.0, "p99": 50.0}, "frames_per_chunk": 4, "peak_memory_mb": 400.0,
        "gflop_per_chunk": 2.5, "mfu": 0.5, "floor_ms": 20.0, "stages_ms": {"sdd": 30.0, "vae": 10.0, "text": 0.0},
        "ceilings": {"flops": 1e11, "bytes": 1e10}, "memory_mb": {"weights": 10.0}, "roofline": roofline,
        "unexplained": 0.001, "arguments": "stream",
    } | changes  # fmt: skip


def test_newest_result_of_each_measurement(tmp_path):
    for name, fps in (("stream-greedy-cpu-2-cores-2026-01-02", 1.0), ("stream-greedy-cpu-2-cores-2026-03-01", 2.0),
                      ("stream-greedy-cpu-8-cores-2025-12-31", 3.0)):  # fmt: skip
        write_json(tmp_path / f"{name}.json", {"fps": fps})
    (tmp_path / "notes.json").write_text("{}")
    found = saved.newest(tmp_path)
    assert {name: r["fps"] for name, r in found.items()} == {
        "stream-greedy-cpu-2-cores": 2.0, "stream-greedy-cpu-8-cores": 3.0}  # fmt: skip


def test_page(tmp_path):
    write_json(tmp_path / "r" / "stream-greedy-cpu-2-cores-2026-01-02.json", stream_result())
    assert main(["report", "--results", str(tmp_path / "r"), "--out", str(tmp_path / "docs" / "page.md")]) == 0
    text = (tmp_path / "docs" / "page.md").read_text()
    assert "| greedy | 100 | 150 | 101 | 30 | 20 | 40 | 50 | 4 | 400 | 2.5 | 50% | 20 |" in text
    assert "cpu: Test, 2 cores, threads: 1" in text
    assert "commit abc" in text
    assert "text" not in [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()]
    assert "Greedy Distill, Table 1" in text
    assert "# On cpu-2-cores" in text
    first = text
    main(["report", "--results", str(tmp_path / "r"), "--out", str(tmp_path / "docs" / "page.md")])
    assert (tmp_path / "docs" / "page.md").read_text() == first


def test_page_without_results(tmp_path, capsys):
    assert main(["report", "--results", str(tmp_path / "none"), "--out", str(tmp_path / "p.md")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["report", "--results", str(tmp_path), "--out", str(tmp_path / "p.md")]) == 0
    assert "No results yet" in (tmp_path / "p.md").read_text()


def test_published_numbers_name_conditions_and_source():
    lines = page._published()
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert len(rows) >= 8
    assert all(len(re.split(r" ?\| ?", row.strip("| "))) >= 7 for row in rows)
    assert all(word in "\n".join(rows) for word in ("24 |", "240", "H100", "832x480"))


def test_saved_results_are_reproducible():
    """Every result in the repository still reads, and the page can be made of them."""
    if not saved.FOLDER.is_dir():
        pytest.skip("no results in this checkout")
    for name, result in saved.newest(saved.FOLDER).items():
        assert name.endswith(saved.device_slug(result["machine"]))
        assert not re.search(r"(^|\s)/\w", result.get("arguments", ""))
    assert page.page(saved.FOLDER, {}).startswith("# Performance")


def test_command_line_is_kept_without_folders():
    line = ["stream", "--model", "/home/x/wan", "--save", "--results", "/tmp/y", "--preset", "greedy"]
    assert saved._arguments(line) == "stream --model wan --preset greedy"


def test_documents_name_every_command():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for command in ("stream", "compare", "scaling", "kernels", "load", "diff", "report", "all", "parity", "fullsize"):
        assert f"bench {command}" in text
    assert isinstance(page.PAGE, Path)


# What gpu-check and a race leave behind.
GPU_MACHINE = {
    "step": "probe", "kind": "machine", "device": "NVIDIA H100", "gpu": "NVIDIA H100", "cores": 16, "threads": 16,
    "load_average": 0.5, "versions": {"torch": "2.11.0"}, "commit": "abc", "date": "2026-11-27",
}  # fmt: skip
SPEED = {
    "step": "greedy", "kind": "speed", "variant": "greedy bf16", "fps": 37.5, "ms_p50": 106.0, "ms_p99": 108.0,
    "frames_per_chunk": 4, "chunks": 45, "first_frame_ms": 57.0, "warm_s": 13.0, "peak_mb": 12446.0, "passed": True,
}  # fmt: skip
GPU_PARTS = {
    "step": "greedy", "kind": "row", "table": "parts of a chunk", "variant": "greedy bf16",
    "parts_ms": {"sdd": 37.0, "vae": 34.0}, "tflop": 45.9, "mfu": 0.56,
}  # fmt: skip
KERNELS = {
    "step": "greedy", "kind": "row", "table": "kernels of a chunk", "variant": "greedy bf16",
    "kernels": [{"kernel": "small", "launches": 9, "ms": 0.1}, {"kernel": "large", "launches": 3, "ms": 31.0}],
}  # fmt: skip
OPERATION = {
    "step": "operations", "kind": "row", "table": "operations", "op": "ring_attention", "shape": "1560 x 4680",
    "passed": True, "errors": {"ours": 0.0023}, "ms": {"ours": {"median": 0.103}, "sdpa cudnn": {"median": 0.133}},
    "best_library": "sdpa cudnn", "time_ratio": {"median": 0.77, "low": 0.76, "high": 0.78}, "mfu": 0.55, "mbu": 0.1,
}  # fmt: skip
CHECK = {"step": "errors", "kind": "check", "name": "ring_attention", "passed": True, "detail": "error 2e-3"}
RACE = {
    "machine": {k: v for k, v in GPU_MACHINE.items() if k not in ("step", "kind")}, "peer": "flashdreams", "rounds": 7,
    "stream": {"frames_per_chunk": 12}, "dropped": {"flashdreams-compiled": "no time left"}, "arguments": "race",
    "lanes": [
        {"name": "flashdreams", "about": "the peer", "ms_per_chunk": {"median": 500.0}, "fps": 24.0, "ratios": {},
         "stages_ms": {"denoise": {"median": 400.0}, "decode": {"median": 100.0}}},
        {"name": "ours", "about": "this engine", "ms_per_chunk": {"median": 250.0}, "fps": 48.0,
         "stages_ms": {"denoise": {"median": 200.0}, "decode": {"median": 80.0}},
         "ratios": {"flashdreams": {"median": 0.5, "low": 0.49, "high": 0.51}}},
    ],
}  # fmt: skip


def written(folder, name, *rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_page_of_a_gpu(tmp_path):
    written(
        tmp_path, "gpu-check-nvidia-h100-2026-11-27.jsonl", GPU_MACHINE, SPEED, GPU_PARTS, KERNELS, OPERATION, CHECK
    )
    written(tmp_path, "race-nvidia-h100-2026-11-27.json", RACE)
    text = page.page(tmp_path, {})
    assert "# On nvidia-h100\n" in text
    assert "NVIDIA H100, 16 cores, threads: 16, torch 2.11.0, 2026-11-27, commit abc" in text
    assert "| greedy bf16 | 37.5 | 106 | 108 | 4 | 57 | 12,446 | 13 | 45.9 | 56% | yes |" in text
    assert "| sdd | 37 |" in text
    assert text.index("| `large` | 3 | 31 |") < text.index("| `small` | 9 | 0.1 |")
    assert "| ring_attention | 1560 x 4680 | 2.3e-03 | 103 | sdpa cudnn | 133 | 0.77 [0.76, 0.78] | 55% | 10% |" in text
    assert "| errors | 1 | 1 |" in text
    assert "## Beside flashdreams" in text
    assert "| ours | 200 | 80 | 250 | 48 | 0.500 [0.490, 0.510] |" in text
    assert "`flashdreams-compiled` was dropped: no time left." in text


def test_the_newest_check_of_a_device(tmp_path):
    for name, number in (("2026-11-26", 1), ("2026-11-27", 2), ("2026-11-27-2", 3), ("2026-11-27-10", 4)):
        written(tmp_path, f"gpu-check-nvidia-h100-{name}.jsonl", {"number": number})
    written(tmp_path, "gpu-check-nvidia-h200-2026-11-25.jsonl", {"number": 5})
    assert newest_checks(tmp_path) == {"nvidia-h100": [{"number": 4}], "nvidia-h200": [{"number": 5}]}


def test_half_a_line_of_a_killed_step_is_left_out(tmp_path):
    (tmp_path / "lines").write_text('{"step": "a", "kind": "check"}\n{"step": "b", "ki')
    assert read_lines(tmp_path / "lines") == [{"step": "a", "kind": "check"}]
    assert read_lines(tmp_path / "none") == []
