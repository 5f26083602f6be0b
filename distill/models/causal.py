"""A student of the Self-Forcing family, for comparison: one causal transformer over a window of clean frames.

Frame f sees itself and the `window - 1` clean frames before it; so does a clean frame. Positions grow without limit.
The engine streams this student like its causal presets and commits clean frames.
"""

import copy

import torch
from torch import Tensor

from distill.models.student import Adapted, add_lora, frame_attention, lora_of, rope_for
from engine.model.transformer import TextKV, WanTransformer
from engine.runtime.stages import TorchStages


def causal_visible(frames: int, window: int) -> list[list[int]]:
    """Who sees whom: clean frames 0 .. frames - 2, then noisy 0 .. frames - 1. `window` counts the frame itself."""
    context = frames - 1
    clean = [list(range(max(0, i - window + 1), i + 1)) for i in range(context)]
    noisy = [[*range(max(0, f - window + 1), f), context + f] for f in range(frames)]
    return clean + noisy


class CausalStudent(Adapted):
    """LoRA on one copy of a teacher."""

    def __init__(self, teacher: WanTransformer, rank: int = 128, window: int = 7, *, recompute: bool = False) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window: got {window}, expected at least 1 frame")
        self.window = window
        self.dit = add_lora(copy.deepcopy(teacher), lora_of(rank), recompute=recompute)
        self.stages = TorchStages({"dit": self.dit}, vae=None, text_encoder=None)

    def flow(self, context: Tensor, noisy: Tensor, sigma: Tensor, text: dict[str, TextKV]) -> Tensor:
        """The flow of every frame after its clean past; arguments as `Student.flow`."""
        frames = noisy.shape[2]
        return self._run(
            context, noisy, sigma, text, causal_visible(frames, self.window), [*range(frames - 1), *range(frames)]
        )

    def next_flow(self, context: Tensor, noisy: Tensor, sigma: Tensor, text: dict[str, TextKV]) -> Tensor:
        """The flow of the frame that follows context; arguments as `Student.next_flow`."""
        frames = context.shape[2] + 1
        visible = causal_visible(frames, self.window)[: frames - 1]
        last = [*range(max(0, frames - self.window), frames - 1), frames - 1]
        return self._run(context, noisy, sigma[:, None], text, [*visible, last], list(range(frames)))

    def _run(
        self,
        context: Tensor,
        noisy: Tensor,
        sigma: Tensor,
        text: dict[str, TextKV],
        visible: list[list[int]],
        positions: list[int],
    ) -> Tensor:
        past = context.shape[2]
        t = torch.cat([torch.zeros(len(sigma), past, device=sigma.device), sigma], 1) * 1000
        rope = rope_for(self.dit, positions, noisy)
        latent = torch.cat([context, noisy], 2)
        return self.dit(latent, t, text["dit"], *rope, frame_attention(visible))[:, :, past:]
