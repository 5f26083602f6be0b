"""Results on disk: one JSON a measurement, with the machine and the date in it and in its name."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from bench.instruments.header import ROOT
from engine.weights.sources import read_json

FOLDER = ROOT / "bench" / "results"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """How every measurement reports."""
    command.add_argument("--json", action="store_true", help="print only the result, as one JSON line")
    command.add_argument("--save", action="store_true", help="also write it to --results, named by device and date")
    command.add_argument("--results", type=Path, default=FOLDER, metavar="DIR", help="default: bench/results")


def device_slug(machine: dict[str, Any]) -> str:
    """'cpu-2-cores', 'nvidia-h200'."""
    name = machine.get("gpu") or f"cpu {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _arguments(given: list[str]) -> str:
    """The command line without what is only about this machine's folders."""
    kept, skip = [], False
    for argument in given:
        if not skip and argument not in ("--save", "--results"):
            kept.append(Path(argument).name if "/" in argument else argument)
        skip = argument == "--results"
    return " ".join(kept)


def emit(args: argparse.Namespace, name: str, result: dict[str, Any]) -> None:
    """Save where asked; the result is the last line of stdout."""
    if args.save:
        result["arguments"] = _arguments(sys.argv[1:])
        path = args.results / f"{name}-{device_slug(result['machine'])}-{result['machine']['date']}.json"
        write(path, result)
        print(f"saved {path.name}", file=sys.stderr)
    print(json.dumps(result), flush=True)


def write(path: Path, result: dict[str, Any]) -> None:
    """A file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def newest(folder: Path) -> dict[str, dict[str, Any]]:
    """{"stream-greedy-cpu-2-cores": result}: the newest of every measurement, by the date in its name."""
    found: dict[str, tuple[str, Path]] = {}
    for path in sorted(folder.glob("*.json")):
        match = re.fullmatch(r"(.+)-(\d{4}-\d\d-\d\d)", path.stem)
        if match and (match[1] not in found or found[match[1]][0] < match[2]):
            found[match[1]] = match[2], path
    return {name: read_json(path) for name, (_, path) in sorted(found.items())}
