"""What viewers of a server saw, as a section of docs/performance.md."""

from collections.abc import Callable
from typing import Any

from bench.serving import tables

Rows = list[dict[str, Any]]


def section(r: dict[str, Any], markdown: Callable[[Rows], list[str]]) -> list[str]:
    """The tables of a `bench serve`."""
    s = r["server"]
    about = (
        f"The server of `{s['id']}` ({s['width']}x{s['height']}, {s['fps']:g} fps, {s['chunk_frames']} frames a chunk) "
        f"holds {s['capacity']} live sessions here. Viewers come over loopback. A simulated player starts "
        f"{s['buffer_ms']:g} ms after its first chunk."
    )
    lines = [about, "", *markdown([tables.point_row(point) for point in r["points"]])]
    if "overhead" in r:
        lines += [
            "",
            "CPU milliseconds per chunk: one thread, one viewer who takes chunks as fast as they are made.",
            "",
        ]
        lines += markdown(tables.overhead_rows(r["overhead"]))
    if "chaos" in r:
        lines += ["", "Misbehaviour beside a witness, whose frames stayed the same bit for bit:", ""]
        lines += markdown(r["chaos"])
    return lines
