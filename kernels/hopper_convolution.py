"""causal_convolution's kernel for sm_90 with a schedule of its own, in Gluon.

Triton waits for each product where the taps in time share a step. Here two warpgroups of 64 pixels add up several
frames each, and their products of one step run on while those of the next are issued; a third warpgroup only loads. A
step fetches every image's piece once for all three taps in time. Programs go from tile to tile, so that the next
tile's first pieces arrive while this one's sums are stored.
"""

import torch
from torch import Tensor

from kernels.checks import head_and_tail
from kernels.hopper import (
    constant,
    copy_in,
    copy_out,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    runs_on,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from kernels.launch import launch, multiprocessors

WARPS = 4  # of a multiplying warpgroup
OUTPUTS, FRAMES = 96, 4  # with 4 output frames a thread holds sums of 192 registers
STAGES = 3  # steps under way: what fits the shared memory
REGISTERS = 1  # pieces of a step that are multiplied from registers, which spares reads of shared memory
PIXELS = constant(64)  # of an image row, a warpgroup's
STEP = constant(32)  # channels a product


@gluon.constexpr_function
def _part(piece, frames):
    """When a step takes a piece: first the two of the most products, then those before, then those after."""
    return 1 if piece < frames // 2 else 0 if piece < frames // 2 + 2 else 2


@gluon.constexpr_function
def _products(pieces):
    """Products of the first pieces, up to three: the one before's and one more tap, of two blocks of outputs each."""
    return pieces * (pieces + 1)


@gluon.jit
def _place(tile, half, cut, FRAMES: gl.constexpr):
    """A warpgroup's first image, image row and first column; two pieces in reading order are one tile."""
    batch, across, pairs = cut
    group = tile // pairs
    piece = tile % pairs * 2 + half
    image = group // batch * FRAMES * batch + group % batch
    return image, piece // across, piece % across * PIXELS


@gluon.jit
def _load(
    rows, buffers, cut, tiles, CHANNELS: gl.constexpr, HEAD: gl.constexpr, TAIL: gl.constexpr, FRAMES: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: per step the pieces of FRAMES + 2 images for both warpgroups, and three taps' weights."""
    x_rows, head_rows, tail_rows = rows
    pieces, heads, tails, ready, free = buffers
    IMAGES: gl.constexpr = FRAMES + 2
    BLOCKS: gl.constexpr = CHANNELS // STEP
    BYTES: gl.constexpr = 2 * (2 * IMAGES * PIXELS * STEP + 3 * STEP * (HEAD + TAIL))
    batch = cut[0]
    count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        image, row, left = _place(tile, 0, cut, FRAMES)
        _, next_row, next_left = _place(tile, 1, cut, FRAMES)
        for step in range(9 * BLOCKS):
            stage = count % STAGES
            here = ready.index(stage)
            mbarrier.wait(free.index(stage), (count // STAGES & 1) ^ 1)
            mbarrier.expect(here, BYTES)
            tap = step // BLOCKS
            channel = step % BLOCKS * STEP
            y = tap // 3 - 1
            x = tap % 3 - 1
            for k in range(3):
                at = (k * 9 + tap) * CHANNELS + channel
                copy_in(head_rows, [at, 0], here, heads.index(stage * 3 + k))
                copy_in(tail_rows, [at, HEAD], here, tails.index(stage * 3 + k))
            for p in range(IMAGES):
                place = (stage * IMAGES + p) * 2
                copy_in(x_rows, [image + p * batch, row + y, left + x, channel], here, pieces.index(place))
                copy_in(
                    x_rows, [image + p * batch, next_row + y, next_left + x, channel], here, pieces.index(place + 1)
                )
            count += 1


@gluon.jit
def _store(acc, BIAS, out_rows, place, buffer, BLOCK: gl.constexpr):
    """Store BLOCK outputs of a piece; what lies outside the image is left out."""
    if BIAS is not None:
        column = place[3] + gl.arange(0, BLOCK, gl.SliceLayout(0, acc.type.layout))
        acc += gl.load(BIAS + column).to(gl.float32)[None, :]
    tma.store_wait(0)  # the frame before has left the buffer
    buffer.reshape([PIXELS, BLOCK]).store(acc.to(buffer.dtype))
    fence_async_shared()
    copy_out(out_rows, place, buffer)


@gluon.jit
def _multiply(
    WARPGROUP: gl.constexpr, rows, buffers, outs, BIAS, cut, tiles, CHANNELS: gl.constexpr, HEAD: gl.constexpr,
    TAIL: gl.constexpr, FRAMES: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup: HEAD + TAIL outputs of 64 pixels of FRAMES images of each tile."""
    pieces, w_heads, w_tails, ready, free = buffers
    head_rows, tail_rows = rows
    IMAGES: gl.constexpr = FRAMES + 2
    MIDDLE: gl.constexpr = FRAMES // 2  # from here on pieces have the most products
    head_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD, 16])
    tail_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TAIL, 16])
    piece_layout: gl.constexpr = gl.DotOperandLayout(0, head_layout, 2)
    tail_piece_layout: gl.constexpr = gl.DotOperandLayout(0, tail_layout, 2)
    batch = cut[0]
    count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        sums = gl.tuple([])
        for _ in gl.static_range(FRAMES):
            head = gl.zeros([PIXELS, HEAD], gl.float32, head_layout)
            tail = gl.zeros([PIXELS, TAIL], gl.float32, tail_layout)
            sums += (warpgroup_mma_init(head), warpgroup_mma_init(tail))
        for step in range(9 * (CHANNELS // STEP)):
            stage = count % STAGES
            mbarrier.wait(ready.index(stage), count // STAGES & 1)
            for part in gl.static_range(3):
                for p in gl.static_range(IMAGES):
                    if _part(p, FRAMES) == part:
                        piece = pieces.index((stage * IMAGES + p) * 2 + WARPGROUP).reshape([PIXELS, STEP])
                        head_piece = piece
                        tail_piece = piece
                        if p >= MIDDLE and p < MIDDLE + REGISTERS:
                            head_piece = piece.load(piece_layout)
                            tail_piece = gl.convert_layout(head_piece, tail_piece_layout)
                        updated = gl.tuple([])
                        for f in gl.static_range(FRAMES):
                            if p >= f and p - f < 3:
                                w_head = w_heads.index(stage * 3 + (p - f))
                                w_tail = w_tails.index(stage * 3 + (p - f))
                                updated += (warpgroup_mma(head_piece, w_head, sums[2 * f], is_async=True),)
                                updated += (warpgroup_mma(tail_piece, w_tail, sums[2 * f + 1], is_async=True),)
                            else:
                                updated += (sums[2 * f], sums[2 * f + 1])
                        sums = updated
                        if p == MIDDLE - 1:  # the step before has ended; this one's products until here go on
                            sums = warpgroup_mma_wait(_products(MIDDLE), deps=sums)
                            mbarrier.arrive(free.index((count + STAGES - 1) % STAGES), count=1, pred=step > 0)
            count += 1
        sums = warpgroup_mma_wait(0, deps=sums)
        mbarrier.arrive(free.index((count + STAGES - 1) % STAGES), count=1)

        image, row, left = _place(tile, WARPGROUP, cut, FRAMES)
        for f in gl.static_range(FRAMES):
            at = image + f * batch
            _store(sums[2 * f], BIAS, head_rows, [at, row, left, 0], outs[0].index(WARPGROUP), HEAD)
            _store(sums[2 * f + 1], BIAS, tail_rows, [at, row, left, HEAD], outs[1].index(WARPGROUP), TAIL)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["images", "height", "width", "batch"])
def convolve_hopper(
    X, W, BIAS, OUT, images, height, width, batch, CHANNELS: gl.constexpr, HEAD: gl.constexpr, TAIL: gl.constexpr,
    FRAMES: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Program: every so many-th tile of FRAMES images, two pieces of 64 pixels, and all outputs.

    X [images + 2 * batch, height, width, CHANNELS], W [27 * CHANNELS, HEAD + TAIL], BIAS [HEAD + TAIL] or None,
    OUT [images, height, width, HEAD + TAIL].
    """
    across = gl.cdiv(width, PIXELS)
    pairs = gl.cdiv(height * across, 2)
    tiles = images // FRAMES * pairs
    cut = (batch, across, pairs)

    dtype: gl.constexpr = X.dtype.element_ty
    IMAGES: gl.constexpr = FRAMES + 2
    OUTPUTS: gl.constexpr = HEAD + TAIL
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, PIXELS, STEP], dtype)
    head_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([STEP, HEAD], dtype)
    tail_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([STEP, TAIL], dtype)
    row_size = width.to(gl.int64) * CHANNELS
    x_rows = tma.make_tensor_descriptor(
        X, [images + 2 * batch, height, width, CHANNELS], [height * row_size, row_size, CHANNELS, 1],
        [1, 1, PIXELS, STEP], x_layout,
    )  # fmt: skip
    head_rows = tma.make_tensor_descriptor(W, [27 * CHANNELS, OUTPUTS], [OUTPUTS, 1], [STEP, HEAD], head_layout)
    tail_rows = tma.make_tensor_descriptor(W, [27 * CHANNELS, OUTPUTS], [OUTPUTS, 1], [STEP, TAIL], tail_layout)
    head_out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, PIXELS, HEAD], dtype)
    tail_out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, PIXELS, TAIL], dtype)
    row_size = width.to(gl.int64) * OUTPUTS
    head_out_rows = tma.make_tensor_descriptor(
        OUT, [images, height, width, OUTPUTS], [height * row_size, row_size, OUTPUTS, 1], [1, 1, PIXELS, HEAD],
        head_out_layout,
    )  # fmt: skip
    tail_out_rows = tma.make_tensor_descriptor(
        OUT, [images, height, width, OUTPUTS], [height * row_size, row_size, OUTPUTS, 1], [1, 1, PIXELS, TAIL],
        tail_out_layout,
    )  # fmt: skip
    head_out = gl.allocate_shared_memory(dtype, [2, 1, 1, PIXELS, HEAD], head_out_layout)
    tail_out = gl.allocate_shared_memory(dtype, [2, 1, 1, PIXELS, TAIL], tail_out_layout)
    pieces = gl.allocate_shared_memory(dtype, [STAGES * IMAGES * 2, 1, 1, PIXELS, STEP], x_layout)
    heads = gl.allocate_shared_memory(dtype, [STAGES * 3, STEP, HEAD], head_layout)
    tails = gl.allocate_shared_memory(dtype, [STAGES * 3, STEP, TAIL], tail_layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)

    buffers = (pieces, heads, tails, ready, free)
    outs = (head_out, tail_out)
    out_rows = (head_out_rows, tail_out_rows)
    gl.warp_specialize(
        [
            (_multiply, (
                0, out_rows, buffers, outs, BIAS, cut, tiles, CHANNELS, HEAD, TAIL, FRAMES, STAGES, REGISTERS,
            )),
            (_multiply, (
                1, out_rows, buffers, outs, BIAS, cut, tiles, CHANNELS, HEAD, TAIL, FRAMES, STAGES, REGISTERS,
            )),
            (_load, ((x_rows, head_rows, tail_rows), buffers, cut, tiles, CHANNELS, HEAD, TAIL, FRAMES, STAGES)),
        ],
        [4, 1], [232, 40],
    )  # fmt: skip


def fits(images: int, batch: int, channels: int, outputs: int, device: torch.device) -> bool:
    """Whether convolve takes these sizes: 96 outputs, frames in fours."""
    return runs_on(device) and outputs == OUTPUTS and not channels % 32 and not images // batch % FRAMES


def convolve(x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor, batch: int) -> None:
    """x [images + 2 * batch, H, W, C], packed [27 * C, 96], bias [96] or None -> out [images, H, W, 96], contiguous."""
    (images, height, width, outputs), channels = out.shape, x.shape[-1]
    head, tail = head_and_tail(outputs)
    tiles = images // FRAMES * -(-height * -(-width // 64) // 2)
    launch(
        convolve_hopper, (min(tiles, multiprocessors(x.device)),), x, packed, bias, out, images, height, width,
        batch, channels, head, tail, FRAMES, STAGES, REGISTERS, num_warps=WARPS,
    )  # fmt: skip
