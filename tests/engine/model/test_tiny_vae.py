"""The tiny VAE against flashdreams' TAEHV decoder and against a plain reading of the public encoder, random weights."""

import pytest
import torch

from engine.model.tiny_vae import TinyVAE, TinyVAEConfig
from engine.model.vae import WAN_MEAN, WAN_STD

CONFIGS = {
    "taew2_1": TinyVAEConfig(),
    "sprites": TinyVAEConfig(8, (24, 16, 12), (True, True), (True, True), encoder_width=12),
    "taew2_2": TinyVAEConfig(48, (16, 8, 8, 8), patch=2, encoder_width=8),
    "lighttae": TinyVAEConfig(16, (16, 8, 8, 8), encoder_width=8, latents_mean=WAN_MEAN, latents_std=WAN_STD),
    "eight-frames": TinyVAEConfig(4, (8, 8, 8, 8), upsample_time=(True, True, True), encoder_width=8),
    "one-size": TinyVAEConfig(4, (12, 10, 8, 8), (False, True, False), encoder_width=8, blocks=1),
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def scattered(module):
    """Random weights with activations of order 1 all through, and a picture that is not all clamped."""
    torch.manual_seed(0)
    for p in module.parameters():
        p.data = torch.randn_like(p) * 1.2 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1 * torch.randn_like(p)
    module.decoder[-1].weight.data *= 0.2
    module.decoder[-1].bias.data += 0.5
    return module.eval()


@pytest.fixture(scope="module", params=list(CONFIGS))
def vae(request):
    return scattered(TinyVAE(CONFIGS[request.param]))


def latents(vae, frames, batch=1, size=(3, 4)):
    torch.manual_seed(1)
    return torch.randn(batch, vae.config.z_dim, frames, *size)


def test_parameters_have_the_names_and_shapes_of_taew2_1():
    vae = TinyVAE(TinyVAEConfig())
    names = {name: tuple(p.shape) for name, p in vae.named_parameters()}
    assert names["decoder.1.weight"] == (256, 16, 3, 3)
    assert names["decoder.3.conv.0.weight"] == (256, 512, 3, 3)
    assert names["decoder.13.conv.weight"] == (256, 128, 1, 1)
    assert names["decoder.22.bias"] == (3,)
    assert names["encoder.2.conv.weight"] == (64, 128, 1, 1)
    assert names["encoder.17.weight"] == (16, 64, 3, 3)
