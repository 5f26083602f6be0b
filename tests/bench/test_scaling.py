"""The scaling bench on the tiny pipeline, and what it watches: cost that does not grow."""

import gc
import json
import mmap
import time
from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensor

from bench.__main__ import main
from bench.commands.scaling import scaling
from engine.runtime.stages import TorchStages

PROMPT = "a red circle moving right"


class Leaking(TorchStages):
    """Slower and larger with every chunk of a stream, whose number travels with its VAE cache."""

    def __init__(self, inner, seconds, megabytes):
        super().__init__(inner.models, inner.vae, inner.text_encoder)
        self.seconds, self.megabytes, self.held = seconds, megabytes, []

    def vae_first(self, latent):
        frames, cache = super().vae_first(latent)
        return frames, (0, cache)

    def vae_steady(self, latent, cache):
        number, cache = cache[0] + 1, cache[1]
        time.sleep(self.seconds * number)
        page = mmap.mmap(-1, self.megabytes << 20)  # not from a heap that may have room left
        page[:] = b"1" * len(page)
        self.held.append(page)
        frames, cache = super().vae_steady(latent, cache)
        return frames, (number, cache)


def result_of(pipeline, chunks=40):
    *progress, result = scaling(pipeline, PROMPT, chunks)
    assert progress == [{"chunk": i + 1} for i in range(chunks)]
    return result


@pytest.mark.slow
def test_a_stream_that_stays_the_same(pipeline):
    result = result_of(pipeline, 60)
    assert result.keys() >= {"time_ratio", "memory_growth_mb", "chunks", "loop_overhead", "resident_mb", "device"}
    assert result["chunks"] == 60
    assert 0.1 < result["time_ratio"] < 10  # other processes share this machine
    assert result["memory_growth_mb"] < 8
    assert 0 < result["loop_overhead"] < 1
    assert result["ms_per_chunk_early"] > 0
    assert result["resident_mb"] > 50


@pytest.mark.thorough
def test_a_stream_that_grows_is_seen(pipeline):
    result = result_of(replace(pipeline, stages=Leaking(pipeline.stages, 0.002, 1)), 60)
    assert result["time_ratio"] > 1.3
    assert result["memory_growth_mb"] > 10


@pytest.mark.slow
def test_command(model_dir, capsys):
    assert main(["scaling", "--model", str(model_dir), "--chunks", "44", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["chunks"] == 44
    assert result["preset"] == "greedy"
    assert result.keys() >= {"time_ratio", "memory_growth_mb"}


@pytest.mark.parametrize("arguments", [["--chunks", "10"], ["--model", "/nowhere"], ["--preset", "greddy"]])
def test_bad_input(model_dir, capsys, arguments):
    assert main(["scaling", "--model", str(model_dir), "--json", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1


def tensor_bytes():
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not isinstance(thing, FakeTensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["pipeline", "causal"])
@pytest.mark.slow
def test_a_stream_holds_no_more_tensors_as_it_goes_on(request, family):
    pipeline = request.getfixturevalue(family)
    with pipeline.stream(PROMPT) as stream:
        held = []
        for chunk in range(61):
            frames = stream.next_chunk()
            if chunk in (20, 40, 60):
                held.append(tensor_bytes())
        assert len(frames) == 4 * pipeline.preset.chunk
    assert held[0] == held[1] == held[2]
