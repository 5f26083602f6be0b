"""A full-width block as the engine runs it, compiled for sm_90 without a GPU: its own shapes, strides and prompts."""

import pytest
from test_compile import script

from kernels.launch import HAVE_TRITON

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")]

CUT = ("_multiply", "_add_parts")
CODE = """
from kernels import launch
from engine.model.cache import FP8, CachedAttention, RingCache
from engine.config import TransformerConfig
from engine.model.quantized import quantized
from engine.model.transformer import WanTransformer

def chunk(fp8, kv, frames):
    config = TransformerConfig(num_layers=1)
    model = WanTransformer(config, conditioned=True).to(torch.bfloat16)
    model.fuse()
    n = 1560 * frames
    latent, cos = torch.empty(1, 16, frames, 60, 104, dtype=torch.bfloat16), torch.empty(n, 64)
    text = [torch.empty(1, 1, 512, 12, 128, dtype=torch.bfloat16) for _ in range(2)]
    cache = RingCache(1, 1, 3 * frames, 1560, 12, 128, dtype=kv, device="meta")
    slot = torch.empty((), dtype=torch.int32)
    attend = CachedAttention(cache, slot, slot)
    c_f = torch.empty(1, n, 1536, dtype=torch.bfloat16)
    model = quantized(model, 'fp8', (), 'sdd') if fp8 else model
    return model(latent, torch.empty(1), text, cos, cos, attend, c_f)

found, checked = [], {}  # a kernel's machine code is read once
with torch.device("meta"), torch.inference_mode(), table.use("triton"):
    for fp8, kv in ((False, torch.bfloat16), (True, torch.bfloat16), (True, FP8)):
        for frames in (1, 3):
            with launch.compiling() as compiled:
                flow = chunk(fp8, kv, frames)
            assert flow.shape == (1, 16, frames, 60, 104)
            names = [kernel.metadata.name for kernel in compiled]
            fresh = {kernel.hash: kernel for kernel in compiled if frames == 1 and kernel.hash not in checked}
            checked |= fresh
            spills = [kernel.metadata.name for kernel in fresh.values()
                      if compile.resources(kernel.asm["cubin"])["spills"]]
            found.append([fp8, str(kv), frames, names, spills, len({kernel.hash for kernel in compiled})])
print(json.dumps(found))
"""


def test_a_chunk_runs_on_the_kernels_and_any_chunk_on_the_same_ones():
    rows = script(CODE)
    assert all(not spills for *_, spills, _ in rows)
    for one, three in zip(rows[::2], rows[1::2], strict=True):
        assert one[:2] == three[:2]
        # Chunks of 1 and of 3 latent frames launch the same kernels; how a product is cut depends on its size.
        assert [name for name in one[3] if name not in CUT] == [name for name in three[3] if name not in CUT]
    bf16, _, fp8, _, attention, _ = (set(names) for _, _, _, names, _, _ in rows)
    assert bf16 == {
        "_layer_norm",
        "_qk_norm_rope_write",
        "attend_hopper",
        "merge_kernel",
        "_gate_residual",
        "_rms_norm",
    }
    assert "_quantize_rows" in fp8 - bf16
    assert "_write_v_transposed" in attention - fp8
