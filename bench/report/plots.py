"""Pictures of results; needs matplotlib (extra `bench`)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plots: got no package matplotlib, expected pip install 'greedy-stream[bench]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _caption(result: dict[str, Any]) -> str:
    stream = result["stream"]
    return f"{stream['model']}, {stream['width']}x{stream['height']}, {result['device']}, {result['machine']['date']}"


def _plain_ticks(ax: Any) -> None:
    """A few plain numbers as ticks instead of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _compare(result: dict[str, Any], plt: Any) -> dict[str, Any]:
    """Two pictures: cumulative time against frames, and throughput against latency."""
    growth, ax = plt.subplots(figsize=(7, 4.5))
    for v in result["variants"]:
        frames, seconds = zip(*v["cumulative"], strict=True)
        streamed = v["about"].startswith("this engine")
        ax.plot(frames, seconds, "-" if streamed else "o--", label=v["name"] if streamed else v["about"])
    ax.set(xlabel="frames on the host", ylabel="seconds", title=_caption(result), xscale="log", yscale="log")
    ax.title.set_fontsize(9)
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3, which="both")
    _plain_ticks(ax)
    speed, ax = plt.subplots(figsize=(7, 4.5))
    for v in result["variants"]:
        ax.plot(v["latency_ms"], v["fps"], "o")
        ax.annotate(v["name"], (v["latency_ms"], v["fps"]), xytext=(5, 5), textcoords="offset points", fontsize=8)
    ax.set(
        xlabel="ms to the first frame", ylabel="frames per second", xscale="log", yscale="log", title=_caption(result)
    )
    ax.title.set_fontsize(9)
    ax.margins(0.2)
    ax.grid(alpha=0.3, which="both")
    _plain_ticks(ax)
    return {"compare-growth": growth, "compare-speed": speed}


def _scaling(result: dict[str, Any], plt: Any) -> dict[str, Any]:
    """One panel per sweep: measured milliseconds per chunk, beside counted FLOPs scaled to the last point."""
    sweeps = result.get("sweeps", {})
    if not sweeps:
        return {}
    figure, axes = plt.subplots(2, -(-len(sweeps) // 2), figsize=(11, 6), squeeze=False)
    for ax in axes.flat[len(sweeps) :]:
        ax.set_visible(False)
    for ax, (name, points) in zip(axes.flat, sweeps.items(), strict=False):
        x = [p["value"] for p in points]
        y = [p["ms_per_chunk"]["median"] for p in points]
        low, high = ([abs(p["ms_per_chunk"][q] - m) for p, m in zip(points, y, strict=True)] for q in ("q1", "q3"))
        ax.errorbar(x, y, yerr=[low, high], marker="o", label="measured")
        if all("gflop" in p for p in points):
            ax.plot(x, [y[-1] * p["gflop"] / points[-1]["gflop"] for p in points], "--", label="counted FLOPs, scaled")
        ax.set(xlabel=name, ylabel="ms per chunk")
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    figure.suptitle(_caption(result), fontsize=9)
    figure.tight_layout()
    return {"scaling": figure}


_PLOTS: dict[str, Callable[[dict[str, Any], Any], dict[str, Any]]] = {"compare": _compare, "scaling": _scaling}


def draw(kind: str, result: dict[str, Any], folder: Path, suffix: str = "") -> list[Path]:
    """Write the pictures of one kind of result into a folder; returns their paths."""
    if kind not in _PLOTS:
        return []
    plt = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in _PLOTS[kind](result, plt).items():
        path = folder / f"{name}{suffix}.png"
        # The file holds no date and no version, so that the same numbers give the same file.
        figure.savefig(path, dpi=90, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
        written.append(path)
    return written
