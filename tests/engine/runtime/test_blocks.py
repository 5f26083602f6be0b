"""Blocks straight into the ring against blocks by way of separate q, k and v; 8 bits against bf16 and fp32."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import randomize, text_of, transformer

from engine import load
from engine.config import Runtime
from engine.loader import make_stages
from engine.model import cache as cache_file
from engine.model.cache import FP8, CachedAttention, RingCache
from engine.model.quantized import Fp8Linear, quantized
from engine.model.rope import rope_tables
from engine.presets import override
from engine.runtime.passes import Pass, PassKind
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
    c_f = torch.randn(1, 12, model.config.dim, generator=seed).to(dtype) if conditioned else None
    return model, latents, text, c_f


def run(runner, latents, text, c_f, dtype, slots=((0, 2), (2, 4)), scalars=False):
    """Both chunks through one cache; the flow of the second."""
    config = runner.config
    cache = RingCache(config.num_layers, 1, 6, 6, config.num_attention_heads, config.attention_head_dim, dtype=dtype)
    if dtype != FP8:
        cache.k.fill_(float("nan")), cache.v.fill_(float("nan"))  # unwritten rows must not matter
    for latent, (slot, valid), position in zip(latents, slots, (0, 2), strict=True):
        cos, sin = rope_tables(range(position, position + 2), 2, 3, config.attention_head_dim)
        if scalars:
            slot, valid = (torch.tensor(n, dtype=torch.int32) for n in (slot, valid))
        attend = CachedAttention(cache, slot, valid)
        t = torch.tensor([700.0])
        flow = runner(latent, t, text, cos, sin, attend, c_f)
    return flow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"cross_attn_norm": False}, {"conditioned": False}], ids=str)
def test_blocks_compute_the_same_straight_into_the_ring(dtype, changes):
    """Slots on the device: q, k and v go from their product into the ring, as they do where kernels run."""
    model, *inputs = case(dtype, **changes)
    plain = run(model, *inputs, dtype)
    exact = run(randomize(transformer(conditioned=changes.get("conditioned", True), **SHAPE | changes_of(changes)), 0)
                .double(), *doubles(inputs), torch.float64)  # fmt: skip
    direct = run(model, *inputs, dtype, scalars=True)
    error, theirs = (float((x.double() - exact).square().mean().sqrt()) for x in (direct, plain))
    assert error <= 2 * theirs + 1e-12


def changes_of(changes):
    return {key: value for key, value in changes.items() if key != "conditioned"}


def doubles(inputs):
    latents, text, c_f = inputs
    return ([x.double() for x in latents], tuple(x.double() for x in text),
            None if c_f is None else c_f.double())  # fmt: skip


def test_fp8_products_are_near_and_the_kept_ones_untouched():
    model, *inputs = case(torch.bfloat16)
    plain = run(model, *inputs, torch.bfloat16).float()

    def error(keep):
        flow = run(quantized(model, "fp8", keep, "sdd"), *inputs, torch.bfloat16).float()
        return float((flow - plain).square().mean().sqrt() / plain.square().mean().sqrt())

    none, some, every = error(["*"]), error(["blocks.0.*", "*.ffn.*"]), error([])
    assert none == 0
    assert none < some < every < 0.12


def test_which_products_are_kept():
    model, *_ = case(torch.bfloat16)
    keep = ["blocks.0.attn1.to_k", "sdd.blocks.0.attn1.to_out.*", "etm.*", "*.ffn.net.2"]

    def rounds(block):
        products = (block.attn1.joint, block.attn1.to_out[0], block.attn2.to_q, block.ffn.net[0].proj, block.ffn.net[2])
        return [isinstance(product, Fp8Linear) for product in products]

    blocks = quantized(model, "fp8", keep, "sdd").blocks
    assert [rounds(block) for block in blocks] == [[False, False, True, True, False], [True] * 4 + [False]]
    assert not any(rounds(model.blocks[0]))  # the original is as it was


def test_fp8_holds_its_weights_once():
    model, *_ = case(torch.bfloat16)
    small = quantized(model, "fp8", (), "sdd")
    products = [n for n, p in model.blocks.named_parameters() if n.endswith("weight") and p.ndim == 2]
    products = [n for n in products if ".attn2.to_k." not in n and ".attn2.to_v." not in n]  # made once per prompt
    whole = sum(model.blocks.get_parameter(name).numel() for name in products)
    narrow = sum(b.nbytes for b in small.blocks.buffers())
    assert whole < narrow < 1.3 * whole  # a byte per weight, and the scales
    left = {name for name, p in small.blocks.named_parameters() if p.ndim == 2}
    assert not left & set(products)
    before, after = (sum(p.nbytes for p in (*m.parameters(), *m.buffers())) for m in (model, small))
    assert after < before - whole / 2


def test_fp8_attention_is_near():
    model, *inputs = case(torch.bfloat16)
    plain = run(model, *inputs, torch.bfloat16).float()
    for scalars in (False, True):
        flow = run(model, *inputs, FP8, scalars=scalars).float()
        assert 0 < float((flow - plain).square().mean().sqrt() / plain.square().mean().sqrt()) < 0.1


@pytest.mark.parametrize("kv", [torch.float32, torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("scalars", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("batch", [1, 2])
def test_two_chunks_in_one_run(kv, scalars, batch):
    """The clean one first; its keys and values are those of a run of its own, and the second one's flow as well."""
    dtype = torch.bfloat16 if kv == FP8 else kv
    model, latents, text, c_f = case(dtype)
    latents = [latent.repeat(batch, 1, 1, 1, 1) for latent in latents]
    text = tuple(side.repeat(1, batch, 1, 1, 1) for side in text)
    c_f, tables = c_f.repeat(batch, 1, 1), [rope_tables(range(at, at + 2), 2, 3, 32) for at in (0, 2)]
    stages, kind = TorchStages({"sdd": model}, None, None), PassKind("sdd", "sdd", timed=True, conditioned=True)
    caches = [RingCache(2, batch, 6, 6, 2, 32, dtype=kv) for _ in range(2)]

    def passed(number, t):
        slot, valid = 2 * number, 2 * number + 2
        if scalars:
            slot, valid = (torch.tensor(n, dtype=torch.int32) for n in (slot, valid))
        condition = c_f if number else None
        return Pass(kind, latents[number], *tables[number], slot, valid, torch.full((batch,), t), condition)

    with torch.inference_mode():
        context, step = passed(0, 0.0), passed(1, 700.0)
        stages.run(context, caches[0], {"sdd": text})
        expected = stages.run(step, caches[0], {"sdd": text})
        found = stages.run(replace(step, context=context), caches[1], {"sdd": text})
    limit = 1e-5 if kv == torch.float32 else 3e-2
    for one, other in ((found, expected), (caches[1].k, caches[0].k), (caches[1].v, caches[0].v)):
        assert float((one.float() - other.float()).square().mean().sqrt()) < limit * float(other.float().std())


def test_a_chunk_that_wraps_goes_another_way(causal, monkeypatch):
    """Window 5 and chunks of 3: what writes straight into the ring writes one run of rows."""
    causal = replace(causal, preset=override(causal.preset, {"window": 5}))
    with causal.stream(PROMPT) as stream:
        expected = [stream.next_latent() for _ in range(6)]
    monkeypatch.setattr(cache_file, "has_kernel", lambda *_: True)
    cache = RingCache(1, 1, 5, 1, 1, 1)
    ways = {CachedAttention(cache, cache._slot_of(3 * chunk), 5).in_kernels(3) for chunk in range(6)}
    assert ways == {False, True}
    with causal.stream(PROMPT) as stream:
        assert all(torch.allclose(stream.next_latent(), latent, atol=1e-4) for latent in expected)


@pytest.mark.parametrize(
    ("plain", "options", "most"),
    [
        ("bf16", {"precision": "fp8"}, 3), ("bf16", {"precision": "fp8", "fp8_attention": True}, 3),
        ("fp32", {"precision": "int8"}, 1), ("fp32", {"precision": "int8", "eager": True}, 1),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.slow
def test_8_bit_streams_of_the_embedded_model_follow_its_others(plain, options, most):
    """Levels of grey, in most streams: of some seeds rounding decides where the first frame puts the object."""
    videos = []
    for chosen in ({"precision": plain}, options):
        pipeline = load(**chosen)
        prompt = "a red circle moving right slowly on a gray background"
        clips = [list(pipeline.stream(prompt, seed=seed, frames=9)) for seed in range(3)]
        videos.append(np.asarray(clips, dtype=float))
    off = np.abs(videos[0] - videos[1]).mean((1, 2, 3, 4))
    assert (off > 0).all()
    assert np.median(off) < most


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


@pytest.mark.parametrize(("capability", "right"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
@pytest.mark.parametrize("options", [{"precision": "fp8"}, {"fp8_attention": True}])
def test_gpus_without_e4m3_are_refused_before_weights_are_read(monkeypatch, capability, right, options):
    import engine.loader as loader

    def read(*_):
        raise LookupError("weights")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(loader, "device_of", lambda name: torch.device("cuda"))
    monkeypatch.setattr(loader, "find_parts", read)
    said = (
        "weights"
        if right
        else rf"got fp8 on a GPU of compute capability {capability[0]}\.{capability[1]}, expected 8\.9"
    )
    with pytest.raises(LookupError if right else ValueError, match=said):
        load(**options)
