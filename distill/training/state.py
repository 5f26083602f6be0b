"""What every training stage shares: typed config, resumable state, learning-rate curve, EMA, progress line."""

import argparse
import json
import os
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Config = TypeVar("Config")


def parse_arguments(doc: str, default_out: str, *, dry_run: bool = False) -> argparse.Namespace:
    """The command line every stage shares; `dry_run` for those that can be planned without running."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("distill/configs/sprites.toml"), help="TOML file")
    parser.add_argument("--out", type=Path, default=Path(default_out), help="folder for checkpoints and logs")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (two runs of one beat one of two)")
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard logs to --out")
    if dry_run:
        parser.add_argument("--dry-run", action="store_true", help="build it without memory, print what it would take")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


def leave_processes() -> None:
    """Close the connections to the other processes, if there are any, once none of them uses them any more.

    Left to the interpreter's end, gloo's threads can meet tensors that Python has already torn down, and abort.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def run_stage(main: Callable[[], None]) -> None:
    """Call a stage's main; bad input is one line and exit status 2, with --debug the whole traceback."""
    try:
        main()
        leave_processes()
    except (ValueError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)


def load_config(path: Path, section: str, kind: type[Config]) -> Config:
    """Read one table of a TOML file into a dataclass; unknown keys and wrong types are refused."""
    if not path.is_file():
        raise FileNotFoundError(f"config: got {path}, expected a TOML file")
    tables = tomllib.loads(path.read_text())
    if section not in tables:
        raise ValueError(f"{path}: got tables {sorted(tables)}, expected [{section}]")
    known = {field.name: type(field.default) for field in fields(kind)}
    unknown = sorted(set(tables[section]) - set(known))
    if unknown:
        raise ValueError(f"{path} [{section}]: got unknown keys {unknown}, expected some of {sorted(known)}")
    values = {}
    for name, value in tables[section].items():
        value = tuple(value) if isinstance(value, list) else value
        value = float(value) if known[name] is float and type(value) is int else value
        if type(value) is not known[name]:
            raise ValueError(f"{path} [{section}]: got {name} = {value!r}, expected {known[name].__name__}")
        values[name] = value
    return kind(**values)


def write_json(path: Path, content: Any) -> None:
    """Write beside the name and rename when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1))
    os.replace(part, path)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint beside its name and rename it when whole; the global random state goes with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save({**state, "rng": torch.get_rng_state()}, part)
    os.replace(part, path)


def load_state(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint (None if there is none yet) and put the global random state back."""
    if not path.is_file():
        return None
    state = torch.load(path, weights_only=True)
    torch.set_rng_state(state["rng"])
    return state


def trapezoid(step: int, steps: int, warmup: int, decay: float) -> float:
    """Learning-rate factor: linear warm-up, flat, then linear to 2% over the last `decay` share of the run."""
    left = max(0.0, 1 - step / steps)
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * min(1.0, left / decay))


def set_lr(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """Set the learning rate, times a param group's own "factor"."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("factor", 1.0)


class Ema:
    """Exponential moving average of parameters; young averages forget faster, so the start does not linger."""

    def __init__(self, named: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.live = dict(named)
        self.mean = {name: p.detach().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, 1 - 1 / (0.1 * (step + 1) + 1))
        torch._foreach_lerp_(list(self.mean.values()), [p.detach() for p in self.live.values()], 1 - decay)

    @torch.no_grad()
    def load(self, mean: dict[str, Tensor]) -> None:
        if mean.keys() != self.mean.keys():
            raise ValueError(f"EMA: got {len(mean)} parameters, expected the {len(self.mean)} of this model")
        for name, value in mean.items():
            self.mean[name].copy_(value)


class Progress:
    """One line every `every` steps: step, smoothed loss, rate and time left; the same numbers to TensorBoard."""

    def __init__(self, name: str, steps: int, every: int, board: Path | None = None) -> None:
        self.name, self.steps, self.every = name, steps, every
        self.average: float | None = None
        self.begun, self.first = time.monotonic(), None
        self.writer = None
        if board is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(board))

    def update(self, step: int, loss: float, **extra: float) -> None:
        if self.first is None:
            self.first = step - 1
        self.average = loss if self.average is None else 0.98 * self.average + 0.02 * loss
        if step % self.every and step != self.steps:
            return
        spent = time.monotonic() - self.begun
        rate = spent / (step - self.first)
        more = " ".join(f"{key} {value:.4g}" for key, value in extra.items())
        print(
            f"{self.name} {step}/{self.steps} loss {self.average:.4f} {more} "
            f"{rate * 1e3:.0f} ms/step, {spent / 60:.1f} min, eta {(self.steps - step) * rate / 60:.1f} min",
            flush=True,
        )
        if self.writer is not None:
            self.writer.add_scalar("loss", self.average, step)
            for key, value in extra.items():
                self.writer.add_scalar(key, value, step)
