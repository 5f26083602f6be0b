"""The tiny VAE against flashdreams' TAEHV (random weights), its encoder against a plain reading of the public one."""

import copy
import json
import re
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from flashdreams.recipes.taehv.impl import TAEHV
from limits import Allocations
from torch.utils.flop_counter import FlopCounterMode

from bench.instruments.flops import vae_cost
from engine.model.activations import tiny_decoding
from engine.model.tiny_vae import TinyVAE, TinyVAEConfig
from engine.model.vae import WAN_MEAN, WAN_STD, VAEConfig

SMALL = {"widths": (16, 8, 8, 8), "encoder_width": 8}
CONFIGS = {
    "taew2_1": TinyVAEConfig(),
    "taew2_2": TinyVAEConfig(48, patch=2, **SMALL),
    "lighttae": TinyVAEConfig(latents_mean=WAN_MEAN, latents_std=WAN_STD, **SMALL),
    "sprites": TinyVAEConfig(8, (24, 16, 12), (True, True), (True, True), encoder_width=12),
    "eight-frames": TinyVAEConfig(4, upsample_time=(True, True, True), **SMALL),
    "flat": TinyVAEConfig(4, (12, 10, 8), (False, True), (False, True), 1, encoder_width=8),
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def scattered(config):
    """Random weights with activations of order 1 all through, and pictures of which little is clamped."""
    torch.manual_seed(0)
    vae = TinyVAE(config)
    for p in vae.parameters():
        p.data = torch.randn_like(p) * 0.9 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1 * torch.randn_like(p)
    last = vae.decoder[-1]
    last.weight.data *= 0.1
    last.bias.data += 0.5
    return vae.eval()


@pytest.fixture(scope="module", params=list(CONFIGS))
def vae(request):
    return scattered(CONFIGS[request.param])


@pytest.fixture(scope="module")
def small():
    return scattered(CONFIGS["sprites"])


def latents(vae, frames, batch=1, size=(2, 3)):
    torch.manual_seed(1)
    return torch.randn(batch, vae.config.z_dim, frames, *size)


def error(got, expected):
    assert got.shape == expected.shape
    return (got - expected).abs().max().item()


@pytest.fixture(scope="module", params=["taew2_1", "lighttae", "taew2_2"])
def pair(request, tmp_path_factory):
    """Ours and flashdreams', which reads our weights as a published file, flat names and the encoder's included."""
    vae = scattered(CONFIGS[request.param])
    file = tmp_path_factory.mktemp("taehv") / "taew.pth"
    torch.save(vae.state_dict(), file)
    c = vae.config
    kind = "wan22" if request.param == "taew2_2" else "wan21"
    theirs = TAEHV(None, channels=c.widths, latent_channels=c.z_dim, patch_size=c.patch, model_type=kind,
                   use_cuda_graph=False)  # fmt: skip
    theirs.load_from_checkpoint(str(file))
    assert not any(p.is_meta for p in theirs.parameters())
    return vae, theirs


def of_theirs(vae, z):
    """Latents as their network takes them, [B, T, C, h, w]."""
    if vae.config.latents_mean is not None:
        mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (WAN_MEAN, WAN_STD))
        z = z * std + mean
    return z.transpose(1, 2)


@pytest.mark.parametrize("batch", [1, 2])
def test_decoding_equals_flashdreams(pair, batch):
    vae, theirs = pair
    z = latents(vae, 4, batch)
    expected = theirs.decode(of_theirs(vae, z)).mul(2).sub(1).transpose(1, 2)
    assert expected.shape[2] == 13
    assert (expected.abs() < 1).float().mean() > 0.9
    assert expected.std() > 0.05
    assert error(vae.decode(z), expected) <= 1e-5
    assert error(vae.reconstruct(z).clamp(-1, 1), expected) <= 1e-5


def test_streaming_equals_flashdreams_streaming(pair):
    vae, theirs = pair
    cache, kept = None, theirs.prepare_cache()
    for part in latents(vae, 6).split([1, 2, 1, 2], dim=2):
        got, cache = vae.decode_chunk(part, cache)
        expected = theirs.decode(of_theirs(vae, part), kept).mul(2).sub(1).transpose(1, 2)
        assert error(got, expected) <= 1e-5
    for mine, other in zip(cache, kept.dec_state.values(), strict=True):
        assert error(mine, other.transpose(1, 2)) <= 1e-5


def test_names_and_shapes_are_those_of_published_files():
    found = {name: tuple(p.shape) for name, p in TinyVAE(TinyVAEConfig()).state_dict().items()}
    assert len([name for name in found if name.startswith("decoder.")]) == 64
    for name, shape in {
        "decoder.1.weight": (256, 16, 3, 3), "decoder.3.conv.0.weight": (256, 512, 3, 3),
        "decoder.7.conv.weight": (256, 256, 1, 1), "decoder.8.weight": (128, 256, 3, 3),
        "decoder.13.conv.weight": (256, 128, 1, 1), "decoder.14.weight": (64, 128, 3, 3),
        "decoder.19.conv.weight": (128, 64, 1, 1), "decoder.20.weight": (64, 64, 3, 3), "decoder.22.bias": (3,),
        "encoder.0.weight": (64, 3, 3, 3), "encoder.2.conv.weight": (64, 128, 1, 1), "encoder.3.weight": (64, 64, 3, 3),
        "encoder.6.conv.4.weight": (64, 64, 3, 3), "encoder.7.conv.weight": (64, 128, 1, 1),
        "encoder.12.conv.weight": (64, 64, 1, 1), "encoder.17.weight": (16, 64, 3, 3),
    }.items():  # fmt: skip
        assert found[name] == shape


def test_every_split_gives_the_same_frames(vae):
    z, step = latents(vae, 4, batch=2), vae.config.scale_factor_temporal
    scale = vae.config.scale_factor_spatial
    whole = vae.decode(z)
    assert whole.shape == (2, 3, 1 + 3 * step, 2 * scale, 3 * scale)
    assert whole.std() > 0.05
    for split in ([1, 3], [1, 1, 2], [2, 2], [4]):
        cache, frames = None, []
        for part in z.split(split, dim=2):
            some, cache = vae.decode_chunk(part, cache)
            frames.append(some)
        assert error(torch.cat(frames, dim=2), whole) <= 1e-5
    first, cache = vae.first(z[:, :, :1])
    rest, _ = vae.steady(z[:, :, 1:], cache)  # several latents in one call
    assert error(torch.cat([first, rest], dim=2), whole) <= 1e-5
    assert error(vae.reconstruct(z).clamp(-1, 1), whole) <= 1e-5


def test_caches_have_fixed_shapes_and_start_from_zeros(vae):
    z = latents(vae, 2)
    _, first = vae.first(z[:, :, :1])
    _, second = vae.steady(z[:, :, 1:], first)
    assert [c.shape for c in first] == [c.shape for c in second]
    assert len(first) == vae.config.blocks * len(vae.config.upsample_time)
    zeros = tuple(map(torch.zeros_like, first))
    frames, following = vae.steady(z[:, :, :1], zeros)
    assert error(frames[:, :, -1:], vae.first(z[:, :, :1])[0]) <= 1e-5
    assert max(error(a, b) for a, b in zip(following, first, strict=True)) <= 1e-5


def test_steady_is_pure(small):
    z = latents(small, 2)
    _, cache = small.first(z[:, :, :1])
    kept = [c.clone() for c in cache]
    expected, following = small.steady(z[:, :, 1:], cache)
    for c in following:
        c.fill_(float("nan"))  # nothing returned shares memory with what was given
    assert all(torch.equal(c, k) for c, k in zip(cache, kept, strict=True))
    assert torch.equal(small.steady(z[:, :, 1:], cache)[0], expected)


@pytest.mark.parametrize("batch", [1, 2])
def test_fused_and_in_place_give_the_same_frames(vae, batch):
    fused = copy.deepcopy(vae)
    fused.fuse()
    assert all(torch.equal(a, b) for a, b in zip(vae.state_dict().values(), fused.state_dict().values(), strict=True))
    z = latents(vae, 3, batch)
    expected, cache = vae.first(z[:, :, :1])
    frames, mine = fused.first(z[:, :, :1])
    assert error(frames, expected) < 1e-4
    for t in (1, 2):
        expected, cache = vae.steady(z[:, :, t : t + 1], cache)
        frames, following = fused.steady(z[:, :, t : t + 1], mine, in_place=True)
        assert error(frames, expected) < 1e-4
        assert all(a is b for a, b in zip(following, mine, strict=True))
        assert max(error(a, b) for a, b in zip(mine, cache, strict=True)) < 1e-4


def test_fusing_saves_work():
    """Upsampling, growth in time and the convolution behind them are one product over the small images."""
    with torch.device("meta"):
        vae, latent = TinyVAE(TinyVAEConfig()), torch.empty(1, 16, 1, 60, 104)
        _, cache = vae.first(latent)
        counts = []
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                vae.steady(latent, cache)
            counts.append(counter.get_total_flops())
            vae.fuse()
    assert counts[1] < 0.8 * counts[0]


def test_infinity_is_not_shown_as_white(small):
    z = latents(small, 2)
    broken = copy.deepcopy(small)
    broken.decoder[-1].bias[0] = float("inf")
    frames = broken.decode(z)
    assert frames[:, 0].isnan().all()
    assert frames[:, 1:].isfinite().all()


def plainly_encoded(state, config, video):
    """All frames at once, layer by layer, from the tensors of a file: [B, 3, T, H, W] -> [B, C, T', h, w]."""
    step, batch = config.scale_factor_temporal, len(video)
    missing = -video.shape[2] % step
    video = torch.cat([video, video[:, :, -1:].repeat(1, 1, missing, 1, 1)], dim=2)
    x = ((video + 1) / 2).transpose(1, 2).flatten(0, 1)  # [B*T, ...]
    x = F.pixel_unshuffle(x, config.patch) if config.patch > 1 else x

    def convolved(name, x, **how):
        weight, bias = (state.get(f"encoder.{name}.{what}") for what in ("weight", "bias"))
        return F.conv2d(x, weight, bias, padding=1, **how)

    x, number = convolved(0, x).relu(), 2
    for double in config.upsample_space[::-1]:
        weight = state[f"encoder.{number}.conv.weight"]
        groups = weight.shape[1] // weight.shape[0]
        x = F.conv2d(x.reshape(-1, groups * x.shape[1], *x.shape[2:]), weight)
        x = convolved(number + 1, x, stride=2 if double else 1)
        for block in range(number + 2, number + 2 + config.blocks):
            frames = x.unflatten(0, (batch, -1))
            past = torch.cat([torch.zeros_like(frames[:, :1]), frames[:, :-1]], dim=1).flatten(0, 1)
            y = torch.cat([x, past], dim=1)
            for name in (0, 2):
                y = convolved(f"{block}.conv.{name}", y).relu()
            x = (convolved(f"{block}.conv.4", y) + x).relu()
        number += 2 + config.blocks
    x = convolved(number, x).unflatten(0, (batch, -1)).transpose(1, 2)
    if config.latents_mean is not None:
        x = (x - torch.tensor(config.latents_mean).view(-1, 1, 1, 1)) / torch.tensor(config.latents_std).view(
            -1, 1, 1, 1
        )
    return x


def test_encoding_equals_a_plain_reading(vae):
    step, scale = vae.config.scale_factor_temporal, vae.config.scale_factor_spatial
    torch.manual_seed(2)
    video = torch.rand(2, 3, 1 + 2 * step, 2 * scale, 3 * scale) * 2 - 1
    for frames in (1, 1 + step, 1 + 2 * step):
        expected = plainly_encoded(vae.state_dict(), vae.config, video[:, :, :frames])
        assert expected.shape[2] == 1 + frames // step
        assert expected.std() > 0.01
        assert error(vae.encode(video[:, :, :frames]), expected) <= 1e-5


def test_a_step_gives_the_last_latent_of_the_frames_so_far(vae):
    step, scale = vae.config.scale_factor_temporal, vae.config.scale_factor_spatial
    video = torch.rand(1, 3, 1 + 3 * step, 2 * scale, 2 * scale) * 2 - 1
    cache, shapes = None, set()
    for at in range(0, 1 + 3 * step, step):
        latent, cache = vae.encode_step(video[:, :, max(at - step + 1, 0) : at + 1], cache)
        shapes.add(tuple(c.shape for c in cache))
        assert error(latent, vae.encode(video[:, :, : at + 1])[:, :, -1:]) <= 1e-5
    assert len(shapes) == 1


def test_bad_shapes_are_refused(small):
    z = latents(small, 2)
    _, cache = small.first(z[:, :, :1])
    for call, said in (
        (lambda: small.first(z), "latent: got (1, 8, 2, 2, 3), expected [B, 8, 1, h, w]"),
        (lambda: small.decode(z[:, :5]), "latent: got (1, 5, 2, 2, 3), expected [B, 8, T >= 1, h, w]"),
        (lambda: small.steady(z[:, :, :1], cache[:2]), "got 2 tensors, [(1, 24, 1, 2, 3)] first, expected 6"),
        (lambda: small.steady(z[:, :, :1, :1], cache), "expected 6 tensors, [(1, 24, 1, 1, 3)] first"),
        (lambda: small.encode(torch.zeros(1, 3, 4, 8, 8)), "got (1, 3, 4, 8, 8), expected [B, 3, 1 + 4k, 4i, 4j]"),
        (lambda: TinyVAE(TinyVAEConfig(encoder_width=None)).encode(torch.zeros(1, 3, 1, 8, 8)), "got no encoder"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(said)):
            call()


@pytest.mark.parametrize(("values", "said"), [
    ({"widths": [8]}, "upsample_space: got 3 entries, expected 0, one a stage"),
    ({"upsample_time": [True]}, "upsample_time: got 1 entries, expected 3, one a stage"),
    ({"latents_mean": [0.0] * 16}, "got one of latents_mean and latents_std, expected both or neither"),
    ({"latents_mean": [0.0], "latents_std": [1.0]}, "latents_mean: got 1 entries, expected 16, one a latent channel"),
    ({"latents_mean": [0.0] * 16, "latents_std": [0.0] * 16}, "latents_std: got 0.0, expected positive numbers"),
    ({"blocks": 0}, "expected sizes of 1 to"),
    ({"blocks": 9}, "and 1 to 8 blocks"),
    ({"z_dim": 1 << 40}, "expected sizes of 1 to"),
    ({"z_dim": True}, "tiny VAE config: z_dim: got True, expected a valid integer"),
    ({"colour": 3}, "tiny VAE config: got unknown keys ['colour'], expected ['z_dim'"),
])  # fmt: skip
def test_bad_configs_are_refused(values, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        TinyVAEConfig.from_dict(values)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_survives_its_file(name):
    config = CONFIGS[name]
    assert TinyVAEConfig.from_dict(json.loads(json.dumps({"_class_name": "TinyVAE"} | asdict(config)))) == config


@pytest.mark.parametrize("steady", [False, True])
def test_counted_work_is_what_torch_counts(small, steady):
    z = latents(small, 1, size=(6, 10))
    cache = small.first(z)[1] if steady else None
    with FlopCounterMode(display=False) as counter:
        small.first(z) if cache is None else small.steady(z, cache)
    assert vae_cost(small.config, 6, 10, 4, steady).flops == counter.get_total_flops()


def test_wans_decoder_takes_25_times_the_work():
    full, tiny = (vae_cost(config, 60, 104, 2).flops for config in (VAEConfig(), TinyVAEConfig()))
    assert 24 < full / tiny < 26


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_memory_of_decoding_is_what_was_counted(vae, fused, in_place):
    vae, latent = copy.deepcopy(vae), latents(vae, 1, size=(6, 8))
    vae.fuse() if fused else None
    _, cache = vae.first(latent)
    planned = tiny_decoding(vae.config, 6, 8, torch.float32, fused=fused, in_place=in_place)
    assert sum(c.nbytes for c in cache) == planned.cache
    with Allocations(vae, cache) as counted:
        vae.steady(latent, cache, in_place)
    assert counted.peak == pytest.approx(planned.step, rel=0.05)


@pytest.mark.parametrize("batch", [1, 2])
def test_all_images_are_channels_last(vae, batch):
    """As cuDNN wants them: it would transpose others on every call."""
    vae, z, wrong = copy.deepcopy(vae), latents(vae, 3, batch), []
    vae.fuse()

    def look(module, inputs, result):
        wrong.extend(x.stride() for x in (inputs[0], result) if not x.permute(0, 2, 3, 1).is_contiguous())

    _, cache = vae.first(z[:, :, :1])
    for module in vae.decoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(look)
    cache = tuple(torch.empty_like(c).copy_(c) for c in cache)  # as a graph keeps them
    for t in (1, 2):
        _, cache = vae.steady(z[:, :, t : t + 1], cache, in_place=t == 2)
    assert not wrong


def test_trains():
    """Gradients reach every weight of the decoder, also where a picture is out of range."""
    vae = scattered(CONFIGS["sprites"])
    with torch.enable_grad():
        (vae.reconstruct(latents(vae, 3)) + 9).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in vae.decoder.parameters())
