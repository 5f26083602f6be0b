"""Norm, rotation and cache write against float64, and bit for bit against the engine's layers and ring."""

import pytest
import torch
from closeness import assert_as_good, error

from engine.model.cache import RingCache
from engine.model.layers import rms_unit
from engine.model.rope import apply_rope, rope_tables
from kernels import table
from kernels.qk_norm_rope_write import (
    qk_norm_rope_write,
    qk_norm_rope_write_fp8,
    qk_norm_rope_write_reference,
)

DTYPES = [torch.float32, torch.bfloat16]
# batch, tokens (height x width of one frame), heads, head dim, cache rows, first row
SHAPES = [(2, (3, 2), 3, 32, 18, 6), (1, (37, 1), 2, 96, 111, 74), (1, (3, 1), 12, 128, 12, 0)]


def inputs(device, dtype, batch, space, heads, dim):
    torch.manual_seed(0)
    tokens = space[0] * space[1]
    qkv = torch.randn(batch, tokens, 3 * heads * dim) * torch.tensor([3.0, 0.3, 1.0]).repeat_interleave(heads * dim)
    weights = 1 + torch.randn(2, heads * dim) / 4
    cos, sin = rope_tables([7], *space, dim)
    return qkv.to(device, dtype), *weights.to(device, dtype), cos.to(device), sin.to(device)


def caches(device, dtype, batch, heads, dim, rows):
    """One layer's view of a ring of two layers, NaN: a row nobody wrote shows."""
    ring = torch.full((2, 2, batch, rows, heads, dim), float("nan"), device=device, dtype=dtype)
    return ring[0, 1], ring[1, 1], ring


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(device, dtype, shape):
    batch, space, heads, dim, rows, start_row = shape
    tensors = inputs(device, dtype, batch, space, heads, dim)
    tokens = space[0] * space[1]

    def outcome(call, dtype, *tensors, row=start_row):
        k, v, ring = caches(device, dtype, batch, heads, dim, rows)
        q = call(*tensors, k, v, row)
        written = slice(start_row, start_row + tokens)
        found = torch.stack([q, k[:, written], v[:, written]])
        k[:, written] = v[:, written] = float("nan")
        assert ring.isnan().all()  # nothing else was touched
        return found

    wide = [t if t is tensors[3] or t is tensors[4] else t.double() for t in tensors]
    truth = outcome(qk_norm_rope_write_reference, torch.float64, *wide)
    plain = outcome(qk_norm_rope_write_reference, dtype, *tensors)
    found = outcome(qk_norm_rope_write, dtype, *tensors)
    for one, two, three in zip(found, plain, truth, strict=True):
        assert_as_good(one, two, three)
    for row in (torch.tensor(start_row, dtype=torch.int32), torch.tensor([start_row])):
        assert torch.equal(outcome(qk_norm_rope_write, dtype, *tensors, row=row.to(device)), found)


@pytest.mark.parametrize("setting", ["reference", "triton"])
@pytest.mark.parametrize("row", ["host", "device"])
@pytest.mark.parametrize("first", [0, 1, 3, 5])
def test_the_last_heads_have_a_cache_of_their_own(device, setting, row, first):
    """Both caches hold what one cache of all heads would, each from its own row on, and nothing else is touched."""
    heads, dim, space, batch = 5, 32, (3, 2), 2
    tensors = inputs(device, torch.bfloat16, batch, space, heads, dim)
    k, v, _ = caches(device, torch.bfloat16, batch, heads, dim, 12)
    wide, few = (caches(device, torch.bfloat16, batch, count, dim, rows)
                 for count, rows in ((first, 18), (heads - first, 12)))  # fmt: skip
    at, local_at = (n if row == "host" else torch.tensor(n, dtype=torch.int32, device=device) for n in (12, 4))
    with table.use(setting):
        q = qk_norm_rope_write(*tensors, k, v, 6)
        found = qk_norm_rope_write(*tensors, *wide[:2], at, 1e-6, (*few[:2], local_at))
    assert torch.equal(found, q)
    for side, whole in enumerate((k, v)):
        assert torch.equal(wide[side][:, 12:18], whole[:, 6:12, :first])
        assert torch.equal(few[side][:, 4:10], whole[:, 6:12, first:])
        wide[side][:, 12:18] = few[side][:, 4:10] = float("nan")
    assert wide[2].isnan().all()
    assert few[2].isnan().all()


@pytest.mark.parametrize("row", ["host", "device"])
def test_fp8(device, row):
    batch, space, heads, dim, rows, pitch, start_row = 2, (33, 2), 3, 32, 140, 144, 67
    tokens = space[0] * space[1]
    tensors = inputs(device, torch.bfloat16, batch, space, heads, dim)
    # V's last head is scaled so low that it must saturate, to +-448 and not to NaN.
    scales = torch.tensor([[0.03, 0.02, 0.01], [0.02, 0.01, 0.03], [0.02, 0.01, 0.001]], device=device)
    k16, v16, _ = caches(device, torch.float64, batch, heads, dim, rows)
    q16 = qk_norm_rope_write_reference(
        *(t.double() for t in tensors[:3]), *tensors[3:], k16, v16, start_row
    )  # fmt: skip
    span = slice(start_row, start_row + tokens)
    truths = [q16, k16[:, span], v16[:, span]]
    outcomes = []
    for setting in ("reference", "triton"):
        k = torch.full((batch, rows, heads, dim), float("nan"), device=device).to(torch.float8_e4m3fn)
        v = torch.full((batch, heads, dim, pitch), float("nan"), device=device).to(torch.float8_e4m3fn)
        at = start_row if row == "host" else torch.tensor(start_row, dtype=torch.int32, device=device)
        with table.use(setting):
            q = qk_norm_rope_write_fp8(*tensors, k, v, *scales, at)
        assert q.dtype == torch.float8_e4m3fn
        found = [q.float(), k.float()[:, span], v.float()[..., span].permute(0, 3, 1, 2)]
        assert k.float()[:, :start_row].isnan().all()
        assert k.float()[:, span.stop :].isnan().all()
        assert v.float()[..., :start_row].isnan().all()
        assert v.float()[..., span.stop :].isnan().all()
        assert found[2][:, :, 2].abs().max() == 448
        outcomes.append([x.double() * s.double()[:, None] for x, s in zip(found, scales, strict=True)])
    limit = 448 * scales.double()[..., None]
    for plain, found, truth, most in zip(*outcomes, truths, limit, strict=True):
        assert_as_good(found, plain, truth.clamp(-most, most))


def test_rows_beyond_the_cache_are_dropped(device):
    """Only a row on the device can be that wrong: nobody may look at it."""
    tensors = inputs(device, torch.float32, 1, (4, 1), 2, 32)
    for start_row, written in ((4, slice(4, 6)), (-2, slice(0, 2))):
        k, v, ring = caches(device, torch.float32, 3, 2, 32, 6)
        row = torch.tensor(start_row, dtype=torch.int32, device=device)
        qk_norm_rope_write(*tensors, k[1:2], v[1:2], row)
        assert torch.cat([k[1, written], v[1, written]]).isfinite().all()
        k[1, written] = v[1, written] = float("nan")
        assert ring.isnan().all()
        wide, few = (caches(device, torch.float32, 3, 1, 32, 6) for _ in "wf")
        args = *(x[1:2] for x in wide[:2]), torch.zeros_like(row), 1e-6, (*(x[1:2] for x in few[:2]), row)
        with table.use("triton"):
            qk_norm_rope_write(*tensors, *args)
        assert few[0][1, written].isfinite().all()
        few[0][1, written] = few[1][1, written] = float("nan")
        assert few[2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_as_the_layers_of_the_engine_do(device, dtype):
    heads, dim, space = 4, 32, (5, 3)
    tensors = qkv, q_weight, k_weight, cos, sin = inputs(device, dtype, 1, space, heads, dim)
    expected = RingCache(1, 1, 3, 15, heads, dim, dtype=dtype, device=device)
    q, k, v = qkv.chunk(3, dim=-1)
    q, k = ((rms_unit(x) * w).unflatten(-1, (heads, dim)) for x, w in ((q, q_weight), (k, k_weight)))
    q, k = apply_rope(torch.cat([q, k], dim=2), cos, sin).chunk(2, dim=2)
    expected.write(0, 2, k, v.unflatten(-1, (heads, dim)))
    for setting in ("reference", "triton"):
        cache = RingCache(1, 1, 3, 15, heads, dim, dtype=dtype, device=device)
        with table.use(setting):
            found = qk_norm_rope_write(*tensors, *cache.view(0), 30)
        pairs = [(found, q), (cache.k, expected.k), (cache.v, expected.v)]
        if setting == "reference":
            assert all(torch.equal(one, two) for one, two in pairs)
        else:  # the order of a sum may move its last bit, and with it a rounding
            assert all(error(one, two) <= 2 * torch.finfo(dtype).eps * float(two.abs().max()) for one, two in pairs)
            assert dtype == torch.float32 or all((one != two).float().mean() < 0.01 for one, two in pairs)


def test_bad_input(device):
    tensors = qkv, q_weight, k_weight, cos, sin = inputs(device, torch.float32, 1, (4, 1), 2, 32)
    k, v, _ = caches(device, torch.float32, 1, 2, 32, 12)
    k8, v8 = k.to(torch.float8_e4m3fn), torch.zeros(1, 2, 32, 16, device=device).to(torch.float8_e4m3fn)
    scales = torch.ones(3, 2, device=device)
    for call in (
        lambda: qk_norm_rope_write(*tensors, k, v, 9),
        lambda: qk_norm_rope_write(*tensors, k, v, -1),
        lambda: qk_norm_rope_write(*tensors, k, v, torch.tensor(1.0)),
        lambda: qk_norm_rope_write(*tensors, k, v[:, 1:], 0),
        lambda: qk_norm_rope_write(*tensors, k.transpose(1, 2).contiguous().transpose(1, 2), v, 0),
        lambda: qk_norm_rope_write(qkv[..., :-1], q_weight, k_weight, cos, sin, k, v, 0),
        lambda: qk_norm_rope_write(qkv, q_weight.double(), k_weight, cos, sin, k, v, 0),
        lambda: qk_norm_rope_write(qkv, q_weight, k_weight, cos[1:], sin, k, v, 0),
        lambda: qk_norm_rope_write(qkv, q_weight, k_weight, cos.double(), sin.double(), k, v, 0),
        lambda: qk_norm_rope_write(qkv.repeat(2, 1, 1)[::2, :, :], q_weight, k_weight, cos[:, ::2], sin, k, v, 0),
        lambda: qk_norm_rope_write(*tensors, k, v, 0, 1e-6, (k, v, 0)),  # more heads than qkv has
        lambda: qk_norm_rope_write(
            *tensors,
            k[:, :, :1].contiguous(),
            v[:, :, :1].contiguous(),
            0,
            1e-6,
            (k[:, :, 1:].contiguous(), v[:, :, 1:].contiguous(), 9),
        ),
        lambda: qk_norm_rope_write(
            *tensors, k[:, :, :1].contiguous(), v[:, :, :1].contiguous(), 0, 1e-6, (k[:, :, 1:], v[:, :, 1:], 0)
        ),
        lambda: qk_norm_rope_write_fp8(*tensors, k, v8, *scales, 0),
        lambda: qk_norm_rope_write_fp8(*tensors, k8, v8[..., :12], *scales, 0),
        lambda: qk_norm_rope_write_fp8(*tensors, k8, v8, *scales[:, :1], 0),
    ):
        with pytest.raises(ValueError, match=r"^qk_norm_rope_write(_fp8)?: got .*expected"):
            call()
