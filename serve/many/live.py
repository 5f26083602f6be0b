"""WS /v1/realtime/video through the door: a session stays at its replica, and its client learns how to go on."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress
from typing import Any

import aiohttp
from fastapi import WebSocket

from serve.many.fleet import Fleet, Replica, Start
from serve.many.past import Past
from serve.many.relay import headers_for, url_for
from serve.web.live import START_WITHIN
from serve.web.server import Refused

log = logging.getLogger("serve")
TRIES = 3  # replicas that may be lost before a session has begun
BEAT = 20.0  # seconds between pings to a replica, which find out that its machine is gone
GOING_AWAY, RESTART, TRY_LATER, INVALID = 1001, 1012, 1013, 1008  # RFC 6455 and the registry of close codes


class Lost(Exception):
    """The replica went away in the middle."""


class Relay:
    """One client's socket and one to the replica that has its session."""

    def __init__(self, fleet: Fleet, client: WebSocket) -> None:
        self._fleet, self._client = fleet, client
        self._past: Past | None = None  # of a session that this client owns
        self._first = ""
        self._early: list[str] = []  # what the client said before its session began
        self._replica: aiohttp.ClientWebSocketResponse | None = None
        self._began = False

    async def run(self) -> None:
        await self._client.accept()
        try:
            async with asyncio.timeout(START_WITHIN):
                first = await self._receive()
        except TimeoutError:
            await self._refuse("invalid_request", f"got no session.start within {START_WITHIN:g} s, expected one")
            return
        if first is None:
            return
        self._first, message = first, _parsed(first)
        kind = message.get("type") if isinstance(message, dict) else None
        if kind == "session.start":
            if message.get("source") is not None:
                await self._refuse("invalid_request", "source: got it, expected none: pictures are not passed on here")
                return
            self._past = Past(message)
        watched = str(message.get("session")) if kind == "session.watch" else None
        listening = asyncio.create_task(self._listen())
        serving = asyncio.create_task(self._serve(watched))
        try:
            await asyncio.wait({listening, serving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (listening, serving):
                task.cancel()
            results = await asyncio.gather(listening, serving, return_exceptions=True)
            if self._replica is not None:
                await self._replica.close()
        for result in results:
            if isinstance(result, Exception):
                log.debug("a socket ended with %r", result)

    async def _serve(self, watched: str | None) -> None:
        """Find a replica and pass on what it says. One that is lost before the session began is replaced."""
        gone: set[str] = set()
        for _ in range(TRIES):
            try:
                replica = await (self._fleet.freest(gone) if watched is None else self._fleet.find(watched))
            except Refused as error:
                await self._refuse("busy" if watched is None else "not_found", error.message)
                return
            try:
                with self._fleet.starting(replica) as start:
                    await self._pass_on(replica, start)
                return
            except (Lost, aiohttp.ClientError, ConnectionError) as error:
                log.warning("a socket lost replica %s: %r", replica.id, error)
                gone.add(replica.id)
                await self._fleet.check(replica)
                if self._began or watched is not None:
                    break
        await self._tell_lost()

    async def _pass_on(self, replica: Replica, start: Start) -> None:
        """Pass on messages until the replica closes the socket. Lost, where it did not close it."""
        client = self._client
        upstream = await self._fleet.http.ws_connect(
            url_for(replica, client), headers=headers_for(replica, client), heartbeat=BEAT, max_msg_size=0, compress=0
        )
        async with upstream:
            await upstream.send_str(self._first)
            for text in self._early:
                await upstream.send_str(text)
            self._replica = upstream
            metadata = ""
            while True:
                message = await upstream.receive()
                if message.type is aiohttp.WSMsgType.TEXT:
                    parsed = _parsed(message.data)
                    kind = parsed.get("type")
                    if start.opened is None:
                        start.opened = asyncio.get_running_loop().time()  # monotonic, as the fleet's times are
                    if kind == "video.chunk_metadata":
                        metadata = message.data  # it goes on together with its bytes
                        continue
                    if kind == "session.done" and parsed.get("reason") == "shutdown":
                        raise Lost("it shuts down")
                    if kind == "video.start":
                        self._begin(parsed, replica)
                    if self._past is not None:
                        self._past.told(parsed)
                    if kind == "session.done" and self._past is not None:
                        self._fleet.pasts.pop(self._past.session, None)
                    await client.send_text(message.data)
                elif message.type is aiohttp.WSMsgType.BINARY:
                    await client.send_text(metadata)
                    await client.send_bytes(message.data)
                    if self._past is not None:
                        self._past.shown(_parsed(metadata))
                elif message.type is aiohttp.WSMsgType.CLOSE and message.data not in (GOING_AWAY, RESTART):
                    with suppress(RuntimeError):
                        await client.close(message.data or 1000, message.extra or "")
                    return
                else:
                    raise Lost(f"{message.type.name} {message.data}")

    def _begin(self, start: dict[str, Any], replica: Replica) -> None:
        """Note where the session is. One that this client takes over keeps its past."""
        session = start["session"]
        if self._past is None and "key" in start:
            self._past = self._fleet.pasts.get(session)
            for text in self._early:
                self._ask(text)
        if self._past is not None:
            self._fleet.pasts[session] = self._past
        self._fleet.remember(session, replica)
        self._began, self._first = True, ""
        self._early.clear()

    async def _listen(self) -> None:
        """Pass on what the client says, until it leaves."""
        while (text := await self._receive()) is not None:
            text = self._ask(text)
            if not self._began:
                self._early.append(text)
            if self._replica is not None and not self._replica.closed:
                with suppress(ConnectionError, aiohttp.ClientError):  # then the other direction finds it lost
                    await self._replica.send_str(text)

    def _ask(self, text: str) -> str:
        """Note what the client asks for; the same text, or one in which an interaction has an event id."""
        message = _parsed(text)
        return json.dumps(message) if self._past is not None and self._past.asked(message) else text

    async def _receive(self) -> str | None:
        """The client's next text; None when it has left. Bytes become a text that a server refuses by its own rules."""
        message = await self._client.receive()
        if message["type"] == "websocket.disconnect":
            return None
        return message["text"] if message.get("text") is not None else ""

    async def _tell_lost(self) -> None:
        """Say how the client goes on elsewhere, and close."""
        about: dict[str, Any] = {"type": "error", "code": "replica_lost"}
        about["message"] = "the server that made this video was lost; start again"
        if self._past is not None:
            about["message"] += " with `resume`, and it goes on with the next chunk"
            about["resume"] = self._past.resume()
        with suppress(RuntimeError):
            await self._client.send_json(about)
            await self._client.close(RESTART, "replica lost")

    async def _refuse(self, code: str, message: str) -> None:
        with suppress(RuntimeError):
            await self._client.send_json({"type": "error", "code": code, "message": message})
            await self._client.close(INVALID if code != "busy" else TRY_LATER, message[:100])


def _parsed(text: str) -> Any:
    """A message's JSON; an empty object for what is none, and the server says so."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {}
