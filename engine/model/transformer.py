"""The Wan2.1 text-to-video transformer: one module for the teacher, the ETM, the SDD and causal students.

They differ only in arguments: `attend` decides which keys a query sees, cos/sin hold the frames' positions, t holds one
timestep per frame, and `c_f` is the ETM's temporal feature.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn as nn
from torch import Tensor

from engine.config import LocalHeads, TransformerConfig
from engine.model.cache import Streaming
from engine.model.layers import (
    PROJECTIONS,
    Attend,
    Attention,
    Block,
    ConditionEmbedder,
    Middle,
    modulation_table,
    rms_unit,
    total,
)
from engine.model.quantized import QuantizedLinear
from kernels.norm_modulate import Hidden, norm_modulate

# Cross-attention K and V of every layer: one tensor [layers, B, rows, heads, head_dim] each, or one per layer.
TextKV = tuple[Sequence[Tensor] | Tensor, Sequence[Tensor] | Tensor]

# Parameters of a block's self-attention that hold heads -> the axis of the heads.
_HEADS_AXIS = {f"to_{x}.{part}": 0 for x in "qkv" for part in ("weight", "bias")}
_HEADS_AXIS |= {"norm_q.weight": 0, "norm_k.weight": 0, "to_out.0.weight": 1}


class WanTransformer(nn.Module):
    """The transformer, with the parameter names of diffusers' WanTransformer3DModel.

    `conditioned` adds `condition_proj` (W_c of the streaming decoder). It starts at zero, so that an untrained student
    equals its teacher.
    """

    def __init__(self, config: TransformerConfig, conditioned: bool = False) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, config.patch_size, config.patch_size)
        self.condition_embedder = ConditionEmbedder(dim, config.freq_dim, config.text_dim)
        self.blocks = nn.ModuleList(
            Block(dim, config.num_attention_heads, config.ffn_dim, config.eps, config.cross_attn_norm)
            for _ in range(config.num_layers)
        )
        self.norm_out = nn.LayerNorm(dim, config.eps, elementwise_affine=False)
        patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.proj_out = nn.Linear(dim, config.out_channels * patch)
        self.scale_shift_table = modulation_table(2, dim)
        self.condition_proj = nn.Linear(dim, dim, bias=False) if conditioned else None
        self.local_heads: Sequence[Sequence[int]] | None = None  # those of `order_heads`
        self._tables: Tensor | None = None  # the blocks' scale_shift_tables [layers, 1, 1, 6, dim], after `fuse`
        if self.condition_proj is not None:
            nn.init.zeros_(self.condition_proj.weight)

    def prepare_text(self, text_emb: Tensor) -> tuple[Tensor, Tensor]:
        """text_emb [B, rows, text_dim], zero-padded -> K and V, each [layers, B, rows, heads, head_dim]."""
        text = self.condition_embedder.text_embedder(text_emb)
        pairs = [cast(Block, block).attn2.key_value(text) for block in self.blocks]
        return torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])

    @torch.no_grad()
    def order_heads(self, local: LocalHeads | None) -> None:
        """Let the local heads of every layer stand after its others, so that both groups are slices of q, k and v.

        The function that the transformer computes stays the same, up to rounding. Call it once, before `fuse`; `write`
        still takes a parameter's value as it was.
        """
        if local is None:
            return
        self.local_heads = local.layers
        for name, parameter in self.named_parameters():
            if (value := self._ordered(name, parameter)) is not parameter:
                parameter.data = value

    def _ordered(self, name: str, value: Tensor) -> Tensor:
        """A parameter's value with its heads in the order of `order_heads`."""
        axis = _HEADS_AXIS.get(name.partition(".attn1.")[2])
        if self.local_heads is None or axis is None:
            return value
        few = self.local_heads[int(name.split(".")[1])]
        wide = [head for head in range(self.config.num_attention_heads) if head not in few]
        order = torch.tensor([*wide, *few], device=value.device)
        return value.unflatten(axis, (len(order), -1)).index_select(axis, order).flatten(axis, axis + 1)

    def fuse(self) -> None:
        """Fuse what inference can compute as one product or one sum. Call it when the weights are final."""
        blocks = [cast(Block, block) for block in self.blocks]
        for block in blocks:
            block.attn1.fuse()
        self._tables = torch.stack([block.scale_shift_table.detach() for block in blocks])[:, None]

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        """Overwrite a parameter in place, wherever the forward pass reads it: fused, or quantised again.

        `name` is its name before `fuse` and `quantized`. Captured graphs, which hold addresses, read the new value.
        """
        value = self._ordered(name, value)
        path, _, leaf = name.rpartition(".")
        owner_path, _, own = path.rpartition(".")
        owner = self.get_submodule(owner_path)
        if isinstance(owner, Attention) and isinstance(owner.joint, QuantizedLinear) and own in PROJECTIONS:
            rows = len(value)
            start = PROJECTIONS.index(own) * rows
            owner.joint.write(leaf, value, slice(start, start + rows))
            return
        module = self.get_submodule(path)
        if isinstance(module, QuantizedLinear):
            module.write(leaf, value)
            return
        self.get_parameter(name).copy_(value)
        if self._tables is not None and isinstance(module, Block) and leaf == "scale_shift_table":
            self._tables[int(own), 0].copy_(value)

    def encode(
        self, latent: Tensor, t: Tensor, text_kv: TextKV, cos: Tensor, sin: Tensor, attend: Attend,
        c_f: Tensor | None = None, middle: Middle | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Run the blocks.

        latent [B, C, F, h, w]; t [B] or [B, F] in [0, 1000]; cos, sin [tokens, head_dim / 2] with
        tokens = F * (h / ph) * (w / pw); c_f [B, tokens, dim] (zero where None); middle: the blocks whose residual is
        written, or added in their place.
        Returns the last hidden state before norm_out [B, tokens, dim] and the time embedding [B, F, dim].
        """
        x, embedding, modulation = self.embed(latent, t, c_f)
        # One sum for all blocks where they stream; elsewhere each adds its own table, which may be sharded or traced.
        tables = self._tables if isinstance(attend, Streaming) else None
        added = None if tables is None else tables + modulation  # [layers, B, F, 6, dim]

        def through(hidden: Hidden, layers: range) -> Tensor:
            for layer in layers:
                own = modulation if added is None else added[layer]
                text = text_kv[0][layer], text_kv[1][layer]
                hidden = self.blocks[layer](hidden, own, *text, cos, sin, attend, layer, added is not None)
                if added is None:  # a block that is checkpointed or sharded takes tensors
                    hidden = total(hidden)
            return total(hidden)

        layers = range(len(self.blocks))
        if middle is None:
            return through(x, layers), embedding
        end = len(layers) - middle.last
        x = through(x, layers[: middle.first])
        if middle.skipped:
            x = x + middle.residual
        else:
            own = slice(x.shape[1] - middle.residual.shape[1], None)  # the tokens of a context come first
            middle.residual.copy_(x[:, own])
            x = through(x, layers[middle.first : end])
            torch.sub(x[:, own], middle.residual, out=middle.residual)
        return through(x, layers[end:]), embedding

    def embed(self, latent: Tensor, t: Tensor, c_f: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The blocks' inputs: hidden state [B, tokens, dim], time embedding [B, F, dim], modulation [B, F, 6, dim]."""
        if t.ndim == 1:
            t = t[:, None].expand(-1, latent.shape[2] // self.config.patch_size[0])
        hidden = self.patch_embedding(latent).flatten(2).transpose(1, 2)
        if c_f is not None:
            if self.condition_proj is None:
                raise ValueError("transformer: got c_f, expected none: this one has no condition_proj")
            hidden = hidden + self.condition_proj(rms_unit(c_f))
        return hidden, *self.condition_embedder.time(t)

    def forward(
        self, latent: Tensor, t: Tensor, text_kv: TextKV, cos: Tensor, sin: Tensor, attend: Attend,
        c_f: Tensor | None = None, middle: Middle | None = None,
    ) -> Tensor:  # fmt: skip
        """Arguments as `encode`; returns the flow (noise - x), [B, C, F, h, w]."""
        hidden, embedding = self.encode(latent, t, text_kv, cos, sin, attend, c_f, middle)
        return self.head(hidden, embedding, latent)

    def head(self, hidden: Tensor, embedding: Tensor, latent: Tensor) -> Tensor:
        """The flow, shaped as `latent`, from the last hidden state and the time embedding."""
        shift, scale = (self.scale_shift_table[:, None] + embedding[:, :, None]).unsqueeze(3).unbind(2)
        patches = self.proj_out(norm_modulate(hidden, shift, scale, self.norm_out.eps))
        pt, ph, pw = self.config.patch_size
        b, _, f, h, w = latent.shape
        patches = patches.reshape(b, f // pt, h // ph, w // pw, pt, ph, pw, -1)
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(b, -1, f, h, w)
