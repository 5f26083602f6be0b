"""Generators of the next chunk: one file per family, and their registry."""

import torch

from engine.config import Preset, TransformerConfig
from engine.generators.base import Generator
from engine.generators.causal import CausalGenerator
from engine.generators.greedy import GreedyGenerator
from engine.runtime.passes import Stages

FAMILIES: dict[str, type[Generator]] = {"greedy": GreedyGenerator, "causal": CausalGenerator}


def family_of(preset: Preset) -> type[Generator]:
    """The family of a preset. ValueError if unknown."""
    preset.expect("family", preset.family in FAMILIES, "one of " + ", ".join(FAMILIES))
    return FAMILIES[preset.family]


def make_generator(
    stages: Stages, config: TransformerConfig, preset: Preset, dtype: torch.dtype, device: torch.device
) -> Generator:
    """The generator of a preset's family; dtype is that of cached keys and values. ValueError for an invalid preset."""
    return family_of(preset)(stages, config, preset, dtype, device)
