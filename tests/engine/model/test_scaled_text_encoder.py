"""A text encoder whose weights stay in 8 bits: transformers' bits with expanded weights, in the memory of 8 bits."""

import json

import pytest
import torch
from limits import Allocations
from safetensors.torch import save_file
from transformers import UMT5Config as TheirConfig
from transformers import UMT5EncoderModel

from engine.model.scaled_linear import ScaledEmbedding, ScaledLinear, expanded
from engine.model.umt5 import UMT5Config
from engine.weights.checkpoint import load_text_encoder
from engine.weights.sources import open_source
from engine.weights.text_encoder import ReleasedEncoder

CPU = torch.device("cpu")
SIZES = {"vocab_size": 50, "d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}
# spelling -> (dtype of the weights, one scale per row, key of the scale; None for weights that were only cast)
SPELLINGS = {
    "comfy old": (torch.float8_e4m3fn, False, "scale_weight"),
    "comfy old e5m2": (torch.float8_e5m2, False, "scale_weight"),
    "comfy new": (torch.float8_e4m3fn, False, "weight_scale"),
    "comfy new, header": (torch.float8_e4m3fn, False, "weight_scale"),
    "comfy new, int8": (torch.int8, False, "weight_scale"),
    "rows e4m3": (torch.float8_e4m3fn, True, "weight_scale"),
    "rows int8": (torch.int8, True, "weight_scale"),
    "cast e4m3": (torch.float8_e4m3fn, False, None),
    "cast e5m2": (torch.float8_e5m2, False, None),
}
FORMATS = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2", torch.int8: "int8_tensorwise"}


def encoder(**changes):
    """A random encoder of transformers. Its biases by position decide where a row looks."""
    torch.manual_seed(0)
    model = UMT5EncoderModel(
        TheirConfig(**SIZES | changes, feed_forward_proj="gated-gelu", num_decoder_layers=1)
    ).eval()
    for name, p in model.named_parameters():
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(p, std=2.0)
        elif p.ndim == 2 and "shared" not in name:
            p.data *= 4  # away from zero, where e4m3 has steps as large as the values
    return model


def quantised(weight, dtype, rows):
    """(8 bits, scale float32): the largest magnitude, of the whole weight or of each row, becomes the dtype's."""
    most = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = (weight.abs().amax(1, keepdim=True) if rows else weight.abs().amax()) / most
    values = weight / scale
    return (values.round() if dtype == torch.int8 else values).to(dtype), scale.float()


def write(folder, spelling, model, native=False, embedding=False):
    """Write an 8-bit file; returns it, and the weights that its numbers are worth: name -> float32.

    native     Wan's own names
    embedding  the table of words is in 8 bits as well
    """
    dtype, rows, key = SPELLINGS[spelling]
    tensors, worth, layers = {}, {}, {}
    for name, tensor in model.state_dict().items():
        if name == "encoder.embed_tokens.weight":
            continue
        tensor = tensor.detach()
        stored = wan_name(name) if native else name
        large = tensor.ndim == 2 and "bias" not in name and ("shared" not in name or embedding)
        if not large and key is None and "norm" in name:
            tensors[stored], worth[name] = tensor.to(dtype), tensor.to(dtype).float()  # a cast spares nothing
        elif not large:
            tensors[stored], worth[name] = tensor.half(), tensor.half().float()
        elif key is None:
            tensors[stored], worth[name] = tensor.to(dtype), tensor.to(dtype).float()
        else:
            tensors[stored], scale = quantised(tensor, dtype, rows)
            layer = stored.removesuffix(".weight")
            tensors[f"{layer}.{key}"] = scale
            worth[name] = tensors[stored].float() * scale
            layers[layer] = {"format": FORMATS[dtype]}
            if key == "scale_weight":
                tensors[f"{layer}.scale_input"] = torch.tensor(1.0)
            elif not rows and "header" not in spelling:
                text = json.dumps(layers[layer]).encode()
                tensors[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    if key == "scale_weight":
        tensors["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    header = {"_quantization_metadata": json.dumps({"layers": layers})} if "header" in spelling else {}
    file = folder / "umt5.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata=header)
    worth["encoder.embed_tokens.weight"] = worth["shared.weight"]
    return file, worth


def wan_name(name):
    """transformers' name -> the one in Wan's models_t5_umt5-xxl-enc-bf16.pth."""
    for theirs, wan in (
        ("encoder.block.", "blocks."), ("layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding"),
        ("layer.0.SelfAttention.", "attn."), ("layer.0.layer_norm", "norm1"), ("layer.1.layer_norm", "norm2"),
        ("layer.1.DenseReluDense.wi_0", "ffn.gate.0"), ("layer.1.DenseReluDense.wi_1", "ffn.fc1"),
        ("layer.1.DenseReluDense.wo", "ffn.fc2"), ("encoder.final_layer_norm", "norm"), ("shared", "token_embedding"),
    ):  # fmt: skip
        name = name.replace(theirs, wan)
    return name


def tokens(rows=16, vocabulary=50):
    """Two prompts of different lengths, padded."""
    ids = torch.randint(2, vocabulary, (2, rows), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, rows // 3 :] = 0
    return ids * mask, mask


def expected(model, worth, dtype, ids, mask):
    """transformers' last hidden state with weights of `worth`, as from_pretrained puts them into `dtype`."""
    wide = (lambda name: name.endswith(".wo.weight")) if dtype == torch.float16 else lambda name: False
    model.load_state_dict(worth)
    for name, p in model.named_parameters():
        p.data = worth[name].to(torch.float32 if wide(name) else dtype)
    with torch.no_grad():
        return model(ids, attention_mask=mask).last_hidden_state


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
