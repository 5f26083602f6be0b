"""The servers behind a door: which ones live, how full they are, and who gets the next session."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import quote

import aiohttp

from serve.many.past import Past
from serve.web.server import Refused

log = logging.getLogger("serve")
PERIOD = 1.0  # seconds between two looks at a replica
SILENT = 30.0  # seconds without an answer after which a replica counts as lost
ANSWER_WITHIN = 5.0
WAIT = 20.0  # seconds for which a request waits for a replica that starts
MOST_KNOWN = 10_000  # sessions whose replica is remembered

Hold = Callable[[str], Awaitable[bool]]


@dataclass(eq=False)
class Start:
    """A session on its way to a replica. It counts there until the replica's own numbers contain it."""

    opened: float | None = None


@dataclass(eq=False)
class Replica:
    """One server, and what it said last."""

    id: str
    url: str
    secret: str  # its token, which only the door knows
    sessions: int = 0
    waiting: int = 0
    capacity: int = 1
    draining: bool = False  # it ends when its last session does
    seen: float = field(default_factory=time.monotonic)
    starts: list[Start] = field(default_factory=list)
    jobs: set[str] = field(default_factory=set)  # that have not finished
    holds: set[asyncio.Task[bool]] = field(default_factory=set)

    @property
    def free(self) -> int:
        """Places for sessions; below 0 where some wait."""
        return self.capacity - self.sessions - self.waiting - len(self.starts)

    @property
    def load(self) -> int:
        """Sessions and jobs that it has."""
        return self.sessions + self.waiting + len(self.jobs)


class Fleet:
    """All replicas of a door.

    hold  keeps a replica: the cluster does not stop it meanwhile, and counts one more request for autoscaling. It
          returns True at the end, and False at once if the cluster gives that replica nothing new.
    """

    def __init__(self, hold: Hold | None = None) -> None:
        self.replicas: dict[str, Replica] = {}
        self.gone: set[str] = set()  # names of replicas that were lost
        self._hold = hold
        self.pasts: dict[str | None, Past] = {}  # of sessions that sockets started, for who takes one over
        self._homes: OrderedDict[str, str] = OrderedDict()  # session: replica
        self._changed = asyncio.Event()
        self._http: aiohttp.ClientSession | None = None

    @property
    def http(self) -> aiohttp.ClientSession:
        """The client for all replicas, in the loop of the door."""
        if self._http is None:
            limits = aiohttp.ClientTimeout(total=None, sock_connect=ANSWER_WITHIN)
            self._http = aiohttp.ClientSession(
                timeout=limits, connector=aiohttp.TCPConnector(limit=0), auto_decompress=False
            )
        return self._http

    async def close(self) -> None:
        for replica in self.replicas.values():
            for task in replica.holds:
                task.cancel()
        if self._http is not None:
            await self._http.close()

    # --- who is there

    async def register(self, name: str, url: str, secret: str) -> None:
        """A replica says that it serves at `url`. It says so again and again, for a door that starts later."""
        known = self.replicas.get(name)
        if known is not None and known.url == url:
            return
        replica = Replica(name, url, secret)
        if await self._look(replica):
            self.replicas[name] = replica
            self.gone.discard(name)
            self._changed.set()
            log.info("replica %s serves at %s", name, url)

    async def look(self) -> None:
        """Ask every replica for its numbers, once."""
        await asyncio.gather(*(self.check(replica) for replica in list(self.replicas.values())))

    async def check(self, replica: Replica) -> bool:
        """Ask one replica; False if it is lost. Holds as many requests at it as it has sessions and jobs."""
        if not await self._look(replica):
            self.lost(replica)
            return False
        if self._hold is not None:
            replica.holds = {task for task in replica.holds if not task.done()}
            while len(replica.holds) < replica.load:
                replica.holds.add(asyncio.create_task(self._keep(replica)))
            while len(replica.holds) > replica.load:
                replica.holds.pop().cancel()
        return True

    def lost(self, replica: Replica) -> None:
        """Forget a replica that does not answer."""
        if self.replicas.get(replica.id) is replica:
            log.warning("replica %s at %s was lost", replica.id, replica.url)
            del self.replicas[replica.id]
            self.gone.add(replica.id)
        for task in replica.holds:
            task.cancel()

    async def _look(self, replica: Replica) -> bool:
        begun = time.monotonic()
        try:
            async with asyncio.timeout(ANSWER_WITHIN), self.http.get(f"{replica.url}/health") as answer:
                numbers = await answer.json()
        except (aiohttp.ClientConnectorError, aiohttp.ServerDisconnectedError):
            return False
        except (TimeoutError, aiohttp.ClientError, ValueError):
            return begun - replica.seen < SILENT  # it may be busy, or its network slow
        replica.sessions, replica.waiting = numbers["sessions"], numbers["waiting"]
        replica.capacity, replica.seen = numbers["capacity"], time.monotonic()
        replica.starts = [start for start in replica.starts if start.opened is None or start.opened > begun]
        return True

    async def _keep(self, replica: Replica) -> bool:
        assert self._hold is not None
        try:
            kept = await self._hold(replica.id)
        except Exception as error:  # of a replica that dies, or a cluster that is busy: the next look tries again
            log.debug("replica %s is not held: %r", replica.id, error)
            return False
        replica.draining = replica.draining or not kept
        return kept

    # --- who gets what

    async def freest(self, without: set[str] | None = None) -> Replica:
        """The replica with most free places, once there is one. Refused after a while."""
        return await self._best(lambda replica: (replica.free, -len(replica.jobs)), without)

    async def for_job(self, without: set[str] | None = None) -> Replica:
        """The replica with the fewest jobs that have not finished."""
        return await self._best(lambda replica: (-len(replica.jobs), replica.free), without)

    async def _best(self, rank: Callable[[Replica], tuple[int, int]], without: set[str] | None) -> Replica:
        until = time.monotonic() + WAIT
        while True:
            found = [replica for replica in self.replicas.values() if replica.id not in (without or ())]
            found = [replica for replica in found if not replica.draining] or found
            if found:
                return max(found, key=rank)
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), max(0.0, until - time.monotonic()))
                continue
            message = f"replicas: got none within {WAIT:g} s, expected one: all are starting, or none could start"
            raise Refused(503, "server_error", message, {"Retry-After": "10"})

    @contextlib.contextmanager
    def starting(self, replica: Replica) -> Iterator[Start]:
        """Count a session that starts. Set `opened` of the Start when the replica has it."""
        start = Start()
        replica.starts.append(start)
        try:
            yield start
        finally:
            if start.opened is None and start in replica.starts:
                replica.starts.remove(start)

    def remember(self, session: str, replica: Replica) -> None:
        self._homes[session] = replica.id
        self._homes.move_to_end(session)
        while len(self._homes) > MOST_KNOWN:
            self.pasts.pop(self._homes.popitem(last=False)[0], None)

    async def find(self, session: str) -> Replica:
        """The replica that has a session. Where the door does not know, it asks them all. Refused if none has it."""
        found = self.home(session)
        if session in self._homes:
            return found[0]
        for replica in found:
            try:
                headers = {"authorization": f"Bearer {replica.secret}"}
                async with asyncio.timeout(ANSWER_WITHIN):
                    url = f"{replica.url}/v1/sessions/{quote(session, safe='')}"
                    async with self.http.get(url, headers=headers) as answer:
                        if answer.status == 200:
                            self.remember(session, replica)
                            return replica
            except (aiohttp.ClientError, TimeoutError):
                continue
        raise Refused(404, "not_found", f"session: got {session[:64]!r}, expected one that runs")

    def home(self, session: str) -> list[Replica]:
        """The replica that has a session; all where the door does not know, as after it was restarted.

        Refused if it was lost.
        """
        name = self._homes.get(session)
        if name is None:
            return list(self.replicas.values())
        if name not in self.replicas:
            raise Refused(404, "not_found", f"session: got {session[:64]!r}, whose replica was lost, expected another")
        return [self.replicas[name]]
