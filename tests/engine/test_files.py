"""Files and folders appear whole or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from limits import BARE
from safetensors.torch import save_file

from engine.files import left_over, whole_file, whole_folder, write_json

ROOT = Path(__file__).parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.bin"
    with whole_file(path) as part:
        part.write_bytes(b"1")
        assert part.name == "a.bin"
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
    for name in (".model.part", ".model.0123abcd.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "of a killed run").touch()
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


WRITER = """
import sys, time
from pathlib import Path
from engine.files import whole_file, whole_folder

kind, path, text = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
with (whole_file if kind == "file" else whole_folder)(path) as part:
    for n in range(3):
        (part if kind == "file" else part / f"{n}").write_text(text)
    print("writing", flush=True)
    sys.stdin.readline()
"""


def writer(kind: str, path: Path, text: str) -> subprocess.Popen:
    """A process that has written all of `text`, and waits for a line before it gives the path its name."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", BARE + WRITER, kind, str(path), text], env=environment, **pipes)
    assert process.stdout.readline() == "writing\n"
    return process


def content(path: Path) -> list[str]:
    return [file.read_text() for file in sorted(path.iterdir())] if path.is_dir() else 3 * [path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_processes_that_write_one_name_do_not_meet(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.bin"
    writers = [writer(kind, path, str(number)) for number in range(3)]
    assert len(names(tmp_path)) == 3
    assert left_over(path) == []
    for number in (1, 2, 0):
        writers[number].communicate("\n")
        assert writers[number].returncode == 0
        assert content(path) == 3 * [str(number)]
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_killed_process_leaves_the_older_and_the_next_write_clears(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.bin"
    whole = whole_file if kind == "file" else whole_folder
    for text in ("old", "new"):
        killed, living = writer(kind, path, "killed"), writer(kind, path, "living")
        killed.kill()
        killed.communicate()
        assert len(left_over(path)) == 1
        with whole(path) as part:
            (part if kind == "file" else part / "0").write_text(text)
            assert len(left_over(path)) == 1  # until the new one is whole
        assert content(path)[0] == text
        assert left_over(path) == []
        assert len(names(tmp_path)) == 2  # the living one's too
        living.communicate("\n")
        assert content(path)[0] == "living"
    assert names(tmp_path) == ["a.bin"]


def test_a_writer_may_replace_the_file_that_it_is_given(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a.safetensors") as part:
        part.write_bytes(b"")
        (part.parent / "other").write_bytes(b"1")
        (part.parent / "other").replace(part)
        assert left_over(tmp_path / "a.safetensors") == []
    assert (tmp_path / "a.safetensors").read_bytes() == b"1"
    assert names(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("private", [False, True])
def test_others_may_read_what_safetensors_writes(tmp_path: Path, private: bool) -> None:
    """As any new file of this umask, or, if it is private, not at all."""
    (tmp_path / "plain").touch()
    with whole_file(tmp_path / "a.safetensors", private=private) as part:
        save_file({"a": torch.zeros(1)}, part)
    expected = 0o600 if private else (tmp_path / "plain").stat().st_mode & 0o777
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == expected


def test_the_file_behind_a_link_is_written(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "far" / "a.json")
    (tmp_path / "model").symlink_to(tmp_path / "far" / "m")
    write_json(tmp_path / "link.json", [1])
    with whole_folder(tmp_path / "model") as part:
        (part / "new").touch()
    assert json.loads((tmp_path / "far" / "a.json").read_text()) == [1]
    assert names(tmp_path / "far") == ["a.json", "m"]
    assert (tmp_path / "model" / "new").exists()
    assert (tmp_path / "model").is_symlink()


def test_the_longest_names(tmp_path: Path) -> None:
    name = "ü" * 127 + "x"  # 255 bytes
    with whole_file(tmp_path / name) as part:
        part.touch()
        with whole_file(tmp_path / name) as other:
            other.write_text("other")
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_text() == ""


def test_the_new_file_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_json(tmp_path / "a.json", [])
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_ends_its_line(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1]}, indent=2)
    text = (tmp_path / "a.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text) == {"a": [1]}
