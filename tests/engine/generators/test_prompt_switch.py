"""After a prompt switch the window is what a new stream under the new prompt would hold."""

from dataclasses import replace

import pytest
import torch
from dense_streams import (
    FAMILIES,
    OTHER,
    SHORT,
    TEXT,
    TOKENS,
    Failing,
    Fault,
    after_switch,
    etm_sees,
    greedy,
    kept,
    name_of,
    near,
    past_of,
    poison,
    runs_of,
    sdd_flow,
    spied,
    title_of,
)
from tiny import dense, latents_of, pipeline_of, text_of

from engine.config import Preset
from engine.generators.base import Geometry


@pytest.mark.parametrize("at", [1, 2, 6])
@pytest.mark.parametrize(
    "preset",
    [
        Preset("causal", chunk=1, window=4, attn_sink=1, steps=SHORT),
        Preset("causal", chunk=2, window=6, attn_sink=2, steps=SHORT),
        Preset("causal", chunk=3, window=8, attn_sink=0, steps=SHORT),
        Preset("causal", chunk=2, window=6, attn_sink=2, steps=SHORT, commit="noisy"),
    ],
    ids=lambda p: f"{name_of(p)}-{p.commit}",
)
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "joined"])
def test_causal_prompt_switch_rebuilds_the_window(preset, at, joined):
    """Frames still cached once more under the new prompt, clean and at their own positions; then as always."""
    stream, spy = spied(preset, joined=joined)
    latents = [stream.next_latent() for _ in range(at)]
    stream.set_prompt(OTHER)
    poison(stream.state.cache)  # nothing of the old window may be left in use
    spy.flows.clear()
    stream.next_latent()
    runs = runs_of(preset, at + 1)
    old = [frame for run in runs[: at - 1] for frame in run]
    window = kept(old, preset.window, preset.attn_sink)
    sunk = window[: preset.attn_sink]
    loose = window[preset.attn_sink :]
    rest = len(loose) % preset.chunk
    groups = [sunk[i : i + preset.chunk] for i in range(0, len(sunk), preset.chunk)]
    groups += [loose[:rest]] + [loose[i : i + preset.chunk] for i in range(rest, len(loose), preset.chunk)]
    groups = [group for group in groups if group] + [runs[at - 1], runs[at]]
    frames = [frame for group in groups for frame in group]
    sees, seen = [], []
    for group in groups:
        seen = seen + group
        inside = set(kept(seen, preset.window, preset.attn_sink))
        sees += [[frame in inside for frame in frames]] * len(group)
    clean = torch.cat(latents, dim=2)[:, :, frames[: -preset.chunk]]
    calls = [call for call in spy.flows if call[1] != preset.context_timestep]
    assert len(calls) == 2
    for x, t, flow in calls:
        ts = [0.0] * clean.shape[2] + [t] * preset.chunk
        expected, _ = dense(spy.models["dit"], torch.cat([clean, x], dim=2), ts, OTHER, frames, sees)
        near(flow, expected[:, :, -preset.chunk :])


@pytest.mark.parametrize("at", [1, 2, 3, 7])
@pytest.mark.parametrize("preset", [greedy(), greedy(chunk=2, w=1, max_position=4)], ids=lambda p: f"{p.chunk}")
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "joined"])
def test_greedy_prompt_switch_rebuilds_the_window(preset, at, joined):
    stream, spy = spied(preset, joined=joined)
    latents = [stream.next_latent() for _ in range(at)]
    stream.set_prompt(OTHER)
    poison(stream.state.etm, stream.state.sdd)
    spy.flows.clear()
    stream.next_latent()
    chunk, clean = preset.chunk, torch.cat(latents, dim=2)
    first = max(0, at - 2 - past_of(preset))  # the ETM's chunks when the switch came, and the one not committed then
    frames = list(range(first * chunk, at * chunk))
    _, hidden = dense(
        spy.models["etm"], clean[:, :, frames], [0.0] * len(frames), OTHER, frames,
        etm_sees(past_of(preset), chunk, len(frames)),
    )  # fmt: skip
    assert len(spy.flows) == 2
    for x, t, flow in spy.flows:
        expected = sdd_flow(
            spy.models["sdd"], preset, x, t, hidden[:, -chunk * TOKENS :], clean, at * chunk, OTHER
        )  # fmt: skip
        near(flow, expected)


@pytest.mark.parametrize("preset", [greedy(), Preset("causal", chunk=1, window=4, attn_sink=1)], ids=lambda p: p.family)
@pytest.mark.parametrize("count", [1, 2, 6])
def test_a_switch_with_nothing_left_to_commit(preset, count):
    """As after a step that failed: every chunk is committed already when the prompt changes."""
    pipeline = pipeline_of(preset)
    generator, models = pipeline.generator, pipeline.stages.models
    clean, x = latents_of(1, count, seed=1), latents_of(1, 1, seed=2)
    with torch.inference_mode():
        state = generator.open(Geometry.of(pipeline.config, 1, 4, 6), pipeline.stages.prepare_text(TEXT))
        for frame in clean.split(1, dim=2):
            generator.commit(frame, state)
        generator.set_text(pipeline.stages.prepare_text(OTHER), state)
        poison(*([state.cache] if preset.family == "causal" else [state.etm, state.sdd]))
        flow = generator.denoise(x, 500.0, state)
    if preset.family == "greedy":
        frames = list(range(max(0, count - 1 - past_of(preset)), count))
        sees = etm_sees(past_of(preset), 1, len(frames))
        _, hidden = dense(models["etm"], clean[:, :, frames], [0.0] * len(frames), OTHER, frames, sees)
        expected = sdd_flow(models["sdd"], preset, x, 500.0, hidden[:, -TOKENS:], clean, count, OTHER)
        near(flow, expected)
    else:
        frames = kept(list(range(count)), preset.window, preset.attn_sink)
        rows, seen = [], []
        for frame in [*frames, count]:
            seen.append(frame)
            inside = kept(seen, preset.window, preset.attn_sink)
            rows.append([other in inside for other in [*frames, count]])
        both = torch.cat([clean[:, :, frames], x], dim=2)
        expected, _ = dense(models["dit"], both, [0.0] * len(frames) + [500.0], OTHER, [*frames, count], rows)
        near(flow, expected[:, :, -1:])


@pytest.mark.parametrize("preset", FAMILIES[:3], ids=title_of)
def test_without_recommit_the_past_stays_as_it_was(preset):
    pipeline = pipeline_of(preset)
    runs = [after_switch(pipeline, True), after_switch(pipeline, False), after_switch(pipeline, False, None)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (runs[i] - runs[j]).abs().max() > 1e-4
    # The same prompt again, and nothing recomputed: no change at all.
    assert torch.equal(after_switch(pipeline, False, TEXT), runs[2])


@pytest.mark.parametrize("preset", FAMILIES[:3], ids=title_of)
def test_a_switch_before_the_first_chunk_is_another_prompt(preset):
    pipeline = pipeline_of(preset)
    switched, plain = pipeline.stream(TEXT, seed=4), pipeline.stream(OTHER, seed=4)
    switched.set_prompt(OTHER)
    for _ in range(4):
        assert torch.equal(switched.next_latent(), plain.next_latent())


@pytest.mark.parametrize("preset", FAMILIES[:3], ids=title_of)
def test_a_switch_without_recommit_does_not_undo_one_that_is_due(preset):
    """The window was to be rewritten; a second switch before that happened must not leave it half written."""
    pipeline = pipeline_of(preset)
    failing = Failing(pipeline.stages, "etm" if preset.family == "greedy" else "dit", 0, 1)
    stream = replace(pipeline, stages=failing).stream(TEXT, seed=4)
    for _ in range(5):
        stream.next_latent()
    stream.set_prompt(text_of(seed=2))
    failing._left = 1
    with pytest.raises(Fault):
        stream.next_latent()
    stream.set_prompt(OTHER, recommit=False)
    got = torch.cat([stream.next_latent() for _ in range(3)], dim=2)
    assert torch.equal(got, after_switch(pipeline, True))
