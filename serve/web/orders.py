"""Requests for videos in OpenAI's shape, as JSON or as a form -> jobs."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any

import numpy as np
from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.datastructures import UploadFile

from engine.options import real_number, whole_number
from serve.core.job_store import Job, new_id
from serve.web.server import Refused, Server
from serve.web.wire import MOST_FRAMES, MOST_TEXT, Invalid, parsed, picture_in, picture_of, words_of

SECONDS = 4.0  # where a request has no length, as at OpenAI's
MOST_KEY = 255
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
# Other servers' names for a start picture or clip. Without it the video would be another one than was asked for.
_PICTURES = ("image", "image_url", "image_reference", "video", "video_reference", "reference_url")


def _number(value: Any) -> Any:
    """A number in a text, as forms have it and OpenAI's `seconds`; whatever else it is stays."""
    if isinstance(value, str) and len(value) <= 40:
        with suppress(ValueError):
            return whole_number(value.strip())
        with suppress(ValueError):
            return real_number(value.strip())
    return value


def _table(value: Any) -> Any:
    """An object in a text, as forms have it."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


_Text = BeforeValidator(_number)
_Whole = Annotated[int, _Text, Field(ge=1, le=MOST_FRAMES)]
_Real = Annotated[float, _Text, Field(allow_inf_nan=False)]


class VideoRequest(BaseModel):
    """The fields of POST /v1/videos."""

    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())

    prompt: Annotated[str, Field(max_length=MOST_TEXT)]
    model: str | None = None
    seconds: Annotated[float, _Text, Field(gt=0, allow_inf_nan=False)] | None = None
    size: str | None = None
    width: _Whole | None = None
    height: _Whole | None = None
    fps: _Real | None = None
    num_frames: _Whole | None = None
    seed: Annotated[int, _Text, Field(ge=0, lt=2**64)] | None = None
    adapters: Annotated[dict[str, _Real], BeforeValidator(_table)] | None = None
    num_inference_steps: _Whole | None = None
    guidance_scale: _Real | None = None
    negative_prompt: Annotated[str, Field(max_length=MOST_TEXT)] | None = None
    input_reference: Any = None


async def fields_of(request: Request, most: int) -> dict[str, Any]:
    """The fields of a request of at most so many bytes; a file is its bytes. Invalid; Refused for other types."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind in _FORMS:
        return await _form(request, most)
    if kind != "application/json":
        raise Refused(415, "invalid_request_error", f"content-type: got {kind[:60]!r}, "
                      "expected application/json or multipart/form-data")  # fmt: skip
    body = await request.body()
    try:
        value = await asyncio.to_thread(json.loads, body)  # megabytes take their time
    except (ValueError, RecursionError) as error:
        raise Invalid(f"body: got no JSON, expected an object ({str(error).splitlines()[0][:100]})") from None
    if not isinstance(value, dict):
        raise Invalid(f"body: got {type(value).__name__}, expected an object")
    return value


async def _form(request: Request, most: int) -> dict[str, Any]:
    """A form's fields. name[key] is an entry of an object, as OpenAI's client writes it."""
    found: dict[str, Any] = {}
    async with request.form(max_files=4, max_fields=100, max_part_size=most) as form:
        for name, value in form.multi_items():
            entry = re.fullmatch(r"(\w+)\[([^\]]*)\]", name)
            if isinstance(value, UploadFile):
                if value.size or value.filename:  # a browser sends an empty part for no file
                    found[name] = await value.read()
            elif entry and isinstance(found.get(entry[1], {}), dict):
                found.setdefault(entry[1], {})[entry[2]] = value
            else:
                found[name] = value
    return found


def order_of(fields: Mapping[str, Any], server: Server, key: str = "") -> tuple[Job, np.ndarray | None]:
    """The job that a request asks for, and the picture uint8 [1, H, W, 3] that its video starts from. Invalid."""
    if misnamed := next((name for name in _PICTURES if fields.get(name)), None):
        raise Invalid(f"{misnamed}: got it, expected a start picture as input_reference")
    if len(key) > MOST_KEY:
        raise Invalid(f"Idempotency-Key: got {len(key)} characters, expected at most {MOST_KEY}")
    request: VideoRequest = parsed(VideoRequest, dict(fields), "video")
    pipeline = server.pipeline
    words_of(request.prompt)
    if request.model not in (None, "", server.name):
        raise Invalid(f"model: got {request.model[:100]!r}, expected {server.name!r}")
    if request.fps is not None and request.fps != pipeline.fps:
        raise Invalid(f"fps: got {request.fps:g}, expected {pipeline.fps:g}, the model's own")
    adapters = request.adapters or {}
    if unknown := sorted(set(adapters) - set(server.adapters)):
        expected = f"one of {', '.join(server.adapters)}" if server.adapters else "none: this model has no adapters"
        raise Invalid(f"adapters: got the name {unknown[0][:100]!r}, expected {expected}")
    scale, frames = _scale(request, server), _frames(request, server)
    start, notes = _start(request.input_reference, server)
    notes = [*notes, *_ignored(request, fields, server), *_length_note(request, server)]
    job = Job(
        new_id(), server.name, pipeline.height, pipeline.width, pipeline.fps, request.prompt,
        server.seed(request.seed), frames, scale, adapters, tuple(notes), key=key, digest=_digest(request),
    )  # fmt: skip
    return job, start


def _scale(request: VideoRequest, server: Server) -> int:
    """How often pixels are enlarged for the size that was asked for; as live, if none was."""
    own = server.pipeline.width, server.pipeline.height
    possible = {scale: (own[0] * scale, own[1] * scale) for scale in (server.house.scale, 1)}
    size: tuple[int | None, int | None] = request.width, request.height
    got = f"{request.width or 'any'}x{request.height or 'any'}"
    if request.size is not None:
        found = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", request.size)
        named = (int(found[1]), int(found[2])) if found else (0, 0)
        agree = all(one in (None, other) for one, other in zip(size, named, strict=True))
        size, got = (named, repr(request.size[:60])) if agree else ((0, 0), f"{request.size[:60]!r} and {got}")
    for scale, (width, height) in possible.items():
        if size[0] in (None, width) and size[1] in (None, height):
            return scale
    expected = " or ".join(f"{width}x{height}" for width, height in sorted(set(possible.values())))
    raise Invalid(f"size: got {got}, expected {expected}: the model is loaded for one size")


def _frames(request: VideoRequest, server: Server) -> int:
    """How many frames were asked for."""
    fps, most = server.pipeline.fps, server.sessions.job_seconds
    if request.num_frames is not None:
        if request.num_frames > most * fps:
            raise Invalid(f"num_frames: got {request.num_frames}, expected at most {int(most * fps)}")
        return request.num_frames
    seconds = SECONDS if request.seconds is None else request.seconds
    if request.seconds is not None and seconds > most:
        raise Invalid(f"seconds: got {seconds:g}, expected at most {most:g}")
    return max(1, round(min(seconds, most) * fps))


def _start(reference: Any, server: Server) -> tuple[np.ndarray | None, list[str]]:
    """The picture uint8 [1, H, W, 3] of input_reference, and notes about it. Invalid if it is none."""
    size = server.pipeline.height, server.pipeline.width
    if reference is None or reference in ("", {}):
        return None, []
    if isinstance(reference, dict):
        if not isinstance(reference.get("image_url"), str):
            raise Invalid(f"input_reference: got {_listed(sorted(reference))}, expected image_url with a data URL: "
                          "this server stores no files")  # fmt: skip
        reference = reference["image_url"]
    try:
        if isinstance(reference, bytes):
            return picture_in(reference, *size)
        if not isinstance(reference, str):
            raise Invalid(f"got {type(reference).__name__}, expected a file, a data URL or an object")
        if re.match(r"\s*(https?|ftp|file):", reference, re.IGNORECASE):
            raise Invalid("got an address, expected a file or a data URL: this server fetches nothing")
        return picture_of(reference, *size)
    except Invalid as error:
        why = str(error).removeprefix("image: ").removesuffix(": pass it as --video")
        raise Invalid(f"input_reference: {why}") from None


def _ignored(request: VideoRequest, fields: Mapping[str, Any], server: Server) -> list[str]:
    """What was asked for and changes nothing. Clients of other servers send it by default, so it is no error."""
    notes = []
    preset = getattr(server.pipeline, "preset", None)
    steps = sorted({len(row) for row in preset.steps}) if preset else []
    if request.num_inference_steps is not None and request.num_inference_steps not in steps:
        own = " or ".join(map(str, steps)) or "its own number of"
        notes.append(f"num_inference_steps: got {request.num_inference_steps}, ignored: the model takes {own} steps")
    if request.guidance_scale not in (None, 1.0):
        notes.append(f"guidance_scale: got {request.guidance_scale:g}, ignored: the model was distilled with its own")
    if request.negative_prompt and request.negative_prompt.strip():
        notes.append("negative_prompt: got a text, ignored: a distilled model has no negative prompt")
    known = {*VideoRequest.model_fields, *_PICTURES}
    others = [name for name in fields if name not in known]
    if others:
        notes.append(f"ignored, as this server does not know it: {_listed(others)}")
    return notes


def _listed(names: list[str]) -> str:
    """A client's names, on one line of bounded length."""
    return ", ".join(repr(name[:40]) for name in names[:5]) + (", ..." if len(names) > 5 else "")


def _length_note(request: VideoRequest, server: Server) -> list[str]:
    if request.num_frames is None or request.seconds is None:
        return []
    frames = request.seconds * server.pipeline.fps
    same = frames < 2 * MOST_FRAMES and request.num_frames == max(1, round(frames))  # it may be beyond all floats
    return [] if same else [f"seconds: got {request.seconds:g}, ignored: num_frames is {request.num_frames}"]


def _digest(request: VideoRequest) -> str:
    """A hash of what was asked for: the same for the same request, as JSON or as a form."""
    reference = request.input_reference
    told = reference.hex() if isinstance(reference, bytes) else reference
    values = request.model_dump(exclude={"input_reference"}) | {"input_reference": told}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
