"""Static reuse: at some steps the middle blocks add what they added at the chunk's last full step."""

import re
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

import pytest
import torch
from dense_streams import OTHER, TEXT, Failing, Fault, joined, near, title_of
from tiny import latents_of, pipeline_of, text_of, transformer

from engine.config import Preset, Reuse
from engine.generators import family_of
from engine.model.layers import total
from engine.presets import check_preset, override
from engine.runtime.stages import TorchStages
from engine.sampling.schedule import Schedule

FOUR = ((1000, 750, 500, 250),)
GREEDY = Preset("greedy", chunk=1, window=3, max_position=4, steps=FOUR, solver="euler", reuse=Reuse((3,)))
CHUNKS = Preset("causal", chunk=3, first_chunk=1, window=7, attn_sink=1, steps=FOUR, reuse=Reuse((2, 4), 1, 0))
UNEVEN = Preset("causal", chunk=2, window=4, steps=(*FOUR, (1000, 500, 250)), solver="unipc", commit="none",
                reuse=Reuse((2, 3), 0, 1))  # fmt: skip
HOLLOW = replace(GREEDY, reuse=Reuse((2, 3), 0, 0), solver="unipc")
PRESETS = pytest.mark.parametrize("preset", [GREEDY, CHUNKS, UNEVEN, HOLLOW], ids=title_of)
LAYERS = 4


def deep(preset):
    """A pipeline with enough blocks to leave some out."""
    roles = family_of(preset).roles()
    models = {
        role: transformer(number, family_of(preset).conditioned(role), num_layers=LAYERS)
        for number, role in enumerate(roles)
    }
    return pipeline_of(check_preset(preset), models)


def without(pipeline):
    return replace(pipeline, preset=replace(pipeline.preset, reuse=None))


def run(pipeline, batch=1, given=None):
    """Latents of a stream with all that may happen to it."""
    options = {} if given is None else {"latents": given}
    stream = pipeline.stream(text_of(batch, seed=0), seed=4, **options)
    found = [stream.next_latent() for _ in range(5)]
    stream.set_prompt(text_of(batch, seed=1))
    found += [stream.next_latent() for _ in range(2)]
    stream.set_prompt(text_of(batch, seed=2), recommit=False)
    found += [stream.next_latent() for _ in range(2)]
    stream.flush()
    return torch.cat([*found, *(stream.next_latent() for _ in range(3))], dim=2)


class ByHand(TorchStages):
    """Plain passes whose middle blocks, at short steps, are replaced by the residual that was seen before.

    It counts a chunk's steps itself and reads hidden states between blocks.
    """

    def __init__(self, inner, preset):
        super().__init__(inner.models, None, None, join_context=inner.capabilities.joins_context)
        self.reuse, self.begins, self.number = preset.reuse, Schedule(preset).steps(0)[0][0], 0
        self.kept = self.before = None

    def run(self, step, cache, text_kv):
        if step.t is None or float(step.t[0]) == 0:  # a context pass
            return super().run(step, cache, text_kv)
        self.number = 1 if float(step.t[0]) == self.begins else self.number + 1
        with self.between(self.models[step.kind.role], self.number in self.reuse.steps, len(step.cos)):
            return super().run(step, cache, text_kv)

    @contextmanager
    def between(self, model, short, tokens):
        middle = list(model.blocks)[self.reuse.first : LAYERS - self.reuse.last]
        plain = [block.forward for block in middle]

        def first(hidden, *rest):
            self.before = total(hidden)
            return self.before if short else plain[0](hidden, *rest)

        def last(hidden, *rest):
            if short:
                return total(hidden) + self.kept
            after = total(end(hidden, *rest))
            self.kept = (after - self.before)[:, -tokens:]
            return after

        end = first if len(middle) == 1 else plain[-1]
        for block in middle:
            block.forward = (lambda hidden, *rest: hidden) if short else block.forward
        middle[0].forward = first
        middle[-1].forward = last
        try:
            yield
        finally:
            for block in middle:
                del block.forward


@PRESETS
@pytest.mark.parametrize("join", [False, True], ids=["alone", "joined"])
@pytest.mark.parametrize("batch", [1, 2])
def test_streams_are_those_of_blocks_replaced_by_hand(preset, join, batch):
    pipeline = joined(deep(preset)) if join else deep(preset)
    given = latents_of(batch, 2 * preset.chunk, seed=8) if batch == 2 else None
    got = run(pipeline, batch, given=given)
    plain = without(pipeline)
    near(got, run(replace(plain, stages=ByHand(pipeline.stages, preset)), batch, given=given))
    assert (got - run(plain, batch, given=given)).abs().max() > 1e-3


class Watched(TorchStages):
    """Keeps every pass and the caches that were made."""

    def __init__(self, inner, longer=False):
        super().__init__(inner.models, None, None, join_context=inner.capabilities.joins_context)
        self.passes, self.caches, self.longer = [], [], longer

    def make_cache(self, *args):
        self.caches.append(TorchStages.make_cache(*args))
        return self.caches[-1]

    def run(self, step, cache, text_kv):
        self.passes.append(step)
        return super().run(replace(step, short=step.short and not self.longer), cache, text_kv)


@PRESETS
def test_without_a_pattern_nothing_is_kept(preset):
    plain = without(deep(preset))
    stages = Watched(plain.stages)
    run(replace(plain, stages=stages))
    assert all(step.reuse is None and not step.short for step in stages.passes)
    assert all(cache.residual is None for cache in stages.caches)


@PRESETS
@pytest.mark.parametrize("join", [False, True], ids=["alone", "joined"])
def test_full_steps_are_those_of_the_plain_preset(preset, join):
    pipeline = joined(deep(preset)) if join else deep(preset)
    stages = Watched(pipeline.stages, longer=True)
    assert torch.equal(run(replace(pipeline, stages=stages)), run(without(pipeline)))
    assert any(step.short for step in stages.passes)


@PRESETS
def test_only_the_named_steps_are_short(preset):
    pipeline = deep(preset)
    stages = Watched(pipeline.stages)
    stream = replace(pipeline, stages=stages).stream(TEXT, seed=4)
    for chunk in range(4):
        stages.passes.clear()
        stream.next_latent()
        kept = [step.short for step in stages.passes if step.reuse is not None]
        steps = len(preset.steps[min(chunk, len(preset.steps) - 1)])
        assert kept == [number in preset.reuse.steps for number in range(1, steps + 1)]
    kept = [cache.residual for cache in stages.caches if cache.residual is not None]
    assert [tuple(one.shape) for one in kept] == [(1, 6 * preset.chunk, 32)]


class FailingPass(Failing):
    """Raises once, in the `call`-th short or full step: before the head, or between the two writes of the residual."""

    def __init__(self, inner, stage, call, short):
        super().__init__(inner, stage, call, 2)
        self.short = short

    def run(self, step, cache, text_kv):
        model = self.models[step.kind.role]
        counts = step.reuse is not None and step.short == self.short
        module = model.proj_out if step.short else model.blocks[self._layer]
        work = partial(TorchStages.run, self, step, cache, text_kv)
        return self._run(step.kind.graph, module, work) if counts else work()


@PRESETS
@pytest.mark.parametrize("short", [False, True], ids=["full", "short"])
@pytest.mark.parametrize("call", [1, 2, 3, 5])
def test_a_failure_changes_nothing(preset, short, call):
    pipeline = deep(preset)
    expected = pipeline.stream(TEXT, seed=4)
    failing = FailingPass(pipeline.stages, pipeline.generator.passes[-1].graph, call, short)
    stream, got = replace(pipeline, stages=failing).stream(TEXT, seed=4), []
    while len(got) < 6:
        with suppress(Fault):
            got.append(stream.next_latent())
    assert failing.fired == 1
    assert all(torch.equal(one, expected.next_latent()) for one in got)


@PRESETS
def test_a_call_of_the_generator_can_be_repeated(preset):
    """Every call twice: once it fails in the last block, once it passes; then it passes again."""
    pipeline = deep(preset)
    last = pipeline.stages.models[pipeline.generator.passes[-1].role].blocks[-1 if preset.reuse.last else 0]

    def flows(interrupt):
        stream = pipeline.stream(TEXT, seed=4)
        generator, state, found = pipeline.generator, stream.state, []
        for chunk in range(3):
            x = latents_of(1, preset.chunk_frames(chunk), seed=chunk)
            for number, t in enumerate((900.0, 700.0, 400.0, 200.0), 1):
                call = partial(generator.denoise, x, t, state, short=number in preset.reuse.steps)
                if interrupt:
                    handle = last.register_forward_hook(_fail)
                    with suppress(Fault):
                        call()
                    handle.remove()
                    again = call()
                found.append(call())
                assert not interrupt or torch.equal(again, found[-1])
            generator.commit(x, state)
        return found

    with torch.inference_mode():
        for one, other in zip(flows(True), flows(False), strict=True):
            assert torch.equal(one, other)


def _fail(*_):
    raise Fault


@PRESETS
def test_the_first_call_of_a_chunk_is_full_whatever_is_asked(preset):
    pipeline = deep(preset)
    x = latents_of(1, preset.chunk_frames(0), seed=1)
    with torch.inference_mode():
        first, other = (pipeline.stream(TEXT, seed=4).state for _ in range(2))
        assert torch.equal(
            pipeline.generator.denoise(x, 900.0, first, short=True), pipeline.generator.denoise(x, 900.0, other)
        )
        for state in (first, other):
            pipeline.generator.commit(x, state)
        x = latents_of(1, preset.chunk_frames(1), seed=2)
        assert torch.equal(
            pipeline.generator.denoise(x, 900.0, first, short=True), pipeline.generator.denoise(x, 900.0, other)
        )


@PRESETS
def test_streams_in_turns_keep_residuals_of_their_own(preset):
    pipeline = deep(preset)
    alone = [run_some(pipeline.stream(text, seed=seed)) for seed, text in enumerate((TEXT, OTHER))]
    steps, generator = [], pipeline.generator
    with torch.inference_mode():  # step by step
        states = [pipeline.stream(text, seed=seed).state for seed, text in enumerate((TEXT, OTHER))]
        xs = [latents_of(1, preset.chunk_frames(0), seed=seed) for seed in range(2)]
        for number, t in enumerate((900.0, 700.0, 400.0, 200.0), 1):
            short = number in preset.reuse.steps
            steps.append([generator.denoise(x, t, state, short) for x, state in zip(xs, states, strict=True)])
        for which, text in enumerate((TEXT, OTHER)):
            state = pipeline.stream(text, seed=which).state
            for number, t in enumerate((900.0, 700.0, 400.0, 200.0), 1):
                flow = generator.denoise(xs[which], t, state, number in preset.reuse.steps)
                assert torch.equal(flow, steps[number - 1][which])
    streams = [pipeline.stream(text, seed=seed) for seed, text in enumerate((TEXT, OTHER))]
    turns = [[stream.next_latent() for stream in streams] for _ in range(4)]
    assert all(
        torch.equal(torch.cat(one, 2), other) for one, other in zip(zip(*turns, strict=True), alone, strict=True)
    )


def run_some(stream):
    return torch.cat([stream.next_latent() for _ in range(4)], 2)


class Holding(TorchStages):
    """What the best cache could do: a short step returns the flow of the step before."""

    def run(self, step, cache, text_kv):
        if not step.short:
            self.flow = super().run(replace(step, reuse=None), cache, text_kv)
        return self.flow


@pytest.mark.parametrize("steps", [(2,), (3,), (4,), (2, 4), (3, 4)])
@pytest.mark.parametrize("family", [GREEDY, CHUNKS], ids=title_of)
def test_with_euler_to_hold_the_flow_is_to_drop_the_step(family, steps):
    """Section 5's identity; renoise mixes in noise of the level that was left, so there it is none."""
    kept = tuple(t for number, t in enumerate(FOUR[0], 1) if number not in steps)
    for solver, same in (("euler", True), ("renoise", False)):
        held = deep(replace(family, solver=solver, reuse=Reuse(steps)))
        stages = Holding(held.stages.models, None, None)
        got = run_some(replace(held, stages=stages).stream(TEXT, seed=4))
        dropped = replace(held, preset=override(held.preset, {"reuse": None, "steps": kept}))
        expected = run_some(dropped.stream(TEXT, seed=4))
        assert bool((got - expected).abs().max() < 1e-4) == same


def test_without_first_and_last_blocks_a_short_step_adds_what_the_input_changed():
    """No block runs: the hidden states of two steps differ by their patch embeddings alone."""
    pipeline = deep(HOLLOW)
    model, hidden = pipeline.stages.models["sdd"], []
    plain = model.head
    model.head = lambda last, *rest: hidden.append(last.clone()) or plain(last, *rest)
    with torch.inference_mode():
        state = pipeline.stream(TEXT, seed=4).state
        full, short = (latents_of(1, 1, seed=seed) for seed in range(2))
        pipeline.generator.denoise(full, 900.0, state)
        pipeline.generator.denoise(short, 700.0, state, short=True)
        embedded = [model.patch_embedding(x).flatten(2).transpose(1, 2) for x in (full, short)]
    near(hidden[1] - hidden[0], embedded[1] - embedded[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reuse": "1:1:1"}, "preset: reuse: got steps (1,), expected rising step numbers from 2 on"),
        ({"reuse": "3,2"}, "preset: reuse: got steps (3, 2), expected rising"),
        ({"reuse": {"steps": []}}, "preset: reuse: got steps (), expected rising"),
        ({"reuse": "3:-1:1"}, "preset: reuse: got first -1, expected 0 to 1024"),
        ({"reuse": "3:1:x"}, "preset: reuse: got '3:1:x', expected steps as in 3 or 2,4"),
        ({"reuse": "3:1:1:1"}, "preset: reuse: got '3:1:1:1', expected steps as in 3 or 2,4"),
        ({"reuse": {"steps": "3"}}, "preset: reuse: steps: got '3', expected a list"),
        ({"reuse": {"steps": [3], "middle": 1}}, "preset: reuse: got unknown key middle, expected one of steps"),
        ({"reuse": {"first": 1}}, "preset: reuse: got no steps, expected it"),
        ({"reuse": 3}, "preset: reuse: got 3, expected a table"),
        ({"reuse": "5"}, "preset: got reuse at step 5, expected at most 4, the fewest that a chunk has"),
        ({"reuse": "3", "stop_after": 2}, "preset: got reuse at step 3, expected at most 2"),
        ({"reuse": "3", "steps": "1000,750,500/1000"}, "preset: got reuse at step 3, expected at most 1"),
    ],
)
def test_refused_patterns(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        override(Preset("greedy"), changes)
    assert "\n" not in str(error.value)


def test_noisy_pasts_are_refused():
    with pytest.raises(ValueError, match=r"^preset: got commit 'noisy', expected clean or none with reuse$"):
        Preset("causal", commit="noisy", reuse=Reuse((3,)))


def test_a_pattern_of_all_blocks_is_refused():
    with pytest.raises(ValueError, match=r"^reuse: got first 2 and last 2 of 4 layers, expected at least one between"):
        deep(replace(GREEDY, reuse=Reuse((3,), 2, 2))).stream(TEXT)


def test_steps_that_change_in_a_stream_keep_the_pattern():
    pipeline = deep(GREEDY)
    stream = pipeline.stream(TEXT, seed=4)
    stream.next_latent()
    with pytest.raises(ValueError, match="got reuse at step 3, expected at most 2"):
        stream.change(steps="1000,500")
    stream.change(steps="1000,800,600,400,200")
    stages = Watched(pipeline.stages)
    pipeline.generator.stages = stages
    stream.next_latent()
    assert [step.short for step in stages.passes if step.reuse] == [False, False, True, False, False]
