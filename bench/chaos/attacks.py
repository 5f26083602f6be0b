"""Clients that misbehave. Each returns what the server did wrong to them, bounded in count and time."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from websockets.exceptions import ConnectionClosed, WebSocketException

from bench.chaos import garbage
from bench.serving.process import Server
from bench.serving.sockets import CHUNK, Socket, opened, start, turn

READ_EVERY = 2.0  # seconds, of a slow client
AT_ONCE = 50  # connections of a storm
ANSWER_WITHIN = 30.0


@dataclass
class Way:
    """How an attack is driven. attempts: connections of a storm; the other counts follow from it."""

    attempts: int
    seconds: float  # of a slow client
    megabytes: int  # of an upload
    prompts: list[str]
    draw: random.Random
    recorded: int = 0  # videos that the server keeps for a download, each in a file


Attack = Callable[[Server, Way], Awaitable[list[str]]]


def _place(server: Server) -> tuple[str, int]:
    parts = urlsplit(server.url)
    return parts.hostname or "127.0.0.1", parts.port or 80


def _reset(connection: socket.socket) -> None:
    """Closing it will tell the other side nothing but a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def slow(server: Server, way: Way) -> list[str]:
    """Read one message in two seconds, through a small buffer, of a video that comes as fast as it is taken."""
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    narrow.connect(_place(server))
    narrow.setblocking(False)
    faults, following, until = list[str](), 0, time.monotonic() + way.seconds
    async with opened(server, sock=narrow, max_queue=1) as client:
        await client.send(start(way.prompts[0], 1, speed=0))
        while time.monotonic() < until:
            message, _ = await client.receive()
            if message["type"] == "error":
                return [f"a slow client got {message['code']}: {message['message']}"]
            if message["type"] == CHUNK:
                if message["first_frame"] != following or message["skipped"]:
                    faults.append(f"a slow client got frame {message['first_frame']}, expected {following}")
                following = message["first_frame"] + message["num_frames"]
                await asyncio.sleep(READ_EVERY)
        _abort(client)
    return faults if following else ["a slow client got no chunk"]


async def vanish(server: Server, way: Way) -> list[str]:
    """Start videos, see two chunks of each, and reset the connection."""

    async def one(number: int) -> str:
        async with opened(server) as client:
            await client.send(start(way.prompts[0], number, "m4s"))
            for _ in range(2):
                message, _ = await client.until(CHUNK, "error", within=ANSWER_WITHIN)
                if message["type"] == "error":
                    return "" if message["code"] == "busy" else f"who vanished got {message['code']} before"
            way.recorded += 1
            _abort(client)
        return ""

    return await _all(one, max(4, way.attempts // 50), 4)


async def storm(server: Server, way: Way) -> list[str]:
    """Connect in five ways, and leave at once."""
    host, port = _place(server)
    begun = time.monotonic()

    async def one(number: int) -> str:
        if number % 5 == 0:
            await asyncio.to_thread(server.ask, "/health")
        elif number % 5 in (1, 2):
            _, writer = await asyncio.open_connection(host, port)
            if number % 5 == 1:  # half a request
                _reset(writer.get_extra_info("socket"))
                writer.write(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n")
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        else:
            async with opened(server) as client:
                if number % 5 == 3:
                    await client.send(start(way.prompts[0], number))
                    _abort(client)
        return ""

    faults = await _all(one, way.attempts, AT_ONCE)
    took, most = time.monotonic() - begun, 20 + 0.1 * way.attempts
    return faults + ([f"{way.attempts} connections took {took:.0f} s, expected at most {most:.0f}"] * (took > most))


async def nonsense(server: Server, way: Way) -> list[str]:
    """Garbage: before HTTP, as the first message of a socket, and within a session, which must go on."""
    host, port = _place(server)
    count = max(8, way.attempts // 4)

    async def raw(number: int) -> str:
        reader, writer = await asyncio.open_connection(host, port)
        with suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
            writer.write(garbage.requests(way.draw))
            await writer.drain()
            async with asyncio.timeout(0.5):  # a server may wait for more; a client need not
                await reader.read(4096)
        _reset(writer.get_extra_info("socket"))
        writer.close()
        return ""

    async def first(number: int) -> str:
        sent = garbage.first(way.draw)
        async with opened(server) as client:
            with suppress(ConnectionClosed):
                await client.connection.send(sent)
            answer = await _answer(client, "error", "video.start", "session.waiting")
        well = answer["type"] == "error" and len(str(answer["message"]).splitlines()) == 1
        return "" if well else f"{_short(sent)} got {str(answer)[:200]}, expected an error of one line"

    faults = await _all(raw, count, 8) + await _all(first, count, 4)
    async with opened(server) as client:
        await client.send(start(way.prompts[0], 2))
        session = (await client.until("video.start", within=ANSWER_WITHIN))[0]["session"]
        sent = [garbage.later(way.draw) for _ in range(count)]
        faults += await _answered(client, sent, "error")
        faults += await _answered(client, garbage.odd(), "error", "session.interaction.queued")
        for key in garbage.KEYS:
            async with opened(server) as thief:
                await thief.send({"type": "session.watch", "session": session, "key": key})
                if (answer := await _answer(thief, "error", "video.start"))["type"] != "error":
                    faults.append(f"the key {key!r} got {answer['type']}, expected an error")
        faults += await _lives(client, "garbage")
    return faults


async def _answered(client: Socket, messages: Sequence[str | bytes], *kinds: str) -> list[str]:
    """Send messages to a session. Complaints unless each gets one of these answers, on one line."""
    faults = list[str]()
    for sent in messages:
        with suppress(ConnectionClosed):
            await client.connection.send(sent)
        answer = await _answer(client, "error", "session.interaction.queued", "session.done")
        if answer["type"] not in kinds or len(str(answer.get("message", "")).splitlines()) > 1:
            faults.append(f"{_short(sent)} got {str(answer)[:200]}, expected {' or '.join(kinds)}")
        if answer["type"] in ("session.done", "closed"):
            break
    return faults


async def _answer(client: Socket, *kinds: str) -> dict[str, Any]:
    """The next message of these types; of type "closed" where the connection ended instead, "none" where none came."""
    try:
        return (await client.until(*kinds, within=ANSWER_WITHIN))[0]
    except ConnectionClosed as closed:
        return {"type": "closed", "code": None if closed.rcvd is None else closed.rcvd.code}
    except TimeoutError:
        return {"type": "none"}


async def prompts(server: Server, way: Way) -> list[str]:
    """As many prompts as attempts, all at once: each is answered, and the session goes on."""
    async with opened(server) as client:
        await client.send(start(way.prompts[0], 3))
        await client.until(CHUNK, within=ANSWER_WITHIN)
        sending = asyncio.create_task(_send_all(client, way))
        answered = 0
        try:
            async with asyncio.timeout(ANSWER_WITHIN + 0.05 * way.attempts):
                while answered < way.attempts:
                    message, _ = await client.receive()
                    answered += message["type"] in ("session.interaction.queued", "error")
        except TimeoutError:
            pass
        finally:
            sending.cancel()
        faults = [f"got {answered} answers to {way.attempts} prompts"] * (answered < way.attempts)
        return faults + await _lives(client, f"{way.attempts} prompts")


async def _send_all(client: Socket, way: Way) -> None:
    for number in range(way.attempts):
        await client.send(turn(f"storm-{number}", way.prompts[number % len(way.prompts)]))


async def uploads(server: Server, way: Way) -> list[str]:
    """Too much: in a request that tells its length, in one that does not, and in a message of a socket."""
    faults, size = [], way.megabytes << 20
    for how in (f"Content-Length: {size}", "Transfer-Encoding: chunked"):
        status = await _upload(server, how, way.megabytes)
        if status != 413:
            faults.append(f"{way.megabytes} MB with {how} got status {status}, expected 413")
    async with opened(server) as client:
        with suppress(ConnectionClosed):
            await client.connection.send(json.dumps(start(way.prompts[0], 4) | {"image": "A" * size}))
        answer = await _answer(client, "error", "video.start")
        if answer["type"] != "closed" or answer["code"] not in (None, 1009):  # message too big: RFC 6455, 7.4.1
            faults.append(f"a message of {way.megabytes} MB got {str(answer)[:200]}, expected close code 1009")
    return faults


async def _upload(server: Server, how: str, megabytes: int) -> int:
    """The status that an upload gets; 0 where the connection breaks before."""
    reader, writer = await asyncio.open_connection(*_place(server))
    head = f"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{how}\r\n\r\n"
    block = b"x" * (1 << 20)
    answer = asyncio.create_task(reader.readline())
    try:
        writer.write(head.encode())
        for _ in range(megabytes):
            writer.write(b"%x\r\n%s\r\n" % (len(block), block) if "chunked" in how else block)
            await writer.drain()
            if answer.done():
                break
    except OSError:
        pass  # the server closed it; its answer may be here already
    try:
        async with asyncio.timeout(ANSWER_WITHIN):
            line = await answer
    except (OSError, TimeoutError):
        line = b""
    writer.close()
    return int(line.split()[1]) if line.startswith(b"HTTP/") else 0


async def _lives(client: Socket, after: str) -> list[str]:
    """Complaints unless a session answers and streams on."""
    try:
        await client.send({"type": "session.ping"})
        await client.until("session.pong", within=ANSWER_WITHIN)
        await client.until(CHUNK, within=ANSWER_WITHIN)
        await client.until(CHUNK, within=ANSWER_WITHIN)
    except (ConnectionClosed, TimeoutError) as error:
        return [f"after {after} the session did not go on ({type(error).__name__})"]
    await client.stop()
    return []


async def _all(one: Callable[[int], Awaitable[str]], count: int, at_once: int) -> list[str]:
    """Run `count` of them, so many at once. Their complaints, those that differ."""
    free = asyncio.Semaphore(at_once)

    async def guarded(number: int) -> str:
        async with free:
            try:
                return await one(number)
            except (OSError, WebSocketException, TimeoutError) as error:
                return f"{one.__name__}: {type(error).__name__}: {error}"

    return _distinct(await asyncio.gather(*map(guarded, range(count))))


def _distinct(faults: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(fault for fault in faults if fault))


def _abort(client: Socket) -> None:
    transport: Any = client.connection.transport
    _reset(transport.get_extra_info("socket"))
    transport.abort()


def _short(sent: str | bytes) -> str:
    return repr(sent[:120])


ATTACKS: dict[str, Attack] = {
    "slow client": slow, "vanished clients": vanish, "connection storm": storm, "garbage": nonsense,
    "prompt storm": prompts, "uploads": uploads,
}  # fmt: skip
