"""Solvers: from noise to a clean latent, step by step. A solver is a class here and a row of SOLVERS."""

import math
from abc import ABC, abstractmethod

from torch import Tensor

from engine.sampling.schedule import Schedule
from kernels.solver_step import solver_step
from kernels.unipc_step import Past, Update, unipc_step


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
        self._past: Past | None = None
        self._levels: list[float] = []  # sigmas of the last two steps, newest last
        self._order = 0  # order of the last predictor

    @staticmethod
    def _log_snr(sigma: float) -> float:
        return math.log1p(-sigma) - math.log(sigma)

    def _update(self, sigma: float, order: int, corrects: bool) -> Update:
        """To noise level sigma from the last step's: a predictor, or the corrector that knows the prediction there."""
        start = self._levels[-1]
        h = self._log_snr(start) - self._log_snr(sigma)  # negative step in log-SNR
        phi1 = math.expm1(h)
        kept, fresh = sigma / start, (1 - sigma) * phi1
        if order == 1:
            return Update(kept, fresh, by_newest=0.5 if corrects else 0.0)
        ratio = (self._log_snr(self._levels[-2]) - self._log_snr(start)) / -h
        if not corrects:
            return Update(kept, fresh, ratio, 0.5)
        phi2 = phi1 / h - 1
        return Update(kept, fresh, ratio, *_weights(ratio, phi2 / phi1, 2 * (phi2 / h - 0.5) / phi1))

    def step(self, x: Tensor, flow: Tensor, t: float, t_next: float | None, fresh: Tensor | None) -> Tensor:
        # At sigma = 1 the signal is zero, so its logarithm would be infinite.
        sigma = min(self.schedule.sigma(t), 1 - 1e-6)
        corrector = self._update(sigma, self._order, corrects=True) if self._levels else None
        self._levels = [*self._levels[-1:], sigma]
        self._order = len(self._levels)
        predictor = None if t_next is None else self._update(self.schedule.sigma(t_next), self._order, corrects=False)
        x, self._past = unipc_step(x, flow, self._past, sigma, corrector, predictor)
        return x


def _weights(ratio: float, a: float, b: float) -> tuple[float, float]:
    """Solve [[1, 1], [ratio, 1]] w = (a, b), by elimination with the larger pivot, as LAPACK does."""
    if abs(ratio) > 1:
        factor = 1 / ratio
        second = (a - factor * b) / (1 - factor)
        return (b - second) / ratio, second
    second = (b - ratio * a) / (1 - ratio)
    return a - second, second


SOLVERS: dict[str, type[Solver]] = {"renoise": Renoise, "euler": Euler, "unipc": UniPC}


def make_solver(name: str, schedule: Schedule) -> Solver:
    """A new solver for one chunk. ValueError for an unknown name."""
    if name not in SOLVERS:
        raise ValueError(f"solver: got {name!r}, expected one of {', '.join(SOLVERS)}")
    return SOLVERS[name](schedule)
