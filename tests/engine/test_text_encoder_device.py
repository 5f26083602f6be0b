"""Where prompts are encoded: kept beside the model, on the processor, or read again for every prompt."""

import gc
import os
import shutil
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5EncoderModel

import engine
import engine.memory
from engine.memory import Case, place_encoder
from engine.model.scaled_linear import ScaledLinear
from engine.model.umt5 import Layer
from engine.runtime.stages import TorchStages
from engine.weights.text_encoder import ReleasedEncoder

PROMPTS = ["a red circle moving right", "a blue square on gray", "red"]


def theirs(folder, prompt):
    """transformers' embedding of a prompt, zero after its end."""
    encoded = AutoTokenizer.from_pretrained(folder / "tokenizer")(prompt, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        hidden = UMT5EncoderModel.from_pretrained(folder / "text_encoder")(
            encoded.input_ids, attention_mask=encoded.attention_mask
        ).last_hidden_state
    return hidden * encoded.attention_mask[..., None]


def frames_of(pipeline, prompt=PROMPTS[0], switch=None):
    with pipeline.stream(prompt, seed=3) as stream:
        chunks = [stream.next_chunk(), stream.next_chunk()]
        if switch:
            stream.set_prompt(switch)
        return np.concatenate([*chunks, stream.next_chunk(), stream.next_chunk()])


@pytest.fixture
def folder(model_dir, tmp_path):
    return shutil.copytree(model_dir, tmp_path / "model")


def stored_as(folder, how):
    """Other files of the same encoder, and transformers' folder with the weights that they are worth."""
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    if how == "torch file":
        torch.save(tensors, folder / "text_encoder" / "model.bin")
        file.unlink()
    elif how == "legacy torch file":
        torch.save(tensors, folder / "text_encoder" / "model.bin", _use_new_zipfile_serialization=False)
        file.unlink()
    elif how == "8 bits":
        small = {n: t.to(torch.float8_e4m3fn) if t.ndim == 2 and "bias" not in n else t for n, t in tensors.items()}
        save_file({name: tensor.float() for name, tensor in small.items()}, file)  # what transformers reads
        worth = [theirs(folder, prompt) for prompt in PROMPTS]
        save_file(small, file)
        return worth
    elif how == "shards":
        names = list(tensors)
        for number, own in enumerate((names[:7], names[7:]), start=1):
            save_file({n: tensors[n] for n in own}, file.with_name(f"model-{number:05d}-of-00002.safetensors"))
        file.unlink()
    return None


@pytest.mark.parametrize("how", ["safetensors", "torch file", "legacy torch file", "8 bits", "shards"])
@pytest.mark.parametrize("where", ["auto", "cpu", "release"])
def test_embeddings_are_transformers_wherever_they_are_made(folder, model_dir, where, how):
    worth = stored_as(folder, how) or [theirs(model_dir, prompt) for prompt in PROMPTS]
    pipeline = engine.load(folder, text_encoder_device=where)
    for _ in range(2):  # the second time the weights are read again
        for prompt, expected in zip(PROMPTS, worth, strict=True):
            got = pipeline.encode_prompt(prompt)
            assert (got.device, got.dtype) == (pipeline.device, pipeline.dtype)
            assert torch.equal(got, expected)


@pytest.mark.parametrize("options", [{"text_encoder_device": "release"}, {"low_memory": True}], ids=["release", "low"])
@pytest.mark.parametrize("preset", ["greedy", "self-forcing"])
def test_frames_do_not_depend_on_it(model_dir, preset, options):
    given = {"preset": preset, "overrides": {"window": 6} if preset != "greedy" else {}}
    kept = engine.load(model_dir, **given)
    other = engine.load(model_dir, **given, **options)
    assert isinstance(other.stages.text_encoder, ReleasedEncoder)
    assert np.array_equal(frames_of(other, switch=PROMPTS[1]), frames_of(kept, switch=PROMPTS[1]))


def test_no_weight_is_left_after_a_prompt(model_dir, monkeypatch):
    """And while it is encoded, only one layer's are there."""
    pipeline = engine.load(model_dir, text_encoder_device="release")
    layers, most = weakref.WeakSet(), []
    before = Layer.__init__

    def counted(self, config):
        before(self, config)
        layers.add(self)
        most.append(len(layers))

    monkeypatch.setattr(Layer, "__init__", counted)
    pipeline.encode_prompt("red")
    gc.collect()
    assert len(most) == 2  # the encoder's layers
    assert max(most) <= 2
    assert not layers
    encoder = pipeline.stages.text_encoder
    assert not [*encoder.parameters(), *encoder.buffers()]


def test_a_model_on_a_gpu_lets_the_gpus_memory_go_once_a_prompt(model_dir, monkeypatch):
    pipeline = engine.load(model_dir, text_encoder_device="release")
    freed = []
    monkeypatch.setattr("engine.weights.text_encoder.give_back", freed.append)
    pipeline.encode_prompt("red")
    assert freed == [torch.device("cpu")]
    monkeypatch.setattr(pipeline.stages.text_encoder, "_encode", lambda ids, seen: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipeline.encode_prompt("red")
    assert len(freed) == 2


@pytest.mark.parametrize("where", ["auto", "release"])
def test_several_threads_ask_at_once(model_dir, where):
    pipeline = engine.load(model_dir, text_encoder_device=where)
    alone = {prompt: frames_of(pipeline, prompt) for prompt in PROMPTS}
    found, errors, start = {}, [], threading.Barrier(len(PROMPTS))

    def stream(prompt):
        try:
            start.wait()
            found[prompt] = frames_of(pipeline, prompt)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=stream, args=(prompt,)) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(np.array_equal(found[prompt], alone[prompt]) for prompt in PROMPTS)


def test_a_running_stream_goes_on_while_another_prompt_is_read(model_dir):
    pipeline = engine.load(model_dir, text_encoder_device="release")
    expected = frames_of(pipeline)
    with pipeline.stream(PROMPTS[0], seed=3) as stream:
        got = [stream.next_chunk()]
        for prompt in PROMPTS:
            pipeline.encode_prompt(prompt)
            got.append(stream.next_chunk())
    assert np.array_equal(np.concatenate(got), expected)


@pytest.mark.parametrize("change", ["removed", "other weights"])
def test_files_that_change_meanwhile_are_refused(folder, change):
    pipeline = engine.load(folder, text_encoder_device="release")
    pipeline.encode_prompt("red")
    file = folder / "text_encoder" / "model.safetensors"
    if change == "removed":
        file.unlink()
    else:
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
        os.utime(file, ns=(1, 1))
    with pytest.raises((ValueError, FileNotFoundError), match=r"text.encoder.*expected"):
        pipeline.encode_prompt("red")


def test_cuda_beside_a_model_on_the_processor_is_refused(model_dir):
    with pytest.raises(ValueError, match=r"text_encoder_device: got cuda .*cpu, expected auto, cpu or release"):
        engine.load(model_dir, device="cpu", text_encoder_device="cuda")
    with pytest.raises(ValueError, match=r"text_encoder_device: got 'gpu', expected 'auto' or"):
        engine.load(model_dir, text_encoder_device="gpu")


@pytest.mark.parametrize(
    ("free", "expected"),
    [({"cuda": 1 << 40, "cpu": 1 << 40}, "kept"), ({"cuda": -1, "cpu": 1 << 40}, "cpu"),
     ({"cuda": -1, "cpu": -1}, "release")],
    ids=["fits", "on the processor only", "nowhere"],
)  # fmt: skip
def test_auto_is_where_it_fits(model_dir, free, expected):
    """-1 is a GPU with all that the model needs and half of the encoder, and a host with no room for the encoder."""
    case = replace(gpu_case(model_dir), free={"cuda": 1 << 40, "cpu": 1 << 40})
    kept, released = (engine.memory.plan_memory(replace(case, encoder=place)) for place in ("kept", "release"))
    need = next(n for n in kept.needs if n.what == "text encoder")
    room = {"cuda": kept.needed("cuda") - need.bytes // 2, "cpu": released.needed("cpu")}
    free = {device: room[device] if bytes < 0 else bytes for device, bytes in free.items()}
    assert place_encoder(replace(case, free=free)).encoder == expected


def gpu_case(model_dir):
    found = []

    class Stop(Exception):
        pass

    def stop(case):
        found.append(case)
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.loader.place_encoder", stop)
        with pytest.raises(Stop):
            engine.load(model_dir)
    case: Case = found[0]
    return replace(case, device=torch.device("cuda"))


def test_an_encoder_on_the_processor_is_asked_there(model_dir):
    """The stages take ids from anywhere, and the embedding goes to the model's device."""
    pipeline = engine.load(model_dir)
    stages, seen = pipeline.stages, []

    class Watched(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, ids, mask):
            seen.append((ids.device.type, mask.device.type))
            return self.inner(ids, mask)

    watched = replace(pipeline, stages=TorchStages(stages.models, stages.vae, Watched(stages.text_encoder)))
    assert torch.equal(watched.encode_prompt("red"), pipeline.encode_prompt("red"))
    assert seen == [("cpu", "cpu")]


def test_export_takes_the_encoder_in_full(folder):
    from export.graphs import stage_graphs

    expected = stored_as(folder, "8 bits")[0]
    for where in ("auto", "release"):
        pipeline = engine.load(folder, text_encoder_device=where)
        graph = next(graph for graph in stage_graphs(pipeline) if graph.name == "encode_text")
        assert not any(isinstance(layer, ScaledLinear) for layer in graph.module.modules())
        ids, mask = pipeline.tokenizer(PROMPTS[0])
        with torch.no_grad():
            assert torch.equal(graph.module(ids, mask)[0], expected)
