"""Two results side by side: which timings got slower by more than 10% and by more than the noise of both.

Reads saved results of this harness and pytest-benchmark's JSON.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.instruments.spread import table
from bench.report.saved import Printed
from engine.files import read_json
from engine.options import option


@dataclass(frozen=True, kw_only=True)
class Options(Printed):
    old: Path = option(help="a saved result", metavar="OLD.json", positional=True)
    new: Path = option(help="a later one", metavar="NEW.json", positional=True)
    threshold: float = option(0.10, "share of time that counts")


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
    """Changes of the timings that both hold.

    A change is flagged where the median moved by more than the threshold and the two middle halves do not overlap.
    """
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


def run(options: Options) -> int:
    before, after = read_json(options.old), read_json(options.new)
    old, new = timings(before, options.old), timings(after, options.new)
    changes = compare(old, new, options.threshold)
    if not changes:
        raise ValueError(f"got no timing that {options.old.name} and {options.new.name} share, expected at least one")
    machines = _machine(before), _machine(after)
    slower = [c for c in changes if c.verdict == "slower"]
    if options.json:
        print(json.dumps({"changes": [vars(c) for c in changes], "slower": len(slower), "machines": machines}))
    else:
        if machines[0] != machines[1]:
            print(f"different machines: {machines[0]} against {machines[1]}")
        print(table([{"timing": c.name, "old": c.old, "new": c.new, "ratio": c.ratio, "": c.verdict} for c in changes]))
        for name in sorted(set(old) ^ set(new)):
            print(f"only in {(options.old if name in old else options.new).name}: {name}")
        print(f"{len(slower)} of {len(changes)} slower")
    return 1 if slower else 0
