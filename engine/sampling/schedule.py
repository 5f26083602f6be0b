"""Noise schedules. A schedule is data: one list of timesteps for chunk 0, chunk 1, ..., and the rest."""

import torch

from engine.config import Preset

GRID = 1000  # training timesteps
_ROUNDING = 1e-6  # by which a noise level may exceed a bound: the grid is float32


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
        self._short = set(preset.reuse.steps) if preset.reuse is not None else set[int]()
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

    def steps(self, chunk: int, strength: float = 1.0, level: float | None = None) -> list[tuple[float, float | None]]:
        """(t, next t) of every denoising step of a chunk; the last next t is None.

        strength  below 1: only the steps at noise levels (sigma) up to it. Not below `last_level`
        level     the first of these is moved down to the grid point nearest to this noise level
        """
        ts = self._chunks[min(chunk, len(self._chunks) - 1)]
        if strength < 1:
            ts = [t for t in ts if self.sigma(t) <= strength + _ROUNDING]
        if level is not None:
            start = float(self.timesteps[int((self.sigmas.double() - level).abs().argmin())])
            ts = [start, *(t for t in ts[1:] if t < start)]
        return list(zip(ts, [*ts[1:], None], strict=True))

    def is_short(self, chunk: int, t: float) -> bool:
        """Whether the preset's `reuse` names the step of a chunk at this timestep."""
        if not self._short:
            return False
        ts = self._chunks[min(chunk, len(self._chunks) - 1)]
        return t in ts and ts.index(t) + 1 in self._short

    @property
    def rows(self) -> int:
        """Chunks from which on the steps stay the same."""
        return len(self._chunks)

    @property
    def last_level(self) -> float:
        """The largest noise level of any chunk's last step."""
        return max(self.sigma(ts[-1]) for ts in self._chunks) - _ROUNDING

    def level(self, chunk: int, strength: float) -> float:
        """The noise level that a chunk begins at; 1 for the strength 1."""
        return self.sigma(self.steps(chunk, strength)[0][0]) if strength < 1 else 1.0
