"""The kernels of the TensorRT plugins, run as a plugin runs them: addresses of inputs, then of outputs, one launch."""

import torch
from torch import Tensor

from export.tensorrt.plugins import KEYS, QUERIES, WARPS, write_keys_kernel, write_values_kernel
from kernels.launch import launch
from kernels.ring_attention import ring_attention_reference
from kernels.stream_k_attention import LOG2_E, attend_kernel

E4M3 = torch.float8_e4m3fn


def test_caches_are_written_in_place(device: torch.device) -> None:
    """37 tokens into the middle of a ring, ragged widths; everything else stays as it was."""
    heads, dim, tokens, rows, start_row = 3, 20, 37, 100, 41
    pitch = 112
    torch.manual_seed(0)
    update = (torch.randn(tokens, heads, dim, device=device) * 3).bfloat16()
    scale = torch.tensor([0.01, 0.02, 0.005], device=device)  # some values are beyond 448 of them
    at = torch.tensor([start_row], dtype=torch.int32, device=device)
    keys = torch.full((rows, heads, dim), 7.0, device=device).to(E4M3)
    values = torch.full((heads, dim, pitch), 7.0, device=device).to(E4M3)
    width = heads * dim
    launch(
        write_keys_kernel, (tokens, 1), keys, update, scale, at, keys,
        rows=rows, WIDTH=width, BLOCK=64, HEAD_DIM=dim, num_warps=4,
    )  # fmt: skip
    launch(
        write_values_kernel, (1, heads), values, update, scale, at, values,
        tokens=tokens, rows=pitch, pitch=pitch, WIDTH=width, HEAD_DIM=dim, DIM_BLOCK=32, TOKENS=64, num_warps=4,
    )  # fmt: skip
    expected = (update.float() / scale[:, None]).clamp(-448, 448).to(E4M3).float()
    assert torch.equal(keys[start_row : start_row + tokens].float(), expected)
    assert torch.equal(values[..., start_row : start_row + tokens].float(), expected.permute(1, 2, 0))
    assert (keys[:start_row].float() == 7).all()
    assert (keys[start_row + tokens :].float() == 7).all()
    assert (values[..., :start_row].float() == 7).all()
    assert (values[..., start_row + tokens :].float() == 7).all()


def attend(q: Tensor, k: Tensor, v: Tensor, valid_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """bf16, as compile_attention cuts it: one program per tile and head; returns out, partial, stats."""
    queries, heads, dim = q.shape
    programs = -(-queries // QUERIES) * heads
    out, lse = torch.empty_like(q), q.new_empty((heads, queries), dtype=torch.float32)
    partial, stats = (q.new_empty((16,), dtype=torch.float32) for _ in range(2))
    on_device = torch.tensor([valid_rows], dtype=torch.int32, device=q.device)
    launch(
        attend_kernel, (programs, 1), q, k, v, on_device, lse, lse, lse,
        out, lse, partial, stats, queries=queries, rows=len(k), pitch=dim, programs=programs, HEADS=heads, HEAD_DIM=dim,
        ROW=heads * dim, BLOCK_M=QUERIES, BLOCK_N=KEYS, ON_DEVICE=True, SCALE=dim**-0.5 * LOG2_E, FP8=False, STAGES=1,
        num_warps=WARPS,
    )  # fmt: skip
    return out, partial, stats


def test_no_tile_is_cut(device: torch.device) -> None:
    """A plugin has no memory for partial results, so nothing is written there. Rows after the valid ones are NaN."""
    torch.manual_seed(1)
    for queries, valid_rows in ((100, 64), (65, 150), (37, 37)):
        q = torch.randn(queries, 2, 32, device=device).bfloat16()
        k, v = (torch.randn(200, 2, 32, device=device).bfloat16() for _ in range(2))
        k[valid_rows:], v[valid_rows:] = float("nan"), float("nan")
        out, partial, stats = attend(q, k, v, valid_rows)
        expected = ring_attention_reference(q[None].double(), k[None].double(), v[None].double(), valid_rows)[0]
        assert float((out.double() - expected).norm() / expected.norm()) < 6e-3
        assert partial.isnan().all()
        assert stats.isnan().all()
