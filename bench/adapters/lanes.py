"""The lanes of a race: each is an engine in one configuration, in a process behind the adapter protocol."""

import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from bench.adapters.protocol import Adapter, AdapterError

T = TypeVar("T")

OURS = "ours"
# op -> the largest share of the budget that one answer may take. So a lane that hangs leaves time to the others.
SHARES = {"open": 0.3, "latents": 0.3, "warm": 0.3, "chunks": 0.12, "stages": 0.12}
RESERVE = 0.2  # of the budget, which a lane that compiles leaves to the others


@dataclass(frozen=True)
class Lane:
    """precision: `dtype` of open, None for the race's own. compiles: its first full chunk takes minutes."""

    command: tuple[str, ...]
    peer: str = ""  # the engine's name, where it is another than ours
    precision: str | None = None
    gpu: bool = False  # makes sense on a GPU alone
    compiles: bool = False


def _module(name: str) -> tuple[str, ...]:
    return sys.executable, "-m", f"bench.adapters.{name}"


LANES = {
    OURS: Lane(_module("ours")),
    "flashdreams": Lane(_module("flashdreams"), "flashdreams"),
    "ours-fp8": Lane(_module("ours"), precision="fp8", gpu=True),
    "ours-fp8-attention": Lane(_module("ours"), precision="fp8-attention", gpu=True),
    "flashdreams-compiled": Lane(_module("flashdreams"), "flashdreams", gpu=True, compiles=True),
}
PEERS = tuple(dict.fromkeys(lane.peer for lane in LANES.values() if lane.peer))


def usual(peer: str, gpu: bool) -> list[str]:
    """Ours and the peer's lanes that make sense on the device."""
    return [name for name, lane in LANES.items() if lane.peer in ("", peer) and (gpu or not lane.gpu)]


def chosen(names: Iterable[str], adapters: Iterable[str], peer: str, gpu: bool) -> dict[str, Lane]:
    """The lanes by name, and those of --adapter NAME=COMMAND. ValueError for one that is unknown or does not fit."""
    fitting, found = usual(peer, gpu), {}
    for name in names:
        if name not in fitting:
            raise ValueError(f"--lanes: got {name!r}, expected some of {', '.join(fitting)} "
                             f"on a {'GPU' if gpu else 'processor'}")  # fmt: skip
        found[name] = LANES[name]
    for text in adapters:
        label, equals, command = text.partition("=")
        if not equals or not shlex.split(command) or label in LANES:
            raise ValueError(f"--adapter: got {text!r}, expected NAME=COMMAND with another name than the lanes'")
        found[label] = Lane(tuple(shlex.split(command)), label)
    if OURS not in found or not any(lane.peer for lane in found.values()):
        raise ValueError(f"--lanes: got {', '.join(found)}, expected {OURS} and at least one of another engine")
    return found


@dataclass
class Field(AbstractContextManager["Field"]):
    """Lanes that run. One that fails is dropped with its reason, and the others go on.

    settings  of `open`, the same for all lanes; each adds its precision and whether it compiles
    budget    seconds from now on
    logs      folder of the lanes' stderr; None: a temporary one
    """

    lanes: Mapping[str, Lane]
    settings: Mapping[str, Any]
    budget: float
    logs: Path | None = None
    running: dict[str, Adapter] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._deadline = time.perf_counter() + self.budget
        self._temporary = tempfile.TemporaryDirectory(prefix="race-")
        self.folder = Path(self._temporary.name)  # for what lanes hand back
        self._logs = self.logs or self.folder
        self._logs.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self._deadline - time.perf_counter()

    def open(self, at_once: bool) -> None:
        """Start all lanes: at once, where there are cores enough for each to load its weights beside the others."""
        for name in self.lanes:
            self.attempt(name, partial(self._start, name))
            if not at_once:
                self._opened(name)
        for name in list(self.running) if at_once else ():
            self._opened(name)

    def limit(self, op: str, name: str) -> float:
        """Seconds that one answer may take."""
        if self.lanes[name].compiles and op in ("latents", "warm"):
            return max(1.0, self.left - RESERVE * self.budget)
        return max(1.0, min(self.left, SHARES[op] * self.budget))

    def too_late(self, name: str) -> bool:
        """Whether the budget leaves a lane no time to get ready."""
        return self.left < 1 + (RESERVE * self.budget if self.lanes[name].compiles else 0)

    def ask(self, name: str, op: str, **request: Any) -> dict[str, Any] | None:
        """A lane's answer; None where it is not running any more, or is dropped now."""
        return self.attempt(name, partial(self.running[name].ask, op, self.limit(op, name), **request))

    def attempt(self, name: str, call: Callable[[], T]) -> T | None:
        """The result of a call that asks a lane; None where that dropped it."""
        try:
            return call()
        except AdapterError as error:
            self.drop(name, str(error).removeprefix(f"adapter {name}: "))
            return None

    def drop(self, name: str, why: str) -> None:
        """End a lane. The last lines of its stderr tell more than its last answer."""
        self.dropped[name] = why
        print(f"{name} is dropped: {why}", file=sys.stderr)
        if name in self.running:
            self.running.pop(name).kill()
        log = self._log(name)
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:] if log.is_file() else ():
            print(f"    {line[:200]}", file=sys.stderr)

    def _start(self, name: str) -> None:
        lane = self.lanes[name]
        settings = {**self.settings, "compile": lane.compiles}
        if lane.precision:
            settings["dtype"] = lane.precision
        with self._log(name).open("w", encoding="utf-8") as log:
            limit = self.limit("open", name)
            self.running[name] = Adapter(name, list(lane.command), settings, limit, log, wait=False)

    def _opened(self, name: str) -> None:
        if name in self.running:
            self.attempt(name, self.running[name].opened)

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def __exit__(self, *_: object) -> None:
        for adapter in self.running.values():  # a lane has nothing to finish, and the budget is spent
            adapter.kill()
        self._temporary.cleanup()
