"""The engine's loop alone, in a process of its own: what serving is compared with.

    python -m bench.serving.plain [the options of a model]

Reads a line of JSON for each video, {"prompt", "seed", "frames"}. Answers with a line of JSON: {"chunks"}.
"""

import json
import sys
from typing import Any

from engine.commands.job import Bundle, Model
from engine.commands.opening import open_pipeline, shape_of
from engine.config import Preset, Runtime
from engine.options import Parser, add_options, chosen, options_of


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m bench.serving.plain", description=__doc__)
    for kind in (Model, Bundle, Runtime):
        add_options(parser, kind)
    add_options(parser, Preset, skip=("family",), defaults=False)
    args = parser.parse_args(argv)
    model, bundle, runtime = options_of(args, Model), options_of(args, Bundle), options_of(args, Runtime)
    overrides: dict[str, Any] = chosen(args, Preset)
    pipeline = open_pipeline(model, bundle, runtime, overrides, shape_of(model, bundle, (), None))
    print(json.dumps({"ready": pipeline.device.type}), flush=True)
    for line in sys.stdin:
        wish, chunks, frames = json.loads(line), 0, 0
        with pipeline.stream(wish["prompt"], seed=wish["seed"], frames=wish["frames"]) as stream:
            while frames < wish["frames"]:
                frames += len(stream.next_chunk())
                chunks += 1
        print(json.dumps({"chunks": chunks}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
