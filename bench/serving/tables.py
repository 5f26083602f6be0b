"""A report about serving as rows of tables, on a terminal and on docs/performance.md."""

from typing import Any


def point_row(point: dict[str, Any]) -> dict[str, Any]:
    """A point as a row of a table."""

    def of(name: str, percentile: str) -> float | None:
        return point[name][percentile] if point[name] else None

    met, memory = point["deadlines_met"], point["memory_mb"]
    return {
        "viewers": point["viewers"], "transport": point["transport"], "streams": point["started"],
        "waited": point["waited"], "refused": point["refused"], "fps": point["fps"],
        "first ms": of("first_chunk_ms", "p50"), "p99": of("first_chunk_ms", "p99"), "gap ms": of("gap_ms", "p50"),
        "gap p99": of("gap_ms", "p99"), "deadlines met": None if met is None else f"{met:.2%}",
        "underruns": point["underruns"], "stood s": point["underrun_seconds"], "real time": point["realtime"],
        "switch ms": of("switch_arrives_ms", "p50"), "shown ms": of("switch_shows_ms", "p50"),
        "shown p99": of("switch_shows_ms", "p99"), "CPU s per s": point["cpu_per_session_second"],
        "MB": memory["most"] if memory else None,
    }  # fmt: skip


def overhead_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The comparison with the plain loop as rows of a table."""
    return [
        {
            "what": row["what"], "CPU ms": row["cpu_ms"]["cpu"], "session": row["cpu_ms"]["video"],
            "connections": row["cpu_ms"]["loop"], "beside the engine": f"{row['beside']:.1%}" if row["ratio"] else None,
            "over the loop": f"{row['ratio']['median']:.3f} [{row['ratio']['low']:.3f}, {row['ratio']['high']:.3f}]"
            if row["ratio"] else None,
        }
        for row in found["rows"]
    ]  # fmt: skip
