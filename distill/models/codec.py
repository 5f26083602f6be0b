"""The sprites VAE: a stock diffusers AutoencoderKLWan, small, with an exact parallel path for training.

The stock encode and decode walk through time with caches. Without caches every layer sees the whole clip at once.
That is faster and gives the same numbers if the two temporal resamplers treat the first frame as the cached path does
(`uncached`).
"""

import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample, WanResidualBlock
from torch import Tensor, nn

LATENT_CHANNELS = 8


def build_vae() -> AutoencoderKLWan:
    """2.5 M parameters, 4x in time and 4x in space: [3, 1 + 4k, 32, 32] <-> [8, 1 + k, 8, 8]."""
    return AutoencoderKLWan(
        base_dim=32,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )


@torch.no_grad()
def initialise(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Start near a per-frame autoencoder that copies time. From the default start it learns only the background."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            frames, height, width = module.kernel_size
            causal = frames == 3 and height == 3
            fan_in = module.in_channels * height * width * (1 if causal else frames)
            nn.init.normal_(module.weight, std=fan_in**-0.5)
            nn.init.zeros_(module.bias)
            if causal:
                module.weight[:, :, :-1] *= 0.1  # mostly the newest frame
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=(module.in_channels * module.kernel_size[0] ** 2) ** -0.5)
            nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, WanResample) and module.mode in ("downsample3d", "upsample3d"):
            weight = module.time_conv.weight
            channels = weight.shape[1]
            copy = torch.eye(channels)[..., None, None]
            weight.mul_(0.05)
            if module.mode == "downsample3d":
                weight[:, :, 1] += 0.5 * copy
                weight[:, :, 2] += 0.5 * copy
            else:
                weight[:channels, :, 2] += copy
                weight[channels:, :, 2] += copy
    vae.quant_conv.weight[LATENT_CHANNELS:] *= 0.1
    vae.quant_conv.bias[LATENT_CHANNELS:] = -4.0
    return vae


def _resample(self: WanResample, x: Tensor, feat_cache: None = None, feat_idx: None = None) -> Tensor:
    """WanResample over a whole clip [B, C, T, H, W]: the first frame is never mixed with others in time."""
    batch, channels, frames, height, width = x.shape
    if self.mode == "upsample3d" and frames > 1:
        pairs = self.time_conv(x[:, :, 1:]).view(batch, 2, channels, frames - 1, height, width)
        x = torch.cat([x[:, :, :1], torch.stack(pairs.unbind(1), 3).flatten(2, 3)], 2)
    flat = self.resample(x.transpose(1, 2).flatten(0, 1))
    x = flat.unflatten(0, (batch, -1)).transpose(1, 2)
    if self.mode == "downsample3d" and frames > 1:
        x = torch.cat([x[:, :, :1], self.time_conv(x)], 2)
    return x


def _convolve(self: WanCausalConv3d, x: Tensor, cache_x: None = None) -> Tensor:
    """WanCausalConv3d, as a 2-D convolution where time does not matter (one frame, or one tap in time)."""
    taps, height, width = self.kernel_size
    batch, _, frames, _, _ = x.shape
    padding = (height // 2, width // 2)
    if frames == 1 and self.stride[0] == 1:  # all taps but the last see zero padding
        return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=padding)[:, :, None]
    if taps == 1 and self.stride[0] == 1:
        flat = F.conv2d(x.transpose(1, 2).flatten(0, 1), self.weight[:, :, 0], self.bias, padding=padding)
        return flat.unflatten(0, (batch, frames)).transpose(1, 2)
    return type(self).forward(self, x)


@contextmanager
def uncached(vae: AutoencoderKLWan) -> Iterator[None]:
    """Within this context the caller may run the encoder and the decoder on whole clips."""
    replaced = {WanResample: _resample, WanCausalConv3d: _convolve}
    changed = [m for m in vae.modules() if type(m) in replaced]
    for module in changed:
        module.forward = types.MethodType(replaced[type(module)], module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def encode_moments(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Video [B, 3, 1 + 4k, H, W] -> mean and log-variance [B, 2 * 8, 1 + k, H/4, W/4]."""
    with uncached(vae):
        return vae.quant_conv(vae.encoder(video))


def decode_raw(vae: AutoencoderKLWan, latent: Tensor) -> Tensor:
    """The VAE's own latent (not normalised) [B, 8, 1 + k, H/4, W/4] -> video [B, 3, 1 + 4k, H, W], not clamped."""
    with uncached(vae):
        return vae.decoder(vae.post_quant_conv(latent), first_chunk=True)


class Codec:
    """A frozen VAE with its latent statistics: pixels <-> normalised latents, which the models see."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video [B, 3, 1 + 4k, 32, 32] -> latent [B, 8, 1 + k, 8, 8]."""
        return (encode_moments(self.vae, video)[:, :LATENT_CHANNELS] - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Latent [B, 8, 1 + k, 8, 8] -> video [B, 3, 1 + 4k, 32, 32] in [-1, 1]."""
        return decode_raw(self.vae, latent * self.std + self.mean).clamp(-1, 1)
