"""What takes long to build is built once, for all processes of a run and for the runs after it.

An artefact is a directory under CACHE. Its name ends with a hash of everything that decides what is in it, so
nothing reads an old one. A mark beside it says that it is whole. A build that was cut off is begun again.
`make clean` removes all of them.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("GREEDY_TEST_CACHE") or ROOT / ".pytest_cache" / "artefacts")
# Of each kind the newest two are kept, and all that a run of the last hours may still be reading.
KEPT, HOURS = 2, 3.0
KEY = "[0-9a-f]" * 16


def artefact(kind: str, key: str, make: Callable[[Path], object]) -> Path:
    """The directory that make(directory) has filled for `key`, by this process or by another. Not to be changed."""
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = CACHE / f"{kind}-{key}"
    with _locked(CACHE / f"{kind}.lock"):
        if not _mark(folder).exists():
            _remove_old(kind)
            make(folder)
        _mark(folder).touch()
    return folder


def newest(kind: str) -> Path | None:
    """The artefact of this kind that was used last, whatever its key."""
    marks = _marks(kind)
    return marks[0].with_suffix("") if marks else None


def key_of(*told: object, files: Iterable[Path] = ()) -> str:
    """A hash of values, and of files with their names."""
    digest = hashlib.sha256(repr(told).encode())
    for file in sorted(files):
        content = file.read_bytes()
        digest.update(f"\n{file.relative_to(ROOT)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def sources(*folders: str) -> list[Path]:
    """Every file of these folders of the repository that Python or a compiler may read."""
    found = (file for folder in folders for file in (ROOT / folder).rglob("*"))
    return [file for file in found if file.is_file() and file.suffix != ".pyc"]


def _mark(folder: Path) -> Path:
    return folder.with_name(folder.name + ".whole")


def _marks(kind: str) -> list[Path]:
    """Those of whole artefacts, the one used last first."""
    return sorted(CACHE.glob(f"{kind}-{KEY}.whole"), key=_age)


def _age(mark: Path) -> float:
    """Hours since an artefact was last used."""
    return (time.time() - mark.stat().st_mtime) / 3600


def _remove_old(kind: str) -> None:
    """Called under the lock of `kind`: what has no mark is left of a build that was cut off."""
    for mark in [mark for mark in _marks(kind)[KEPT:] if _age(mark) > HOURS]:
        mark.unlink()
    for folder in CACHE.glob(f"{kind}-{KEY}"):
        if not _mark(folder).exists():
            shutil.rmtree(folder)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Alone among processes; the lock falls with the process that holds it."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
