"""One causal transformer: a stream equals dense windowed forward passes; what each commit leaves for later chunks."""

from dataclasses import replace

import pytest
import torch
from dense_streams import SHORT, TEXT, Spy, causal_sees, name_of, near, poison, runs_of, spied
from tiny import dense, latents_of, pipeline_of

from engine.config import Preset
from engine.sampling.schedule import Schedule

CAUSAL = [
    Preset("causal", chunk=1, window=3, attn_sink=1, steps=SHORT),
    Preset("causal", chunk=1, window=21, steps=SHORT),
    Preset("causal", chunk=3, window=7, attn_sink=2, steps=SHORT),
    Preset("causal", chunk=3, window=6, attn_sink=1, steps=SHORT),  # wraps inside a chunk
    Preset("causal", chunk=3, first_chunk=1, window=7, attn_sink=1, steps=SHORT),
    Preset("causal", chunk=2, window=5, steps=SHORT, context_timestep=40.0),
]


@pytest.mark.parametrize("preset", CAUSAL, ids=name_of)
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "joined"])
def test_causal_stream_equals_dense_windowed_forward(preset, joined):
    stream, spy = spied(preset, joined=joined)
    poison(stream.state.cache)
    runs = runs_of(preset, 6)
    latents = torch.cat([stream.next_latent() for _ in runs], dim=2)
    calls = [call for call in spy.flows if call[1] != preset.context_timestep]
    for run in runs:
        for t in timesteps_of(preset):
            x, got_t, flow = calls.pop(0)
            assert got_t == pytest.approx(t)
            frames = torch.cat([latents[:, :, : run[0]], x], dim=2)
            ts = [preset.context_timestep] * run[0] + [t] * len(run)
            sees = causal_sees(preset, runs[: runs.index(run) + 1])
            expected, _ = dense(spy.models["dit"], frames, ts, TEXT, list(range(run[-1] + 1)), sees)
            near(flow, expected[:, :, run[0] :])
    assert not calls


def timesteps_of(preset):
    return [t for t, _ in Schedule(preset).steps(0)]


def test_causal_commit_noisy_keeps_the_last_denoising_call():
    preset = Preset("causal", chunk=2, window=6, attn_sink=2, steps=SHORT, commit="noisy")
    stream, spy = spied(preset)
    poison(stream.state.cache)
    runs = runs_of(preset, 5)
    for _ in runs:
        stream.next_latent()
    steps = len(SHORT[0])
    assert len(spy.flows) == steps * len(runs)  # no pass beside the denoising calls
    last = [spy.flows[steps * i + steps - 1] for i in range(len(runs))]
    for i, run in enumerate(runs):
        for step in range(steps):
            x, t, flow = spy.flows[steps * i + step]
            frames = torch.cat([*(call[0] for call in last[:i]), x], dim=2)
            ts = [last[0][1]] * run[0] + [t] * len(run)
            sees = causal_sees(preset, runs[: i + 1])
            expected, _ = dense(spy.models["dit"], frames, ts, TEXT, list(range(run[-1] + 1)), sees)
            near(flow, expected[:, :, run[0] :])


def test_causal_commit_none_sees_the_chunk_alone():
    preset = Preset("causal", chunk=2, window=6, steps=SHORT, commit="none")
    stream, spy = spied(preset)
    poison(stream.state.cache)
    for _ in range(4):
        stream.next_latent()
    assert len(spy.flows) == 8
    for number, (x, t, flow) in enumerate(spy.flows):
        at = number // 2 * 2
        expected, _ = dense(spy.models["dit"], x, [t] * 2, TEXT, [at, at + 1])
        near(flow, expected)


@pytest.mark.parametrize(("commit", "context"), [("clean", 0.0), ("clean", 40.0), ("noisy", 0.0), ("none", 0.0)])
def test_causal_given_latents_are_seen_clean(commit, context):
    preset = Preset("causal", chunk=2, window=6, steps=SHORT, commit=commit, context_timestep=context)
    pipeline = pipeline_of(preset)
    spy = Spy(pipeline.stages.models)
    given = latents_of(1, 3, seed=8)
    stream = replace(pipeline, stages=spy).stream(TEXT, latents=given)
    poison(stream.state.cache)
    shown = torch.cat([stream.next_latent() for _ in range(2)], dim=2)
    assert torch.equal(shown, given)
    stream.next_latent()
    x, t, flow = spy.flows[2]
    assert t == 1000
    runs = [[0], [1, 2], [3, 4]]
    frames, ts = torch.cat([given, x], dim=2), [0.0] * 3 + [t] * 2
    expected, _ = dense(spy.models["dit"], frames, ts, TEXT, list(range(5)), causal_sees(preset, runs))
    near(flow, expected[:, :, 3:])
