"""The training loop of the stages that `fit` trains. Resumed runs have the same losses, and so have several processes.

An objective is a module. Its forward takes the draws of some samples and returns their mean loss and its named parts.
All randomness comes from the draws, which depend on (seed, step, sample) alone. The loop splits a step's samples over
processes and micro-batches, which changes nothing but rounding. `accelerate launch` or `torchrun` starts the processes.
"""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from distill.training.draws import Draws
from distill.training.sharding import shard_frozen
from distill.training.state import Ema, Progress, load_state, save_state, set_lr, trapezoid
from engine.files import whole_file
from engine.options import option

# Processes wait for the one that scores or writes one more shard. The libraries' default of minutes is too short.
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=12))
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class FitConfig:
    """What the stages that `fit` trains share."""

    steps: int = option(1000, "optimiser steps")
    batch: int = option(4, "samples per step, over all processes")
    micro: int = option(0, "samples per forward pass; 0: all samples of a process")
    lr: float = option(1e-3, "highest learning rate")
    warmup: int = option(50, "steps of linear warm-up")
    decay: float = option(0.5, "share of the steps over which the learning rate falls")
    weight_decay: float = option(0.0, "of AdamW")
    betas: tuple[float, ...] = option((0.9, 0.98), "of AdamW")
    clip: float = option(1.0, "largest norm of the gradient")
    ema: float = option(0.99, "decay of the moving average of the trained weights")
    precision: str = option("fp32", "fp32; bf16: frozen weights and products in bf16, trained weights in fp32")
    recompute: bool = option(False, "recompute activations block by block (gradient checkpointing)")
    shard: bool = option(False, "spread frozen weights over the processes (FSDP2): less memory, more traffic")
    seed: int = option(0, "of weights, data order and noise")
    save_every: int = option(100, "steps between two checkpoints")
    log_every: int = option(10, "steps between two progress lines")

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: got {self.precision!r}, expected one of {', '.join(PRECISIONS)}")
        if self.steps < 1 or self.batch < 1 or self.micro < 0:
            raise ValueError(
                f"got steps {self.steps}, batch {self.batch}, micro {self.micro}, expected 1, 1 and 0 or more"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of frozen weights."""
        return PRECISIONS[self.precision]


class Objective(nn.Module):
    """A stage's loss."""

    def groups(self) -> dict[str, tuple[dict[str, nn.Parameter], float]]:
        """Trained parameters by group: name -> (parameters, factor of their learning rate)."""
        raise NotImplementedError

    def optimizers(self, config: FitConfig) -> list[torch.optim.Optimizer]:
        """AdamW on every group. "factor" of a param group multiplies the learning rate."""
        groups = [{"params": list(named.values()), "factor": factor} for named, factor in self.groups().values()]
        betas = (config.betas[0], config.betas[1])
        return [torch.optim.AdamW(groups, lr=config.lr, betas=betas, weight_decay=config.weight_decay)]

    def frozen(self) -> list[nn.Module]:
        """Models beside this module that are only read. With `shard` the processes share their weights."""
        return []

    def follow(self, average: dict[str, Tensor]) -> None:
        """Called before the first step, with the moving average of the first group, which every step then updates."""

    def batch(self, step: int, config: FitConfig) -> int:
        """Samples per step, over all processes."""
        return config.batch

    def forward(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of the samples of `draws`, and its named parts."""
        raise NotImplementedError


def accelerator_of(config: FitConfig) -> Accelerator:
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True), PATIENCE],
    )


def count_processes(accelerator: Accelerator) -> str:
    count = accelerator.num_processes
    return f"{count} process{'es' * (count > 1)}"


def split(batch: int, micro: int, rank: int, processes: int) -> list[list[int]]:
    """The samples of one process, in micro-batches of equal size."""
    if batch % processes:
        raise ValueError(f"batch: got {batch}, expected a multiple of the {processes} processes")
    own = batch // processes
    micro = micro or own
    if own % micro:
        raise ValueError(f"micro: got {micro}, expected a divisor of the {own} samples per process")
    first = rank * own
    return [list(range(start, start + micro)) for start in range(first, first + own, micro)]


def _keep_losses(path: Path, steps: int) -> None:
    """Drop the lines that a killed run wrote after its last checkpoint, at `steps`."""
    if path.is_file():
        lines = [line for line in path.read_text().splitlines(True) if json.loads(line)["step"] <= steps]
        with whole_file(path) as part:
            part.write_text("".join(lines))


def fit(
    objective: Objective,
    config: FitConfig,
    out: Path,
    accelerator: Accelerator,
    board: Path | None = None,
    stop_at: int | None = None,
    watch: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> dict[str, Tensor]:
    """Train, or resume from out/state.pt, and return the averaged parameters of the first group.

    out/losses.jsonl gets one line per step. `stop_at` ends the run early, as a kill would. After every step the main
    process calls `watch` with the number of steps done and the average so far.
    """
    for batch in sorted({objective.batch(step, config) for step in range(config.steps)}):
        split(batch, config.micro, accelerator.process_index, accelerator.num_processes)
    objective.to(accelerator.device)
    groups, optimizers = objective.groups(), objective.optimizers(config)
    everything = {f"{group}.{name}": p for group, (named, _) in groups.items() for name, p in named.items()}
    ema, first = Ema(next(iter(groups.values()))[0], config.ema), 0
    if state := load_state(out / "state.pt"):
        if missing := sorted({"trained", "ema", "optimizers", "step"} - state.keys()):
            raise ValueError(f"{out / 'state.pt'}: got no {missing}, expected a checkpoint of this version")
        if state["trained"].keys() != everything.keys():
            raise ValueError(
                f"{out / 'state.pt'}: got {len(state['trained'])} trained tensors, expected {len(everything)}"
            )
        with torch.no_grad():
            for name, value in state["trained"].items():
                everything[name].copy_(value)
        ema.load(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            factors = [group.get("factor", 1.0) for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, factor in zip(optimizer.param_groups, factors, strict=True):
                group["factor"] = factor  # from today's config, as the learning rate is
        first = state["step"]
    objective.follow(ema.mean)
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        _keep_losses(out / "losses.jsonl", first)
        print(f"{out.name}: {count_processes(accelerator)}, from step {first}", flush=True)
    if config.shard and accelerator.num_processes > 1:
        layers = shard_frozen(objective, objective.frozen(), accelerator.device.type)
        accelerator.print(f"{out.name}: {layers} frozen layers spread over them", flush=True)
    model, *prepared = accelerator.prepare(objective, *optimizers)
    progress = Progress(out.name, config.steps, config.log_every, board if accelerator.is_main_process else None)
    for step in range(first, min(config.steps, stop_at or config.steps)):
        set_lr(optimizers, config.lr * trapezoid(step, config.steps, config.warmup, config.decay))
        batch = objective.batch(step, config)
        micros = split(batch, config.micro, accelerator.process_index, accelerator.num_processes)
        sums: dict[str, Tensor] = {}
        for number, samples in enumerate(micros):
            last = number == len(micros) - 1
            with nullcontext() if last else accelerator.no_sync(model):
                loss, parts = model(Draws(config.seed, step, samples))
                accelerator.backward(loss / len(micros))
            for name, value in {"loss": loss, **parts}.items():
                sums[name] = sums.get(name, torch.zeros(())) + value.detach().float().cpu() / len(micros)
        for named, _ in groups.values():
            accelerator.clip_grad_norm_(list(named.values()), config.clip)
        for optimizer in prepared:
            optimizer.step()
            optimizer.zero_grad()
        ema.update(step)
        done = step + 1
        values = accelerator.reduce(torch.stack(list(sums.values())).to(accelerator.device), "mean")
        means = dict(zip(sums, values.tolist(), strict=True))
        if accelerator.is_main_process:
            with (out / "losses.jsonl").open("a") as log:
                log.write(json.dumps({"step": done, **means}) + "\n")
            progress.update(done, means.pop("loss"), **means)
            if done % config.save_every == 0 or done == config.steps:
                state: dict[str, Any] = {
                    "trained": {name: p.detach() for name, p in everything.items()},
                    "ema": ema.mean,
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "step": done,
                }
                save_state(out / "state.pt", state)
            if watch is not None:
                watch(done, ema.mean)
    accelerator.wait_for_everyone()
    return ema.mean
