"""Which heads of a causal student look at near frames alone: scores, and the table that a preset takes.

A head's score is the share of its attention on the newest frames that a local head would keep; the sink that it would
keep as well is left out of both. It is Forcing-KV's (arXiv 2605.09681), whose local heads keep frame 0 and 4 others,
and which calls a head local from a score of one half on.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.config import LocalHeads, Preset
from engine.files import whole_file
from engine.options import option
from engine.stream import Pipeline


@dataclass(frozen=True)
class HeadOptions:
    local_window: int = option(3, "latent frames that a local head keeps, the current chunk included")
    local_sink: int = option(0, "first latent frames that stay among them for good")

    def check_heads(self, pipeline: Pipeline, frames: int) -> None:
        """ValueError unless a local head sees less than the others, in clips of so many pixel frames."""
        preset, latent = pipeline.preset, (frames - 1) // pipeline.temporal + 1
        if preset.family != "causal":
            raise ValueError(f"heads: got a student of the {preset.family} family, expected a causal one")
        if preset.first_chunk not in (0, preset.chunk):
            raise ValueError(f"heads: got a first chunk of {preset.first_chunk}, expected all of {preset.chunk}")
        least = self.local_sink + preset.chunk
        if not least <= self.local_window < preset.window or not 0 <= self.local_sink <= preset.attn_sink:
            raise ValueError(
                f"--local-window: got {self.local_window} with --local-sink {self.local_sink}, expected at least "
                f"{least} and less than the preset's window ({preset.window}), and a sink of 0 to {preset.attn_sink}"
            )
        if latent <= self.local_window:
            raise ValueError(f"--frames: got {frames}, expected more than --local-window keeps: clips of "
                             f"{pipeline.temporal * self.local_window + 1} frames or more")  # fmt: skip

    def scores(self, mass: Tensor, preset: Preset) -> Tensor:
        """The score of every head, [layers, heads], of M [prompts, levels, layers, heads, F, F]; NaN: not seen."""
        found, whole = (torch.zeros(mass.shape[2:4], dtype=torch.float64) for _ in "fw")
        known = mass.double().nan_to_num()
        for query in range(self.local_window, mass.shape[-1]):
            end = (query // preset.chunk + 1) * preset.chunk  # of its chunk, which it sees whole
            near = slice(max(end - self.local_window + self.local_sink, self.local_sink), end)
            found += known[..., query, near].sum(-1).mean((0, 1))
            whole += known[..., query, self.local_sink : end].sum(-1).mean((0, 1))
        return found / whole


def head_table(local: Tensor, window: int, attn_sink: int) -> LocalHeads:
    """The table of the heads that are True in `local` [layers, heads]."""
    return LocalHeads(window, attn_sink, tuple(tuple(row.nonzero().flatten().tolist()) for row in local))


def largest(scores: Tensor, count: int) -> Tensor:
    """True for the `count` heads of the largest scores, [layers, heads]."""
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[scores.flatten().argsort(descending=True, stable=True)[:count]] = True
    return chosen.view(scores.shape)


def drawn(shape: Iterable[int], count: int, seed: int) -> Tensor:
    """True for `count` heads that are drawn, [layers, heads]."""
    return largest(torch.rand(*shape, generator=torch.Generator().manual_seed(seed)), count)


def write_table(path: Path, table: LocalHeads) -> None:
    """Write a table as the JSON file that a preset's `heads` names."""
    with whole_file(path) as part:
        part.write_text(json.dumps(asdict(table)) + "\n", encoding="utf-8")
