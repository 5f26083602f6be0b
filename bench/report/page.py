"""docs/performance.md from the saved results: our measurements by machine, then published numbers of other engines."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.instruments.header import ROOT
from bench.report import gpu, plots, saved, serving
from engine.files import whole_file
from engine.options import option

PAGE = ROOT / "docs" / "performance.md"
PUBLISHED = Path(__file__).parent / "published.toml"


@dataclass(frozen=True, kw_only=True)
class Options(saved.Stored):
    out: Path = option(PAGE, "the page", metavar="FILE")


INTRO = """\
# Performance

`make docs-performance` generates this page from the files in [bench/results](../bench/results); do not edit it.
[benchmarks.md](benchmarks.md) explains each number and how to measure your own machine. Every measurement ran its
correctness checks first, in the same process.
"""


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return lines + ["| " + " | ".join(_number(row.get(name)) for name in names) + " |" for row in rows]


def _interval(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def _where(r: dict[str, Any]) -> list[str]:
    """The conditions of a measurement: one line under its heading."""
    m, s = r["machine"], r.get("stream")
    v = m["versions"]
    parts = [f"{m['device']}, {m['cores']} cores, threads: {m['threads']}", f"torch {v['torch']}", m["date"],
             f"commit {m['commit']}" if m["commit"] else "", f"load average {m['load_average']:.1f}"]  # fmt: skip
    if s:
        parts = [f"{s['model']} ({s['layers']} layers of {s['dim']})", f"{s['width']}x{s['height']}", s["precision"],
                 f"backend {s['backend']}", *parts]  # fmt: skip
    command = f"python -m bench {r['arguments']}" if r.get("arguments") else ""
    return [", ".join(filter(None, parts)) + ".", *([f"`{command}`"] if command else []), ""]


def _variant(r: dict[str, Any]) -> str:
    s = r["stream"]
    return s["preset"] if s["backend"] == "torch" else f"{s['preset']} ({s['backend']})"


def _gflop(r: dict[str, Any]) -> str:
    """Counted work per chunk. The work of a compiled VAE is not counted."""
    return f"{r['gflop_per_chunk']:.3g}" + ("" if "vae" in r["roofline"] else " without VAE")


def _streams(found: list[dict[str, Any]]) -> list[str]:
    lines = ["## One stream", *_where(found[0])]
    lines += markdown([
        {
            "preset": _variant(r), "fps": r["fps"], "without VAE": r["fps_without_vae"],
            "without text": r["fps_without_text"], "first frame ms": r["ttff_ms"], "warm": r["ttff_warm_ms"],
            "chunk ms p50": r["ms_per_chunk"]["p50"], "p99": r["ms_per_chunk"]["p99"],
            "frames per chunk": r["frames_per_chunk"], "peak MB": r["peak_memory_mb"],
            "GFLOP per chunk": _gflop(r), "MFU": f"{r['mfu']:.0%}", "floor ms": r["floor_ms"],
        }
        for r in found
    ])  # fmt: skip
    for r in found:
        c, whole = r["ceilings"], sum(r["stages_ms"].values())
        lines += ["", f"The parts of a `{_variant(r)}` chunk ({whole:.2f} ms metered; {abs(r['unexplained']):.1%} of "
                  "it is unexplained and counted as other). Ceilings in the same run: "
                  f"{c['flops'] / 1e9:.0f} GFLOP/s, {c['bytes'] / 1e9:.0f} GB/s. Memory: "
                  + ", ".join(f"{name} {mb:.0f} MB" for name, mb in r["memory_mb"].items()) + ".", ""]  # fmt: skip
        lines += markdown([
            {"part": name, "ms": ms, "share": f"{ms / whole:.1%}"}
            | {key: r["roofline"].get(name, {}).get(key) for key in ("gflop", "mb", "floor_ms", "mfu")}
            for name, ms in r["stages_ms"].items() if ms
        ])  # fmt: skip
    return lines


def _compare(r: dict[str, Any]) -> list[str]:
    lines = ["## Side by side", *_where(r)]
    text = (
        f"{r['frames']} frames per video, {r['rounds']} interleaved rounds. Ratios are to `{r['baseline']}`: median of "
        "pairs [95% interval]. The time per frame is the time of a steady chunk, decoding included, over its frames. "
        "Engines that make whole videos have the time of the video over its frames."
    )
    lines += [text, ""]
    lines += markdown([
        {
            "engine": v["about"], "ms per frame": v["ms_per_frame"]["median"], "fps": v["fps"],
            "first frame ms": v["latency_ms"], "video s": v["video_seconds"], "time ratio": _interval(v["ratio"]),
            "GFLOP per frame": v.get("gflop_per_frame"), "FLOPs ratio": v.get("flops_ratio"),
        }
        for v in r["variants"]
    ])  # fmt: skip
    if r.get("claim"):
        c = r["claim"]
        text = (
            "The greedy chunk against the frame-wise causal chunk with a full window of 21 frames, at the same "
            f"geometry. {c['time_ratio']['pairs']} steady chunks of each ran side by side:"
        )
        lines += ["", text, ""]
        lines += markdown([
            {"counted": name, "FLOPs ratio": f"{c['flops_ratio' + key]:.3f}",
             "time ratio": _interval(c["time_ratio" + key]), "greedy ms": c["time_ratio" + key]["ours"]["median"],
             "frame-wise ms": c["time_ratio" + key]["base"]["median"]}
            for name, key in (("the whole chunk", ""), ("without the VAE", "_without_vae"))
        ])  # fmt: skip
    return lines


def _scaling(r: dict[str, Any]) -> list[str]:
    lines = ["## How cost grows", *_where(r)]
    text = (
        f"{r['chunks']} chunks of one stream: a late chunk takes {r['time_ratio']:.3f} times as long as an early one. "
        f"Memory grew by {r['memory_growth_mb']:.1f} MB. {r['loop_overhead']:.1%} of the time passes outside model "
        "calls."
    )
    lines += [text]
    if r.get("claim"):
        flops, took = r["claim"]["flops"], r["claim"]["time"]
        says = "match exactly" if flops["formula_exact"] else "do NOT match"
        text = (
            "The paper's complexity is (w + T) F L^2. Self-attention of a chunk takes 4 d layers L^2 (w + 3 T + 3) "
            f"FLOPs: the counted FLOPs {says} in every sweep below. Linear layers and the VAE add work that is linear "
            "in L."
        )
        lines += ["", text, ""]
        lines += markdown([
            {"term": "F, chunks", "counted": f"linear (r2 {flops['F']['r2']:.6f}); bidirectional attention: exponent "
             f"{flops['bidirectional_F_exponent_attention']:.2f}",
             "measured": f"late / early {took['F_late_over_early']:.3f}"},
            *({"term": name, "counted": f"{flops[key]['slope']:.3g} GFLOP each (r2 {flops[key]['r2']:.6f})",
               "measured": f"{took[key]['slope']:.3g} ms each (r2 {took[key]['r2']:.3f})"}
              for name, key in (("T, steps", "T"), ("w, window", "w"))),
            {"term": "L, tokens", "counted": f"exponent {flops['L_exponent_attention']:.2f} attention, "
             f"{flops['L_exponent_all']:.2f} all", "measured": f"exponent {took['L_exponent_all']:.2f} all"},
        ])  # fmt: skip
    for name, points in r.get("sweeps", {}).items():
        lines += ["", f"By {'tokens per frame' if name == 'resolution' else name}:", ""]
        lines += markdown([
            {name: p["value"], "ms per chunk": p["ms_per_chunk"]["median"],
             "middle half": f"{p['ms_per_chunk']['q1']:.4g} to {p['ms_per_chunk']['q3']:.4g}"}
            | {key: p[key] for key in ("gflop", "attention_gflop", "fps") if key in p}
            for p in points
        ])  # fmt: skip
    return lines


def _load(r: dict[str, Any]) -> list[str]:
    lines = ["## Streams at once", *_where(r)]
    most = " (no larger number was tried)" if r["capped"] else ""
    lines += [f"{r['streams_at_target']} streams hold {r['target_fps']:g} frames per second each{most}.", ""]
    return lines + markdown([
        {"streams": p["streams"], "fps together": p["fps"], "slowest fps": p["slowest_fps"],
         "chunk ms p50": p["ms_per_chunk"]["p50"], "worst p99": p["worst_p99_ms"], "fairness": p["fairness"],
         "caches MB each": p["state_mb"]}
        for p in r["points"]
    ])  # fmt: skip


def _kernels(r: dict[str, Any]) -> list[str]:
    lines = ["## Operations", *_where(r)]
    return lines + markdown([
        {"operation": c["op"], "shape": c["shape"], "error": f"{c['errors']['ours']:.1e}",
         "ms": c["ms"]["ours"]["median"], f"best library ({c['best_library']})": c["ms"][c["best_library"]]["median"],
         "time ratio": _interval(c["time_ratio"]), "GFLOP/s": c["gflops"], "MFU": f"{c['mfu']:.0%}"}
        for c in r["cases"] if c["passed"]
    ])  # fmt: skip


def _published() -> list[str]:
    numbers = tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))["number"]
    lines = [
        "## Published numbers of other engines",
        "These were not measured here. Hardware, decoder and the scope of the numbers differ from row to row.",
        "",
    ]
    return lines + markdown([
        {"engine": n["engine"], "model": n["model"], "hardware": n["hardware"], "size": n["size"], "fps": n.get("fps"),
         "latency ms": n.get("latency_ms"), "ms per chunk": n.get("ms_per_chunk"), "counted": n["counted"],
         "source": n["source"]}
        for n in numbers
    ])  # fmt: skip


def _soaks(found: list[dict[str, Any]]) -> list[str]:
    lines = ["## One stream for long", *_where({key: value for key, value in found[0].items() if key != "stream"})]
    for r in found:
        pace = f"paced at {r['pace_fps']:g} frames per second" if r["pace_fps"] else "as fast as it could"
        held = "All limits held" if r["passed"] else "NOT all limits held"
        text = (
            f"`{r['stream']['backend']}`, {r['seconds'] / 60:.0f} minutes {pace}: {r['chunks']} chunks, "
            f"a prompt switch every {r['switch']}. {held}: "
            + "; ".join(f"{c['name']}: {c['detail']}" for c in r["checks"]) + "."
        )  # fmt: skip
        lines += ["", text, "", *markdown([{"tenth": n, **row} for n, row in enumerate(r["tenths"], start=1)])]
    return lines


def _race(r: dict[str, Any]) -> list[str]:
    machine_only = {key: value for key, value in r.items() if key != "stream"}
    return [f"## Beside {r['peer']}", *_where(machine_only), *gpu.race(r, markdown)]


def _serve(r: dict[str, Any]) -> list[str]:
    how = r["points"][0]["transport"]
    return [f"## Serving over {TRANSPORTS[how]}", *_where(r), *serving.section(r, markdown)]


TRANSPORTS = {"socket": "a socket", "webrtc": "WebRTC", "jobs": "jobs", "mixed": "socket, WebRTC and jobs at once"}
_SECTIONS = {
    "race": _race, "compare": _compare, "scaling": _scaling, "load": _load, "serve": _serve, "serve-webrtc": _serve,
    "serve-jobs": _serve, "serve-mixed": _serve, "kernels": _kernels,
}  # fmt: skip


def page(folder: Path, pictures: dict[str, list[str]]) -> str:
    """The whole page, one section per machine."""
    found = saved.newest(folder)
    lines, checks = INTRO.splitlines(), gpu.newest_checks(folder)
    slugs = {saved.device_slug(r["machine"]) for r in found.values()} | set(checks)
    for slug in sorted(slugs, key=lambda slug: (slug.startswith("cpu"), slug)):  # GPUs first
        here = {name.removesuffix(f"-{slug}"): r for name, r in found.items() if name.endswith(f"-{slug}")}
        lines += ["", f"# On {slug}"]
        if machine := gpu.machine_of(checks.get(slug, [])):
            lines += ["", *_where({"machine": machine, "arguments": "gpu-check"})]
            lines += gpu.check_sections(checks[slug], markdown)
        streams = [r for name, r in here.items() if name.startswith("stream-")]
        if streams:
            # The model's own preset comes first, because a user gets it by default.
            lines += ["", *_streams(sorted(streams, key=lambda r: r["stream"]["family"] != "greedy"))]
        if soaks := [r for name, r in here.items() if name.startswith("soak-")]:
            lines += ["", *_soaks(soaks)]
        for kind, write in _SECTIONS.items():
            if kind in here:
                lines += ["", *write(here[kind])]
                lines += ["", *(f"![{Path(p).stem}]({p})" for p in pictures.get(f"{kind}-{slug}", []))]
    if not found and not checks:
        lines += ["", "No results yet: `python -m bench all --save`."]
    return "\n".join([*lines, "", *_published()]).rstrip() + "\n"


def generate(folder: Path, target: Path) -> Path:
    """Draw the pictures beside the page, then write the page."""
    pictures: dict[str, list[str]] = {}
    for name, r in saved.newest(folder).items():
        slug = saved.device_slug(r["machine"])
        kind = name.removesuffix(f"-{slug}")
        drawn = plots.draw(kind, r, target.parent / "plots", f"-{slug}")
        pictures[name] = [path.relative_to(target.parent).as_posix() for path in drawn]
    with whole_file(target) as part:
        part.write_text(page(folder, pictures), encoding="utf-8")
    return target


def run(options: Options) -> int:
    if not options.results.is_dir():
        raise FileNotFoundError(f"--results: got {options.results}, expected a directory of saved results")
    print(f"wrote {generate(options.results, options.out).name}")
    return 0
