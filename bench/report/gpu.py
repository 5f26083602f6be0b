"""What gpu-check and the race found on a GPU, as sections of docs/performance.md."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
LARGEST = 16  # kernels of a chunk that the page names
SHORT = 60  # characters of a kernel's name


def read_lines(file: Path) -> Rows:
    """Every whole line of gpu-check's file; a step that was killed may have left half of one."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def newest_checks(folder: Path) -> dict[str, Rows]:
    """{device: the lines of its newest gpu-check}, by the date and the number in the file's name."""
    found: dict[str, tuple[tuple[str, int], Path]] = {}
    for path in folder.glob("gpu-check-*.jsonl"):
        match = re.fullmatch(r"gpu-check-(.+?)-(\d{4}-\d\d-\d\d)(?:-(\d+))?", path.stem)
        if match:
            age = match[2], int(match[3] or 1)
            if match[1] not in found or found[match[1]][0] < age:
                found[match[1]] = age, path
    return {device: read_lines(path) for device, (_, path) in sorted(found.items())}


def machine_of(rows: Rows) -> dict[str, Any] | None:
    """The conditions; gpu-check's first step writes them."""
    return next((row for row in rows if row["kind"] == "machine"), None)


def _table(rows: Rows, name: str) -> Rows:
    return [row for row in rows if row.get("table") == name]


def _streams(rows: Rows) -> Rows:
    parts = {row["variant"]: row for row in _table(rows, "parts of a chunk")}
    return [
        {
            "stream": r["variant"], "fps": r["fps"], "chunk ms p50": r["ms_p50"], "p99": r["ms_p99"],
            "frames per chunk": r["frames_per_chunk"], "first frame ms": r["first_frame_ms"], "peak MB": r["peak_mb"],
            "warm-up s": r["warm_s"], "TFLOP per chunk": parts.get(r["variant"], {}).get("tflop"),
            "MFU": f"{parts[r['variant']]['mfu']:.0%}" if r["variant"] in parts else None,
            "flows right": "yes" if r["passed"] else "NO",
        }
        for r in rows if r["kind"] == "speed"
    ]  # fmt: skip


def _parts(rows: Rows) -> Rows:
    found = _table(rows, "parts of a chunk")
    names = dict.fromkeys(name for row in found for name in row["parts_ms"])
    return [{"part": name, **{row["variant"]: row["parts_ms"].get(name) for row in found}} for name in names]


def _kernels(rows: Rows) -> Rows:
    found = _table(rows, "kernels of a chunk")[:1]
    return [
        {"kernel": f"`{k['kernel'][:SHORT]}`", "launches": k["launches"], "ms": k["ms"]}
        for row in found for k in sorted(row["kernels"], key=lambda k: -k["ms"])[:LARGEST]
    ]  # fmt: skip


def _operations(rows: Rows) -> Rows:
    return [
        {
            "operation": r["op"], "shape": r["shape"], "error": f"{r['errors']['ours']:.1e}",
            "us": 1e3 * r["ms"]["ours"]["median"], "best library": r["best_library"],
            "its us": 1e3 * r["ms"][r["best_library"]]["median"],
            "time ratio": f"{r['time_ratio']['median']:.2f} [{r['time_ratio']['low']:.2f}, "
            f"{r['time_ratio']['high']:.2f}]",
            "MFU": f"{r['mfu']:.0%}", "of the memory's rate": f"{r['mbu']:.0%}",
        }
        for r in _table(rows, "operations") if r["passed"]
    ]  # fmt: skip


def _checks(rows: Rows) -> Rows:
    return [
        {"step": step, "checks": len(own), "right": sum(row["passed"] for row in own)}
        for step in dict.fromkeys(row["step"] for row in rows if row["kind"] == "check")
        if (own := [row for row in rows if row["kind"] == "check" and row["step"] == step])
    ]


def _long(rows: Rows) -> Rows:
    return [
        {"chunks": r["chunks"], "late / early time": r["slower"], "MB grown": r["grown_mb"]}
        for r in _table(rows, "long stream")
    ]


PARTS: dict[str, tuple[Callable[[Rows], Rows], str]] = {
    "Streams": (_streams, ("Random weights of Wan2.1-1.3B's shape at 832x480. A chunk counts its cache passes, the "
                "full VAE and the copy to the host. MFU is counted against the measured bf16 product.")),
    "Parts of a chunk, ms": (_parts, ("Metered one after the other, so they add up to more than a chunk takes: in a "
                             "stream the VAE overlaps the transformers.")),
    "Kernels of a chunk": (_kernels, "The largest, of the first stream above, while VAE and transformers overlap."),
    "A long stream": (_long, "In FP8."),
    "Operations": (_operations, "Replayed in CUDA graphs on the same inputs, in turn with the library."),
    "Checks": (_checks, ""),
}  # fmt: skip


def check_sections(rows: Rows, markdown: Callable[[Rows], list[str]]) -> list[str]:
    """The tables of a gpu-check, with their headings; empty ones are left out."""
    lines: list[str] = []
    for title, (made, about) in PARTS.items():
        if table := made(rows):
            lines += ["", f"## {title}", *([about, ""] if about else []), *markdown(table)]
    return lines


def race(r: dict[str, Any], markdown: Callable[[Rows], list[str]]) -> list[str]:
    """The race's table."""
    frames = r["stream"]["frames_per_chunk"]
    lines = [(f"Milliseconds per chunk of {frames} frames, cache full, {r['rounds']} rounds in turn; the same random "
             "weights, latents compared first. Ratio: our time over the peer's, median [95% interval]."),
             ""]  # fmt: skip
    lines += markdown([
        {"lane": row["name"], **{stage: ms["median"] for stage, ms in row["stages_ms"].items()},
         "chunk": row["ms_per_chunk"]["median"], "fps": row["fps"],
         **{f"/ {peer}": f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
            for peer, ratio in row["ratios"].items()}}
        for row in sorted(r["lanes"], key=lambda row: -len(row["ratios"]))
    ])  # fmt: skip
    lines += ["", *(f"`{row['name']}`: {row['about']}." for row in r["lanes"])]
    return lines + [f"`{name}` was dropped: {why}." for name, why in r["dropped"].items()]
