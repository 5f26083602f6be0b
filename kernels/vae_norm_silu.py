"""The step between two causal convolutions of the VAE: RMSNorm over channels, SiLU, two past frames in front.

It also adds up what it normalises: the convolution before leaves its bias to it, and a residual block its shortcut.
PyTorch takes a pass for the bias, one for the residual, a normalisation, an activation, a concatenation and a copy for
the next cache. Here each frame is read once and written once (the last two twice, as the next cache). cuDNN computes
the convolution and wants channels-last memory: every tensor here is [.., C, .., H, W] in shape and [.., H, W, C] in
memory.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import described, needs_gradient, power_of_two
from kernels.launch import launch, tl, triton
from kernels.table import Variant, implementation, register

# The library divides by max(|x|, 1e-12). The tiny eps only keeps 0 at 0, as that does.
_EPS = 1e-24
_ELEMENTS = 4096  # per program: its tile of positions and channels

Result = tuple[Tensor, Tensor, Tensor | None]


def vae_norm_silu_reference(
    x: Tensor, gamma: Tensor, cache: Tensor | None, cache_out: Tensor | None = None, bias: Tensor | None = None,
    residual: Tensor | None = None, keep: bool = True,
) -> Result:  # fmt: skip
    """x [B, C, T, H, W], gamma [C], cache [B, C, 2, H, W] -> [B, C, 2 + T, H, W] (T without a cache), next cache, sum.

    bias [C] and residual (as x) are added to x first; every step is rounded to x's dtype.
    """
    x = x if bias is None else x + bias[:, None, None, None]
    x = x if residual is None else x + residual
    normed = F.rms_norm(x.permute(0, 2, 3, 4, 1), (x.shape[1],), gamma, eps=_EPS)
    y = F.silu(normed).permute(0, 4, 1, 2, 3)
    past = torch.zeros_like(x[:, :, :1]).expand(-1, -1, 2, -1, -1) if cache is None else cache
    extended = torch.cat([past, y], dim=2)
    following = extended[:, :, -2:].clone(memory_format=torch.channels_last_3d)
    if cache_out is not None:
        following = cache_out.copy_(following)
    return y if cache is None else extended, following, x if keep else None


@triton.jit(do_not_specialize=["positions"])
def _norm_silu(
    X, GAMMA, CACHE, OUT, CACHE_OUT, BIAS, RESIDUAL, SUM, positions, x_batch, x_frame, cache_batch, cache_frame,
    out_batch, out_frame, next_batch, next_frame, residual_batch, residual_frame, sum_batch, sum_frame, eps,
    FRAMES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Program (positions, b): all frames of its positions, so that CACHE_OUT may be CACHE itself.

    X, RESIDUAL (or None), SUM (or None) [B, FRAMES, positions, CHANNELS]; BIAS [CHANNELS] or None;
    CACHE (or None), CACHE_OUT [B, 2, positions, CHANNELS];
    OUT [B, 2 + FRAMES, positions, CHANNELS], without a cache [B, FRAMES, positions, CHANNELS].
    """
    batch = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    inside = (position < positions) & (channel < CHANNELS)
    at = position * CHANNELS + channel
    X += batch * x_batch
    if RESIDUAL is not None:
        RESIDUAL += batch * residual_batch
    if SUM is not None:
        SUM += batch * sum_batch
    OUT += batch * out_batch
    CACHE_OUT += batch * next_batch
    if CACHE is None:
        newest = tl.zeros([POSITIONS, BLOCK], X.dtype.element_ty)
    else:
        CACHE += batch * cache_batch
        older = tl.load(CACHE + at, mask=inside, other=0.0)
        newest = tl.load(CACHE + cache_frame + at, mask=inside, other=0.0)
        tl.store(OUT + at, older, mask=inside)
        tl.store(OUT + out_frame + at, newest, mask=inside)
        OUT += 2 * out_frame
    gamma = tl.load(GAMMA + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    if BIAS is not None:
        bias = tl.load(BIAS + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    for _ in tl.static_range(FRAMES):
        x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
        if BIAS is not None:
            x += bias
        if RESIDUAL is not None:
            x += tl.load(RESIDUAL + at, mask=inside, other=0.0).to(tl.float32)
            RESIDUAL += residual_frame
        if SUM is not None:
            tl.store(SUM + at, x.to(SUM.dtype.element_ty), mask=inside)
            SUM += sum_frame
        y = x * tl.rsqrt(tl.sum(x * x, 1) / CHANNELS + eps)[:, None] * gamma
        older = newest
        newest = (y * tl.sigmoid(y)).to(X.dtype.element_ty)
        tl.store(OUT + at, newest, mask=inside)
        X += x_frame
        OUT += out_frame
    tl.debug_barrier()  # one thread may overwrite cache elements that another thread still reads
    tl.store(CACHE_OUT + at, older, mask=inside)
    tl.store(CACHE_OUT + next_frame + at, newest, mask=inside)


def _empty(like: Tensor, frames: int) -> Tensor:
    """Like `like` but [B, C, frames, H, W], channels last in memory."""
    b, c, _, h, w = like.shape
    return torch.empty(b, frames, h, w, c, dtype=like.dtype, device=like.device).permute(0, 4, 1, 2, 3)


def vae_norm_silu_triton(
    x: Tensor, gamma: Tensor, cache: Tensor | None, cache_out: Tensor | None = None, bias: Tensor | None = None,
    residual: Tensor | None = None, keep: bool = True,
) -> Result:  # fmt: skip
    """Like vae_norm_silu_reference, but rounded once."""
    batch, channels, frames, height, width = x.shape
    out = _empty(x, frames if cache is None else frames + 2)
    following = _empty(x, 2) if cache_out is None else cache_out
    adds = bias is not None or residual is not None
    total = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) if adds and keep else None
    block = power_of_two(channels)
    tile = max(_ELEMENTS // block, 1)
    tensors = x, cache, out, following, residual, total
    strides = [(x if tensor is None else tensor).stride()[step] for tensor in tensors for step in (0, 2)]
    launch(
        _norm_silu, (-(-height * width // tile), batch), x, gamma, cache, out, following, bias, residual, total,
        height * width, *strides, _EPS, frames, channels, block, tile, num_warps=8,
    )  # fmt: skip
    if not keep:
        return out, following, None
    return out, following, total if adds else x


def _channels_last(x: Tensor) -> bool:
    return x.numel() > 0 and x[0, :, 0].permute(1, 2, 0).is_contiguous()


def vae_norm_silu(
    x: Tensor, gamma: Tensor, cache: Tensor | None, cache_out: Tensor | None = None, bias: Tensor | None = None,
    residual: Tensor | None = None, keep: bool = True,
) -> Result:  # fmt: skip
    """The next causal convolution's input: the cache's two frames, then silu(s / rms(s) * gamma).

    s is x + bias + residual; x and residual [B, C, T, H, W], bias and gamma of C elements; bias and residual may be
    missing. cache [B, C, 2, H, W]: the last two frames of the previous call's result, or None before the first frame,
    where nothing is put in front. On a GPU all are channels-last in memory. cache_out receives the next cache and may
    be the cache itself (the buffers of a CUDA graph). keep=False: s is not needed.
    Returns [B, C, 2 + T, H, W] (T frames without a cache), the next cache [B, C, 2, H, W] (zeros before the start), and
    the sum s as x, or None. Raises ValueError where shapes, dtypes or strides do not fit.
    """
    shape = (*x.shape[:2], 2, *x.shape[3:]) if x.ndim == 5 else ()
    caches = [c for c in (cache, cache_out) if c is not None]
    like_x = [] if residual is None else [residual]
    fits = (
        shape and gamma.numel() == x.shape[1] and all(c.shape == shape for c in caches)
        and all(r.shape == x.shape for r in like_x) and (bias is None or bias.shape == x.shape[1:2])
        and all(t.dtype == x.dtype for t in (*caches, *like_x))
    )  # fmt: skip
    if not fits:
        got = described(x=x, gamma=gamma, cache=cache, cache_out=cache_out, bias=bias, residual=residual)
        raise ValueError(f"vae_norm_silu: got {got}, expected x and residual [B, C, T, H, W], gamma and bias of C "
                         "elements, and caches [B, C, 2, H, W], one dtype")  # fmt: skip
    tensors = x, *like_x, *caches
    plain = needs_gradient(gamma, *tensors) or (bias is not None and needs_gradient(bias))
    call = implementation("vae_norm_silu", x.device, fits=not plain)
    if call is vae_norm_silu_triton and not all(map(_channels_last, tensors)):
        strides = ", ".join(str(t.stride()) for t in tensors)
        raise ValueError(f"vae_norm_silu: got strides {strides}, expected channels-last frames")
    return call(x, gamma.flatten(), cache, cache_out, bias, residual, keep)


def _variants() -> Iterator[Variant]:
    """The decoder's four levels of 832x480."""
    for channels, frames, height, width in (
        (384, 1, 60, 104),
        (384, 2, 120, 208),
        (192, 4, 240, 416),
        (96, 4, 480, 832),
    ):
        x = _empty(torch.empty(1, channels, 1, height, width, dtype=torch.bfloat16, device="meta"), frames)
        gamma = torch.empty(channels, dtype=torch.bfloat16, device="meta")
        shape = f"{channels} x {frames} x {height} x {width}"
        call = partial(vae_norm_silu_triton, x, gamma, _empty(x, 2))
        yield Variant(shape, call)
        yield Variant(f"{shape} + bias", partial(call, bias=gamma, keep=False))
        yield Variant(f"{shape} + bias + residual", partial(call, bias=gamma, residual=x))
    yield Variant("first 384 x 1 x 60 x 104", partial(vae_norm_silu_triton, _empty(x, 1), gamma, None))


register("vae_norm_silu", reference=vae_norm_silu_reference, triton=vae_norm_silu_triton, variants=_variants)
