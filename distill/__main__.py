"""python -m distill STAGE: train the models of a student, and score what they stream.

    python -m distill next_chunk --config distill/configs/scenes.toml --set steps=100 --out runs/student
    accelerate launch --num_processes 8 -m distill rl --config ... --out ...

`python -m distill STAGE --help` lists the options of a stage and the entries of its table. A stage reads its table from
--config; --set replaces entries. Bad input is one line on stderr and exit status 2.
"""

import importlib
import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields

import torch

from distill.training.stage import Stage, leave_processes
from engine.commands.stderr import is_bad_input, line_of, say
from engine.options import Parser, add_options, option, options_of, pairs, read_table
from engine.program import cleanly

# Stage -> its module, and one line of help, in the order in which a model is made. Some have a name of two words.
STAGES = {
    "train_vae": ("stages.vae.train_vae", "embedded model: train the VAE"),
    "latents": ("stages.latents", "embedded model: draw clips and encode them, once"),
    "teacher": ("stages.teacher", "embedded model: train the bidirectional teacher"),
    "dataset": ("stages.dataset", "own videos and captions: encode them as training data"),
    "sample_teacher": ("stages.sample_teacher", "sample captioned latents from a teacher"),
    "next_chunk": ("stages.next_chunk", "train the student on clean pasts (Eq. 6)"),
    "consistency": ("stages.consistency", "make the student consistent over noise levels, for few steps"),
    "rl": ("stages.rl", "fine-tune the student on its own rollouts (Eq. 7-10)"),
    "dmd": ("stages.dmd", "match distributions on the student's own clips (DMD, SiD)"),
    "tiny_decoder": ("stages.vae.tiny_decoder", "distil the VAE's decoder into a tiny one"),
    "assemble": ("stages.assemble", "write teacher, VAE and student as one pipeline directory"),
    "evaluate": ("experiments.evaluate", "score clips of a model on held-out prompts, or any videos"),
    "ablation": ("experiments.ablation", "train and compare arms over seeds: tables and plots"),
    "reuse": ("experiments.reuse", "reuse of block residuals against dropping the step: table and plot"),
    "gallery": ("experiments.gallery", "stream several prompts into one moving picture"),
    "attention": ("attention.command", "where attention looks, frame by frame, and what replacing it changes"),
    "heads": ("attention.pruning", "how much a causal student loses where some heads keep few frames"),
    "following": ("experiments.following", "score how video-to-video follows its input"),
    "questionnaire make": ("raters.make", "make a blinded page on which people compare models"),
    "questionnaire serve": ("raters.serve", "serve that page, and keep what raters answer"),
    "questionnaire score": ("raters.score", "preferences, mean scores and agreement of the raters"),
}
PLANNED = ("next_chunk", "consistency", "rl", "dmd")  # stages that --dry-run can plan


@dataclass(frozen=True)
class PlanOptions:
    dry_run: bool = option(False, "print memory, FLOPs and time of the run, and run nothing")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage. The exit status is 0, or 2 after bad input."""
    words, name, stages = list(sys.argv[1:] if argv is None else argv), "", list(STAGES)
    while name not in stages:
        if not words or words[0] in ("-h", "--help"):
            print(overview(stages), end="")
            return 0 if words else 2
        name = f"{name} {words.pop(0).replace('-', '_')}".strip()
        candidates = [stage for stage in stages if f"{stage} ".startswith(f"{name} ")]
        if not candidates:
            say(f"error: stage: got {name!r}, expected one of {', '.join(stages)} (see --help)")
            return 2
        stages = candidates
    stage: Stage = importlib.import_module(f"distill.{STAGES[name][0]}").STAGE
    args = parser_of(name, stage).parse_args(words)
    try:
        options = options_of(args, stage.options)
        torch.set_num_threads(options.threads)
        with cleanly():
            if stage.config is None:
                stage.run(options)
            else:
                config = read_table(stage.config, options.config, stage.table, pairs(options.set))
                if options_of(args, PlanOptions).dry_run:
                    from distill.stages.plan import report

                    report(options.config, name, config)
                else:
                    stage.run(config, options)
            leave_processes()
    except (ValueError, OSError) as error:
        if getattr(args, "debug", False):
            raise
        say(f"error: {line_of(error)}")
        return 2 if is_bad_input(error) else 1
    return 0


def former(name: str) -> int:
    """The command `python -m distill.NAME` of earlier releases."""
    say(f"python -m distill.{name}: this command is now `python -m distill {name}`")
    return main([name, *sys.argv[1:]])


def overview(stages: Sequence[str]) -> str:
    """The help of the whole command: one line per stage."""
    lines = [f"  {name:<21}{STAGES[name][1]}\n" for name in stages]
    return f"usage: python -m distill STAGE [options]\n\n{__doc__}\nstages:\n{''.join(lines)}"


def parser_of(name: str, stage: Stage) -> ArgumentParser:
    """The command line of one stage; its help lists the entries of the stage's table too."""
    entries = table_help(stage.config, stage.table) if stage.config else None
    module = sys.modules[stage.run.__module__]
    parser = Parser(prog=f"python -m distill {name}", description=module.__doc__, epilog=entries)
    add_options(parser, stage.options)
    if name in PLANNED:
        add_options(parser, PlanOptions)
    return parser


def table_help(config: type, table: str) -> str:
    """One line per entry of a table: name, help and default."""
    lines = [f"entries of [{table}] in --config FILE, or --set KEY=VALUE:"]
    for f in fields(config):
        default = "required" if f.default is MISSING else json.dumps(f.default)
        lines.append(f"  {f.name:<18}{f.metadata.get('help', '')} ({default})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
