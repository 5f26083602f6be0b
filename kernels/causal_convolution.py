"""The VAE's 3x3x3 causal convolutions of few outputs, which cuDNN's tiles fit badly.

cuDNN's tiles are 64 outputs wide, so 96 outputs cost as much as 128. Here a program adds up 64 + 32 columns of outputs.
TMA fetches pieces of image rows, and what lies outside an image is zero: that is the "same" padding.

With 3 outputs the convolution is bound by memory, and 27 taps would each fetch the images again. There a product over
the three taps in time first gives every pixel's share in each of its neighbours, 9 * 3 planes of float32. A second
kernel adds up the planes, each shifted by its tap. So the images are read once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import hopper_convolution as hopper
from kernels.checks import described, head_and_tail, needs_gradient, power_of_two
from kernels.launch import descriptor, launch, shared_kb, tl, triton
from kernels.table import Variant, has_kernel, implementation, register

STEP = 32  # channels a product: the largest power of two that divides 96
WIDEST = 96  # outputs whose sums fit the registers
FEW = 3  # outputs up to which the planes are worth it: 9 * 3 <= 32 columns of a product
SMALL_KB = 200  # shared memory of GPUs for which the tiles are not made; there they spill
_PIXELS = 1024  # per program of the second kernel


@dataclass(frozen=True)
class Tiles:
    """What a program does, and how. A thread holds frames * columns * outputs / (32 * warps) sums."""

    frames: int = 4  # output frames, which share the weights; fewer where the frames do not divide
    columns: int = 64  # pixels of an image row; 832 and 1280 are multiples of 64
    taps: int = 1  # taps in time a step; 3 fetch an image once instead of three times, but the products wait in turn
    stages: int = 4  # steps under way
    warps: int = 4  # two programs share a multiprocessor


_FEW_TILES = Tiles(taps=3, stages=3)


def causal_convolution_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, batch: int = 1, packed: Tensor | None = None
) -> Tensor:
    """x [(T + 2) * B, C, H, W], weight [C', C, 3, 3, 3], bias [C'] -> [T * B, C', H, W]; images are time-major."""
    video = x.unflatten(0, (-1, batch)).permute(1, 2, 0, 3, 4)
    return F.conv3d(video, weight, bias, padding=(0, 1, 1)).permute(2, 0, 1, 3, 4).flatten(0, 1)


def pack(weight: Tensor) -> Tensor:
    """weight [C', C, 3, 3, 3] as the kernel reads it: [taps * C, columns], a column an output, padded with zeros.

    Taps are (time, row, column); for FEW outputs only (time), and the columns are (row, column, output).
    """
    weight = weight.detach()
    few = len(weight) <= FEW
    rows = (
        weight.permute(2, 1, 3, 4, 0).flatten(0, 1).flatten(1) if few else weight.permute(2, 3, 4, 1, 0).flatten(0, 3)
    )
    return F.pad(rows, (0, -rows.shape[1] % 16)).contiguous()


def has_fast_kernel(device: torch.device) -> bool:
    """Whether the kernel runs on a device, and not one with less shared memory and other matrix units than Hopper's."""
    return has_kernel("causal_convolution", device) and shared_kb(device) > SMALL_KB


def _packed_shape(outputs: int, channels: int) -> tuple[int, int]:
    few = outputs <= FEW
    columns = 9 * outputs if few else outputs
    return (3 if few else 27) * channels, columns + -columns % 16


@triton.jit(do_not_specialize=["height", "width", "batch"])
def _taps(
    X, W_HEAD, W_TAIL, BIAS, OUT, height, width, batch, SIZE: tl.constexpr, CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr, PLANES: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, FRAMES: tl.constexpr,
    COLUMNS: tl.constexpr, TAPS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (piece of an image row, group of frames and video): HEAD + TAIL outputs of FRAMES * COLUMNS pixels.

    X: descriptor of [images + 2 * batch, height, width, CHANNELS]; W_HEAD, W_TAIL: of [3 * SIZE * SIZE * CHANNELS, ..].
    OUT [images, height, width, OUTPUTS], or with PLANES [OUTPUTS, images, height, width]; BIAS [OUTPUTS] or None.
    """
    across = tl.cdiv(width, COLUMNS)
    row, left = tl.program_id(0) // across, tl.program_id(0) % across * COLUMNS
    image = tl.program_id(1) // batch * FRAMES * batch + tl.program_id(1) % batch
    heads, tails = tl.tuple([]), tl.tuple([])
    for _ in tl.static_range(FRAMES):
        heads += (tl.zeros([COLUMNS, HEAD], tl.float32),)
        if TAIL:
            tails += (tl.zeros([COLUMNS, TAIL], tl.float32),)
    blocks: tl.constexpr = CHANNELS // STEP
    for step in tl.range(3 // TAPS * SIZE * SIZE * blocks, num_stages=STAGES):
        tap, channel = step // blocks, step % blocks * STEP
        time, tap = tap // (SIZE * SIZE), tap % (SIZE * SIZE)
        y, x = row + tap // SIZE - SIZE // 2, left + tap % SIZE - SIZE // 2
        w_heads, w_tails, pieces = tl.tuple([]), tl.tuple([]), tl.tuple([])
        for k in tl.static_range(TAPS):
            at = ((time + k) * SIZE * SIZE + tap) * CHANNELS + channel
            w_heads += (W_HEAD.load([at, 0]),)
            if TAIL:
                w_tails += (W_TAIL.load([at, HEAD]),)
        for f in tl.static_range(FRAMES + TAPS - 1):
            pieces += (X.load([image + (time + f) * batch, y, x, channel]).reshape(COLUMNS, STEP),)
        new_heads, new_tails = tl.tuple([]), tl.tuple([])
        for f in tl.static_range(FRAMES):
            head = heads[f]
            for k in tl.static_range(TAPS):
                head = tl.dot(pieces[f + k], w_heads[k], head)
            new_heads += (head,)
            if TAIL:
                tail = tails[f]
                for k in tl.static_range(TAPS):
                    tail = tl.dot(pieces[f + k], w_tails[k], tail)
                new_tails += (tail,)
        heads, tails = new_heads, new_tails
    for f in tl.static_range(FRAMES):
        at = (image + f * batch).to(tl.int64) * height + row
        images = tl.num_programs(1) * FRAMES
        _store(heads[f], BIAS, OUT, at, left, 0, images, height, width, OUTPUTS, PLANES, HEAD, COLUMNS)
        if TAIL:
            _store(tails[f], BIAS, OUT, at, left, HEAD, images, height, width, OUTPUTS, PLANES, TAIL, COLUMNS)


@triton.jit
def _store(
    acc, BIAS, OUT, row, left, first, images, height, width, OUTPUTS: tl.constexpr, PLANES: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store the outputs from `first` on of the pixels from `left` on of an image row."""
    x, output = left + tl.arange(0, COLUMNS)[:, None], first + tl.arange(0, BLOCK)[None, :]
    if BIAS is not None:
        acc += tl.load(BIAS + output, mask=output < OUTPUTS, other=0.0).to(tl.float32)
    if PLANES:
        at = output.to(tl.int64) * images * height * width + row * width + x
    else:
        at = (row * width + x) * OUTPUTS + output
    tl.store(OUT + at, acc.to(OUT.dtype.element_ty), mask=(x < width) & (output < OUTPUTS))


@triton.jit(do_not_specialize=["images", "height", "width"])
def _add_planes(
    PLANES, BIAS, OUT, images, height, width, OUTPUTS: tl.constexpr, PIXELS: tl.constexpr
):  # fmt: skip
    """Program (pixels, image): PLANES [9 * OUTPUTS, images, height, width] -> OUT [images, height, width, OUTPUTS]."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    y, x = pixel // width, pixel % width
    inside = y < height
    plane = height.to(tl.int64) * width
    image = tl.program_id(1).to(tl.int64)
    for output in tl.static_range(OUTPUTS):
        total = tl.zeros([PIXELS], tl.float32)
        for tap in tl.static_range(9):
            v, u = y + (tap // 3 - 1), x + (tap % 3 - 1)
            seen = inside & (v >= 0) & (v < height) & (u >= 0) & (u < width)
            at = ((tap * OUTPUTS + output) * images + image) * plane + v * width + u
            total += tl.load(PLANES + at, mask=seen, other=0.0)
        if BIAS is not None:
            total += tl.load(BIAS + output).to(tl.float32)
        tl.store(OUT + (image * plane + pixel) * OUTPUTS + output, total.to(OUT.dtype.element_ty), mask=inside)


def causal_convolution_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, batch: int = 1, packed: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """Like causal_convolution_reference, but rounded once."""
    (_, channels, height, width), outputs = x.shape, len(weight)
    packed = pack(weight) if packed is None else packed
    images, few = len(x) - 2 * batch, outputs <= FEW
    out = torch.empty(images, height, width, outputs, dtype=x.dtype, device=x.device)
    images_last = x.permute(0, 2, 3, 1).flatten().view(len(x), height, width, channels)  # strides also of sizes of 1
    if tiles is None and hopper.fits(images, batch, channels, outputs, x.device):
        hopper.convolve(images_last, packed, bias, out, batch)
        return out.permute(0, 3, 1, 2)
    tiles = tiles or (_FEW_TILES if few else Tiles())
    sums = torch.empty(9 * outputs, images, height, width, device=x.device) if few else out
    columns = 9 * outputs if few else outputs
    head, tail = (power_of_two(columns), 0) if few else head_and_tail(columns)
    head, tail = max(head, 16), tail and max(tail, 16)
    frames = tiles.frames
    while images // batch % frames:
        frames //= 2
    launch(
        _taps, (height * -(-width // tiles.columns), images // frames),
        descriptor(images_last, [1, 1, tiles.columns, STEP]), descriptor(packed, [STEP, head]),
        descriptor(packed, [STEP, tail]) if tail else None, None if few else bias, sums, height, width, batch,
        1 if few else 3, channels, columns, few, head, tail, frames, tiles.columns, tiles.taps, STEP, tiles.stages,
        num_warps=tiles.warps,
    )  # fmt: skip
    if few:
        grid = -(-height * width // _PIXELS), images
        launch(_add_planes, grid, sums, bias, out, images, height, width, outputs, _PIXELS, num_warps=8)
    return out.permute(0, 3, 1, 2)


def causal_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, batch: int = 1, packed: Tensor | None = None
) -> Tensor:
    """Three taps in time, "same" in space: x [(T + 2) * B, C, H, W] -> [T * B, C', H, W], channels-last on a GPU.

    Images are time-major: frame t of the result sees frames t, t + 1 and t + 2 of x. weight [C', C, 3, 3, 3]; packed:
    pack(weight), where that was kept; bias [C'] or None. The kernel takes half precision, C in multiples of 32 and C'
    up to 96. Raises ValueError where shapes, dtypes or strides do not fit.
    """
    frames = len(x) - 2 * batch if x.ndim == 4 else 0
    fits = (
        batch > 0 and frames > 0 and not frames % batch and x.numel() and weight.ndim == 5
        and weight.shape[1:] == (x.shape[1], 3, 3, 3) and (bias is None or bias.shape == weight.shape[:1])
        and (packed is None or packed.shape == _packed_shape(*weight.shape[:2]))
        and all(t.dtype == x.dtype for t in (weight, bias, packed) if t is not None)
    )  # fmt: skip
    if not fits:
        got = described(x=x, weight=weight, bias=bias, packed=packed)
        raise ValueError(f"causal_convolution: got {got}, batch {batch}, expected x [(T + 2) * batch, C, H, W], weight "
                         "[C', C, 3, 3, 3] and bias [C'], packed as by pack, one dtype")  # fmt: skip
    plain = needs_gradient(x, weight) or (bias is not None and needs_gradient(bias))
    suits = x.dtype in (torch.bfloat16, torch.float16) and not x.shape[1] % STEP and len(weight) <= WIDEST
    call = implementation("causal_convolution", x.device, fits=suits and not plain)
    if call is causal_convolution_triton and not x.permute(0, 2, 3, 1).is_contiguous():
        raise ValueError(f"causal_convolution: got strides {x.stride()}, expected channels-last images")
    return call(x, weight, bias, batch, packed)


def _variants() -> Iterator[Variant]:
    """The decoder's last level at 832x480."""
    make = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    for outputs, frames in ((96, 4), (96, 1), (3, 4)):
        x, weight = make(frames + 2, 480, 832, 96).permute(0, 3, 1, 2), make(outputs, 96, 3, 3, 3)
        bias = make(outputs) if outputs == 3 else None
        call = partial(causal_convolution_triton, x, weight, bias)
        yield Variant(f"96 -> {outputs} x {frames}", call, ("HGMMA", "UTMALDG"))
    x, weight = make(6, 480, 832, 96).permute(0, 3, 1, 2), make(96, 96, 3, 3, 3)
    call = partial(causal_convolution_triton, x, weight, tiles=Tiles())
    yield Variant("96 -> 96 x 4, Triton's schedule", call, ("HGMMA", "UTMALDG"))


register(
    "causal_convolution", reference=causal_convolution_reference, triton=causal_convolution_triton, variants=_variants
)
