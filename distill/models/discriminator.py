"""The discriminator of adversarial self-distillation: a head on the critic's features, and its losses.

One learned token per chosen block attends to that block's features. A small network turns the tokens into one logit per
number of sampling steps. Only differences of two clips' logits count (relativistic pairing).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.models.critic import Critic
from distill.models.matching import through
from engine.config import TransformerConfig
from engine.model.layers import Attention, cross_attention, modulation_table


class Look(nn.Module):
    """One register token that attends to all features of a block."""

    def __init__(self, config: TransformerConfig, width: int) -> None:
        super().__init__()
        dim = config.dim
        self.token = modulation_table(1, dim)
        self.norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, config.num_attention_heads, config.eps)
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim))

    def forward(self, features: Tensor) -> Tensor:
        """[B, tokens, dim] -> [B, dim]"""
        own = self.attention
        query = own.norm_q(own.to_q(self.token)).unflatten(-1, (own.heads, -1))  # type: ignore[misc]
        key, value = own.key_value(self.norm(features))
        seen = cross_attention(query.expand(len(features), -1, -1, -1), key, value)
        token = self.token + own.output(seen)
        return (token + self.ffn(token)).flatten(1)


class Discriminator(nn.Module):
    """Logits, `numbers` of them, from the features after some blocks of a transformer (none named: the last two)."""

    def __init__(self, config: TransformerConfig, blocks: Sequence[int], numbers: int, width: int) -> None:
        super().__init__()
        layers = config.num_layers
        self.blocks = tuple(blocks) or tuple(range(max(0, layers - 2), layers))
        if self.blocks[-1] >= layers:
            raise ValueError(f"features: got block {self.blocks[-1]}, expected 0 to {layers - 1}")
        self.looks = nn.ModuleList(Look(config, width) for _ in self.blocks)
        dim = config.dim * len(self.blocks)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, numbers))

    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name."""
        return dict(self.named_parameters())

    def forward(self, critic: Critic, sigma: Tensor, text_emb: Tensor, number: int, *clips: Tensor) -> Tensor:
        """One logit for every sample of some clips: [clips, B], in one pass.

        clips [B, C, F, h, w] at the noise levels sigma [B, F], text_emb [B, rows, dim]; `number` chooses the logit.
        """
        many = len(clips)
        features = critic.features(torch.cat(clips), sigma.repeat(many, 1), text_emb.repeat(many, 1, 1), self.blocks)
        seen = torch.cat([look(one) for look, one in zip(self.looks, features, strict=True)], 1)
        return self.head(seen)[:, number].unflatten(0, (many, -1))


def pairing_loss(winner: Tensor, loser: Tensor) -> Tensor:
    """softplus(-(winner - loser)) of logits: ln 2 where they are equal, smaller where the winner's are larger."""
    return F.softplus(loser - winner).mean()


def adversarial_losses(
    logits: Callable[..., Tensor],
    blur: Callable[[Tensor], Tensor],
    clip: Tensor,
    better: Tensor,
    nudge: Tensor,
    r1: float,
    r2: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the discriminator and, where the student's clip has gradients, of the student; and their parts.

    logits(clip, ...) judges noised clips, blur(clip) noises one: both clips get the same noise at the same level. R1
    and R2 are finite differences: how far the logits of the better clips and of the student's move under a nudge.
    """
    own, other = blur(clip.detach()), blur(better.detach())
    flat = [own + nudge, other + nudge] if r1 or r2 else []
    ours, theirs, *near = logits(own, other, *flat)
    parts = {"discriminator": pairing_loss(theirs, ours), "gap": (theirs - ours).detach().mean()}
    loss = parts["discriminator"]
    if near:
        parts |= {"r1": (near[1] - theirs).square().mean(), "r2": (near[0] - ours).square().mean()}
        loss = loss + r1 * parts["r1"] + r2 * parts["r2"]
    if clip.requires_grad:
        parts["generator"] = through(lambda leaf: pairing_loss(logits(blur(leaf))[0], theirs.detach()), clip)
        loss = loss + parts["generator"]
    return loss, parts
