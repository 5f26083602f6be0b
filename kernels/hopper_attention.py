"""stream_k_attention's first kernel for sm_90 with a schedule of its own, in Gluon.

Triton waits for each product before the softmax that follows it, so its tensor cores rest meanwhile. Here two
warpgroups of 64 queries work apart from each other, and a third warpgroup only loads. Each issues the next block's
scores before this block's softmax, and the product with v before it waits for those scores.
"""

from kernels.hopper import (
    constant,
    copy_in,
    gl,
    gluon,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

KEYS, STAGES, WARPS = 128, 3, 4  # keys per block, blocks under way, warps of a multiplying warpgroup
HEAD_DIMS = (64, 128)
HALF = constant(64)  # queries of a warpgroup
LOG_2 = constant(0.6931471805599453)


@gluon.jit
def _piece(turn, cut):
    """The tile of a program's turn, and its first and last block of keys."""
    rounds, programs, program, blocks, first, last = cut
    tile = turn * programs + program
    begin = 0
    end = blocks
    if turn >= rounds:
        piece = first // blocks + turn - rounds
        tile = rounds * programs + piece
        begin = gl.maximum(first - piece * blocks, 0)
        end = gl.minimum(last - piece * blocks, blocks)
    return tile, begin, end


@gluon.jit
def _load(
    rows, buffers, cut, turns, tiles, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    FP8: gl.constexpr,
):  # fmt: skip
    """The loading warp: queries of each tile, then its blocks of keys and values."""
    q_rows, k_rows, v_rows = rows
    q_tile, k_tiles, v_tiles, q_ready, q_free, k_ready, k_free, v_ready, v_free = buffers
    SIZE: gl.constexpr = 1 if FP8 else 2  # bytes of an element
    count = 0
    for turn in range(turns):
        tile, begin, end = _piece(turn, cut)
        column = tile // tiles * HEAD_DIM
        query = tile % tiles * 2 * HALF
        mbarrier.wait(q_free, (turn & 1) ^ 1)
        mbarrier.expect(q_ready, 2 * HALF * HEAD_DIM * SIZE)
        copy_in(q_rows, [query, column], q_ready, q_tile.index(0))
        copy_in(q_rows, [query + HALF, column], q_ready, q_tile.index(1))
        for block in range(begin, end):
            stage = count % STAGES
            phase = (count // STAGES & 1) ^ 1
            mbarrier.wait(k_free.index(stage), phase)
            mbarrier.expect(k_ready.index(stage), BLOCK_N * HEAD_DIM * SIZE)
            copy_in(k_rows, [block * BLOCK_N, column], k_ready.index(stage), k_tiles.index(stage))
            mbarrier.wait(v_free.index(stage), phase)
            mbarrier.expect(v_ready.index(stage), BLOCK_N * HEAD_DIM * SIZE)
            if FP8:
                copy_in(v_rows, [column, block * BLOCK_N], v_ready.index(stage), v_tiles.index(stage))
            else:
                copy_in(v_rows, [block * BLOCK_N, column], v_ready.index(stage), v_tiles.index(stage))
            count += 1


@gluon.jit
def _weights(scores, row_max, row_sum, scale, SHIFT: gl.constexpr):
    """Online softmax in powers of two: the weights, and the new maximum and sum with what fades the old ones."""
    new_max = gl.maximum(row_max, gl.max(scores, 1) * scale - SHIFT)
    weights = gl.exp2(scores * scale - new_max[:, None])
    fade = gl.exp2(row_max - new_max)
    return weights, new_max, row_sum * fade + gl.sum(weights, 1), fade


@gluon.jit
def _values(tile, FP8: gl.constexpr):
    """A tile of v as [keys, HEAD_DIM]."""
    if FP8:
        return tile.permute((1, 0))
    else:
        return tile


@gluon.jit
def _multiply(
    WARPGROUP: gl.constexpr, buffers, Q_SCALE, K_SCALE, V_SCALE, OUT, LSE, PARTIAL, STATS, batch, cut, turns, queries,
    valid_rows, tiles, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, ROW: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, SCALE: gl.constexpr, FP8: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup: 64 queries of each tile."""
    q_tile, k_tiles, v_tiles, q_ready, q_free, k_ready, k_free, v_ready, v_free = buffers
    dtype: gl.constexpr = q_tile.dtype
    DEPTH: gl.constexpr = 32 if FP8 else 16  # of one instruction
    SHIFT: gl.constexpr = 8 if FP8 else 0  # weights reach 2^8, so that small ones keep their bits in e4m3
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, DEPTH])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, DEPTH])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 4 if FP8 else 2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    out_rows: gl.constexpr = gl.SliceLayout(1, acc_layout)
    lane = WARPGROUP * HALF + gl.arange(0, HALF, out_rows)
    element = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, acc_layout))
    key = gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores_layout))
    nothing = gl.zeros([HALF, BLOCK_N], gl.float32, scores_layout)
    q = q_tile.index(WARPGROUP)

    count = 0
    for turn in range(turns):
        tile, begin, end = _piece(turn, cut)
        scale = SCALE
        if FP8:
            scale = SCALE * gl.load(Q_SCALE + tile // tiles) * gl.load(K_SCALE + tile // tiles)
        row_max = gl.full([HALF], -float("inf"), gl.float32, rows_layout)
        row_sum = gl.zeros([HALF], gl.float32, rows_layout)
        acc = warpgroup_mma_init(gl.zeros([HALF, HEAD_DIM], gl.float32, acc_layout))
        mbarrier.wait(q_ready, turn & 1)
        stage = count % STAGES
        mbarrier.wait(k_ready.index(stage), count // STAGES & 1)
        scores = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_free.index(stage), count=1)
        for block in range(begin, end - 1):
            stage = count % STAGES
            after = (count + 1) % STAGES
            mbarrier.wait(k_ready.index(after), (count + 1) // STAGES & 1)
            upcoming = warpgroup_mma(q, k_tiles.index(after).permute((1, 0)), nothing, use_acc=False, is_async=True)
            weights, row_max, row_sum, fade = _weights(scores, row_max, row_sum, scale, SHIFT)
            weights = gl.convert_layout(weights.to(dtype), weights_layout)
            values = warpgroup_mma_wait(1, deps=[acc])  # the product before has ended, the next scores have not
            before = (count + STAGES - 1) % STAGES
            mbarrier.arrive(v_free.index(before), count=1, pred=block > begin)
            values = values * gl.convert_layout(fade, out_rows)[:, None]
            mbarrier.wait(v_ready.index(stage), count // STAGES & 1)
            acc = warpgroup_mma(weights, _values(v_tiles.index(stage), FP8), values, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[upcoming])
            mbarrier.arrive(k_free.index(after), count=1)
            count += 1
        mbarrier.arrive(q_free, count=1)
        stage = count % STAGES
        here = (end - 1) * BLOCK_N + key < valid_rows
        scores = gl.where(here[None, :], scores, -float("inf"))
        weights, row_max, row_sum, fade = _weights(scores, row_max, row_sum, scale, SHIFT)
        weights = gl.convert_layout(weights.to(dtype), weights_layout)
        values = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_free.index((count + STAGES - 1) % STAGES), count=1, pred=end - 1 > begin)
        values = values * gl.convert_layout(fade, out_rows)[:, None]
        mbarrier.wait(v_ready.index(stage), count // STAGES & 1)
        acc = warpgroup_mma(weights, _values(v_tiles.index(stage), FP8), values, is_async=True)
        values = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_free.index(stage), count=1)
        count += 1

        if FP8:
            values = values * gl.load(V_SCALE + tile // tiles)
        total = gl.convert_layout(row_sum, out_rows)
        largest = gl.convert_layout(row_max, out_rows)
        _, programs, program, blocks, _, _ = cut
        if end - begin == blocks:
            head = tile // tiles
            query = tile % tiles * 2 * HALF + lane
            inside = query < queries
            out = OUT + ((batch * queries + query) * ROW + head * HEAD_DIM)[:, None] + element[None, :]
            gl.store(out, (values / total[:, None]).to(OUT.dtype.element_ty), inside[:, None])
            lse = LSE + (batch * HEADS + head) * queries + query
            gl.store(lse, (largest + gl.log2(total)) * LOG_2, inside)
        else:
            entry = (batch * programs + program) * 2 + (begin == 0).to(gl.int32)
            gl.store(PARTIAL + (entry * 2 * HALF + lane)[:, None] * HEAD_DIM + element[None, :], values)
            stats = STATS + entry * 4 * HALF + lane
            gl.store(stats, largest)
            gl.store(stats + 2 * HALF, total)


@gluon.jit(do_not_specialize=["VALID_ROWS", "queries", "rows", "pitch", "programs"])
def attend_hopper(
    Q, K, V, VALID_ROWS, Q_SCALE, K_SCALE, V_SCALE, OUT, LSE, PARTIAL, STATS, queries, rows, pitch, programs,
    HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, ROW: gl.constexpr, BLOCK_N: gl.constexpr, ON_DEVICE: gl.constexpr,
    SCALE: gl.constexpr, STAGES: gl.constexpr, FP8: gl.constexpr,
):  # fmt: skip
    """stream_k_attention.attend_kernel: the same arguments, results and cut, tiles of 128 queries."""
    program = gl.program_id(0)
    batch = gl.program_id(1).to(gl.int64)
    valid_rows = VALID_ROWS
    if ON_DEVICE:
        valid_rows = gl.load(VALID_ROWS)
    valid_rows = gl.minimum(valid_rows, rows)
    tiles = gl.cdiv(queries, 2 * HALF)
    blocks = gl.cdiv(valid_rows, BLOCK_N)
    rounds = tiles * HEADS // programs
    shared = tiles * HEADS % programs * blocks
    share = gl.cdiv(shared, programs)
    first = gl.minimum(program * share, shared)
    last = gl.minimum(first + share, shared)
    turns = rounds + gl.cdiv(last, blocks) - first // blocks
    cut = (rounds, programs, program, blocks, first, last)

    dtype: gl.constexpr = Q.dtype.element_ty
    WIDTH: gl.constexpr = HEADS * HEAD_DIM
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, HEAD_DIM], dtype)
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HEAD_DIM], dtype)
    V_SHAPE: gl.constexpr = [HEAD_DIM, BLOCK_N] if FP8 else [BLOCK_N, HEAD_DIM]
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(V_SHAPE, dtype)
    q_rows = tma.make_tensor_descriptor(
        Q + batch * queries * ROW, [queries, WIDTH], [ROW, 1], [HALF, HEAD_DIM], q_layout
    )
    k_rows = tma.make_tensor_descriptor(
        K + batch * rows * WIDTH, [valid_rows, WIDTH], [WIDTH, 1], [BLOCK_N, HEAD_DIM], k_layout
    )
    if FP8:
        v_rows = tma.make_tensor_descriptor(
            V + batch * WIDTH * pitch, [WIDTH, valid_rows], [pitch, 1], [HEAD_DIM, BLOCK_N], v_layout
        )
    else:
        v_rows = tma.make_tensor_descriptor(
            V + batch * rows * WIDTH, [valid_rows, WIDTH], [WIDTH, 1], [BLOCK_N, HEAD_DIM], v_layout
        )
    q_tile = gl.allocate_shared_memory(dtype, [2, HALF, HEAD_DIM], q_layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], k_layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, V_SHAPE[0], V_SHAPE[1]], v_layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    mbarrier.init(q_free, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(v_free.index(stage), count=2)

    buffers = (q_tile, k_tiles, v_tiles, q_ready, q_free, k_ready, k_free, v_ready, v_free)
    gl.warp_specialize(
        [
            (_multiply, (
                0, buffers, Q_SCALE, K_SCALE, V_SCALE, OUT, LSE, PARTIAL, STATS, batch, cut, turns, queries, valid_rows,
                tiles, HEADS, HEAD_DIM, ROW, BLOCK_N, STAGES, SCALE, FP8,
            )),
            (_multiply, (
                1, buffers, Q_SCALE, K_SCALE, V_SCALE, OUT, LSE, PARTIAL, STATS, batch, cut, turns, queries, valid_rows,
                tiles, HEADS, HEAD_DIM, ROW, BLOCK_N, STAGES, SCALE, FP8,
            )),
            (_load, ((q_rows, k_rows, v_rows), buffers, cut, turns, tiles, HEAD_DIM, BLOCK_N, STAGES, FP8)),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip
