"""Our attention kernel, and writes into FP8 caches, as TensorRT plugins compiled ahead of time: PTX inside the plan.

Written against TensorRT 11, not executed by us. A plugin of this kind starts one kernel. Its arguments are the
addresses of its inputs, then of its outputs; all others must be int32. So sizes are constants of the compiled kernel.
Triton appends two addresses to every kernel (memory for descriptors, memory for profiling): these are two more outputs.
Attention starts one program per tile. The engine's own launch cuts tiles to fill the chip, which needs a second kernel.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

from kernels.launch import tl, triton
from kernels.quantize import to_e4m3
from kernels.stream_k_attention import LOG2_E, attend_kernel

NAMESPACE = "greedy"
# The oldest PTX version with the loads of these kernels. CUDA 13.0 refuses Triton's own choice, 9.4.
PTX_VERSION = 86
# A project that uses such plugins found a limit of 48 KiB of shared memory; these kernels stay below it.
QUERIES, KEYS, WARPS = 64, 64, 4  # queries of a tile, keys of a block, warps of a program
STAGES = {False: 1, True: 2}  # blocks of keys in flight: bf16, FP8
SHARED_BYTES = 48 * 1024
DESCRIPTOR_BYTES = 3 * 128  # per program of attention: descriptors of queries, keys and values
_UNUSED = 16  # elements of an output that is never written
_SMALL = ("VALID_ROWS", "START_ROW", "SCALE", "Q_SCALE", "K_SCALE", "V_SCALE")  # need no alignment


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel, as a plugin gives it to TensorRT."""

    name: str
    ptx: str
    threads: int
    shared_bytes: int
    grid: tuple[int, int]


@functools.cache
def compile_attention(queries: int, rows: int, heads: int, head_dim: int, fp8: bool, capability: int = 90) -> Kernel:
    """Q [queries, heads, d], K and V [rows, heads, d] bf16; or e4m3 with V [heads, d, rows up to a multiple of 16]."""
    programs = -(-queries // QUERIES) * heads  # one per tile and head
    cache = "*fp8e4nv" if fp8 else "*bf16"
    pointers = {"Q": "*bf16", "K": cache, "V": cache, "VALID_ROWS": "*i32", "OUT": "*bf16", "LSE": "*fp32"}
    pointers |= {"PARTIAL": "*fp32", "STATS": "*fp32"}
    scales = ("Q_SCALE", "K_SCALE", "V_SCALE")
    constants: dict[str, Any] = {
        "queries": queries, "rows": rows, "pitch": (rows + 15) // 16 * 16 if fp8 else head_dim, "programs": programs,
        "HEADS": heads, "HEAD_DIM": head_dim, "ROW": heads * head_dim, "BLOCK_M": QUERIES, "BLOCK_N": KEYS,
        "ON_DEVICE": True, "SCALE": head_dim**-0.5 * LOG2_E, "FP8": fp8, "STAGES": STAGES[fp8],
    }  # fmt: skip
    if fp8:
        pointers |= dict.fromkeys(scales, "*fp32")
    else:
        constants |= dict.fromkeys(scales)  # never read
    return _compile(attend_kernel, pointers, constants, WARPS, (programs, 1), capability)


@triton.jit
def write_keys_kernel(
    CACHE, UPDATE, SCALE, START_ROW, OUT, rows: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Program t: UPDATE [n, WIDTH] row t as e4m3 into row START_ROW + t of OUT [rows, WIDTH], which is CACHE."""
    token = tl.program_id(0)
    row = tl.load(START_ROW).to(tl.int64) + token
    at = tl.arange(0, BLOCK)
    width = tl.where((row >= 0) & (row < rows), WIDTH, 0)  # a wrong start_row must not reach other memory
    x = tl.load(UPDATE + token.to(tl.int64) * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    scale = tl.load(SCALE + at // HEAD_DIM, mask=at < WIDTH, other=1.0)
    tl.store(OUT + row * WIDTH + at, to_e4m3(x, scale).to(tl.float8e4nv), mask=at < width)


@triton.jit
def write_values_kernel(
    CACHE, UPDATE, SCALE, START_ROW, OUT, tokens: tl.constexpr, rows: tl.constexpr, pitch: tl.constexpr,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens, head): UPDATE [tokens, WIDTH] as e4m3 into columns of OUT [heads, HEAD_DIM, pitch]."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    head = tl.program_id(1)
    element = tl.arange(0, DIM_BLOCK)[None, :]
    inside = (token < tokens) & (element < HEAD_DIM)
    x = tl.load(UPDATE + token * WIDTH + head * HEAD_DIM + element, mask=inside, other=0.0).to(tl.float32)
    row = tl.load(START_ROW).to(tl.int64) + token
    target = OUT + (head * HEAD_DIM + element).to(tl.int64) * pitch + row
    tl.store(target, to_e4m3(x, tl.load(SCALE + head)).to(tl.float8e4nv), mask=inside & (row >= 0) & (row < rows))


_WRITE = {"CACHE": "*fp8e4nv", "UPDATE": "*bf16", "SCALE": "*fp32", "START_ROW": "*i32", "OUT": "*fp8e4nv"}


@functools.cache
def compile_write_keys(tokens: int, rows: int, heads: int, head_dim: int, capability: int = 90) -> Kernel:
    """bf16 keys [tokens, heads, d] into e4m3 [rows, heads, d]."""
    width = heads * head_dim
    constants = {"rows": rows, "WIDTH": width, "BLOCK": triton.next_power_of_2(width), "HEAD_DIM": head_dim}
    return _compile(write_keys_kernel, _WRITE, constants, 4, (tokens, 1), capability)


@functools.cache
def compile_write_values(tokens: int, pitch: int, heads: int, head_dim: int, capability: int = 90) -> Kernel:
    """bf16 values [tokens, heads, d] into e4m3 [heads, d, pitch]."""
    constants = {
        "tokens": tokens, "rows": pitch, "pitch": pitch, "WIDTH": heads * head_dim, "HEAD_DIM": head_dim,
        "DIM_BLOCK": triton.next_power_of_2(head_dim), "TOKENS": 64,
    }  # fmt: skip
    return _compile(write_values_kernel, _WRITE, constants, 4, (-(-tokens // 64), heads), capability)


def _compile(
    function: Any, pointers: dict[str, str], constants: dict[str, Any], warps: int, grid: tuple[int, int],
    capability: int,
) -> Kernel:  # fmt: skip
    """Compile a kernel. Its parameters are `pointers`, in its own order, and Triton's two."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    signature = {name: pointers.get(name, "constexpr") for name in names}
    # Addresses of TensorRT's tensors are multiples of 256.
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in pointers and n not in _SMALL}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "ptx_version": PTX_VERSION, "enable_fp_fusion": True}
    before, knobs.compilation.disable_line_info = knobs.compilation.disable_line_info, True  # paths of this machine
    try:
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    finally:
        knobs.compilation.disable_line_info = before
    about = made.metadata
    if about.shared > SHARED_BYTES or about.global_scratch_size > DESCRIPTOR_BYTES:
        raise ValueError(f"plugin: got {about.shared} bytes shared, {about.global_scratch_size} of scratch, "
                         f"expected at most {SHARED_BYTES} and {DESCRIPTOR_BYTES}")  # fmt: skip
    return Kernel(about.name, made.asm["ptx"], 32 * warps, about.shared, grid)


@functools.cache
def register_plugins(capability: int) -> None:
    """Register the plugins with TensorRT for a GPU of this compute capability (90: Hopper), once per process."""
    import tensorrt as trt
    import tensorrt.plugin as trtp

    def hidden(programs: Any) -> tuple[Any, Any]:
        """Triton's own two outputs: descriptors of every program, and profiles, which are not used."""
        descriptors = trtp.from_shape_expr((programs * (DESCRIPTOR_BYTES // 4),), dtype=trt.int32)
        return descriptors, trtp.from_shape_expr((_UNUSED,), dtype=trt.int32)

    def attention_outputs(q: Any, heads: int) -> tuple[Any, ...]:
        """out, logarithms of the softmax's denominators, two unused ones for cut tiles, and Triton's two."""
        lse = trtp.from_shape_expr((1, heads, q.shape_expr[1]), dtype=trt.float32)
        partial, stats = (trtp.from_shape_expr((_UNUSED,), dtype=trt.float32) for _ in range(2))
        return q.like(), lse, partial, stats, *hidden(trtp.cdiv(q.shape_expr[1], QUERIES) * heads)

    def ring_attention(q, k, v, valid_rows, heads):
        return attention_outputs(q, heads)

    def ring_attention_kernel(q, k, v, valid_rows, heads, outputs, tactic):
        queries, rows, dim = _size(q, 1), _size(k, 2), _size(q, 2)
        return launch(compile_attention(queries, rows, heads, dim // heads, False, capability))

    def ring_attention_fp8(q, k, v, valid_rows, q_scale, k_scale, v_scale, heads):
        return attention_outputs(q, heads)

    def ring_attention_fp8_kernel(q, k, v, valid_rows, q_scale, k_scale, v_scale, heads, outputs, tactic):
        queries, rows, dim = _size(q, 1), _size(k, 1), _size(q, 2)
        return launch(compile_attention(queries, rows, heads, dim // heads, True, capability))

    def write_keys_fp8(ring, update, scale, start_row):
        return ring.aliased(), *hidden(1)

    def write_keys_fp8_kernel(ring, update, scale, start_row, outputs, tactic):
        heads, dim = _size(scale, 0), _size(ring, 2)
        return launch(compile_write_keys(_size(update, 1), _size(ring, 1), heads, dim // heads, capability))

    def write_values_fp8(ring, update, scale, start_row):
        return ring.aliased(), *hidden(1)

    def write_values_fp8_kernel(ring, update, scale, start_row, outputs, tactic):
        _, heads, head_dim, pitch = (_size(ring, axis) for axis in range(4))
        return launch(compile_write_values(_size(update, 1), pitch, heads, head_dim, capability))

    def launch(kernel: Kernel) -> tuple[Any, Any, Any, Any]:
        params = trtp.KernelLaunchParams()
        params.grid_x, params.grid_y = kernel.grid
        params.block_x = kernel.threads
        params.shared_mem = kernel.shared_bytes
        return kernel.name, kernel.ptx, params, trtp.SymIntExprs.from_tuple([])

    for describe, implement, outputs in (
        (ring_attention, ring_attention_kernel, 6),
        (ring_attention_fp8, ring_attention_fp8_kernel, 6),
        (write_keys_fp8, write_keys_fp8_kernel, 3),
        (write_values_fp8, write_values_fp8_kernel, 3),
    ):
        # TensorRT reads from the annotations which arguments are tensors or numbers, and how many outputs there are.
        kinds = {name: int if name == "heads" else trtp.TensorDesc for name in inspect.signature(describe).parameters}
        describe.__annotations__ = kinds | {"return": tuple[(trtp.TensorDesc,) * outputs]}  # type: ignore[misc]
        name = f"{NAMESPACE}::{describe.__name__}"
        trtp.register(name)(describe)
        trtp.aot_impl(name)(implement)


def _size(tensor: Any, axis: int) -> int:
    return tensor.shape_expr[axis].constant_value()
