"""Streaming through caches against one dense masked forward of diffusers' transformer over the same frames."""

from collections import deque
from dataclasses import replace

import pytest
import torch
from tiny import dense, latents_of, models_of, pipeline_of, text_of

from engine.config import Preset
from engine.generators.base import Geometry
from engine.model.cache import RingCache
from engine.presets import PRESETS
from engine.runtime.stages import TorchStages
from engine.sampling.schedule import Schedule

TEXT, OTHER = text_of(seed=0), text_of(seed=1)
SHORT = ((1000, 500),)
TOKENS = 6


def near(got, expected, tolerance=1e-5):
    """Relative to the size of what is expected."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < tolerance * max(1.0, float(expected.abs().max()))


class Spy(TorchStages):
    """Keeps what went into the models and what came out."""

    def __init__(self, models, vae=None, text_encoder=None):
        super().__init__(models, vae, text_encoder)
        self.flows, self.c_fs = [], []  # (latent, t, flow), c_f

    def run(self, step, cache, text_kv):
        result = super().run(step, cache, text_kv)
        if step.kind.timed:
            self.flows.append((step.latent.clone(), float(step.t[0]), result.clone()))
        elif step.kind.graph == "etm":
            self.c_fs.append(result.clone())
        return result


def spied(preset, batch=1):
    pipeline = pipeline_of(preset)
    spy = Spy(pipeline.stages.models)
    pipeline = replace(pipeline, stages=spy, height=32, width=48, spatial=8)
    return pipeline.stream(text_of(batch, seed=0), seed=3), spy


@torch.inference_mode()
def poison(*caches):
    """NaN wherever nothing has been written yet: a slot that is read too early spoils everything after."""
    for cache in caches:
        cache.k.fill_(float("nan"))
        cache.v.fill_(float("nan"))


def kept(frames, slots, pinned):
    return frames if len(frames) <= slots else frames[:pinned] + frames[pinned:][-(slots - pinned) :]


def runs_of(preset, chunks):
    """Frames of every chunk."""
    start, runs = 0, []
    for index in range(chunks):
        size = preset.chunk_frames(index)
        runs.append(list(range(start, start + size)))
        start += size
    return runs


def causal_sees(preset, runs):
    """Row by row, which frames are in the ring when a frame's chunk attends."""
    rows, seen = [], []
    for run in runs:
        seen = seen + run
        inside = set(kept(seen, preset.window, preset.attn_sink))
        rows += [[frame in inside for frame in range(runs[-1][-1] + 1)]] * len(run)
    return rows


CAUSAL = [
    Preset("causal", chunk=1, window=3, attn_sink=1, steps=SHORT),
    Preset("causal", chunk=1, window=21, steps=SHORT),
    Preset("causal", chunk=3, window=7, attn_sink=2, steps=SHORT),
    Preset("causal", chunk=3, window=6, attn_sink=1, steps=SHORT),  # wraps inside a chunk
    Preset("causal", chunk=3, first_chunk=1, window=7, attn_sink=1, steps=SHORT),
    Preset("causal", chunk=2, window=5, steps=SHORT, context_timestep=40.0),
]


def name_of(preset):
    return f"chunk{preset.first_chunk or ''}{preset.chunk}-window{preset.window}-sink{preset.attn_sink}"


@pytest.mark.parametrize("preset", CAUSAL, ids=name_of)
def test_causal_stream_equals_dense_windowed_forward(preset):
    stream, spy = spied(preset)
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


def greedy(chunk=1, w=3, max_position=20, steps=SHORT):
    """w: chunks before the current one that the ETM sees (Eq. 1)."""
    return Preset("greedy", chunk=chunk, window=(w + 1) * chunk, max_position=max_position, steps=steps)


def past_of(preset):
    """w of Eq. 1: chunks before the current one that the ETM sees."""
    return preset.window // preset.chunk - 1


def etm_sees(w, chunk, frames):
    """Eq. 1: the current chunk and w before it."""
    return [[0 <= q // chunk - k // chunk <= w for k in range(frames)] for q in range(frames)]


def sdd_flow(model, preset, x, t, c_f, latents, start, text):
    """SDD on [current | chunk 0 | last] at once; the context clean, chunk 0 blind to the rest."""
    chunk = preset.chunk
    parts, ts = [x], [t] * chunk
    at = min(start, preset.max_position)
    positions = [at + i for i in range(chunk)]
    if start > 0:
        parts.append(latents[:, :, :chunk])
        positions += range(chunk)
    if start > chunk:
        parts.append(latents[:, :, start - chunk : start])
        positions += [at - chunk + i for i in range(chunk)]
    count = len(parts)
    ts += [0.0] * chunk * (count - 1)
    among = [[True] * count, [False, True, False][:count], [False, True, True]][:count]
    sees = [[among[q // chunk][k // chunk] for k in range(count * chunk)] for q in range(count * chunk)]
    condition = None
    if c_f is not None:
        normed = c_f.double() / (c_f.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
        product = (normed @ model.condition_proj.weight.double().T).float()
        rest = torch.zeros(len(x), (count - 1) * product.shape[1], product.shape[2])
        condition = torch.cat([product, rest], dim=1)
    flow, _ = dense(model, torch.cat(parts, dim=2), ts, text, positions, sees, condition)
    return flow[:, :, :chunk]


GREEDY = [greedy(), greedy(chunk=2, w=2), greedy(w=0), greedy(w=1, max_position=2)]
GREEDY += [greedy(chunk=2, max_position=5)]


@pytest.mark.parametrize("preset", GREEDY, ids=lambda p: f"chunk{p.chunk}-w{past_of(p)}-max{p.max_position}")
@pytest.mark.parametrize("batch", [1, 2])
def test_greedy_stream_equals_dense_masked_forwards(preset, batch):
    stream, spy = spied(preset, batch)
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


FAMILIES = [
    greedy(w=2, max_position=3),
    Preset("causal", chunk=3, window=7, attn_sink=1, steps=SHORT),
    Preset("causal", chunk=2, window=4, attn_sink=2, steps=SHORT, commit="noisy"),
    Preset("causal", chunk=2, window=4, steps=SHORT, commit="none"),
]


def family_of(preset):
    return f"{preset.family}-{preset.commit}"


class Fault(RuntimeError):
    pass


class Failing(TorchStages):
    """Raises once: in layer `layer` of the `call`-th call of stage `stage`."""

    def __init__(self, inner, stage, call, layer):
        super().__init__(inner.models, inner.vae, inner.text_encoder)
        self._left, self._stage, self._layer = call, stage, layer
        self.fired = 0

    def _run(self, stage, module, work):
        if stage != self._stage:
            return work()
        self._left -= 1
        if self._left != 0:
            return work()

        def fail(*_):
            self.fired += 1
            raise Fault

        handle = module.register_forward_pre_hook(fail)
        try:
            return work()
        finally:
            handle.remove()

    def run(self, step, cache, text_kv):
        block = self.models[step.kind.role].blocks[self._layer]
        return self._run(step.kind.graph, block, lambda: TorchStages.run(self, step, cache, text_kv))

    def vae_first(self, latent):
        module = self.vae.decoder.norm_out
        return self._run("vae_first", module, lambda: TorchStages.vae_first(self, latent))

    def vae_steady(self, latent, cache):
        module = self.vae.decoder.norm_out
        return self._run("vae_steady", module, lambda: TorchStages.vae_steady(self, latent, cache))


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
    ],
    ids=lambda value: family_of(value) if isinstance(value, Preset) else str(value),
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
def test_causal_prompt_switch_rebuilds_the_window(preset, at):
    """Frames still cached once more under the new prompt, clean and at their own positions; then as always."""
    stream, spy = spied(preset)
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
def test_greedy_prompt_switch_rebuilds_the_window(preset, at):
    stream, spy = spied(preset)
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


def after_switch(pipeline, recommit, switch=OTHER, at=5):
    stream = pipeline.stream(TEXT, seed=4)
    for _ in range(at):
        stream.next_latent()
    if switch is not None:
        stream.set_prompt(switch, recommit)
    return torch.cat([stream.next_latent() for _ in range(3)], dim=2)


@pytest.mark.parametrize("preset", FAMILIES[:3], ids=family_of)
def test_without_recommit_the_past_stays_as_it_was(preset):
    pipeline = pipeline_of(preset)
    runs = [after_switch(pipeline, True), after_switch(pipeline, False), after_switch(pipeline, False, None)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (runs[i] - runs[j]).abs().max() > 1e-4
    # The same prompt again, and nothing recomputed: no change at all.
    assert torch.equal(after_switch(pipeline, False, TEXT), runs[2])


@pytest.mark.parametrize("preset", FAMILIES[:3], ids=family_of)
def test_a_switch_before_the_first_chunk_is_another_prompt(preset):
    pipeline = pipeline_of(preset)
    switched, plain = pipeline.stream(TEXT, seed=4), pipeline.stream(OTHER, seed=4)
    switched.set_prompt(OTHER)
    for _ in range(4):
        assert torch.equal(switched.next_latent(), plain.next_latent())


@pytest.mark.parametrize(
    ("preset", "stage", "call"),
    [
        *[(FAMILIES[0], "etm", call) for call in (6, 7)],
        *[(FAMILIES[0], "sdd_context", call) for call in (5, 6)],
        (FAMILIES[0], "sdd", 11),
        *[(FAMILIES[1], "dit", call) for call in (15, 17, 18)],
        *[(FAMILIES[2], "dit", call) for call in (11, 12, 13)],
    ],
    ids=lambda value: family_of(value) if isinstance(value, Preset) else str(value),
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


@pytest.mark.parametrize("preset", FAMILIES[:3], ids=family_of)
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
