"""Builds slow artefacts once, for all processes of a run and for later runs.

An artefact is a directory under CACHE. Its name ends with a hash of everything that decides its content, so no test
reads an old one. A mark beside it shows that it is complete. An interrupted build starts again. `make clean` removes
all artefacts.
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
# Keep the newest two of each kind, and all that were used in the last hours: a run may still read them.
KEPT, HOURS = 2, 3.0
KEY = "[0-9a-f]" * 16


def artefact(kind: str, key: str, make: Callable[[Path], object]) -> Path:
    """The directory that make(directory) filled for `key`, in this or another process. Callers must not change it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = CACHE / f"{kind}-{key}"
    with _locked(CACHE / f"{kind}.lock"):
        if not _mark(folder).exists():
            _remove_old(kind)
            make(folder)
        _mark(folder).touch()
    return folder


def newest(kind: str) -> Path | None:
    """The artefact of this kind that was used last, with any key; None if there is none."""
    marks = _marks(kind)
    return marks[0].with_suffix("") if marks else None


def key_of(*told: object, files: Iterable[Path] = ()) -> str:
    """A hash of values, and of files' names and contents: 16 hex digits."""
    digest = hashlib.sha256(repr(told).encode())
    for file in sorted(files):
        content = file.read_bytes()
        digest.update(f"\n{file.relative_to(ROOT)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def sources(*folders: str) -> list[Path]:
    """Every file in these folders of the repository, except .pyc files."""
    found = (file for folder in folders for file in (ROOT / folder).rglob("*"))
    return [file for file in found if file.is_file() and file.suffix != ".pyc"]


def _mark(folder: Path) -> Path:
    return folder.with_name(folder.name + ".whole")


def _marks(kind: str) -> list[Path]:
    """Marks of complete artefacts, the last used first."""
    return sorted(CACHE.glob(f"{kind}-{KEY}.whole"), key=_age)


def _age(mark: Path) -> float:
    """Hours since an artefact was last used."""
    return (time.time() - mark.stat().st_mtime) / 3600


def _remove_old(kind: str) -> None:
    """Delete old artefacts, and folders without a mark: interrupted builds left them. Call under the lock of `kind`."""
    for mark in [mark for mark in _marks(kind)[KEPT:] if _age(mark) > HOURS]:
        mark.unlink()
    for folder in CACHE.glob(f"{kind}-{KEY}"):
        if not _mark(folder).exists():
            shutil.rmtree(folder)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold an exclusive lock among processes. The system releases it when the process ends."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
