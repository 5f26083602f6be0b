"""8-bit weights with scales in every public spelling, and GGUF: what they are worth, and which ones are refused."""

import json

import gguf
import numpy as np
import pytest
import torch
from layouts import llama_text_names
from safetensors.torch import save_file

from engine import load
from engine.weights.containers import open_container
from engine.weights.sources import open_source

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture
def folder(folders):
    return folders["wan"]


def is_linear(name, tensor):
    return name.startswith("blocks.") and tensor.ndim == 2 and "norm" not in name and "embedding" not in name


def quantised(state, dtype, rows):
    """(8-bit weights and the rest, scales by layer, the worth of every tensor in float64)."""
    most = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    stored, scales, worth = {}, {}, {}
    for name, tensor in state.items():
        if not is_linear(name, tensor):
            stored[name], worth[name] = tensor, tensor.double()
            continue
        largest = tensor.abs().amax(1, keepdim=True) if rows else tensor.abs().max()
        scale = (largest / most).float()
        value = tensor / scale
        stored[name] = (value.round() if dtype == torch.int8 else value).to(dtype)
        scales[name.removesuffix(".weight")] = scale
        worth[name] = stored[name].double() * scale.double()
    return stored, scales, worth


def comfy_old(stored, scales, dtype):
    """A marker, X.scale_weight, and for some files X.scale_input."""
    extra = {f"{layer}.scale_weight": scale.reshape(()) for layer, scale in scales.items()}
    extra |= {f"{layer}.scale_input": torch.tensor(0.5) for layer in list(scales)[:3]}
    return stored | extra | {"scaled_fp8": torch.zeros(2, dtype=E4M3)}, None


def comfy_new(stored, scales, dtype):
    """X.weight_scale and a JSON text as bytes beside every layer."""
    kind = "int8_tensorwise" if dtype == torch.int8 else str(dtype).removeprefix("torch.")
    text = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
    extra = {f"{layer}.weight_scale": scale.reshape(()) for layer, scale in scales.items()}
    return stored | extra | {f"{layer}.comfy_quant": text.clone() for layer in scales}, None


def comfy_header(stored, scales, dtype):
    """X.weight_scale, described in the header."""
    kind = str(dtype).removeprefix("torch.")
    layers = {layer: {"format": kind} for layer in scales}
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    extra = {f"{layer}.weight_scale": scale.reshape(1) for layer, scale in scales.items()}
    extra |= {f"{layer}.input_scale": torch.tensor(0.5) for layer in scales}
    return stored | extra, header


def lightx2v(stored, scales, dtype):
    """X.weight_scale [out, 1], nothing else."""
    return stored | {f"{layer}.weight_scale": scale for layer, scale in scales.items()}, None


CASES = [
    (comfy_old, E4M3, False), (comfy_old, E5M2, False), (comfy_new, E4M3, False), (comfy_new, torch.int8, False),
    (comfy_header, E4M3, False), (comfy_header, E5M2, False), (lightx2v, E4M3, True), (lightx2v, torch.int8, True),
]  # fmt: skip


@pytest.mark.parametrize(("spelling", "dtype", "rows"), CASES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_weights_with_scales(published, tmp_path, spelling, dtype, rows, prefix, part):
    stored, scales, worth = quantised(published.wan("text" if part == "text_encoder" else part), dtype, rows)
    tensors, header = spelling(stored, scales, dtype)
    if part == "text_encoder" and spelling is comfy_old:
        tensors["spiece_model"] = torch.zeros(7, dtype=torch.uint8)
    file = tmp_path / "w.safetensors"
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, file, metadata=header)
    source = open_source(file, part=part)
    found = dict(source.read())
    names = {source.found.naming.translate(name): name for name in worth}
    assert found.keys() == names.keys() == source.shapes().keys()
    for ours, name in names.items():
        np.testing.assert_allclose(found[ours].double(), worth[name], rtol=1e-7, atol=0)
    assert any(f"{len(scales)} weights are stored in {str(dtype).removeprefix('torch.')}" in n for n in source.notes)


def test_a_scaled_checkpoint_streams_as_its_expansion(folder, published, tmp_path):
    stored, scales, worth = quantised(published.wan("transformer"), E4M3, False)
    tensors, _ = comfy_old(stored, scales, E4M3)
    save_file(tensors, tmp_path / "scaled.safetensors")
    save_file({name: tensor.float() for name, tensor in worth.items()}, tmp_path / "plain.safetensors")
    videos = []
    for name in ("scaled", "plain"):
        pipeline = load(folder, checkpoint=tmp_path / f"{name}.safetensors", preset="self-forcing", height=32, width=48)
        with pipeline.stream("a red circle", seed=1, frames=9) as stream:
            videos.append(np.stack(list(stream)))
        assert (name == "scaled") == any("stored in float8_e4m3fn" in note for note in pipeline.notes)
    assert np.array_equal(*videos)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (128,), (128, 1)])
@pytest.mark.parametrize("spelling", [comfy_old, comfy_new, comfy_header, lightx2v])
def test_a_scale_of_1_beside_a_plain_weight_changes_nothing(published, tmp_path, spelling, shape, dtype):
    """Some converters leave a layer as it was, and write the scale all the same."""
    layer, rest = "blocks.0.self_attn.q", published.wan("transformer")
    stored, scales, worth = quantised(rest, E4M3, spelling is lightx2v)
    tensors, header = spelling(stored, scales, E4M3)
    own = rest[f"{layer}.weight"].to(dtype)
    suffix = ".scale_weight" if spelling is comfy_old else ".weight_scale"
    tensors |= {f"{layer}.weight": own, f"{layer}{suffix}": torch.ones(shape)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "w.safetensors", header)
    source = open_source(tmp_path / "w.safetensors")
    found = dict(source.read())
    names = {source.found.naming.translate(name): name for name in worth}
    assert found.keys() == names.keys() == source.shapes().keys()
    for ours, name in names.items():
        if name == f"{layer}.weight":
            assert torch.equal(found[ours], own)
            assert ours not in source.scaled()
        else:
            np.testing.assert_allclose(found[ours].double(), worth[name], rtol=1e-7, atol=0)
    assert any(f"{len(scales) - 1} weights are stored in float8_e4m3fn" in note for note in source.notes)


def test_plain_8_bit_weights_without_scales(published, tmp_path):
    """Files that were only cast: the numbers are the weights."""
    state = {name: t.to(E4M3) if is_linear(name, t) else t for name, t in published.wan("transformer").items()}
    save_file(state, tmp_path / "w.safetensors")
    source = open_source(tmp_path / "w.safetensors")
    found = dict(source.read())
    assert len(found) == len(state)
    for name, tensor in state.items():
        assert torch.equal(found[source.found.naming.translate(name)].float(), tensor.float())
    assert any("stored in float8_e4m3fn" in note for note in source.notes)


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


LAYER = "blocks.0.self_attn.q"
FAULTS = {
    "no scale of one layer": (lambda t: without(t, f"{LAYER}.scale_weight"), r"got no scale of blocks\.0"),
    "a scale without weight": (lambda t: t | {"blocks.0.x.scale_weight": torch.ones(())}, r"without blocks\.0\.x"),
    "a scale of another shape": (lambda t: t | {f"{LAYER}.scale_weight": torch.ones(3)}, r"\[3\], expected one number"),
    "a scale of blocks": (lambda t: t | {f"{LAYER}.scale_weight": torch.ones(1, 2)}, r"\[1, 2\], expected one number"),
    "a negative scale": (lambda t: t | {f"{LAYER}.scale_weight": torch.tensor(-1.0)}, "positive, finite"),
    "a scale of nan": (lambda t: t | {f"{LAYER}.scale_weight": torch.tensor(torch.nan)}, "positive, finite"),
    "a plain weight with a scale": (lambda t: t | {f"{LAYER}.weight": torch.ones(128, 128)}, "expected a weight in 8"),
    "a plain weight with a scale of 2": (
        lambda t: t | {f"{LAYER}.weight": torch.ones(128, 128), f"{LAYER}.scale_weight": torch.tensor(2.0)},
        r"other than 1 beside blocks\.0\.self_attn\.q\.weight in torch\.float32, expected a weight in 8 bits"),
    "a plain weight with scales of which one is 1": (
        lambda t: t | {f"{LAYER}.weight": torch.ones(128, 128).bfloat16(),
                       f"{LAYER}.scale_weight": torch.tensor([1.0] * 127 + [1.001])}, "other than 1 beside"),
    "an exponent beside a plain weight": (
        lambda t: t | {f"{LAYER}.weight": torch.ones(128, 128),
                       f"{LAYER}.scale_weight": torch.tensor(1, dtype=torch.uint8)}, "other than 1 beside"),
    "whole numbers": (lambda t: t | {"head.head.weight": torch.ones(64, 128, dtype=torch.int8)}, "int8 without a sca"),
    "bitsandbytes": (lambda t: t | {f"{LAYER}.weight.absmax": torch.ones(4)}, "bitsandbytes"),
    "NVFP4": (lambda t: t | {f"{LAYER}.weight_scale_2": torch.ones(())}, "NVFP4"),
    "scales by blocks": (lambda t: t | {f"{LAYER}.weight_scale_inv": torch.ones(1, 1)}, "scales by blocks"),
    "another format": (
        lambda t: t | {f"{LAYER}.comfy_quant": torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)},
        "in mxfp8, expected one of",
    ),
    "a rotation": (
        lambda t: t | {f"{LAYER}.comfy_quant": torch.tensor(
            list(b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}'), dtype=torch.uint8)},
        "int8_tensorwise with convrot",
    ),
    "16-bit words": (
        lambda t: t | {"head.head.weight": torch.ones(64, 128, dtype=torch.uint16)}, "uint16 without a scale"),
    "a scale of exponents": (
        lambda t: t | {f"{LAYER}.scale_weight": torch.tensor(127, dtype=torch.uint8)}, "expected a scale in float32"),
    "no format": (
        lambda t: t | {f"{LAYER}.comfy_quant": torch.tensor(list(b"{"), dtype=torch.uint8)}, "expected JSON"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_contradictions_are_refused_before_weights_are_read(published, tmp_path, fault):
    change, said = FAULTS[fault]
    stored, scales, _ = quantised(published.wan("transformer"), E4M3, False)
    tensors, _ = comfy_old(stored, scales, E4M3)
    save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=said):
        list(open_source(tmp_path / "w.safetensors").read())


def test_every_length_of_a_header(tmp_path):
    """A safetensors file begins with its header's length, which may look like another kind of file."""
    for pad in range(300):
        file = tmp_path / "w.bin"
        save_file({"blocks.0.attn1.to_q.weight": torch.zeros(1)}, file, metadata={"pad": "x" * pad})
        assert open_container(file).kind == "safetensors"


@pytest.mark.parametrize("header", ["{", "[]", '{"layers": []}', '{"layers": {"a": {}}}'])
def test_damaged_descriptions(published, tmp_path, header):
    save_file(published.wan("transformer"), tmp_path / "w.safetensors", metadata={"_quantization_metadata": header})
    with pytest.raises(ValueError, match="_quantization_metadata"):
        open_source(tmp_path / "w.safetensors")


def write_gguf(file, state, architecture, kind, prefix=""):
    """As ComfyUI's converters write it: small and one-dimensional tensors plain, a fifth dimension in a field."""
    writer = gguf.GGUFWriter(file, architecture)
    worth = {}
    for name, tensor in state.items():
        values = tensor.float().numpy()
        shape = values.shape
        if values.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{prefix}{name}", [int(n) for n in shape])
            values = values.reshape(shape[0], -1)
        fits = values.ndim == 2 and values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        own = kind if fits else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(values, own)
        writer.add_tensor(prefix + name, data, raw_dtype=own)
        worth[name] = gguf.quants.dequantize(data, own).reshape(shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return worth


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_1", "Q4_0"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_gguf_transformer(published, tmp_path, kind, prefix):
    kind = gguf.GGMLQuantizationType[kind]
    file = tmp_path / "anything.bin"
    worth = write_gguf(file, published.wan("transformer"), "wan", kind, prefix)
    source = open_source(file)
    found = dict(source.read())
    assert len(found) == len(worth)
    for name, values in worth.items():
        got = found[source.found.naming.translate(name)]
        assert got.shape == values.shape
        np.testing.assert_array_equal(got.float().numpy(), values)
    assert any(kind.name in note for note in source.notes) == kind.name.startswith("Q")


def test_gguf_text_encoder_in_the_names_of_llama_cpp(folder, published, tmp_path):
    state = published.state("text")
    worth = write_gguf(tmp_path / "t5.gguf", {a: state[b] for a, b in llama_text_names().items()}, "t5encoder",
                       gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
    save_file({ours: torch.from_numpy(worth[name].copy()) for name, ours in llama_text_names().items()},
              tmp_path / "plain.safetensors")  # fmt: skip
    embedded = [load(folder, text_encoder=tmp_path / name, height=32, width=48).encode_prompt("a red circle")
                for name in ("t5.gguf", "plain.safetensors")]  # fmt: skip
    assert torch.equal(*embedded)


def test_damaged_gguf(published, tmp_path):
    write_gguf(tmp_path / "w.gguf", published.wan("transformer"), "wan", gguf.GGMLQuantizationType.Q8_0)
    whole = (tmp_path / "w.gguf").read_bytes()
    for end in (5, 100, len(whole) // 2, len(whole) - 40):
        (tmp_path / "cut.gguf").write_bytes(whole[:end])
        with pytest.raises(ValueError, match="expected GGUF"):
            open_source(tmp_path / "cut.gguf")
