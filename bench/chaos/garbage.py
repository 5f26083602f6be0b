"""Messages that no server of live video takes, drawn from a seed."""

from __future__ import annotations

import json
import random
from typing import Any

LONG = 1 << 20  # characters
DEEP = 100_000  # brackets
_WRONG: tuple[Any, ...] = (None, True, -1, 1e999, [], {}, [[]], "\ud800", "\0", "", 2**70, {"text": 1}, ["a", 1])
FIELDS = {  # and a value of another type than theirs, or beyond their limits
    "prompt": (None, 1, [], {}, [{"text": 1}], [{"weight": 1}], "x" * LONG, "", [{"text": "a", "weight": "b"}]),
    "seed": (-1, 2**64, 1.5, "1", [], True),
    "num_frames": (0, -1, 1.5, "1", 2**60),
    "format": ("gif", 1, None, []),
    "speed": (-1, 101, float("nan"), float("inf"), "1", []),
    "width": (1, -1, "32", []),
    "fps": (0, -1, 1e9, "8", []),
    "model": ("none such", 1, []),
    "image": ("no base64!", "data:image/png;base64,AAAA", 1, []),
    "adapters": ({"none": 1.0}, {"a": "b"}, [], 1),
    "resume": ({}, {"chunk": -1}, {"chunk": 2**40}, {"chunk": 1, "history": [{"chunk": "a"}]}, []),
}
_EVENTS = {
    "prompt": [value for value in FIELDS["prompt"] if value is not None],  # null leaves a thing as it is
    "adapters": ({"none": 1.0}, {"a": "b"}, [], 1),
    "paused": (1, "yes", [], {}),
    "speed": FIELDS["speed"],
    "seed": FIELDS["seed"],
    "reset": (1, "yes", []),
}
# What a server may take or refuse, but has to answer.
_ODD: tuple[dict[str, Any], ...] = (
    *(
        {"event": {"prompt": text}}
        for text in ("\ud800", "a\0b", "\u202e\u0007", "\U0001f534 " * 500, " ", "x" * 19_999)
    ),
    *({"event": {"prompt": [{"text": "a", "weight": w}, {"text": "b"}]}} for w in (0.0, -1.0, 1e30, 1e-30, 1e308)),
    {"event": {"prompt": [{"text": "a", "weight": 1.0}, {"text": "b", "weight": -1.0}]}},
    {"event": {"prompt": "a"}, "event_id": "\ud800"},
    {"event": {"prompt": "a"}, "event_id": "\0"},
    {"event": {"prompt": "a"}, "event_id": "x" * 200},
    {"event": {"prompt": "a"}, "transition_chunks": 1000},
    {"event": {"seed": 2**64 - 1}},
    {"event": {"reset": True}},
    {"event": {"prompt": None}},
    {"event": {"speed": 100}},
    {"event": {"speed": 1e-300}},
    {"event": {"speed": 1}},
)
KEYS = ("", "none", "\ud800", "\0", "\u00e9", "x" * 64)  # of a session, and none is right


def _nonsense(draw: random.Random) -> str | bytes:
    """What is no JSON object of the protocol at all."""
    return draw.choice((
        lambda: draw.randbytes(draw.randrange(1, 4096)),
        lambda: "".join(chr(draw.randrange(32, 0x2FFF)) for _ in range(draw.randrange(1, 200))),
        lambda: "[" * DEEP,
        lambda: '{"a":' * DEEP,
        lambda: "[" * DEEP + "]" * DEEP,
        lambda: json.dumps("x" * LONG),
        lambda: json.dumps(list(range(100_000))),
        lambda: "9" * 10_000,
        lambda: json.dumps(draw.choice(_WRONG)),
        lambda: json.dumps({"type": draw.choice(_WRONG)}),
        lambda: json.dumps({"type": "session.start"})[: draw.randrange(1, 20)],
        lambda: '{"type": "session.none", "x": NaN}',
    ))()  # fmt: skip


def first(draw: random.Random) -> str | bytes:
    """A first message that starts no session."""
    if draw.random() < 0.4:
        return _nonsense(draw)
    if draw.random() < 0.1:
        return json.dumps({"type": "session.watch", "session": draw.choice(_WRONG), "key": draw.choice(("", "\ud800"))})
    name = draw.choice(list(FIELDS))
    start = {"type": "session.start", "prompt": "a red circle", name: draw.choice(FIELDS[name])}
    if name == "prompt" and draw.random() < 0.2:
        del start["prompt"]
    return json.dumps(start)


def later(draw: random.Random) -> str | bytes:
    """A message that changes nothing in a session."""
    if draw.random() < 0.4:
        return _nonsense(draw)
    if draw.random() < 0.3:
        wrong = [value for value in _WRONG if value != {"text": 1}]
        return json.dumps({"type": "session.interaction", "interaction": draw.choice(wrong)})
    name = draw.choice(list(_EVENTS))
    event = {name: draw.choice(_EVENTS[name])}
    return json.dumps({"type": "session.interaction", "interaction": {"event": event}})


def odd() -> list[str]:
    """Messages at the edge of what a session takes."""
    return [json.dumps({"type": "session.interaction", "interaction": one}) for one in _ODD]


def requests(draw: random.Random) -> bytes:
    """What is no HTTP request, or only the beginning of one."""
    return draw.choice((
        lambda: draw.randbytes(draw.randrange(1, 4096)),
        lambda: b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 200_000,
        lambda: b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: nine\r\n\r\n",
        lambda: b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        lambda: b"GET /v1/realtime/video HTTP/1.1\r\nHost: [::1]\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        lambda: b"GET /" + bytes([draw.randrange(128, 256)]) * 20 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        lambda: b"GET /v1/sessions/%00%ff/video HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ))()  # fmt: skip
