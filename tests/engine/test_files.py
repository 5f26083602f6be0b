"""Files and folders appear whole or not at all."""

import json
from pathlib import Path

import pytest

from engine.files import part_of, whole_file, whole_folder, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.bin"
    with whole_file(path) as part:
        part.write_bytes(b"1")
        assert part == part_of(path) == tmp_path / "new" / ".a.bin.part"
        assert not path.exists()
    assert path.read_bytes() == b"1"
    assert names(path.parent) == ["a.bin"]


def test_a_failed_write_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail() -> None:
        with whole_file(path) as part:
            part.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_folder_replaces_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "model"
    part_of(path).mkdir()
    (part_of(path) / "of a killed run").touch()
    path.mkdir()
    (path / "old").touch()
    with whole_folder(path) as part:
        assert names(part) == []
        (part / "new").touch()
        assert names(path) == ["old"]
    assert names(path) == ["new"]
    assert names(tmp_path) == ["model"]


def test_a_failed_folder_leaves_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").touch()

    def fail() -> None:
        with whole_folder(path) as part:
            (part / "half").touch()
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert names(path) == ["old"]
    assert names(tmp_path) == ["model"]


def test_json_ends_its_line(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1]}, indent=2)
    text = (tmp_path / "a.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text) == {"a": [1]}
