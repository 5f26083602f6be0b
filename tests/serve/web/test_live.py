"""The live socket: vLLM-Omni's messages, and the frames of the engine behind them."""

import asyncio
import base64
import io
import json
import random

import av
import numpy as np
import pytest
from clients import OTHER, PROMPT, connected, play, started
from PIL import Image
from sessions import plain


def pixels(chunk, pipeline):
    return np.frombuffer(chunk["data"], np.uint8).reshape(chunk["num_frames"], pipeline.height, pipeline.width, 3)


def test_raw_frames_are_those_of_the_engine(url, pipeline):
    client = play(url, num_frames=18)
    start, done = client.seen[0], client.seen[-1]
    assert start["type"] == "video.start"
    assert start["config"] == {
        "model": "tiny", "width": 192, "height": 128, "fps": 8.0, "seed": 3, "num_frames": 18, "scale": 8, "speed": 0.0,
        "prompt": PROMPT,
    }  # fmt: skip
    assert {message["request_id"] for message in client.seen} == {start["request_id"]}
    assert [chunk["transport_chunk_index"] for chunk in client.chunks] == list(range(6))
    assert [chunk["generation_chunk_index"] for chunk in client.chunks] == list(range(6))
    assert [chunk["first_frame"] for chunk in client.chunks] == [0, 1, 5, 9, 13, 17]
    got = np.concatenate([pixels(chunk, pipeline) for chunk in client.chunks])
    assert (got == plain(pipeline, 6)[:18]).all()
    assert {"chunks": 6, "frames": 18, "stopped": False, "reason": "finished"}.items() <= done.items()


def test_fragments_make_an_mp4_with_those_pictures(url, pipeline):
    """Read by FFmpeg: all frames, at their times, close to the engine's; also by one who came in the middle."""

    async def run():
        async with started(url, format="m4s", num_frames=41) as client, connected(url) as late:
            start = await client.until("video.start")
            await client.until("video.chunk_metadata", generation_chunk_index=3)
            await late.send("session.watch", session=start["session"])
            await asyncio.gather(client.rest(), late.rest())
            return start, client, late

    start, client, late = asyncio.run(run())
    expected = plain(pipeline, 11)[:41].repeat(8, axis=1).repeat(8, axis=2)
    assert start["mime"] == 'video/mp4; codecs="avc1.42C01E"'
    assert "key" not in late.seen[0]
    for one in (client, late):
        with av.open(io.BytesIO(b"".join(chunk["data"] for chunk in one.chunks))) as container:
            decoded = list(container.decode(video=0))
            assert container.streams.video[0].codec_context.profile == "Constrained Baseline"
        first = one.chunks[0]["first_frame"]
        assert [float(frame.pts * frame.time_base) for frame in decoded] == [n / 8 for n in range(first, 41)]
        got = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded]).astype(int)
        assert np.abs(got - expected[first:]).mean() < 8  # noise of random weights is hard to code
    assert late.chunks[0]["first_frame"] > 0


def test_jpeg_parts(url, pipeline):
    client = play(url, num_frames=5, format="jpeg")
    pictures = []
    for chunk in client.chunks:
        data = chunk["data"]
        while data:
            length = int.from_bytes(data[:4], "big")
            pictures.append(np.asarray(Image.open(io.BytesIO(data[4 : 4 + length]))))
            data = data[4 + length :]
    expected = plain(pipeline, 2).repeat(8, axis=1).repeat(8, axis=2)
    assert np.abs(np.stack(pictures).astype(int) - expected).mean() < 8


def test_a_prompt_in_mid_stream(url, pipeline):
    async def run():
        async with started(url) as client:
            await client.until("video.chunk_metadata", generation_chunk_index=2)
            await client.interact("e1", prompt=OTHER)
            await client.until("session.interaction.queued", event_id="e1")
            chunk = await client.until("video.chunk_metadata", started_event_ids=["e1"])
            await client.until("video.chunk_metadata", generation_chunk_index=chunk["generation_chunk_index"] + 3)
            await client.send("session.stop")
            await client.rest()
            return client, chunk["generation_chunk_index"]

    client, first = asyncio.run(run())
    got = np.concatenate([pixels(chunk, pipeline) for chunk in client.chunks])
    assert (got == plain(pipeline, len(client.chunks), {first: OTHER})).all()
    assert client.seen[-1]["type"] == "session.done"
    assert client.seen[-1]["stopped"] is True


def test_events_act_once(url):
    """A repeated id with the same content is a retry; with another one a conflict; no id gets one."""

    async def run():
        async with started(url, speed=4) as client:
            await client.until("video.chunk_metadata")
            await client.interact("a", prompt=OTHER)
            await client.interact("a", prompt=OTHER)
            await client.interact("a", prompt=PROMPT)
            await client.until("error")
            while not any("a" in chunk["started_event_ids"] for chunk in client.chunks):  # it may overtake the error
                assert await client.get() is not None
            await client.interact("a", prompt=OTHER)
            await client.interact(prompt=PROMPT)
            await client.until("video.chunk_metadata", prompt=PROMPT)
            await client.send("session.stop")
            return await client.rest()

    seen = asyncio.run(run())
    queued = [message["event_id"] for message in seen if message["type"] == "session.interaction.queued"]
    assert queued[:3] == ["a", "a", "a"]
    assert len(queued[3]) == 36
    (conflict,) = [message for message in seen if message["type"] == "error"]
    assert (conflict["code"], conflict["event_id"]) == ("event_id_conflict", "a")
    begun = [event for message in seen for event in message.get("started_event_ids", [])]
    assert begun == ["a", queued[3]]


def test_of_two_prompts_for_one_chunk_the_older_is_told_that_it_is_not_shown(url):
    async def run():
        async with started(url, speed=1) as client:
            await client.until("video.chunk_metadata", generation_chunk_index=1)
            await client.interact("a", prompt=OTHER)
            await client.interact("b", prompt="a green square")
            await client.until("video.chunk_metadata", started_event_ids=["b"])
            await client.send("session.stop")
            return await client.rest()

    notes = [message for message in asyncio.run(run()) if message["type"] == "session.note"]
    assert [note["event_id"] for note in notes] == ["a"]
    assert notes[0]["message"] == "this prompt has no effect: a newer one came before the next chunk"


BAD_STARTS = {
    "no JSON": ("hello", "message: got 'hello', expected JSON"),
    "no object": ("[1]", "type: got 'list', expected session.start or session.watch first"),
    "another type": ('{"type": "x"}', "type: got 'x', expected session.start"),
    "no prompt": ({}, "session.start: prompt: got nothing, expected: Field required"),
    "an empty prompt": ({"prompt": " "}, "prompt: got an empty text, expected words"),
    "a NUL": ({"prompt": "a\0"}, "prompt: got a NUL character, expected text"),
    "a surrogate": ('{"type": "session.start", "prompt": "\\ud800"}', r"session.start: prompt: got '\ud800', expected"),
    "another model": ({"prompt": "a", "model": "gpt"}, "model: got 'gpt', expected 'tiny'"),
    "another size": ({"prompt": "a", "width": 17}, "width: got 17, expected 24 or 192"),
    "another rate": ({"prompt": "a", "fps": 30.0}, "fps: got 30, expected 8"),
    "a seed below 0": ({"prompt": "a", "seed": -1}, "session.start: seed: got -1, expected"),
    "a seed of text": ({"prompt": "a", "seed": "1"}, "session.start: seed: got '1', expected"),
    "a seed of 2^64": ({"prompt": "a", "seed": 2**64}, "session.start: seed: got 18446744073709551616, expected"),
    "no frames": ({"prompt": "a", "num_frames": 0}, "session.start: num_frames: got 0, expected"),
    "NaN": ('{"type": "session.start", "prompt": "a", "speed": NaN}', "session.start: speed: got nan, expected"),
    "an unknown format": ({"prompt": "a", "format": "avi"}, "session.start: format: got 'avi', expected"),
    "no weights": ({"prompt": [{"text": "a", "weight": 0.0}]}, "prompt: got weights [0.0], expected"),
    "an adapter": ({"prompt": "a", "adapters": {"x": 1.0}}, "adapters: got the name 'x', expected none: this"),
    "an adapter to come": (
        {"prompt": "a", "resume": {"chunk": 0, "history": [{"chunk": 1, "adapters": {"x": 1.0}}]}},
        "adapters: got the name 'x', expected none: this",
    ),
    "too slow a clock": ({"prompt": "a", "speed": 1e-9}, "session.start: speed: got 1e-09, expected: 0, or 0.01 to"),
    "a long name": ({"prompt": "a", "model": "\u00e9" * 100}, "model: got '\u00e9"),
    "no picture": ({"prompt": "a", "image": "???"}, "image: got text that is no base64, expected"),
    "a broken picture": ({"prompt": "a", "image": "aGVsbG8="}, "image: got a file, expected a readable picture"),
    "a path": ({"prompt": "a", "image": "/etc/passwd"}, "image: got"),
    "an unknown session": ({"type": "session.watch", "session": "../x"}, "session: got '../x', expected one that runs"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_STARTS)
def test_bad_starts_are_refused_in_one_line(url, case):
    text, expected = BAD_STARTS[case]
    if isinstance(text, dict):
        text = json.dumps({"type": "session.start"} | text)

    async def run():
        async with connected(url) as client:
            await client.socket.send(text)
            await client.rest()
            return client.seen, client.socket.close_code

    (error,), close_code = asyncio.run(run())
    assert close_code == 1008
    assert error["type"] == "error"
    assert error["code"] in ("invalid_request", "not_found")
    assert error["message"].startswith(expected), error["message"]
    assert "\n" not in error["message"]


def test_bad_messages_are_answered_and_end_nothing(url, pipeline):
    rng = random.Random(1)
    values = [
        None,
        1,
        -1.5,
        "x",
        [],
        {},
        True,
        "\0",
        {"event": None},
        {"event": {}},
        {"event": {"prompt": ""}},
        10**400,
    ]

    async def run():
        async with started(url, num_frames=81, speed=0) as client:
            await client.until("video.start")
            for number in range(60):
                kind = rng.choice(["session.interaction", "session.nothing", 7, None])
                value = rng.choice(values)
                raw = rng.choice([
                    json.dumps({"type": kind, "interaction": value}), json.dumps(value), "{", "\x00", "[" * 5000,
                    rng.randbytes(20), json.dumps({"type": kind, "interaction": {"event": {"prompt": value}}}),
                    json.dumps({"type": kind, "interaction": {"event": {"seed": "1"}, "event_id": number}}),
                ])  # fmt: skip
                await client.socket.send(raw)
            return await client.rest(), client

    seen, client = asyncio.run(run())
    assert len([message for message in seen if message["type"] == "error"]) >= 40
    assert seen[-1]["reason"] == "finished"
    prompts = {chunk["prompt"] for chunk in client.chunks}
    assert prompts == {PROMPT}
    assert (np.concatenate([pixels(c, pipeline) for c in client.chunks]) == plain(pipeline, 21)).all()


def test_seed_steps_and_window_change_while_it_plays(url, pipeline):
    """And what no preset has is answered with its event id; the video goes on."""
    wrong = [{"window": 0}, {"window": "3"}, {"denoising_step_list": [1]}, {"denoising_step_list": [500, 700]},
             {"denoising_step_list": []}, {"denoising_step_list": "1000"}, {"window": 99}, {"seed": -1, "reset": False},
             {"reset_cache": "yes"}]  # fmt: skip

    async def run():
        async with started(url, denoising_step_list=[1000, 600], window=3, num_frames=41, speed=4) as client:
            await client.until("video.chunk_metadata", generation_chunk_index=1)
            for number, event in enumerate(wrong):
                await client.interact(f"w{number}", **event)
            await client.interact("a", seed=9, reset=False, denoising_step_list=[[1000, 400]])
            await client.interact("b", window=2)
            await client.rest()
            return client

    client = asyncio.run(run())
    refused = {message["event_id"]: message for message in client.of("error") if "event_id" in message}
    told = {message.get("event_id") for message in client.of("error")}
    assert len(client.of("error")) == len(wrong)
    assert "w6" in refused  # the stream itself refused it
    assert "expected at most 4" in refused["w6"]["message"]
    assert {"w0", "w2", "w3", "w4"} <= told
    begin = {event: chunk["generation_chunk_index"] for chunk in client.chunks for event in chunk["started_event_ids"]}
    asked = {begin["a"]: {"seed": 9, "steps": (1000.0, 400.0)}}
    asked[begin["b"]] = asked.get(begin["b"], {}) | {"window": 2}
    made = []
    with pipeline.stream(PROMPT, seed=3) as stream:
        stream.change(steps=(1000.0, 600.0), window=3)
        for number in range(11):
            if number in asked:
                stream.change(**asked[number])
            made.append(stream.next_chunk())
    assert (np.concatenate([pixels(c, pipeline) for c in client.chunks]) == np.concatenate(made)[:41]).all()


def test_one_who_looks_on_changes_nothing(url):
    async def run():
        async with started(url, speed=1) as owner, connected(url) as other:
            start = await owner.until("video.start")
            await other.send("session.watch", session=start["session"], format="rgb")
            await other.until("video.start")
            await other.interact("x", prompt=OTHER)
            error = await other.until("error")
            await other.send("session.stop")  # it leaves
            await other.rest()
            chunk = await owner.until("video.chunk_metadata")
            await owner.send("session.stop")
            return error, chunk, start

    error, chunk, start = asyncio.run(run())
    assert error["code"] == "invalid_request"
    assert "a viewer who looks on" in error["message"]
    assert chunk["prompt"] == PROMPT
    assert len(start["key"]) >= 16


def test_a_lost_connection_takes_its_session_over(url, pipeline):
    async def run():
        async with started(url, speed=4) as client:
            start = await client.until("video.start")
            await client.until("video.chunk_metadata", generation_chunk_index=2)
            client.socket.transport.abort()
        async with connected(url) as thief:
            await thief.send("session.watch", session=start["session"], key="x" * 16)
            refused = await thief.rest()
        async with connected(url) as again:
            await again.send("session.watch", session=start["session"], key=start["key"], format="rgb")
            await again.until("video.start")
            await again.interact("e", prompt=OTHER)
            await again.until("video.chunk_metadata", started_event_ids=["e"])
            await again.send("session.stop")
            await again.rest()
        return client, again, refused

    client, again, refused = asyncio.run(run())
    assert refused[0]["code"] == "forbidden"
    first = next(c["generation_chunk_index"] for c in again.chunks if c["started_event_ids"])
    expected = plain(pipeline, first + 1, {first: OTHER})
    for chunk in (*client.chunks, *again.chunks):
        begin = chunk["first_frame"]
        if chunk["generation_chunk_index"] <= first:
            assert (pixels(chunk, pipeline) == expected[begin : begin + chunk["num_frames"]]).all()
    assert again.chunks[0]["generation_chunk_index"] >= 3


def test_who_was_taken_over_looks_on(url):
    """One viewer owns a session. The connection that owned it before sees the video, and changes nothing."""

    async def run():
        async with started(url, speed=4) as before, connected(url) as after:
            start = await before.until("video.start")
            await after.send("session.watch", session=start["session"], key=start["key"], format="rgb")
            await after.until("video.start")
            await before.interact("x", prompt=OTHER)
            error = await before.until("error")
            await after.interact("y", prompt=OTHER)
            await before.until("video.chunk_metadata", started_event_ids=["y"])
            await after.send("session.stop")
            await asyncio.gather(before.rest(), after.rest())
            return error, before.seen[-1]

    error, last = asyncio.run(run())
    assert (error["code"], error["event_id"]) == ("invalid_request", "x")
    assert (last["type"], last["reason"]) == ("session.done", "stopped")


def test_a_resumed_video_has_the_same_frames(url, pipeline):
    history = [{"chunk": 2, "prompt": OTHER, "transition_chunks": 2}, {"chunk": 6, "prompt": PROMPT}]
    whole = play(url, num_frames=37, resume={"chunk": 0, "history": history})
    part = play(url, num_frames=37, resume={"chunk": 5, "history": history})
    assert [c["generation_chunk_index"] for c in part.chunks] == [5, 6, 7, 8, 9]
    assert [c["data"] for c in part.chunks] == [c["data"] for c in whole.chunks[5:]]
    assert (pixels(whole.chunks[0], pipeline) == plain(pipeline, 1)).all()
    assert whole.chunks[4]["data"] != play(url, num_frames=37).chunks[4]["data"]


def test_a_history_may_come_in_any_order(url):
    history = [{"chunk": 2, "prompt": OTHER}, {"chunk": 4, "prompt": PROMPT}]
    told, turned = (
        play(url, num_frames=25, resume={"chunk": 0, "history": one}) for one in (history, history[::-1])
    )  # fmt: skip
    assert [c["prompt"] for c in turned.chunks] == [PROMPT] * 2 + [OTHER] * 2 + [PROMPT] * 3
    assert [c["data"] for c in turned.chunks] == [c["data"] for c in told.chunks]


def test_sessions_wait_in_line_and_are_told_their_place(url, server):
    """Three run, two wait, the sixth is refused; who leaves the line moves the others up."""

    async def run():
        async with started(url, speed=1) as a, started(url, speed=1) as b, started(url, speed=1) as c:
            for one in (a, b, c):
                await one.until("video.start")
            async with started(url) as fifth, started(url) as fourth:
                places = [await fifth.until("session.waiting"), await fourth.until("session.waiting")]
                assert [place["place"] for place in places] == [1, 2]
                async with started(url) as sixth:
                    busy = await sixth.rest()
                fifth.socket.transport.abort()
                await fourth.until("session.waiting", place=1)
                await b.send("session.stop")
                await fourth.until("video.start")
                await fourth.send("session.stop")
            for one in (a, c):
                await one.send("session.stop")
            return busy

    busy = asyncio.run(run())
    assert [message["code"] for message in busy] == ["busy"]
    assert busy[0]["message"] == "all 3 sessions run and 2 wait: try again later"


def test_a_video_starts_from_a_picture(url, pipeline):
    picture = np.random.default_rng(1).integers(0, 256, (pipeline.height, pipeline.width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png")
    text = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    client = play(url, num_frames=9, image=text)
    got = np.concatenate([pixels(chunk, pipeline) for chunk in client.chunks])
    assert (got == plain(pipeline, 3, clip=picture[None])).all()


def test_pause_speed_and_restart_by_messages(url):
    async def run():
        async with started(url, speed=4) as client:
            await client.until("video.chunk_metadata", generation_chunk_index=1)
            await client.interact("p", paused=True)
            await client.until("session.interaction.queued")
            await client.send("session.ping")
            await client.until("session.pong")
            await client.interact("r", paused=False, speed=0.0, seed=5)
            first = await client.until("video.chunk_metadata", take=1)
            await client.send("session.stop")
            await client.rest()
            return first

    first = asyncio.run(run())
    assert first["generation_chunk_index"] == 0
    assert "r" in first["started_event_ids"]
    assert first["data"] == play(url, seed=5, num_frames=1).chunks[0]["data"]


def test_a_stream_of_a_client_that_stays_silent_is_refused(url, monkeypatch):
    monkeypatch.setattr("serve.web.live.START_WITHIN", 0.3)

    async def run():
        async with connected(url) as client:
            return await client.rest()

    (error,) = asyncio.run(run())
    assert error["message"] == "got no session.start within 0.3 s, expected one"


def test_everything_ends_with_its_clients(url, server):
    """After all of the above no session is left, and no thread of one."""
    import threading
    import time

    until = time.monotonic() + 20
    while server.house.running and time.monotonic() < until:
        time.sleep(0.1)
    assert server.house.running == server.house.waiting == 0
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("session-")]
