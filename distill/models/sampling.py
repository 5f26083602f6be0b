"""Sampling from the bidirectional teacher, and contact sheets of clips. Noise levels sigma lie in [0, 1]."""

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


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Warp noise levels towards noise: s sigma / (1 + (s - 1) sigma)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def noised(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Eq. 3 with one level per frame: clean and noise [B, C, F, h, w], sigma [B, F]."""
    level = sigma[:, None, :, None, None]
    return (1 - level) * clean + level * noise


def cat_text(*parts: TextKV) -> TextKV:
    """Join prepared text along the batch."""
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys, 1), torch.cat(values, 1)


def joint_flow(model: WanTransformer, latent: Tensor, sigma: Tensor, text: TextKV) -> Tensor:
    """Bidirectional flow of frames at positions 0 .. F - 1: latent [B, C, F, h, w], sigma [B, F] -> [B, C, F, h, w]."""
    _, _, frames, height, width = latent.shape
    _, ph, pw = model.config.patch_size
    tables = rope_tables(range(frames), height // ph, width // pw, model.config.attention_head_dim)
    cos, sin = (table.to(latent.device) for table in tables)
    return model(latent, sigma * 1000, text, cos, sin, dense_attention())


def guided_flow(
    model: WanTransformer, latent: Tensor, sigma: Tensor, text: TextKV, empty: TextKV, scale: float
) -> Tensor:
    """Classifier-free guidance: v_empty + scale (v_text - v_empty), in one call of twice the batch."""
    if scale == 1:
        return joint_flow(model, latent, sigma, text)
    both = joint_flow(model, torch.cat([latent, latent]), torch.cat([sigma, sigma]), cat_text(text, empty))
    v_text, v_empty = both.chunk(2)
    return v_empty + scale * (v_text - v_empty)


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
    return sample_path(model, text, empty, noise, (), steps=steps, scale=scale, shift=shift)[0]


@torch.no_grad()
def sample_path(
    model: WanTransformer,
    text: TextKV,
    empty: TextKV,
    noise: Tensor,
    levels: Sequence[float],
    *,
    steps: int,
    scale: float,
    shift: float,
) -> tuple[Tensor, list[Tensor]]:
    """`sample_joint`, and the latents on the way at some noise levels in (0, 1], from high to low.

    Levels between those of the steps are steps of their own.
    """
    sigmas = shifted(torch.linspace(1, 0, steps + 1), shift)
    kept = torch.tensor(levels, dtype=sigmas.dtype)
    if len(kept):
        sigmas = torch.cat([sigmas, kept]).unique().flip(0)
    latent, path = noise, []
    for now, then in pairwise(sigmas.to(noise.device)):
        if now.cpu() in kept:
            path.append(latent)
        sigma = now.expand(latent.shape[0], latent.shape[2])
        latent = latent + (then - now) * guided_flow(model, latent, sigma, text, empty, scale)
    return latent, path


def contact_sheet(videos: Iterable[Tensor], path: Path, every: Sequence[int] | int = 4, zoom: int = 3) -> None:
    """One row per clip, one column per shown frame; clips float [3, T, H, W] in [-1, 1]."""
    rows = []
    for video in videos:
        shown = range(0, video.shape[1], every) if isinstance(every, int) else every
        rows.append(torch.cat([F.pad(video[:, frame].cpu(), (1, 1, 1, 1), value=-0.3) for frame in shown], 2))
    sheet = ((torch.cat(rows, 1).clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(sheet)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(path)
