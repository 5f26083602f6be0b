"""What a training run carries from step to step: checkpoint, learning rate, moving average, progress line."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.files import whole_file


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a whole checkpoint, and the global random state with it."""
    with whole_file(path) as part:
        torch.save({**state, "rng": torch.get_rng_state()}, part)


def load_state(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint (None without one) and restore the global random state."""
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
    """Set the learning rate of every param group to lr times the group's own "factor"."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("factor", 1.0)


class Ema:
    """Exponential moving average of parameters. A young average forgets faster, so that the start does not linger."""

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
    """One line every `every` steps: step, smoothed loss, rate and time left. TensorBoard gets the same numbers."""

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
