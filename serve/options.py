"""The options of `python -m serve`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from engine.options import option

TOKEN = "GREEDY_SERVE_TOKEN"  # of the environment, so that no process list shows it


@dataclass(frozen=True)
class Network:
    """Where the server listens, and who may use it."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in", metavar="ADDRESS")
    port: int = option(8000, "port to listen on; 0 takes a free one and prints it", metavar="N")
    token: str | None = option(None, f"who has it may use the server; default: ${TOKEN}, or none", metavar="TEXT")
    tls_cert: Path | None = option(None, "certificate for https", metavar="FILE")
    tls_key: Path | None = option(None, "its key", metavar="FILE")
    ice_server: tuple[str, ...] = option(
        (), "STUN or TURN server for WebRTC through firewalls, stun:HOST:PORT or turn:USER:PASSWORD@HOST:PORT; "
        "may be repeated", metavar="URL",
    )  # fmt: skip
    allow_origin: tuple[str, ...] = option(
        (), "site whose pages may use the server beside its own, such as https://example.org; may be repeated",
        metavar="URL",
    )  # fmt: skip
    upload_mb: int = option(32, "most megabytes of a request", metavar="N")
    rate: int = option(120, "videos that one address may start in a minute", metavar="N")
    open: bool = option(False, "open the page in a browser")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port: got {self.port}, expected 0 to 65535")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert: got only one of --tls-cert and --tls-key, expected both")
        for name, file in (("cert", self.tls_cert), ("key", self.tls_key)):
            if file is not None and not file.is_file():
                raise FileNotFoundError(f"--tls-{name}: got {file}, expected an existing file")
        if self.secret or self.token is not None:
            self._check_secret()
        for name in ("upload_mb", "rate"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: got {getattr(self, name)}, expected at least 1")
        self.ice_servers()

    def _check_secret(self) -> None:
        secret, name = self.secret, TOKEN if self.token is None else "--token"
        if len(secret) < 8 or not secret.isascii() or not secret.isprintable() or secret != secret.strip():
            raise ValueError(f"{name}: got a text that is short, not ASCII or has spaces around it, "
                             "expected at least 8 characters")  # fmt: skip

    def ice_servers(self) -> list[dict[str, str]]:
        """STUN and TURN servers as a browser's RTCPeerConnection takes them."""
        return [_ice_server(text) for text in self.ice_server]

    @property
    def secret(self) -> str:
        """The token; empty if the server is open to all who reach it."""
        return os.environ.get(TOKEN, "") if self.token is None else self.token

    @property
    def local(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.host == "localhost" or self.host == "::1" or self.host.startswith("127.")


def _ice_server(text: str) -> dict[str, str]:
    """{urls, username, credential} of stun:HOST:PORT or turn:USER:PASSWORD@HOST:PORT; errors show no password."""
    found = re.fullmatch(
        r"(?:(stuns?):|(turns?):([^:@]+):(.+)@)([A-Za-z0-9][A-Za-z0-9.-]*)(?::([0-9]{1,5}))?(\?transport=(?:udp|tcp))?",
        text,
    )
    if not found or (found[1] and found[7]) or not 1 <= int(found[6] or 3478) <= 65535:
        scheme, mark, rest = text.partition(":")
        shown = f"{scheme}:...@{rest.rpartition('@')[2]}" if mark and "@" in rest else text
        raise ValueError(
            f"--ice-server: got {shown[:100]!r}, expected stun:HOST:PORT or turn:USER:PASSWORD@HOST:PORT"
        )  # fmt: skip
    stun, turn, user, password, host, port, transport = found.groups()
    urls = f"{stun or turn}:{host}" + (f":{port}" if port else "") + (transport or "")
    return {"urls": urls} if stun else {"urls": urls, "username": user, "credential": password}


@dataclass(frozen=True)
class Sessions:
    """How many videos run, and for how long."""

    sessions: int | None = option(
        None, "live sessions at once; default: as many as hold the frame rate here, measured at start", metavar="N"
    )
    waiting: int = option(8, "sessions that may wait for a place; more are refused", metavar="N")
    idle: float = option(900.0, "seconds without a change after which a session ends", metavar="S")
    lifetime: float = option(7200.0, "seconds after which a session ends", metavar="S")
    lease: float = option(30.0, "seconds for which a session waits for its viewer to come back", metavar="S")
    recording_mb: int = option(256, "megabytes of a session that stay for download; 0 keeps none", metavar="N")
    jobs: int = option(1, "jobs that run at once; live sessions go first", metavar="N")
    job_queue: int = option(100, "jobs that may wait; more are refused", metavar="N")
    job_seconds: float = option(600.0, "longest video of a job, in seconds", metavar="S")
    jobs_dir: Path | None = option(
        None, "folder for jobs and their videos, which outlive a restart; default: a temporary one", metavar="DIR"
    )
    keep_hours: float = option(24.0, "hours for which a job's video is kept", metavar="H")
    scale: int | None = option(
        None, "enlarge every pixel N times each way; default: small pictures to 128 pixels or more", metavar="N"
    )
    parallel: int | None = option(
        None, "chunks that are made at once; default: 1, or one per core with --backend native", metavar="N"
    )
    name: str | None = option(None, "the model's name in the API; default: its folder's", metavar="TEXT")

    def __post_init__(self) -> None:
        for name in ("sessions", "jobs", "parallel", "scale"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 1000:
                raise ValueError(f"--{name}: got {value}, expected 1 to 1000")
        for name in ("waiting", "job_queue", "recording_mb"):
            if not 0 <= getattr(self, name) <= 1_000_000:
                raise ValueError(f"--{name.replace('_', '-')}: got {getattr(self, name)}, expected 0 to 1000000")
        for name in ("idle", "lifetime", "lease", "job_seconds", "keep_hours"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')}: got {getattr(self, name)}, expected a positive number")
