"""Streams far past their windows: every preset, positions, bounded state."""

from collections import deque

import pytest
import torch
from dense_streams import FAMILIES, TEXT, TOKENS, etm_sees, greedy, kept, near, past_of, poison, sdd_flow, spied
from tiny import dense, models_of, pipeline_of

from engine.config import Preset
from engine.model.cache import RingCache
from engine.presets import PRESETS


@pytest.mark.parametrize(
    "preset",
    [
        greedy(steps=((1000,),)),
        Preset("causal", chunk=3, window=7, attn_sink=1, steps=((1000,),)),
    ],
    ids=lambda p: p.family,
)
@pytest.mark.slow
def test_positions_never_run_out(preset):
    """Past the 1,024 latent frames at which public tables end; the far end is still the dense forward."""
    stream, spy = spied(preset)
    memory = [tensor.data_ptr() for tensor in caches_of(stream.state)]
    chunks = 1107 // preset.chunk
    latents = []
    for _ in range(chunks):
        spy.flows.clear()
        spy.c_fs.clear()
        latents.append(stream.next_latent())
    assert torch.cat(latents, dim=2).isfinite().all()
    assert memory == [tensor.data_ptr() for tensor in caches_of(stream.state)]
    x, t, flow = spy.flows[-1]
    start = (chunks - 1) * preset.chunk
    assert stream.state.position == start > 1100
    if preset.family == "greedy":
        # Enough of the past that what lies before cannot reach through two layers.
        frames = list(range(start - 3 * preset.window, start))
        past = torch.cat(latents, dim=2)[:, :, frames]
        sees = etm_sees(past_of(preset), 1, len(frames))
        _, hidden = dense(spy.models["etm"], past, [0.0] * len(frames), TEXT, frames, sees)
        near(spy.c_fs[-1], hidden[:, -TOKENS:], 1e-4)
        clean = torch.cat(latents, dim=2)
        expected = sdd_flow(spy.models["sdd"], preset, x, t, hidden[:, -TOKENS:], clean, start, TEXT)
        near(flow, expected, 1e-4)
    else:
        first = [0, *range(start - 18, start), *range(start, start + 3)]
        groups = [[0]] + [first[i : i + 3] for i in range(1, len(first), 3)]
        sees, seen = [], []
        for group in groups:
            seen = seen + group
            inside = set(kept(seen, preset.window, preset.attn_sink))
            sees += [[frame in inside for frame in first]] * len(group)
        # Frame 0 was committed in a chunk of three: let it see its two neighbours, which nobody else does.
        frames = [0, 1, 2, *first[1:]]
        index = {frame: i for i, frame in enumerate(first)}
        rows = [[f in index and sees[index[q]][index[f]] for f in frames] if q > 2 else [True] * 3 for q in frames]
        full = [row + [False] * (len(frames) - len(row)) for row in rows]
        clean = torch.cat(latents, dim=2)[:, :, frames[:-3]]
        ts = [0.0] * clean.shape[2] + [t] * 3
        expected, _ = dense(spy.models["dit"], torch.cat([clean, x], dim=2), ts, TEXT, frames, full)
        near(flow, expected[:, :, -3:], 1e-4)


def caches_of(state):
    rings = [getattr(state, name) for name in ("cache", "etm", "sdd") if hasattr(state, name)]
    return [tensor for ring in rings for tensor in (ring.k, ring.v)]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_streams(name):
    pipeline = pipeline_of(PRESETS[name])
    stream = pipeline.stream(TEXT, seed=2)
    poison(*(value for value in vars(stream.state).values() if isinstance(value, RingCache)))
    for _ in range(9):
        assert stream.next_latent().isfinite().all()


def test_state_of_a_long_stream_is_bounded():
    for preset in FAMILIES:
        stream = pipeline_of(preset).stream(TEXT)
        for _ in range(12):
            stream.next_latent()
        state = stream.state
        held = [len(value) for value in vars(state).values() if isinstance(value, (list, deque))]
        assert held
        assert sum(held) <= preset.window
        assert len(state.rope._recent) <= 8


def test_roles_have_different_weights():
    """Or the tests above could not tell the ETM from the SDD."""
    models = models_of(greedy())
    assert not torch.equal(models["etm"].patch_embedding.weight, models["sdd"].patch_embedding.weight)
