"""Writes files and folders whole or not at all, beside their final name, and renames them. Reads JSON within limits.

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
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path
from typing import Any

NAME_BYTES = 255  # longest name of a file on the usual file systems
# Limits of a file of settings, JSON or TOML; those of JSON are also csrc/formats/json.h's.
MOST_TEXT = 1 << 26  # bytes
MOST_DEPTH = 64  # of lists and tables
# Commas and opening brackets, also those in strings: about as many as the file has values.
MOST_MARKS = 1 << 19  # of a manifest; one of a 14B model has 50,000
MOST_MARKS_IN_LISTS = 1 << 21  # of a vocabulary
_SHALLOW = f"expected at most {MOST_DEPTH} levels"
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
def whole_file(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Yields a temporary file name that the caller writes to; after the block that file replaces `path`.

    Others may read it as any new file, whatever its writer did (safetensors keeps it to the owner), unless `private`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own: some writers replace the file that they are given, and its lock would be lost.
    part = Part(path, folder=True)
    try:
        yield part.path / part.target.name
        allowed = part.path.stat().st_mode & 0o666  # by umask: the folder is new
        (part.path / part.target.name).chmod(0o600 if private else allowed)
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


def plain_file(path: Path) -> bool:
    """Whether a file is there. ValueError for anything else of that name, such as a directory or a FIFO."""
    if not os.path.lexists(path):
        return False
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ValueError(f"{path}: got {error.strerror}, expected a file that can be read") from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise ValueError(f"{path}: got {kinds.get(stat.S_IFMT(mode), 'a device')}, expected a file")
    return True


def read_text(path: Path) -> str:
    """A text in UTF-8 of at most MOST_TEXT bytes. ValueError for anything else, FileNotFoundError for nothing."""
    if not plain_file(path):
        raise FileNotFoundError(f"got no file {path}, expected one")
    try:
        with path.open("rb") as opened:  # no file grows past the limit while it is read
            content = opened.read(MOST_TEXT + 1)
    except OSError as error:
        raise ValueError(f"{path}: got {error.strerror}, expected a file that can be read") from None
    if len(content) > MOST_TEXT:
        raise ValueError(f"{path}: got {path.stat().st_size} bytes, expected at most {MOST_TEXT}")
    return _decoded(content, str(path))


def _decoded(content: bytes, where: str) -> str:
    if content.startswith(b"\xef\xbb\xbf"):
        raise ValueError(f"{where}: got a byte order mark, expected UTF-8 without one")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: got a byte at {error.start} that is no UTF-8, expected a text") from None


def check_marks(text: str, where: str, most: int = MOST_MARKS_IN_LISTS) -> None:
    """ValueError for JSON that would take much memory to parse."""
    if (marks := sum(map(text.count, ",[{"))) > most:
        raise ValueError(f"{where}: got JSON with {marks} commas and brackets, expected at most {most}")


def parse_json(text: str | bytes, where: str, most_marks: int = MOST_MARKS_IN_LISTS) -> Any:
    """The value of a JSON text as the C++ core reads it (csrc/formats/json.cpp). ValueError begins with `where`.

    Keys stand once, numbers are finite, strings hold no half of a surrogate pair, and depth ends at MOST_DEPTH.
    """
    text = text if isinstance(text, str) else _decoded(text, where)
    check_marks(text, where, most_marks)

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise ValueError(f"{where}: got key {twice[:60]!r} twice, expected every key once")
        return found

    def number(digits: str) -> float:
        if not isfinite(value := float(digits)):
            raise ValueError(f"{where}: got {digits[:60]}, expected a finite number")
        return value

    try:
        value = json.loads(text, object_pairs_hook=members, parse_float=number, parse_constant=number)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (json.JSONDecodeError, UnicodeEncodeError) as error:
        raise ValueError(f"{where}: got no JSON, expected a value ({error})") from None
    except RecursionError:
        raise ValueError(f"{where}: got no JSON, {_SHALLOW}") from None
    except ValueError as error:
        if str(error).startswith(f"{where}: "):
            raise
        raise ValueError(f"{where}: got a number of too many digits, expected one in range") from None
    if not is_shallow(value):
        raise ValueError(f"{where}: got no JSON, {_SHALLOW}")
    return value


def is_shallow(value: Any) -> bool:
    """Whether lists and tables are nested MOST_DEPTH deep at most."""
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        held = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [child for children in held for child in children]
    return not level


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. FileNotFoundError or ValueError names the file."""
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got {type(value).__name__}, expected a JSON object")
    return value
