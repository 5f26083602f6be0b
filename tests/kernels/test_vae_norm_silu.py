"""RMSNorm, SiLU and the causal cache against float64, and against the engine's own VAE layers."""

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_as_good

from engine.model.vae_layers import Past, RMSNorm
from kernels import table
from kernels.vae_norm_silu import vae_norm_silu, vae_norm_silu_reference

DTYPES = [torch.float32, torch.bfloat16]


def inputs(device, dtype, channels, frames, batch=2, height=5, width=7):
    torch.manual_seed(0)
    x, cache = (
        torch.randn(batch, channels, t, height, width).to(device, dtype, memory_format=torch.channels_last_3d)
        for t in (frames, 2)
    )
    gamma = (1 + torch.randn(channels, 1, 1, 1) / 4).to(device, dtype)
    return x, gamma, cache


def addends(x, bias, residual):
    """bias and residual for x, or None."""
    torch.manual_seed(1)
    return {
        "bias": torch.randn(x.shape[1]).to(x.device, x.dtype) if bias else None,
        "residual": torch.randn(x.shape).to(x.device, x.dtype, memory_format=torch.channels_last_3d)
        if residual
        else None,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "frames"), [(96, 4), (384, 1), (37, 2)])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("bias", "residual"), [(False, False), (True, False), (True, True), (False, True)])
def test_against_float64(device, dtype, channels, frames, first, bias, residual):
    x, gamma, cache = inputs(device, dtype, channels, frames)
    added = addends(x, bias, residual)
    if not any((bias, residual)):
        x[0, :, 0, 1, 2] = 0  # a position without any signal stays zero
    cache = None if first else cache
    wide = [None if t is None else t.double() for t in (x, gamma.flatten(), cache)]
    exact = vae_norm_silu_reference(*wide, **{name: t if t is None else t.double() for name, t in added.items()})
    found = vae_norm_silu(x, gamma, cache, **added)
    plain = vae_norm_silu_reference(x, gamma.flatten(), cache, **added)
    for one, two, three in zip(found, plain, exact, strict=True):
        assert one.dtype == dtype
        assert one.is_contiguous(memory_format=torch.channels_last_3d)
        assert_as_good(one, two, three)
    if not any((bias, residual)):
        assert not found[0][0, :, -frames, 1, 2].any()
        assert found[2] is x
    for one, two in zip(vae_norm_silu(x, gamma, cache, **added, keep=False)[:2], found[:2], strict=True):
        assert torch.equal(one, two)
    assert vae_norm_silu(x, gamma, cache, **added, keep=False)[2] is None


def test_sums_of_any_strides(device):
    """A convolution's result, and a shortcut that lies otherwise in time."""
    x, gamma, cache = inputs(device, torch.float32, 96, 3)
    added = addends(x, True, True)
    expected = vae_norm_silu(x, gamma, cache, **added)
    images = added["residual"].permute(2, 0, 1, 3, 4).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    added["residual"] = images.unflatten(0, (3, 2)).permute(1, 2, 0, 3, 4)
    assert added["residual"].stride() != x.stride()
    assert all(map(torch.equal, vae_norm_silu(x, gamma, cache, **added), expected))


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_the_cache_may_be_written_in_place(device, frames):
    x, gamma, cache = inputs(device, torch.bfloat16, 96, frames, height=40, width=9)
    out, following, _ = vae_norm_silu(x, gamma, cache)
    kept = cache.clone()
    same, in_place, _ = vae_norm_silu(x, gamma, cache, cache_out=cache)
    assert in_place is cache
    assert torch.equal(same, out)
    assert torch.equal(cache, following)
    assert not torch.equal(cache, kept)


def test_images_in_time_order_are_taken_as_they_are(device):
    """The VAE keeps [T * B, C, H, W], channels-last: as [B, C, T, H, W] its frames are channels-last, too."""
    x, gamma, cache = inputs(device, torch.float32, 96, 3)
    images = x.permute(2, 0, 1, 3, 4).contiguous().flatten(0, 1).contiguous(memory_format=torch.channels_last)
    viewed = images.unflatten(0, (3, 2)).permute(1, 2, 0, 3, 4)
    assert torch.equal(vae_norm_silu(viewed, gamma, cache)[0], vae_norm_silu(x, gamma, cache)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frames", [1, 4])
def test_reference_is_the_vae_of_the_engine(device, dtype, frames):
    batch = 2
    x, gamma, cache = inputs(device, dtype, 96, frames, batch)
    norm = RMSNorm(96).to(device, dtype)
    norm.gamma.data = gamma
    images = x.permute(2, 0, 1, 3, 4).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    for past in (None, cache) if frames == 1 else (cache,):
        state = Past(batch, None if past is None else (past,))
        expected = state.extend(F.silu(norm(images)))
        with table.use("reference"):
            found, following, _ = vae_norm_silu(x, gamma, past)
        assert torch.equal(found, expected.unflatten(0, (-1, batch)).permute(1, 2, 0, 3, 4))
        assert torch.equal(following, state.next[0])


def test_bad_input(device):
    x, gamma, cache = inputs(device, torch.float32, 32, 2)
    for call in (
        lambda: vae_norm_silu(x[0], gamma, cache),
        lambda: vae_norm_silu(x, gamma[1:], cache),
        lambda: vae_norm_silu(x, gamma, cache[:, :, 1:]),
        lambda: vae_norm_silu(x, gamma, cache.bfloat16()),
        lambda: vae_norm_silu(x, gamma, cache, cache_out=cache[:1]),
        lambda: vae_norm_silu(x, gamma, cache, bias=gamma),
        lambda: vae_norm_silu(x, gamma, cache, residual=x[:, :, :1]),
        lambda: vae_norm_silu(x, gamma, cache, residual=x.bfloat16()),
        lambda: vae_norm_silu(x, gamma, cache, residual=x.contiguous()),
        lambda: vae_norm_silu(x.contiguous(), gamma, cache),
        lambda: vae_norm_silu(x, gamma, cache.contiguous()),
        lambda: vae_norm_silu(x[:, :, :0], gamma, cache),
    ):
        with pytest.raises(ValueError, match=r"^vae_norm_silu: got .*expected"):
            call()
