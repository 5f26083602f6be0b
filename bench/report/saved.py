"""Results on disk: one JSON file per measurement. Its content and its name hold the machine and the date."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.instruments.header import ROOT
from engine.files import read_json, write_json
from engine.options import command_line, option

FOLDER = ROOT / "bench" / "results"


@dataclass(frozen=True, kw_only=True)
class Printed:
    """Options: how a result is printed."""

    json: bool = option(False, "print only the result, as one JSON line")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Options: the folder of saved results."""

    results: Path = option(FOLDER, "where results are saved", metavar="DIR")


@dataclass(frozen=True, kw_only=True)
class Reported(Printed, Stored):
    """Options: how a measurement reports."""

    save: bool = option(False, "also write the result to --results, named by device and date")


def device_slug(machine: dict[str, Any]) -> str:
    """'cpu-2-cores', 'nvidia-h200'."""
    name = machine.get("gpu") or f"cpu {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _arguments(line: list[str]) -> str:
    """The command line without the options and the folders that only matter on this machine."""
    kept, skip = [], False
    for argument in line:
        if not skip and argument not in ("--save", "--results"):
            kept.append(Path(argument).name if "/" in argument else argument)
        skip = argument == "--results"
    return " ".join(kept)


def store(options: Reported, command: str, result: dict[str, Any], variant: str = "") -> Path:
    """Write a result to its file, over an earlier one of the day; returns the file.

    Its name starts with the command and, where there is one, the variant.
    """
    result["arguments"] = _arguments([command, *command_line(options)])
    name = f"{command}-{variant}" if variant else command
    path = options.results / f"{name}-{device_slug(result['machine'])}-{result['machine']['date']}.json"
    write_json(path, result)
    return path


def emit(options: Reported, command: str, result: dict[str, Any], variant: str = "") -> None:
    """Store the result where --save asks for it, then print it: it is the last line of stdout."""
    if options.save:
        print(f"saved {store(options, command, result, variant).name}", file=sys.stderr)
    print(json.dumps(result), flush=True)


def newest(folder: Path) -> dict[str, dict[str, Any]]:
    """{"stream-greedy-cpu-2-cores": result}: the newest result of each measurement, by the date in its name."""
    found: dict[str, tuple[str, Path]] = {}
    for path in sorted(folder.glob("*.json")):
        match = re.fullmatch(r"(.+)-(\d{4}-\d\d-\d\d)", path.stem)
        if match and (match[1] not in found or found[match[1]][0] < match[2]):
            found[match[1]] = match[2], path
    return {name: read_json(path) for name, (_, path) in sorted(found.items())}
