"""Solvers: from noise to a clean latent, step by step. A solver is a class here and a row of SOLVERS."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from engine.sampling.schedule import Schedule
from kernels.solver_step import solver_step


class Solver(ABC):
    """One chunk's integration from noise to a clean latent; `step` is called once per denoising step."""

    renoises = False  # whether every step but the last needs fresh noise

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    @abstractmethod
    def step(self, x: Tensor, flow: Tensor, t: float, t_next: float | None, fresh: Tensor | None) -> Tensor:
        """Move x [B, C, F, h, w] from t to t_next, both in [0, 1000]. flow and new noise `fresh` are shaped as x."""


class Renoise(Solver):
    """Predict x0, then add fresh noise up to the next level. Few-step students are trained for this sampler."""

    renoises = True

    def step(self, x: Tensor, flow: Tensor, t: float, t_next: float | None, fresh: Tensor | None) -> Tensor:
        last = t_next is None or fresh is None
        level = 0.0 if last else self.schedule.sigma(t_next)
        return solver_step(x, flow, self.schedule.sigma(t), level, None if last else fresh)


class Euler(Solver):
    """x + (sigma' - sigma) flow, Eq. 4 of Greedy Distill discretised."""

    def step(self, x: Tensor, flow: Tensor, t: float, t_next: float | None, fresh: Tensor | None) -> Tensor:
        return solver_step(x, flow, self.schedule.sigma(t), self.schedule.sigma(t_next))


class UniPC(Solver):
    """UniPC of order 2, B(h) = e^h - 1, in x0 prediction (Zhao et al., 2023), for flow matching.

    Equal to diffusers' UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True).
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule)
        self._x0: list[Tensor] = []  # predictions of the last two steps, newest last
        self._levels: list[Tensor] = []  # sigmas of these predictions
        self._last = torch.empty(0)  # sample at which the last predictor started
        self._order = 0  # order of the last predictor

    @staticmethod
    def _log_snr(sigma: Tensor) -> Tensor:
        return torch.log1p(-sigma) - torch.log(sigma)

    def _update(self, x: Tensor, sigma: Tensor, order: int, newest: Tensor | None) -> Tensor:
        """Predict (newest None) or correct x at noise level sigma, from the last step's x."""
        start, x0 = self._levels[-1], self._x0[-1]
        h = self._log_snr(start) - self._log_snr(sigma)  # negative step in log-SNR
        phi1 = torch.expm1(h)
        base = sigma / start * x - (1 - sigma) * phi1 * x0
        ratio, slope = torch.tensor(1.0, dtype=torch.float64), torch.zeros_like(x)
        if order == 2:
            ratio = (self._log_snr(self._levels[-2]) - self._log_snr(start)) / -h
            slope = (self._x0[-2] - x0) / ratio
        if newest is None:
            correction = 0.5 * slope
        elif order == 1:
            correction = 0.5 * (newest - x0)
        else:
            phi2 = phi1 / h - 1
            rows = torch.stack([torch.ones(2, dtype=torch.float64), torch.stack([ratio, torch.ones_like(ratio)])])
            weights = torch.linalg.solve(rows, torch.stack([phi2, 2 * (phi2 / h - 0.5)]) / phi1)
            correction = weights[0] * slope + weights[1] * (newest - x0)
        return base - (1 - sigma) * phi1 * correction

    def step(self, x: Tensor, flow: Tensor, t: float, t_next: float | None, fresh: Tensor | None) -> Tensor:
        # At sigma = 1 the signal is zero, so its logarithm would be infinite.
        sigma = torch.tensor(min(self.schedule.sigma(t), 1 - 1e-6), dtype=torch.float64)
        x0 = x.double() - sigma * flow.double()
        sample = self._update(self._last, sigma, self._order, x0) if self._x0 else x.double()
        self._x0, self._levels = [*self._x0[-1:], x0], [*self._levels[-1:], sigma]
        self._last, self._order = sample, min(2, len(self._x0))
        if t_next is None:
            return x0.to(x.dtype)
        level = torch.tensor(self.schedule.sigma(t_next), dtype=torch.float64)
        return self._update(sample, level, self._order, None).to(x.dtype)


SOLVERS: dict[str, type[Solver]] = {"renoise": Renoise, "euler": Euler, "unipc": UniPC}


def make_solver(name: str, schedule: Schedule) -> Solver:
    """A new solver for one chunk. ValueError for an unknown name."""
    if name not in SOLVERS:
        raise ValueError(f"solver: got {name!r}, expected one of {', '.join(SOLVERS)}")
    return SOLVERS[name](schedule)
