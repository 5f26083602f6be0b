"""The blocks on fused kernels against the plain blocks; streams on them; FP8 against bf16."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import randomize, text_of, transformer

from engine import load
from engine.config import Runtime
from engine.loader import make_stages
from engine.model.cache import FP8, CachedAttention, RingCache
from engine.model.rope import rope_tables
from engine.presets import override
from engine.runtime.fused import Fp8Linear, FusedTransformer, Linear
from engine.runtime.stages import TorchStages

PROMPT = "a red circle moving right"
SHAPE = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 96, "text_dim": 24}  # products of 16


def case(dtype, conditioned=True, **changes):
    """A model and two chunks' worth of inputs: 2 frames of 6 tokens each."""
    model = transformer(conditioned=conditioned, **SHAPE | changes)
    model = randomize(model, 0).to(dtype)
    model.fuse()
    seed = torch.Generator().manual_seed(1)
    latents = [torch.randn(1, 8, 2, 4, 6, generator=seed).to(dtype) for _ in range(2)]
    text = model.prepare_text(text_of().to(dtype))
    condition = torch.randn(1, 12, model.config.dim, generator=seed).to(dtype) if conditioned else None
    return model, latents, text, condition


def run(runner, latents, text, condition, dtype, slots=((0, 2), (2, 4)), scalars=False):
    """Both chunks through one cache; the flow of the second."""
    config = getattr(runner, "model", runner).config
    cache = RingCache(config.num_layers, 1, 6, 6, config.num_attention_heads, config.attention_head_dim, dtype=dtype)
    if dtype != FP8:
        cache.k.fill_(float("nan")), cache.v.fill_(float("nan"))  # what nobody wrote must not matter
    for latent, (slot, valid), position in zip(latents, slots, (0, 2), strict=True):
        cos, sin = rope_tables(range(position, position + 2), 2, 3, config.attention_head_dim)
        if scalars:
            slot, valid = (torch.tensor(n, dtype=torch.int32) for n in (slot, valid))
        attend = CachedAttention(cache, slot, valid)
        t = torch.tensor([700.0])
        flow = runner(latent, t, text, cos, sin, attend, condition)
    return flow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"cross_attn_norm": False}, {"conditioned": False}], ids=str)
def test_fused_blocks_compute_what_the_plain_ones_do(dtype, changes):
    model, *given = case(dtype, **changes)
    plain = run(model, *given, dtype)
    exact = run(randomize(transformer(conditioned=changes.get("conditioned", True), **SHAPE | changes_of(changes)), 0)
                .double(), *doubles(given), torch.float64)  # fmt: skip
    for scalars in (False, True):
        fused = run(FusedTransformer(model), *given, dtype, scalars=scalars)
        error, theirs = (float((x.double() - exact).square().mean().sqrt()) for x in (fused, plain))
        assert error <= 2 * theirs + 1e-12


def changes_of(changes):
    return {key: value for key, value in changes.items() if key != "conditioned"}


def doubles(given):
    latents, text, condition = given
    return ([x.double() for x in latents], tuple(x.double() for x in text),
            None if condition is None else condition.double())  # fmt: skip


def test_fp8_products_are_near_and_the_kept_ones_untouched():
    model, *given = case(torch.bfloat16)
    plain = run(model, *given, torch.bfloat16).float()

    def error(keep):
        flow = run(FusedTransformer(model, fp8=True, keep=keep), *given, torch.bfloat16).float()
        return float((flow - plain).square().mean().sqrt() / plain.square().mean().sqrt())

    none, some, every = error(["*"]), error(["blocks.0.*", "*.ffn.*"]), error([])
    assert none < 0.01
    assert none < some < every < 0.12


def test_which_products_are_kept():
    model, *_ = case(torch.bfloat16)
    keep = ["blocks.0.attn1.to_k", "sdd.blocks.0.attn1.to_out.*", "etm.*", "*.ffn.net.2"]
    blocks = FusedTransformer(model, fp8=True, keep=keep, role="sdd").blocks
    kinds = [[type(b.qkv), type(b.out), type(b.cross_q), type(b.up), type(b.down)] for b in blocks]
    whole = sum(p.numel() for n, p in model.blocks.named_parameters() if n.endswith("weight") and p.ndim == 2)
    cross = 2 * 2 * model.config.dim**2  # text's keys and values are made once a prompt
    assert whole - cross < FusedTransformer(model, fp8=True).fp8_bytes < 1.2 * (whole - cross)
    assert FusedTransformer(model).fp8_bytes == 0
    assert kinds == [[Linear, Linear, Fp8Linear, Fp8Linear, Linear], [Fp8Linear] * 4 + [Linear]]


def test_fp8_attention_is_near():
    model, *given = case(torch.bfloat16)
    plain = run(model, *given, torch.bfloat16).float()
    for scalars in (False, True):
        flow = run(FusedTransformer(model), *given, FP8, scalars=scalars).float()
        assert 0 < float((flow - plain).square().mean().sqrt() / plain.square().mean().sqrt()) < 0.1


def test_a_chunk_that_wraps_runs_on_the_plain_blocks(causal):
    """Window 5 and chunks of 3: fused kernels write one run of rows."""
    causal = replace(causal, preset=override(causal.preset, {"window": 5}))
    models = causal.stages.models
    stages = TorchStages(models, causal.stages.vae, causal.stages.text_encoder,
                         {role: FusedTransformer(model) for role, model in models.items()})  # fmt: skip
    with replace(causal, stages=stages).stream(PROMPT) as a, causal.stream(PROMPT) as b:
        pairs = [(a.next_latent(), b.next_latent()) for _ in range(6)]
    cache = RingCache(1, 1, 5, 1, 1, 1)
    assert any(CachedAttention(cache, cache._slot_of(3 * chunk), 5).wraps(3) for chunk in range(6))
    assert all(torch.allclose(x, y, atol=1e-4) for x, y in pairs)


@pytest.mark.parametrize("options", [{"precision": "fp8"}, {"precision": "fp8", "fp8_attention": True}], ids=str)
@pytest.mark.slow
def test_fp8_streams_of_the_embedded_model_follow_its_bf16_ones(options):
    """Levels of grey, over frames that the first chunks' small differences have not yet set apart."""
    videos = []
    for chosen in ({"precision": "bf16"}, options):
        with load(**chosen).stream("a red circle moving right slowly on a gray background", frames=9) as stream:
            videos.append(np.stack(list(stream)).astype(float))
    off = np.abs(videos[0] - videos[1])
    assert 0 < off.mean() < 6


def test_refused():
    model, *_ = case(torch.float32)
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="got fp8 for plain PyTorch"):
        make_stages({"sdd": model}, None, None, cpu, Runtime(precision="fp8", eager=True))
    with pytest.raises(ValueError, match=r"fp8 attention: got torch\.float32"):
        make_stages({"sdd": model}, None, None, cpu, Runtime(fp8_attention=True))
    cache = RingCache(1, 1, 2, 6, 2, 32, dtype=FP8)
    with pytest.raises(ValueError, match="got a chunk that the fused kernels cannot write"):
        cache.write(0, 0, torch.zeros(1, 6, 2, 32), torch.zeros(1, 6, 2, 32))
