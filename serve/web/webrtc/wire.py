"""The JSON of WebRTC: offers and candidates, and the parameters of the data channel in scope's names."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from aiortc import RTCIceCandidate
from aiortc.sdp import candidate_from_sdp
from pydantic import Field

from serve.web.wire import Invalid, Prompt, Seed, Speed, Start, StepList, Transition, _Message, parsed

MOST_SDP = 64 << 10  # characters; a browser's offer has some 10,000
MOST_SECTIONS = 8  # of an SDP: video, audio, data
MOST_CANDIDATES = 64
_METHODS = ("linear", None)  # between prompts; others are answered with a note


class Offer(_Message):
    sdp: Annotated[str, Field(max_length=MOST_SDP)]
    type: Literal["offer"]
    initialParameters: Annotated[dict[str, Any], Field(default_factory=dict)]
    session: Annotated[str, Field(max_length=64)] | None = None


class Candidate(_Message):
    candidate: Annotated[str, Field(max_length=1000)] | None = None
    sdpMid: Annotated[str, Field(max_length=64)] | None = None
    sdpMLineIndex: Annotated[int, Field(ge=0, le=1000)] | None = None


class Candidates(_Message):
    candidates: Annotated[list[Candidate], Field(max_length=MOST_CANDIDATES)]


class Target(_Message):
    target_prompts: Prompt
    num_steps: Transition = 0
    temporal_interpolation_method: str | None = None


class Strength(_Message):
    name: str | None = None
    path: str | None = None
    scale: float


class Strengths(_Message):
    lora_scales: Annotated[list[Strength], Field(max_length=64)]


class Parameters(_Message):
    prompts: Prompt | None = None
    transition: Target | None = None
    lora_scales: Annotated[list[Strength], Field(max_length=64)] | None = None
    paused: bool | None = None
    reset_cache: bool | None = None
    seed: Seed | None = None
    denoising_step_list: StepList | None = None
    window: int | None = None
    speed: Speed | None = None
    event_id: Annotated[str, Field(min_length=1, max_length=200)] | None = None


def start_of(given: Mapping[str, Any]) -> tuple[Start, bool, list[str]]:
    """(the start that an offer asks for, whether it is paused, names without effect). Invalid.

    `initialParameters` are scope's, beside the fields of session.start.
    """
    own = set(Start.model_fields) - {"type", "format"}
    start = {name: value for name, value in given.items() if name in own and value is not None}
    if given.get("prompts") is not None:
        start["prompt"] = given["prompts"]
    if given.get("lora_scales") is not None:
        scales = parsed(Strengths, {"lora_scales": given["lora_scales"]}, "initialParameters")
        start["adapters"] = adapters_of(scales.lora_scales)
    paused = given.get("paused", False)
    if not isinstance(paused, bool):
        raise Invalid(f"initialParameters: paused: got {type(paused).__name__}, expected true or false")
    unknown = [name for name in given if name not in own | {"prompts", "lora_scales", "paused", "type", "format"}]
    return parsed(Start, start | {"type": "session.start"}, "initialParameters"), paused, unknown


def interaction_of(message: Mapping[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
    """(the session.interaction that parameters stand for, names without effect). Invalid.

    A transition's prompts go before `prompts`: scope sends both.
    """
    asked = parsed(Parameters, message, "parameters")
    unknown = [name for name in message if name not in Parameters.model_fields and name != "type"]
    event = {
        "paused": asked.paused, "reset": asked.reset_cache, "seed": asked.seed, "speed": asked.speed,
        "denoising_step_list": asked.denoising_step_list, "window": asked.window, "prompt": message.get("prompts"),
        "adapters": None if asked.lora_scales is None else adapters_of(asked.lora_scales),
    }  # fmt: skip
    steps = 0
    if asked.transition is not None:
        event["prompt"], steps = message["transition"]["target_prompts"], asked.transition.num_steps
        if asked.transition.temporal_interpolation_method not in _METHODS:
            unknown.append("temporal_interpolation_method")
    event = {name: value for name, value in event.items() if value is not None}
    if not event:
        if not unknown:
            names = ", ".join(name for name in Parameters.model_fields if name != "event_id")
            raise Invalid(f"parameters: got none of {names}, expected one")
        return None, unknown
    interaction = {"event": event, "transition_chunks": steps}
    return interaction | ({"event_id": asked.event_id} if asked.event_id else {}), unknown


def adapters_of(scales: list[Strength]) -> dict[str, float]:
    """Strengths by name. Of a path only the stem counts, and no file is opened."""
    found = {}
    for one in scales:
        name = one.name if one.name is not None else PurePosixPath((one.path or "").replace("\\", "/")).stem
        if not name:
            raise Invalid("lora_scales: got an entry without name and path, expected one of them")
        found[name] = one.scale
    return found


def sdp_of(offer: Offer) -> str:
    """The offer's SDP without candidates that are names. Invalid where it is larger than any browser's.

    Browsers hide their addresses behind names of multicast DNS. They reach the server's own candidates without them.
    """
    lines = offer.sdp.splitlines()
    sections = sum(line.startswith("m=") for line in lines)
    if not 1 <= sections <= MOST_SECTIONS:
        raise Invalid(f"sdp: got {sections} media sections, expected 1 to {MOST_SECTIONS}")
    if (count := sum(line.startswith("a=candidate:") for line in lines)) > MOST_CANDIDATES * sections:
        raise Invalid(f"sdp: got {count} candidates, expected at most {MOST_CANDIDATES} a section")
    kept = (line for line in lines if not (line.startswith("a=candidate:") and _named(line)))
    return "".join(f"{line}\r\n" for line in kept)


def candidate_of(one: Candidate) -> RTCIceCandidate | None:
    """A browser's candidate; None at their end, and for a name. Invalid if it is none."""
    text = (one.candidate or "").removeprefix("a=").removeprefix("candidate:").strip()
    if not text or _named(text):
        return None
    if one.sdpMid is None and one.sdpMLineIndex is None:
        raise Invalid("candidate: got neither sdpMid nor sdpMLineIndex, expected one of them")
    try:
        made = candidate_from_sdp(text)
        if not 0 <= made.port <= 65535:
            raise ValueError
    except (ValueError, AssertionError, IndexError):
        raise Invalid(f"candidate: got {text[:60]!r}, expected one in the form of RFC 8839") from None
    made.sdpMid, made.sdpMLineIndex = one.sdpMid, one.sdpMLineIndex
    return made


def _named(line: str) -> bool:
    """Whether a candidate's address is a name."""
    words = line.split()
    if len(words) < 5:
        return False
    try:
        ipaddress.ip_address(words[4])
    except ValueError:
        return True
    return False
