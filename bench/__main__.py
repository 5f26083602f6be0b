"""python -m bench COMMAND: check against recorded cases, measure, compare, report.

The last line of a measurement's stdout is its result as JSON. Exit status: 0, 1 where a check or a comparison is red,
2 for bad input.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from engine.commands.stderr import is_bad_input, line_of, say
from engine.options import Parser, add_options, options_of
from engine.program import cleanly

# Command -> its module, and what it measures. A module has `Options`, a frozen dataclass of its command-line options,
# and `run(options) -> exit status`. Only the chosen command's module is imported.
COMMANDS = {
    "parity": ("bench.commands.parity", "replay recorded cases of public streaming code; exit 1 beyond tolerance"),
    "fullsize": ("bench.commands.fullsize", "Wan2.1-1.3B's shape with random weights: load, stream, memory"),
    "stream": ("bench.commands.stream", "one stream: fps, first frame, parts of a chunk, memory, limits"),
    "backends": ("bench.commands.backends", "what kernels, CUDA graphs and FP8 give, on the same weights in bf16"),
    "runtimes": ("bench.commands.runtimes", "a bundle's backends against torch's modules, chunk by chunk"),
    "compare": ("bench.commands.compare", "presets, backends and other engines, interleaved in one run"),
    "race": ("bench.commands.race", "Self-Forcing beside another engine, same weights: checked, stage by stage"),
    "scaling": ("bench.commands.scaling", "time and memory per chunk: early and late in one stream, and sweeps"),
    "load": ("bench.commands.concurrent", "concurrent streams: together, each, and how many hold a frame rate"),
    "soak": ("bench.soak.command", "one stream for minutes or hours: memory, threads, chunk times, the same frames"),
    "serve": ("bench.commands.serve", "the server under viewers: first chunk, gaps, deadlines, prompt switches, CPU"),
    "counts": ("bench.gpu.counts", "launches, bytes and FLOPs of a steady chunk on a GPU, from shapes"),
    "kernels": ("bench.commands.kernels", "each operation against its reference and the best library call"),
    "fp8": (
        "bench.commands.fp8",
        "FP8 and INT8: errors of each pass, evaluator's scores, a pass's speed",
    ),
    "diff": ("bench.report.diff", "two saved results: what got slower beyond noise; exit 1 if anything did"),
    "report": ("bench.report.page", "docs/performance.md from the saved results"),
    "all": ("bench.commands.everything", "stream, compare, scaling, load, kernels; with --save also the page"),
    "gpu-check": ("bench.gpu.check", "all that only a GPU can show, in nine minutes"),
}


def parse(argv: list[str]) -> tuple[ModuleType, Any]:
    """The module of the chosen command, and its options. Exits with status 2 where argparse refuses them."""
    parser = Parser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (path, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about)
        if argv[:1] == [name]:
            module = import_module(path)
            command.description = module.__doc__
            command.set_defaults(module=module)
            add_options(command, module.Options)
    args = parser.parse_args(argv)
    return args.module, options_of(args, args.module.Options)


def main(argv: list[str] | None = None) -> int:
    command, options = parse(sys.argv[1:] if argv is None else argv)
    try:
        with cleanly():
            return command.run(options)
    except (ValueError, OSError, MemoryError) as error:
        say(f"error: {line_of(error)}")
        return 2 if is_bad_input(error) or isinstance(error, MemoryError) else 1


if __name__ == "__main__":
    sys.exit(main())
