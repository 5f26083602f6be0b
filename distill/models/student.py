"""The student of the paper: ETM and SDD, both LoRA on one frozen teacher, and its differentiable passes.

`Student.flow` computes all frames of a clip at once, under masks that equal the streaming path. The ETM looks back
`window` frames (w of Eq. 1). A noisy frame sees itself, the clean chunk 0 and the clean frame before it. A clean frame
i >= 1 takes the place of the last one: it sees chunk 0 and itself. Chunks are one latent frame.
`Student.next_flow` computes the one frame that follows a past. Noise levels sigma lie in [0, 1].
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor, nn

from engine.model.cache import RingCache
from engine.model.layers import Attend, total
from engine.model.rope import rope_tables
from engine.model.transformer import TextKV, WanTransformer
from engine.runtime.passes import Pass, Stages
from engine.runtime.stages import TorchStages

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


def frame_attention(visible: Sequence[Sequence[int]], chunk: int = 1) -> Attend:
    """Self-attention over whole frames: the frames of chunk i of the sequence see the frames visible[i].

    Chunks that see equally many frames share one attention call, so that nothing is masked or padded.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for number, seen in enumerate(visible):
        groups[len(seen)].append(number)
    order = torch.tensor([number for chunks in groups.values() for number in chunks]).argsort()

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.unflatten(1, (len(visible), -1))  # [B, chunks, chunk * n, heads, head_dim]
        k, v = (x.unflatten(1, (len(visible) * chunk, -1)) for x in (k, v))  # [B, F, n, heads, head_dim]
        parts = []
        for chunks in groups.values():
            index = torch.tensor([visible[number] for number in chunks])
            query = q[:, chunks].flatten(0, 1).transpose(1, 2)
            key, value = (x[:, index].flatten(2, 3).flatten(0, 1).transpose(1, 2) for x in (k, v))
            out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
            parts.append(out.unflatten(0, (q.shape[0], len(chunks))))
        return torch.cat(parts, 1)[:, order].flatten(1, 2)

    return attend


def etm_visible(frames: int, window: int) -> list[list[int]]:
    """Eq. 1 with chunks of one frame: frame i sees i - window .. i."""
    return [list(range(max(0, i - window), i + 1)) for i in range(frames)]


def sdd_visible(frames: int) -> list[list[int]]:
    """Who sees whom in the SDD's sequence: clean frames 0 .. frames - 2, then noisy frames 0 .. frames - 1."""
    context = frames - 1
    clean = [[0] if i == 0 else [0, i] for i in range(context)]
    noisy = [[*sorted({0, f - 1} if f else set()), context + f] for f in range(frames)]
    return clean + noisy


def sdd_positions(frames: int, max_position: int) -> list[int]:
    """Temporal positions of that sequence: a noisy frame at min(index, p_max), the last clean one just before it."""
    clean = [min(i, max_position - 1) for i in range(frames - 1)]
    return clean + [min(f, max_position) for f in range(frames)]


def rope_for(model: WanTransformer, positions: Sequence[int], latent: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for frames at temporal positions, for the size of a latent and on its device."""
    _, ph, pw = model.config.patch_size
    height, width = latent.shape[-2] // ph, latent.shape[-1] // pw
    cos, sin = rope_tables(positions, height, width, model.config.attention_head_dim)
    return cos.to(latent.device), sin.to(latent.device)


def checkpointed(model: WanTransformer) -> WanTransformer:
    """Recompute every block's activations in the backward pass instead of keeping them."""
    for block in model.blocks:
        block.forward = partial(_recomputed, block.forward)  # type: ignore[method-assign]
    return model


def _recomputed(forward: Callable[..., Any], *arguments: Any) -> Tensor:
    def whole() -> Tensor:
        return total(forward(*arguments))  # added up inside: outside, its two addends would be kept

    if not torch.is_grad_enabled():
        return whole()
    return torch.utils.checkpoint.checkpoint(whole, use_reentrant=False)


def add_lora(model: WanTransformer, lora: LoraConfig, *, recompute: bool = False) -> WanTransformer:
    """Freeze a model and put an adapter on it. The adapter is float32, whatever the model is."""
    model.requires_grad_(False)
    inject_adapter_in_model(lora, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return checkpointed(model) if recompute else model


def lora_of(rank: int) -> LoraConfig:
    """LoRA of a rank on every Linear of the blocks."""
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS), init_lora_weights=True)


@contextmanager
def passes_run_by(stages: Stages, run: Callable[[Pass, RingCache, Any], Tensor]) -> Iterator[None]:
    """Within the block the stages run their passes by `run`."""
    plain = stages.run
    stages.run = run  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        stages.run = plain  # type: ignore[method-assign]


class Adapted(nn.Module):
    """A student: its trained parameters, and the stages by which the engine streams it."""

    stages: TorchStages
    lora: LoraConfig
    chunk = 1  # latent frames that are denoised together

    def forward(self, context: Tensor, noisy: Tensor, sigma: Tensor, text_emb: Tensor) -> Tensor:
        """`flow` from text_emb [B, rows, text_dim]: a whole function of the trained weights."""
        return self.flow(context, noisy, sigma, self.stages.prepare_text(text_emb))

    def flow(self, context: Tensor, noisy: Tensor, sigma: Tensor, text: dict[str, TextKV]) -> Tensor:
        """The flow of every frame after its clean past, as `Student.flow` states it."""
        raise NotImplementedError

    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_trained(self, state: dict[str, Tensor]) -> None:
        """Load trained parameters: all of them, and no others."""
        own = self.trained()
        if state.keys() != own.keys():
            raise ValueError(f"student: got {len(state)} trained tensors, expected {len(own)} (rank or layout differ)")
        for name, value in state.items():
            own[name].copy_(value)

    @contextmanager
    def guided(self, scale: float) -> Iterator[None]:
        """Within this context a stream of [prompts, empty prompts] has the flow of classifier-free guidance.

        Both halves of the batch get the same flow, so that they stay one video. The caller gives them the same noise.
        """
        plain = self.stages.run

        def run(step: Pass, cache: RingCache, text_kv: Any) -> Tensor:
            result = plain(step, cache, text_kv)
            if not step.kind.timed:
                return result
            v_text, v_empty = result.chunk(2)
            return (v_empty + scale * (v_text - v_empty)).repeat(2, 1, 1, 1, 1)

        with passes_run_by(self.stages, run):
            yield


def adapter_of(model: nn.Module) -> dict[str, Tensor]:
    """LoRA tensors of one of a student's models, with the keys of PEFT's files."""
    return {f"base_model.model.{key}": value for key, value in get_peft_model_state_dict(model).items()}


class Student(Adapted):
    """SDD and ETM as LoRA on copies of a teacher. With fresh adapters both compute what the teacher computes.

    Without `etm` the student never uses the temporal feature (W_c stays zero), and the ETM is not trained. Twice the
    rank then keeps the number of trained parameters nearly equal.
    """

    def __init__(
        self,
        teacher: WanTransformer,
        rank: int = 64,
        window: int = 3,
        max_position: int = 4,
        *,
        etm: bool = True,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if max_position < 2:
            raise ValueError(f"max_position: got {max_position}, expected at least 2")
        self.window, self.max_position, self.uses_etm = window, max_position, etm
        self.lora = lora_of(rank)
        self.sdd = WanTransformer(teacher.config, conditioned=True).to(teacher.proj_out.weight)
        self.sdd.load_state_dict(teacher.state_dict(), strict=False)
        self.etm = copy.deepcopy(teacher)
        for model in (self.sdd, self.etm):
            add_lora(model, self.lora, recompute=recompute)
        self.sdd.condition_proj.float().requires_grad_(etm)
        if not etm:
            self.etm.requires_grad_(False)
        self.stages = TorchStages({"sdd": self.sdd, "etm": self.etm}, vae=None, text_encoder=None)

    def c_f(self, context: Tensor, text: dict[str, TextKV]) -> Tensor:
        """Eq. 2 for all frames at once: clean context [B, C, K, h, w] -> c_0 .. c_K, [B, (K + 1) * n, dim]; c_0 = 0."""
        batch, _, frames, _, _ = context.shape
        attend = frame_attention(etm_visible(frames, self.window))
        clean = torch.zeros(batch, frames, device=context.device)
        hidden, _ = self.etm.encode(context, clean, text["etm"], *rope_for(self.etm, range(frames), context), attend)
        first = torch.zeros_like(hidden[:, : hidden.shape[1] // frames])
        return torch.cat([first, hidden], 1)

    def flow(self, context: Tensor, noisy: Tensor, sigma: Tensor, text: dict[str, TextKV]) -> Tensor:
        """Eq. 4 for every frame after its clean past; `text` comes from `stages.prepare_text`.

        context [B, C, F - 1, h, w] holds clean frames 0 .. F - 2, noisy [B, C, F, h, w] frames 0 .. F - 1 at noise
        levels sigma [B, F]. Returns the flow of every noisy frame, [B, C, F, h, w].
        """
        batch, _, frames, _, _ = noisy.shape
        if context.shape[2] != frames - 1 or sigma.shape != (batch, frames):
            raise ValueError(
                f"got {context.shape[2]} context frames and sigma {tuple(sigma.shape)}, "
                f"expected {frames - 1} and {(batch, frames)}"
            )
        c_f = None
        if frames > 1 and self.uses_etm:
            own = self.c_f(context, text)  # of the noisy frames; the clean ones have none
            c_f = torch.cat([torch.zeros_like(own[:, : own.shape[1] // frames * (frames - 1)]), own], 1)
        t = torch.cat([torch.zeros(batch, frames - 1, device=sigma.device), sigma], 1) * 1000
        rope = rope_for(self.sdd, sdd_positions(frames, self.max_position), noisy)
        attend = frame_attention(sdd_visible(frames))
        latent = torch.cat([context, noisy], 2)
        return self.sdd(latent, t, text["sdd"], *rope, attend, c_f)[:, :, frames - 1 :]

    def next_flow(self, context: Tensor, noisy: Tensor, sigma: Tensor, text: dict[str, TextKV]) -> Tensor:
        """Eq. 4 for the frame that follows context [B, C, K, h, w]: noisy [B, C, 1, h, w], sigma [B] -> flow.

        Differentiable through the SDD, its context and the ETM, and equal to the flow of the stream.
        """
        batch, _, frames, _, _ = context.shape
        positions = sdd_positions(frames + 1, self.max_position)
        kept = sorted({0, frames - 1} if frames else set())  # the context frames that the SDD sees
        c_f = None
        if frames and self.uses_etm:
            every = self.c_f(context, text)
            own = every[:, every.shape[1] // (frames + 1) * frames :]  # of the noisy frame
            c_f = torch.cat([torch.zeros_like(own)] * len(kept) + [own], 1)
        t = torch.cat([torch.zeros(batch, len(kept), device=sigma.device), sigma[:, None]], 1) * 1000
        rope = rope_for(self.sdd, [positions[i] for i in kept] + positions[-1:], noisy)
        attend = frame_attention([list(range(i + 1)) for i in range(len(kept) + 1)])
        latent = torch.cat([context[:, :, kept], noisy], 2)
        return self.sdd(latent, t, text["sdd"], *rope, attend, c_f)[:, :, -1:]
