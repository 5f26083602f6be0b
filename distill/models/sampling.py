"""Sampling from the bidirectional teacher, and pictures of what came out."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from engine.model.layers import dense_attention
from engine.model.rope import rope_tables
from engine.model.transformer import TextKV, WanTransformer


def shifted(t: Tensor, shift: float) -> Tensor:
    """Warp times in [0, 1] towards noise: s t / (1 + (s - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def noised(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Eq. 3 with a level a frame: clean and noise [B, C, F, h, w], t [B, F]."""
    level = t[:, None, :, None, None]
    return (1 - level) * clean + level * noise


def cat_text(*parts: TextKV) -> TextKV:
    """Join prepared text along the batch."""
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys, 1), torch.cat(values, 1)


def joint_flow(model: WanTransformer, latent: Tensor, t: Tensor, text: TextKV) -> Tensor:
    """Bidirectional flow: latent [B, C, F, h, w], t [B, F] in [0, 1] -> [B, C, F, h, w]; frames stand at 0..F-1."""
    _, _, frames, height, width = latent.shape
    _, ph, pw = model.config.patch_size
    tables = rope_tables(range(frames), height // ph, width // pw, model.config.attention_head_dim)
    cos, sin = (table.to(latent.device) for table in tables)
    return model(latent, t * 1000, text, cos, sin, dense_attention())


def guided_flow(model: WanTransformer, latent: Tensor, t: Tensor, text: TextKV, empty: TextKV, scale: float) -> Tensor:
    """Classifier-free guidance: v_u + scale (v_c - v_u), in one call of twice the batch."""
    if scale == 1:
        return joint_flow(model, latent, t, text)
    both = joint_flow(model, torch.cat([latent, latent]), torch.cat([t, t]), cat_text(text, empty))
    given, free = both.chunk(2)
    return free + scale * (given - free)


@torch.no_grad()
def sample_joint(
    model: WanTransformer,
    text: TextKV,
    empty: TextKV,
    noise: Tensor,
    *,
    steps: int = 20,
    scale: float = 2.0,
    shift: float = 3.0,
) -> Tensor:
    """Denoise whole clips at once with Euler steps: noise [B, C, F, h, w] -> latent."""
    times = shifted(torch.linspace(1, 0, steps + 1), shift).to(noise.device)
    latent = noise
    for now, then in pairwise(times):
        t = now.expand(latent.shape[0], latent.shape[2])
        latent = latent + (then - now) * guided_flow(model, latent, t, text, empty, scale)
    return latent


def contact_sheet(videos: Iterable[Tensor], path: Path, every: Sequence[int] | int = 4, zoom: int = 3) -> None:
    """One row a clip, one column a shown frame; clips float [3, T, H, W] in [-1, 1]."""
    rows = []
    for video in videos:
        shown = range(0, video.shape[1], every) if isinstance(every, int) else every
        rows.append(torch.cat([F.pad(video[:, t].cpu(), (1, 1, 1, 1), value=-0.3) for t in shown], 2))
    sheet = ((torch.cat(rows, 1).clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(sheet)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(path)
