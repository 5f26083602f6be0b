"""What tests build is built once, whole, by one process, and again only where something that decides it has changed."""

import multiprocessing
import os
import time
from pathlib import Path

import artefacts
import pytest
from artefacts import artefact, key_of
from selection import FIRST

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(artefacts, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def build(folder):
    folder.mkdir()
    time.sleep(0.05)
    with (folder.parent / "built").open("a") as log:
        log.write(f"{folder.name}\n")
    (folder / "file").write_text("whole")


def built(cache):
    return (cache / "built").read_text().splitlines()


def test_a_second_call_builds_nothing(cache):
    first = artefact("kind", key_of(1), build)
    assert artefact("kind", key_of(1), build) == first
    assert (first / "file").read_text() == "whole"
    assert artefact("kind", key_of(2), build) != first
    assert len(built(cache)) == 2


def test_many_processes_build_once(cache):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=artefact, args=("kind", key_of(1), build)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(built(cache)) == 1


def test_a_build_that_was_cut_off_is_begun_again(cache):
    def cut_off(folder):
        folder.mkdir()
        (folder / "half").touch()
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        artefact("kind", key_of(1), cut_off)
    folder = artefact("kind", key_of(1), build)
    assert [file.name for file in folder.iterdir()] == ["file"]


def test_keys_know_names_and_contents(tmp_path, monkeypatch):
    monkeypatch.setattr(artefacts, "ROOT", tmp_path)
    for name, text in (("a", "x"), ("b", "y")):
        (tmp_path / name).write_text(text)
    key = key_of("option", files=[tmp_path / "a", tmp_path / "b"])
    assert key == key_of("option", files=[tmp_path / "b", tmp_path / "a"])
    assert key != key_of("another", files=[tmp_path / "a", tmp_path / "b"])
    (tmp_path / "b").write_text("z")
    assert key != key_of("option", files=[tmp_path / "a", tmp_path / "b"])


def test_old_ones_go_but_for_the_newest_and_those_in_use(cache):
    for number in range(5):
        artefact("kind", key_of(number), build)
    marks = sorted(cache.glob("*.whole"))
    old = time.time() - 2 * 3600 * artefacts.HOURS
    for mark in marks:
        os.utime(mark, (old, old))
    kept = artefact("kind", key_of(0), build)  # in use again
    artefact("kind", key_of(5), build)
    names = {folder.name for folder in cache.iterdir() if folder.is_dir()}
    assert kept.name in names
    assert len(names) == artefacts.KEPT + 1
    assert len(list(cache.glob("*.whole"))) == len(names)
    artefact("other", key_of(0), build)
    assert artefacts.newest("kind") == cache / f"kind-{key_of(5)}"


def test_files_that_come_first_exist():
    names = {path.name for path in TESTS.rglob("test_*.py")}
    assert set(FIRST) <= names
