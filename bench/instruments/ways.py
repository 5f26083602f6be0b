"""The ways through the torch backend: plain PyTorch, the fused path, and that path in CUDA graphs.

The last two join a chunk's context pass with the next chunk's first step, as the engine does on a GPU.
Without a GPU `fused` runs the kernels' PyTorch definitions, and a stand-in captures graphs: like a graph, a replay
only sees its static tensors.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from engine.model.transformer import WanTransformer
from engine.model.vae import VAE
from engine.runtime.cuda_graphs import Capturer, GraphedStages
from engine.runtime.passes import Stages
from engine.runtime.stages import TorchStages

WAYS = ("plain", "fused", "graphs")


class StandIn:
    """Captures without a GPU: warms up twice, and a replay writes to the addresses of the capture's outputs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        for _ in range(2):
            run()
        outputs = run()

        def replay() -> None:
            again = run()
            if isinstance(outputs, Tensor):
                outputs.copy_(again)

        return outputs, replay

    def in_turn(self) -> AbstractContextManager[None]:
        return nullcontext()


def capturer_of(device: torch.device) -> Callable[[torch.device], Any]:
    return Capturer if device.type == "cuda" else StandIn


def stages_through(
    way: str, models: dict[str, WanTransformer], vae: VAE | None = None, encoder: nn.Module | None = None
) -> Stages:
    """Stages of these modules on one of WAYS; the modules are shared, not copied."""
    device = next(iter(models.values())).proj_out.weight.device
    stages = TorchStages(models, vae, encoder, eager=way == "plain", join_context=way != "plain")
    return GraphedStages(stages, capturer_of(device)) if way == "graphs" else stages
