"""Jobs of all replicas, in a folder: what was asked for, where it runs, what came of it. It outlives every replica."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from python_multipart.multipart import parse_options_header

from engine.files import whole_file

UNFINISHED = ("queued", "in_progress")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


@dataclass(eq=False)
class Record:
    """One job. `about` is the object that clients see, `id` the name that they know it by."""

    id: str
    body: bytes  # of the request that asked for it
    content_type: str
    about: dict[str, Any]
    key: str = ""  # the client's name for the request, so that it may ask twice
    replica: str = ""  # that has it; empty while none has
    inner: str = ""  # its name there
    lost: int = 0  # replicas that were lost with it
    media_type: str = ""  # of its video, once the ledger has that

    @property
    def unfinished(self) -> bool:
        return self.about.get("status") in UNFINISHED

    def again(self) -> bytes:
        """The request's body with the seed that the first replica took, so that the video is the same."""
        seed = self.about.get("seed")
        return self.body if seed is None else with_seed(self.body, self.content_type, int(seed))

    def update(self, about: dict[str, Any]) -> None:
        """Take over what a replica says of it."""
        self.about = {**about, "id": self.id, "created_at": self.about.get("created_at", about.get("created_at"))}


@dataclass
class Ledger:
    """The records of `folder`, each a JSON file beside its video."""

    folder: Path
    records: dict[str, Record] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in self.folder.glob("*.json"):
            values = json.loads(file.read_text(encoding="utf-8"))
            record = Record(**{**values, "body": base64.b64decode(values["body"])})
            self.records[record.id] = record

    def save(self, record: Record) -> None:
        """Write a record. ValueError for a name that no file may have."""
        if not _NAME.fullmatch(record.id):
            raise ValueError(f"job: got the name {record.id[:60]!r}, expected letters, digits, - and _")
        values = {**vars(record), "body": base64.b64encode(record.body).decode()}
        with whole_file(self.folder / f"{record.id}.json") as part:
            part.write_text(json.dumps(values), encoding="utf-8")
        self.records[record.id] = record

    def keep_video(self, record: Record, data: bytes, media_type: str) -> None:
        """Keep a finished job's video, so that it outlives its replica."""
        with whole_file(self.video(record)) as part:
            part.write_bytes(data)
        record.media_type = media_type
        self.save(record)

    def video(self, record: Record) -> Path:
        return self.folder / f"{record.id}.video"

    def remove(self, record: Record) -> None:
        self.records.pop(record.id, None)
        for file in (self.folder / f"{record.id}.json", self.video(record)):
            file.unlink(missing_ok=True)

    def expire(self, now: float) -> None:
        """Forget jobs whose time is over."""
        for record in list(self.records.values()):
            expires = record.about.get("expires_at")
            if not record.unfinished and isinstance(expires, int | float) and expires < now:
                self.remove(record)


def with_seed(body: bytes, content_type: str, seed: int) -> bytes:
    """A request's body, JSON or a form, that asks for a seed. One that does stays as it is."""
    kind, about = parse_options_header(content_type)
    if kind == b"application/json":
        fields = json.loads(body)
        return body if fields.get("seed") is not None else json.dumps(fields | {"seed": seed}).encode()
    if kind == b"multipart/form-data" and not re.search(rb'name="?seed"?[\r\n;]', body):
        end = b"--" + about[b"boundary"] + b"--"
        head, _, tail = body.rpartition(end)
        part = b'--%b\r\nContent-Disposition: form-data; name="seed"\r\n\r\n%d\r\n' % (about[b"boundary"], seed)
        return head + part + end + tail
    if kind == b"application/x-www-form-urlencoded" and not re.search(rb"(^|&)seed=", body):
        return body + b"&seed=%d" % seed
    return body
