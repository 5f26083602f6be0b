"""What a live viewer may ask of a session, over whatever connection: the answers go to the viewer's queue."""

from __future__ import annotations

import hashlib
import hmac
import json
import uuid
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import numpy as np

from engine.presets import override
from engine.stream import Pipeline
from serve.core.messages import Change, Notice
from serve.core.session import Session, TooMany
from serve.core.viewers import Viewer
from serve.web.server import Refused, Server, error_notice
from serve.web.wire import Interaction, Invalid, Start, change_of, parsed, picture_of, wish_of

MOST_EVENTS = 1000  # ids that are remembered


class Desk:
    """One connection: its viewer, its session, and the events that it has sent."""

    def __init__(self, server: Server, viewer: Viewer) -> None:
        self.server, self.viewer = server, viewer
        self.session: Session | None = None
        self._events: OrderedDict[str, bytes] = OrderedDict()  # id: digest of what was asked

    @property
    def owns(self) -> bool:
        """Whether this viewer may change the video: it started the session, and no other has taken it over."""
        return self.viewer.holds

    def start(self, start: Start) -> Session:
        """Open the session that a start asks for. Invalid, Busy."""
        server, pipeline = self.server, self.server.pipeline
        self._check(start)
        if start.source is not None:
            self._check_source(start)
        clip: np.ndarray | None = None
        notes: list[str] = []
        if start.image is not None:
            clip, notes = picture_of(start.image, pipeline.height, pipeline.width)
        wish = wish_of(start, server.seed(start.seed), clip)
        for change in (Change(prompt=wish.prompt, adapters=wish.adapters), *(past.change for past in wish.history)):
            self._check_change(change)
        self.session = server.house.open(wish, self.viewer)
        for note in notes:
            self.note(note)
        return self.session

    def watch(self, name: str, key: str | None = None) -> Session:
        """Join a running session: to look on, or with its key to take it over. Refused if there is none."""
        session = self.server.house.get(name)
        if session is None or session.state == "ended":
            raise Refused(404, "not_found", f"session: got {name[:64]!r}, expected one that runs")
        if key is not None and not hmac.compare_digest(key.encode(), session.key.encode()):
            raise Refused(403, "forbidden", "key: got another one than the session's, expected none, to look on")
        self.session, self.viewer.holds = session, key is not None
        session.watch(self.viewer)
        return session

    def interact(self, value: Any) -> None:
        """Queue a change. What is wrong with it is told to the viewer."""
        event_id: str | None = None
        try:
            interaction = parsed(Interaction, value, "interaction")
            event_id = interaction.event_id
            change = change_of(interaction, event_id or str(uuid.uuid4()))
            digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
            if (before := self._events.get(change.event)) is not None and before != digest:
                self.error("event_id_conflict", f"event_id: got {change.event!r} with another event before, "
                                                "expected an id of its own", event_id)  # fmt: skip
                return
            if before is None:
                self.change(change)
                self._events[change.event] = digest
                if len(self._events) > MOST_EVENTS:
                    self._events.popitem(last=False)
            self.viewer.put(Notice("interaction.queued", {"event_id": change.event}))
        except Invalid as error:
            self.error("invalid_request", str(error), event_id)
        except TooMany as error:
            self.error("busy", str(error), event_id)

    def change(self, change: Change) -> None:
        """Queue a change of the owner's. Invalid where it cannot be meant; TooMany."""
        if not self.owns or self.session is None:
            raise Invalid("interaction: got one of a viewer who looks on, expected one of who started the session")
        self._check_change(change)
        self.session.change(change)

    def note(self, message: str) -> None:
        self.viewer.put(Notice("note", {"message": message}))

    def error(self, code: str, message: str, event: str | None = None) -> None:
        self.server.metrics.error(code)
        self.viewer.put(error_notice(code, message, event))

    def _check(self, start: Start) -> None:
        """Invalid for a model, size or frame rate that this server has not."""
        pipeline, scale = self.server.pipeline, self.server.house.scale
        if start.model not in (None, "", self.server.name):
            raise Invalid(f"model: got {start.model[:100]!r}, expected {self.server.name!r}")
        for name in ("width", "height"):
            got, own = getattr(start, name), getattr(pipeline, name)
            if got is not None and got not in (own, own * scale):
                also = f" or {own * scale}" if scale > 1 else ""
                raise Invalid(f"{name}: got {got}, expected {own}{also}: the model is loaded for one size")
        if start.fps is not None and start.fps != pipeline.fps:
            raise Invalid(f"fps: got {start.fps:g}, expected {pipeline.fps:g}; `speed` plays faster or slower")

    def _check_source(self, start: Start) -> None:
        """Invalid for a video that cannot follow its viewer's frames."""
        pipeline, source = self.server.pipeline, start.source
        assert source is not None
        if not isinstance(pipeline, Pipeline):
            raise Invalid("source: got it, expected a model whose loop runs in Python, not the C++ core")
        for name, got, expected in (("image", start.image, None), ("resume", start.resume, None),
                                    ("speed", start.speed, 1.0)):  # fmt: skip
            if got != expected:
                raise Invalid(f"source: got {name} as well, expected frames alone, as they come")
        steps = {} if start.denoising_step_list is None else {"steps": start.denoising_step_list}
        try:
            for preset in (pipeline.preset, override(pipeline.preset, steps)):  # the stream opens with its own steps
                replace(pipeline, preset=preset).follows((), source.strength, source.noise_scale)
        except ValueError as error:
            raise Invalid(str(error)) from None

    def _check_change(self, change: Change) -> None:
        """Invalid for what this server's model cannot do."""
        known = self.server.adapters
        if unknown := sorted(set(change.adapters or {}) - set(known)):
            expected = f"one of {', '.join(known)}" if known else "none: this model has no adapters"
            raise Invalid(f"adapters: got the name {unknown[0][:100]!r}, expected {expected}")
        follows = self.session is not None and self.session.input is not None
        if follows and change.speed not in (None, 1.0):
            raise Invalid(f"speed: got {change.speed:g}, expected 1: the video follows frames, as they come")
        settings = {name: value for name, value in change.settings.items() if name != "seed"}
        try:
            override(self.server.pipeline.preset, settings)
        except ValueError as error:
            raise Invalid(str(error)) from None
