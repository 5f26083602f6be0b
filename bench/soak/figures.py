"""What a long run is judged by: samples of the process, the times of all chunks, and limits."""

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch

from bench.instruments.check import Check
from bench.instruments.spread import line_fit

PARTS = 10
MOST_SAMPLES = 200
# Limits. What is compared with an early value is compared with that of the first tenth, when all is warm.
GROWTH_MB = 16.0  # resident memory, or a GPU's, fitted over the samples after the first tenth
MORE = 2  # descriptors or threads more than at the end of the first tenth
SLOWER = 2.0  # p99 of the last tenth over the first one's


@dataclass(frozen=True)
class Sample:
    """The process at one moment of the run."""

    seconds: float  # since the first chunk was asked for
    memory_mb: float
    device_mb: float  # allocated on a GPU
    descriptors: int
    threads: int


@dataclass
class Figures:
    """A run so far. Each chunk adds 16 bytes, so that the record hardly shows in the memory that it judges."""

    device: torch.device
    length: float  # seconds that the run shall take
    wall: array = field(default_factory=lambda: array("f"))  # milliseconds of each chunk, by the clock
    cpu: array = field(default_factory=lambda: array("f"))  # and of the process
    digests: array = field(default_factory=lambda: array("Q"))  # of each chunk's frames, the first 64 bits of a sha256
    samples: list[Sample] = field(default_factory=list)
    begun: float = field(default_factory=time.perf_counter)
    paused: float = 0.0  # seconds that were not spent on the stream

    def __post_init__(self) -> None:
        self._process = psutil.Process()

    def seconds(self) -> float:
        """How long the stream has run."""
        return time.perf_counter() - self.begun - self.paused

    def add(self, wall: float, cpu: float, digest: int) -> None:
        """Count a chunk: its seconds and its digest. Sample the process where that is due."""
        self.wall.append(1e3 * wall)
        self.cpu.append(1e3 * cpu)
        self.digests.append(digest)
        if self.seconds() >= self.length * len(self.samples) / MOST_SAMPLES:
            self.sample()

    def sample(self) -> None:
        """Note what the process holds now."""
        device = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        with self._process.oneshot():
            self.samples.append(Sample(
                self.seconds(), self._process.memory_info().rss / 2**20, device / 2**20,
                self._process.num_fds(), self._process.num_threads(),
            ))  # fmt: skip

    def tenths(self) -> list[dict[str, Any]]:
        """One row for each tenth of the chunks: percentiles of their times, and the process at its end."""
        rows, count, begun = [], len(self.wall), self.samples[0].seconds
        length = self.samples[-1].seconds - begun
        for part in range(PARTS):
            own = slice(count * part // PARTS, count * (part + 1) // PARTS)
            wall, cpu = np.percentile(self.wall[own], [50, 99]), np.percentile(self.cpu[own], [50, 99])
            until = begun + length * (part + 1) / PARTS
            last = [sample for sample in self.samples if sample.seconds <= until][-1]
            rows.append({
                "chunks": own.stop - own.start, "p50_ms": float(wall[0]), "p99_ms": float(wall[1]),
                "cpu_p50_ms": float(cpu[0]), "cpu_p99_ms": float(cpu[1]), "memory_mb": last.memory_mb,
                "device_mb": last.device_mb, "descriptors": last.descriptors, "threads": last.threads,
            })  # fmt: skip
        return rows

    def warm(self) -> list[Sample]:
        """The samples after the first tenth of the run."""
        first = self.samples[0].seconds
        return [s for s in self.samples if s.seconds >= first + (self.samples[-1].seconds - first) / PARTS]


def growth_mb(samples: Sequence[Sample], of: str) -> dict[str, float]:
    """Growth of a field by a line through the samples: MB from the first to the last, and MB per hour."""
    seconds = [sample.seconds for sample in samples]
    slope = line_fit(seconds, [getattr(sample, of) for sample in samples])["slope"]
    return {"mb": slope * (seconds[-1] - seconds[0]), "mb_per_hour": 3600 * slope}


def verdict(figures: Figures) -> tuple[dict[str, Any], list[Check]]:
    """Growth, and early against late values, for the report; and whether each is within its limit."""
    rows, samples = figures.tenths(), figures.warm()
    early, late = rows[0], rows[-1]
    memory, device = (growth_mb(samples, of) for of in ("memory_mb", "device_mb"))
    ratios = {clock: late[clock] / early[clock] for clock in ("p99_ms", "cpu_p99_ms")}
    checks = []
    for what, growth in (("memory", memory), ("GPU memory", device)):
        said = f"{growth['mb']:+.1f} MB after the first tenth ({growth['mb_per_hour']:+.1f} an hour)"
        checks.append(Check(what, growth["mb"] <= GROWTH_MB, f"{said}, limit {GROWTH_MB:g}"))
    for what in ("descriptors", "threads"):
        more = late[what] - early[what]
        checks.append(Check(what, more <= MORE, f"{early[what]}, then {late[what]}, limit {MORE} more"))
    # What other processes take shows in one clock, what a stream loses shows in both.
    slower = min(ratios.values())
    said = f"last tenth / first: {ratios['p99_ms']:.2f} by the clock, {ratios['cpu_p99_ms']:.2f} of CPU time"
    checks.append(Check("p99 of a chunk", slower <= SLOWER, f"{said}, limit {SLOWER:g} of both"))
    return {"growth": {"memory": memory, "device": device}, "late_over_early": ratios}, checks
