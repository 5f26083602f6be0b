"""Wan's causal 3-D VAE as two pure functions: `first` (1 latent -> 1 frame) and `steady` (1 latent -> 4 frames).

Parameter names are those of diffusers' `AutoencoderKLWan`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import MOST, MOST_LAYERS
from engine.model.vae_layers import (
    AttentionBlock,
    Cache,
    CausalConv3d,
    Downsample,
    MidBlock,
    Past,
    PointConv3d,
    ResidualBlock,
    RMSNorm,
    UpBlock,
    Upsample,
    to_images,
    to_video,
)
from engine.options import read

WAN_MEAN: tuple[float, ...] = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
WAN_MEAN += (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
WAN_STD: tuple[float, ...] = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
WAN_STD += (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


@dataclass(frozen=True)
class VAEConfig:
    """The fields of a diffusers `vae/config.json`; the defaults are Wan2.1's."""

    base_dim: int = 96
    decoder_base_dim: int | None = None  # None: base_dim
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = WAN_MEAN
    latents_std: tuple[float, ...] = WAN_STD
    in_channels: int = 3
    out_channels: int = 3
    scale_factor_spatial: int = 8
    scale_factor_temporal: int = 4

    def __post_init__(self) -> None:
        levels = len(self.dim_mult)
        _expect(
            "temperal_downsample",
            len(self.temperal_downsample),
            levels - 1,
            "entries, one between two levels",
        )
        _expect("latents_mean", len(self.latents_mean), self.z_dim, "entries, one a latent channel")
        _expect("latents_std", len(self.latents_std), self.z_dim, "entries, one a latent channel")
        _expect("scale_factor_spatial", self.scale_factor_spatial, 2 ** (levels - 1), "from dim_mult")
        _expect("scale_factor_temporal", self.scale_factor_temporal, 2 ** sum(self.temperal_downsample))
        sizes = (self.base_dim, self.base_dim if self.decoder_base_dim is None else self.decoder_base_dim, self.z_dim,
                 *self.dim_mult, self.in_channels, self.out_channels)  # fmt: skip
        if not 1 <= min(sizes) <= max(sizes) <= MOST or not 1 <= self.num_res_blocks <= MOST_LAYERS:
            raise ValueError(f"VAE: got {self}, expected sizes of 1 to {MOST} and 1 to {MOST_LAYERS} blocks")
        if min(self.latents_std) <= 0:
            raise ValueError(f"latents_std: got {min(self.latents_std)}, expected positive numbers")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VAEConfig:
        """From config.json's content, without `dropout` and keys starting with "_". ValueError for unknown keys."""
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        values = {k: v for k, v in values.items() if not k.startswith("_") and k != "dropout"}
        # Wan2.2's VAE is another architecture with the same class name. No published VAE attends outside mid_block.
        for key, expected in (("is_residual", False), ("patch_size", None), ("attn_scales", ())):
            if (got := values.pop(key, expected)) != expected:
                raise ValueError(f"VAE config {key}: got {got}, expected {expected} (Wan2.1's VAE)")
        if unknown := sorted(values.keys() - {f.name for f in fields(cls)}):
            raise ValueError(f"VAE config: got unknown keys {unknown}, expected {[f.name for f in fields(cls)]}")
        return read(cls, values, "VAE config")


def _expect(name: str, got, expected, note: str = "") -> None:
    if got != expected:
        raise ValueError(f"{name}: got {got}, expected {expected} {note}".rstrip())


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d(config.in_channels, dims[0], 3)
        blocks: list[nn.Module] = []
        for level, (dim, out_dim) in enumerate(pairwise(dims)):
            for i in range(config.num_res_blocks):
                blocks.append(ResidualBlock(dim if i == 0 else out_dim, out_dim))
            if level < len(config.temperal_downsample):
                blocks.append(Downsample(out_dim, config.temperal_downsample[level]))
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], config.z_dim * 2, 3)

    def forward(self, images: Tensor, past: Past) -> Tensor:
        x = self.conv_in.sum(past.extend(images), past)
        for block in self.down_blocks:
            x = block(x, past)
        extended, _ = past.normalise(self.mid_block(x, past), self.norm_out, keep=False)
        return self.conv_out(extended, past)


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        mult = config.dim_mult[::-1]
        dims = [(config.decoder_base_dim or config.base_dim) * m for m in (mult[0], *mult)]
        temporal = config.temperal_downsample[::-1]
        self.conv_in = CausalConv3d(config.z_dim, dims[0], 3)
        self.mid_block = MidBlock(dims[0])
        blocks = []
        for level, (dim, out_dim) in enumerate(pairwise(dims)):
            upsample = Upsample(out_dim, temporal[level]) if level < len(temporal) else None
            # Every level but the first follows an upsampling, which halved the channels.
            blocks.append(UpBlock(dim // 2 if level else dim, out_dim, config.num_res_blocks + 1, upsample))
        self.up_blocks = nn.ModuleList(blocks)
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], config.out_channels, 3)

    def forward(self, images: Tensor, past: Past) -> Tensor:
        x = self.mid_block(self.conv_in.sum(past.extend(images), past), past)
        for block in self.up_blocks:
            x = block(x, past)
        extended, _ = past.normalise(x, self.norm_out, keep=False)
        return self.conv_out(extended, past)


class StreamingVAE(nn.Module, ABC):
    """What VAEs of any layout share. Latents are normalised, (z - mean) / std; frames are in [-1, 1]."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        given = config.latents_mean, config.latents_std
        self._moments = None if None in given else (_column(given[0], "cpu"), _column(given[1], "cpu"))

    def first(self, latent: Tensor) -> tuple[Tensor, Cache]:
        """The start of a video: latent [B, C, 1, h, w] -> frames [B, 3, 1, H, W], cache."""
        self._check_latent(latent, single=True)
        return self._decode(latent, None)

    def steady(self, latent: Tensor, cache: Cache, in_place: bool = False) -> tuple[Tensor, Cache]:
        """The rest of a video: latent [B, C, k, h, w] -> frames [B, 3, 4k, H, W], next cache; k is usually 1.

        `in_place` overwrites `cache` with the next one; otherwise `cache` is unchanged.
        """
        self._check_latent(latent)
        count, shape = self._cache_of(latent)
        if len(cache) != count or tuple(cache[0].shape) != shape:
            got = f"{len(cache)} tensors, {[tuple(c.shape) for c in cache[:1]]} first"
            raise ValueError(f"VAE cache: got {got}, expected {count} tensors, [{shape}] first")
        return self._decode(latent, cache, in_place)

    def decode_chunk(self, latents: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Decode latents [B, C, k, h, w], k >= 1, to frames [B, 3, T, H, W] and the next cache.

        Without a cache a video starts: T = 4k - 3; else T = 4k.
        """
        self._check_latent(latents)
        frames, begin = [], 0
        if cache is None:
            start, cache = self.first(latents[:, :, :1])
            frames, begin = [start], 1
        for t in range(begin, latents.shape[2]):
            following, cache = self.steady(latents[:, :, t : t + 1], cache)
            frames.append(following)
        return torch.cat(frames, dim=2), cache

    def decode(self, latents: Tensor) -> Tensor:
        """A whole video: latents [B, C, 1+k, h, w] -> frames [B, 3, 1+4k, H, W]."""
        return self.decode_chunk(latents)[0]

    @abstractmethod
    def encode(self, video: Tensor) -> Tensor:
        """video [B, 3, 1+4k, H, W] in [-1, 1] -> the normalised mean [B, C, 1+k, h, w], float32."""

    @abstractmethod
    def encode_step(self, frames: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """One latent frame [B, C, 1, h, w], float32, and the next cache; the first takes 1 frame, the others 4."""

    @abstractmethod
    def fuse(self) -> None:
        """From now on use what is faster on a GPU, for inference; call it when weights are final."""

    @abstractmethod
    def _decode(self, latent: Tensor, cache: Cache | None, in_place: bool = False) -> tuple[Tensor, Cache]:
        """`first` without a cache, else `steady`; the latent is checked."""

    @abstractmethod
    def _cache_of(self, latent: Tensor) -> tuple[int, tuple[int, ...]]:
        """The number of caches, and the shape of the first one."""

    def _check_latent(self, latent: Tensor, single: bool = False) -> None:
        shape, channels = tuple(latent.shape), self.config.z_dim
        if len(shape) != 5 or shape[1] != channels or shape[2] < 1 or (single and shape[2] > 1):
            raise ValueError(f"latent: got {shape}, expected [B, {channels}, {'1' if single else 'T >= 1'}, h, w]")

    def _check_video(self, video: Tensor) -> int:
        """The frames of every latent but the first. ValueError unless `video` is whole latents."""
        c, step, scale = self.config, self.config.scale_factor_temporal, self.config.scale_factor_spatial
        shape = tuple(video.shape)
        fits = len(shape) == 5 and shape[1] == c.in_channels and shape[2] > 0 and (shape[2] - 1) % step == 0
        if not fits or shape[3] % scale or shape[4] % scale:
            raise ValueError(f"video: got {shape}, expected [B, {c.in_channels}, 1 + {step}k, {scale}i, {scale}j]")
        return step

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """mean and std [C, 1, 1, 1], float32. They are not buffers, which would follow the weights to meta and bf16."""
        if self._moments is not None and self._moments[0].device == device:
            return self._moments
        moments = _column(self.config.latents_mean, device), _column(self.config.latents_std, device)
        if not torch.compiler.is_compiling():  # while compiling, tensors are fake: do not keep them
            self._moments = moments
        return moments


class VAE(StreamingVAE):
    """Encoder and decoder. Latents are normalised, (z - mean) / std; frames are in [-1, 1]."""

    DECODES = ("decoder.", "post_quant_conv.")  # the weights that only decoding needs
    config: VAEConfig

    def __init__(self, config: VAEConfig):
        super().__init__(config)
        self.encoder = Encoder(config)
        self.quant_conv = PointConv3d(config.z_dim * 2, config.z_dim * 2, 1)
        self.post_quant_conv = PointConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)
        self._caches = sum(isinstance(m, CausalConv3d) for m in self.decoder.modules())
        self._fused = False

    def forget_decoder(self) -> None:
        """Only encode from now on, without the weights that decode."""
        del self.decoder, self.post_quant_conv

    def fuse(self) -> None:
        """Run bias, residual, norm, SiLU and cache update as one kernel, and upsample inside convolutions."""
        self._fused = True
        for module in self.modules():
            if isinstance(module, Encoder | Decoder):
                module.conv_in.late_bias = True
            elif isinstance(module, CausalConv3d | ResidualBlock | AttentionBlock | Upsample):
                module.fuse()
            elif type(module) is nn.Conv2d:
                weight = module.weight.detach().contiguous(memory_format=torch.channels_last)
                module.weight = nn.Parameter(weight, requires_grad=False)

    def encode(self, video: Tensor) -> Tensor:
        step = self._check_video(video)
        cache: Cache | None = None
        latents = []
        for frames in video.split([1] + [step] * ((video.shape[2] - 1) // step), dim=2):
            latent, cache = self.encode_step(frames, cache)
            latents.append(latent)
        return torch.cat(latents, dim=2)

    def encode_step(self, frames: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        past = Past(frames.shape[0], cache, fused=self._fused)
        x = self.quant_conv(self.encoder(images_of(frames.to(self.quant_conv.weight.dtype)), past))
        mean, std = self._statistics(frames.device)
        return (to_video(x[:, : self.config.z_dim], past.batch).float() - mean) / std, tuple(past.next)

    def _cache_of(self, latent: Tensor) -> tuple[int, tuple[int, ...]]:
        return self._caches, (latent.shape[0], self.config.z_dim, 2, *latent.shape[3:])  # conv_in's cache holds latents

    def _decode(self, latent: Tensor, cache: Cache | None, in_place: bool = False) -> tuple[Tensor, Cache]:
        mean, std = self._statistics(latent.device)
        z = (latent.float() * std + mean).to(self.post_quant_conv.weight.dtype)
        past = Past(latent.shape[0], cache, in_place, self._fused)
        x = self.decoder(self.post_quant_conv(images_of(z)), past)
        return shown(to_video(x, past.batch)), tuple(past.next)


class SplitVAE(StreamingVAE):
    """One VAE encodes, and another one for the same latents decodes."""

    def __init__(self, encodes: StreamingVAE, decodes: StreamingVAE):
        super().__init__(encodes.config)
        self.encodes, self.decodes = encodes, decodes

    def fuse(self) -> None:
        self.encodes.fuse()
        self.decodes.fuse()

    def encode(self, video: Tensor) -> Tensor:
        return self.encodes.encode(video)

    def encode_step(self, frames: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        return self.encodes.encode_step(frames, cache)

    def _cache_of(self, latent: Tensor) -> tuple[int, tuple[int, ...]]:
        return self.decodes._cache_of(latent)

    def _decode(self, latent: Tensor, cache: Cache | None, in_place: bool = False) -> tuple[Tensor, Cache]:
        return self.decodes._decode(latent, cache, in_place)


@torch.inference_mode(False)  # training cannot use tensors that were created in inference mode
def _column(values: tuple[float, ...], device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1, 1)


def images_of(video: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [T*B, C, H, W], channels-last"""
    return to_images(video).contiguous(memory_format=torch.channels_last)


def shown(video: Tensor) -> Tensor:
    """Clamped to [-1, 1], but NaN where video is infinite: a clamp would make an ordinary white or black of it."""
    return video.clamp(-1, 1).add_(video, alpha=0)  # 0 * inf is NaN


def frames_to_uint8(frames: Tensor) -> Tensor:
    """[B, 3, T, H, W] in [-1, 1] -> uint8 [B, T, H, W, 3], rounded. The caller checks that frames are finite."""
    pixels = frames.permute(0, 2, 3, 4, 1).float().add(1).mul(127.5).round().clamp(0, 255)
    return pixels.to(torch.uint8).contiguous()


def uint8_to_frames(pixels: Tensor) -> Tensor:
    """uint8 [B, T, H, W, 3] -> float32 [B, 3, T, H, W] in [-1, 1]."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 5:
        raise ValueError(f"pixels: got {pixels.dtype} {tuple(pixels.shape)}, expected uint8 [B, T, H, W, 3]")
    return pixels.permute(0, 4, 1, 2, 3).float().div(127.5).sub(1)
