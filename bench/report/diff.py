"""Two results side by side: what got slower, beyond 10% and beyond the noise of both.

Reads saved results of this harness and pytest-benchmark's JSON alike.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.instruments.spread import table
from engine.weights.sources import read_json


@dataclass(frozen=True)
class Timing:
    median: float
    q1: float
    q3: float


@dataclass(frozen=True)
class Change:
    """`ratio` is new over old; `verdict` slower, faster or empty."""

    name: str
    old: float
    new: float
    ratio: float
    verdict: str


def timings(result: dict[str, Any], path: Path) -> dict[str, Timing]:
    """Median and quartiles by name, in the file's own unit."""
    if "benchmarks" in result:
        return {b["fullname"]: Timing(*(b["stats"][k] for k in ("median", "q1", "q3"))) for b in result["benchmarks"]}
    if not result.get("timings"):
        raise ValueError(f"{path}: got no timings, expected a saved result or pytest-benchmark's JSON")
    return {name: Timing(t["median"], t["q1"], t["q3"]) for name, t in result["timings"].items()}


def _machine(result: dict[str, Any]) -> str:
    if "machine" in result:
        return f"{result['machine']['device']}, {result['machine']['threads']} threads"
    info = result.get("machine_info", {})
    return f"{info.get('cpu', {}).get('brand_raw', '')} {info.get('cpu', {}).get('count', '')}".strip()


def compare(old: dict[str, Timing], new: dict[str, Timing], threshold: float = 0.10) -> list[Change]:
    """Changes of what both hold. Flagged is a median beyond the threshold whose middle half leaves the other's."""
    changes = []
    for name in [name for name in old if name in new]:
        a, b = old[name], new[name]
        ratio = b.median / a.median if a.median else 1.0
        verdict = ""
        if ratio > 1 + threshold and b.q1 > a.q3:
            verdict = "slower"
        elif ratio < 1 / (1 + threshold) and b.q3 < a.q1:
            verdict = "faster"
        changes.append(Change(name, a.median, b.median, ratio, verdict))
    return changes


def run(args: argparse.Namespace) -> int:
    before, after = read_json(args.old), read_json(args.new)
    old, new = timings(before, args.old), timings(after, args.new)
    changes = compare(old, new, args.threshold)
    if not changes:
        raise ValueError(f"got no timing that {args.old.name} and {args.new.name} share, expected at least one")
    machines = _machine(before), _machine(after)
    slower = [c for c in changes if c.verdict == "slower"]
    if args.json:
        print(json.dumps({"changes": [vars(c) for c in changes], "slower": len(slower), "machines": machines}))
    else:
        if machines[0] != machines[1]:
            print(f"different machines: {machines[0]} against {machines[1]}")
        print(table([{"timing": c.name, "old": c.old, "new": c.new, "ratio": c.ratio, "": c.verdict} for c in changes]))
        for name in sorted(set(old) ^ set(new)):
            print(f"only in {(args.old if name in old else args.new).name}: {name}")
        print(f"{len(slower)} of {len(changes)} slower")
    return 1 if slower else 0


def add_parser(commands: Any) -> None:
    command = commands.add_parser("diff", help="two saved results: what got slower beyond noise; exit 1 if anything")
    command.add_argument("old", type=Path)
    command.add_argument("new", type=Path)
    command.add_argument("--threshold", type=float, default=0.10, help="share of time that counts (0.10)")
    command.add_argument("--json", action="store_true", help="print the result as one JSON line")
    command.set_defaults(run=run)
