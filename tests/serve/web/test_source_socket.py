"""Frames over the socket: pictures and raw bytes that a session follows, and what is refused."""

import asyncio
import io

import numpy as np
import pytest
from clients import HANG, PROMPT, connected, started
from PIL import Image

from serve.web.frames import picture_of_bytes
from serve.web.wire import Invalid

SIZE = 16, 24  # of the tiny pipeline


def pictures(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *SIZE, 3), dtype=np.uint8)


def png(frame):
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "png")
    return file.getvalue()


def fed(url, messages, rest=(), **source):
    """A client that sends frames one by one, each when the one before is used. Frames are raw."""

    async def run():
        async with started(url, speed=1.0, source={"strength": 0.9} | source) as client:
            await client.until("video.start")
            for message in messages:
                await client.socket.send(message)
                await asyncio.sleep(0.13)  # as a camera of the model's rate
            if messages:
                await client.until("video.chunk_metadata")
            for message in rest:
                await client.socket.send(message)
            await client.send("session.stop")
            await asyncio.wait_for(client.rest(), HANG)
            return client

    return asyncio.run(run())


@pytest.mark.parametrize("kind", [png, np.ndarray.tobytes])
def test_the_first_frame_is_the_engines(url, pipeline, kind):
    source = pictures(1)
    client = fed(url, [kind(source[0])])
    with pipeline.stream(PROMPT, seed=3, source=source, strength=0.9) as stream:
        assert client.chunks[0]["data"] == stream.next_chunk().tobytes()
    assert client.of("session.done")[0]["source"]["taken"] >= 1


def test_frames_give_chunks(url):
    client = fed(url, [frame.tobytes() for frame in pictures(16)])
    done = client.of("session.done")[0]
    assert sum(chunk["num_frames"] for chunk in client.chunks) == done["frames"] >= 9
    assert done["source"]["taken"] >= done["frames"]
    assert client.of("error") == []


def test_a_broken_picture_is_told_once_and_the_session_goes_on(url):
    good = pictures(1)[0].tobytes()
    client = fed(url, [b"no picture", b"\xff\xd8\xff broken", b"", good])
    (error,) = client.of("error")
    assert error["code"] == "invalid_request"
    assert error["message"].startswith("frame: got 10 bytes, expected a picture in JPEG, PNG or WebP, or 1152 bytes")
    assert len(client.chunks) == 1


def test_bytes_without_a_source_are_refused_as_before(url):
    async def run():
        async with started(url) as client:
            await client.until("video.start")
            await client.socket.send(b"123")
            error = await client.until("error")
            assert error["message"] == "message: got 3 bytes, expected text in JSON"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": {"strength": 0}}, "session.start: source.strength: got 0, expected: Input should be greater than"),
        ({"source": {"strength": 0.3}}, "strength: got 0.3, expected 0.625 to 1: the last step of this preset begins"),
        ({"source": {"noise_scale": 0.7}}, "noise_scale: got 0.7, expected a number above 0 and below 0.625"),
        ({"source": {}, "image": png(pictures(1)[0]).hex()}, "source: got image as well, expected frames alone"),
        ({"source": {}, "speed": 2.0}, "source: got speed as well, expected frames alone, as they come"),
        ({"source": {}, "resume": {"chunk": 3}}, "source: got resume as well, expected frames alone"),
        (
            {"source": {"strength": 0.65}, "denoising_step_list": [1000.0]},
            "strength: got 0.65, expected 1 to 1",
        ),
        ({"denoising_step_list": [float(t) for t in range(1000, 700, -5)]}, "session.start: denoising_step_list"),
        ({"denoising_step_list": [[1000.0]] * 11}, "session.start: denoising_step_list"),
        ({"source": "camera"}, "session.start: source: got 'camera', expected: Input should be a valid dictionary"),
    ],
)
def test_what_is_refused(url, fields, message):
    async def run():
        async with started(url, **{"speed": 1.0} | fields) as client:
            await client.rest()
            return client.of("error")[0]

    error = asyncio.run(run())
    assert (error["code"], error["message"].startswith(message)) == ("invalid_request", True), error


def test_the_input_is_the_clock(url):
    async def run():
        async with started(url, speed=1.0, source={"strength": 0.9}) as client:
            await client.until("video.start")
            await client.interact("a", speed=2.0)
            return await client.until("error")

    assert asyncio.run(run())["message"] == "speed: got 2, expected 1: the video follows frames, as they come"


def test_who_was_taken_over_gives_no_frames(url):
    """Its pictures do not mix with those of the viewer that has the key."""

    async def run():
        async with started(url, speed=1.0, source={"strength": 0.9}) as client:
            start = await client.until("video.start")
            async with connected(url) as other:
                await other.send("session.watch", session=start["session"], key=start["key"], format="rgb")
                await other.until("video.start")
                await client.socket.send(pictures(1)[0].tobytes())
                await client.send("session.ping")
                await client.until("session.pong")
                await other.socket.send(pictures(1)[0].tobytes())
                await other.until("video.chunk_metadata")
                await other.send("session.stop")
                return (await other.until("session.done"))["source"]["taken"]

    assert asyncio.run(run()) == 1


def test_pictures_are_scaled_to_cover_and_cropped():
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 30:90] = (200, 100, 50)  # the middle, which has the stream's shape
    for kind, close in (("jpeg", 12), ("png", 3), ("webp", 25)):
        file = io.BytesIO()
        Image.fromarray(wide).save(file, kind)
        frame = picture_of_bytes(file.getvalue(), *SIZE)
        assert frame.shape == (*SIZE, 3)
        assert np.abs(frame[4:-4, 4:-4].astype(int) - (200, 100, 50)).max() <= close
    grey = io.BytesIO()
    Image.new("LA", (24, 16), (77, 255)).save(grey, "png")
    assert np.unique(picture_of_bytes(grey.getvalue(), *SIZE)).tolist() == [77]
    raw = pictures(1)[0]
    assert (picture_of_bytes(raw.tobytes(), *SIZE) == raw).all()


def test_pictures_that_are_none():
    large = io.BytesIO()
    Image.new("1", (5000, 5000)).save(large, "png")
    with pytest.raises(Invalid, match="frame: got 5000x5000, expected at most 16 megapixels"):
        picture_of_bytes(large.getvalue(), *SIZE)
    gif = io.BytesIO()
    Image.new("L", (24, 16)).save(gif, "gif")
    for data in (b"", b"GIF89a", gif.getvalue(), b"\xff\xd8\xff\xe0", bytes(1151)):
        with pytest.raises(Invalid, match=rf"frame: got {len(data)} bytes, expected a picture in JPEG, PNG or WebP"):
            picture_of_bytes(data, *SIZE)
