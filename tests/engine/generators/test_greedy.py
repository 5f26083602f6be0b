"""ETM and SDD: a stream equals dense masked forward passes (Eq. 1 to 5)."""

from dataclasses import replace

import pytest
import torch
from dense_streams import TEXT, TOKENS, etm_sees, greedy, near, past_of, poison, sdd_flow, spied
from tiny import dense, latents_of, pipeline_of, text_of

from engine.generators.base import Geometry

GREEDY = [greedy(), greedy(chunk=2, w=2), greedy(w=0), greedy(w=1, max_position=2)]
GREEDY += [greedy(chunk=2, max_position=5)]


@pytest.mark.parametrize("preset", GREEDY, ids=lambda p: f"chunk{p.chunk}-w{past_of(p)}-max{p.max_position}")
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "joined"])
def test_greedy_stream_equals_dense_masked_forwards(preset, batch, joined):
    stream, spy = spied(preset, batch, joined)
    poison(stream.state.etm, stream.state.sdd)
    count, chunk = 8, preset.chunk
    text = text_of(batch, seed=0)
    latents = torch.cat([stream.next_latent() for _ in range(count)], dim=2)
    assert latents.isfinite().all()
    done = (count - 1) * chunk  # the last chunk is not committed yet
    _, hidden = dense(
        spy.models["etm"], latents[:, :, :done], [0.0] * done, text, list(range(done)),
        etm_sees(past_of(preset), chunk, done),
    )  # fmt: skip
    expected = hidden.split(chunk * TOKENS, dim=1)
    assert len(spy.c_fs) == len(expected) == count - 1
    for got, c_f in zip(spy.c_fs, expected, strict=True):
        near(got, c_f)
    for number, (x, t, flow) in enumerate(spy.flows):
        index = number // 2
        c_f = expected[index - 1] if index else None
        wanted = sdd_flow(spy.models["sdd"], preset, x, t, c_f, latents, index * chunk, text)
        near(flow, wanted)


def test_greedy_window_ends_where_eq_1_ends():
    """Chunk f - w reaches c_f, chunk f - w - 1 does not (one layer: what is seen is seen directly)."""
    preset = greedy(w=3)
    pipeline = pipeline_of(preset)
    config = replace(pipeline.config, num_layers=1)
    for model in pipeline.stages.models.values():
        del model.blocks[1:]
    pipeline = replace(pipeline, config=config)
    given = latents_of(1, 6)

    def c_f(latents):
        stream = pipeline.stream(TEXT, latents=latents)
        for _ in range(7):
            stream.next_latent()
        return stream.state.c_f

    plain = c_f(given)
    for chunk in range(6):
        changed = given.clone()
        changed[:, :, chunk] += 1
        assert torch.equal(c_f(changed), plain) == (chunk < 2)


@pytest.mark.parametrize("shape", [2, 3])
def test_greedy_refuses_chunks_of_another_length(shape):
    preset = greedy()
    pipeline = pipeline_of(preset)
    state = pipeline.generator.open(Geometry.of(pipeline.config, 1, 4, 6), pipeline.stages.prepare_text(TEXT))
    with pytest.raises(ValueError, match=r"greedy: got .*expected 1"):
        pipeline.generator.commit(latents_of(1, shape), state)


@pytest.mark.parametrize("size", [(3, 6), (4, 5), (0, 6)])
def test_latents_are_whole_patches(size):
    with pytest.raises(ValueError, match=r"latent: got .*expected multiples"):
        Geometry.of(pipeline_of(greedy()).config, 1, *size)
