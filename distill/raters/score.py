"""Score what raters answered: preference shares, mean scores, and how far the raters agree.

    python -m distill questionnaire score --study study/

Reads the key and all .json files of STUDY/answers, stored by `serve` or sent by raters. Writes STUDY/results/scores.md,
scores.json and, where matplotlib is installed, preference.png and radar.png. Intervals hold 95 % of the draws of a
bootstrap over raters and prompts. Agreement is Krippendorff's alpha.

A file that cannot be used, or of a rater who did not finish, is skipped; stderr and the tables say which and why.
"""

from dataclasses import dataclass
from pathlib import Path

from distill.raters.answers import collect
from distill.raters.plots import plot
from distill.raters.results import results_of
from distill.raters.study import ANSWERS, RESULTS, read_key
from distill.raters.tables import page
from distill.training.stage import Options, Stage
from engine.commands.stderr import say
from engine.files import whole_file, write_json
from engine.options import option

MOST_DRAWS = 100_000


@dataclass(frozen=True)
class ScoreOptions(Options):
    study: Path = option(Path("study"), "folder that `questionnaire make` wrote", metavar="DIR")
    answers: Path | None = option(None, "folder of the raters' files (STUDY/answers)", metavar="DIR")
    out: Path | None = option(None, "folder for tables and plots (STUDY/results)", metavar="DIR")
    incomplete: bool = option(False, "also count the finished prompts of raters who did not finish all")
    strict: bool = option(False, "the first file that would be skipped ends the run with status 2")
    draws: int = option(2000, "of the bootstrap")
    seed: int = option(0, "of the bootstrap")


def run(options: ScoreOptions) -> None:
    """Read everything, then write the results."""
    if not 1 <= options.draws <= MOST_DRAWS:
        raise ValueError(f"draws: got {options.draws}, expected 1 to {MOST_DRAWS}")
    if options.seed < 0:
        raise ValueError(f"seed: got {options.seed}, expected 0 or more")
    study = read_key(options.study)
    found = collect(options.answers or options.study / ANSWERS, study, options.incomplete)
    for file, why in found.skipped.items():
        if options.strict:
            raise ValueError(f"{file}: {why}")
        say(f"skipped {file}: {why}")
    results = results_of(study, found, options.draws, options.seed)
    out = options.out or options.study / RESULTS
    write_json(out / "scores.json", results)
    text = page(results)
    with whole_file(out / "scores.md") as part:
        part.write_text(text, encoding="utf-8")
    plot(results, out)
    print(text)
    print(f"{out}: tables, plots and scores.json, of {results['raters']} raters, {len(found.skipped)} files skipped")


STAGE = Stage(ScoreOptions, run)
