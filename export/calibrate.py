"""Largest input magnitude of every linear that can be quantised, and of each step, observed while the model streams.

    python -m export.calibrate --out amax.json [--model DIR] [--prompts FILE] [--seeds 2] [--chunks 12]

`python -m export --precision fp8|int8 --calibration amax.json` uses it. A step is a pass at one timestep, or a pass
without one, such as the context pass of a finished chunk.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.commands.stderr import is_bad_input, line_of, say
from engine.files import read_json, write_json
from engine.loader import load
from engine.options import Parser, add_options, option, options_of
from engine.program import cleanly
from engine.runtime.device import DTYPES
from engine.runtime.passes import Pass, Stages
from engine.stream import Pipeline
from export.eight_bits import Calibration, quantizable, replace_linears

DEFAULT_PROMPT = "a red circle moving right slowly on a gray background"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Options: which model streams, under which preset, at which size."""

    model: Path | None = option(None, "pipeline directory; default: the embedded model", metavar="DIR")
    preset: str | None = option(None, "default: the model's own", metavar="NAME|FILE.toml")
    height: int | None = option(None, "pixels; default: the model's own")
    width: int | None = option(None, "pixels; default: the model's own")


@dataclass(frozen=True, kw_only=True)
class Options(Source):
    out: Path = option(help="where amax is written", metavar="FILE.json")
    precision: str = option("fp32", "in which the model streams", choices=DTYPES)
    prompts: Path | None = option(None, "one per line; default: one for the embedded model", metavar="FILE")
    seeds: int = option(2, "streams per prompt")
    chunks: int = option(12, "latent chunks per stream")
    percentile: float = option(100.0, "100 is the maximum")


class _Named:
    """A backend that tells which step is running."""

    def __init__(self, stages: Stages) -> None:
        self.stages, self.step = stages, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stages, name)

    def run(self, step: Pass, cache: Any, text_kv: Any) -> Tensor:
        self.step = step.kind.graph if step.t is None else f"{step.kind.graph} at {float(step.t[0]):g}"
        return self.stages.run(step, cache, text_kv)


class _Observer(nn.Module):
    """A linear that remembers each step's largest magnitude of its inputs, or the largest percentile of one call."""

    def __init__(self, linear: nn.Linear, percentile: float) -> None:
        super().__init__()
        self.linear, self.percentile = linear, percentile
        self.named: _Named | None = None
        self.steps: dict[str, float] = {}

    def forward(self, x: Tensor) -> Tensor:
        size = x.detach().abs().flatten()
        rank = max(round(self.percentile / 100 * size.numel()), 1)
        amax = float(size.max() if rank == size.numel() else size.kthvalue(rank).values)
        step = self.named.step if self.named else ""
        self.steps[step] = max(self.steps.get(step, 0.0), amax)
        return self.linear(x)


def calibrate(
    pipeline: Pipeline, prompts: Iterable[str], seeds: Iterable[int] = (0,), chunks: int = 12, percentile: float = 100.0
) -> Calibration:
    """amax of every ROLE.blocks.N.NAME over streams of `chunks` latent chunks for every prompt and seed.

    percentile 100 is the maximum. A smaller one is taken within each call, and the largest over all calls is kept.
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"calibrate: got percentile {percentile}, expected more than 0, at most 100")
    if chunks < 2:
        raise ValueError(f"calibrate: got {chunks} chunks, expected at least 2: the first sees no past")
    observers: dict[str, _Observer] = {}

    def observe(name: str, linear: nn.Linear) -> nn.Module:
        observers[name] = _Observer(linear, percentile)
        return observers[name]

    watched = replace_linears(pipeline, quantizable(pipeline), observe)
    named = _Named(watched.stages)
    watched = replace(watched, stages=named)
    for observer in observers.values():
        observer.named = named
    runs = [(prompt, seed) for prompt in prompts for seed in seeds]
    if not runs:
        raise ValueError("calibrate: got no prompt or no seed, expected at least one of each")
    for prompt, seed in runs:
        with watched.stream(prompt, seed=seed) as stream:
            for _ in range(chunks):
                stream.next_latent()
    steps = {name: observer.steps for name, observer in observers.items()}
    return Calibration({name: max(found.values()) for name, found in steps.items()}, steps)


def write_calibration(calibration: Calibration, path: Path) -> None:
    """JSON, whole or not at all."""
    write_json(path, {"format": "greedy-amax", "amax": calibration.amax, "steps": calibration.steps})


def read_calibration(path: Path) -> Calibration:
    """From our JSON, which may lack the steps, or from a ModelOpt state dict: a .safetensors, or a .pt of tensors only.

    ModelOpt calls it NAME.input_quantizer._amax. A name without a role holds for every role. Raises FileNotFoundError
    or ValueError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"calibration: got no file {path}, expected one")
    if path.suffix == ".json":
        return _from_json(path)
    suffix = ".input_quantizer._amax"
    found = {
        name.removesuffix(suffix): value.abs().max().item()
        for name, value in _tensors(path).items()
        if name.endswith(suffix) and isinstance(value, Tensor) and value.numel()
    }
    return Calibration(_checked(path, found))


def _from_json(path: Path) -> Calibration:
    content = read_json(path)
    if content.get("format") != "greedy-amax":
        raise ValueError(f"{path}: got no format greedy-amax, expected a file of export.calibrate")
    amax, steps = _checked(path, content.get("amax")), content.get("steps", {})
    if not isinstance(steps, dict) or steps.keys() - amax:
        raise ValueError(f"{path}: got steps of linears without amax, expected those of its linears")
    return Calibration(amax, {name: _checked(path, found) for name, found in steps.items()})


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each kind of damage raises another one
        raise ValueError(f"{path}: got no state dict of tensors, expected one ({str(error)[:100]})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}, expected a state dict")
    return content


def _checked(path: Path, amax: object) -> dict[str, float]:
    if not isinstance(amax, dict) or not amax:
        raise ValueError(f"{path}: got no amax, expected one per linear")
    for name, value in amax.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise ValueError(f"{path}: {name}: got amax {value!r}, expected a finite number")
    return amax


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m export.calibrate", description=__doc__)
    add_options(parser, Options)
    options = options_of(parser.parse_args(argv), Options)
    try:
        prompts = [DEFAULT_PROMPT]
        if options.prompts is not None:
            lines = options.prompts.read_text(encoding="utf-8").splitlines()
            prompts = [line.strip() for line in lines if line.strip()]
        with cleanly():
            pipeline = load(
                options.model, preset=options.preset, device="cpu", precision=options.precision, height=options.height,
                width=options.width,
            )  # fmt: skip
            found = calibrate(pipeline, prompts, range(options.seeds), options.chunks, options.percentile)
            write_calibration(found, options.out)
            say(found.summary())
    except (ValueError, OSError) as error:
        say(f"error: {line_of(error)}")
        return 2 if is_bad_input(error) else 1
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
