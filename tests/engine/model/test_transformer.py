"""The transformer against diffusers' WanTransformer3DModel and against recorded public forwards."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from tiny import CPU, dense, latents_of, reference_of, text_of, transformer

from bench.instruments.recordings import model_config
from engine.config import TransformerConfig
from engine.model.layers import RMSNorm, dense_attention, rms_unit
from engine.model.rope import rope_tables
from engine.model.transformer import WanTransformer
from engine.weights.checkpoint import load_transformer
from engine.weights.sources import open_source

DATA = Path(__file__).parents[2] / "data" / "causal"


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def forward(model, latent, t, text, mask=None, c_f=None, positions=None):
    _, ph, pw = model.config.patch_size
    height, width = latent.shape[3] // ph, latent.shape[4] // pw
    cos, sin = rope_tables(positions or range(latent.shape[2]), height, width, model.config.attention_head_dim)
    kv = model.prepare_text(text)
    return model(latent, t, kv, cos, sin, dense_attention(mask), c_f)


def close(got, expected, tolerance=2e-5):
    """Relative to the size of what is expected, which must not be nothing."""
    scale = expected.abs().max()
    assert scale > 0.1
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * max(1.0, float(scale))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch_size": (1, 1, 1)},
        {"patch_size": (1, 2, 3)},
        {"num_attention_heads": 3, "attention_head_dim": 32, "num_layers": 3},
        {"cross_attn_norm": False},
        {"attention_head_dim": 10, "text_dim": 7, "freq_dim": 64, "ffn_dim": 5},
        {"eps": 1e-2},
    ],
    ids=str,
)
def test_bidirectional_forward_equals_diffusers(changes):
    model = transformer(3, **changes)
    latent, text, t = latents_of(2, 3), text_of(2, dim=model.config.text_dim), torch.tensor([937.5, 12.25])
    expected = reference_of(model)(latent, t, text, return_dict=False)[0]
    close(forward(model, latent, t, text), expected)


def test_other_channels_out_than_in():
    model = transformer(4, out_channels=3)
    latent, text, t = latents_of(1, 2), text_of(), torch.tensor([500.0])
    close(forward(model, latent, t, text), reference_of(model)(latent, t, text, return_dict=False)[0])


def test_full_width_equals_diffusers():
    """Wan2.1-1.3B's width, two layers, few tokens."""
    torch.manual_seed(0)
    config = TransformerConfig(num_layers=2)
    assert (config.dim, config.ffn_dim, config.num_attention_heads) == (1536, 8960, 12)
    given = {name: getattr(config, name) for name in config.__dataclass_fields__}
    reference = WanTransformer3DModel(**given).eval()
    model = load_state(config, reference.state_dict())
    latent, text = torch.randn(1, 16, 2, 4, 6), torch.zeros(1, 32, 4096)
    text[:, :9] = torch.randn(1, 9, 4096)
    t = torch.tensor([833.3333])
    close(forward(model, latent, t, text), reference(latent, t, text, return_dict=False)[0])


def load_state(config, state):
    with torch.device("meta"):
        model = WanTransformer(config)
    model.load_state_dict(state, assign=True)
    return model.eval()


def test_a_timestep_a_frame():
    model, latent, text = transformer(5), latents_of(2, 4), text_of(2)
    ts = [1000.0, 0.0, 625.0, 31.5]
    expected, hidden = dense(model, latent, ts, text, [0, 1, 2, 3])
    close(forward(model, latent, torch.tensor([ts, ts]), text), expected)
    equal = forward(model, latent, torch.full((2, 4), 625.0), text)
    assert torch.equal(equal, forward(model, latent, torch.full((2,), 625.0), text))
    close(equal, reference_of(model)(latent, torch.full((2,), 625.0), text, return_dict=False)[0])
    kv = model.prepare_text(text)
    state, _ = model.encode(latent, torch.tensor([ts, ts]), kv, *rope_tables(range(4), 2, 3, 16), dense_attention())
    close(state, hidden)


def test_positions_are_the_tables():
    model, latent, text = transformer(6), latents_of(1, 3), text_of()
    expected, _ = dense(model, latent, [500.0] * 3, text, [7, 0, 300])
    close(forward(model, latent, torch.tensor([500.0]), text, positions=[7, 0, 300]), expected)
    assert (forward(model, latent, torch.tensor([500.0]), text) - expected).abs().max() > 1e-3


def test_padding_of_the_text_takes_part():
    """Rows are zero before the text MLP and attended to: fewer of them is another prompt."""
    model, latent, t = transformer(7), latents_of(1, 2), torch.tensor([500.0])
    text = text_of(rows=16)
    assert (forward(model, latent, t, text) - forward(model, latent, t, text[:, :8])).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_low_precision_is_as_good_as_diffusers(dtype):
    model, latent, text, t = transformer(8), latents_of(1, 3), text_of(), torch.tensor([750.0])
    exact = forward(model, latent, t, text)
    theirs = reference_of(model).to(dtype)(latent.to(dtype), t, text.to(dtype), return_dict=False)[0]
    model.to(dtype)
    ours = forward(model, latent.to(dtype), t, text.to(dtype))
    assert ours.dtype == dtype
    # Norms and modulation run in bfloat16 here, as in the public streaming code, in float32 in diffusers.
    assert (ours - exact).square().mean().sqrt() <= 3 * (theirs - exact).square().mean().sqrt()


def test_temporal_feature():
    model, teacher = transformer(9, conditioned=True), transformer(0)
    teacher.load_state_dict({k: v for k, v in model.state_dict().items() if k != "condition_proj.weight"})
    latent, text, t = latents_of(2, 2), text_of(2), torch.tensor([500.0, 250.0])
    c_f = 3 * torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1))
    plain = forward(teacher, latent, t, text)
    assert torch.equal(forward(model, latent, t, text), plain)  # c_0 = 0
    normed = c_f.double() / (c_f.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    product = (normed @ model.condition_proj.weight.double().T).float()
    reference = reference_of(model)
    reference.patch_embedding.register_forward_hook(
        lambda module, given, out: out + product.transpose(1, 2).unflatten(2, out.shape[2:])
    )
    expected = reference(latent, t, text, return_dict=False)[0]
    assert (expected - plain).abs().max() > 1e-2
    close(forward(model, latent, t, text, c_f=c_f), expected)
    model.condition_proj.weight.data.zero_()
    assert torch.equal(forward(model, latent, t, text, c_f=c_f), plain)
    with pytest.raises(ValueError, match=r"got c_f, expected none"):
        forward(teacher, latent, t, text, c_f=c_f)


def test_a_new_student_is_its_teacher():
    weight = WanTransformer(transformer(0).config, conditioned=True).condition_proj.weight
    assert (weight == 0).all()


@pytest.fixture(scope="module")
def recorded():
    config = model_config(json.loads((DATA / "cases.json").read_text())["model_config"])
    model = load_transformer(config, open_source(DATA / "model_selfforcing_keys.safetensors"), torch.float32, CPU)
    tensors = load_file(DATA / "mask_vae.safetensors")
    text = load_file(DATA / "cases.safetensors")["text_embeds"]
    return model, tensors, text


def window_mask(frames, chunk, local):
    """Frame q sees frame k up to the end of its own chunk; with a window, only the `local` last of those."""
    key, end = torch.arange(frames), (torch.arange(frames)[:, None] // chunk + 1) * chunk
    return (key < end) & ((key >= end - local) | (local < 0))


def expand(mask, tokens):
    return mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


MASKS = ["chunk1_local-1_t0", "chunk1_local4_t0", "chunk3_local-1_t0", "chunk3_local-1_t625", "chunk3_local6_t0"]


@pytest.mark.parametrize("name", MASKS)
def test_recorded_block_causal_forward(recorded, name):
    model, tensors, text = recorded
    chunk, local, t = (int(part.lstrip("chunkloat")) for part in name.split("_"))
    x = tensors["mask/x"].transpose(1, 2)
    mask = expand(window_mask(9, chunk, local), 12)
    got = forward(model, x, torch.tensor([float(t)]), text, mask)
    close(got, tensors[f"mask/{name}"].transpose(1, 2))


def test_recorded_timestep_a_frame(recorded):
    model, tensors, text = recorded
    got = forward(
        model, tensors["mask/x"].transpose(1, 2), tensors["mask/per_frame_t"], text, expand(window_mask(9, 3, -1), 12)
    )
    close(got, tensors["mask/chunk3_per_frame_t"].transpose(1, 2))


def test_recorded_teacher_forcing_forward(recorded):
    """Clean frames, then noisy ones at the same positions: a noisy chunk sees itself and the clean chunks before."""
    model, tensors, text = recorded
    both = torch.cat([tensors["mask/clean_x"], tensors["mask/x"]], dim=1).transpose(1, 2)
    clean = window_mask(9, 3, -1)
    same = torch.tensor([[q // 3 == k // 3 for k in range(9)] for q in range(9)])
    top = torch.cat([clean, torch.zeros_like(clean)], dim=1)
    mask = torch.cat([top, torch.cat([clean & ~same, same], dim=1)])
    t = torch.tensor([[0.0] * 9 + [625.0] * 9])
    got = forward(model, both, t, text, expand(mask, 12), positions=[*range(9), *range(9)])
    close(got[:, :, 9:], tensors["mask/teacher_forcing_t625"].transpose(1, 2))


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 1e-2])
def test_rms_norm_uses_the_eps_it_is_given(eps):
    """On inputs as small as eps's root a wrong eps shows; full-size activations would hide it."""
    torch.manual_seed(0)
    x = torch.randn(4, 7, 32) * eps**0.5
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    assert (rms_unit(x, eps) - exact).abs().max() < 1e-6
    norm = RMSNorm(32, eps)
    norm.weight.data = torch.randn(32)
    assert (norm(x) - exact * norm.weight.double()).abs().max() < 1e-6
    other = {1e-6: 1e-5, 1e-5: 1e-6, 1e-2: 1e-6}[eps]
    assert (rms_unit(x, other) - exact).abs().max() > 1e-2


def test_rms_norm_rounds_before_its_weight():
    torch.manual_seed(0)
    x = torch.randn(16, 32).bfloat16()
    norm = RMSNorm(32, 1e-6).bfloat16()
    norm.weight.data = torch.randn(32).bfloat16()
    expected = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).bfloat16() * norm.weight
    assert torch.equal(norm(x), expected)


def test_eps_reaches_every_norm():
    model = transformer(0, eps=1e-3)
    found = [m.eps for m in model.modules() if hasattr(m, "eps")]
    # The block's own for two layer norms, one with weights, four of queries and keys; and the last one.
    assert found == [1e-3] * (2 * 6 + 1)


@pytest.mark.parametrize(
    "given",
    [
        {"image_dim": 1280},
        {"added_kv_proj_dim": 64},
        {"pos_embed_seq_len": 514},
        {"patch_size": (2, 2, 2)},
        {"qk_norm": "layer_norm"},
        {"attention_head_dim": 7},
        {"hidden_dim": 3},
    ],
    ids=str,
)
def test_other_architectures_are_refused(given):
    with pytest.raises(ValueError, match=r"transformer: got .*"):
        TransformerConfig.from_dict(given)


def test_config_is_read_as_diffusers_writes_it():
    reference = reference_of(transformer(0))
    assert TransformerConfig.from_dict(dict(reference.config)) == transformer(0).config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_autocast_chooses_the_dtypes(dtype, grad):
    """As in training with bf16: weights and activations of several dtypes meet, as in PyTorch's own operations."""
    model, t = transformer(3), torch.tensor([500.0])
    latent, text, tables = latents_of(1, 2), text_of(), rope_tables(range(2), 2, 3, 16)
    exact = model(latent, t, model.prepare_text(text), *tables, dense_attention())
    model = model.to(dtype).requires_grad_(grad)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        flow = model(latent.to(dtype), t, model.prepare_text(text.to(dtype)), *tables, dense_attention())
        if grad:
            flow.float().sum().backward()
    assert (flow.float() - exact).square().mean() < 1e-3 * exact.square().mean()
    if grad:
        assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("weight"))
