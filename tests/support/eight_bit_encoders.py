"""UMT5 encoders in the 8-bit files that people have, and what transformers computes with the same weights."""

import json

import torch
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

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
    model = UMT5EncoderModel(UMT5Config(**SIZES | changes, feed_forward_proj="gated-gelu", num_decoder_layers=1)).eval()
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
