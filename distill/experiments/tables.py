"""The tables of an ablation: Markdown to read, JSON with the same numbers."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.experiments.arms import frames_with_gradient
from distill.experiments.pairs import SURE, Scores, Spread, clips_name, spread
from distill.scores.dimensions import QUALITY, SEMANTIC
from engine.files import whole_file, write_json

# Beside the totals: what they do not show, or what a student may give up for them.
SHOWN = ("total", "quality", "semantic", "all_right", "direction", "dynamic_degree", "blink")


def cell(found: Spread | None, scale: float = 100.0, form: str = ".1f") -> str:
    """A mean and its standard error, in brackets where it is over prompts; in percent unless `scale` says otherwise."""
    if found is None or math.isnan(found.mean):
        return ""
    error = "" if math.isnan(found.error) else f"± {scale * found.error:{form.replace('+', '')}}"
    return f"{scale * found.mean:{form}} {f'({error})' if error and found.seeds == 1 else error}".strip()


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def spread_of(scores: Scores, arm: str, steps: str, clips: str, score: str) -> Spread | None:
    values = scores.clips(arm, steps, clips, score)
    return None if values is None or bool(values.isnan().all()) else spread(values)


def totals(scores: Scores, clips: str) -> str:
    """One row per arm and steps: totals, what stands beside them, and the difference to the baseline."""
    rows = []
    for arm, steps in scores.rows():
        if scores.clips(arm, steps, clips, "total") is None:
            continue
        values = [cell(spread_of(scores, arm, steps, clips, name)) for name in SHOWN]
        gap = cell(scores.difference(arm, steps, clips), form="+.1f")
        rows.append([scores.plan.title(arm), steps, len(scores.seeds(arm, steps)), values[0], gap, *values[1:]])
    return table(["arm", "steps", "seeds", "total", "difference", *(n.replace("_", " ") for n in SHOWN[1:])], rows)


def verdicts(scores: Scores, names: list[str]) -> str:
    """One row per arm with a baseline: paired differences in total over every set of clips, and what follows."""
    rows = []
    for arm, steps in scores.arms():
        against = scores.plan.against(arm, steps)
        if against is None or scores.difference(arm, steps, names[0]) is None:
            continue
        made = scores.plan.settings.get(arm)
        other = scores.plan.title(against[0]) + (f", {against[1]} steps" if against[1] != steps else "")
        gaps = [cell(scores.difference(arm, steps, name), form="+.1f") for name in names]
        frames = f"{frames_with_gradient(made):,}" if made else ""
        rows.append([scores.plan.title(arm), other, frames, *gaps, scores.verdict(arm)])
    heads = ["arm", "against", "frames with gradient", *(f"{name} frames" for name in names), "verdict"]
    return table(heads, rows) if rows else ""


def dimensions(scores: Scores, clips: str) -> str:
    """One row per arm at its first steps: every dimension."""
    names = (*SEMANTIC, *QUALITY)
    rows = [
        [scores.plan.title(arm), f"{scores.first(arm, steps)['trained'] / 1e6:.2f} M",
         *(cell(spread_of(scores, arm, steps, clips, name)) for name in names)]
        for arm, steps in scores.arms()
    ]  # fmt: skip
    return table(["arm", "trained", *(name.replace("_", " ") for name in names)], rows)


def losses(scores: Scores) -> str:
    """Held-out Eq. 6, and its difference to the baseline, seed by seed; the noise is the same."""
    rows = []
    for arm, _ in scores.arms():
        means = [scores.loss(arm, name) for name in ("all", "reappearing")]
        gaps = [scores.loss(arm, name, against=True) for name in ("all", "reappearing")]
        if means[0] is not None:
            cells = [f"{found.mean:.4f}" if found else "" for found in means]
            rows.append([scores.plan.title(arm), *cells, *(cell(gap, 1.0, "+.4f") for gap in gaps)])
    return table(["arm", "all frames", "reappearing", "difference, all", "difference, reappearing"], rows)


def over_time(scores: Scores) -> str:
    """Quality of successive windows of the longest clips, one row per arm, mean over seeds."""
    rows, starts, length = [], list[int](), scores.plan.config.window
    for arm, steps in scores.arms():
        if found := scores.windows(arm, steps):
            starts, means = found[0], found[1].mean(0).tolist()
            row = [f"{100 * mean:.1f}" for mean in means]
            rows.append([scores.plan.title(arm), *row, f"{means[-1] / max(means[0], 1e-9):.3f}"])
    return table(["arm", *(f"{s}-{s + length - 1}" for s in starts), "last / first"], rows) if rows else ""


def against_steps(scores: Scores, clips: str) -> str:
    """Totals of arms that were streamed with several numbers of steps: a column per steps."""
    plan, rows = scores.plan, []
    known = [steps for steps in plan.samplings if any(row[1] == steps for row in scores.rows())]
    for arm in plan.arms:
        if sum(row[0] == arm for row in scores.rows()) > 1:
            cells = [cell(spread_of(scores, arm, steps, clips, "total")) for steps in known]
            rows.append([plan.title(arm), *cells])
    return table(["arm", *known], rows) if rows else ""


def _numbers(scores: Scores, names: list[str]) -> dict[str, Any]:
    """Every number of the tables."""
    rows = []
    for arm, steps in scores.rows():
        first = scores.first(arm, steps)
        for clips in (*names, "given"):
            shown = first["clips"].get(clips, {})
            found = {name: spread_of(scores, arm, steps, clips, name) for name in shown}
            gap = scores.difference(arm, steps, clips)
            if found:
                rows.append({
                    "arm": arm, "steps": steps, "clips": clips, "passes": first["passes"],
                    "scores": {name: asdict(value) for name, value in found.items() if value},
                    "difference": _plain(gap),
                })  # fmt: skip
    arms = [arm for arm, _ in scores.arms()]
    loss = {arm: [_plain(scores.loss(arm, "all", against)) for against in (False, True)] for arm in arms}
    return {"rows": rows, "verdicts": {arm: scores.verdict(arm) for arm in arms}, "loss": loss}


def _plain(found: Spread | None) -> dict[str, Any] | None:
    """As JSON has it, without NaN."""
    if found is None:
        return None
    return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in asdict(found).items()}


def write_tables(scores: Scores, folder: Path) -> None:
    """ablation.md with every table, ablation.json with every number."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "ablation.md") as part:
        part.write_text("\n\n".join(_report(scores)) + "\n", encoding="utf-8")
    names = [clips_name(frames) for frames, _ in scores.plan.config.lengths]
    write_json(folder / "ablation.json", _numbers(scores, names))


def _report(scores: Scores) -> list[str]:
    """The paragraphs of ablation.md."""
    config = scores.plan.config
    names = [clips_name(frames) for frames, _ in config.lengths]
    about = (
        f"Held-out prompts (seed {config.prompt_seed}), the same prompts and noise for all arms. In percent: mean and "
        "standard error over seeds; in brackets, of one seed, over prompts. `difference` is paired, prompt by prompt "
        "and seed by seed, to the arm's baseline in the table of verdicts. Its error is the larger one of those over "
        "seeds and over prompts."
    )
    parts = [f"# {config.title}", about]
    for name, (_, prompts) in zip(names, config.lengths, strict=True):
        parts += [f"## {name} frames, {prompts} prompts", totals(scores, name)]
    if rows := verdicts(scores, names):
        rule = f"A gain counts if the difference exceeds {SURE:g} standard errors over {names[0]} frames"
        rule += f" and does not turn round over {names[1]}" if len(names) > 1 else ""
        rule += ", at guidance 1 of the training. `frames with gradient` are those whose loss moved the student."
        parts += ["## Differences and verdicts", rule, rows]
    parts += ["## Dimensions", f"{names[0]} frames.", dimensions(scores, names[0])]
    if any("given" in scores.first(*row)["clips"] for row in scores.arms()):
        about = f"Going on from {config.given} drawn latent frames"
        parts += [f"## {about}", totals(scores, "given"), dimensions(scores, "given")]
    if any(scores.loss(arm, "all") for arm, _ in scores.arms()):
        about = "Mean squared error of the flow (Eq. 6) on drawn held-out clips, the same noise for all arms."
        parts += ["## Held-out loss", about, losses(scores)]
    if rows := over_time(scores):
        about = f"Quality, {config.lengths[-1][1]} prompts of {names[-1]} frames; a column a window of {config.window}."
        parts += ["## Quality over time", about, rows]
    for name in names[:2]:
        if rows := against_steps(scores, name):
            parts += [f"## Total against steps, {name} frames", rows]
    return parts
