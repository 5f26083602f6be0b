"""What setup.py declares: its arguments, without a build; and the lowest version of each package that they allow.

`python tests/installing/declared.py EXTRA...` prints pins of the lowest versions, for `make test-lowest`.
"""

import os
import runpy
import sys
import sysconfig
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from unittest import mock

import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def arguments(native: str = "0") -> dict[str, Any]:
    """The keyword arguments that setup.py hands to setuptools.setup, with this GREEDY_NATIVE."""
    found: dict[str, Any] = {}
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        with (
            mock.patch.dict(os.environ, GREEDY_NATIVE=native),
            mock.patch.object(setuptools, "setup", lambda **given: found.update(given)),
        ):
            runpy.run_path(str(ROOT / "setup.py"))
    finally:
        os.chdir(before)
    return found


def requirements(*extras: str) -> list[Requirement]:
    """What an installation with these extras asks for on this platform."""
    given = arguments()
    lines = [*given["install_requires"], *(line for extra in extras for line in given["extras_require"][extra])]
    asked = [Requirement(line) for line in lines]
    return [one for one in asked if one.marker is None or one.marker.evaluate()]


def pins() -> dict[str, str]:
    """Package -> version, of constraints.txt."""
    lines = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    return {canonicalize_name(name): version for name, version in lines}


def installed() -> dict[str, Distribution]:
    """Of this environment alone: setuptools puts packages of its own on sys.path."""
    found = distributions(path=[sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    return {canonicalize_name(one.name): one for one in found}


def closure(asked: list[Requirement], there: dict[str, Distribution]) -> set[str]:
    """The names of these requirements and of all that they require in turn, as far as installed."""
    names, seen = set(), set()
    while asked:
        one = asked.pop()
        name = canonicalize_name(one.name)
        if (name, *one.extras) in seen or name not in there:
            continue
        seen.add((name, *one.extras))
        names.add(name)
        further = map(Requirement, there[name].requires or [])
        asked += [
            more for more in further
            if more.marker is None or any(more.marker.evaluate({"extra": extra}) for extra in ("", *one.extras))
        ]  # fmt: skip
    return names


def lowest(requirement: Requirement) -> str:
    """`name==version` of its lower bound."""
    bounds = [one.version for one in requirement.specifier if one.operator in (">=", "==")]
    if len(bounds) != 1:
        raise ValueError(f"setup.py: got {requirement}, expected one lower bound")
    return f"{requirement.name}=={bounds[0]}"


if __name__ == "__main__":
    print("\n".join(sorted({lowest(one) for one in requirements(*sys.argv[1:]) if one.name != "torch"})))
