"""From the fused q, k, v product to attention's operands: RMSNorm of q and k, rotation, K and V into their cache rows.

Both norms go over the full width, before the head split. They are rounded to the working dtype before and after the
weight, as published; the rotation of interleaved pairs is float32. The kernel reads qkv once and writes q, k and v
once, where PyTorch takes a dozen passes. Rows are contiguous from `start_row`: the caller handles a chunk that wraps.
The last heads may have a cache of their own, with another first row.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.checks import described, needs_gradient, power_of_two
from kernels.launch import launch, tl, triton
from kernels.quantize import E4M3_MAX, to_e4m3
from kernels.rms_norm import rms_norm_reference
from kernels.table import Variant, implementation, register

StartRow = int | Tensor  # the first cache row to write: a number, or an int32 scalar on the device, read at replay
LocalCache = tuple[Tensor, Tensor, StartRow]  # K, V [B, rows, heads, d] of the last heads, and their first row
_V_TOKENS = 64  # tokens per tile of V, which is written transposed


def _rotated(x: Tensor, weight: Tensor, heads: int, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMSNorm over x [B, n, dim], split into heads, pairs rotated: [B, n, heads, d] in x's dtype."""
    normed = rms_norm_reference(x, weight, eps)
    wide = normed.to(torch.promote_types(x.dtype, torch.float32))
    even, odd = wide.unflatten(-1, (heads, -1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def _row_indices(start_row: StartRow, count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device) + start_row


def qk_norm_rope_write_reference(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor,
    start_row: StartRow, eps: float = 1e-6, local: LocalCache | None = None,
) -> Tensor:  # fmt: skip
    """qkv [B, n, 3 * dim]; cos, sin [n, d / 2]; caches [B, rows, H, d], written -> rotated q [B, n, H, d].

    With `local`, k_cache and v_cache hold all heads but the last ones, which local's hold.
    """
    parts = [(k_cache, v_cache, start_row)] + ([local] if local else [])
    counts = [part[0].shape[2] for part in parts]
    q, k, v = qkv.chunk(3, dim=-1)
    k, v = _rotated(k, k_weight, sum(counts), cos, sin, eps), v.unflatten(-1, (sum(counts), -1))
    for (keys, values, start), own_k, own_v in zip(parts, k.split(counts, 2), v.split(counts, 2), strict=True):
        rows = _row_indices(start, qkv.shape[1], qkv.device)
        keys.index_copy_(1, rows, own_k.to(keys.dtype))
        values.index_copy_(1, rows, own_v.to(values.dtype))
    return _rotated(q, q_weight, sum(counts), cos, sin, eps)


def _e4m3(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def qk_norm_rope_write_fp8_reference(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor,
    q_scale: Tensor, k_scale: Tensor, v_scale: Tensor, start_row: StartRow, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """As above with e4m3 q, k_cache [B, rows, H, d] and v_cache [B, H, d, rows]; scales [H], value = e4m3 * scale."""
    heads = k_cache.shape[2]
    q, k, v = qkv.chunk(3, dim=-1)
    rows = _row_indices(start_row, qkv.shape[1], qkv.device)
    k8 = _e4m3(_rotated(k, k_weight, heads, cos, sin, eps), k_scale[:, None])
    v8 = _e4m3(v.unflatten(-1, (heads, -1)), v_scale[:, None]).permute(0, 2, 3, 1)
    # Copied as bytes: index_copy_ does not support e4m3 on every device.
    k_cache.view(torch.uint8).index_copy_(1, rows, k8.view(torch.uint8))
    v_cache.view(torch.uint8).index_copy_(3, rows, v8.view(torch.uint8))
    return _e4m3(_rotated(q, q_weight, heads, cos, sin, eps), q_scale[:, None])


@triton.jit
def _start_row(START_ROW, ON_DEVICE: tl.constexpr):
    if ON_DEVICE:
        START_ROW = tl.load(START_ROW)
    return START_ROW.to(tl.int64)


@triton.jit
def _norm_rope(
    x, WEIGHT, at, inside, cos, sin, eps, HEADS_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """x [HEADS_BLOCK, DIM_BLOCK], zero where not inside; cos, sin [1, DIM_BLOCK / 2] -> rotated, float32."""
    wide = x.to(tl.float32)
    mean = tl.sum(tl.sum(wide * wide, 1), 0) / WIDTH
    normed = (wide * tl.rsqrt(mean + eps)).to(x.dtype).to(tl.float32)
    weight = tl.load(WEIGHT + at, mask=inside, other=0.0).to(tl.float32)
    weighted = (normed * weight).to(x.dtype).to(tl.float32)
    even, odd = tl.split(weighted.reshape(HEADS_BLOCK, DIM_BLOCK // 2, 2))
    return tl.join(even * cos - odd * sin, even * sin + odd * cos).reshape(HEADS_BLOCK, DIM_BLOCK).to(x.dtype)


@triton.jit
def _local(CACHE, row, rows, batch, head, inside, FIRST: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Where the last heads of a token go, CACHE [B, rows, HEADS - FIRST, DIM] from head 0 on, and which go there."""
    WIDTH: tl.constexpr = (HEADS - FIRST) * DIM
    heads = tl.where((row >= 0) & (row < rows), HEADS, 0)
    kept = inside & (head >= FIRST) & (head < heads)
    return CACHE + (batch * rows + row) * WIDTH - FIRST * DIM, kept


@triton.jit(do_not_specialize=["Q_SCALE", "K_SCALE", "START_ROW", "LOCAL_ROW", "tokens", "rows", "local_rows"])
def _qk_norm_rope_write(
    QKV, Q_WEIGHT, K_WEIGHT, COS, SIN, Q, K, V, Q_SCALE, K_SCALE, START_ROW, K_LOCAL, V_LOCAL, LOCAL_ROW, tokens, rows,
    local_rows, k_batch, v_batch, eps,
    FIRST: tl.constexpr, HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    FP8: tl.constexpr, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """Program (token, b): QKV [B, tokens, 3, HEADS, DIM] -> Q [B, tokens, HEADS, DIM], rows of K and V.

    K, V [B, rows, FIRST, DIM]; K_LOCAL, V_LOCAL [B, local_rows, HEADS - FIRST, DIM] of the other heads, if any. With
    FP8, q and k are divided by their head's scale, and another kernel writes V.
    """
    WIDTH: tl.constexpr = HEADS * DIM
    ROW: tl.constexpr = FIRST * DIM
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    row = _start_row(START_ROW, ON_DEVICE) + token
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    element = tl.arange(0, DIM_BLOCK)[None, :]
    at = head * DIM + element
    inside = (head < HEADS) & (element < DIM)
    # Issue every load before the first reduction, which waits; V is stored at once.
    source = QKV + (batch * tokens + token) * 3 * WIDTH + at
    q = tl.load(source, mask=inside, other=0.0)
    k = tl.load(source + WIDTH, mask=inside, other=0.0)
    pair = tl.arange(0, DIM_BLOCK // 2)[None, :]
    cos = tl.load(COS + token * (DIM // 2) + pair, mask=pair < DIM // 2, other=0.0)
    sin = tl.load(SIN + token * (DIM // 2) + pair, mask=pair < DIM // 2, other=0.0)
    heads = tl.where((row >= 0) & (row < rows), FIRST, 0)  # a wrong start_row must not reach other memory
    kept = (head < heads) & (element < DIM)
    if not FP8:
        v = tl.load(source + 2 * WIDTH, mask=inside, other=0.0)
        tl.store(V + batch * v_batch + row * ROW + at, v.to(V.dtype.element_ty), mask=kept)
        if FIRST < HEADS:
            local_row = _start_row(LOCAL_ROW, ON_DEVICE) + token
            target, mask = _local(V_LOCAL, local_row, local_rows, batch, head, inside, FIRST, HEADS, DIM)
            tl.store(target + at, v.to(V.dtype.element_ty), mask=mask)

    q = _norm_rope(q, Q_WEIGHT, at, inside, cos, sin, eps, HEADS_BLOCK, DIM_BLOCK, WIDTH)
    if FP8:
        q = to_e4m3(q.to(tl.float32), tl.load(Q_SCALE + head, mask=head < HEADS, other=1.0))
    tl.store(Q + (batch * tokens + token) * WIDTH + at, q.to(Q.dtype.element_ty), mask=inside)
    k = _norm_rope(k, K_WEIGHT, at, inside, cos, sin, eps, HEADS_BLOCK, DIM_BLOCK, WIDTH)
    if FP8:
        k = to_e4m3(k.to(tl.float32), tl.load(K_SCALE + head, mask=head < HEADS, other=1.0))
    tl.store(K + batch * k_batch + row * ROW + at, k.to(K.dtype.element_ty), mask=kept)
    if FIRST < HEADS:
        local_row = _start_row(LOCAL_ROW, ON_DEVICE) + token
        target, mask = _local(K_LOCAL, local_row, local_rows, batch, head, inside, FIRST, HEADS, DIM)
        tl.store(target + at, k.to(K.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["V_SCALE", "START_ROW", "tokens", "rows"])
def _write_v_transposed(
    QKV, V, V_SCALE, START_ROW, tokens, rows, v_batch, pitch,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, TOKENS: tl.constexpr, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens, head, b): V [B, HEADS, DIM, pitch] from QKV. Single tokens would store single bytes."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    element = tl.arange(0, DIM_BLOCK)[None, :]
    inside = (token < tokens) & (element < DIM)
    source = QKV + ((batch * tokens + token) * 3 + 2) * HEADS * DIM + head * DIM + element
    v = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    v = to_e4m3(v, tl.load(V_SCALE + head)).to(tl.float8e4nv)
    row = _start_row(START_ROW, ON_DEVICE) + token
    target = V + batch * v_batch + (head * DIM + element).to(tl.int64) * pitch + row
    tl.store(target, v, mask=inside & (row >= 0) & (row < rows))


def _write(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor,
    start_row: StartRow, eps: float, q: Tensor, scales: tuple[Tensor, Tensor] | None, local: LocalCache | None = None,
) -> None:  # fmt: skip
    """Launch for q and k, and for v unless it is transposed; fills q [B, n, H, d]."""
    (batch, tokens, heads, dim), rows = q.shape, k_cache.shape[1]
    q_scale, k_scale = scales or (cos, cos)  # not read
    k_local, v_local, local_row = local or (None, None, 0)
    launch(
        _qk_norm_rope_write, (tokens, batch), qkv, q_weight, k_weight, cos, sin, q, k_cache, v_cache, q_scale, k_scale,
        start_row, k_local, v_local, local_row, tokens, rows, 0 if k_local is None else k_local.shape[1],
        k_cache.stride(0), v_cache.stride(0), eps, k_cache.shape[2], heads, power_of_two(heads), dim,
        power_of_two(dim), scales is not None, isinstance(start_row, Tensor), num_warps=4,
    )  # fmt: skip


def qk_norm_rope_write_triton(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor,
    start_row: StartRow, eps: float, local: LocalCache | None = None,
) -> Tensor:  # fmt: skip
    """Like qk_norm_rope_write_reference, rounding included."""
    heads, dim = k_cache.shape[2] + (local[0].shape[2] if local else 0), k_cache.shape[3]
    q = torch.empty(*qkv.shape[:2], heads, dim, dtype=qkv.dtype, device=qkv.device)
    _write(qkv, q_weight, k_weight, cos, sin, k_cache, v_cache, start_row, eps, q, None, local)
    return q


def qk_norm_rope_write_fp8_triton(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor,
    q_scale: Tensor, k_scale: Tensor, v_scale: Tensor, start_row: StartRow, eps: float,
) -> Tensor:  # fmt: skip
    """Like qk_norm_rope_write_fp8_reference."""
    q = torch.empty(*qkv.shape[:2], *k_cache.shape[2:], dtype=torch.float8_e4m3fn, device=qkv.device)
    _write(qkv, q_weight, k_weight, cos, sin, k_cache, v_cache, start_row, eps, q, (q_scale, k_scale))
    batch, tokens, heads, dim = q.shape
    launch(
        _write_v_transposed, (-(-tokens // _V_TOKENS), heads, batch), qkv, v_cache, v_scale, start_row,
        tokens, k_cache.shape[1], v_cache.stride(0), v_cache.shape[3],
        heads, dim, power_of_two(dim), _V_TOKENS, isinstance(start_row, Tensor), num_warps=4,
    )  # fmt: skip
    return q


def _check(
    op: str, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor,
    v_cache: Tensor, start_row: StartRow, v_shape: tuple[int, ...], more: int = 0,
) -> None:  # fmt: skip
    """more: heads beside those of k_cache."""
    got = described(qkv=qkv, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache)
    heads, dim = (k_cache.shape[2] + more, k_cache.shape[3]) if k_cache.ndim == 4 else (0, 0)
    width, tokens = heads * dim, qkv.shape[1] if qkv.ndim == 3 else 0
    fits = (
        width and tokens and dim % 2 == 0 and qkv.shape[2] == 3 * width and k_cache.shape[0] == qkv.shape[0]
        and v_cache.shape == v_shape and q_weight.shape == k_weight.shape == (width,)
        and cos.shape == sin.shape == (tokens, dim // 2) and cos.dtype == sin.dtype == torch.float32
        and qkv.dtype == q_weight.dtype == k_weight.dtype
    )  # fmt: skip
    if not fits:
        raise ValueError(f"{op}: got {got}, expected qkv [B, n, 3 H d], weights [H d] of its dtype, "
                         f"cos, sin [n, d / 2] float32, k_cache [B, rows, H, d], v_cache {list(v_shape)}")  # fmt: skip
    if not (qkv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError(f"{op}: got strides {qkv.stride()}, {cos.stride()}, {sin.stride()}, expected contiguous")
    if not (k_cache[0].is_contiguous() and v_cache[0].is_contiguous()):
        raise ValueError(f"{op}: got cache strides {k_cache.stride()}, {v_cache.stride()}, expected contiguous rows")
    _check_row(op, start_row, tokens, k_cache.shape[1])


def _check_row(op: str, start_row: StartRow, tokens: int, rows: int) -> None:
    if isinstance(start_row, Tensor):
        if start_row.numel() != 1 or start_row.is_floating_point():
            raise ValueError(f"{op}: got {described(start_row=start_row)}, expected an integer scalar")
    elif not 0 <= start_row <= rows - tokens:
        raise ValueError(f"{op}: got start_row {start_row} for {tokens} tokens, expected 0 to "
                         f"{rows - tokens} of {rows} rows")  # fmt: skip


def _check_local(op: str, tokens: int, k_cache: Tensor, start_row: StartRow, local: LocalCache) -> None:
    k, v, local_row = local
    alike = k.ndim == 4 and k.shape == v.shape and (k.shape[0], k.shape[3]) == (k_cache.shape[0], k_cache.shape[3])
    if not (alike and k.is_contiguous() and v.is_contiguous() and k.dtype == v.dtype == k_cache.dtype):
        raise ValueError(f"{op}: got {described(k_cache=k_cache, k_local=k, v_local=v)}, expected local caches "
                         "[B, rows, heads, d], contiguous, in the dtype of k_cache")  # fmt: skip
    if isinstance(start_row, Tensor) is not isinstance(local_row, Tensor):
        raise ValueError(f"{op}: got start_row {start_row} and local {local_row}, expected both on one side")
    _check_row(op, local_row, tokens, k.shape[1])


def qk_norm_rope_write(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor,
    start_row: StartRow, eps: float = 1e-6, local: LocalCache | None = None,
) -> Tensor:  # fmt: skip
    """Norm and rotate q and k, put k and v into cache rows start_row to start_row + n, return q.

    qkv [B, n, 3 * H * d] contiguous, q then k then v; weights [H * d]; cos, sin float32 [n, d / 2]; caches
    [B, rows, H, d], each batch entry contiguous; start_row a number or an integer scalar on the device. The host
    cannot check a device scalar, so the kernel drops rows beyond the cache. With `local` the caches hold the first
    heads, and local's the others, from its own row on. Returns q [B, n, H, d] in qkv's dtype.
    Raises ValueError where shapes, dtypes or strides do not fit.
    """
    op, tensors = "qk_norm_rope_write", (qkv, q_weight, k_weight, cos, sin, k_cache, v_cache)
    more = local[0].shape[2] if local is not None and local[0].ndim == 4 else 0
    _check(op, *tensors, start_row, tuple(k_cache.shape), more)
    if local is not None:
        _check_local(op, qkv.shape[1], k_cache, start_row, local)
    return implementation(op, qkv.device, fits=not needs_gradient(*tensors))(*tensors, start_row, eps, local)


def qk_norm_rope_write_fp8(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor,
    q_scale: Tensor, k_scale: Tensor, v_scale: Tensor, start_row: StartRow, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """The same for FP8 attention: q, k_cache and v_cache are e4m3, each value / scale of its head, clamped to +-448.

    v_cache is transposed, [B, H, d, pitch] with pitch a multiple of 16 and at least k_cache's rows; scales [H]
    float32 on the device, value = e4m3 * scale. Returns e4m3 q [B, n, H, d].
    """
    op, tensors = "qk_norm_rope_write_fp8", (qkv, q_weight, k_weight, cos, sin, k_cache, v_cache)
    pitch = v_cache.shape[3] if v_cache.ndim == 4 else 0
    batch, rows, heads, dim = k_cache.shape if k_cache.ndim == 4 else (0, 0, 0, 0)
    _check(op, *tensors, start_row, (batch, heads, dim, pitch))
    if pitch % 16 or pitch < rows or not k_cache.dtype == v_cache.dtype == torch.float8_e4m3fn:
        raise ValueError(f"{op}: got {described(k_cache=k_cache, v_cache=v_cache)}, expected float8_e4m3fn and a "
                         f"pitch that is a multiple of 16, at least {rows}")  # fmt: skip
    if not all(s.shape == (heads,) and s.dtype == torch.float32 for s in (q_scale, k_scale, v_scale)):
        raise ValueError(f"{op}: got {described(q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)}, expected "
                         f"float32 [{heads}]")  # fmt: skip
    return implementation(op, qkv.device)(*tensors, q_scale, k_scale, v_scale, start_row, eps)


def _full_size(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """qkv, weights, tables, caches of four latent frames at 832x480, 12 heads of 128."""
    make = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    table = torch.empty(1560, 64, device="meta")
    k = torch.empty(1, 6240, 12, 128, dtype=dtype, device="meta")
    v = torch.empty(1, 12, 128, 6240, dtype=dtype, device="meta") if dtype.itemsize == 1 else torch.empty_like(k)
    return make(1, 1560, 4608), make(1536), make(1536), table, table, k, v


def _start_rows() -> dict[str, StartRow]:
    return {"device row": torch.empty((), dtype=torch.int32, device="meta"), "host row": 1560}


def _variants() -> Iterator[Variant]:
    tensors = _full_size(torch.bfloat16)
    for name, start_row in _start_rows().items():
        yield Variant(f"12 x 128 {name}", partial(qk_norm_rope_write_triton, *tensors, start_row, 1e-6))
    wide, few = (torch.empty(1, rows, 6, 128, dtype=torch.bfloat16, device="meta") for rows in (6240, 4680))
    start_row = _start_rows()["device row"]
    split = *tensors[:5], wide, wide, start_row, 1e-6, (few, few, start_row)
    yield Variant("6 + 6 local x 128 device row", partial(qk_norm_rope_write_triton, *split))


def _fp8_variants() -> Iterator[Variant]:
    scale = torch.empty(12, device="meta")
    tensors = (*_full_size(torch.float8_e4m3fn), scale, scale, scale)
    for name, start_row in _start_rows().items():
        yield Variant(f"12 x 128 {name}", partial(qk_norm_rope_write_fp8_triton, *tensors, start_row, 1e-6))


register(
    "qk_norm_rope_write",
    reference=qk_norm_rope_write_reference,
    triton=qk_norm_rope_write_triton,
    variants=_variants,
)
register(
    "qk_norm_rope_write_fp8",
    reference=qk_norm_rope_write_fp8_reference,
    triton=qk_norm_rope_write_fp8_triton,
    variants=_fp8_variants,
)
