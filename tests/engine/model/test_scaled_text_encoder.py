"""A text encoder whose weights stay in 8 bits: transformers' bits with expanded weights, in the memory of 8 bits."""

import weakref

import pytest
import torch
from eight_bit_encoders import SIZES, SPELLINGS, encoder, expected, tokens, write
from torch.utils._python_dispatch import TorchDispatchMode

from engine.model.scaled_linear import ScaledEmbedding, ScaledLinear, expanded
from engine.model.umt5 import UMT5Config
from engine.weights.checkpoint import load_text_encoder
from engine.weights.sources import open_source
from engine.weights.text_encoder import ReleasedEncoder

CPU = torch.device("cpu")
CONFIG = UMT5Config(**SIZES)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def opened(file, dtype, config=CONFIG):
    return load_text_encoder(open_source(file, part="text_encoder"), config, dtype, CPU)


@pytest.mark.parametrize("embedding", [False, True], ids=["words in half", "words in 8 bits"])
@pytest.mark.parametrize("native", [False, True], ids=["transformers' names", "Wan's names"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_transformers_bits_from_weights_in_8_bits(tmp_path, spelling, dtype, native, embedding):
    model, (ids, mask) = encoder(), tokens()
    file, worth = write(tmp_path, spelling, model, native, embedding)
    ours = opened(file, dtype)
    kept = {name for name, layer in ours.named_modules() if isinstance(layer, ScaledLinear | ScaledEmbedding)}
    linears = {f"block.{i}.layer.{part}" for i in range(3) for part in (
        "0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v", "0.SelfAttention.o",
        "1.DenseReluDense.wi_0", "1.DenseReluDense.wi_1", "1.DenseReluDense.wo")}  # fmt: skip
    assert kept == linears | ({"embed_tokens"} if embedding else set())
    assert all(ours.get_submodule(name).weight.dtype == SPELLINGS[spelling][0] for name in kept)
    with torch.inference_mode():
        got, reread = ours(ids, mask), ReleasedEncoder(open_source(file, part="text_encoder"), CONFIG, dtype, CPU)
        right = expected(model, worth, dtype, ids, mask)
        assert got.dtype == right.dtype == dtype
        assert right.std() > 0.1
        assert torch.equal(got, right)
        assert torch.equal(reread(ids, mask), right)
        whole = expanded(ours)
        assert not any(isinstance(layer, ScaledLinear | ScaledEmbedding) for layer in whole.modules())
        assert torch.equal(whole(ids, mask), right)


class Allocations(TorchDispatchMode):
    """Bytes of the tensors that operations make, at their peak."""

    def __init__(self, module):
        super().__init__()
        self.live = self.peak = 0
        self._seen = {t.untyped_storage()._cdata: 0 for t in (*module.parameters(), *module.buffers())}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._seen:
                self._seen[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._drop, storage._cdata)
        return out

    def _drop(self, key):
        self.live -= self._seen.pop(key)


@pytest.mark.parametrize("spelling", ["comfy old", "rows int8", "cast e4m3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_memory_is_that_of_8_bits_and_one_weight(tmp_path, spelling, dtype):
    sizes = SIZES | {"d_model": 512, "d_ff": 2048, "d_kv": 64, "num_heads": 8, "num_layers": 4}
    model, (ids, mask) = encoder(**sizes), tokens(8)
    file, _ = write(tmp_path, spelling, model)
    ours = opened(file, dtype, UMT5Config(**sizes))
    eight = sum(layer.weight.numel() for layer in ours.modules() if isinstance(layer, ScaledLinear))
    assert eight == 4 * (4 * 512 * 512 + 3 * 512 * 2048)
    weights = sum(t.nbytes for t in (*ours.parameters(), *ours.buffers()))
    assert weights < 1.05 * eight
    largest = 512 * 2048
    with torch.inference_mode(), Allocations(ours) as counted:
        ours(ids, mask)
    # the expanded weight, the slice that is float32 at a time (or the rest of the next weight), and activations
    slices = 0 if spelling.startswith("cast") else 2 * 4 * (1 << 20)
    assert largest * dtype.itemsize <= counted.peak < largest * dtype.itemsize + slices + (2 << 20)


def test_a_scale_reaches_its_own_row(tmp_path):
    """Rows of very different size: a scale that is broadcast the other way would be seen at once."""
    model = encoder(d_model=64, d_kv=16)  # square weights
    for name, p in model.named_parameters():
        if name.endswith("SelfAttention.v.weight"):
            p.data *= torch.logspace(-3, 1, 64)[:, None]
    file, worth = write(tmp_path, "rows e4m3", model)
    ids, mask = tokens()
    with torch.inference_mode():
        got = opened(file, torch.float32, UMT5Config(**SIZES | {"d_model": 64, "d_kv": 16}))(ids, mask)
        assert torch.equal(got, expected(model, worth, torch.float32, ids, mask))


def test_gguf_is_expanded_when_it_is_loaded(tmp_path):
    """Blocks of GGUF have no module here: its weights become ordinary ones."""
    import gguf

    model = encoder(d_model=64, d_kv=16)
    writer = gguf.GGUFWriter(tmp_path / "umt5.gguf", "t5encoder")
    worth = {}
    for name, tensor in model.state_dict().items():
        if name == "encoder.embed_tokens.weight":
            continue
        values = tensor.detach().numpy()
        if tensor.ndim == 2 and "bias" not in name:
            packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            worth[name] = torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0).copy())
        else:
            writer.add_tensor(name, values)
            worth[name] = tensor.detach()
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    worth["encoder.embed_tokens.weight"] = worth["shared.weight"]
    config = UMT5Config(**SIZES | {"d_model": 64, "d_kv": 16})
    source, (ids, mask) = open_source(tmp_path / "umt5.gguf", part="text_encoder"), tokens()
    ours = load_text_encoder(source, config, torch.bfloat16, CPU)
    assert {t.dtype for t in (*ours.parameters(), *ours.buffers())} == {torch.bfloat16}
    with torch.inference_mode():
        right = expected(model, worth, torch.bfloat16, ids, mask)
        assert torch.equal(ours(ids, mask), right)
        assert torch.equal(ReleasedEncoder(source, config, torch.bfloat16, CPU)(ids, mask), right)


def test_a_missing_tensor_is_named(tmp_path):
    file, _ = write(tmp_path, "comfy old", encoder())
    with pytest.raises(ValueError, match=r"got 32 tensors with missing block\.3\..*expected 42"):
        opened(file, torch.float32, UMT5Config(**SIZES | {"num_layers": 4}))
