"""Context passes that run together with the next chunk's first step: the stream of two passes, up to rounding."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from dense_streams import FAMILIES, OTHER, SHORT, TEXT, Failing, Fault, greedy, joined, near, title_of
from tiny import latents_of, pipeline_of

from bench.instruments.ways import StandIn
from engine.config import Preset
from engine.runtime.cuda_graphs import GraphedStages
from engine.runtime.stages import TorchStages

PRESETS = [
    greedy(),
    greedy(chunk=2, w=2, max_position=5),
    Preset("causal", chunk=1, window=3, attn_sink=1, steps=SHORT),
    Preset("causal", chunk=3, first_chunk=1, window=7, attn_sink=1, steps=SHORT),
    Preset("causal", chunk=2, window=6, steps=SHORT, context_timestep=40.0),
    FAMILIES[4],
]
EVERY = pytest.mark.parametrize("preset", PRESETS, ids=title_of)


class Counting(TorchStages):
    """Names the passes of every run."""

    def __init__(self, models, join_context):
        super().__init__(models, None, None, join_context=join_context)
        self.runs = []

    def run(self, step, cache, text_kv):
        self.runs.append([p.kind.graph for p in (step.context, step) if p is not None])
        return super().run(step, cache, text_kv)


def both(preset):
    """The pipeline with two passes, and with one."""
    pipeline = pipeline_of(preset)
    return pipeline, joined(pipeline)


def latents(pipeline, count=7, **options):
    stream = pipeline.stream(TEXT, seed=4, **options)
    return torch.cat([stream.next_latent() for _ in range(count)], dim=2)


@pytest.mark.parametrize("preset", [*PRESETS, *FAMILIES[2:]], ids=title_of)
def test_latents_are_the_same(preset):
    alone, together = both(preset)
    near(latents(together), latents(alone))


@EVERY
def test_a_chunk_takes_one_run_less(preset):
    pipeline = pipeline_of(preset)
    runs = {}
    for join in (False, True):
        stages = Counting(pipeline.stages.models, join)
        stream = replace(pipeline, stages=stages).stream(TEXT, seed=4)
        for _ in range(4):
            stream.next_latent()
        stages.runs.clear()
        stream.next_latent()
        runs[join] = stages.runs
    steps = len(SHORT[0])
    context, step = ("sdd_context", "sdd") if preset.family == "greedy" else ("dit", "dit")
    before = [["etm"]] if preset.family == "greedy" else []
    assert runs[False] == [*before, [context], *[[step]] * steps]
    assert runs[True] == [*before, [context, step], *[[step]] * (steps - 1)]


@EVERY
def test_given_latents(preset):
    given = latents_of(1, 4, seed=8)
    alone, together = both(preset)
    near(latents(together, latents=given), latents(alone, latents=given))


@EVERY
@pytest.mark.parametrize("recommit", [True, False])
@pytest.mark.parametrize("ahead", [True, False])
def test_a_prompt_switch(preset, recommit, ahead):
    """Also one that comes while the next chunk is already made."""
    runs = []
    for pipeline in both(preset):
        stream = pipeline.stream(TEXT, seed=4)
        found = [stream.next_latent() for _ in range(5)]
        if ahead:
            with torch.inference_mode():
                stream._look_ahead()
        stream.set_prompt(OTHER, recommit)
        runs.append(torch.cat([*found, *(stream.next_latent() for _ in range(3))], dim=2))
    near(runs[1], runs[0])


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    ("preset", "stage", "call"),
    [
        *[(PRESETS[0], "sdd", call) for call in (1, 3, 4, 9)],
        *[(PRESETS[0], "etm", call) for call in (1, 4)],
        *[(PRESETS[3], "dit", call) for call in (1, 3, 4)],  # the ring is not full yet
    ],
    ids=lambda value: title_of(value) if isinstance(value, Preset) else str(value),
)
def test_a_failure_changes_nothing(preset, stage, call, layer):
    pipeline = joined(pipeline_of(preset))
    expected = latents(pipeline)
    failing = Failing(pipeline.stages, stage, call, layer)
    near(retried(replace(pipeline, stages=failing)), expected)
    assert failing.fired == 1


@pytest.mark.parametrize("layer", [0, 1])
def test_a_failure_in_a_full_ring_rewrites_the_window(layer):
    """Layers before the one that failed have written over the oldest chunk: the stream goes on as after a recommit."""
    pipeline = joined(pipeline_of(PRESETS[3]))
    failing = Failing(pipeline.stages, "dit", 9, layer)
    got = retried(replace(pipeline, stages=failing))
    assert failing.fired == 1
    stream = pipeline.stream(TEXT, seed=4)
    expected = [stream.next_latent() for _ in range(4)]
    stream.set_prompt(TEXT)
    expected += [stream.next_latent() for _ in range(3)]
    near(got, torch.cat(expected, dim=2))


def retried(pipeline):
    """The latents of a stream whose failed calls are made again."""
    stream, found = pipeline.stream(TEXT, seed=4), []
    while len(found) < 7:
        try:
            found.append(stream.next_latent())
        except Fault:
            continue
    return torch.cat(found, dim=2)


@pytest.mark.parametrize("preset", PRESETS[:1], ids=title_of)
def test_a_switch_without_recommit_leaves_what_is_pending_to_the_old_prompt(preset):
    """A step that failed has committed the chunk before it; two passes have then run its context pass already."""
    runs = []
    for pipeline, call in zip(both(preset), (5, 5), strict=True):
        failing = Failing(pipeline.stages, "sdd", call, 0)
        stream = replace(pipeline, stages=failing).stream(TEXT, seed=4)
        found = [stream.next_latent() for _ in range(2)]
        with pytest.raises(Fault):
            stream.next_latent()
        assert (stream.state.pending is not None) == pipeline.stages.capabilities.joins_context
        stream.set_prompt(OTHER, recommit=False)
        runs.append(torch.cat([*found, *(stream.next_latent() for _ in range(3))], dim=2))
    near(runs[1], runs[0])


@pytest.mark.parametrize("family", ["pipeline", "causal"])
def test_frames_through_graphs(request, family):
    """A stand-in captures; a chunk that wraps inside falls back to two passes."""
    plain = request.getfixturevalue(family)
    parts = plain.stages
    stages = TorchStages(parts.models, parts.vae, parts.text_encoder, join_context=True)
    graphed = replace(plain, stages=GraphedStages(stages, StandIn))
    with plain.stream("a red circle") as one, graphed.stream("a red circle") as other:
        frames = [np.stack(list(islice(stream, 45))).astype(int) for stream in (one, other)]
    assert np.abs(frames[0] - frames[1]).max() <= 1
    assert graphed.stages.captured == (4 if family == "pipeline" else 3)


def test_a_chunk_that_wraps_runs_as_two_passes_through_graphs():
    preset = Preset("causal", chunk=3, window=7, attn_sink=2, steps=SHORT)
    pipeline = pipeline_of(preset)
    graphed = replace(pipeline, stages=GraphedStages(joined(pipeline).stages, StandIn))
    near(latents(graphed), latents(pipeline))
