"""What viewers saw at once, as the figures of a report."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from bench.instruments.spread import quartiles, summary
from bench.serving.playback import played, realtime_factor
from bench.serving.viewers import Seen


def figures(
    seen: Sequence[Seen], buffer: float, began: float, ended: float, transport: str = "socket"
) -> dict[str, Any]:
    """The figures of one number of viewers, who were there from `began` to `ended`; None for what did not occur.

    First chunks and gaps are those of one transport: over others they are something else. Whole videos that come at
    once have neither deadlines nor gaps.
    """
    streams = [one for one in seen if one.arrivals]
    alike = [one for one in streams if one.transport == transport]
    live = [one for one in streams if one.transport != "jobs"]
    playbacks = [played(one.arrivals, one.plan.fps, buffer) for one in live]
    deadlines = sum(one.deadlines for one in playbacks)
    factors = [f for one in live if (f := realtime_factor(one.arrivals, one.plan.fps)) is not None]
    reached, shown = [], []
    for one, playback in zip(live, playbacks, strict=True):
        for event, number in one.shows.items():
            if event in one.sent:
                reached.append(1e3 * (one.arrivals[number].at - one.sent[event]))
                shown.append(1e3 * (playback.shown[number] - one.sent[event]))
    # The newest switches may not have had time to show; an older one that did not show was lost.
    due = [
        event for one in live for event, at in one.sent.items()
        if event not in one.shows and one.arrivals[-1].at - at > 10 * one.arrivals[-1].frames / one.plan.fps
    ]  # fmt: skip
    samples = {
        "first_chunk_ms": [1e3 * (one.arrivals[0].at - one.asked) for one in alike],
        "gap_ms": [1e3 * (b.at - a.at) for one in alike for a, b in pairwise(one.arrivals)],
        "switch_arrives_ms": reached,
        "switch_shows_ms": shown,
        "chunk_ms": [ms for one in live for ms in one.spent_ms],
    }
    return {
        "viewers": len(seen),
        "started": len(streams),
        "waited": sum(one.waited for one in seen),
        "refused": sum(bool(one.refused) for one in seen),
        "failed": [one.failed for one in seen if one.failed],
        **{name: summary(found) if found else None for name, found in samples.items()},
        "quartiles": {name: quartiles(found) for name, found in samples.items() if found},
        "deadlines": deadlines,
        "deadlines_met": 1 - sum(one.underruns for one in playbacks) / deadlines if deadlines else None,
        "underruns": sum(one.underruns for one in playbacks),
        "underrun_seconds": sum(one.seconds_stood for one in playbacks),
        "realtime": float(np.median(factors)) if factors else None,
        "realtime_slowest": min(factors, default=None),
        "switches": sum(len(one.sent) for one in live),
        "switches_lost": len(due),
        "frames": sum(one.frames for one in streams),
        "fps": sum(one.frames for one in streams) / (ended - began),
        "mbit_per_second": 8e-6 * total / (ended - began) if (total := sum(one.bytes for one in streams)) else None,
        "session_seconds": sum(one.seconds for one in streams),
    }
