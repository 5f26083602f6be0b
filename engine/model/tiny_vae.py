"""A tiny VAE in TAEHV's layout, with the contract of `engine/model/vae.py`: `first` and `steady`, caches in and out.

Parameter names are those of published files (taew2_1): `decoder.N.` and `encoder.N.`, numbered through all layers.
Activations are batches of images x [T*B, C, H, W], time-major, as in `vae_layers.py`. The only memory is the previous
input of every `MemBlock`; before the first frame it is zero.

Time. The decoder makes four frames of each latent. In Wan's VAE the first latent is one frame, so the first three are
dropped: latent 0 is frame 0, latent i is frames 4i - 3 to 4i. The published encoder is aligned otherwise: its latent i
comes from frames 4i to 4i + 3 and its memory of those before; the last frame is repeated where there are no more.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import MOST
from engine.model.vae import StreamingVAE, VAEConfig, images_of, shown
from engine.model.vae_layers import (
    Cache,
    channels_last,
    phases_of,
    split_time,
    to_video,
    upsampled_convolution,
)
from engine.options import read

MOST_BLOCKS = 8  # a stage; files are recognised by the first layer behind one (engine/weights/names.py)


@dataclass(frozen=True)
class TinyVAEConfig:
    """The defaults are taew2_1's. Stages are in the decoder's order; the encoder has them in reverse."""

    z_dim: int = 16
    widths: tuple[int, ...] = (256, 128, 64, 64)  # of the decoder's stages, then of its last convolution
    upsample_space: tuple[bool, ...] = (True, True, True)
    upsample_time: tuple[bool, ...] = (False, True, True)
    blocks: int = 3  # MemBlocks a stage
    in_channels: int = 3
    patch: int = 1  # the outermost layers see patch x patch pixels as channels
    encoder_width: int | None = 64  # None: no encoder
    latents_mean: tuple[float, ...] | None = None  # None: its own latents are the normalised ones
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        stages = len(self.widths) - 1
        for name in ("upsample_space", "upsample_time"):
            if len(getattr(self, name)) != stages:
                raise ValueError(f"{name}: got {len(getattr(self, name))} entries, expected {stages}, one a stage")
        for name in ("latents_mean", "latents_std"):
            if (values := getattr(self, name)) is not None and len(values) != self.z_dim:
                raise ValueError(f"{name}: got {len(values)} entries, expected {self.z_dim}, one a latent channel")
        if (self.latents_mean is None) != (self.latents_std is None):
            raise ValueError("tiny VAE: got one of latents_mean and latents_std, expected both or neither")
        if self.latents_std is not None and min(self.latents_std) <= 0:
            raise ValueError(f"latents_std: got {min(self.latents_std)}, expected positive numbers")
        sizes = (self.z_dim, *self.widths, self.patch, self.encoder_width or 1)
        if stages < 1 or not 1 <= min(sizes) <= max(sizes) <= MOST or not 1 <= self.blocks <= MOST_BLOCKS:
            raise ValueError(f"tiny VAE: got {self}, expected sizes of 1 to {MOST} and 1 to {MOST_BLOCKS} blocks")

    @property
    def scale_factor_spatial(self) -> int:
        return self.patch * 2 ** sum(self.upsample_space)

    @property
    def scale_factor_temporal(self) -> int:
        return 2 ** sum(self.upsample_time)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TinyVAEConfig:
        """From config.json's content, without keys starting with "_". ValueError for unknown keys."""
        values = {key: value for key, value in values.items() if not key.startswith("_")}
        if unknown := sorted(values.keys() - {f.name for f in fields(cls)}):
            raise ValueError(f"tiny VAE config: got unknown keys {unknown}, expected {[f.name for f in fields(cls)]}")
        return read(cls, values, "tiny VAE config")


def expect_fit(tiny: TinyVAEConfig, vae: VAEConfig, label: object) -> None:
    """ValueError unless the tiny VAE decodes the VAE's latents to pictures of the same size."""
    for what in ("z_dim", "scale_factor_spatial", "scale_factor_temporal"):
        if (got := getattr(tiny, what)) != (expected := getattr(vae, what)):
            raise ValueError(f"{label}: got a tiny VAE of {what} {got}, expected {expected}, as the VAE has")


class Memory:
    """The caches of one call, [B, C, 1, h, w] per `MemBlock` in their order; `next` collects those for the next call.

    Without `cache` a video starts. `in_place` overwrites the input caches with the next ones.
    """

    def __init__(self, batch: int, cache: Cache | None, in_place: bool = False):
        self.batch, self.in_place = batch, in_place
        self.cache = None if cache is None else iter(cache)
        self.next: list[Tensor] = []

    def paired(self, x: Tensor) -> Tensor:
        """x [T*B, C, H, W] with the image before each one beside it: [T*B, 2C, H, W]."""
        last, earlier = x[-self.batch :], x[: -self.batch]
        kept = None if self.cache is None else next(self.cache)
        past = torch.zeros_like(last) if kept is None else kept.squeeze(2)
        pairs = channels_last(torch.cat([x, torch.cat([past, earlier]) if len(earlier) else past], dim=1))
        if kept is None or not self.in_place:
            self.next.append(last.clone().unsqueeze(2))  # a view would keep all of x in memory
        else:
            self.next.append(kept.copy_(last.unsqueeze(2)))  # the last one to read it is done
        return pairs


class Clamp(nn.Module):
    """Bounds latents softly to (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class MemBlock(nn.Module):
    """A residual block that sees each image together with the one before it."""

    def __init__(self, dim: int):
        super().__init__()
        first, second, last = _conv(2 * dim, dim), _conv(dim, dim), _conv(dim, dim)
        self.conv = nn.Sequential(first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True), last)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        return F.relu(self.conv(memory.paired(x)).add_(x), inplace=True)


class Grow(nn.Module):
    """One image -> `stride` images."""

    def __init__(self, dim: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(dim, dim * stride, 1, bias=False)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """[T*B, C, H, W] -> [T*stride*B, C, H, W]"""
        return channels_last(split_time(self.conv(x), self.stride, memory.batch))


class Pool(nn.Module):
    """`stride` images -> one."""

    def __init__(self, dim: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(dim * stride, dim, 1, bias=False)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """[T*stride*B, C, H, W] -> [T*B, C, H, W]"""
        groups = x.unflatten(0, (-1, self.stride, memory.batch)).transpose(1, 2)  # [T, B, stride, C, H, W]
        return self.conv(channels_last(groups.flatten(2, 3).flatten(0, 1)))


class Rise:
    """Upsample, Grow and the convolution after it as one convolution over the small images.

    Nothing but linear maps lies between them, so their weights multiply.
    """

    def __init__(self, upsample: nn.Upsample, grow: Grow, conv: nn.Conv2d):
        taps = conv.weight.detach().double()
        parts = grow.conv.weight.detach().double().view(grow.stride, -1, grow.conv.in_channels)
        weight = torch.einsum("omhw,smi->soihw", taps, parts).flatten(0, 1).to(conv.weight.dtype)
        self.parts, self.doubles = grow.stride, upsample.scale_factor == 2
        self.weight = channels_last(phases_of(weight) if self.doubles else weight)

    def __call__(self, x: Tensor, memory: Memory) -> Tensor:
        """[T*B, C, H, W] -> [T*parts*B, C', 2H, 2W]"""
        x = upsampled_convolution(x, self.weight, None) if self.doubles else F.conv2d(x, self.weight, padding=1)
        return channels_last(split_time(x, self.parts, memory.batch))


class Layers(nn.ModuleList):
    """The layers of one side under their numbers."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__(layers)
        self.memories = sum(isinstance(layer, MemBlock) for layer in layers)
        self._last = max(number for number, layer in enumerate(layers) if isinstance(layer, MemBlock))
        self._fused: dict[int, Any] = {}  # what runs in the place of a layer

    def forward(self, x: Tensor, memory: Memory, newest: bool = False) -> Tensor:
        """x [T*B, C, H, W]. `newest`: only the last image of the result, [B, C', H', W']."""
        for number, layer in enumerate(self):
            layer = self._fused.get(number, layer)
            x = layer(x, memory) if isinstance(layer, MemBlock | Grow | Pool | Rise) else layer(x)
            if newest and number >= self._last:  # no later layer remembers the others
                x = x[-memory.batch :]
        return x

    def fuse(self) -> None:
        for number, layer in enumerate(self):
            if isinstance(layer, nn.Upsample):
                rise = Rise(layer, cast(Grow, self[number + 1]), cast(nn.Conv2d, self[number + 2]))
                self._fused |= {number: rise, number + 1: nn.Identity(), number + 2: nn.Identity()}


class TinyVAE(StreamingVAE):
    """Decoder, and an encoder where the config has one. Latents are normalised; frames are in [-1, 1]."""

    config: TinyVAEConfig

    def __init__(self, config: TinyVAEConfig):
        super().__init__(config)
        self.decoder = decoder_layers(config)
        width = config.encoder_width
        self.encoder = None if width is None else encoder_layers(config, width)

    def fuse(self) -> None:
        self.decoder.fuse()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight = nn.Parameter(channels_last(module.weight.detach()), requires_grad=False)

    def reconstruct(self, latents: Tensor) -> Tensor:
        """A whole video at once, and not clamped, for training: latents [B, C, 1+k, h, w] -> [B, 3, 1+4k, H, W]."""
        self._check_latent(latents)
        video, _ = self._frames(latents, None)
        return video[:, :, self.config.scale_factor_temporal - 1 :]

    def encode(self, video: Tensor) -> Tensor:
        step = self._check_video(video)
        video = torch.cat([video, video[:, :, -1:].expand(-1, -1, step - 1, -1, -1)], dim=2)
        cache: Cache | None = None
        latents = []
        for frames in video.split(step, dim=2):
            latent, cache = self._encode(frames, cache)
            latents.append(latent)
        return torch.cat(latents, dim=2)

    def encode_step(self, frames: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """It is the last latent of `encode` for all frames so far, so each call but the first runs the encoder twice.

        The cache is what the encoder remembers of the whole groups of frames, and the frame that starts a new one.
        """
        step = self.config.scale_factor_temporal
        past: Cache | None = None
        if cache is not None:
            _, past = self._encode(torch.cat([cache[-1], frames[:, :, :-1]], dim=2), cache[:-1])
        start = frames[:, :, -1:]
        latent, following = self._encode(start.expand(-1, -1, step, -1, -1), past)
        kept = tuple(map(torch.zeros_like, following)) if past is None else past
        return latent, (*kept, start.clone())

    def _encode(self, frames: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """One latent frame [B, C, 1, h, w], float32, of the four that it reads, and the next cache."""
        if self.encoder is None:
            raise ValueError("tiny VAE: got no encoder, expected one")
        memory = Memory(frames.shape[0], cache)
        x = images_of((frames + 1) / 2).to(_dtype(self.encoder))
        if self.config.patch > 1:
            x = channels_last(F.pixel_unshuffle(x, self.config.patch))
        latent = to_video(self.encoder(x, memory), memory.batch).float()
        if self._moments is not None:
            mean, std = self._statistics(frames.device)
            latent = (latent - mean) / std
        return latent, tuple(memory.next)

    def _cache_of(self, latent: Tensor) -> tuple[int, tuple[int, ...]]:
        return self.decoder.memories, (latent.shape[0], self.config.widths[0], 1, *latent.shape[3:])

    def _decode(self, latent: Tensor, cache: Cache | None, in_place: bool = False) -> tuple[Tensor, Cache]:
        frames, following = self._frames(latent, cache, in_place, newest=cache is None)
        return shown(frames), following

    def _frames(
        self, latents: Tensor, cache: Cache | None, in_place: bool = False, newest: bool = False
    ) -> tuple[Tensor, Cache]:
        """Every frame of latents [B, C, k, h, w], or the newest one, not clamped, and the next cache."""
        latents = latents.float()
        if self._moments is not None:
            mean, std = self._statistics(latents.device)
            latents = latents * std + mean
        memory = Memory(latents.shape[0], cache, in_place)
        x = self.decoder(images_of(latents).to(_dtype(self.decoder)), memory, newest)
        if self.config.patch > 1:
            x = F.pixel_shuffle(x, self.config.patch)
        return to_video(2 * x - 1, memory.batch), tuple(memory.next)


def decoder_layers(config: TinyVAEConfig) -> Layers:
    layers: list[nn.Module] = [Clamp(), _conv(config.z_dim, config.widths[0]), nn.ReLU(inplace=True)]
    stages = zip(pairwise(config.widths), config.upsample_space, config.upsample_time, strict=True)
    for (dim, out), space, time in stages:
        layers += [MemBlock(dim) for _ in range(config.blocks)]
        layers += [
            nn.Upsample(scale_factor=2 if space else 1),
            Grow(dim, 2 if time else 1),
            _conv(dim, out, bias=False),
        ]
    return Layers([*layers, nn.ReLU(inplace=True), _conv(config.widths[-1], config.in_channels * config.patch**2)])


def encoder_layers(config: TinyVAEConfig, dim: int) -> Layers:
    layers: list[nn.Module] = [_conv(config.in_channels * config.patch**2, dim), nn.ReLU(inplace=True)]
    for space, time in zip(config.upsample_space[::-1], config.upsample_time[::-1], strict=True):
        layers += [Pool(dim, 2 if time else 1), _conv(dim, dim, stride=2 if space else 1, bias=False)]
        layers += [MemBlock(dim) for _ in range(config.blocks)]
    return Layers([*layers, _conv(dim, config.z_dim)])


def _conv(given: int, out: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(given, out, 3, stride=stride, padding=1, bias=bias)


def _dtype(layers: Layers) -> torch.dtype:
    return next(layers.parameters()).dtype
