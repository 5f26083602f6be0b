"""Noise schedules. A schedule is data: one list of timesteps for chunk 0, chunk 1, ..., and the rest."""

import torch

from engine.config import Preset

GRID = 1000  # training timesteps


class Schedule:
    """The flow-matching grid of Wan: sigma = shift s / (1 + (shift - 1) s), t = 1000 sigma, s from 1 to 1/1000.

    The grid is float32, as in the public code. So warped timesteps equal those of published students' training
    (750 -> 937.5, 500 -> 833.3333 at shift 5).
    """

    def __init__(self, preset: Preset) -> None:
        s = torch.linspace(1.0, 0.0, GRID + 1)[:-1]
        self.sigmas = preset.shift * s / (1 + (preset.shift - 1) * s)
        self.timesteps = self.sigmas * GRID
        self._chunks = [self._resolve(steps, preset) for steps in preset.steps]
        # The reference compares float64 timesteps. Tabulate all steps here, so that the frame loop does not search.
        self._sigma_of = {t: self._nearest(t) for steps in self._chunks for t in steps}

    def _resolve(self, steps: tuple[float, ...], preset: Preset) -> list[float]:
        used = steps[: preset.stop_after] if preset.stop_after else steps
        if not preset.warped:
            return [float(torch.tensor(step, dtype=torch.float32)) for step in used]
        return [float(self.timesteps[GRID - int(step)]) for step in used]

    def _nearest(self, t: float) -> float:
        index = (self.timesteps.double() - t).abs().argmin()
        return float(self.sigmas[index])

    def sigma(self, t: float | None) -> float:
        """sigma in [0, 1] of the grid point nearest to t in [0, 1000]; exactly 0 for None, the end of the chunk."""
        if t is None:
            return 0.0
        return self._sigma_of[t] if t in self._sigma_of else self._nearest(t)

    def steps(self, chunk: int) -> list[tuple[float, float | None]]:
        """(t, next t) of every denoising step of a chunk; the last next t is None."""
        ts = self._chunks[min(chunk, len(self._chunks) - 1)]
        return list(zip(ts, [*ts[1:], None], strict=True))
