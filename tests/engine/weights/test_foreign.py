"""Files that are no dense weights of a part: each gives one line that says what it is, from the command line."""

import argparse
import pathlib

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from engine import cli
from engine.run import main
from engine.weights.formats.torch_files import load_torch
from engine.weights.sources import open_source

SMALL = ["--preset", "self-forcing", "--prompt", "a", "--frames", "1", "--out", "null", "--height", "32",
         "--width", "48", "--quiet"]  # fmt: skip
OPTIONS = ("--checkpoint", "--vae", "--text-encoder", "--adapter")


def error_of(capsys, arguments):
    """The one line on stderr of a run that is refused."""
    capsys.readouterr()
    assert main([str(word) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


def of_inspect(capsys, path):
    """What inspect says of a file that is refused."""
    capsys.readouterr()
    assert cli.main(["inspect", str(path)]) == 2
    captured = capsys.readouterr()
    return captured.err + captured.out


ODD = {
    "sparse_coo": (lambda t: t.to_sparse(), "a sparse tensor (sparse_coo)"),
    "sparse_csr": (lambda t: t.flatten(1).to_sparse_csr(), "a sparse tensor (sparse_csr)"),
    "meta": (lambda t: t.to("meta"), "a tensor without data"),
    "per tensor": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "a quantised tensor (qint8)"),
    "per channel": (
        lambda t: torch.quantize_per_channel(t, torch.ones(len(t)), torch.zeros(len(t)), 0, torch.quint8), "(quint8)"),
    "nested": (lambda t: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
    "complex": (lambda t: t.to(torch.complex64), "a tensor in complex64"), "None": (lambda t: None, "None"),
    "text": (lambda t: "weights", "a value of type str"), "list": (lambda t: [t], "a value of type list"),
    "number": (lambda t: 1.5, "a value of type float"),
    "bits": (lambda t: t.to(torch.uint8).view(torch.bits8), "(bits8)"),
    "numpy": (lambda t: t.numpy(), "an object of class numpy"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("states", [(), ("state_dict",), ("model", "generator")])
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_dense_tensor(folders, published, tmp_path, capsys, kind, states):
    change, said = ODD[kind]
    a = {f"blocks.0.self_attn.q.{name}.weight": torch.ones(4, 128) for name in ("lora_A", "lora_B")}
    cases = (
        ("--checkpoint", published.wan("transformer"), "blocks.1.cross_attn.o.weight"),
        ("--checkpoint", published.wan("transformer"), "blocks.0.self_attn.q.weight"),
        ("--vae", published.wan("vae"), "decoder.conv1.weight"),
        ("--text-encoder", published.wan("text"), "blocks.0.attn.q.weight"),
        ("--adapter", a, "blocks.0.self_attn.q.lora_B.weight"),
    )
    for option, state, key in cases:
        content = state | {key: change(state[key])}
        for name in reversed(states):
            content = {name: content}
        torch.save(content, tmp_path / "w.pt")
        whole = ".".join([*states, key])
        error = error_of(capsys, ["--model", folders["wan"], option, tmp_path / "w.pt", *SMALL])
        assert error.startswith(f"error: {tmp_path / 'w.pt'}: {whole}: got ")
        assert said in error
        assert "expected a dense tensor" in error
        assert f"{whole}: got " in of_inspect(capsys, tmp_path / "w.pt")


def test_complex_weights_in_safetensors(folders, published, tmp_path, capsys):
    state = published.wan("transformer")
    state["head.head.weight"] = state["head.head.weight"].to(torch.complex64)
    save_file(state, tmp_path / "w.safetensors")
    error = error_of(capsys, ["--model", folders["wan"], "--checkpoint", tmp_path / "w.safetensors", *SMALL])
    assert "head.head.weight: got a tensor in complex64, expected a dense tensor" in error


def test_odd_tensors_that_the_part_does_not_need(folders, published, tmp_path):
    """An optimizer's state, and Wan's complex table of positions."""
    state = published.wan("transformer")
    odd = {"state": {0: {"exp_avg": torch.eye(3).to_sparse(), "step.weight": None}}}
    torch.save(
        {"generator": state | {"freqs": torch.ones(3, dtype=torch.complex128)}, "optimizer": odd}, tmp_path / "w.pt"
    )
    found = dict(open_source(tmp_path / "w.pt").read())
    assert len(found) == len(state)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)


def script(file):
    torch.jit.script(torch.nn.Linear(2, 2)).save(file)


def trace(file):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(file)


def program(file):
    with file.open("wb") as opened:
        torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), opened)


def onnx_model(file, **options):
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []), **options), file)


FOREIGN = {
    "script": (script, "a TorchScript archive (torch.jit.save)"), "trace": (trace, "a TorchScript archive"),
    "pt2": (program, "a program of torch.export (.pt2)"),
    "module": (lambda file: torch.save(torch.nn.Linear(2, 2), file), "torch.nn.modules.linear.Linear, pickled whole"),
    "own module": (lambda file: torch.save(Net(), file), "Net, pickled whole"),
    "old module": (lambda file: torch.save(Net(), file, _use_new_zipfile_serialization=False), "an object of "),
    "onnx": (lambda file: onnx_model(file, producer_name="pytorch"), "an ONNX model"),
    "onnx without a producer": (onnx_model, "an ONNX model"),
    "flax": (lambda file: file.write_bytes(b"\x81\xa6params\x81\xa1a\xc0"), "a Flax checkpoint (msgpack)"),
    "long flax": (lambda file: file.write_bytes(b"\xde\x00\x20\xa6params\x81"), "a Flax checkpoint (msgpack)"),
    "saved model": (lambda file: file.write_bytes(b"\x08\x01\x12\xa3\x01"), "a TensorFlow model (SavedModel)"),
    "index": (lambda file: file.write_bytes(bytes(40) + bytes.fromhex("57fb808b247547db")), "a TensorFlow checkpoint"),
    "hdf5": (lambda file: file.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(40)), "an HDF5 file"),
    "tflite": (lambda file: file.write_bytes(b"\x1c\0\0\0TFL3" + bytes(40)), "a TensorFlow Lite model"),
    "npz": (lambda file: np.savez(file.open("wb"), a=np.ones(3)), "an archive of NumPy arrays"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.filterwarnings("ignore")
def test_files_of_other_programs(folders, tmp_path, capsys, kind):
    make, said = FOREIGN[kind]
    for name in ("w.pt", "w.safetensors"):
        make(tmp_path / name)
        for option in OPTIONS:
            error = error_of(capsys, ["--model", folders["wan"], option, tmp_path / name, *SMALL])
            assert said in error
            assert "expected" in error
        assert said in of_inspect(capsys, tmp_path / name)
        assert said in error_of(capsys, ["--model", tmp_path / name, *SMALL])


def lightning(state):
    return {"state_dict": state, "epoch": 3, "global_step": 7, "pytorch-lightning_version": "2.4", "callbacks": {},
            "hyper_parameters": argparse.Namespace(lr=1e-4, inner={"a": pathlib.PurePosixPath("b")}),
            "best": np.float64(0.5), "lr_schedulers": [{"loss": torch.nn.Linear(2, 2)}]}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "model.", "generator."])
def test_checkpoints_of_lightning(folders, published, tmp_path, capsys, prefix):
    """Settings and objects beside the state are left where they are; none of their classes is imported."""
    state = published.wan("transformer")
    torch.save(lightning({prefix + name: tensor for name, tensor in state.items()}), tmp_path / "epoch=3.ckpt")
    source = open_source(tmp_path / "epoch=3.ckpt")
    found = dict(source.read())
    assert all(torch.equal(found[source.found.naming.translate(name)], tensor) for name, tensor in state.items())
    assert len(found) == len(state)
    assert main(["--model", str(folders["wan"]), "--checkpoint", str(tmp_path / "epoch=3.ckpt"), *SMALL]) == 0
    torch.save(lightning({}), tmp_path / "empty.ckpt")
    error_of(capsys, ["--model", folders["wan"], "--checkpoint", tmp_path / "empty.ckpt", *SMALL])


class Planted:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (self.target, "w")


class Restored:
    ran = False

    def __setstate__(self, state):
        Restored.ran = True


def test_no_code_of_a_file_runs(published, tmp_path):
    restored = Restored()
    restored.value = 1
    state = published.wan("transformer")
    torch.save({"state_dict": state, "a": Planted(str(tmp_path / "pwned")), "b": restored}, tmp_path / "w.pt")
    loaded, _ = load_torch(tmp_path / "w.pt")
    assert len(loaded["state_dict"]) == len(state)
    assert not (tmp_path / "pwned").exists()
    assert not Restored.ran
