"""How much a causal student loses where some heads keep few frames: the heads that the probe chooses, and others.

    python -m distill heads --model runs/causal --local-window 2 --frames 65 --score 24 --out runs/heads

For every share of the heads three kinds of table of one size: `local`, the heads with the most attention on the frames
that they keep; `random` draws; and `reverse`, the heads with the least. The error is that of the velocity on the inputs
of the student's own streams, |v' - v| / |v|. With --score every table also streams clips, which the evaluator scores.
--out gets report.md, report.json, a plot, and the table of every share.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.attention.heads import HeadOptions, drawn, head_table, largest, write_table
from distill.attention.inputs import ProbeOptions, clips_of, load
from distill.attention.measures import SHOWN, Rows, paired, rows_of
from distill.attention.plots import plot_heads_left
from distill.attention.subjects import Flows, Student
from distill.experiments.tables import table
from distill.scores.tasks import find_task
from distill.training.stage import Stage
from engine.config import LocalHeads
from engine.files import whole_file, write_json
from engine.options import option


@dataclass(frozen=True)
class PruningOptions(HeadOptions, ProbeOptions):
    share: tuple[float, ...] = option((0.25, 0.5, 0.75), "a share of the heads to make local; may be repeated")
    random: int = option(3, "random tables of every share")
    out: Path = option(Path("runs/heads"), "folder of the report", metavar="DIR")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect_least("random", least=1)
        for share in self.share:
            if not 0 < share < 1:
                raise ValueError(f"--share: got {share:g}, expected more than 0 and less than 1")


def tables_of(scores: Tensor, share: float, options: PruningOptions) -> dict[str, LocalHeads]:
    """The tables of one size by name. ValueError where that is no head, or all."""
    count = round(share * scores.numel())
    if not 0 < count < scores.numel():
        raise ValueError(f"--share: got {share:g} of {scores.numel()} heads, expected at least one and not all")
    chosen = {"local": largest(scores, count), "reverse": largest(-scores, count)}
    chosen |= {f"random {number}": drawn(scores.shape, count, number) for number in range(options.random)}
    return {name: head_table(heads, options.local_window, options.local_sink) for name, heads in chosen.items()}


def run(options: PruningOptions) -> None:
    """Measure, prune, score, and write the report. A line per table goes to stdout."""
    pipeline = load(options)
    options.check_heads(pipeline, options.frames)
    options.out.mkdir(parents=True, exist_ok=True)  # before minutes of passes
    clips, specs = clips_of(options, pipeline)
    whole = Student(pipeline, clips)
    (mass,) = whole.mass(options.queries).values()
    scores = options.scores(mass, pipeline.preset)
    report: dict[str, Any] = about(options, whole, scores)
    best, flows = scored(whole, options, specs), [whole.flows(number, {}) for number in range(options.prompts)]
    report["whole"] = paired(best, best)
    for share in options.share:
        for name, heads in tables_of(scores, share, options).items():
            pruned = Student(load(options, {"heads": asdict(heads)}), clips, inputs=whole)
            row = {"share": share, "heads": sum(heads.counts), "table": name, "error": error(pruned, flows)}
            row |= paired(scored(pruned, options, specs), best)
            report["tables"].append(row)
            print(row, flush=True)
            if name == "local":
                write_table(options.out / f"heads-{share:g}.json", heads)
    report["plots"] = plot_heads_left(report, options.out / "heads-left.png")
    write_json(options.out / "report.json", report)
    with whole_file(options.out / "report.md") as part:
        part.write_text(markdown(report), encoding="utf-8")
    print(options.out / "report.md")


def scored(student: Student, options: PruningOptions, specs: Sequence[Any]) -> Rows:
    """The scores of the clips that the student streams of the first captions."""
    videos = [student.video(number, {}) for number in range(options.score)]
    return rows_of(find_task(options.task), videos, specs[: options.score])


def error(pruned: Student, flows: Sequence[Flows]) -> float:
    """|v' - v| / |v| over all clips and noise levels, the mean; flows: those of all heads, of every clip."""
    found = []
    for number, plain in enumerate(flows):
        other = pruned.flows(number, {})
        found += [float((other[level] - flow).norm() / flow.norm()) for level, flow in plain.items()]
    return round(sum(found) / len(found), 5)


def about(options: PruningOptions, whole: Student, scores: Tensor) -> dict[str, Any]:
    """What was run, and room for what is found."""
    preset, clips = whole.pipeline.preset, whole.clips
    return {
        "model": str(options.model or "the embedded model"),
        "date": date.today().isoformat(),
        "preset": whole.pipeline.preset_name,
        "window": preset.window,
        "chunk": preset.chunk,
        "attn_sink": preset.attn_sink,
        "local_window": options.local_window,
        "local_sink": options.local_sink,
        "prompts": len(clips.captions),
        "latent_frames": clips.frames,
        "scored": options.score,
        "seed": options.seed,
        "scores": scores.mul(1e4).round().div(1e4).tolist(),
        "tables": [],
    }


def markdown(report: dict[str, Any]) -> str:
    """The report to read."""
    r = report
    scored, count = r["scored"] > 0, len(r["scores"]) * len(r["scores"][0])
    said = (
        f"{r['date']}. Window {r['window']}, chunk {r['chunk']}; a local head keeps {r['local_window']} latent frames, "
        f"{r['local_sink']} of them the first ones. Velocities of {r['prompts']} clips of {r['latent_frames']} latent "
        f"frames, seed {r['seed']}."
    )
    heads = ["share", "heads", "table", "velocity error"]
    if scored:
        said += f" Totals of {r['scored']} clips; the difference is paired with the clips of all heads, ± its error."
        heads += ["total", "difference", "all right"]
    rows = [["0", "0", "all heads keep the window", "0", *_scores(r["whole"], scored)]]
    rows += [
        [f"{row['share']:g}", f"{row['heads']} of {count}", row["table"], f"{row['error']:.3f}", *_scores(row, scored)]
        for row in r["tables"]
    ]
    lines = [[f"layer {number}", *(f"{value:.2f}" for value in row)] for number, row in enumerate(r["scores"])]
    by_head = table(["", *(f"head {number}" for number in range(len(r["scores"][0])))], lines)
    parts = [f"# Heads that keep few frames: {r['model']}", said, table(heads, rows), "## Scores of the heads", by_head]
    return "\n\n".join(parts + [f"![{name}]({name})" for name in r["plots"]]) + "\n"


def _scores(row: dict[str, Any], scored: bool) -> Sequence[str]:
    if not scored:
        return []
    total, right = (row[name] for name in SHOWN)
    return [f"{total:.3f}", f"{row['difference']:+.3f} ± {row['error_of_difference']:.3f}", f"{right:.2f}"]


STAGE = Stage(PruningOptions, run)
