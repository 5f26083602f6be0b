"""Where self-attention looks, frame by frame, in a teacher and in streams of its student: the paper's Fig. 2.

    python -m distill attention --out runs/attention
    python -m distill attention --replace steady --replace constant --score 8 --out runs/attention
    python -m distill attention --model Wan2.1-T2V-1.3B-Diffusers --data runs/clips --frames 81 --queries 64

M[t, layer, prompt, head, i, j] is the share of its attention that latent frame i gives the keys of frame j, the mean
over its queries. --out gets report.md, report.json, mass.safetensors (mean and deviation of M by layer and head) and
plots. --replace runs the models again with a part of their attention replaced: how far does the velocity move?

Memory: one head and one frame of queries at a time, so the largest matrices have queries x keys numbers: two for the
probe, three for a replacement, which takes all queries of a frame. Wan2.1-1.3B at 832x480 has 1,560 tokens per frame
and, with 21 frames, 32,760 keys: 17 MB for 64 queries, 409 MB for all queries of a frame, 613 MB for a replacement.
"""

import platform
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from distill.attention.heads import HeadOptions, head_table, write_table
from distill.attention.inputs import ProbeOptions, clips_of, load
from distill.attention.measures import errors, replacements, scored, summary
from distill.attention.replacements import KINDS, Replacement, Table
from distill.attention.report import write_report
from distill.attention.subjects import Clips, Student, Subject, Teacher
from distill.scores.tasks import find_task
from distill.training.stage import Stage
from engine.loader import EMBEDDED
from engine.options import option
from engine.stream import Pipeline


@dataclass(frozen=True)
class AttentionOptions(HeadOptions, ProbeOptions):
    levels: tuple[float, ...] = option(
        (0.2, 0.45, 0.7, 0.95), "teacher: a noise level; may be repeated", metavar="SIGMA"
    )
    replace: tuple[str, ...] = option((), "also replace a part of the attention; may be repeated", choices=KINDS)
    threshold: float = option(0.02, "steady, varying, constant: the deviation that divides")
    near: int = option(1, "distant: latent frames up to so far apart still see each other")
    sampling_steps: int = option(20, "score: denoising steps of the teacher")
    guidance: float = option(2.0, "score: guidance scale of the teacher")
    heads: Path | None = option(
        None, "also write a table of the student's local heads to this file, for the preset's `heads`", metavar="FILE"
    )
    above: float = option(0.5, "heads: a head is local whose score is at least this")
    out: Path = option(Path("runs/attention"), "folder of the report", metavar="DIR")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect_least("sampling_steps", least=1)
        self.expect_least("near", least=0)
        for level in self.levels:
            if not 0 < level <= 1:
                raise ValueError(f"--levels: got {level:g}, expected more than 0 and at most 1")
        if self.score and not self.replace:
            raise ValueError("--score: got no replacement to score, expected --replace")


def subjects_of(options: AttentionOptions, pipeline: Pipeline, clips: Clips) -> list[Subject]:
    folder, levels = options.model or EMBEDDED, tuple(sorted(set(options.levels)))
    teacher = Teacher(pipeline, clips, folder, levels, options.sampling_steps, options.guidance)
    return [teacher, Student(pipeline, clips)]


def run(options: AttentionOptions) -> None:
    """Measure, replace, score, and write the report. A line per role and per replacement goes to stdout."""
    pipeline = load(options)
    for note in pipeline.notes:
        print(note)
    if options.heads is not None:
        options.check_heads(pipeline, options.frames)
    options.out.mkdir(parents=True, exist_ok=True)  # before minutes of passes
    clips, specs = clips_of(options, pipeline)
    report, tables = about(options, pipeline, clips), dict[str, Table]()
    for subject in subjects_of(options, pipeline, clips):
        for role, mass in subject.mass(options.queries).items():
            tables[role] = Table.of(mass.flatten(0, 1))
            report["roles"][role] = found = summary(mass, subject.levels[role])
            print(f"{role}: mass by distance {found['by_distance']}", flush=True)
            if options.heads is not None and subject.name == Student.name:
                scores = options.scores(mass, pipeline.preset)
                table = head_table(scores >= options.above, options.local_window, options.local_sink)
                table.fit(pipeline.config)
                write_table(options.heads, table)
                print(f"{role}: {sum(table.counts)} of {scores.numel()} heads are local: {options.heads}", flush=True)
        limits = report["limits"]
        kinds = {kind: replacements(subject, kind, tables, **limits) for kind in dict.fromkeys(options.replace)}
        report["replacements"][subject.name] = replaced(subject, kinds)
        if options.score:
            made = scored(subject, find_task(options.task), specs[: options.score], kinds)
            report["scores"][subject.name] = made
            print(f"{subject.name}: {made}", flush=True)
    write_report(options.out, report, tables)
    print(options.out / "report.md")


def replaced(subject: Subject, kinds: dict[str, dict[str, Replacement]]) -> dict[str, Any]:
    """Every kind that was asked for: how much it replaces, by role, and the errors of the velocity by noise level."""
    moved, found = errors(subject, kinds), dict[str, Any]()
    for kind, watches in kinds.items():
        shares = {role: round(watch.share, 4) for role, watch in watches.items()}
        mass = {role: round(watch.mass, 4) for role, watch in watches.items()}
        found[kind] = {"entries": shares, "mass": mass, "errors": moved[kind]}
        print(f"{subject.name}, {kind}: errors {moved[kind]}", flush=True)
    return found


def about(options: AttentionOptions, pipeline: Pipeline, clips: Clips) -> dict[str, Any]:
    """What was run, and room for what is found."""
    _, ph, pw = pipeline.config.patch_size
    tokens = clips.latents.shape[-2] // ph * (clips.latents.shape[-1] // pw)
    queries = min(options.queries, tokens)
    return {
        "model": str(options.model or "the embedded model"),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "preset": pipeline.preset_name,
        "notes": list(pipeline.notes),
        "prompts": options.prompts,
        "captions": clips.captions,
        "seed": options.seed,
        "latent_frames": clips.frames,
        "tokens": tokens,
        "queries": queries,
        "probe_megabytes": round(2 * 4 * queries * clips.frames * tokens / 1e6, 1),  # scores and weights, float32
        "levels": list(options.levels),
        "limits": {"threshold": options.threshold, "near": options.near},
        "roles": {},
        "replacements": {},
        "scored": options.score,
        "sampling_steps": options.sampling_steps,
        "scores": {},
    }


STAGE = Stage(AttentionOptions, run)
