"""report.json, report.md, mass.safetensors and the plots of a probe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from distill.attention.plots import plot
from distill.attention.replacements import Table
from distill.experiments.tables import table
from engine.files import whole_file, write_json

CLOSE = 0.1  # a replacement that changes the velocity by less than that is called close
SINK = 1.5  # frame 0 is called a sink if it gets so many times the mass of a frame that is as far away
READINGS = {
    "steady": "entries that hardly change (deviation at most {threshold:g}) become their mean",
    "varying": "entries that change (deviation above {threshold:g}) become their mean",
    "distant": "only frame 0 and frames up to {near} apart are seen",
    "constant": "literal: heads whose matrix has a deviation above {threshold:g} weigh all keys alike",
}
CAPTIONS = {
    "distance.png": "Mass by distance. Red: looking back at frame 0. Blue: looking back at another frame, as far away.",
    "errors.png": "How far each replacement moves the model's velocity.",
}


def write_report(folder: Path, report: dict[str, Any], tables: Mapping[str, Table]) -> None:
    """Write all files; each is whole or not there."""
    tensors = {f"{role}.{name}": getattr(found, name) for role, found in tables.items() for name in ("mean", "std")}
    with whole_file(folder / "mass.safetensors") as part:
        save_file({name: value.float().contiguous() for name, value in tensors.items()}, part)
    pictures = plot(report, {role: found.mean for role, found in tables.items()}, folder)
    write_json(folder / "report.json", report)
    with whole_file(folder / "report.md") as part:
        part.write_text(markdown(report, pictures), encoding="utf-8")


def markdown(report: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The report to read."""
    parts = [f"# Where attention looks: {report['model']}", _made(report), "## Mass by distance", _distances(report)]
    parts += ["## The first frame", *(_first(role, found) for role, found in report["roles"].items())]
    if any(report["replacements"].values()):
        parts += ["## Replacements", _readings(report), _errors(report), _verdict(report)]
        parts += [part for part in [_scores(report)] if part]
    shown = [f"![{name}]({name})\n\n*{CAPTIONS.get(name, _heads_caption(name))}*" for name in pictures]
    return "\n\n".join(parts + shown) + "\n"


def _heads_caption(name: str) -> str:
    role = name.removeprefix("heads-").removesuffix(".png")
    return f"Every head of {role}: brighter is more mass. Row i of a square is the query frame, column j the key frame."


def _made(report: Mapping[str, Any]) -> str:
    r = report
    drawn = f"{r['queries']} of {r['tokens']}" if r["queries"] < r["tokens"] else f"all {r['tokens']}"
    return (
        f"{r['date']}. {r['prompts']} clips of {r['latent_frames']} latent frames, {drawn} queries of each frame, "
        f"seed {r['seed']}, preset {r['preset']}. The probe held {r['probe_megabytes']:g} MB of attention at a time. "
        "`M[i, j]` is the share of its attention that frame i gives the keys of frame j, the mean over its queries. "
        "Below it is also the mean over layers, heads, noise levels and clips. A row sums to 1."
    )


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _distances(report: Mapping[str, Any]) -> str:
    heads = ["role", *(f"{d} apart" for d in range(report["latent_frames"]))]
    return table(heads, [[role, *map(_number, found["by_distance"])] for role, found in report["roles"].items()])


def _first(role: str, found: Mapping[str, Any]) -> str:
    first, others = found["far_on_frame_0"], found["far_on_other_frames"]
    if first is None:
        away = [value for value in found["on_frame_0"][2:] if value is not None]
        if not away:
            return f"**{role}**: frame 0 is not seen from two frames away."
        mean = sum(away) / len(away)
        return f"**{role}**: from two frames away on, {mean:.3f} of the attention lies on frame 0, the only one seen."
    said = "has a first-frame sink" if first > SINK * others else "has no first-frame sink"
    middle = found["received"][1:-1]
    return (
        f"**{role}** {said}: looking back two frames or more, {first:.3f} of the attention lies on frame 0, and "
        f"{others:.3f} on another frame that is as far away. Of the attention of the other frames that see it, frame 0 "
        f"gets {found['received'][0]:.3f}, a frame in the middle {sum(middle) / len(middle):.3f}."
    )


def _readings(report: Mapping[str, Any]) -> str:
    kinds = [kind for kind in READINGS if kind in _kinds(report)]
    about = [f"- `{kind}`: {READINGS[kind].format(**report['limits'])}." for kind in kinds]
    return "\n".join(["A deviation is that of a head's M[i, j] over noise levels and clips.", "", *about])


def _kinds(report: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(kind for kinds in report["replacements"].values() for kind in kinds))


def _errors(report: Mapping[str, Any]) -> str:
    tables = []
    for name, kinds in report["replacements"].items():
        levels = list(next(iter(kinds.values()))["errors"])
        rows = [
            [kind, _shares(found, "entries"), _shares(found, "mass"), *(_number(found["errors"][s]) for s in levels)]
            for kind, found in kinds.items()
        ]
        heads = [name, "entries replaced", "attention on them", *(f"error at {level}" for level in levels)]
        tables.append(table(heads, rows))
    return "\n\n".join(["Relative error of the velocity, |v' - v| / |v|, by noise level:", *tables])


def _shares(found: Mapping[str, Any], what: str) -> str:
    shares = found[what]
    return ", ".join(
        f"{100 * share:.0f}%" + (f" ({role})" if len(shares) > 1 else "") for role, share in shares.items()
    )


def _verdict(report: Mapping[str, Any]) -> str:
    """Which readings leave the teacher nearly as it is, in words that follow from the numbers."""
    kinds = report["replacements"].get("teacher", {})
    worst = {kind: max(found["errors"].values()) for kind, found in kinds.items()}
    named = {kind: f"`{kind}` (up to {error:.2f})" for kind, error in worst.items()}
    close = ", ".join(named[kind] for kind, error in worst.items() if error <= CLOSE) or "none"
    off = ", ".join(named[kind] for kind, error in worst.items() if error > CLOSE) or "none"
    return (
        "The paper says: attention matrices whose deviation exceeds 0.02 were set to constants, and the videos were "
        f"nearly indistinguishable.\n\n- Readings that match this claim on the teacher, with errors up to {CLOSE:g}: "
        f"{close}.\n- Readings that do not: {off}.\n"
        "- The deviation cannot be one of token weights. A softmax row over K keys has a deviation of at most "
        "1 / sqrt(K): 0.0055 for the 32,760 keys of Wan2.1 at 832x480."
    )


def _scores(report: Mapping[str, Any]) -> str:
    tables = []
    for name, found in report["scores"].items():
        rows = [
            [kind, f"{100 * row['total']:.1f}", f"{100 * row['all_right']:.0f}%", _number(row.get("difference"), 1)]
            for kind, row in found.items()
        ]
        tables.append(table([name, "total", "all facts right", "difference of pixels, of 255"], rows))
    if not tables:
        return ""
    about = (
        f"The scores of `distill evaluate` for clips that are made with replaced attention, {report['scored']} each. "
        f"The teacher takes {report['sampling_steps']} steps. A clip and its plain one have the same noise:"
    )
    return "\n\n".join([about, *tables])
