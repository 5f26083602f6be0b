"""The kernels behind ring_attention and ring_attention_fp8: attention cut evenly over the chip, and its merge.

12 heads of 1560 queries are 156 tiles of 128 queries. On 132 multiprocessors they take two rounds, the second nearly
empty. So only whole rounds of tiles are done tile by tile. The work of the other tiles is counted in (tile, block of
keys) pairs, and each program takes an equal run of them (stream-K). Programs that share a tile each store a partial
result: the sum of weighted values, the maximum and the sum of the weights. A second kernel merges these. The number of
valid rows is read on the device: no launch depends on it, so a CUDA graph replays for every state of the ring.

Rows after the valid ones may hold anything, NaN too: descriptors end at the last valid row, loads beyond give zero.
"""

import torch
from torch import Tensor

from kernels import hopper_attention as hopper
from kernels.hopper import runs_on
from kernels.launch import launch, multiprocessors, shared_kb, tl, triton

LOG2_E = 1.4426950408889634
ValidRows = int | Tensor  # rows to attend to: a number, or an int32 on the device, read when the kernel runs

QUERIES, KEYS = 128, 64  # per block; with 128 keys two blocks of scores do not fit the registers
STAGES, WARPS = 4, 8  # blocks of keys and values under way; two warpgroups
FEW_STAGES, MUCH_KB = 2, 160  # four blocks of 128-wide heads take 96 to 128 KB, by Triton version; some GPUs have 99
LANES = 16  # queries that one program merges


@triton.jit
def _valid_rows(VALID_ROWS, rows, ON_DEVICE: tl.constexpr):
    if ON_DEVICE:
        VALID_ROWS = tl.load(VALID_ROWS)
    return tl.minimum(VALID_ROWS, rows)


@triton.jit
def _share(valid_rows, queries, programs, HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whole rounds of tiles, blocks of keys per tile, pairs of the shared tiles per program, and in all."""
    blocks = tl.cdiv(valid_rows, BLOCK_N)
    tiles = tl.cdiv(queries, BLOCK_M) * HEADS
    shared = tiles % programs * blocks
    return tiles // programs, blocks, tl.cdiv(shared, programs), shared


@triton.jit
def _weigh(
    acc, row_max, row_sum, scores, v_rows, row, column, valid_rows, scale,
    BLOCK_N: tl.constexpr, FP8: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys, from its scores: online softmax in powers of two (by `scale`), then the product with v."""
    if MASKED:
        scores = tl.where((row + tl.arange(0, BLOCK_N) < valid_rows)[None, :], scores, -float("inf"))
    # FP8 weights are scaled to reach 2^8, so that small ones keep their bits; row_max carries the shift, which cancels.
    shift = 8 if FP8 else 0
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale - shift)
    weights = tl.math.exp2(scores * scale - new_max[:, None])
    fade = tl.math.exp2(row_max - new_max)
    v = v_rows.load([column, row]).T if FP8 else v_rows.load([row, column])
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None])
    return acc, new_max, row_sum * fade + tl.sum(weights, 1)


# Neither token counts nor the addresses of scalars and scales may cause another compilation.
@triton.jit(
    do_not_specialize=["VALID_ROWS", "queries", "rows", "pitch", "programs"],
    do_not_specialize_on_alignment=["Q_SCALE", "K_SCALE", "V_SCALE"],
)
def attend_kernel(
    Q, K, V, VALID_ROWS, Q_SCALE, K_SCALE, V_SCALE, OUT, LSE, PARTIAL, STATS, queries, rows, pitch, programs,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ON_DEVICE: tl.constexpr, SCALE: tl.constexpr, FP8: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program c of batch entry b does tiles c, c + programs, ... and a run of the (tile, key block) pairs that remain.

    Q, OUT [B, queries, HEADS, d], a query every ROW elements; K [B, rows, HEADS, d]; V as K, or e4m3
    [B, HEADS, d, pitch]; LSE [B, HEADS, queries]; float32 PARTIAL [B, programs, 2, BLOCK_M, d] and STATS [B, programs,
    2, 2, BLOCK_M]: entry 0 for a tile that an earlier program began, entry 1 for a tile that a later program continues.
    """
    program = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    valid_rows = _valid_rows(VALID_ROWS, rows, ON_DEVICE)
    rounds, blocks, share, shared = _share(valid_rows, queries, programs, HEADS, BLOCK_M, BLOCK_N)
    first = tl.minimum(program * share, shared)
    last = tl.minimum(first + share, shared)
    tiles = tl.cdiv(queries, BLOCK_M)

    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    q_rows = tl.make_tensor_descriptor(Q + batch * queries * ROW, [queries, WIDTH], [ROW, 1], [BLOCK_M, HEAD_DIM])
    k_rows = tl.make_tensor_descriptor(K + batch * rows * WIDTH, [valid_rows, WIDTH], [WIDTH, 1], [BLOCK_N, HEAD_DIM])
    if FP8:
        V += batch * WIDTH * pitch
        v_rows = tl.make_tensor_descriptor(V, [WIDTH, valid_rows], [pitch, 1], [HEAD_DIM, BLOCK_N])
    else:
        V += batch * rows * WIDTH
        v_rows = tl.make_tensor_descriptor(V, [valid_rows, WIDTH], [WIDTH, 1], [BLOCK_N, HEAD_DIM])

    lane = tl.arange(0, BLOCK_M)
    element = tl.arange(0, HEAD_DIM)
    for turn in tl.range(rounds + tl.cdiv(last, blocks) - first // blocks):
        tile = turn * programs + program
        begin, end = 0, blocks
        if turn >= rounds:
            piece = first // blocks + turn - rounds
            tile = rounds * programs + piece
            begin = tl.maximum(first - piece * blocks, 0)
            end = tl.minimum(last - piece * blocks, blocks)
        head = tile // tiles
        first_query = tile % tiles * BLOCK_M
        column = head * HEAD_DIM
        q = q_rows.load([first_query, column])
        scale = SCALE
        if FP8:
            q_scale = tl.load(Q_SCALE + head)
            scale = SCALE * q_scale * tl.load(K_SCALE + head)
            if q.dtype == tl.bfloat16:
                q = tl.clamp(q.to(tl.float32) / q_scale, -448.0, 448.0).to(tl.float8e4nv)
        acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
        row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        # Issue the next block's scores first: the tensor cores then work during this block's softmax.
        scores = tl.dot(q, k_rows.load([begin * BLOCK_N, column]).T)
        for block in tl.range(begin, end - 1, num_stages=STAGES):
            row = block * BLOCK_N
            upcoming = tl.dot(q, k_rows.load([row + BLOCK_N, column]).T)
            acc, row_max, row_sum = _weigh(
                acc, row_max, row_sum, scores, v_rows, row, column, valid_rows, scale, BLOCK_N, FP8, False
            )
            scores = upcoming
        acc, row_max, row_sum = _weigh(
            acc,
            row_max,
            row_sum,
            scores,
            v_rows,
            (end - 1) * BLOCK_N,
            column,
            valid_rows,
            scale,
            BLOCK_N,
            FP8,
            True,
        )
        if FP8:
            acc = acc * tl.load(V_SCALE + head)
        if end - begin == blocks:
            here = first_query + lane < queries
            out = OUT + ((batch * queries + first_query + lane) * ROW + column)[:, None] + element[None, :]
            tl.store(out, (acc / row_sum[:, None]).to(OUT.dtype.element_ty), here[:, None])
            lse = LSE + (batch * HEADS + head) * queries + first_query + lane
            tl.store(lse, (row_max + tl.math.log2(row_sum)) * 0.6931471805599453, here)
        else:
            entry = (batch * programs + program) * 2 + tl.where(begin == 0, 1, 0)
            tl.store(PARTIAL + (entry * BLOCK_M + lane)[:, None] * HEAD_DIM + element[None, :], acc)
            stats = STATS + entry * 2 * BLOCK_M + lane
            tl.store(stats, row_max)
            tl.store(stats + BLOCK_M, row_sum)


@triton.jit(do_not_specialize=["VALID_ROWS", "queries", "rows", "programs"])
def merge_kernel(
    PARTIAL, STATS, VALID_ROWS, OUT, LSE, queries, rows, programs,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ON_DEVICE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Program (piece, stripe, b): merges LANES queries of a tile that several programs of attend_kernel shared."""
    piece = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    valid_rows = _valid_rows(VALID_ROWS, rows, ON_DEVICE)
    rounds, blocks, share, _ = _share(valid_rows, queries, programs, HEADS, BLOCK_M, BLOCK_N)
    first = piece * blocks // share
    last = ((piece + 1) * blocks - 1) // share
    if first == last:  # one program did all of it
        return
    tile = rounds * programs + piece
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    element = tl.arange(0, HEAD_DIM)
    acc = tl.zeros([LANES, HEAD_DIM], tl.float32)
    row_max = tl.full([LANES], -float("inf"), tl.float32)
    row_sum = tl.zeros([LANES], tl.float32)
    for program in tl.range(first, last + 1):
        entry = (batch * programs + program) * 2 + (program == first).to(tl.int32)
        part_max = tl.load(STATS + entry * 2 * BLOCK_M + lane)
        new_max = tl.maximum(row_max, part_max)
        fade = tl.math.exp2(row_max - new_max)
        grow = tl.math.exp2(part_max - new_max)
        part = tl.load(PARTIAL + (entry * BLOCK_M + lane)[:, None] * HEAD_DIM + element[None, :])
        acc = acc * fade[:, None] + part * grow[:, None]
        row_sum = row_sum * fade + tl.load(STATS + (entry * 2 + 1) * BLOCK_M + lane) * grow
        row_max = new_max
    tiles = tl.cdiv(queries, BLOCK_M)
    head = tile // tiles
    query = tile % tiles * BLOCK_M + lane
    here = query < queries
    out = OUT + ((batch * queries + query) * ROW + head * HEAD_DIM)[:, None] + element[None, :]
    tl.store(out, (acc / row_sum[:, None]).to(OUT.dtype.element_ty), here[:, None])
    tl.store(
        LSE + (batch * HEADS + head) * queries + query, (row_max + tl.math.log2(row_sum)) * 0.6931471805599453, here
    )


def row_of(x: Tensor) -> int:
    """Elements from a token's heads to the next one's, x [B, n, H, d]; 0 unless nothing else lies between them."""
    batch, tokens, heads, head_dim = x.shape
    row = x.stride(1)
    if tokens == 1:  # its stride says nothing
        row = x.stride(0) if batch > 1 else heads * head_dim
    dense = x.stride()[2:] == (head_dim, 1) or (heads == 1 and x.stride(3) == 1)
    return row if dense and row >= heads * head_dim and (batch == 1 or x.stride(0) == tokens * row) else 0


def attend(
    q: Tensor, k: Tensor, v: Tensor, valid_rows: ValidRows, scales: tuple[Tensor, Tensor, Tensor] | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both launches: q [B, n, H, d], k [B, rows, H, d], v as k or (with scales: FP8) [B, H, d, pitch], all contiguous.

    q and out may be the same heads of wider tensors. The scales of q, k, v are float32 [H]. Returns out [B, n, H, d],
    and lse [B, H, n] float32.
    """
    batch, queries, heads, head_dim = q.shape
    programs = multiprocessors(q.device)
    if out is None:
        out = q.new_empty(q.shape, dtype=torch.bfloat16 if scales else q.dtype)
    if row_of(q) != row_of(out):  # the kernels know one distance between tokens
        result, lse = attend(q.contiguous(), k, v, valid_rows, scales)
        return out.copy_(result), lse
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    partial = q.new_empty((batch, programs, 2, QUERIES, head_dim), dtype=torch.float32)
    stats = q.new_empty((batch, programs, 2, 2, QUERIES), dtype=torch.float32)
    on_hopper = q.dtype == k.dtype and head_dim in hopper.HEAD_DIMS and runs_on(q.device)
    keys = hopper.KEYS if on_hopper else KEYS
    on_device = isinstance(valid_rows, Tensor)
    cut = {"HEADS": heads, "HEAD_DIM": head_dim, "ROW": row_of(out), "BLOCK_N": keys, "ON_DEVICE": on_device}
    arguments = (
        q, k, v, valid_rows, *(scales or (lse, lse, lse)), out, lse, partial, stats, queries, k.shape[1], v.shape[-1],
        programs,
    )  # fmt: skip
    form = cut | {"SCALE": head_dim**-0.5 * LOG2_E, "FP8": scales is not None}
    if on_hopper:
        launch(
            hopper.attend_hopper, (programs, batch), *arguments, **form, STAGES=hopper.STAGES, num_warps=hopper.WARPS
        )
    else:
        stages = STAGES if shared_kb(q.device) >= MUCH_KB else FEW_STAGES
        launch(attend_kernel, (programs, batch), *arguments, **form, BLOCK_M=QUERIES, STAGES=stages, num_warps=WARPS)
    shared = -(-queries // QUERIES) * heads % programs
    if shared:
        launch(
            merge_kernel, (shared, QUERIES // LANES, batch), partial, stats, valid_rows, out, lse, queries,
            k.shape[1], programs, **cut, BLOCK_M=QUERIES, LANES=LANES, num_warps=4,
        )  # fmt: skip
    return out, lse
