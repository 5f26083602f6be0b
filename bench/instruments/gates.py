"""The gate of the fast path: its flows chunk by chunk beside plain PyTorch's, on weights for which attention matters.

Every stream gets the same finished chunks, so an error does not feed the next one. There are more chunks than a ring
holds, so that rings wrap. The limits lie between an honest run and one with a fault.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.instruments.models import torch_parts
from bench.instruments.ways import stages_through
from engine.generators.base import Geometry
from engine.stream import Pipeline

ATTENTION_GAIN = 4.0  # of the random weights, see RandomSource
CHUNKS = 8  # at least
TIMESTEP = 750.0
ROWS = 512  # of the prompt's embedding, as Wan's prompts have
# precision -> largest rms error of a flow over the flow's rms. Measured on a processor, six layers of width 128:
# honest runs give 1.0e-2 in bf16, 3.0e-2 in fp8, 3.5e-2 with fp8 attention; planted faults give 9.0e-2 and more.
LIMITS = {"bf16": 2.5e-2, "fp8": 7e-2, "fp8-attention": 7e-2}


@dataclass(frozen=True)
class Gate:
    """errors: rms error over rms of each flow, two a chunk."""

    precision: str
    errors: list[float]
    limit: float

    @property
    def worst(self) -> float:
        return max(self.errors)

    @property
    def passed(self) -> bool:
        return all(error <= self.limit for error in self.errors)  # NaN never passes


def exact(pipeline: Pipeline) -> Pipeline:
    """The same weights in float32 through plain PyTorch; text encoder and VAE are left out."""
    parts = torch_parts(pipeline)
    models = {role: copy.deepcopy(model).float() for role, model in parts.models.items()}
    for model in models.values():
        model.fuse()  # again: what it made of the weights is not a module's tensor
    return replace(pipeline, stages=stages_through("plain", models), dtype=torch.float32, kv_dtype=None)


def gate(pipeline: Pipeline, truth: list[Tensor], precision: str, seed: int = 0) -> Gate:
    """Compare a pipeline's flows with those of `exact`."""
    pairs = zip(flows(pipeline, seed), truth, strict=True)
    errors = [float((flow - true).square().mean().sqrt() / true.square().mean().sqrt()) for flow, true in pairs]
    return Gate(precision, errors, LIMITS[precision])


@torch.inference_mode()
def flows(pipeline: Pipeline, seed: int = 0) -> list[Tensor]:
    """The flows of every chunk [1, C, F, h, w], before that chunk is committed; all on given latents.

    Two a chunk: the first call may take the context pass of the chunk before along, the second is alone.
    """
    preset, config, generator = pipeline.preset, pipeline.config, pipeline.generator
    geometry = Geometry.of(config, 1, pipeline.height // pipeline.spatial, pipeline.width // pipeline.spatial)
    count = max(CHUNKS, generator.steady(preset) + 2)
    random = torch.Generator().manual_seed(seed)
    shape = (1, geometry.channels, preset.chunk, geometry.height, geometry.width)

    def drawn(*shape: int) -> Tensor:  # rounded to bf16, so that the truth gets the same numbers
        return torch.randn(shape, generator=random).bfloat16().to(pipeline.device, pipeline.dtype)

    state = generator.open(geometry, pipeline.stages.prepare_text(drawn(1, ROWS, config.text_dim)))
    found = []
    for _ in range(count):
        noisy, clean = drawn(*shape), drawn(*shape)
        found += [generator.denoise(noisy, TIMESTEP, state).float() for _ in range(2)]
        generator.commit(clean, state)
    return found
