"""Bytes that the models' passes need beside weights and caches, counted from shapes. Nothing is run.

Each count follows the lines of the module: the tensors that live at once where they are most. A library's own buffers
are counted where they are large and known (normalisation in half precision, attention that packs its keys).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch

from engine.config import TransformerConfig
from engine.model.tiny_vae import TinyVAEConfig
from engine.model.umt5 import UMT5Config
from engine.model.vae import VAEConfig
from engine.model.vae_layers import STACK_LIMIT


def transformer_activations(
    config: TransformerConfig, tokens: int, keys: int, dtype: torch.dtype, *, fused: bool, precision: str = ""
) -> int:
    """One pass over `tokens` tokens whose self-attention sees `keys` rows.

    fused      kernels run (a GPU); else PyTorch's operations, whose rotation and GELU keep several copies
    precision  fp8: a kernel rounds an activation to 8 bits. int8: PyTorch's operations do so, by way of float32
    """
    size, inner = dtype.itemsize, config.ffn_dim / config.dim
    rounded = inner * (5 + size + (4 if size < 4 else 0)) / size  # int8: quotient, integers, itself and as float32
    if fused:  # hidden state, residual, normalised input, result, and q, k, v or the feed-forward's inner rows
        inside = {"fp8": inner + (inner + 1) / size, "int8": rounded}.get(precision, inner)
        widest = 4 + max(4, inside)
        return round(tokens * config.dim * size * widest)
    feed_forward = 12 + (max(2 * inner, rounded) if precision == "int8" else 2 * inner)
    rotation = 11 + 16 / size + (8 / size if size < 4 else 0)  # in float32: two halves of q and k, before and after
    packed = 2 * keys * config.dim * size if size < 4 else 0
    return round(tokens * config.dim * size * max(feed_forward, rotation)) + packed


def umt5_activations(config: UMT5Config, rows: int, dtype: torch.dtype) -> int:
    """One prompt of `rows` rows, without a weight's expansion."""
    size, heads = dtype.itemsize, config.num_heads * config.d_kv
    bias = 2 * config.num_heads * rows * rows * size  # before and after the mask
    attention = rows * size * (3 * config.d_model + 4 * heads) + bias
    # GELU step by step; half precision becomes float32 in none of them
    feed_forward = rows * size * (3 * config.d_model + 6 * config.d_ff)
    return max(attention, feed_forward)


def umt5_layer(config: UMT5Config) -> int:
    """Weights of one layer."""
    return 4 * config.d_model * config.num_heads * config.d_kv + 3 * config.d_model * config.d_ff + 2 * config.d_model


# Elements of a float32 image [channels, frames, height, 1] from which PyTorch lets oneDNN compute a convolution.
ONEDNN_LEAST = 20480


@dataclass(frozen=True)
class VaeBytes:
    """cache: what one call leaves for the next. step: the most that a call needs beside the cache that it is given."""

    cache: int
    step: int


def vae_decoding(
    config: VAEConfig, height: int, width: int, dtype: torch.dtype, *, fused: bool, in_place: bool
) -> VaeBytes:
    """One later latent frame [height, width] -> 4 frames. in_place: the new cache takes the place of the old one."""
    count = _Count(height, dtype.itemsize, fused, in_place)
    dims = [(config.decoder_base_dim or config.base_dim) * m for m in (config.dim_mult[-1], *config.dim_mult[::-1])]
    temporal, pixels, frames = config.temperal_downsample[::-1], height * width, 1
    count.convolution(config.z_dim, dims[0], frames, pixels)
    count.middle(dims[0], frames, pixels)
    for level, (dim, out) in enumerate(pairwise(dims)):
        given = count.images(dim // 2 if level else dim, frames, pixels)  # the decoder holds what it gave to the block
        count.held += given
        for number in range(config.num_res_blocks + 1):
            count.residual((dim // 2 if level else dim) if number == 0 else out, out, frames, pixels)
        if level < len(temporal):
            frames = count.upsample(out, frames, pixels, temporal[level])
            pixels, count.high = 4 * pixels, 2 * count.high
        count.held -= given
    count.convolution(dims[-1], config.out_channels, frames, pixels, normalised=True)
    return VaeBytes(count.cache, count.most)


def tiny_decoding(
    config: TinyVAEConfig, height: int, width: int, dtype: torch.dtype, *, fused: bool, in_place: bool
) -> VaeBytes:
    """As `vae_decoding`, of a tiny VAE."""
    count = _Count(height, dtype.itemsize, fused, in_place)
    high, wide, frames = height, width, 1
    count.held = 2 * count.images(config.z_dim, 1, high * wide)
    stages = zip(pairwise(config.widths), config.upsample_space, config.upsample_time, strict=True)
    for (dim, out), space, time in stages:
        x = count.images(dim, frames, high * wide)
        for _ in range(config.blocks):
            count.add(x + 2 * x + (x if frames > 1 else 0))  # with the images before, both side by side
            count.keep(dim, high * wide, 1)
            count.add(x + 2 * x + 2 * x)
        scale, grown = (2 if space else 1), (2 if time else 1)
        made = count.images(out, frames * grown, scale * high * scale * wide)
        if fused:  # four phases of windows, one more each way than pixels
            windows = made * (high + 1) * (wide + 1) // (high * wide) if space else made
            count.add(x + windows + (made if space or time else 0))
        else:
            copied = x * scale**2
            count.add(x + copied)
            count.add(copied + grown * copied * (2 if time else 1))
            count.add(grown * copied + made)
        high, wide, frames = scale * high, scale * wide, frames * grown
    shown = count.images(config.in_channels * config.patch**2, frames, high * wide)
    count.add(count.images(config.widths[-1], frames, high * wide) + shown)
    count.add(3 * shown)
    return VaeBytes(count.cache, count.most)


def vae_encoding(config: VAEConfig, height: int, width: int, dtype: torch.dtype, *, fused: bool) -> int:
    """Four frames [height, width] in latent pixels -> one latent frame: the most that a call needs, caches included."""
    count = _Count(height * config.scale_factor_spatial, dtype.itemsize, fused, False)
    dims = [config.base_dim * m for m in (1, *config.dim_mult)]
    frames, pixels = config.scale_factor_temporal, height * width * config.scale_factor_spatial**2
    count.convolution(config.in_channels, dims[0], frames, pixels)
    for level, (dim, out) in enumerate(pairwise(dims)):
        for number in range(config.num_res_blocks):
            count.residual(dim if number == 0 else out, out, frames, pixels)
        if level < len(config.temperal_downsample):
            count.add(2 * count.images(out, frames, pixels))  # padded
            pixels, count.high = pixels // 4, count.high // 2
            if config.temperal_downsample[level]:
                count.keep(out, pixels)
                frames = max(frames // 2, 1)
    count.middle(dims[-1], frames, pixels)
    count.convolution(dims[-1], 2 * config.z_dim, frames, pixels, normalised=True)
    return count.most + count.cache


class _Count:
    """Walks through the VAE's layers. `most` is the largest sum so far of what lives at once."""

    def __init__(self, high: int, size: int, fused: bool, in_place: bool) -> None:
        self.size, self.fused, self.in_place = size, fused, in_place
        self.cache = self.held = self.most = 0
        self.high = high  # of the images now
        self._new = 0  # of the caches for the next call, those made so far

    def images(self, channels: int, frames: int, pixels: int) -> int:
        return channels * frames * pixels * self.size

    def add(self, live: int) -> None:
        """`live` bytes beside what is held and the new caches."""
        self.most = max(self.most, self.held + self._new + live)

    def keep(self, channels: int, pixels: int, frames: int = 2) -> None:
        made = self.images(channels, frames, pixels)
        self.cache += made
        self._new += 0 if self.in_place else made

    def normalise(self, x: int, live: int) -> None:
        """RMS norm and SiLU of x, beside `live`, and the frames before it in front."""
        if self.fused:
            return
        self.add(live + (12 * x // self.size if self.size < 4 else 2 * x))  # float32: x, the normalised, the weighted
        self.add(live + 2 * x)

    def extended(self, channels: int, frames: int, pixels: int) -> int:
        return self.images(channels, frames + 2, pixels)

    def convolution(self, given: int, out: int, frames: int, pixels: int, normalised: bool = False) -> None:
        x, longer = self.images(given, frames, pixels), self.extended(given, frames, pixels)
        if normalised:
            self.normalise(x, x)
        self.add(x + x + longer)
        self.keep(given, pixels)
        self.add(x + longer + self.taps(given, frames, pixels) + self.images(out, frames, pixels))

    def taps(self, channels: int, frames: int, pixels: int, kernel: int = 27) -> int:
        """What a convolution in time makes of its input beside its result.

        Over few pixels the taps stand beside each other. Else PyTorch's own 3-D convolution unfolds the input, and
        oneDNN's has it in two more layouts; its rule chooses between them.
        """
        if (frames + 2) * channels * pixels <= STACK_LIMIT:
            return 3 * self.images(channels, frames, pixels)
        if self.fused:
            return 0
        longer = self.extended(channels, frames, pixels)
        wide = kernel > 3 or torch.get_num_threads() > 1
        if self.size < 4 or (wide and channels * (frames + 2) * self.high > ONEDNN_LEAST):
            return 2 * longer
        return longer + kernel * self.images(channels, frames, pixels)

    def residual(self, given: int, out: int, frames: int, pixels: int) -> None:
        x, y = self.images(given, frames, pixels), self.images(out, frames, pixels)
        total = x if self.fused else 0  # kernels add bias and residual up as they normalise
        self.normalise(x, x)
        longer = self.extended(given, frames, pixels)
        self.add(x + total + longer + (0 if self.fused else x))
        self.keep(given, pixels)
        self.add(x + total + longer + self.taps(given, frames, pixels) + y)
        self.normalise(y, x + y)
        longer = self.extended(out, frames, pixels)
        self.add(x + total + y + longer + (0 if self.fused else y))
        self.keep(out, pixels)
        shortcut = y if given != out else 0
        last = y if self.fused else 2 * y  # with the sum
        self.add(x + total + y + longer + shortcut + max(last, y + self.taps(out, frames, pixels)))

    def middle(self, channels: int, frames: int, pixels: int) -> None:
        x = self.images(channels, frames, pixels)
        self.held += x
        self.residual(channels, channels, frames, pixels)
        self.normalise(x, x)
        self.add(7 * x)
        self.residual(channels, channels, frames, pixels)
        self.held -= x

    def upsample(self, channels: int, frames: int, pixels: int, temporal: bool) -> int:
        """Returns the number of frames after it."""
        x, after = self.images(channels, frames, pixels), self.images(channels, frames, pixels)
        live = x
        if temporal:
            self.add(x + self.extended(channels, frames, pixels))
            self.keep(channels, pixels)
            self.add(x + self.extended(channels, frames, pixels) + self.taps(channels, frames, pixels, 3) + 2 * x)
            self.add(x + 4 * x)
            frames, after, live = 2 * frames, 2 * x, x + 4 * x
        out = 2 * after  # half of the channels, four times the pixels
        self.add(live + (2 * out if self.fused else 4 * after + out))
        return frames
