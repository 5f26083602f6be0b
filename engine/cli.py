"""greedy-stream COMMAND: every program of the package behind one name."""

import sys
from importlib import import_module
from importlib.util import find_spec

from engine.options import Parser

# command -> (module whose main(argv) runs it, what it does)
COMMANDS = {
    "run": ("engine.run", "a prompt in, a video out, written while it is made"),
    "inspect": ("engine.commands.inspect", "what a file or directory of weights is, and the command that runs it"),
    "serve": ("serve.__main__", "streams over a network: a live page, sockets, WebRTC, jobs"),
    "export": ("export.__main__", "write, inspect or verify a bundle of compiled graphs"),
    "bench": ("bench.__main__", "check against recorded cases, measure, compare, report"),
    "distill": ("distill.__main__", "train, sample, assemble and score models"),
}


def main(argv: list[str] | None = None) -> int:
    """Call the command's own main with the remaining arguments. Exit status: the command's; 2 for an unknown one."""
    argv = sys.argv[1:] if argv is None else argv
    lines = "\n".join(f"  {name:10} {about}" for name, (_, about) in COMMANDS.items())
    parser = Parser(
        prog="greedy-stream", usage="greedy-stream COMMAND [options]", description=__doc__,
        epilog=f"commands:\n{lines}\n\ngreedy-stream COMMAND --help lists a command's options.",
    )  # fmt: skip
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        parser.error(f"got command {argv[0]!r}, expected one of {', '.join(COMMANDS)}")
    module = COMMANDS[argv[0]][0]
    if find_spec(module.partition(".")[0]) is None:
        parser.error(f"got no package {module.partition('.')[0]}, expected it to be installed")
    return import_module(module).main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main())
