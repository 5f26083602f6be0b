"""The track of a WebRTC viewer and the queue behind it, without a network."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from webrtc_client import CIRCLE, sprites

from serve.core.encoders import Unit
from serve.core.messages import Chunk, Wish
from serve.core.viewers import Viewer
from serve.web.server import Bell
from serve.web.webrtc.track import LiveTrack

KEYS = 16  # frames between key frames that nobody asked for


def chunk(position: int, take: int, key: bool, due: float, frames: int = 2) -> Chunk:
    units = tuple(Unit(bytes([take, position + i]), position + i, key and not i) for i in range(frames))
    pictures = np.zeros((frames, 2, 2, 3), np.uint8)
    return Chunk(0, take, position, pictures, units, CIRCLE, (), (), (), 0.0, 0.0, due, 0.0)


def test_frames_of_an_earlier_take_are_dropped() -> None:
    """Also those that the track has taken already, and waits to show."""

    async def play() -> list[tuple[bytes, int]]:
        bell, now = Bell(), time.monotonic()
        session: Any = SimpleNamespace(take=0, frame_due=lambda one, number: one.due + 0.05 * number, wake=lambda: None)
        viewer = Viewer("h264", watches=False, notify=bell.ring)
        told: list[Any] = []
        track = LiveTrack(session, viewer, bell, told.append)
        viewer.put(chunk(0, 0, True, now - 9))  # before it connected
        first = asyncio.ensure_future(track.recv())
        await asyncio.sleep(0.01)
        assert viewer.watches
        assert not told
        viewer.put(chunk(2, 0, True, time.monotonic()))
        packets = [await first]
        viewer.put(chunk(4, 0, False, time.monotonic() + 30))
        waiting = asyncio.ensure_future(track.recv())
        await asyncio.sleep(0.01)
        session.take = 1
        viewer.put(chunk(6, 1, True, time.monotonic()))
        packets += [await asyncio.wait_for(waiting, 5), await asyncio.wait_for(track.recv(), 5)]
        assert [one.position for one in told] == [2, 4, 6]
        return [(bytes(packet), packet.pts) for packet in packets]

    (first, start), (second, later), (third, last) = asyncio.run(play())
    assert [first, second, third] == [b"\0\2", b"\1\6", b"\1\7"]
    assert start == 0
    assert later > 0
    assert last - later == pytest.approx(0.05 * 90_000, abs=0.02 * 90_000)


def test_a_lost_picture_is_remembered_until_a_key_frame() -> None:
    viewer = Viewer("h264")
    viewer.put(chunk(0, 0, True, 0.0))
    assert not viewer.wants_key
    viewer.wants_key = True  # while the next chunk is coded
    viewer.put(chunk(2, 0, False, 0.0))
    assert viewer.wants_key
    viewer.put(chunk(4, 0, True, 0.0))
    assert not viewer.wants_key


@pytest.mark.slow
def test_who_takes_nothing_asks_for_no_key_frames() -> None:
    """A viewer without room would get them in every chunk of all other viewers."""
    stalled, viewer = Viewer("h264", holds=False), Viewer("h264", room=100)
    session = sprites().house.job(Wish((((CIRCLE), 1.0),), frames=65, speed=0.0), viewer)
    session.watch(stalled)
    assert session.join(60)
    taken = [item for item in iter(viewer.take, None) if isinstance(item, Chunk)]
    keys = [unit.position for item in taken for unit in item.units if unit.key]
    assert sum(len(item.frames) for item in taken) == 65
    assert len(keys) <= 1 + 65 // KEYS + 3
