"""A viewer over WebRTC: frames in a video track, messages in the data channel "parameters"."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from typing import Any

from bench.serving.playback import Arrival
from bench.serving.process import Answered, Server
from bench.serving.sockets import CHUNK
from bench.serving.viewers import GONE_WITHIN, Plan, Seen, switches

PREFIX = "/api/v1/webrtc"
BUSY = 429


async def by_webrtc(server: Server, plan: Plan, until: float) -> Seen:
    """Watch over WebRTC, until a time. Each frame of the track is an arrival of its own."""
    from aiortc import RTCPeerConnection, RTCSessionDescription
    from aiortc.mediastreams import MediaStreamError

    seen, peer = Seen(plan, "webrtc"), RTCPeerConnection()
    await asyncio.sleep(plan.delay)
    seen.asked = time.monotonic()
    channel = peer.createDataChannel("parameters", ordered=True)
    over, tasks = asyncio.Event(), list[asyncio.Task[None]]()
    turns: dict[str, int] = {}  # events, and the first frame that shows them

    async def send(message: dict[str, Any]) -> None:
        channel.send(json.dumps(message))

    async def watch(track: Any) -> None:
        begin = None
        with suppress(MediaStreamError):
            while True:
                frame = await track.recv()
                begin = frame.time if begin is None else begin
                for event, first in turns.items():
                    if event not in seen.shows and round((frame.time - begin) * plan.fps) >= first:
                        seen.shows[event] = len(seen.arrivals)
                seen.arrivals.append(Arrival(time.monotonic(), 1))

    @peer.on("track")
    def _(track: Any) -> None:
        tasks.append(asyncio.create_task(watch(track)))

    @channel.on("message")
    def _(text: str) -> None:
        message = json.loads(text)
        if message["type"] == CHUNK:
            seen.spent_ms.append(message["chunk_ms"])
            turns.update(dict.fromkeys(message["started_event_ids"], message["first_frame"]))
            if plan.switch and not seen.sent and len(tasks) == 1:
                tasks.append(asyncio.create_task(switches(plan, seen, send)))
        elif message["type"] == "stream_stopped" or not seen.told(message):
            over.set()

    session = ""
    try:
        peer.addTransceiver("video", direction="recvonly")
        await peer.setLocalDescription(await peer.createOffer())
        parameters = {"prompts": [{"text": plan.prompts[0], "weight": 1.0}], "seed": plan.seed}
        offer = {"sdp": peer.localDescription.sdp, "type": "offer", "initialParameters": parameters}
        answer = await asyncio.to_thread(server.ask, f"{PREFIX}/offer", offer)
        session = answer["sessionId"]
        await peer.setRemoteDescription(RTCSessionDescription(answer["sdp"], answer["type"]))
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await over.wait()
    except Answered as error:
        if error.status == BUSY:
            seen.refused = "busy"
        else:
            seen.failed = str(error)
    except (OSError, ValueError) as error:
        seen.failed = f"{type(error).__name__}: {error}"
    finally:
        for task in tasks:
            task.cancel()
        if session:
            with suppress(OSError):
                await asyncio.to_thread(server.ask, f"{PREFIX}/offer/{session}", None, "DELETE")
        with suppress(TimeoutError):
            async with asyncio.timeout(GONE_WITHIN):
                await peer.close()
    return seen
