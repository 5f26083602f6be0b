"""A client of the live socket, for tests: what it sent and what it got."""

import asyncio
import json
from contextlib import asynccontextmanager, suppress

import websockets

PROMPT = "a red circle moving right"
OTHER = "a blue square moving up"
HANG = 60.0


class Client:
    """One socket: messages as dicts, with a chunk's bytes under "data"."""

    def __init__(self, socket):
        self.socket = socket
        self.seen = []

    async def send(self, kind=None, **fields):
        with suppress(websockets.ConnectionClosed):  # a server that refused has said why: `get` reads it
            await self.socket.send(json.dumps(({"type": kind} if kind else {}) | fields))

    async def interact(self, event_id=None, transition=None, **event):
        about = {"event": event} | ({"event_id": event_id} if event_id else {})
        about |= {} if transition is None else {"transition_chunks": transition}
        await self.send("session.interaction", interaction=about)

    async def get(self):
        """The next message; None once the server has closed."""
        try:
            message = json.loads(await asyncio.wait_for(self.socket.recv(), HANG))
            if message["type"] == "video.chunk_metadata":
                message["data"] = await asyncio.wait_for(self.socket.recv(), HANG)
                assert len(message["data"]) == message["byte_length"]
        except websockets.ConnectionClosed:
            return None
        self.seen.append(message)
        return message

    async def until(self, kind, **fields):
        """Read up to a message of this type and with these fields; returns it."""
        while (message := await self.get()) is not None:
            if message["type"] == kind and all(message.get(name) == value for name, value in fields.items()):
                return message
        raise AssertionError(f"the server closed before {kind} {fields}: {self.seen[-3:]}")

    async def rest(self):
        """Read until the server closes."""
        while await self.get() is not None:
            pass
        return self.seen

    @property
    def chunks(self):
        return [message for message in self.seen if message["type"] == "video.chunk_metadata"]

    def of(self, kind):
        return [message for message in self.seen if message["type"] == kind]


@asynccontextmanager
async def connected(url, query="", **options):
    address = url.replace("http", "ws", 1) + "/v1/realtime/video" + query
    async with websockets.connect(address, max_size=None, **options) as socket:
        yield Client(socket)


@asynccontextmanager
async def started(url, prompt=PROMPT, query="", **fields):
    """A client whose session has begun."""
    async with connected(url, query) as client:
        await client.send("session.start", **{"prompt": prompt, "seed": 3, "format": "rgb", "speed": 0} | fields)
        yield client


def play(url, prompt=PROMPT, **fields):
    """A whole video: the client that saw it."""

    async def run():
        async with started(url, prompt, **fields) as client:
            await client.rest()
            return client

    return asyncio.run(run())
