"""What the tests of the generators share: presets, spies, and dense forward passes that streams must equal."""

from dataclasses import replace

import torch
from tiny import dense, pipeline_of, text_of

from engine.config import LocalHeads, Preset
from engine.runtime.stages import TorchStages

TEXT, OTHER = text_of(seed=0), text_of(seed=1)
SHORT = ((1000, 500),)
TOKENS = 6


def near(got, expected, tolerance=1e-5):
    """Relative to the size of what is expected."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < tolerance * max(1.0, float(expected.abs().max()))


class Spy(TorchStages):
    """Keeps what went into the models and what came out."""

    def __init__(self, models, vae=None, text_encoder=None, join_context=False):
        super().__init__(models, vae, text_encoder, join_context=join_context)
        self.flows, self.c_fs = [], []  # (latent, t, flow), c_f

    def run(self, step, cache, text_kv):
        result = super().run(step, cache, text_kv)
        if step.kind.timed:
            self.flows.append((step.latent.clone(), float(step.t[0]), result.clone()))
        elif step.kind.graph == "etm":
            self.c_fs.append(result.clone())
        return result


def spied(preset, batch=1, joined=False):
    pipeline = pipeline_of(preset)
    spy = Spy(pipeline.stages.models, join_context=joined)
    pipeline = replace(pipeline, stages=spy, height=32, width=48, spatial=8)
    return pipeline.stream(text_of(batch, seed=0), seed=3), spy


@torch.inference_mode()
def poison(*caches):
    """NaN wherever nothing has been written yet: a slot that is read too early spoils everything after."""
    for ring in (ring for cache in caches for ring in cache.rings):
        for part in (*ring.k, *ring.v):
            part.fill_(float("nan"))


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


def name_of(preset):
    return f"chunk{preset.first_chunk or ''}{preset.chunk}-window{preset.window}-sink{preset.attn_sink}"


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


FAMILIES = [
    greedy(w=2, max_position=3),
    Preset("causal", chunk=3, window=7, attn_sink=1, steps=SHORT),
    Preset("causal", chunk=2, window=4, attn_sink=2, steps=SHORT, commit="noisy"),
    Preset("causal", chunk=2, window=4, steps=SHORT, commit="none"),
    Preset("causal", chunk=2, window=6, attn_sink=2, steps=SHORT, heads=LocalHeads(4, 2, ((0,), (0, 1)))),
]


def joined(pipeline):
    """The pipeline, with context passes that run together with the next chunk's first step."""
    stages = pipeline.stages
    return replace(pipeline, stages=TorchStages(stages.models, stages.vae, stages.text_encoder, join_context=True))


def title_of(preset):
    return f"{preset.family}-{preset.commit}{'-heads' if preset.heads else ''}"


class Fault(RuntimeError):
    pass


class Failing(TorchStages):
    """Raises once: in layer `layer` of the `call`-th call of stage `stage`."""

    def __init__(self, inner, stage, call, layer):
        join_context = inner.capabilities.joins_context
        super().__init__(inner.models, inner.vae, inner.text_encoder, join_context=join_context)
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


def after_switch(pipeline, recommit, switch=OTHER, at=5):
    stream = pipeline.stream(TEXT, seed=4)
    for _ in range(at):
        stream.next_latent()
    if switch is not None:
        stream.set_prompt(switch, recommit)
    return torch.cat([stream.next_latent() for _ in range(3)], dim=2)
