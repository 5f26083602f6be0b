"""What setup.py asks for and constraints.txt pins agree, with each other and with what `make setup` has installed."""

import sys
import sysconfig
from pathlib import Path

import pytest
from declared import ROOT, arguments, closure, installed, lowest, pins, requirements
from packaging.utils import canonicalize_name
from packaging.version import Version

from engine import __version__

# No release of it can be installed where we work (docs/tensorrt.md).
UNPINNED = {"tensorrt"}
SETS = ("constraints.txt", "setup.py")  # what .venv is made of
EXTRAS = sorted(set(arguments()["extras_require"]) - UNPINNED)


def test_every_dependency_is_pinned_within_its_bounds():
    pinned = pins()
    for one in requirements(*EXTRAS):
        assert one.specifier.contains(pinned[canonicalize_name(one.name)]), one


def test_every_dependency_has_one_lower_bound_that_is_no_later_than_its_pin():
    pinned = pins()
    for one in requirements(*EXTRAS):
        name, _, version = lowest(one).partition("==")
        assert Version(version) <= Version(pinned[canonicalize_name(name)]), one


def test_bounds_of_one_package_are_the_same_everywhere():
    bounds: dict[str, set[str]] = {}
    for one in requirements(*EXTRAS):
        bounds.setdefault(one.name, set()).add(str(one.specifier))
    assert {name: found for name, found in bounds.items() if len(found) > 1} == {}


@pytest.mark.parametrize("lacking", ["compiler", "headers"])
def test_a_machine_that_cannot_build_the_core_installs_without_it(monkeypatch, tmp_path, lacking):
    """And does not fail halfway in CMake; GREEDY_NATIVE=1 still insists."""
    if lacking == "compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setattr(sysconfig, "get_config_var", lambda name: str(tmp_path))
    given = arguments("auto")
    assert (given["ext_modules"], given["version"]) == ([], f"{__version__}+without.core")
    assert [one.name for one in arguments("1")["ext_modules"]] == ["engine._C"]


def test_what_dependencies_require_is_pinned_too():
    names = closure(requirements(*EXTRAS), installed())
    assert len(names) > 20
    unpinned = {name for name in names - pins().keys() if not name.startswith(("nvidia-", "cuda-"))}  # with torch
    assert unpinned == set()


def test_setup_installs_the_pins():
    done = Path(sys.prefix) / ".done"
    if not done.exists() or done.stat().st_mtime < max((ROOT / name).stat().st_mtime for name in SETS):
        pytest.skip("`make setup` did not make this environment, or not since its files changed")
    versions = {name: one.version.partition("+")[0] for name, one in installed().items()}
    assert {name: versions.get(name) for name in pins()} == pins()
