"""One step of UniPC in one pass: the clean latent, the corrected sample, and the prediction for the next noise level.

As torch operations a step is some 25 launches on a latent of 100k numbers, and the host takes longer to issue them than
the device to compute. Arithmetic is float64 on every device, in one order of operations, so that the result does not
depend on the device.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from kernels.checks import described, needs_gradient
from kernels.launch import launch, tl, triton
from kernels.table import Variant, implementation, register

_BLOCK = 1024


@dataclass(frozen=True)
class Update:
    """Coefficients of a move from sample x with predictions p (and q, the one before) to another noise level.

    kept * x - fresh * p - fresh * (by_slope * (q - p) / ratio + by_newest * (newest - p))
    """

    kept: float
    fresh: float
    ratio: float = 1.0
    by_slope: float = 0.0  # 0: q is not read
    by_newest: float = 0.0  # 0: a predictor, which has no newer prediction


@dataclass(frozen=True)
class Past:
    """What a step hands to the next one, each in float64 and of x's shape."""

    sample: Tensor  # where the last predictor started
    prediction: Tensor  # the clean latent of the last step
    older: Tensor | None = None  # that of the step before


def _moved(x: Tensor, p: Tensor, q: Tensor | None, newest: Tensor | None, by: Update) -> Tensor:
    base = by.kept * x - by.fresh * p
    slope = 0.0 if q is None or not by.by_slope else by.by_slope * ((q - p) / by.ratio)
    if newest is not None and by.by_newest:
        slope = slope + by.by_newest * (newest - p)
    return base - by.fresh * slope


def unipc_step_reference(
    x: Tensor, flow: Tensor, past: Past | None, sigma: float, corrector: Update | None, predictor: Update | None
) -> tuple[Tensor, Past]:
    """In torch operations."""
    clean = x.double() - sigma * flow.double()
    sample = x.double()
    if past is not None and corrector is not None:
        sample = _moved(past.sample, past.prediction, past.older, clean, corrector)
    older = None if past is None else past.prediction
    following = clean if predictor is None else _moved(sample, clean, older, None, predictor)
    return following.to(x.dtype), Past(sample, clean, older)


@triton.jit
def _move(x, p, q, newest, at, SLOPE: tl.constexpr, NEWEST: tl.constexpr):
    """As _moved; the coefficients lie at `at`."""
    fresh = tl.load(at + 1)
    base = tl.load(at) * x - fresh * p
    slope = 0.0
    if SLOPE:
        slope = tl.load(at + 3) * ((q - p) / tl.load(at + 2))
    if NEWEST:
        slope += tl.load(at + 4) * (newest - p)
    return base - fresh * slope


@triton.jit(do_not_specialize=["size"])
def _unipc_step(
    X, FLOW, SAMPLE, PREDICTION, OLDER, NUMBERS, OUT, NEW_SAMPLE, NEW_PREDICTION, size,
    CORRECTS: tl.constexpr, CORRECTOR_SLOPE: tl.constexpr, PREDICTS: tl.constexpr, PREDICTOR_SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x, flow, out [size]; the rest float64 [size] or None; NUMBERS: sigma, then both updates' five coefficients."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(X + at, mask=inside, other=0.0)
    sample = x.to(tl.float64)
    clean = sample - tl.load(NUMBERS) * tl.load(FLOW + at, mask=inside, other=0.0).to(tl.float64)
    before = clean
    if PREDICTION is not None:
        before = tl.load(PREDICTION + at, mask=inside, other=0.0)
    if CORRECTS:
        older = before
        if CORRECTOR_SLOPE:
            older = tl.load(OLDER + at, mask=inside, other=0.0)
        start = tl.load(SAMPLE + at, mask=inside, other=0.0)
        sample = _move(start, before, older, clean, NUMBERS + 1, CORRECTOR_SLOPE, True)
    following = clean
    if PREDICTS:
        following = _move(sample, clean, before, clean, NUMBERS + 6, PREDICTOR_SLOPE, False)
    tl.store(NEW_SAMPLE + at, sample, mask=inside)
    tl.store(NEW_PREDICTION + at, clean, mask=inside)
    # Triton rounds float64 to bf16 twice, by way of float32, as torch does.
    tl.store(OUT + at, following.to(tl.float32).to(x.dtype), mask=inside)


@lru_cache(maxsize=256)
def _numbers(sigma: float, corrector: Update | None, predictor: Update | None, device: torch.device) -> Tensor:
    """[11] float64 on the device. A stream's chunks have the same ones, so only the first step waits for the upload."""
    nothing = Update(0.0, 0.0)
    return torch.tensor(
        [sigma, *astuple(corrector or nothing), *astuple(predictor or nothing)], dtype=torch.float64, device=device
    )


def unipc_step_triton(
    x: Tensor, flow: Tensor, past: Past | None, sigma: float, corrector: Update | None, predictor: Update | None
) -> tuple[Tensor, Past]:
    """The same numbers in one launch."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sample, clean = (torch.empty(x.shape, dtype=torch.float64, device=x.device) for _ in range(2))
    corrects = past is not None and corrector is not None
    before = None if past is None else past.prediction
    launch(
        _unipc_step, (-(-x.numel() // _BLOCK),), x.contiguous(), flow.contiguous(),
        past.sample if past is not None and corrects else None, before,
        past.older if past is not None and corrector is not None and corrector.by_slope else None,
        _numbers(sigma, corrector, predictor, x.device), out, sample, clean, x.numel(),
        corrects, corrector is not None and corrector.by_slope != 0, predictor is not None,
        predictor is not None and predictor.by_slope != 0, _BLOCK,
        enable_fp_fusion=False,  # every product rounds, as on a processor
    )  # fmt: skip
    return out, Past(sample, clean, before)


def unipc_step(
    x: Tensor, flow: Tensor, past: Past | None, sigma: float, corrector: Update | None, predictor: Update | None
) -> tuple[Tensor, Past]:
    """From x at noise level sigma: the next x in x's dtype, and what the next step needs.

    x and flow (noise - x) have one shape. past: what the step before returned, None in the first. corrector: from the
    last sample to sigma, None in the first step. predictor: from sigma to the next level, None in the last step, which
    returns the clean latent. Raises ValueError where shapes do not fit.
    """
    tensors = [] if past is None else [t for t in (past.sample, past.prediction, past.older) if t is not None]
    if any(t.shape != x.shape for t in (flow, *tensors)) or any(t.dtype != torch.float64 for t in tensors):
        got = described(x=x, flow=flow, **{f"past {i}": t for i, t in enumerate(tensors)})
        raise ValueError(f"unipc_step: got {got}, expected one shape, and a past in float64")
    call = implementation("unipc_step", x.device, fits=not needs_gradient(x, flow))
    return call(x, flow, past, sigma, corrector, predictor)


def _variants() -> Iterator[Variant]:
    """A latent frame of 832x480: the first, second, third and last step."""
    make = partial(torch.empty, 1, 16, 1, 60, 104, device="meta")
    x, wide = make(dtype=torch.bfloat16), make(dtype=torch.float64)
    first, later, corrector = Update(1.0, 0.5), Update(1.0, 0.5, 2.0, 0.5), Update(1.0, 0.5, 2.0, 0.5, 0.5)
    short, full = Past(wide, wide), Past(wide, wide, wide)
    yield Variant("first", partial(unipc_step_triton, x, x, None, 0.9, None, first))
    yield Variant("second", partial(unipc_step_triton, x, x, short, 0.9, Update(1.0, 0.5, by_newest=0.5), later))
    yield Variant("later", partial(unipc_step_triton, x, x, full, 0.9, corrector, later))
    yield Variant("last", partial(unipc_step_triton, x, x, full, 0.9, corrector, None))


register("unipc_step", reference=unipc_step_reference, triton=unipc_step_triton, variants=_variants)
