"""Layers of Wan's causal 3-D VAE, with the parameter names of diffusers' `AutoencoderKLWan`.

Activations are batches of images x [T*B, C, H, W], time-major and channels-last, so that a slice in time is a view.
A 3-tap causal convolution is one 2-D convolution over [x(t-2) | x(t-1) | x(t)] stacked along channels. On a CPU this is
several times faster than a small 3-D convolution.

After `fuse`, which is for GPUs, a convolution leaves its bias to the pass that reads its result next (`Sum`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.bias_residual import bias_residual
from kernels.causal_convolution import STEP, WIDEST, causal_convolution, has_fast_kernel, pack
from kernels.interleave_phases import interleave_phases
from kernels.vae_norm_silu import vae_norm_silu

Cache = tuple[Tensor, ...]  # one [B, C, 2, h, w] per causal convolution: the last two frames of its input

# Above this many elements use 3-D convolutions: they run at full rate, and a stacked copy would cost too much memory.
STACK_LIMIT = 1 << 20


@dataclass(frozen=True)
class Sum:
    """Images [N, C, H, W]. With a late bias they are not added up yet: h + bias + residual.

    The next normalisation adds them as it reads them.
    """

    h: Tensor
    bias: Tensor | None = None  # [C]
    residual: Tensor | None = None  # as h; only with a bias

    def images(self) -> Tensor:
        """The sum, computed now."""
        if self.bias is None:
            return self.h
        residual = None if self.residual is None else channels_last(self.residual)
        return bias_residual(channels_last(self.h), self.bias, residual)


class Past:
    """The caches of one call, in the order of the convolutions; `next` collects the caches for the next call.

    A first call (`cache` None) has one frame and no past. `in_place` overwrites the input caches with the next ones;
    `fused` runs normalisation, activation and cache update as one kernel.
    """

    def __init__(self, batch: int, cache: Cache | None, in_place: bool = False, fused: bool = False):
        self.batch, self.in_place, self.fused = batch, in_place, fused
        self.cache = None if cache is None else iter(cache)
        self.next: list[Tensor] = []

    def normalise(self, x: Sum, norm: RMSNorm, keep: bool = True) -> tuple[Tensor, Tensor | None]:
        """silu(norm(x)) after two past frames, [(2+T)*B, C, H, W], and x added up (if `keep`)."""
        if not self.fused:
            images = x.images()
            return self.extend(F.silu(norm(images))), images
        before = None if self.cache is None else next(self.cache)
        video = to_video(channels_last(x.h), self.batch)
        residual = None if x.residual is None else to_video(channels_last(x.residual), self.batch)
        cache_out = before if self.in_place else None
        extended, following, total = vae_norm_silu(video, norm.gamma, before, cache_out, x.bias, residual, keep)
        self.next.append(following)
        return to_images(extended), None if total is None else to_images(total)

    def extend(self, x: Tensor) -> Tensor:
        """Prepend two past frames to x [T*B, C, H, W]: [(2+T)*B, C, H, W]; none in a first call."""
        before = None if self.cache is None else next(self.cache)
        if before is None:
            self.keep(torch.cat([torch.zeros_like(x), x]))
            return x
        x = torch.cat([to_images(before), x])
        last = x[-2 * self.batch :]
        if self.in_place:
            self.next.append(before.copy_(to_video(last, self.batch)))
        else:
            self.keep(last.clone())  # a view would keep all of x in memory
        return x

    def keep(self, x: Tensor) -> None:
        self.next.append(x.unflatten(0, (2, self.batch)).permute(1, 2, 0, 3, 4))


class CausalConv3d(nn.Conv3d):
    """Three taps in time (t-2, t-1, t), "same" in space."""

    late_bias = False  # whether the bias is left to the pass that reads the result
    _padded: tuple[Tensor, Tensor | None] | None = None  # weight and bias with outputs of zeros up to a multiple of 8
    _packed: Tensor | None = None  # the weight as our kernel reads it, where that is wanted

    def forward(self, x: Tensor, past: Past) -> Tensor:  # type: ignore[override]
        """x [(2+T)*B, C, H, W], extended by `past` -> [T*B, C', H, W], without the bias if that is late."""
        weight, bias = self._padded or (self.weight, self.bias)
        bias = None if self.late_bias else bias
        space = self.kernel_size[2] // 2
        if past.cache is None:  # zeros precede the first frame, so only the last tap contributes
            y = F.conv2d(x, weight[:, :, -1], bias, padding=space)
        elif self._packed is not None and has_fast_kernel(x.device):
            bias = None if self.late_bias else self.bias
            return causal_convolution(channels_last(x), self.weight, bias, past.batch, self._packed)
        else:
            y = causal_taps(x, weight, bias, past.batch, space)
        return y if self._padded is None else y[:, : self.out_channels]

    def sum(self, x: Tensor, past: Past, residual: Tensor | None = None) -> Sum:
        """The result and the residual: added up, or left to the next pass with the bias if that is late."""
        h = self(x, past)
        if self.late_bias:
            return Sum(h, self.bias, residual)
        return Sum(h if residual is None else h + residual)

    def fuse(self) -> None:
        """Convert the weight to channels-last once instead of on every call, and pad few outputs for matrix units."""
        weight = self.weight.detach().contiguous(memory_format=torch.channels_last_3d)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._packed = pack(weight) if fits_cudnn_badly(weight) else None
        missing = -self.out_channels % 8
        if missing:
            padded = F.pad(weight, (0, 0) * 4 + (0, missing)).contiguous(memory_format=torch.channels_last_3d)
            self._padded = padded, None if self.bias is None else F.pad(self.bias.detach(), (0, missing))


def fits_cudnn_badly(weight: Tensor) -> bool:
    """Whether our kernel should compute a convolution.

    cuDNN's tiles are 64 outputs wide. On an H100, 96 -> 96 channels reach 377 TFLOP/s with it in bf16 and 698 with our
    kernel, where 192 -> 192 reach 618 and 517; 96 -> 3 takes 1.16 and 0.29 ms (docs/kernels.md).
    """
    outputs, channels, *kernel = weight.shape
    half = weight.dtype in (torch.bfloat16, torch.float16)
    return (
        half and kernel == [3, 3, 3] and channels % STEP == 0 and max(outputs, channels) <= WIDEST and outputs % 64 > 0
    )


class PointConv3d(nn.Conv3d):
    """One tap in time and space."""

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C', H, W]"""
        return F.conv2d(x, self.weight[:, :, 0], self.bias)


def causal_taps(x: Tensor, weight: Tensor, bias: Tensor | None, batch: int, space: int, stride: int = 1) -> Tensor:
    """x [(T+2)*B, C, H, W], weight [C', C, 3, kh, kw] -> [T*B, C', H, W], or only every stride-th frame."""
    frames = x.unflatten(0, (-1, batch))  # [T+2, B, C, H, W]
    if x.numel() > STACK_LIMIT:
        y = F.conv3d(frames.permute(1, 2, 0, 3, 4), weight, bias, (stride, 1, 1), (0, space, space))
        return y.permute(2, 0, 1, 3, 4).flatten(0, 1)
    last = frames.shape[0] - 2
    stacked = torch.cat([frames[tap : tap + last : stride].flatten(0, 1) for tap in range(3)], dim=1)
    return F.conv2d(stacked, weight.transpose(1, 2).flatten(1, 2), bias, padding=space)


def phases_of(weight: Tensor) -> Tensor:
    """The weights [C', C, 3, 3] of a convolution over nearest-upsampled images as four 2x2 ones [4 * C', C, 2, 2].

    Of two rows that are copies of one, the three taps of an even output row see (i - 1, i, i), and those of an odd row
    (i, i, i + 1): two inputs each, one of them with the sum of two taps. Columns likewise. Phase 2 * py + px comes
    first in the outputs' order.
    """

    def halves(w: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        a, b, c = w.unbind(axis)
        return torch.stack([a, b + c], axis), torch.stack([a + b, c], axis)

    phases = [phase for row in halves(weight.double(), 2) for phase in halves(row, 3)]  # the sums are rounded once
    return torch.cat(phases).to(weight.dtype)


def upsampled_convolution(x: Tensor, phases: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 "same" convolution over x [N, C, H, W] upsampled to twice the size: [N, C', 2H, 2W], channels-last.

    phases [4 * C', C, 2, 2] from `phases_of`, bias [C'] or None. 16 products per output position instead of 36, and the
    upsampled images are never written.
    """
    return interleave_phases(channels_last(F.conv2d(x, phases, padding=1)), bias)  # windows: [N, 4C', H+1, W+1]


def split_time(x: Tensor, parts: int, batch: int) -> Tensor:
    """x [T*B, parts*C, H, W], whose channels are those of several frames -> [T*parts*B, C, H, W], channels-last."""
    x = x.permute(0, 2, 3, 1).unflatten(3, (parts, -1)).unflatten(0, (-1, batch))
    return x.permute(0, 4, 1, 2, 3, 5).flatten(0, 2).permute(0, 3, 1, 2)


class RMSNorm(nn.Module):
    """RMS normalisation over channels; gamma [C, 1, 1] or [C, 1, 1, 1] as published."""

    def __init__(self, dim: int, dims: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same"""
        # diffusers divides by max(|x|, 1e-12). The tiny eps has the same effect: 0 stays 0.
        y = F.rms_norm(x.permute(0, 2, 3, 1), (x.shape[1],), self.gamma.flatten(), eps=1e-24)
        return y.permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.norm1 = RMSNorm(in_dim)
        self.conv1 = CausalConv3d(in_dim, out_dim, 3)
        self.norm2 = RMSNorm(out_dim)
        self.conv2 = CausalConv3d(out_dim, out_dim, 3)
        self.conv_shortcut = PointConv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Sum, past: Past) -> Sum:
        extended, images = past.normalise(x, self.norm1)
        h = self.conv1.sum(extended, past)
        del extended  # before the next one is made: fresh memory costs more than its arithmetic
        extended, _ = past.normalise(h, self.norm2, keep=False)
        return self.conv2.sum(extended, past, self.conv_shortcut(images))

    def fuse(self) -> None:
        self.conv1.late_bias = self.conv2.late_bias = True


class AttentionBlock(nn.Module):
    """Single-head self-attention inside each frame."""

    late_bias = False  # as CausalConv3d's, of the last product

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, dims=2)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, total: Sum, past: Past) -> Sum:
        x = total.images()
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)  # [N, H*W, 3C]
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])
        if self.late_bias:
            return Sum(F.conv2d(out, self.proj.weight), self.proj.bias, x)
        return Sum(x + self.proj(out))

    def fuse(self) -> None:
        self.late_bias = True


class Upsample(nn.Module):
    """Doubles the size and halves the channels; `temporal` also doubles the frames, except the video's first."""

    _phases: Tensor | None = None  # weights that see the images before they are upsampled, after `fuse`

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(dim, dim // 2, 3, padding=1))
        if temporal:
            self.time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1))
        self.temporal = temporal

    def forward(self, total: Sum, past: Past) -> Sum:
        """[T*B, C, H, W] -> [T'*B, C/2, 2H, 2W]"""
        x = total.images()
        if self.temporal:
            if past.cache is None:  # the first frame is not doubled, and this convolution never sees it
                past.keep(torch.cat([torch.zeros_like(x)] * 2))
            else:
                x = split_time(self.time_conv(past.extend(x), past), 2, past.batch)
        if self._phases is not None:
            return Sum(upsampled_convolution(x, self._phases, cast(nn.Conv2d, self.resample[1]).bias))
        return Sum(self.resample(F.interpolate(x, scale_factor=2.0, mode="nearest")))

    def fuse(self) -> None:
        self._phases = channels_last(phases_of(cast(nn.Conv2d, self.resample[1]).weight.detach()))


class Downsample(nn.Module):
    """Halves the size; `temporal` also halves the frames, except the video's first."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        if temporal:
            self.time_conv = CausalConv3d(dim, dim, (3, 1, 1))
        self.temporal = temporal

    def forward(self, total: Sum, past: Past) -> Sum:
        """[T*B, C, H, W] -> [T'*B, C, H/2, W/2]"""
        x = self.resample(total.images())
        if not self.temporal:
            return Sum(x)
        extended = past.extend(x)
        if past.cache is None:
            return Sum(x)
        # Windows of three frames at stride 2. The first window starts one frame before x.
        conv = self.time_conv
        return Sum(causal_taps(extended[past.batch :], conv.weight, conv.bias, past.batch, 0, stride=2))


class MidBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(dim)])
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])

    def forward(self, x: Sum, past: Past) -> Sum:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, past), past), past)


class UpBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, count: int, upsample: Upsample | None):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(count))
        self.upsamplers = nn.ModuleList([] if upsample is None else [upsample])

    def forward(self, x: Sum, past: Past) -> Sum:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x, past)
        return x


def channels_last(images: Tensor) -> Tensor:
    """As kernels want them. A convolution over few frames or several videos may return another memory layout."""
    return images.contiguous(memory_format=torch.channels_last)


def to_images(video: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [T*B, C, H, W]"""
    return video.permute(2, 0, 1, 3, 4).flatten(0, 1)


def to_video(images: Tensor, batch: int) -> Tensor:
    """[T*B, C, H, W] -> [B, C, T, H, W]"""
    return images.unflatten(0, (-1, batch)).permute(1, 2, 0, 3, 4)
