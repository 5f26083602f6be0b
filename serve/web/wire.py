"""The JSON of live sessions: messages of viewers, checked, and items of a session as messages to them."""

from __future__ import annotations

import base64
import binascii
import re
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from engine.media.pictures import read_image
from serve.core.messages import Change, Chunk, Follow, Notice, Past, Wish, Words
from serve.core.prompts import check_words

MOST_TEXT = 20_000  # characters of a prompt
MOST_FRAMES = 2**53 - 1
SLOWEST = 0.01  # speed
FORMATS = {"m4s": "h264", "jpeg": "jpeg", "rgb": None}  # of a socket: the codec of its viewer


_DECODING = threading.Lock()  # one picture at a time: a small file may have gigabytes of pixels


class Invalid(ValueError):
    """A message that is not of the protocol."""


def _speed(value: float) -> float:
    """A slower clock would take the next change of speed minutes later."""
    if 0 < value < SLOWEST:
        raise PydanticCustomError("speed", "0, or {least} to 100", {"least": SLOWEST})
    return value


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())


class Weighted(_Message):
    text: Annotated[str, Field(max_length=MOST_TEXT)]
    weight: float = 1.0


Prompt = Annotated[str, Field(max_length=MOST_TEXT)] | Annotated[list[Weighted], Field(min_length=1, max_length=16)]
Transition = Annotated[int, Field(ge=0, le=1000)]
Strengths = dict[str, Annotated[float, Field(allow_inf_nan=False)]]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Row = Annotated[list[float], Field(max_length=50)]
StepList = Row | Annotated[list[Row], Field(max_length=10)]  # of all chunks; or of chunk 0, chunk 1, ..., the rest
Speed = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False), AfterValidator(_speed)]


class PastMessage(_Message):
    chunk: Annotated[int, Field(ge=0)]
    prompt: Prompt | None = None
    adapters: Strengths | None = None
    transition_chunks: Transition = 0
    seed: Seed | None = None
    denoising_step_list: StepList | None = None
    window: int | None = None


class Resume(_Message):
    chunk: Annotated[int, Field(ge=0, le=1_000_000)]
    history: Annotated[list[PastMessage], Field(max_length=10_000)] = []


class SourceMessage(_Message):
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    noise_scale: Annotated[float, Field(gt=0, lt=1)] | None = None


class Start(_Message):
    type: Literal["session.start"]
    prompt: Prompt
    model: str | None = None
    format: Literal["m4s", "jpeg", "rgb"] = "m4s"
    seed: Seed | None = None
    num_frames: Annotated[int, Field(ge=1, le=MOST_FRAMES)] | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    speed: Speed = 1.0
    image: str | None = None
    source: SourceMessage | None = None
    adapters: Strengths = {}
    denoising_step_list: StepList | None = None
    window: int | None = None
    resume: Resume | None = None


class Watch(_Message):
    type: Literal["session.watch"]
    session: Annotated[str, Field(max_length=64)]
    key: Annotated[str, Field(max_length=64)] | None = None  # of who started it
    format: Literal["m4s", "jpeg", "rgb"] = "m4s"


class Event(_Message):
    prompt: Prompt | None = None
    adapters: Strengths | None = None
    paused: bool | None = None
    speed: Speed | None = None
    seed: Seed | None = None
    reset: bool | None = None
    reset_cache: bool | None = None  # scope's name for it
    denoising_step_list: StepList | None = None
    window: int | None = None


class Interaction(_Message):
    event: Event
    event_id: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    transition_chunks: Transition = 0


def parsed(kind: type[BaseModel], value: Any, what: str) -> Any:
    """An instance of a message's class. Invalid, on one line with got and expected, where it does not fit."""
    if not isinstance(value, dict):
        raise Invalid(f"{what}: got {type(value).__name__}, expected an object")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:60] for part in first["loc"] if str(part).isidentifier() or isinstance(part, int))
        got = "nothing" if first["type"] == "missing" else _short(first["input"])
        raise Invalid(f"{what}: {where or 'message'}: got {got}, expected: {first['msg']}") from None


def words_of(prompt: str | list[Weighted]) -> Words:
    """The texts and weights of a prompt. Invalid for what no model reads."""
    words = ((prompt, 1.0),) if isinstance(prompt, str) else tuple((one.text, one.weight) for one in prompt)
    try:
        check_words(words)
    except ValueError as error:
        raise Invalid(str(error)) from None
    return words


def change_of(interaction: Interaction, event_id: str) -> Change:
    """The change that an interaction asks for. Invalid if it asks for nothing."""
    event = interaction.event
    if not event.model_fields_set & set(Event.model_fields):
        raise Invalid(f"event: got none of {', '.join(Event.model_fields)}, expected one")
    return Change(
        event_id, None if event.prompt is None else words_of(event.prompt), interaction.transition_chunks,
        event.adapters, event.paused, event.speed, event.seed,
        event.reset_cache if event.reset is None else event.reset, event.denoising_step_list, event.window,
    )  # fmt: skip


def wish_of(start: Start, seed: int, clip: np.ndarray | None) -> Wish:
    """The video that a start asks for."""
    past = [] if start.resume is None else start.resume.history
    settings = Change(steps=start.denoising_step_list, window=start.window)
    source = None if start.source is None else Follow(start.source.strength, start.source.noise_scale)
    return Wish(
        words_of(start.prompt), seed, start.num_frames, start.speed, clip, start.adapters,
        (Past(0, settings),) * bool(settings.settings) + tuple(
            Past(one.chunk, Change(
                "", None if one.prompt is None else words_of(one.prompt), one.transition_chunks, one.adapters,
                seed=one.seed, reset=False, steps=one.denoising_step_list, window=one.window,
            )) for one in sorted(past, key=lambda one: one.chunk)
        ),
        0 if start.resume is None else start.resume.chunk, source,
    )  # fmt: skip


def picture_of(text: str, height: int, width: int) -> tuple[np.ndarray, list[str]]:
    """A picture in base64 or a data URL as (uint8 [1, height, width, 3], notes). Invalid if it is none."""
    found = re.match(r"data:[\w/+.;=-]*;base64,", text)
    try:
        data = base64.b64decode(text[found.end() if found else 0 :], validate=True)
    except (binascii.Error, ValueError):
        raise Invalid("image: got text that is no base64, expected a picture in base64 or a data URL") from None
    return picture_in(data, height, width)


def picture_in(data: bytes, height: int, width: int) -> tuple[np.ndarray, list[str]]:
    """The picture in a file's bytes, as `picture_of`."""
    notes: list[str] = []
    with _DECODING, tempfile.TemporaryDirectory(prefix="greedy-serve-") as folder:
        file = Path(folder) / "picture"
        file.write_bytes(data)
        try:
            return read_image(file, height, width, notes), notes
        except (ValueError, ImportError, OSError) as error:
            raise Invalid(str(error).replace(str(file), "a file")) from None


def message_of(item: Chunk | Notice, request: str) -> dict[str, Any]:
    """What a viewer is told of an item; a chunk's bytes come separately (`payload_of`)."""
    if isinstance(item, Chunk):
        return {
            "type": "video.chunk_metadata", "request_id": request, "kind": "media",
            "generation_chunk_index": item.number, "num_frames": len(item.frames),
            "started_event_ids": item.started, "active_event_ids": item.active, "completed_event_ids": item.completed,
            "prompt": item.prompt, "first_frame": item.position, "take": item.take, "skipped": item.skipped,
            "speed": item.speed,
            "chunk_ms": round(1e3 * item.spent, 3), "late_ms": round(1e3 * item.late, 3),
        }  # fmt: skip
    return {"type": _TYPES.get(item.kind, f"session.{item.kind}"), "request_id": request, **item.about}


_TYPES = {"start": "video.start", "error": "error"}


def payload_of(chunk: Chunk, format: str, first: bool) -> bytes:
    """A chunk's bytes in a socket's format; the first ones of an m4s begin with the init segment."""
    if format == "rgb":
        return np.ascontiguousarray(chunk.frames).tobytes()
    if format == "jpeg":
        return b"".join(len(unit.data).to_bytes(4, "big") + unit.data for unit in chunk.units)
    return chunk.init + chunk.fragment if first else chunk.fragment


def close_reason(message: str) -> str:
    """As much of a message as a socket's close frame takes: 123 bytes (RFC 6455, 5.5)."""
    return message.encode()[:120].decode(errors="ignore")


def error_body(kind: str, message: str, code: str | None = None) -> Mapping[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"type": kind, "message": message, "code": code or kind, "param": None}}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
