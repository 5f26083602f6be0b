"""Writes docs/licences.md: what an installation brings, package by package, with versions, sizes and licences.

`make docs-licences` runs it in the environment of `make setup`, from what the packages say about themselves.
"""

import re
from importlib.metadata import Distribution

from declared import ROOT, arguments, closure, installed, requirements

# Libraries under the GPL that packages under other licences bring along in their wheels: their metadata does not tell.
GPL = re.compile(r"\blib(x264|x265)\b")
HEAD = """# Licences of what an installation brings

Written by `make docs-licences` from the metadata of the packages that `make setup` installs, on Linux with Python 3.11
and torch for processors. The names and licences are the packages' own words. What this means for you:
[install.md](install.md#licences).
Greedy-stream itself, and the embedded model, are Apache-2.0.
"""


def licence(package: Distribution) -> str:
    """The expression, the field or the classifiers: the first that says something short."""
    about = package.metadata
    classifiers = [one.split(" :: ")[-1] for one in about.get_all("Classifier") or [] if one.startswith("License :: ")]
    named = [one for one in classifiers if one != "OSI Approved"]
    field = (about.get("License") or "").strip()
    field = "" if "\n" in field or len(field) > 60 or field == "UNKNOWN" else field
    return about.get("License-Expression") or field or ", ".join(named) or "not said"


def megabytes(package: Distribution) -> float:
    files = [file.locate() for file in package.files or []]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def copyleft(package: Distribution) -> str:
    """The libraries under the GPL inside, as a part of the sentence."""
    found = sorted({f"lib{match[1]}" for file in package.files or [] if (match := GPL.search(file.name))})
    return f"; **with {', '.join(found)}: GPL-2.0-or-later**" if found else ""


def table(names: list[str], there: dict[str, Distribution]) -> str:
    rows = []
    for name in names:
        package = there[name]
        rows.append(
            f"| {name} | {package.version} | {megabytes(package):.1f} | {licence(package)}{copyleft(package)} |"
        )
    return "\n".join(["| package | version | MB | licence |", "|---|---|---|---|", *rows])


def page() -> str:
    there = installed()
    core = closure(requirements(), there)
    parts = [HEAD, f"## Without an extra: {size(core, there)}", table(sorted(core), there)]
    for extra in sorted(arguments()["extras_require"]):
        more = closure(requirements(extra), there) - core
        parts.append(f"## `{extra}`: " + (f"{size(more, there)} more" if more else "was not installed"))
        if more:
            parts.append(table(sorted(more), there))
    return "\n\n".join(parts) + "\n"


def size(names: set[str], there: dict[str, Distribution]) -> str:
    total = sum(megabytes(there[name]) for name in names)
    return f"{total / 1e3:.1f} GB" if total > 1000 else f"{total:.0f} MB"


if __name__ == "__main__":
    (ROOT / "docs" / "licences.md").write_text(page(), encoding="utf-8")
