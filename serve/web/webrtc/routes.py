"""/api/v1/webrtc: live sessions over WebRTC, in scope's contract: offer, candidates, and a channel for parameters."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from aiortc import RTCConfiguration, RTCIceServer, RTCPeerConnection, RTCRtpSender, RTCRtpTransceiver
from aiortc import RTCSessionDescription as Description
from aiortc.sdp import SessionDescription
from fastapi import APIRouter, FastAPI, Request, Response

from serve.core.house import Busy
from serve.core.messages import Change
from serve.core.viewers import Viewer
from serve.web.desk import Desk
from serve.web.server import Bell, Bucket, Refused, Server
from serve.web.webrtc.peer import Peer
from serve.web.webrtc.wire import Candidates, Offer, candidate_of, sdp_of, start_of
from serve.web.wire import Invalid, parsed

SPARE_PEERS = 16  # connections beside two for each session
TOLD_WITHIN = 2.0  # seconds for the last messages when the server ends
_CODECS = {"video/H264": "h264", "video/VP8": "vp8"}

log = logging.getLogger("serve")


def router(server: Server, starts: Bucket) -> APIRouter:
    """The routes. Their connections close with the application."""
    peers = Peers(server, starts)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await peers.close()

    routes = APIRouter(prefix="/api/v1/webrtc", lifespan=lifespan)
    server.metrics.gauge("greedy_peer_connections", "WebRTC connections", lambda: len(peers))

    @routes.get("/ice-servers")
    async def ice_servers() -> dict[str, object]:
        return {"iceServers": server.network.ice_servers()}

    @routes.post("/offer")
    async def offer(request: Request) -> dict[str, str]:
        address = request.client.host if request.client else ""
        return await peers.answer(parsed(Offer, await _json(request), "offer"), address)

    @routes.patch("/offer/{name}", status_code=204)
    async def candidates(name: str, request: Request) -> Response:
        peer = peers.get(name)
        message = parsed(Candidates, await _json(request), "candidates")
        for one in [candidate_of(one) for one in message.candidates]:
            await peer.add_candidate(one)
        return Response(status_code=204)

    @routes.delete("/offer/{name}", status_code=204)
    async def end(name: str) -> Response:
        await peers.get(name).hang_up()
        return Response(status_code=204)

    return routes


class Peers:
    """All connections of a server, by their names."""

    def __init__(self, server: Server, starts: Bucket) -> None:
        self._server, self._starts = server, starts
        self._most = 2 * server.house.room.sessions + SPARE_PEERS
        self._peers: dict[str, Peer] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._opening = 0

    def __len__(self) -> int:
        return len(self._peers) + self._opening

    def get(self, name: str) -> Peer:
        """Refused where there is none."""
        peer = self._peers.get(name)
        if peer is None:
            raise Refused(404, "not_found", f"sessionId: got {name[:64]!r}, expected one that is connected")
        return peer

    async def answer(self, offer: Offer, address: str) -> dict[str, str]:
        """Answer an offer: its session starts, or is joined. Invalid, Busy, Refused."""
        if len(self) >= self._most:
            raise Busy(f"got {len(self)} WebRTC connections, expected fewer than {self._most}: try again later")
        sdp = sdp_of(offer)
        self._opening += 1
        connection = RTCPeerConnection(_configuration(self._server))
        try:
            peer = await self._open(connection, sdp, offer, address)
            self._peers[peer.id] = peer
        except BaseException:
            await discard(connection)
            raise
        finally:
            self._opening -= 1
        self._run(self._see_through(peer))
        description = connection.localDescription
        return {"sessionId": peer.id, "session": peer.session.id, "sdp": description.sdp, "type": description.type}

    async def close(self) -> None:
        """End all connections, and their sessions, which say so first."""
        peers = list(self._peers.values())
        for peer in peers:
            peer.session.stop("shutdown")
        if peers:
            await asyncio.wait([asyncio.ensure_future(peer.told()) for peer in peers], timeout=TOLD_WITHIN)
        await asyncio.gather(*(peer.close() for peer in peers))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _open(self, connection: RTCPeerConnection, sdp: str, offer: Offer, address: str) -> Peer:
        """Negotiate, then start or join the session: what is wrong with either is the answer to the request."""
        start, paused, unknown = (None, False, []) if offer.session else start_of(offer.initialParameters)
        follows = start is not None and start.source is not None
        transceiver, codec = await _negotiated(connection, sdp, follows)
        bell = Bell()
        # The session makes chunks for this viewer once the connection stands (LiveTrack).
        viewer = Viewer(codec, holds=start is not None, watches=False, notify=bell.ring)
        desk = Desk(self._server, viewer)
        if start is None:
            session = desk.watch(offer.session or "")
        else:
            if wait := self._starts.take(address):
                raise Busy(f"got too many starts from one address, expected one in {wait:.1f} s")
            session = await asyncio.to_thread(desk.start, start)
        try:
            if paused:
                desk.change(Change(paused=True))
            peer = Peer(connection, transceiver, desk, session, bell)
            peer.note_unknown(unknown if start is not None else list(offer.initialParameters))
            await connection.setLocalDescription(await connection.createAnswer())
            if "a=candidate:" not in connection.localDescription.sdp:
                raise Refused(503, "server_error", "webrtc: got no network address of this machine, expected one")
        except BaseException:
            session.leave(viewer)
            if desk.owns:
                session.stop()
            raise
        return peer

    async def _see_through(self, peer: Peer) -> None:
        try:
            await peer.run()
        finally:
            self._peers.pop(peer.id, None)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def discard(connection: RTCPeerConnection) -> None:
    """Close a connection that was not made. What an offer left half made does not close in aiortc: that is logged."""
    try:
        await connection.close()
    except Exception as error:
        log.warning("a refused connection did not close: %s: %s", type(error).__name__, error)


async def _negotiated(connection: RTCPeerConnection, sdp: str, follows: bool) -> tuple[RTCRtpTransceiver, str]:
    """Take the offer in: (what sends the video, "h264" or "vp8"). Invalid unless it asks for such video.

    follows  the browser sends a video as well, in the same section
    """
    capable, direction = RTCRtpSender.getCapabilities("video").codecs, "sendrecv" if follows else "sendonly"
    transceiver = connection.addTransceiver("video", direction=direction)
    transceiver.setCodecPreferences(sorted(capable, key=_preference))
    try:
        await connection.setRemoteDescription(Description(sdp, "offer"))
        for other in connection.getTransceivers():
            if other is not transceiver:
                other.direction = "inactive"  # nothing else that a browser sends is decoded
        answer = SessionDescription.parse((await connection.createAnswer()).sdp)
    except Exception as error:  # the parser asserts, indexes and searches
        line = (str(error).splitlines() or [""])[0][:100] or type(error).__name__
        raise Invalid(f"sdp: got one that does not fit ({line}), expected an offer to receive video") from None
    sent = [media for media in answer.media if media.kind == "video" and media.direction == direction]
    if not sent or sent[0].rtp.muxId != transceiver.mid:
        what, allowed = ("sends and receives", "sendrecv") if follows else ("receives", "recvonly or sendrecv")
        raise Invalid(f"sdp: got no first video section that {what}, expected one ({allowed})")
    return transceiver, _CODECS[sent[0].rtp.codecs[0].mimeType]


def _preference(codec: Any) -> int:
    """Constrained baseline first, as the encoder makes it; then H.264 at all, VP8, and retransmission."""
    if codec.mimeType == "video/H264":
        return 0 if str(codec.parameters.get("profile-level-id", "")).lower().startswith("42e0") else 1
    return 2 if codec.mimeType == "video/VP8" else 3


def _configuration(server: Server) -> RTCConfiguration:
    """The given STUN and TURN servers, and no other: without a list aiortc would ask a public one."""
    return RTCConfiguration(iceServers=[RTCIceServer(**one) for one in server.network.ice_servers()])


async def _json(request: Request) -> Any:
    """The body. Invalid if it is no JSON."""
    body = await request.body()
    with suppress(ValueError, RecursionError):
        return json.loads(body)
    raise Invalid(f"body: got {body[:60]!r}, expected JSON")
