"""Graphed stages without a GPU: bench's stand-in captures, and like a graph it only ever sees its static tensors."""

import gc
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from bench.instruments.ways import StandIn
from engine.presets import override
from engine.runtime.cuda_graphs import GraphedStages
from engine.runtime.stages import TorchStages

PROMPT, OTHER = "a red circle moving right", "a blue square on gray"
FAMILIES = pytest.mark.parametrize("family", ["pipeline", "causal"])


def fused(pipeline, joined=False):
    stages = pipeline.stages
    return TorchStages(stages.models, stages.vae, stages.text_encoder, join_context=joined)


def graphed(pipeline, joined=False):
    return replace(pipeline, stages=GraphedStages(fused(pipeline, joined), StandIn))


def frames(pipeline, count=40, **options):
    with pipeline.stream(PROMPT, frames=count, **options) as stream:
        return np.stack(list(stream))


@FAMILIES
def test_graphs_stream_what_the_kernels_do(request, family):
    pipeline = request.getfixturevalue(family)
    expected = frames(replace(pipeline, stages=fused(pipeline))).astype(int)
    pipeline = graphed(pipeline)
    for _ in range(2):  # the second time on leased caches that hold another stream's rows
        assert np.abs(frames(pipeline) - expected).max() <= 1  # static tensors lie otherwise in memory: last bits


@FAMILIES
@pytest.mark.parametrize("changes", [{}, {"steps": ((1000.0,),)}], ids=["", "one step"])
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "joined"])
def test_nothing_is_captured_once_warm(request, family, joined, changes):
    pipeline = graphed(request.getfixturevalue(family), joined)
    pipeline = replace(pipeline, preset=override(pipeline.preset, changes))
    pipeline.warm()
    captured = pipeline.stages.captured
    assert captured == (4 if family == "pipeline" else 2) + joined
    for _ in range(2):
        with pipeline.stream(PROMPT) as stream:
            list(islice(stream, 50))
            stream.set_prompt(OTHER)
            list(islice(stream, 20))
    assert pipeline.stages.captured == captured


@FAMILIES
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "joined"])
def test_full_and_short_steps_are_graphs_of_their_own(request, family, joined):
    plain = request.getfixturevalue(family)
    preset = override(plain.preset, {"steps": "1000,750,500,250", "reuse": "2,4:1:0"})
    expected = frames(replace(plain, stages=fused(plain, joined), preset=preset)).astype(int)
    pipeline = replace(graphed(plain, joined), preset=preset)
    pipeline.warm()
    captured = pipeline.stages.captured
    assert captured == (5 if family == "pipeline" else 4) + joined
    for _ in range(2):  # the second time on leased caches that hold another stream's residual
        assert np.abs(frames(pipeline) - expected).max() <= 1
    assert pipeline.stages.captured == captured
    streams = [pipeline.stream(PROMPT, frames=40) for _ in range(2)]
    for got in zip(*streams, expected, strict=True):  # one stream's residual is not the other's
        assert max(np.abs(one - got[-1]).max() for one in got[:-1]) <= 1


@pytest.mark.parametrize("joined", [False, True], ids=["alone", "joined"])
def test_a_first_chunk_of_another_size_is_captured_as_well(causal, joined):
    preset = override(causal.preset, {"first_chunk": 1, "window": 13, "attn_sink": 1})
    pipeline = replace(graphed(causal, joined), preset=preset)
    pipeline.warm()
    captured = pipeline.stages.captured
    with pipeline.stream(PROMPT) as stream:
        list(islice(stream, 60))
    assert pipeline.stages.captured == captured


@FAMILIES
def test_streams_side_by_side_have_caches_and_prompts_of_their_own(request, family):
    plain = request.getfixturevalue(family)
    expected = [list(islice(plain.stream(prompt, seed=seed), 30)) for seed, prompt in enumerate((PROMPT, OTHER))]
    pipeline = graphed(plain)
    streams = [pipeline.stream(prompt, seed=seed) for seed, prompt in enumerate((PROMPT, OTHER))]
    got = list(zip(*(islice(stream, 30) for stream in streams), strict=True))
    assert all(np.abs(np.stack(one).astype(int) - np.stack(other)).max() <= 1
               for one, other in zip(zip(*got, strict=True), expected, strict=True))  # fmt: skip


def test_caches_come_back_when_a_stream_ends(pipeline):
    pipeline = graphed(pipeline)
    for end in ("close", "drop"):
        stream = pipeline.stream(PROMPT)
        list(islice(stream, 9))
        if end == "close":
            stream.close()
        del stream
        gc.collect()
        stages = pipeline.stages
        assert [len(free) for free in stages._caches.values()] == [1, 1]
        assert [len(free) for free in stages._vae_caches.values()] == [1]


def test_a_prompt_switch_and_an_image(pipeline):
    image = frames(pipeline, 1)

    def run(pipeline):
        with pipeline.stream(PROMPT, clip=image) as stream:
            first = list(islice(stream, 12))
            stream.set_prompt(OTHER)
            return np.stack([*first, *islice(stream, 12)]).astype(int)

    assert np.abs(run(pipeline) - run(graphed(pipeline))).max() <= 1


def test_eager_stages_are_refused(pipeline):
    with pytest.raises(ValueError, match="got eager stages"):
        GraphedStages(TorchStages(pipeline.stages.models, None, None, eager=True))


def test_a_decoding_that_fails_ends_the_stream(pipeline, monkeypatch):
    """Its cache has moved on in place; made again, the chunk would follow on itself."""

    def fail(*_):
        raise RuntimeError("out of something")

    pipeline = graphed(pipeline)
    stream = pipeline.stream(PROMPT)
    stream.next_chunk()
    monkeypatch.setattr(pipeline.stages, "vae_steady", fail)
    with pytest.raises(RuntimeError, match="out of something"):
        stream.next_chunk()
    with pytest.raises(ValueError, match="got a closed one"):
        stream.next_chunk()


def test_a_capture_that_fails_leaves_the_cache_where_it_was(pipeline):
    class Failing(StandIn):
        def __call__(self, run):
            run()
            raise RuntimeError("cannot capture")

    stages = GraphedStages(fused(pipeline), Failing)
    latent = torch.randn(1, 8, 1, 4, 6)
    _, cache = stages.vae_first(latent)
    expected = [part.clone() for part in pipeline.stages.vae.steady(latent, tuple(cache))[1]]
    stages.vae_steady(latent, cache)  # the first call runs as it is
    with pytest.raises(RuntimeError, match="cannot capture"):
        stages.vae_steady(latent, cache)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(cache, expected, strict=True))


@FAMILIES
def test_static_tensors_are_only_touched_in_turn(request, family):
    """Threads may have CUDA streams of their own: each pass waits for the one before, from its first copy on."""
    turns, lying = [], []

    class Turns(StandIn):
        @contextmanager
        def in_turn(self):
            turns.append(self)
            try:
                yield
            finally:
                turns.pop()

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.copy_ and id(args[0]) in static and not turns:
                lying.append(function)
            return function(*args, **(kwargs or {}))

    pipeline = request.getfixturevalue(family)
    pipeline = replace(pipeline, stages=GraphedStages(fused(pipeline), Turns))
    frames(pipeline)
    graphs = [graph for graph in pipeline.stages._graphs.values() if graph]
    static = {id(t) for graph in graphs for t in graph._static}
    static |= {id(t) for text in pipeline.stages._text.values() for t in text[:2]}
    with Watched():
        frames(pipeline)
    assert graphs
    assert lying == []
    assert turns == []
