"""Transitions between prompts under failures, interrupts, joined passes, and adapters that change on the way."""

from dataclasses import replace

import pytest
import torch
from dense_streams import FAMILIES, OTHER, TEXT, Failing, Fault, joined, near, title_of
from faults import plain, same, spread, stumbling
from tiny import pipeline_of, text_of

import engine

THIRD = text_of(seed=2)
BLENDS = {3: (OTHER, True, 4), 5: (THIRD, False, 3), 9: (TEXT, True, 0)}
EVERY = pytest.mark.parametrize("preset", FAMILIES, ids=title_of)


def latents(pipeline, blends=BLENDS, count=11, ahead=False, between=lambda stream, number: None):
    """A stream's latents; calls that fail are made again."""
    stream, found = pipeline.stream(TEXT, seed=4), []
    stream.looks_ahead = ahead
    while len(found) < count:
        number = len(found)
        if number in blends and number != getattr(stream, "told", -1):
            stream.set_prompt(*blends[number])
            stream.told = number
        between(stream, number)
        try:
            found.append(stream.next_latent())
        except Fault:
            continue
    return found


def equal(got, expected):
    wrong = [at for at, (a, b) in enumerate(zip(got, expected, strict=True)) if not torch.equal(a, b)]
    assert not wrong, wrong


@EVERY
def test_joined_passes_blend_the_same(preset):
    pipeline = pipeline_of(preset)
    near(torch.cat(latents(joined(pipeline)), dim=2), torch.cat(latents(pipeline), dim=2))


@EVERY
@pytest.mark.parametrize("call", [4, 9, 12, 15, 20, 22])
def test_a_failure_on_the_way_changes_nothing(preset, call):
    pipeline = pipeline_of(preset)
    failing = Failing(pipeline.stages, "sdd" if preset.family == "greedy" else "dit", call, 1)
    equal(latents(replace(pipeline, stages=failing)), latents(pipeline))
    assert failing.fired == 1


@EVERY
def test_a_blend_that_cannot_be_prepared_is_prepared_again(preset):
    pipeline = pipeline_of(preset)
    stages, prepare = pipeline.stages, pipeline.stages.prepare_text
    calls = []

    def failing(text_emb):
        calls.append(text_emb)
        if len(calls) in (3, 5, 6):  # after those of the stream and of set_prompt
            raise Fault
        return prepare(text_emb)

    expected = latents(pipeline)
    stages.prepare_text = failing
    try:
        equal(latents(pipeline), expected)
    finally:
        del stages.prepare_text
    assert len(calls) > 9


@EVERY
@pytest.mark.parametrize("at", [1, 2])
def test_the_target_has_the_bits_of_a_switch(preset, at):
    """The same latents before, then the target itself: not an embedding that happens to be close to it."""
    pipeline = pipeline_of(preset)
    stream = pipeline.stream(TEXT, seed=4)
    for _ in range(at):
        stream.next_latent()
    stream.set_prompt(OTHER, transition=3)
    seen = []
    for _ in range(4):
        stream.next_latent()
        seen.append(stream.state.text_emb)
    assert [torch.equal(one, OTHER) for one in seen] == [False, False, True, True]
    assert all(torch.equal(one, torch.lerp(TEXT, OTHER, (k + 1) / 3)) for k, one in enumerate(seen[:2]))


CHUNK = lambda stream: stream.next_chunk()  # noqa: E731
TOWARDS = [
    lambda stream: stream.set_prompt("a blue square on gray", transition=4),
    lambda stream: stream.set_prompt([("teal", 2.0), ("a red square", 1.0)], False, 3),
]
CALLS = [CHUNK, CHUNK, TOWARDS[0], CHUNK, next, CHUNK, CHUNK, TOWARDS[1], CHUNK, next, CHUNK, CHUNK, CHUNK, CHUNK]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ahead"), [("greedy", True), ("self-forcing", False)])
def test_every_call_is_interrupted(model_dir, name, ahead):
    fields = {} if name == "greedy" else {"window": 7, "steps": ((1000, 500),)}
    pipeline = engine.load(model_dir, preset=name, overrides=fields)

    def stream_of():
        stream = pipeline.stream("a red circle moving right", seed=3)
        stream.looks_ahead = ahead
        return stream

    calls = [call for call in CALLS if not ahead or call is not TOWARDS[1]]  # without recommit it depends on when
    expected, counted = plain(stream_of(), calls), stream_of()
    counted.next_chunk()
    counted.set_prompt("teal", transition=9)
    points = spread(len(calls), counted.next_chunk)
    got, interrupts = stumbling(stream_of(), calls, points)
    numbers = [at for at, call in enumerate(calls) if call in TOWARDS]  # an interrupted call may have taken a number
    same(*([one for at, one in enumerate(results) if at not in numbers] for results in (got, expected)))
    assert interrupts > len(calls) / 3
