"""The ring against a plain list of frames; attention over it against float64."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from engine.model.cache import CachedAttention, RingCache
from kernels.ring_attention import ring_attention, ring_attention_reference

LAYERS, BATCH, TOKENS, HEADS, DIM = 2, 2, 3, 2, 4
COMBINATIONS = [
    (slots, pinned, chunk)
    for slots in range(1, 9)
    for pinned in range(slots)
    for chunk in range(1, slots - pinned + 1)
]  # fmt: skip


def make(slots, pinned=0, fill=float("nan")):
    cache = RingCache(LAYERS, BATCH, slots, TOKENS, HEADS, DIM, pinned)
    cache.k.fill_(fill)
    cache.v.fill_(fill)
    return cache


def rows(numbers, layer=0):
    """Keys and values of frames whose every element says which frame and layer they are of."""
    k = torch.tensor([100.0 * layer + n for n in numbers]).repeat_interleave(TOKENS)
    k = k[None, :, None, None].expand(BATCH, -1, HEADS, DIM)
    return k, -k


def put(cache, numbers):
    for layer in range(LAYERS):
        cache.write(layer, cache.next_slot, *rows(numbers, layer))


def held(cache, layer, valid):
    """Frame numbers in the valid slots, sorted."""
    k, v = (x[:, : valid * TOKENS] for x in cache.view(layer))
    assert torch.equal(k, -v)
    frames = k.unflatten(1, (-1, TOKENS)) - 100 * layer
    numbers = frames[0, :, 0, 0, 0]
    assert torch.equal(frames, numbers[None, :, None, None, None].expand_as(frames))
    return sorted(int(n) for n in numbers)


def kept(frames, slots, pinned):
    return frames if len(frames) <= slots else sorted(frames[:pinned] + frames[pinned:][-(slots - pinned) :])


@pytest.mark.parametrize(("slots", "pinned", "chunk"), COMBINATIONS)
def test_ring_holds_the_first_pinned_frames_and_the_newest(slots, pinned, chunk):
    cache, frames = make(slots, pinned), []
    for _ in range(3 * slots // chunk + 3):
        new = list(range(len(frames), len(frames) + chunk))
        frames += new
        valid = cache.valid(chunk)
        put(cache, new)
        for layer in range(LAYERS):  # before the commit, as the chunk's own queries see it
            assert held(cache, layer, valid) == kept(frames, slots, pinned)
        cache.commit(chunk)
        assert valid == min(len(frames), slots) == cache.valid(0)
    assert 0 <= cache.next_slot < slots


def test_chunks_of_changing_length():
    cache, frames = make(7, 2), []
    for chunk in (1, 3, 2, 5, 4, 1, 3, 3, 5, 2):
        new = list(range(len(frames), len(frames) + chunk))
        frames += new
        put(cache, new)
        cache.commit(chunk)
        assert held(cache, 1, cache.valid(0)) == kept(frames, 7, 2)


@pytest.mark.parametrize(("slots", "pinned", "chunk"), [(3, 0, 3), (5, 1, 2), (8, 3, 3), (6, 1, 3), (4, 3, 1)])
@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_chunk_that_is_never_committed_leaves_no_trace(slots, pinned, chunk, before):
    cache, undisturbed = make(slots, pinned), make(slots, pinned)
    for ring in (cache, undisturbed):
        for i in range(before):
            put(ring, range(i * chunk, (i + 1) * chunk))
            ring.commit(chunk)
    put(cache, [70] * chunk)
    for layer in range(LAYERS - 1):  # the second try fails half way
        cache.write(layer, cache.next_slot, *rows([80] * chunk, layer))
    for ring in (cache, undisturbed):
        put(ring, [90] * chunk)
        ring.commit(chunk)
    assert cache.committed == undisturbed.committed
    for layer in range(LAYERS):
        valid = cache.valid(0)
        for a, b in zip(cache.view(layer), undisturbed.view(layer), strict=True):
            assert torch.equal(a[:, : valid * TOKENS], b[:, : valid * TOKENS])


def test_reset_forgets_frames_and_keeps_memory():
    cache = make(4, 1)
    put(cache, [0, 1, 2])
    cache.commit(3)
    at = cache.k.data_ptr(), cache.v.data_ptr()
    cache.reset()
    assert (cache.committed, cache.next_slot, cache.valid(2)) == (0, 0, 2)
    put(cache, [7])
    cache.commit(1)
    assert held(cache, 0, 1) == [7]
    assert (cache.k.data_ptr(), cache.v.data_ptr()) == at


def test_view_is_no_copy():
    cache = make(4)
    k, v = cache.view(1)
    assert k.shape == (BATCH, 4 * TOKENS, HEADS, DIM)
    k.fill_(5)
    v.fill_(6)
    assert (cache.k[1] == 5).all()
    assert (cache.v[1] == 6).all()
    assert cache.k[0].isnan().all()


@pytest.mark.parametrize(("slots", "pinned"), [(3, 3), (2, 5), (0, 0), (3, -1)])
def test_a_ring_needs_a_slot_to_turn_in(slots, pinned):
    with pytest.raises(ValueError, match=r"got .*expected"):
        RingCache(1, 1, slots, 1, 1, 4, pinned)


@pytest.mark.parametrize("count", [TOKENS - 1, TOKENS + 1, 5 * TOKENS])
def test_only_whole_frames_that_fit_are_written(count):
    cache = make(4)
    x = torch.zeros(BATCH, count, HEADS, DIM)
    with pytest.raises(ValueError, match=r"got .*expected whole frames"):
        cache.write(0, 0, x, x)
    assert cache.k.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "slots", "valid"), [(3, 5, 1), (6, 5, 4), (1, 7, 7), (9, 3, 2)])
def test_attention_over_the_valid_prefix(n, slots, valid, dtype):
    torch.manual_seed(0)
    q = torch.randn(BATCH, n, HEADS, 16).to(dtype)
    k, v = torch.randn(2, BATCH, slots * TOKENS, HEADS, 16).to(dtype)
    used = valid * TOKENS
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k[:, :used].double()) / 4
    exact = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v[:, :used].double())
    k[:, used:], v[:, used:] = float("nan"), float("nan")
    assert (ring_attention_reference(q.double(), k.double(), v.double(), used) - exact).abs().max() < 1e-12
    plain = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k[:, :used], v[:, :used]))).transpose(1, 2)
    out = ring_attention(q, k, v, used)
    assert out.dtype == dtype
    assert out.shape == q.shape
    allowed = 2 * (plain.double() - exact).abs().max() + 1e-7
    assert (out.double() - exact).abs().max() <= allowed


def test_key_order_does_not_matter():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 3, 2, 16), *torch.randn(2, 1, 12, 2, 16)
    order = torch.randperm(12)
    assert (ring_attention(q, k, v, 12) - ring_attention(q, k[:, order], v[:, order], 12)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("q", "k", "v", "valid"),
    [
        ((1, 3, 2, 8), (1, 6, 2, 8), (1, 5, 2, 8), 4),
        ((1, 3, 2, 8), (1, 6, 3, 8), (1, 6, 3, 8), 4),
        ((2, 3, 2, 8), (1, 6, 2, 8), (1, 6, 2, 8), 4),
        ((1, 3, 2, 8), (1, 6, 2, 8), (1, 6, 2, 8), 0),
        ((1, 3, 2, 8), (1, 6, 2, 8), (1, 6, 2, 8), 7),
    ],
)
def test_attention_refuses_what_does_not_fit(q, k, v, valid):
    with pytest.raises(ValueError, match=r"ring_attention: got .*expected"):
        ring_attention(torch.zeros(q), torch.zeros(k), torch.zeros(v), valid)


def test_attention_refuses_mixed_dtypes():
    x = torch.zeros(1, 3, 2, 8)
    with pytest.raises(ValueError, match=r"dtypes .*expected one"):
        ring_attention(x.bfloat16(), x, x, 3)


@pytest.mark.parametrize(("slots", "pinned", "chunk"), [(5, 1, 3), (4, 0, 2), (7, 2, 4)])
def test_streamed_attention_equals_attention_over_the_frames_kept(slots, pinned, chunk):
    """Chunks through the ring, wrapping inside a chunk; unused slots hold NaN all the time."""
    torch.manual_seed(0)
    total = 5 * chunk
    q, k, v = torch.randn(3, BATCH, total * TOKENS, HEADS, DIM, dtype=torch.float64)
    cache = RingCache(LAYERS, BATCH, slots, TOKENS, HEADS, DIM, pinned, dtype=torch.float64)
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    for start in range(0, total, chunk):
        now = slice(start * TOKENS, (start + chunk) * TOKENS)
        attend = CachedAttention(cache, cache.next_slot, cache.valid(chunk))
        outs = [attend(layer, q[:, now], k[:, now], v[:, now]) for layer in range(LAYERS)]
        cache.commit(chunk)
        frames = kept(list(range(start + chunk)), slots, pinned)
        index = torch.tensor([f * TOKENS + i for f in frames for i in range(TOKENS)])
        expected = ring_attention_reference(q[:, now], k[:, index], v[:, index], len(index))
        for out in outs:
            assert (out - expected).abs().max() < 1e-12
