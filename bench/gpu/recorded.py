"""Streams that other code recorded, replayed through every way: the strongest check there is, in seconds."""

from functools import partial

from bench.gpu.lines import Lines
from bench.instruments import recordings
from bench.instruments.check import CASES, WIDE_CASES
from bench.instruments.ways import WAYS


def recorded(lines: Lines) -> None:
    for way in reversed(WAYS):  # graphs first: what users run
        lines.attempt(f"recorded cases through {way}", partial(_through, lines, way))


def _through(lines: Lines, way: str) -> None:
    results = [result for folder in (CASES, WIDE_CASES) for result in recordings.run(folder, lines.device, way)]
    for result in results:
        lines.add("row", table="recorded cases", way=way, **vars(result))
    worst = max((r for r in results if r.dtype == "float32"), key=lambda r: r.max_abs_error)
    red = [r.name for r in results if not r.passed]
    detail = f"worst float32 error {worst.max_abs_error:.1e}" + (f"; red: {', '.join(red)}" if red else "")
    lines.check(f"{len(results)} recorded cases through {way}", not red, detail)
