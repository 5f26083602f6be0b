"""What chunks are made with, beside the prompt and the weights: seed, denoising steps and window."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import Preset
from engine.generators.source import Source
from engine.model.cache import FP8
from engine.presets import override
from engine.runtime.streams import Steps
from engine.sampling.noise import DrawnAhead, NoiseSource, PhiloxNoise
from engine.sampling.schedule import Schedule
from engine.shared import Shared


@dataclass(frozen=True)
class Settings:
    """All that `change` may change of the next chunks, as one value that is replaced as a whole."""

    preset: Preset  # of which steps and window count
    noise: NoiseSource
    schedule: Schedule
    source: Source | None = None  # that the video follows

    def changed(self, pipeline: Shared, seed: int | None, steps: Steps | None, window: int | None) -> Settings:
        """The same with what is not None. ValueError (got and expected) for what a stream of the pipeline refuses."""
        asked = {name: value for name, value in (("steps", steps), ("window", window)) if value is not None}
        preset = override(self.preset, asked)
        _check_window(preset, pipeline)
        noise = self.noise if seed is None else self._noise_of(seed, pipeline)
        schedule = self.schedule if steps is None else Schedule(preset)
        if self.source is not None:
            strength, last = self.source.strength, schedule.last_level
            if strength < last:
                raise ValueError(f"steps: got a last one at the noise level {last:.3g}, expected it up to the source's "
                                 f"strength {strength:g}")  # fmt: skip
            self.source.check(schedule)
        return Settings(preset, noise, schedule, self.source)

    def _noise_of(self, seed: int, pipeline: Shared) -> NoiseSource:
        if type(seed) is not int:
            raise ValueError(f"seed: got {seed!r}, expected 0 to 2^64 - 1")
        if not isinstance(self.noise, PhiloxNoise | DrawnAhead):
            raise ValueError(f"seed: got {seed}, expected none: the stream was opened with a source of noise")
        noise = PhiloxNoise(seed)
        return DrawnAhead(noise, pipeline.worker) if isinstance(self.noise, DrawnAhead) else noise


def _check_window(preset: Preset, pipeline: Shared) -> None:
    """ValueError for a window that the caches have no room for, or that splits chunks where the backend cannot."""
    window, most = preset.window, pipeline.preset.window
    if window > most:
        raise ValueError(f"window: got {window}, expected at most {most}, with which the stream was opened")
    whole = pipeline.stages.capabilities.whole_chunks or pipeline.kv_dtype == FP8
    if whole and window != most and (window - preset.attn_sink) % preset.chunk:
        expected = f"whole chunks of {preset.chunk} beside the attention sink"
        raise ValueError(f"window: got {window} on {pipeline.stages.name}, expected {expected}")
