"""A student of the Self-Forcing family: one causal transformer over a window of finished chunks.

Frames of one chunk see each other, the attention sink and the newest frames before them: `window` frames in all. So do
finished chunks. Positions grow without limit. The engine streams this student like its causal presets.
"""

import copy

import torch
from torch import Tensor

from distill.models.student import Adapted, add_lora, frame_attention, lora_of, rope_for
from engine.model.transformer import TextKV, WanTransformer
from engine.runtime.stages import TorchStages


def ring_frames(end: int, window: int, attn_sink: int = 0) -> list[int]:
    """The frames in the engine's ring once frames 0 .. end - 1 are written: the attention sink, then the newest."""
    return [*range(min(attn_sink, end)), *range(max(attn_sink, end - (window - attn_sink)), end)]


def noisy_visible(frames: int, window: int, chunk: int = 1, attn_sink: int = 0) -> list[list[int]]:
    """Who sees whom, chunk by chunk, where finished chunks stay as they stand in the sequence."""
    return [ring_frames(end, window, attn_sink) for end in range(chunk, frames + 1, chunk)]


def causal_visible(frames: int, window: int, chunk: int = 1, attn_sink: int = 0) -> list[list[int]]:
    """Who sees whom, chunk by chunk: the finished chunks of frames 0 .. frames - chunk - 1, then all noisy ones."""
    context, every = frames - chunk, noisy_visible(frames, window, chunk, attn_sink)
    noisy = [[i if i < start * chunk else context + i for i in seen] for start, seen in enumerate(every)]
    return every[:-1] + noisy


class CausalStudent(Adapted):
    """LoRA on one copy of a teacher."""

    def __init__(
        self,
        teacher: WanTransformer,
        rank: int = 128,
        window: int = 7,
        chunk: int = 1,
        attn_sink: int = 0,
        *,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if chunk < 1 or window < attn_sink + chunk:
            least = attn_sink + max(chunk, 1)
            raise ValueError(f"window: got {window} with chunks of {chunk}, expected at least {least} frames")
        self.window, self.chunk, self.attn_sink = window, chunk, attn_sink
        self.lora = lora_of(rank)
        self.dit = add_lora(copy.deepcopy(teacher), self.lora, recompute=recompute)
        self.stages = TorchStages({"dit": self.dit}, vae=None, text_encoder=None)

    def flow(
        self,
        context: Tensor,
        noisy: Tensor,
        sigma: Tensor,
        text: dict[str, TextKV],
        context_sigma: Tensor | None = None,
    ) -> Tensor:
        """The flow of every chunk after its finished past; arguments as `Student.flow`.

        context holds the frames of all chunks but the last, clean or at levels context_sigma [B, F - chunk].
        """
        frames, past = noisy.shape[2], noisy.shape[2] - self.chunk
        if frames % self.chunk or context.shape[2] != past or sigma.shape != (len(noisy), frames):
            raise ValueError(
                f"got {context.shape[2]} context frames, {frames} noisy ones and sigma {tuple(sigma.shape)}, "
                f"expected chunks of {self.chunk}, all but the last as context, and a level for each frame"
            )
        visible = causal_visible(frames, self.window, self.chunk, self.attn_sink)
        positions = [*range(past), *range(frames)]
        return self._run(context, noisy, sigma, text, visible, positions, context_sigma)

    def next_flow(self, context: Tensor, noisy: Tensor, sigma: Tensor, text: dict[str, TextKV]) -> Tensor:
        """The flow of the chunk that follows context; arguments as `Student.next_flow`."""
        frames = context.shape[2] + self.chunk
        visible = noisy_visible(frames, self.window, self.chunk, self.attn_sink)
        levels = sigma[:, None].expand(-1, self.chunk)
        return self._run(context, noisy, levels, text, visible, list(range(frames)))

    def flow_on_noisy(self, noisy: Tensor, sigma: Tensor, text: dict[str, TextKV]) -> Tensor:
        """The flow of every chunk whose past are the noisy chunks before it; arguments as `Student.flow`."""
        frames = noisy.shape[2]
        visible = noisy_visible(frames, self.window, self.chunk, self.attn_sink)
        return self._run(noisy[:, :, :0], noisy, sigma, text, visible, list(range(frames)))

    def _run(
        self,
        context: Tensor,
        noisy: Tensor,
        sigma: Tensor,
        text: dict[str, TextKV],
        visible: list[list[int]],
        positions: list[int],
        context_sigma: Tensor | None = None,
    ) -> Tensor:
        past = context.shape[2]
        before = torch.zeros(len(sigma), past, device=sigma.device) if context_sigma is None else context_sigma
        t = torch.cat([before, sigma], 1) * 1000
        rope = rope_for(self.dit, positions, noisy)
        latent = torch.cat([context, noisy], 2)
        return self.dit(latent, t, text["dit"], *rope, frame_attention(visible, self.chunk))[:, :, past:]
