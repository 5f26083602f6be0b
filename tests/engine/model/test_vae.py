"""The streaming VAE against diffusers' AutoencoderKLWan (random weights) and against a recorded decoder."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_as_good
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file

import engine.model.vae_layers
from engine.model.vae import VAE, VAEConfig, frames_to_uint8, uint8_to_frames
from engine.model.vae_layers import ResidualBlock, phases_of, upsampled_convolution
from kernels.vae_norm_silu import _channels_last, vae_norm_silu

DATA = Path(__file__).parents[2] / "data" / "causal"
STATISTICS = {"latents_mean": [0.3, -0.2, 0.1, 0.5], "latents_std": [1.5, 0.7, 2.0, 1.1]}
CONFIGS = {
    "wan": {"base_dim": 8, "z_dim": 4, **STATISTICS},
    "wide-decoder": {"base_dim": 8, "decoder_base_dim": 16, "z_dim": 4, "num_res_blocks": 1, **STATISTICS},
    "tiny": {
        "base_dim": 32,
        "z_dim": 8,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [True, True],
        "latents_mean": [0.1 * i - 0.4 for i in range(8)],
        "latents_std": [0.8 + 0.2 * i for i in range(8)],
        "scale_factor_spatial": 4,
    },
    "odd": {"base_dim": 6, "z_dim": 4, "dim_mult": [1, 2, 2, 3], "num_res_blocks": 1, **STATISTICS},
    "images": {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False],
        "scale_factor_spatial": 2,
        "scale_factor_temporal": 1,
        **STATISTICS,
    },
    "twice-in-time": {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True],
        "scale_factor_spatial": 4,
        "scale_factor_temporal": 2,
        **STATISTICS,
    },
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request):
    """Ours and diffusers' with the same random weights, activations of order 1 all through."""
    torch.manual_seed(0)
    reference = AutoencoderKLWan(**CONFIGS[request.param]).eval()
    for name, p in reference.named_parameters():
        if name.endswith("gamma"):
            p.data = 1 + 0.2 * torch.randn_like(p)
        elif p.ndim > 1:
            p.data = torch.randn_like(p) * 1.2 / p[0].numel() ** 0.5
        else:
            p.data = 0.1 * torch.randn_like(p)
    vae = VAE(VAEConfig.from_dict(dict(reference.config)))
    vae.load_state_dict(reference.state_dict())
    return vae, reference


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(1)
    return VAE(VAEConfig.from_dict(CONFIGS["tiny"]))


def statistics(vae):
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)


def latents(vae, frames, batch=1, height=5, width=4):
    return torch.randn(batch, vae.config.z_dim, frames, height, width)


def error(got, expected):
    assert got.shape == expected.shape
    return (got - expected).abs().max().item()


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["conv3d", "stacked"])
def test_decode_equals_diffusers_for_every_split(pair, limit, monkeypatch):
    vae, reference = pair
    monkeypatch.setattr(engine.model.vae_layers, "STACK_LIMIT", limit)
    z = latents(vae, 4, batch=2)
    mean, std = statistics(vae)
    expected = reference.decode(z * std + mean).sample
    assert expected.std() > 0.1
    assert error(vae.decode(z), expected) <= 1e-5
    for split in ([1, 1, 1, 1], [1, 3], [1, 2, 1], [2, 2], [3, 1]):
        cache, frames = None, []
        for part in z.split(split, dim=2):
            some, cache = vae.decode_chunk(part, cache)
            frames.append(some)
        assert error(torch.cat(frames, dim=2), expected) <= 1e-5
    # several latents in one steady call
    frames, cache = vae.first(z[:, :, :1])
    assert error(torch.cat([frames, vae.steady(z[:, :, 1:], cache)[0]], dim=2), expected) <= 1e-5


def test_encode_equals_diffusers(pair):
    vae, reference = pair
    step, scale = vae.config.scale_factor_temporal, vae.config.scale_factor_spatial
    mean, std = statistics(vae)
    for k in (0, 2):
        video = torch.rand(2, 3, 1 + 4 * k, 3 * scale, 4 * scale) * 2 - 1
        expected = (reference.encode(video).latent_dist.mode() - mean) / std
        assert expected.shape[2] == 1 + 4 * k // step
        assert error(vae.encode(video), expected) <= 1e-5


def test_shapes_are_fixed_and_start_from_zeros(pair):
    vae, _ = pair
    z = latents(vae, 3)
    step, scale = vae.config.scale_factor_temporal, vae.config.scale_factor_spatial
    frames, first = vae.first(z[:, :, :1])
    assert frames.shape == (1, 3, 1, 5 * scale, 4 * scale)
    frames, second = vae.steady(z[:, :, 1:2], first)
    assert frames.shape == (1, 3, step, 5 * scale, 4 * scale)
    assert [c.shape for c in first] == [c.shape for c in second]
    assert all(c.shape[2] == 2 and not c[:, :, 0].any() for c in first)


def test_state_belongs_to_the_stream(tiny):
    a, b = latents(tiny, 4), latents(tiny, 4)
    alone_a, alone_b = tiny.decode(a), tiny.decode(b)
    state_a = state_b = None
    for t in range(4):
        frames_a, state_a = tiny.decode_chunk(a[:, :, t : t + 1], state_a)
        frames_b, state_b = tiny.decode_chunk(b[:, :, t : t + 1], state_b)
        span = slice(max(4 * t - 3, 0), 4 * t + 1)
        assert torch.equal(frames_a, alone_a[:, :, span])
        assert torch.equal(frames_b, alone_b[:, :, span])


def test_steady_is_pure(tiny, monkeypatch):
    z = latents(tiny, 2)
    _, cache = tiny.first(z[:, :, :1])
    kept = [c.clone() for c in cache]
    expected, following = tiny.steady(z[:, :, 1:], cache)
    for c in following:
        c.fill_(float("nan"))  # nothing returned shares memory with what was given
    assert all(torch.equal(c, k) for c, k in zip(cache, kept, strict=True))

    def fail(*args):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(tiny.decoder.up_blocks[2], "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            tiny.steady(z[:, :, 1:], cache)
    assert torch.equal(tiny.steady(z[:, :, 1:], cache)[0], expected)


@pytest.mark.parametrize("channels", [(6, 3), (8, 4), (96, 40)])
def test_four_phases_are_a_convolution_over_upsampled_images(channels):
    conv = torch.nn.Conv2d(*channels, 3, padding=1).double()
    x = torch.randn(2, channels[0], 5, 4, dtype=torch.float64)
    expected = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    got = upsampled_convolution(x, phases_of(conv.weight), conv.bias)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert error(got, expected) < 1e-12


def test_phases_in_bf16_err_no_more_than_the_convolution_does():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(96, 48, 3, padding=1).bfloat16()
    x = torch.randn(2, 96, 12, 10).bfloat16()
    upsampled = F.interpolate(x, scale_factor=2.0, mode="nearest")
    exact = copy.deepcopy(conv).double()(upsampled.double())
    plain = F.conv2d(upsampled, conv.weight, padding=1) + conv.bias[:, None, None]  # as cuDNN does it
    assert_as_good(upsampled_convolution(x, phases_of(conv.weight), conv.bias), plain, exact)


def test_fusing_leaves_the_weights_as_they_are(pair):
    vae = copy.deepcopy(pair[0])
    vae.fuse()
    assert all(torch.equal(a, b) for a, b in zip(vae.state_dict().values(), pair[0].state_dict().values(), strict=True))


def test_no_convolution_between_two_norms_adds_its_bias(pair, monkeypatch):
    """cuDNN would add it in a pass of its own. The others have few channels, or lie behind no norm."""
    vae = copy.deepcopy(pair[0])
    vae.fuse()
    with_bias = []

    def spy(what):
        inner = getattr(F, what)

        def convolve(x, weight, bias=None, *args, **options):
            with_bias.append((what, weight.shape[0])) if bias is not None else None
            return inner(x, weight, bias, *args, **options)

        monkeypatch.setattr(F, what, convolve)

    z = latents(vae, 2)
    _, cache = vae.first(z[:, :, :1])
    spy("conv2d"), spy("conv3d")
    vae.steady(z[:, :, 1:], cache)
    decoder = vae.decoder
    blocks = [m for m in decoder.modules() if isinstance(m, ResidualBlock)]
    shortcuts = sum(not isinstance(block.conv_shortcut, torch.nn.Identity) for block in blocks)
    temporal = sum(getattr(m, "temporal", False) for m in decoder.modules())
    # Beside them post_quant_conv, conv_out, and attention's first product.
    assert len(with_bias) == shortcuts + temporal + 3


@pytest.mark.parametrize("batch", [1, 2])
def test_fused_and_in_place_give_the_same_frames(pair, batch):
    """Norm, SiLU and cache as one operation, caches moved on where they lie: as the two of them run on a GPU."""
    vae, _ = pair
    fused = copy.deepcopy(vae)
    fused.fuse()
    z = latents(vae, 4, batch)
    expected, cache = vae.first(z[:, :, :1])
    frames, mine = fused.first(z[:, :, :1])
    mine = tuple(part.clone() for part in mine)  # of a first call they are partly views of zeros
    assert error(frames, expected) < 1e-4
    for t in range(1, 4):
        expected, cache = vae.steady(z[:, :, t : t + 1], cache)
        frames, following = fused.steady(z[:, :, t : t + 1], mine, in_place=True)
        assert error(frames, expected) < 1e-4
        assert all(a is b for a, b in zip(following, mine, strict=True))
        assert max(error(a, b) for a, b in zip(mine, cache, strict=True)) < 1e-4
    scale = vae.config.scale_factor_spatial
    video = torch.rand(batch, 3, 1 + vae.config.scale_factor_temporal, 4 * scale, 5 * scale) * 2 - 1
    assert error(fused.encode(video), vae.encode(video)) < 1e-4


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["conv3d", "stacked"])
def test_the_kernel_gets_channels_last_frames(pair, batch, limit, monkeypatch):
    """On a GPU it refuses others; the reference, which runs here, takes any layout."""
    vae = copy.deepcopy(pair[0])
    vae.fuse()
    monkeypatch.setattr(engine.model.vae_layers, "STACK_LIMIT", limit)
    seen = []

    def spy(x, gamma, cache, cache_out, bias, residual, keep):
        seen.append([_channels_last(t) for t in (x, cache, cache_out, residual) if t is not None])
        return vae_norm_silu(x, gamma, cache, cache_out, bias, residual, keep)

    monkeypatch.setattr(engine.model.vae_layers, "vae_norm_silu", spy)
    z = latents(vae, 3, batch)
    _, cache = vae.first(z[:, :, :1])
    for t in (1, 2):
        _, cache = vae.steady(z[:, :, t : t + 1], cache, in_place=t == 2)
    assert len(seen) > 9
    assert all(map(all, seen))


def test_cache_of_any_layout(tiny):
    z = latents(tiny, 2, batch=2)
    _, cache = tiny.first(z[:, :, :1])
    plain = tuple(c.contiguous() for c in cache)
    assert error(tiny.steady(z[:, :, 1:], plain)[0], tiny.steady(z[:, :, 1:], cache)[0]) <= 1e-5


def wan_to_diffusers(name, blocks_per_level=3):
    """Decoder keys of Wan's own repository -> diffusers'."""

    def upsamples(match):
        level, index = divmod(int(match[1]), blocks_per_level + 1)
        layer = "upsamplers.0." if index == blocks_per_level else f"resnets.{index}."
        return f"up_blocks.{level}.{layer}"

    for pattern, replacement in (
        (r"^conv2\.", "post_quant_conv."),
        (r"decoder\.conv1\.", "decoder.conv_in."),
        (r"head\.0\.", "norm_out."),
        (r"head\.2\.", "conv_out."),
        (r"middle\.0\.", "mid_block.resnets.0."),
        (r"middle\.1\.", "mid_block.attentions.0."),
        (r"middle\.2\.", "mid_block.resnets.1."),
        (r"upsamples\.(\d+)\.", upsamples),
        (r"residual\.0\.", "norm1."),
        (r"residual\.2\.", "conv1."),
        (r"residual\.3\.", "norm2."),
        (r"residual\.6\.", "conv2."),
        (r"shortcut\.", "conv_shortcut."),
    ):
        name = re.sub(pattern, replacement, name)
    return name


def test_recorded_wan_decoder():
    recorded = json.loads((DATA / "mask_vae.json").read_text())["vae"]
    config = VAEConfig(
        base_dim=recorded["dim"],
        z_dim=recorded["z_dim"],
        dim_mult=tuple(recorded["dim_mult"]),
        num_res_blocks=recorded["num_res_blocks"],
        # the file lists the decoder's order, which is that of upsampling: the same flags reversed
        temperal_downsample=tuple(recorded["temperal_downsample"]),
    )
    with torch.device("meta"):
        vae = VAE(config)
    weights = load_file(DATA / "vae_decoder_wan_keys.safetensors")
    missing, extra = vae.load_state_dict(
        {wan_to_diffusers(k): v for k, v in weights.items()}, strict=False, assign=True
    )
    assert not extra
    assert all(name.startswith(("encoder.", "quant_conv.")) for name in missing)
    data = load_file(DATA / "mask_vae.safetensors")
    assert error(vae.decode(data["vae/z"]), data["vae/frames"].float().clamp(-1, 1)) <= 1e-3  # kept as float16


def test_full_width_names_and_shapes_on_meta():
    with torch.device("meta"):
        ours, reference = VAE(VAEConfig()), AutoencoderKLWan()
    assert VAEConfig.from_dict(dict(reference.config)) == ours.config
    shapes = {name: p.shape for name, p in ours.state_dict().items()}
    assert shapes == {name: p.shape for name, p in reference.state_dict().items()}
    frames, cache = ours.first(torch.empty(1, 16, 1, 60, 104, device="meta"))
    assert frames.shape == (1, 3, 1, 480, 832)
    assert len(cache) == 32


def test_meta_then_assign(tiny):
    with torch.device("meta"):
        vae = VAE(tiny.config)
        vae.first(torch.empty(1, 8, 1, 4, 4))
    vae.load_state_dict(tiny.state_dict(), assign=True)
    z = latents(vae, 2)
    assert torch.equal(vae.decode(z), tiny.decode(z))


def test_bfloat16_is_as_close_as_diffusers():
    torch.manual_seed(0)
    reference = AutoencoderKLWan(**CONFIGS["tiny"]).eval()
    vae = VAE(VAEConfig.from_dict(CONFIGS["tiny"]))
    vae.load_state_dict(reference.state_dict())
    z = latents(vae, 3)
    mean, std = statistics(vae)
    exact = vae.decode(z)
    allowed = (reference.bfloat16().decode((z * std + mean).bfloat16()).sample.float() - exact).abs().max().item()
    frames = vae.bfloat16().decode(z)
    assert frames.dtype == torch.bfloat16
    assert error(frames.float(), exact) <= 2 * allowed + 1e-3
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    assert vae.encode(video).dtype == torch.float32


def test_uint8_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 2, 8, 16, 1).repeat(1, 1, 1, 1, 3)
    frames = uint8_to_frames(pixels)
    assert frames.shape == (1, 3, 2, 8, 16)
    assert frames.min() == -1
    assert frames.max() == 1
    assert torch.equal(frames_to_uint8(frames), pixels)
    nearest = torch.tensor([-2.0, 0.49 / 127.5 - 1, 0.51 / 127.5 - 1, 2.0]).view(1, 1, 1, 2, 2).repeat(1, 3, 1, 1, 1)
    assert frames_to_uint8(nearest)[0, 0, :, :, 0].tolist() == [[0, 0], [1, 255]]


@pytest.mark.parametrize(
    "change",
    [
        {"is_residual": True},
        {"patch_size": 2},
        {"attn_scales": [1.0]},
        {"latents_mean": [0.0]},
        {"scale_factor_spatial": 16},
        {"temperal_downsample": [True]},
        {"latents_std": [0.0] * 8},
        {"block_out_channels": [64]},
    ],
)
def test_other_architectures_are_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}.*got|got.*{next(iter(change))}") as raised:
        VAEConfig.from_dict({**CONFIGS["tiny"], **change})
    assert "expected" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_library_keys_of_the_config_are_ignored():
    extra = {
        "_class_name": "AutoencoderKLWan",
        "_diffusers_version": "0.35",
        "dropout": 0.1,
        "is_residual": False,
    }
    assert VAEConfig.from_dict({**CONFIGS["tiny"], **extra}) == VAEConfig.from_dict(CONFIGS["tiny"])


def test_bad_input(tiny):
    _, cache = tiny.first(latents(tiny, 1))
    for call in (
        lambda: tiny.first(latents(tiny, 2)),
        lambda: tiny.first(torch.zeros(1, 16, 1, 5, 4)),
        lambda: tiny.steady(latents(tiny, 0), cache),
        lambda: tiny.steady(latents(tiny, 1), cache[:-1]),
        lambda: tiny.steady(latents(tiny, 1), ()),
        lambda: tiny.steady(latents(tiny, 1, width=6), cache),
        lambda: tiny.decode(latents(tiny, 0)),
        lambda: tiny.encode(torch.zeros(1, 3, 4, 16, 16)),
        lambda: tiny.encode(torch.zeros(1, 3, 0, 16, 16)),
        lambda: tiny.encode(torch.zeros(1, 3, 5, 16, 18)),
        lambda: tiny.encode(torch.zeros(1, 4, 5, 16, 16)),
        lambda: tiny.encode(torch.zeros(3, 5, 16, 16)),
        lambda: uint8_to_frames(torch.zeros(1, 2, 8, 8, 3)),
    ):
        with pytest.raises(ValueError, match=r"got .*expected"):
            call()
