"""ring_attention and ring_attention_fp8 against float64: ragged lengths, every head size, NaN in later rows."""

from contextlib import nullcontext

import pytest
import torch
from closeness import assert_as_good
from torch.nn.functional import scaled_dot_product_attention

import kernels.stream_k_attention
from kernels import table
from kernels.qk_norm_rope_write import qk_norm_rope_write, qk_norm_rope_write_fp8
from kernels.ring_attention import HEAD_DIMS, ring_attention, ring_attention_reference
from kernels.ring_attention_fp8 import E4M3, ring_attention_fp8, ring_attention_fp8_reference


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(device, n, rows, heads, head_dim, valid_rows, batch=1, dtype=torch.bfloat16):
    """q, k, v; k and v are NaN from row `valid_rows` on."""
    q = torch.randn(batch, n, heads, head_dim, device=device).to(dtype)
    k, v = torch.randn(2, batch, rows, heads, head_dim, device=device).to(dtype)
    k[:, valid_rows:], v[:, valid_rows:] = float("nan"), float("nan")
    return q, k, v


def plain(q, k, v, valid_rows):
    q, k, v = (x.transpose(1, 2) for x in (q, k[:, :valid_rows], v[:, :valid_rows]))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2)


def log_sum(q, k, valid_rows):
    return (torch.einsum("bqhd,bkhd->bhqk", q.double(), k[:, :valid_rows].double()) * q.shape[-1] ** -0.5).logsumexp(-1)


# On a GPU also at full size: 832x480, three and four latent frames of keys.
FULL = [(1560, 6240, 12, 128, 4680, 1), (3120, 6240, 12, 64, 6240, 1)] if torch.cuda.is_available() else []
SHAPES = [
    # n, rows, heads, head_dim, valid_rows, batch
    (37, 100, 2, 32, 100, 1),
    (37, 300, 2, 64, 256, 1),
    (200, 300, 1, 128, 299, 1),
    (1, 300, 3, 16, 1, 1),
    (130, 400, 2, 32, 129, 2),
    (128, 128, 1, 128, 128, 1),
    (130, 200, 5, 32, 150, 1),  # without a GPU 10 tiles for 8 programs
    (130, 100, 4, 16, 99, 1),  # 8 tiles for them: none is shared
    *FULL,
]


@pytest.mark.parametrize(("n", "rows", "heads", "head_dim", "valid_rows", "batch"), SHAPES)
def test_attention_is_as_good_as_pytorchs(device, n, rows, heads, head_dim, valid_rows, batch):
    q, k, v = make(device, n, rows, heads, head_dim, valid_rows, batch)
    truth = ring_attention_reference(q.double(), k.double(), v.double(), valid_rows)
    found, lse = ring_attention(q, k, v, torch.tensor(valid_rows, dtype=torch.int32, device=device), return_lse=True)
    assert found.dtype == q.dtype
    assert_as_good(found, plain(q, k, v, valid_rows), truth)
    assert lse.dtype == torch.float32
    assert (lse - log_sum(q, k, valid_rows)).abs().max() < 1e-4
    assert torch.equal(ring_attention(q, k, v, valid_rows), found)


@pytest.mark.parametrize("setting", ["auto", "reference"])
def test_the_result_goes_where_it_is_wanted(device, setting):
    q, k, v = make(device, 37, 100, 2, 32, 90)
    both = torch.full((2, 37, 2, 32), float("nan"), dtype=q.dtype, device=device)
    narrow = make_fp8(device, 37, 100, 2, 32, 90, E4M3)
    other = torch.full_like(both, float("nan"), dtype=torch.bfloat16)
    with table.use(setting) if setting != "auto" else nullcontext():
        for call, case, out in ((ring_attention, (q, k, v), both), (ring_attention_fp8, narrow, other)):
            expected = call(*case, 90)
            found = call(*case, 90, out=out[1:])
            assert found.data_ptr() == out[1].data_ptr()
            assert torch.equal(out[1:], expected)
            assert out[0].isnan().all()
            for wrong in (out[1:, :5], out[1:].double(), out[1:].transpose(1, 2).contiguous().transpose(1, 2)):
                with pytest.raises(ValueError, match=r"got out .*expected"):
                    call(*case, 90, out=wrong)


@pytest.mark.parametrize(("n", "heads", "head_dim", "batch"), [(37, 2, 32, 2), (150, 3, 64, 1), (1, 2, 128, 1)])
def test_some_heads_of_wider_tensors(device, n, heads, head_dim, batch):
    """q and out are slices of the heads of others, without a copy: the rest of `out` stays as it is."""
    q, k, v = make(device, n, 200, heads, head_dim, 130, batch)
    expected = ring_attention(q, k, v, 130)
    wide, out = (torch.full((batch, n, heads + 3, head_dim), float("nan"), dtype=q.dtype, device=device) for _ in "qo")
    own = slice(2, 2 + heads)
    wide[:, :, own] = q
    ring_attention(wide[:, :, own], k, v, 130, out=out[:, :, own])
    assert torch.equal(out[:, :, own], expected)
    assert out[:, :, :2].isnan().all()
    assert out[:, :, own.stop :].isnan().all()
    for x, where in ((wide[:, :, own], torch.empty_like(q)), (q, out[:, :, own])):  # one of them alone
        assert torch.equal(ring_attention(x, k, v, 130, out=where), expected)


@pytest.mark.parametrize("programs", [1, 3, 5, 40])
def test_any_number_of_programs_gives_the_same(device, programs, monkeypatch):
    """Tiles done alone, begun or ended by another program, and shared by many; programs without work."""
    monkeypatch.setattr(kernels.stream_k_attention, "multiprocessors", lambda device: programs)
    q, k, v = make(device, 150, 600, 2, 32, 530)
    truth = ring_attention_reference(q.double(), k.double(), v.double(), 530)
    found, lse = ring_attention(q, k, v, 530, return_lse=True)
    assert_as_good(found, plain(q, k, v, 530), truth)
    assert (lse - log_sum(q, k, 530)).abs().max() < 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_one_graph_serves_every_state_of_the_ring(device):
    """Captured once, replayed for other valid_rows: bit for bit the result of a fresh call."""
    q, k, v = make(device, 1560, 6240, 12, 128, 6240)
    valid_rows = torch.tensor([1560], dtype=torch.int32, device=device)
    ring_attention(q, k, v, valid_rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ring_attention(q, k, v, valid_rows)
    for rows in (1, 1560, 3121, 6240):
        valid_rows.fill_(rows)
        graph.replay()
        assert torch.equal(found, ring_attention(q, k, v, rows))


def test_large_scores_do_not_overflow(device):
    q, k, v = make(device, 20, 260, 1, 32, 260)
    q, k = 30 * q, 30 * k
    truth = ring_attention_reference(q.double(), k.double(), v.double(), 260)
    assert_as_good(ring_attention(q, k, v, 260), plain(q, k, v, 260), truth)


def test_a_strided_query_is_handled_and_strided_keys_are_refused(device):
    q, k, v = make(device, 20, 64, 4, 32, 64)
    assert torch.equal(ring_attention(q[:, ::2], k, v, 64), ring_attention(q[:, ::2].contiguous(), k, v, 64))
    with pytest.raises(ValueError, match=r"ring_attention: got k with strides .*expected it contiguous"):
        ring_attention(q[:, :, ::2], k[:, :, ::2], v[:, :, ::2], 64)


def test_two_halves_merge_by_their_lse(device):
    """What LSE is for: attention over parts of the keys, put together again."""
    q, k, v = make(device, 37, 200, 2, 32, 200)
    truth = ring_attention_reference(q.double(), k.double(), v.double(), 200)
    parts = [ring_attention(q, k[:, a:b].contiguous(), v[:, a:b].contiguous(), b - a, return_lse=True)
             for a, b in ((0, 130), (130, 200))]  # fmt: skip
    share = torch.stack([lse for _, lse in parts]).softmax(0).transpose(2, 3)[..., None]
    merged = sum(w * out.float() for w, (out, _) in zip(share, parts, strict=True))
    assert_as_good(merged, plain(q, k, v, 200), truth)


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 32), (torch.bfloat16, 24)])
def test_what_the_kernel_does_not_do_pytorch_does(device, dtype, head_dim):
    assert head_dim not in HEAD_DIMS or dtype == torch.float32
    q, k, v = make(device, 9, 40, 2, head_dim, 33, dtype=dtype)
    truth = ring_attention_reference(q.double(), k.double(), v.double(), 33)
    for valid_rows in (33, torch.tensor([33], dtype=torch.int32, device=device)):
        found, lse = ring_attention(q, k, v, valid_rows, return_lse=True)
        assert_as_good(found, plain(q, k, v, 33), truth)
        assert (lse - log_sum(q, k, 33)).abs().max() < 1e-4


@pytest.mark.parametrize("valid_rows", [torch.tensor([3, 4], dtype=torch.int32), torch.tensor(3)])
def test_valid_rows_are_one_int32(device, valid_rows):
    q, k, v = make(device, 4, 16, 1, 32, 16)
    with pytest.raises(ValueError, match=r"ring_attention: got valid_rows .*expected one int32"):
        ring_attention(q, k, v, valid_rows.to(device))


def make_fp8(device, n, rows, heads, head_dim, valid_rows, query_dtype, batch=1):
    """q, k, v_t, scales per head that use e4m3's range; NaN from row `valid_rows` on."""
    q, k, v = (torch.randn(batch, m, heads, head_dim, device=device) for m in (n, rows, rows))
    spread = torch.linspace(0.5, 2.0, heads, device=device)[:, None]
    q, k, v = q * spread, k / spread, v * spread
    scales = tuple(x.abs().amax((0, 1, 3)) / 448 for x in (q, k, v))
    q8, k8, v8 = ((x / s[:, None]).to(E4M3) for x, s in zip((q, k, v), scales, strict=True))
    pitch = -(-rows // 16) * 16
    v_t = torch.full((batch, heads, head_dim, pitch), float("nan"), device=device).to(E4M3)
    v_t[..., :valid_rows] = v8.permute(0, 2, 3, 1)[..., :valid_rows]
    k8.view(torch.uint8)[:, valid_rows:] = 0x7F
    return q8 if query_dtype == E4M3 else q.to(query_dtype), k8, v_t, *scales


def plain_fp8(q, k, v_t, q_scale, k_scale, v_scale, valid_rows):
    """The same arithmetic in PyTorch: e4m3 products, weights rounded to e4m3 once a row's largest is 2^8."""
    if q.dtype != E4M3:
        q = (q.float() / q_scale[:, None]).clamp(-448, 448).to(E4M3)
    scale = (q_scale * k_scale * q.shape[-1] ** -0.5)[:, None, None]
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k[:, :valid_rows].float()) * scale
    weights = 256 * (scores - scores.amax(-1, keepdim=True)).exp()
    out = torch.einsum("bhqk,bhdk->bqhd", weights.to(E4M3).float(), v_t[..., :valid_rows].float())
    return out / weights.sum(-1).transpose(1, 2)[..., None] * v_scale[:, None]


@pytest.mark.parametrize("query_dtype", [E4M3, torch.bfloat16])
@pytest.mark.parametrize(("n", "rows", "heads", "head_dim", "valid_rows", "batch"), [
    (37, 100, 2, 32, 100, 1), (37, 300, 2, 64, 256, 2), (140, 300, 1, 128, 299, 1), (1, 90, 3, 32, 1, 1), *FULL,
])  # fmt: skip
def test_fp8_attention(device, n, rows, heads, head_dim, valid_rows, batch, query_dtype):
    case = make_fp8(device, n, rows, heads, head_dim, valid_rows, query_dtype, batch)
    truth = ring_attention_fp8_reference(*case, valid_rows)
    found, lse = ring_attention_fp8(*case, torch.tensor(valid_rows, dtype=torch.int32, device=device), return_lse=True)
    assert found.dtype == torch.bfloat16
    assert_as_good(found, plain_fp8(*case, valid_rows), truth, floor=2**-8)  # the result itself is rounded to bf16
    assert lse.shape == (batch, heads, n)
    with table.use("reference"):
        assert_as_good(ring_attention_fp8(*case, valid_rows), plain_fp8(*case, valid_rows), truth, floor=2**-8)


@pytest.mark.slow
def test_fp8_attention_reads_what_the_writer_left(device):
    """Two chunks through qk_norm_rope_write_fp8, beside the bf16 pair of writer and reader; the rest is NaN."""
    heads, head_dim, n, rows = 2, 32, 37, 112
    width = heads * head_dim
    weight, one = torch.ones(width, device=device).bfloat16(), torch.ones(heads, device=device)
    angles = torch.arange(n, device=device)[:, None] * torch.logspace(0, -2, head_dim // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    wide = [torch.full((1, rows, heads, head_dim), float("nan"), device=device).bfloat16() for _ in range(2)]
    narrow = wide[0].to(E4M3), wide[1].permute(0, 2, 3, 1).contiguous().to(E4M3)
    for start_row in (0, n):
        qkv = torch.randn(1, n, 3 * width, device=device).bfloat16()
        q = qk_norm_rope_write(qkv, weight, weight, cos, sin, *wide, start_row)
        q8 = qk_norm_rope_write_fp8(qkv, weight, weight, cos, sin, *narrow, one, one, one, start_row)
        expected = ring_attention(q, *wide, start_row + n).float()
        found = ring_attention_fp8(q8, *narrow, one, one, one, start_row + n).float()
        assert (found - expected).square().mean().sqrt() < 0.08 * expected.square().mean().sqrt()


@pytest.mark.parametrize(("change", "match"), [
    (lambda c: (c[0].float(), *c[1:]), "dtypes"),
    (lambda c: (c[0], c[1], c[2][..., :-8], *c[3:]), "v_t"),
    (lambda c: (*c[:3], c[3][:1], *c[4:]), "q_scale"),
    (lambda c: (*c[:5], c[5].double()), "v_scale"),
])  # fmt: skip
def test_fp8_attention_refuses_what_does_not_fit(device, change, match):
    case = make_fp8(device, 5, 32, 2, 32, 32, E4M3)
    with pytest.raises(ValueError, match=rf"ring_attention_fp8: got {match}.*expected"):
        ring_attention_fp8(*change(case), 32)
