"""A client of WS /v1/realtime/video."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from bench.serving.process import Server

OPEN_WITHIN = 60.0  # seconds; a machine under load
CHUNK = "video.chunk_metadata"


class Socket:
    """One connection. Messages are dictionaries; a chunk's bytes come with its message."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self._begun: dict[str, Any] | None = None  # message of a chunk whose bytes are still to come

    async def send(self, message: Mapping[str, Any]) -> None:
        await self.connection.send(json.dumps(message))

    async def receive(self) -> tuple[dict[str, Any], bytes]:
        """The next message, and a chunk's bytes. ConnectionClosed; RuntimeError where bytes do not belong to one.

        A call that is cancelled between a chunk's message and its bytes leaves both to the next call.
        """
        if self._begun is None:
            text = await self.connection.recv()
            if isinstance(text, bytes):
                raise RuntimeError(f"socket: got {len(text)} bytes without a message before them, expected JSON")
            message = json.loads(text)
            if message["type"] != CHUNK:
                return message, b""
            self._begun = message
        payload, message = await self.connection.recv(), self._begun
        self._begun = None
        if not isinstance(payload, bytes) or len(payload) != message["byte_length"]:
            raise RuntimeError(f"socket: got {len(payload)} of a chunk, expected {message['byte_length']} bytes")
        return message, payload

    async def until(self, *kinds: str, within: float = 30.0) -> tuple[dict[str, Any], bytes]:
        """The next message of these types; others are dropped. TimeoutError."""
        async with asyncio.timeout(within):
            while True:
                message, payload = await self.receive()
                if message["type"] in kinds:
                    return message, payload

    async def ask(self, message: Mapping[str, Any], *kinds: str, within: float = 30.0) -> dict[str, Any]:
        """Send a message and await an answer of these types."""
        await self.send(message)
        return (await self.until(*kinds, within=within))[0]

    async def stop(self, within: float = 10.0) -> dict[str, Any] | None:
        """End the session; its last message, or None where the server did not end it in time."""
        try:
            await self.send({"type": "session.stop"})
            return (await self.until("session.done", within=within))[0]
        except (ConnectionClosed, TimeoutError):
            return None


@asynccontextmanager
async def opened(server: Server, **settings: Any) -> AsyncIterator[Socket]:
    """A connection as a browser makes it: it offers compression, and sends no pings."""
    about: dict[str, Any] = {"additional_headers": server.headers, "open_timeout": OPEN_WITHIN, "max_size": None}
    about |= {"ping_interval": None, "proxy": None, "close_timeout": 2.0} | settings
    async with connect(server.socket, **about) as connection:
        yield Socket(connection)


def start(prompt: str, seed: int, format: str = "rgb", **more: Any) -> dict[str, Any]:
    """The message that starts a session."""
    return {"type": "session.start", "prompt": prompt, "seed": seed, "format": format, **more}


def turn(event: str, prompt: str) -> dict[str, Any]:
    """The message that switches the prompt."""
    return {"type": "session.interaction", "interaction": {"event_id": event, "event": {"prompt": prompt}}}
