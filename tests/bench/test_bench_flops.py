"""Counted FLOPs and bytes against torch's own counter on the real modules, and against diffusers' model."""

from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import UMT5Config, UMT5EncoderModel

from bench.instruments.flops import (
    META,
    Cost,
    bidirectional_cost,
    chunk_cost,
    steady_index,
    stream_costs,
    text_cost,
    total,
    transformer_cost,
    vae_cost,
)
from engine.config import LocalHeads, Reuse, TransformerConfig
from engine.generators import family_of
from engine.loader import assemble
from engine.model.transformer import WanTransformer
from engine.model.vae import VAE, VAEConfig
from engine.presets import PRESETS
from engine.runtime.stages import TorchStages
from engine.stream import Pipeline, PythonStream

CONFIG = TransformerConfig(
    num_attention_heads=3, attention_head_dim=16, in_channels=8, out_channels=8, text_dim=24, freq_dim=32, ffn_dim=80,
    num_layers=2,
)  # fmt: skip
ROWS = 12


class MetaNoise:
    def draw(self, chunk, count, shape):
        return torch.empty(count, *shape, device=META)


def meta_pipeline(name: str, joined: bool = False, **changes) -> Pipeline:
    preset = replace(PRESETS[name], **changes)
    family = family_of(preset)
    with META:
        models = {role: WanTransformer(CONFIG, family.conditioned(role)) for role in family.roles()}
        for model in models.values():
            model.order_heads(preset.local_heads)
    stages = TorchStages(models, None, None, join_context=joined)
    return assemble(stages, CONFIG, preset, torch.float32, META, height=64, width=96)


def counted(call) -> float:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("joined", "name"),
    [
        pytest.param(joined, name, id=f"{'joined' if joined else 'alone'}-{name}",
                     marks=pytest.mark.thorough if joined and name not in ("greedy", "self-forcing") else ())
        for joined in (False, True) for name in PRESETS
    ],
)  # fmt: skip
@pytest.mark.slow
def test_chunks_of_every_preset(joined, name):
    pipeline = meta_pipeline(name, joined)
    stream = PythonStream(pipeline, torch.empty(1, ROWS, CONFIG.text_dim, device=META), MetaNoise(), None, None)
    for cost in stream_costs(pipeline, 5, ROWS):
        assert total(cost).flops == counted(stream.next_latent)


@pytest.mark.parametrize(
    "changes",
    [{"chunk": 2}, {"window": 1}, {"window": 8}, {"stop_after": 2}, {"reuse": Reuse((3,), 1, 0)},
     {"reuse": Reuse((2, 4), 0, 0)}],
)  # fmt: skip
@pytest.mark.slow
def test_chunks_of_changed_presets(changes):
    pipeline = meta_pipeline("greedy", **changes)
    stream = PythonStream(pipeline, torch.empty(1, ROWS, CONFIG.text_dim, device=META), MetaNoise(), None, None)
    for cost in stream_costs(pipeline, 4, ROWS):
        assert total(cost).flops == counted(stream.next_latent)


@pytest.mark.slow
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "joined"])
def test_chunks_with_local_heads(joined):
    """Layers without, with some and with local heads alone; the ring goes round once."""
    few = tuple(tuple(range(layer % (CONFIG.num_attention_heads + 1))) for layer in range(CONFIG.num_layers))
    pipeline = meta_pipeline("longlive", joined, heads=LocalHeads(6, 3, few))
    stream = PythonStream(pipeline, torch.empty(1, ROWS, CONFIG.text_dim, device=META), MetaNoise(), None, None)
    whole = stream_costs(meta_pipeline("longlive", joined), 6, ROWS)
    for cost, other in zip(stream_costs(pipeline, 6, ROWS), whole, strict=True):
        assert total(cost).flops == pytest.approx(counted(stream.next_latent), rel=1e-12)
        assert total(cost).flops <= total(other).flops
    assert total(cost).bytes < total(other).bytes
    assert total(cost).attention < total(other).attention


@pytest.mark.parametrize("name", [*PRESETS])
def test_cost_is_steady_from_the_steady_chunk_on(name):
    pipeline = meta_pipeline(name)
    index = steady_index(pipeline.preset)
    costs = stream_costs(pipeline, index + 4, ROWS)
    assert costs[index] == costs[-1]
    assert chunk_cost(pipeline, ROWS) == costs[index]


def test_a_cache_pass_has_its_own_line():
    costs = chunk_cost(meta_pipeline("self-forcing"), ROWS)
    assert costs["dit"] == costs["dit_context"] * 4
    assert "dit_context" not in chunk_cost(meta_pipeline("diagonal"), ROWS)


def test_a_short_step_lacks_the_blocks_that_it_leaves_out():
    full, short = (chunk_cost(meta_pipeline("self-forcing", reuse=reuse), ROWS) for reuse in (None, Reuse((3,), 1, 0)))
    blocks = meta_pipeline("self-forcing").stages.models["dit"].blocks
    assert short["dit_context"] == full["dit_context"]
    saved = full["dit"].bytes - short["dit"].bytes
    assert saved > 4 * 0.9 * sum(p.numel() for p in blocks[1].parameters() if p.ndim > 1)  # and its keys and values
    assert short["dit"].attention / full["dit"].attention == 7 / 8


def test_a_joined_pass_saves_the_weights_of_one_pass_and_a_head():
    alone, joined = (chunk_cost(meta_pipeline("self-forcing", join), ROWS) for join in (False, True))
    assert joined.keys() == {"dit", "dit+context"}
    assert joined["dit"] == alone["dit"] * (3 / 4)
    one = alone["dit_context"]
    assert 1.9 < joined["dit+context"].flops / one.flops < 2
    weights = sum(p.numel() for p in meta_pipeline("self-forcing").stages.models["dit"].blocks.parameters())
    assert one.bytes * 2 - joined["dit+context"].bytes == pytest.approx(4 * weights, rel=0.2)


def test_attention_of_the_greedy_family_is_the_papers():
    w, steps, length = 5, 3, 24
    pipeline = meta_pipeline("greedy", window=w + 1, steps=((1000.0, 750.0, 500.0),))
    assert total(chunk_cost(pipeline, ROWS)).attention == (
        4 * CONFIG.dim * CONFIG.num_layers * length**2 * ((w + 1) + 2 + 3 * steps)
    )


@pytest.mark.parametrize("steady", [False, True])
@pytest.mark.parametrize("config", [
    VAEConfig(),
    VAEConfig(base_dim=8, dim_mult=(1, 2, 2), num_res_blocks=1, temperal_downsample=(True, True),
              scale_factor_spatial=4),
])  # fmt: skip
def test_vae(config, steady):
    with META:
        vae = VAE(config)
    latent = torch.empty(1, config.z_dim, 1, 6, 10, device=META)
    cache = vae.first(latent)[1] if steady else None
    expected = counted(lambda: vae.first(latent) if cache is None else vae.steady(latent, cache))
    assert vae_cost(config, 6, 10, 4, steady).flops == expected


def test_decoding_follows_the_chunk():
    pipeline, config = meta_pipeline("self-forcing"), VAEConfig()
    first, steady = (vae_cost(config, 8, 12, 4, s) for s in (False, True))
    assert chunk_cost(pipeline, ROWS, config)["vae"] == steady * 3
    assert chunk_cost(pipeline, ROWS, config, index=0)["vae"] == steady * 2 + first


def test_text():
    config = UMT5Config(
        vocab_size=20, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
    )  # fmt: skip
    config._attn_implementation = "eager"  # torch's counter overlooks a processor's fused attention
    encoder = UMT5EncoderModel(config).eval()
    with META:
        model = WanTransformer(CONFIG)
    ids = torch.ones(1, ROWS, dtype=torch.int64)
    of_encoder = counted(lambda: encoder(ids, attention_mask=torch.ones_like(ids)))
    of_model = counted(lambda: model.prepare_text(torch.empty(1, ROWS, CONFIG.text_dim, device=META)))
    assert text_cost(CONFIG, ROWS, 2, 4, encoder).flops == of_encoder + 2 * of_model
    assert text_cost(CONFIG, ROWS, 1, 4, None).flops == of_model


def test_bidirectional_video_is_what_diffusers_computes():
    with META:
        model = WanTransformer3DModel(**{name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__})
    latent = torch.empty(1, 8, 5, 8, 12, device=META)
    given = {"encoder_hidden_states": torch.empty(1, ROWS, 24, device=META), "return_dict": False}
    once = counted(lambda: model(latent, torch.empty(1, device=META), **given))
    # What diffusers recomputes every step and this engine once a prompt.
    text = text_cost(CONFIG, ROWS, 1, 4, None).flops
    assert bidirectional_cost(meta_pipeline("greedy"), 5, ROWS, 10).flops == 20 * (once - text)
    assert bidirectional_cost(meta_pipeline("greedy"), 5, ROWS, 10, guidance=False).flops == 10 * (once - text)


def test_bytes_are_weights_cache_and_latents():
    frames, tokens, keys, d, size = 1, 24, 96, CONFIG.dim, 2
    with META:
        model = WanTransformer(CONFIG)
    skipped = ("to_k", "to_v", "text_embedder")  # cross-attention's: paid once a prompt
    names = [
        name for name, p in model.named_parameters()
        if p.ndim > 1 and "table" not in name and not any("attn2" in name and s in name for s in skipped[:2])
        and skipped[2] not in name
    ]  # fmt: skip
    weights = sum(dict(model.named_parameters())[name].numel() for name in names)
    cache = 2 * CONFIG.num_layers * d * (keys + frames * tokens + ROWS)
    latents = 2 * tokens * 4 * 8
    cost = transformer_cost(CONFIG, frames, tokens, keys, ROWS, size)
    assert cost.bytes == size * (weights + cache + latents)


def test_costs_add_up():
    assert Cost(1, 2, 3) + Cost(10, 20, 30) * 2 == Cost(21, 42, 63)
    assert total({}) == Cost()
