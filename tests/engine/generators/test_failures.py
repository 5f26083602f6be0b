"""A call that fails in any pass changes nothing, and the next call gives what it would have given."""

from collections import deque
from dataclasses import replace

import pytest
import torch
from dense_streams import FAMILIES, OTHER, TEXT, Failing, Fault, after_switch, title_of
from tiny import pipeline_of

from engine.config import Preset
from engine.model.cache import RingCache


def published(state):
    """What later chunks read; the rows that a failed call may have begun to fill are none of it."""
    fields = [state.index, state.position]
    for value in vars(state).values():
        if isinstance(value, RingCache):
            fields.append(value.committed)
        elif isinstance(value, (list, deque)):
            fields.append(len(value))
        elif value is None or isinstance(value, torch.Tensor):
            fields.append(id(value))
    return fields


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    ("preset", "stage", "call"),
    [
        *[(FAMILIES[0], "etm", call) for call in (1, 2, 5)],
        *[(FAMILIES[0], "sdd_context", call) for call in (1, 2, 5)],
        *[(FAMILIES[0], "sdd", call) for call in (1, 4, 11)],
        *[(FAMILIES[1], "dit", call) for call in (1, 3, 5, 13, 14, 15)],
        *[(FAMILIES[2], "dit", call) for call in (2, 9, 10)],
        *[(FAMILIES[3], "dit", call) for call in (2, 7)],
        *[(FAMILIES[4], "dit", call) for call in (3, 6, 13, 14)],
    ],
    ids=lambda value: title_of(value) if isinstance(value, Preset) else str(value),
)
def test_a_failure_inside_a_step_changes_nothing(preset, stage, call, layer):
    pipeline = pipeline_of(preset)
    denoises = next(kind.timed for kind in pipeline.generator.passes if kind.graph == stage)
    undisturbed = pipeline.stream(TEXT, seed=4)
    expected = [undisturbed.next_latent() for _ in range(7)]
    failing = Failing(pipeline.stages, stage, call, layer)
    stream = replace(pipeline, stages=failing).stream(TEXT, seed=4)
    got = []
    while len(got) < 7:
        before = published(stream.state)
        try:
            got.append(stream.next_latent())
        except Fault:
            if not denoises:  # the chunk before was being committed
                assert published(stream.state) == before
    assert failing.fired == 1
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("stage", "call"), [("vae_first", 1), ("vae_steady", 1), ("vae_steady", 3), ("sdd", 6)])
def test_a_failure_is_not_seen_in_the_frames(pipeline, stage, call):
    with pipeline.stream("a red circle", seed=1) as undisturbed:
        expected = [undisturbed.next_chunk() for _ in range(5)]
    failing = Failing(pipeline.stages, stage, call, layer=1)
    with replace(pipeline, stages=failing).stream("a red circle", seed=1) as stream:
        got = []
        while len(got) < 5:
            try:
                got.append(stream.next_chunk())
            except Fault:
                emitted = stream.emitted
                assert emitted == 0
    assert failing.fired == 1
    for a, b in zip(got, expected, strict=True):
        assert (a == b).all()


@pytest.mark.parametrize(
    ("preset", "stage", "call"),
    [
        *[(FAMILIES[0], "etm", call) for call in (6, 7)],
        *[(FAMILIES[0], "sdd_context", call) for call in (5, 6)],
        (FAMILIES[0], "sdd", 11),
        *[(FAMILIES[1], "dit", call) for call in (15, 17, 18)],
        *[(FAMILIES[2], "dit", call) for call in (11, 12, 13)],
    ],
    ids=lambda value: title_of(value) if isinstance(value, Preset) else str(value),
)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_failure_while_recommitting_is_repaired(preset, stage, call, layer):
    pipeline = pipeline_of(preset)
    expected = after_switch(pipeline, True)
    failing = Failing(pipeline.stages, stage, call, layer)
    stream = replace(pipeline, stages=failing).stream(TEXT, seed=4)
    for _ in range(5):
        stream.next_latent()
    assert failing.fired == 0
    stream.set_prompt(OTHER)
    with pytest.raises(Fault):
        stream.next_latent()
    got = torch.cat([stream.next_latent() for _ in range(3)], dim=2)
    assert torch.equal(got, expected)
