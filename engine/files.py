"""Writes files and folders beside their final name and renames them, so that they appear whole or not at all.

    with whole_file(path) as part:
        part.write_bytes(data)      # after the block path exists, complete; an error leaves path unchanged

Every write has a temporary name of its own, `.<name>.<token>.part`, and locks it while the process lives. So two
processes that write one name do not meet: both results are whole, and the one that ends last stays.
A killed process can leave its temporary file behind. The next whole write of that name deletes it.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAME_BYTES = 255  # longest name of a file on the usual file systems
MOST_JSON = 32 << 20  # bytes
_TOKEN_BYTES = len(".12345678.part")


class Part:
    """A temporary file, or folder, beside `target`. It belongs to this process alone until one of its methods ends it.

    A symbolic link is followed: the file that it names is written. OSError where nothing can be made there.
    """

    def __init__(self, path: Path, folder: bool = False) -> None:
        self.target = Path(os.path.realpath(path))
        self.folder = folder
        self._lock = -1
        while self._lock < 0:
            self.path = _spare(self.target)
            with suppress(FileExistsError):
                self._lock = self._make()

    def _make(self) -> int:
        """Create `path`, which must be new, and lock it; -1 if another process took it for a left one meanwhile."""
        _create(self.path, self.folder)
        try:
            held = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return -1
        with suppress(OSError):  # some file systems have no locks; there no process finds what others left
            fcntl.flock(held, fcntl.LOCK_EX)
        return held if _is_at(held, self.path) else -1

    def replace(self) -> bool:
        """Give the part its final name. True if it replaced an older file or folder."""
        older = os.path.lexists(self.target)
        if self.folder:
            self._replace_folder()
        else:
            os.replace(self.path, self.target)
        self._release()
        return older

    def _replace_folder(self) -> None:
        aside: list[Path] = []
        try:
            while True:
                try:
                    os.replace(self.path, self.target)  # where nothing is, or an empty folder
                    break
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                aside.append(_spare(self.target))
                os.rename(self.target, aside[-1])
        except BaseException:
            with suppress(OSError):
                os.rename(aside.pop(), self.target) if aside else None
            raise
        finally:
            for older in aside:
                shutil.rmtree(older, ignore_errors=True)

    def keep(self) -> Path:
        """Give the part a name that nothing has: the final one, else <stem>.kept<suffix>. Returns that name.

        Where no name can be given, such as in a directory that is gone, the part stays where it is.
        """
        stem, suffix = self.target.stem, self.target.suffix
        spare = (_short(stem, f".kept{f'-{n}' if n else ''}{suffix}") for n in range(1000))
        for name in map(self.target.with_name, (self.target.name, *spare)):
            try:
                _create(name, self.folder)  # of two processes only one succeeds
            except FileExistsError:
                continue
            except OSError:
                break
            try:
                os.replace(self.path, name)
                self.path = name
            except OSError:
                _delete(name)  # it is empty
            break
        self._release()
        return self.path

    def drop(self) -> None:
        """Delete the part."""
        _delete(self.path)
        self._release()

    def _release(self) -> None:
        held, self._lock = self._lock, -1
        if held >= 0:
            os.close(held)


def left_over(path: Path) -> list[Path]:
    """Temporary files and folders for `path` of processes that have ended, killed most likely."""
    target = Path(os.path.realpath(path))
    start, found = re.escape(_short(f".{target.name}", "", _TOKEN_BYTES)), []
    with suppress(OSError):
        for name in sorted(os.listdir(target.parent)):
            if re.fullmatch(rf"{start}(\.[0-9a-f]{{8}})?\.part", name) and _is_free(target.with_name(name)):
                found.append(target.with_name(name))
    return found


def _is_free(path: Path) -> bool:
    """Whether no process holds the lock of `path`."""
    try:
        held = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _is_at(held, path)
    except OSError:
        return False
    finally:
        os.close(held)


def _is_at(held: int, path: Path) -> bool:
    """Whether the open file `held` still has the name `path`."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(held), os.stat(path))
    return False


def _create(path: Path, folder: bool) -> None:
    """Create an empty file or folder. FileExistsError where something is."""
    if folder:
        path.mkdir()
    else:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))


def _spare(target: Path) -> Path:
    """A temporary name beside `target` that nothing else has."""
    return target.with_name(_short(f".{target.name}", f".{secrets.token_hex(4)}.part"))


def _short(stem: str, rest: str, reserved: int = 0) -> str:
    """The name stem + rest, with the stem cut where a file system would refuse so many bytes."""
    return os.fsdecode(os.fsencode(stem)[: NAME_BYTES - reserved - len(os.fsencode(rest))]) + rest


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary file name that the caller writes to; after the block that file replaces `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own: some writers replace the file that they are given, and its lock would be lost.
    part = Part(path, folder=True)
    try:
        yield part.path / part.target.name
        os.replace(part.path / part.target.name, part.target)
    finally:
        part.drop()
    _sweep(part.target)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a new, empty folder that the caller fills; after the block that folder replaces `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Part(path, folder=True)
    try:
        yield part.path
        part.replace()
    finally:
        part.drop()
    _sweep(part.target)


def _sweep(target: Path) -> None:
    """Delete what killed processes left. Only after a whole write: before it that might be all there is."""
    for part in left_over(target):
        _delete(part)


def write_json(path: Path, content: Any, indent: int = 1) -> None:
    """Write a whole JSON file that ends with a line break."""
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most 32 MB. FileNotFoundError or ValueError names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"got no file {path}, expected one")
    if (size := path.stat().st_size) > MOST_JSON:
        raise ValueError(f"{path}: got JSON of {size} bytes, expected at most {MOST_JSON}")
    value = json_value(path.read_bytes(), path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got {type(value).__name__}, expected a JSON object")
    return value


def json_value(text: str | bytes, label: object) -> Any:
    """The value of JSON in UTF-8. ValueError for what is none, is nested too deeply, or names a thing twice."""
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ValueError(f"{label}: got JSON that is nested too deeply, expected an object") from None
    except ValueError as error:
        raise ValueError(f"{label}: got no JSON, expected an object ({error})") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's entries. Of two with one name each reader takes another one, so neither is right."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:60]!a} twice")
    return table
