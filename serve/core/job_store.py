"""Jobs on disk: a folder for each one, which outlives the server, also one that is killed.

DIR/lock                          held by the server that uses DIR
DIR/video_0123.../job.json        the job, always whole
                  start.npy       the picture that its video starts from, uint8 [1, H, W, 3]
                  video.mp4       once it is completed
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from engine.files import read_json, write_json
from engine.media.base import shown
from engine.options import read

log = logging.getLogger("serve")
ENDED = ("completed", "failed")
_ID = re.compile(r"video_[0-9a-f]{24}")  # no text of a client is ever part of a path


@dataclass(frozen=True)
class Job:
    """A video that is to be made, is being made, or was made. Times are Unix seconds."""

    id: str
    model: str
    height: int  # of the model's frames
    width: int
    fps: float
    prompt: str
    seed: int
    frames: int
    scale: int = 1  # enlarges every pixel of the video
    adapters: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what the client should know
    created: float = 0.0
    status: str = "queued"  # queued, in_progress, completed, failed
    tries: int = 0  # how often it was begun
    ended: float | None = None
    expires: float | None = None
    error_code: str = ""
    error: str = ""
    key: str = ""  # the client's name for the request, and a hash of what it asked for
    digest: str = ""
    fleeting: bool = False  # somebody waits for it, so a restart forgets it

    @property
    def seconds(self) -> float:
        return self.frames / self.fps

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the video."""
        return self.height * self.scale, self.width * self.scale


def new_id() -> str:
    return f"video_{secrets.token_hex(12)}"


class Store:
    """The folder of one server's jobs. None makes a temporary one, which `close` deletes.

    ValueError where another server uses it, NotADirectoryError or PermissionError where it cannot be used.
    """

    def __init__(self, directory: Path | None) -> None:
        self._temporary = None if directory else tempfile.TemporaryDirectory(prefix="greedy-jobs-")
        self.directory = Path(self._temporary.name) if self._temporary else Path(directory or "").absolute()
        self._lock = -1
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            kind = NotADirectoryError if isinstance(error, NotADirectoryError | FileExistsError) else PermissionError
            expected = f"a folder that can be written ({error.strerror})"
            raise kind(f"--jobs-dir: got {shown(self.directory)}, expected {expected}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(self._lock)
                got = f"{shown(self.directory)}, which another server uses"
                raise ValueError(f"--jobs-dir: got {got}, expected a folder of this server's own") from None
            log.warning("%s has no locks: let no other server use it", shown(self.directory))

    def load(self) -> list[Job]:
        """All jobs, the oldest first. What a killed server left half made or half deleted is removed.

        A job that cannot be read is left as it is, with a warning.
        """
        found = []
        for folder in sorted(self.directory.iterdir()):
            if not _ID.fullmatch(folder.name) or not folder.is_dir():
                continue
            if not (folder / "job.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
                continue
            try:
                job = read(Job, read_json(folder / "job.json"), str(folder / "job.json"))
                if job.id != folder.name:
                    raise ValueError(f"{folder / 'job.json'}: got the id {job.id}, expected {folder.name}")
            except (ValueError, OSError) as error:
                log.warning("a job is left out: %s", shown(str(error)))
            else:
                found.append(job)
        return sorted(found, key=lambda job: (job.created, job.id))

    def add(self, job: Job, start: np.ndarray | None) -> None:
        """Keep a new job, and the picture uint8 [1, H, W, 3] that it starts from. OSError leaves nothing."""
        try:
            self._folder(job.id).mkdir()
            if start is not None:
                np.save(self._folder(job.id) / "start.npy", start, allow_pickle=False)
            self.save(job)
        except BaseException:
            self.remove(job.id)
            raise

    def save(self, job: Job) -> None:
        """Replace what is kept of a job."""
        write_json(self._folder(job.id) / "job.json", asdict(job))

    def start(self, name: str) -> np.ndarray | None:
        """The picture uint8 [1, H, W, 3] that a job starts from, if it has one."""
        file = self._folder(name) / "start.npy"
        return np.load(file, allow_pickle=False) if file.exists() else None

    def video(self, name: str) -> Path:
        """Where a job's video is, or will be."""
        return self._folder(name) / "video.mp4"

    def clean(self, name: str) -> None:
        """Remove all files of a video, parts of it too; the job stays."""
        with suppress(OSError):
            for entry in self._folder(name).iterdir():
                if entry.name not in ("job.json", "start.npy"):
                    _remove(entry)

    def forget(self, name: str) -> None:
        """From now on a restart does not find the job. Its other files stay until `remove`."""
        with suppress(OSError):
            (self._folder(name) / "job.json").unlink()

    def remove(self, name: str) -> None:
        """Remove a job and all its files."""
        self.forget(name)
        shutil.rmtree(self._folder(name), ignore_errors=True)

    def close(self) -> None:
        """Let another server use the folder; delete it if it is temporary."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        if self._temporary is not None:
            with suppress(OSError):
                self._temporary.cleanup()

    def _folder(self, name: str) -> Path:
        if not _ID.fullmatch(name):
            raise ValueError(f"job: got {name[:64]!r}, expected an id of this server's")
        return self.directory / name


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink()
