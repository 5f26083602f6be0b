"""Damaged messages to a server give an answer or the product's own refusal, in under 2 s and 200 MB each.

python tests/untrusted/test_fuzz_messages.py KIND SECONDS [SEED]      # KIND: a key of KINDS
"""

import asyncio
import base64
import io
import json
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

sys.path.append(str(Path(__file__).parent.parent / "support"))

import pytest
from fuzzing import checked, fuzz
from mutations import json_bytes, mutated_bytes, mutated_json, odd_value
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request

from serve.core.viewers import Viewer
from serve.web.desk import Desk
from serve.web.orders import fields_of, order_of
from serve.web.server import Refused
from serve.web.wire import Invalid, Start, Watch, message_of, parsed

REFUSALS = (Invalid, Refused, HTTPException)
MOST = 1 << 20  # bytes of a request


def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = picture()
START = {
    "type": "session.start", "prompt": [{"text": "a red circle", "weight": 1.0}, {"text": "a &amp; b"}],
    "format": "m4s",
    "seed": 3, "num_frames": 9, "width": 24, "height": 16, "fps": 8.0, "speed": 1.0, "adapters": {"style": 0.5},
    "image": "data:image/png;base64," + base64.b64encode(PICTURE).decode(), "model": "tiny",
    "resume": {"chunk": 3, "history": [{"chunk": 1, "prompt": "a blue square", "adapters": {"style": 1.0}}]},
}  # fmt: skip
WATCH = {"type": "session.watch", "session": "one", "key": "two", "format": "jpeg"}
INTERACTION = {
    "event": {"prompt": "a blue square", "adapters": {"style": 0.1}, "paused": False, "speed": 2.0, "seed": 4},
    "event_id": "e1", "transition_chunks": 2,
}  # fmt: skip
JOB = {
    "prompt": "a red circle", "seconds": "4", "size": "24x16", "width": 24, "height": 16, "fps": 8, "num_frames": 9,
    "seed": "3", "adapters": {"style": 1}, "num_inference_steps": 4, "guidance_scale": 1.0, "negative_prompt": "",
    "input_reference": {"image_url": START["image"]}, "other": 1,
}  # fmt: skip
PARAMETERS = {
    "prompts": [{"text": "a", "weight": 1.0}], "transition": {"target_prompts": "b", "num_steps": 2,
    "temporal_interpolation_method": "linear"}, "lora_scales": [{"path": "/x/style.safetensors", "scale": 0.5}],
    "paused": True, "reset_cache": False, "seed": 2, "speed": 1.0, "event_id": "e2",
}  # fmt: skip
CANDIDATES = {"candidates": [{"candidate": "candidate:1 1 udp 2122260223 192.0.2.1 5000 typ host generation 0",
                              "sdpMid": "0", "sdpMLineIndex": 0}]}  # fmt: skip


def stub_server():
    """A server whose sessions take every wish: what a message may ask for is checked before."""
    pipeline = SimpleNamespace(height=16, width=24, fps=8.0, preset=None)
    session = SimpleNamespace(state="running", key="two", change=lambda change: None, watch=lambda viewer: None)
    house = SimpleNamespace(scale=1, open=lambda wish, viewer: session, get=lambda name: session)
    metrics = SimpleNamespace(error=lambda code: None)
    about = SimpleNamespace(job_seconds=60)
    return SimpleNamespace(pipeline=pipeline, house=house, adapters={"style": 1.0}, name="tiny", metrics=metrics,
                           sessions=about, seed=lambda seed: seed or 0)  # fmt: skip


def text_of(value, choose):
    """A message as a client sends it, read as the server reads it. Invalid where it is no JSON."""
    text = json_bytes(value)
    if choose and choose.random() < 0.1:
        text = mutated_bytes(text, choose)
    try:
        return json.loads(text.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return {}


def told(viewer):
    """Everything that a viewer was told, as a socket sends it."""
    while (item := viewer.take()) is not None:
        json.dumps(message_of(item, "r"), ensure_ascii=False).encode()


def live():
    def make(choose):
        kind = choose.choice([START, WATCH, INTERACTION]) if choose else START
        return text_of(mutated_json(kind, choose) if choose else kind, choose)

    def read(value):
        viewer = Viewer("h264")
        desk = Desk(stub_server(), viewer)
        kind = value.get("type") if isinstance(value, dict) else None
        try:
            if kind == "session.watch":
                message = parsed(Watch, value, "session.watch")
                desk.watch(message.session, message.key)
            elif isinstance(value, dict) and "event" in value:
                desk.start(parsed(Start, {"type": "session.start", "prompt": "a"}, "session.start"))
                viewer.holds = True
                desk.interact(value)
            else:
                desk.start(parsed(Start, value, "session.start"))
        except REFUSALS as error:
            json.dumps({"message": str(error)}, ensure_ascii=False).encode()
            raise
        told(viewer)

    return make, read


def jobs():
    return (
        lambda choose: text_of(mutated_json(JOB, choose) if choose else JOB, choose),
        lambda fields: order_of(fields, stub_server()) if isinstance(fields, dict) else parsed(Start, fields, "video"),
    )


def multipart(fields, choose):
    parts = []
    for name, value in fields.items():
        file = b'; filename="a.png"\r\nContent-Type: image/png' if isinstance(value, bytes) else b""
        body = value if isinstance(value, bytes) else (value if isinstance(value, str) else json.dumps(value)).encode(
            "utf-8", "surrogatepass")  # fmt: skip
        name = name.encode("utf-8", "surrogatepass").replace(b"\n", b"")
        parts.append(
            b'--xyz\r\nContent-Disposition: form-data; name="' + name + b'"' + file + b"\r\n\r\n" + body + b"\r\n"
        )
    body = b"".join(parts) + b"--xyz--\r\n"
    return mutated_bytes(body, choose) if choose and choose.random() < 0.5 else body


def forms():
    kinds = ["multipart/form-data; boundary=xyz", "application/json", "application/x-www-form-urlencoded"]

    def make(choose):
        fields = JOB | {"input_reference": PICTURE, "adapters[style]": "0.5"}
        if choose is None:
            return kinds[0], multipart(fields, None)
        for _ in range(choose.choice([0, 1, 2])):
            fields[choose.choice(list(fields))] = choose.choice([odd_value(choose), mutated_bytes(PICTURE, choose)])
        kind = choose.choice([kinds[0], kinds[0], *kinds])
        if kind == kinds[1]:
            return kind, mutated_bytes(json_bytes(mutated_json(JOB, choose)), choose)
        return kind, multipart(fields, choose)

    def read(case):
        kind, body = case

        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        scope = {"type": "http", "method": "POST", "headers": [(b"content-type", kind.encode())], "path": "/",
                 "query_string": b"", "app": None}  # fmt: skip
        fields = asyncio.run(fields_of(Request(scope, receive), MOST))
        order_of(fields, stub_server())

    return make, read


def rtc():
    from serve.web.webrtc.wire import Candidates, Offer, candidate_of, interaction_of, sdp_of, start_of

    offer = {"type": "offer", "sdp": offer_text(), "initialParameters": PARAMETERS | {"prompt": "a"}, "session": None}

    def make(choose):
        kind = choose.choice([offer, PARAMETERS, CANDIDATES]) if choose else offer
        value = mutated_json(kind, choose) if choose else kind
        if choose and isinstance(value, dict) and isinstance(value.get("sdp"), str) and choose.random() < 0.7:
            value["sdp"] = mutated_bytes(value["sdp"].encode("utf-8", "replace"), choose).decode("utf-8", "replace")
        return text_of(value, choose)

    def read(value):
        if isinstance(value, dict) and "candidates" in value:
            [candidate_of(one) for one in parsed(Candidates, value, "candidates").candidates]
        elif isinstance(value, dict) and ("sdp" in value or "initialParameters" in value):
            message = parsed(Offer, value, "offer")
            remote(sdp_of(message))
            start_of(message.initialParameters)
        else:
            interaction, _ = interaction_of(value)
            viewer = Viewer("h264")
            desk = Desk(stub_server(), viewer)
            if interaction is not None:
                desk.interact(interaction)
            told(viewer)

    return make, read


def offer_text():
    """An offer of video and a data channel, as aiortc writes it."""
    from aiortc import RTCPeerConnection

    async def make():
        connection = RTCPeerConnection()
        connection.addTransceiver("video", direction="recvonly")
        connection.createDataChannel("parameters")
        text = (await connection.createOffer()).sdp
        await connection.close()
        return text

    return asyncio.run(make())


def remote(sdp):
    """What the server does with an offer, before its session starts."""
    from aiortc import RTCPeerConnection

    from serve.web.webrtc.routes import _negotiated, discard

    async def take():
        connection = RTCPeerConnection()
        try:
            await _negotiated(connection, sdp)
        finally:
            await discard(connection)

    asyncio.run(take())


KINDS = {"live": live, "jobs": jobs, "forms": forms, "webrtc": rtc}


SECONDS = 30  # of each kind; as a program a file takes another number


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_messages_are_answered_soon(kind):
    make, read = KINDS[kind]()
    refused, answered = fuzz(make, read, SECONDS, refusals=REFUSALS)
    assert refused
    assert answered


FOUND: list[tuple[str, str]] = [("live", "0-0"), ("jobs", "2711-1967")]


@pytest.mark.parametrize(("kind", "seed"), FOUND)
def test_what_fuzzing_found(kind, seed):
    make, read = KINDS[kind]()
    checked(read, make(Random(seed)), REFUSALS)


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    maker, reads = KINDS[sys.argv[1]]()
    fuzz(maker, reads, float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0, REFUSALS)
