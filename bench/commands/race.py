"""Self-Forcing on the same random weights, this engine beside another: chunk by chunk, stage by stage, in one run.

Every lane is a process of its own behind the adapter protocol, and lanes take turns. First the latents of all lanes are
compared with ours, from the same noise. Where they differ there are no numbers.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from bench.adapters import flashdreams_wheel, given, lanes
from bench.adapters.lanes import OURS, Field, Lane
from bench.instruments import check, gates, models
from bench.instruments.check import Check
from bench.instruments.header import machine, print_header
from bench.instruments.spread import interleaved, paired_ratio, quartiles, table
from bench.report import saved
from engine.options import option
from engine.presets import find_preset
from engine.runtime.device import device_of

# Largest rms difference of a chunk's latents from ours, over their rms; see docs/benchmarks.md.
LIMITS = {"fp32": 2e-5, "bf16": 6e-2, "fp8": 0.25, "fp8-attention": 0.25}
STAGES = ("denoise", "context", "decode")
TEXT = {"rows": 100, "seed": 1}


@dataclass(frozen=True, kw_only=True)
class Options(saved.Reported, models.Machine):
    peer: str = option("flashdreams", "the other engine: " + ", ".join(lanes.PEERS), metavar="NAME")
    lanes: str = option("", "some of " + ", ".join(lanes.LANES) + "; default: all that make sense there",
                        metavar="A,B,...")  # fmt: skip
    adapter: tuple[str, ...] = option(
        (), "another lane that speaks the protocol; may be repeated", metavar="NAME=COMMAND"
    )
    shape: str = option("", "of the random weights; default: wan2.1-1.3b on a GPU, tiny on a processor",
                        choices=("", *models.SHAPES))  # fmt: skip
    precision: str = option("auto", "of lanes whose name has none: bf16 on a GPU, fp32 on a processor",
                            choices=("auto", "fp32", "bf16"))  # fmt: skip
    height: int | None = option(None, "pixels; default: the shape's own")
    width: int | None = option(None, "pixels; default: the shape's own")
    rounds: int = option(7, "turns of every lane")
    chunks: int = option(3, "chunks in a turn, once as a stream and once stage by stage")
    checked: int = option(9, "chunks whose latents are compared; the cache is full after 7")
    seed: int = option(0, "of the weights and of the compared noise (0)")
    budget: float = option(520.0, "seconds after which it ends with the numbers so far", metavar="SECONDS")
    logs: Path | None = option(None, "keep the lanes' stderr in this folder", metavar="DIR")


@dataclass(frozen=True)
class Turn:
    """Milliseconds of each chunk: as a user streams them, frames on the host, and by stage."""

    chunks: list[float]
    stages: dict[str, list[float]]


@dataclass
class Race:
    """What is known so far."""

    options: Options
    lanes: dict[str, Lane]
    device: torch.device
    about: dict[str, dict[str, Any]] = field(default_factory=dict)  # lane -> its answers to open and warm
    rounds: list[dict[str, Turn]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    complete: bool = False
    _truth: list[Tensor] = field(default_factory=list)
    _longest: float = 0.0  # seconds of a turn

    @property
    def red(self) -> bool:
        return not all(c.passed for c in self.checks)

    def precision(self, name: str) -> str:
        auto = "bf16" if self.device.type == "cuda" else "fp32"
        return self.lanes[name].precision or (auto if self.options.precision == "auto" else self.options.precision)

    def run(self) -> None:
        """Race until all rounds are done, the budget is spent, or a check is red."""
        o, shape = self.options, shape_of(self.options, self.device)
        settings = {
            "weights": {"shape": shape, "seed": o.seed, "attention_gain": gates.ATTENTION_GAIN}, "text": TEXT,
            "height": o.height, "width": o.width, "device": str(self.device), "dtype": self.precision(OURS),
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        with Field(self.lanes, settings, o.budget, o.logs, dropped=self.dropped) as lanes:
            lanes.open(at_once=self.device.type == "cuda")
            self.about = {
                name: {"about": str(adapter.about.get("about", name))} for name, adapter in lanes.running.items()
            }
            # The lanes that compile come last: the others then have numbers, whatever compiling takes.
            quick = [name for name in self.lanes if not self.lanes[name].compiles]
            slow = [name for name in self.lanes if self.lanes[name].compiles]
            finished = self._prepare(lanes, quick) and self._turns(lanes, quick, 1 if slow else o.rounds)
            if finished and slow:
                finished = self._prepare(lanes, slow) and self._turns(lanes, [*quick, *slow], o.rounds - 1)
            self.complete = finished

    def _prepare(self, lanes: Field, names: list[str]) -> bool:
        """Compare the latents of these lanes, then warm them up; whether the race may go on."""
        for name in [name for name in names if name in lanes.running]:
            if lanes.too_late(name):
                lanes.drop(name, "no time left")
                continue
            found = self._latents(lanes, name)
            if name == OURS:
                self._truth = found
            elif found and self._truth:
                self.checks.append(compared(name, found, self._truth, LIMITS[self.precision(name)]))
        if not self._truth:
            self.checks.append(Check("latents of ours", False, self.dropped.get(OURS, "none")))
        if self.red:
            self.rounds.clear()  # the numbers so far are void as well
            return False
        for name in [name for name in names if name in lanes.running]:
            begun = time.perf_counter()
            answer = lanes.ask(name, "warm")
            if answer is not None:
                self.about[name] |= {"captured": answer.get("captured"), "warm_s": time.perf_counter() - begun}
        return True

    def _latents(self, lanes: Field, name: str) -> list[Tensor]:
        """A lane's first latents; none where that dropped it."""
        file, o = lanes.folder / f"{name}.safetensors", self.options
        request = {"seed": o.seed, "chunks": o.checked, "file": str(file), "timesteps": self.precision(OURS)}
        if lanes.ask(name, "latents", **request) is None:
            return []
        try:
            return given.read_latents(file)
        except (OSError, SafetensorError, KeyError) as error:
            lanes.drop(name, f"got no latents in its file, expected chunk_0, chunk_1, ... ({error})")
            return []

    def _turns(self, lanes: Field, names: list[str], rounds: int) -> bool:
        """Rounds of these lanes, each begun by another lane; False where the budget ends them."""
        first = len(self.rounds)
        calls = {name: partial(self._turn, lanes, name) for name in names if name in lanes.running}
        for number, name, turn in interleaved(calls, rounds) if calls else ():
            if turn is None:
                if name in lanes.running:
                    return False
                continue
            if len(self.rounds) <= first + number:
                self.publish()
                self.rounds.append({})
            self.rounds[-1][name] = turn
            told = ", ".join(f"{stage} {median(ms):.2f}" for stage, ms in turn.stages.items())
            print(f"round {len(self.rounds)}: {name} {median(turn.chunks):.2f} ms per chunk ({told})", file=sys.stderr)
        self.publish()
        return True

    def _turn(self, lanes: Field, name: str) -> Turn | None:
        """None where the lane is not running any more, or the budget is spent."""
        if name not in lanes.running or lanes.left < max(1, 1.5 * self._longest):
            return None
        begun, adapter = time.perf_counter(), lanes.running[name]
        ask = [partial(getattr(adapter, op), self.options.chunks, lanes.limit(op, name)) for op in ("chunks", "stages")]
        chunks = lanes.attempt(name, ask[0])
        stages = lanes.attempt(name, ask[1]) if chunks is not None else None
        self._longest = max(self._longest, time.perf_counter() - begun)
        if chunks is None or stages is None:
            return None
        if set(stages) != set(STAGES):
            lanes.drop(name, f"got stages {', '.join(stages)}, expected {', '.join(STAGES)}")
            return None
        return Turn([1e3 * seconds for seconds in chunks], stages)

    def publish(self) -> None:
        """Save what is known so far, so that a run that is stopped loses one round."""
        if self.options.save:
            saved.store(self.options, "race", self.report())

    def report(self) -> dict[str, Any]:
        """The numbers so far."""
        o, shape, preset = self.options, shape_of(self.options, self.device), find_preset(given.PRESET)
        config, vae_config, _, _ = models.SHAPES[shape]
        height, width = models.size_of(shape, self.device, o.height, o.width)
        where, frames = machine(self.device), preset.chunk * vae_config.scale_factor_temporal
        stream = {
            "model": f"random weights of {shape}", "layers": config.num_layers, "dim": config.dim,
            "preset": given.PRESET, "chunk": preset.chunk, "window": preset.window,
            "steps": [list(row) for row in preset.steps], "height": height, "width": width, "frames_per_chunk": frames,
        }  # fmt: skip
        rows = [self._row(name, frames) for name in self.lanes if any(name in turns for turns in self.rounds)]
        return {
            "machine": where, "stream": stream, "peer": o.peer, "rounds": len(self.rounds), "complete": self.complete,
            "checks": [asdict(c) for c in self.checks], "dropped": dict(self.dropped), "lanes": rows,
            "timings": {row["name"]: row["ms_per_chunk"] for row in rows}, "commit": where["commit"],
            "device": where["device"],
        }  # fmt: skip

    def _row(self, name: str, frames: int) -> dict[str, Any]:
        turns = [turns[name] for turns in self.rounds if name in turns]
        ms = quartiles([ms for turn in turns for ms in turn.chunks])
        stages = {stage: quartiles([ms for turn in turns for ms in turn.stages[stage]]) for stage in STAGES}
        peers = [peer for peer, lane in self.lanes.items() if lane.peer and peer != name]
        ratios = {peer: self._ratio(name, peer) for peer in peers if not self.lanes[name].peer}
        return {
            "name": name, "precision": self.precision(name), **self.about[name], "ms_per_chunk": ms,
            "stages_ms": stages, "fps": 1e3 * frames / ms["median"],
            "ratios": {peer: ratio for peer, ratio in ratios.items() if ratio},
        }  # fmt: skip

    def _ratio(self, name: str, peer: str) -> dict[str, float] | None:
        """Our time over the peer's: each round's medians, over the rounds that both ran."""
        both = [(turns[name], turns[peer]) for turns in self.rounds if name in turns and peer in turns]
        medians = [[median(turn.chunks) for turn in side] for side in zip(*both, strict=True)]
        return paired_ratio(*medians) if both else None


def shape_of(options: Options, device: torch.device) -> str:
    return options.shape or ("wan2.1-1.3b" if device.type == "cuda" else "tiny")


def compared(name: str, found: Sequence[Tensor], truth: Sequence[Tensor], limit: float) -> Check:
    """A lane's latents beside ours: the rms of their difference over the rms of ours, chunk by chunk."""
    what = f"latents of {name}"
    if [x.shape for x in found] != [x.shape for x in truth]:
        return Check(what, False, f"got {[list(x.shape) for x in found]}, expected {[list(x.shape) for x in truth]}")
    errors = [float((x - y).square().mean().sqrt() / y.square().mean().sqrt())
              for x, y in zip(found, truth, strict=True)]  # fmt: skip
    told = ", ".join(f"{error:.1e}" for error in errors)
    return Check(what, all(error <= limit for error in errors), f"rms error {told}; limit {limit:.0e}")  # no NaN passes


def print_report(r: dict[str, Any]) -> None:
    peers = list(dict.fromkeys(peer for row in r["lanes"] for peer in row["ratios"]))
    spread = "{median:.3f} [{low:.3f}, {high:.3f}]"
    print(f"\nmilliseconds per chunk of {r['stream']['frames_per_chunk']} frames, cache full, {r['rounds']} rounds; "
          "ratios: median [95% interval]\n")  # fmt: skip
    print(table([
        {"lane": row["name"], **{stage: row["stages_ms"][stage]["median"] for stage in STAGES},
         "chunk": row["ms_per_chunk"]["median"], "fps": row["fps"],
         **{f"/ {peer}": spread.format(**row["ratios"][peer]) if peer in row["ratios"] else None for peer in peers}}
        for row in r["lanes"]
    ]))  # fmt: skip
    print()
    for row in r["lanes"]:
        print(f"{row['name']}: {row['about']}")
    for name, why in r["dropped"].items():
        print(f"{name} was dropped: {why}")
    print("chunk is a stream as a user gets it; stages wait for the device in between. The peer has no FP8.")


@contextmanager
def ended_by_signal() -> Iterator[None]:
    """SIGTERM leaves the block as an exception does, so that no lane stays behind on the device."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(options: Options) -> int:
    options.set_threads()
    device = device_of(options.device)
    if options.peer not in lanes.PEERS:
        raise ValueError(f"--peer: got {options.peer!r}, expected {', '.join(lanes.PEERS)}")
    for name, value, least in (("rounds", options.rounds, 1), ("chunks", options.chunks, 1),
                               ("checked", options.checked, 1), ("budget", options.budget, 1),
                               ("seed", options.seed, 0)):  # fmt: skip
        if not value >= least:
            raise ValueError(f"--{name}: got {value}, expected at least {least}")
    gpu = device.type == "cuda"
    names = options.lanes.split(",") if options.lanes else lanes.usual(options.peer, gpu)
    race = Race(options, lanes.chosen(names, options.adapter, options.peer, gpu), device)
    models.size_of(shape_of(options, device), device, options.height, options.width)
    if any(lane.peer == "flashdreams" for lane in race.lanes.values()):
        flashdreams_wheel.wheel_version()
    with ended_by_signal():
        race.run()
    if check.refused(race.checks):
        race.publish()  # over what was saved before the check
        return 1
    report = race.report()
    if not options.json:
        print_header(report["machine"], report["stream"])
        print_report(report)
    saved.emit(options, "race", report)
    return 1 if race.dropped else 0
