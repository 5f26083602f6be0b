"""What made the video of one live socket so far, read from its messages: enough to make it again elsewhere."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

_STARTS = (
    "prompt",
    "seed",
    "adapters",
    "denoising_step_list",
    "window",
    "num_frames",
    "speed",
)  # of a session.start; a client keeps its picture
_SETTINGS = ("seed", "denoising_step_list", "window")
_CHANGES = ("prompt", "adapters", *_SETTINGS)  # that stand in a history
_MOST_EVENTS = 1000  # ids that are remembered, as many as a server remembers


class Past:
    """Of the session that `start` (session.start) opens. Chunks count since the video began, or began again."""

    def __init__(self, start: Mapping[str, Any]) -> None:
        resume = start.get("resume")
        resume = resume if isinstance(resume, dict) else {}
        self._start = {name: start[name] for name in _STARTS if start.get(name) is not None}
        self.session: str | None = None
        self.chunk = resume.get("chunk", 0)  # the next one that the client has not got
        history = resume.get("history")  # of whatever kind: the replica refuses what is wrong
        self.history = [one for one in history if isinstance(one, dict)] if isinstance(history, list) else []
        self._base = dict(self._start)
        self._prompt = next((one["prompt"] for one in reversed(self.history) if one.get("prompt")), start.get("prompt"))
        self._settings = {name: one[name] for one in self.history for name in _SETTINGS if one.get(name) is not None}
        self._now: dict[str, Any] = {}  # speed and pause, where they were changed
        self._asked: dict[str, dict[str, Any]] = {}  # interactions that do not show yet, by event id
        self._seen: dict[str, None] = {}  # event ids; a server does nothing for one that it gets again

    def asked(self, message: Any) -> bool:
        """Note a message of the client. An interaction gets an event id if it has none; True if it was changed."""
        if not isinstance(message, dict) or message.get("type") != "session.interaction":
            return False
        interaction = message.get("interaction")
        if not isinstance(interaction, dict) or not isinstance(interaction.get("event"), dict):
            return False
        given = interaction.get("event_id")
        if given is None:
            interaction["event_id"] = str(uuid.uuid4())
        elif not isinstance(given, str):
            return False
        if interaction["event_id"] not in self._seen:
            self._asked[interaction["event_id"]] = interaction
            self._seen[interaction["event_id"]] = None
            if len(self._seen) > _MOST_EVENTS:
                del self._seen[next(iter(self._seen))]
        return given is None

    def told(self, message: Mapping[str, Any]) -> None:
        """Note a message to the client that has no bytes."""
        if message.get("type") == "video.start":
            self.session = message["session"]
            self._base["seed"] = message["config"]["seed"]
        elif message.get("type") == "error" and message.get("code") != "event_id_conflict":
            self._asked.pop(message.get("event_id") or "", None)
        elif message.get("type") == "session.note" and message.get("event_id") in self._asked:
            # A newer prompt came before this one showed. The rest of the interaction counts.
            interaction = self._asked.pop(message["event_id"])
            event = {name: value for name, value in interaction["event"].items() if name != "prompt"}
            self._apply(self.chunk, interaction | {"event": event})

    def shown(self, chunk: Mapping[str, Any]) -> None:
        """Note a chunk's metadata once the client has its bytes too."""
        number = chunk["generation_chunk_index"]
        for event in chunk["started_event_ids"]:
            if (interaction := self._asked.pop(event, None)) is not None:
                self._apply(number, interaction)
        self.chunk = number + 1

    def resume(self) -> dict[str, Any]:
        """The `resume` of a session.start that goes on with the next chunk, and the rest of that message.

        `pending` holds the interactions that did not show yet, for the client to send again.
        """
        made = {"chunk": self.chunk, "history": self.history, **self._base, **self._now}
        return made | {"session": self.session, "pending": list(self._asked.values())}

    def _apply(self, number: int, interaction: Mapping[str, Any]) -> None:
        event = {name: value for name, value in interaction["event"].items() if value is not None}
        self._now |= {name: event[name] for name in ("speed", "paused") if name in event}
        self._prompt = event.get("prompt", self._prompt)
        self._settings |= {name: event[name] for name in _SETTINGS if name in event}
        reset = event.get("reset", event.get("reset_cache"))
        if reset or ("seed" in event and reset is None):
            seed = self._settings.pop("seed", self._base.get("seed"))
            self.history = [{"chunk": 0, "transition_chunks": 0, **self._settings}] if self._settings else []
            self._base |= {"prompt": self._prompt, "seed": seed}
            self._base["adapters"] = {**(self._start.get("adapters") or {}), **event.get("adapters", {})}
            return
        change = {name: event[name] for name in _CHANGES if name in event}
        if change:
            transition = interaction.get("transition_chunks", 0)
            self.history.append({"chunk": number, "transition_chunks": transition, **change})
