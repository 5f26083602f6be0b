"""Numbers that are not finite never become pixels: an error says where they began."""

import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import HEIGHT, WIDTH, text_of

import engine
import engine.run
from engine.model.vae import frames_to_uint8
from engine.runtime.cuda_graphs import GraphedStages
from engine.runtime.finite import bad_number, bad_weight
from engine.runtime.progress import Waiting
from engine.runtime.stages import TorchStages
from engine.sampling.noise import PhiloxNoise, ReplayNoise
from engine.stream import PythonStream

PROMPT = "a red circle moving right"
NAN, INF = float("nan"), float("inf")
CLIP = np.random.default_rng(0).integers(0, 256, (5, HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture
def spoil(model_dir, tmp_path):
    """A copy of the model in which one weight of a part has one other number. The file is read and written by
    safetensors itself."""

    def copy(part, name, value, at=0, dtype=None):
        folder = tmp_path / "model"
        shutil.copytree(model_dir, folder)
        (file,) = (folder / part).glob("*.safetensors")
        tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
        tensors[name].view(-1)[at] = value
        save_file(tensors, file, {"format": "pt"})
        return folder

    return copy


WEIGHTS = [
    ("transformer", "blocks.1.ffn.net.2.weight", NAN),
    ("transformer", "blocks.0.attn1.to_k.bias", INF),
    ("transformer", "blocks.1.attn1.norm_q.weight", -INF),
    ("transformer", "blocks.0.attn2.to_v.weight", NAN),
    ("transformer", "blocks.1.scale_shift_table", NAN),
    ("transformer", "patch_embedding.weight", INF),
    ("transformer", "condition_embedder.time_proj.bias", NAN),
    ("transformer", "proj_out.bias", INF),
    ("vae", "decoder.conv_in.weight", NAN),
    ("vae", "decoder.mid_block.attentions.0.to_qkv.bias", INF),
    ("vae", "decoder.norm_out.gamma", INF),
    ("vae", "decoder.conv_out.bias", INF),
    ("vae", "decoder.conv_out.bias", -INF),
    ("vae", "decoder.conv_out.weight", NAN),
    ("vae", "post_quant_conv.bias", NAN),
]


@pytest.mark.parametrize("preset", ["greedy", "self-forcing"])
@pytest.mark.parametrize(("part", "name", "value"), WEIGHTS)
def test_a_weight_is_named_at_the_first_chunk(spoil, part, name, value, preset):
    pipeline = engine.load(spoil(part, name, value), preset=preset)
    said = rf"^{part}.* {name.replace('.', '[.]')}: got {value} in float32 \[.*\], expected finite numbers$"
    with pipeline.stream(PROMPT) as stream:
        for call in (stream.next_chunk, lambda: next(stream), stream.next_chunk):
            with pytest.raises(ValueError, match=said):
                call()
        assert stream.handed == stream.emitted == 0


@pytest.mark.parametrize("name", ["encoder.block.1.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"])
def test_a_weight_of_the_text_encoder_is_named_with_the_prompt(spoil, name, pipeline):
    spoiled = engine.load(spoil("text_encoder", name, NAN))
    own = name.removeprefix("encoder.").replace(".", "[.]")
    with pytest.raises(ValueError, match=rf"^text_encoder {own}: got nan in float32 \[.*\], expected finite numbers$"):
        spoiled.stream(PROMPT)
    # An embedding does not need it; a switch to text does, and changes nothing.
    embedding, chunks = pipeline.encode_prompt(PROMPT), []
    with spoiled.stream(embedding) as stream:
        chunks.append(stream.next_chunk())
        with pytest.raises(ValueError, match="text_encoder block.1" if "block.1" in name else "text_encoder final"):
            stream.set_prompt("a blue square")
        chunks.append(stream.next_chunk())
    with pipeline.stream(embedding) as stream:
        assert all(np.array_equal(stream.next_chunk(), mine) for mine in chunks)


@pytest.mark.parametrize(
    "name", ["encoder.conv_in.weight", "encoder.mid_block.resnets.0.conv1.bias", "quant_conv.bias"]
)
def test_a_weight_of_the_vae_encoder_is_named_with_the_clip(spoil, name):
    spoiled = engine.load(spoil("vae", name, NAN))
    with pytest.raises(ValueError, match=rf"^vae {name.replace('.', '[.]')}: got nan in float32"):
        spoiled.stream(PROMPT, clip=CLIP)


def test_given_numbers(pipeline):
    text, latents = text_of(), torch.zeros(1, 8, 1, 4, 6)
    text[0, 3, 2], latents[0, 1, 0, 2, 2] = NAN, -INF
    with pytest.raises(ValueError, match=r"prompt: got nan in the embedding \(float32 \[1, 16, 24\]\), expected"):
        pipeline.stream(text)
    with pytest.raises(ValueError, match=r"latents: got -inf \(float32 \[1, 8, 1, 4, 6\]\), expected finite numbers"):
        pipeline.stream(PROMPT, latents=latents)
    draws = {(chunk, 0): PhiloxNoise(1).draw(chunk, 1, (1, 8, 1, 4, 6))[0] for chunk in range(3)}
    draws[1, 0][0, 0, 0, 0, 0] = INF
    stream = pipeline.stream(PROMPT, noise=ReplayNoise(draws))
    stream.next_chunk()
    with pytest.raises(ValueError, match=r"noise: got inf for chunk 1, expected finite numbers"):
        stream.next_chunk()


class Overflow(TorchStages):
    """While it is on, one product of a finite weight leaves the numbers' range."""

    def __init__(self, inner, module, scale=1e30):
        super().__init__(inner.models, inner.vae, inner.text_encoder, join_context=inner.capabilities.joins_context)
        self.module, self.scale, self.on = module, scale, False

    def within(self, work):
        if not self.on:
            return work()
        enlarge = lambda module, args: (args[0] * self.scale * self.scale, *args[1:])  # noqa: E731
        handle = self.module.register_forward_pre_hook(enlarge)
        try:
            return work()
        finally:
            handle.remove()

    def run(self, step, cache, text_kv):
        return self.within(lambda: TorchStages.run(self, step, cache, text_kv))

    def vae_steady(self, latent, cache):
        return self.within(lambda: TorchStages.vae_steady(self, latent, cache))


@pytest.mark.parametrize("take", ["next_chunk", "next_latent", "__next__"])
@pytest.mark.parametrize("family", ["pipeline", "causal"])
def test_an_overflow_names_chunk_step_and_module(request, family, take):
    """The chunk can be made again when its cause is gone, with the bits it would have had."""
    pipeline = request.getfixturevalue(family)
    expected = [np.array(getattr(s, take)()) for s in [pipeline.stream(PROMPT, seed=2)] for _ in range(16)]
    role = pipeline.generator.roles()[-1]
    stages = Overflow(pipeline.stages, pipeline.stages.models[role].blocks[1].ffn.net[2])
    stream = replace(pipeline, stages=stages).stream(PROMPT, seed=2)
    got = [np.array(getattr(stream, take)())]
    chunk = len(got) if take != "__next__" or family == "pipeline" else 0
    while take == "__next__" and stream._now.rest is not None:
        got.append(np.array(next(stream)))
        chunk = 1
    stages.on = True
    steps = len(pipeline.preset.steps[min(1, len(pipeline.preset.steps) - 1)])
    said = (rf"^chunk {max(chunk, 1)}, step 1 of {steps} \(t = \d+\), \w+ blocks[.]1[.]ffn[.]net[.]2: got -?(inf|nan) "
            r"in float32 \[.*\], expected finite numbers \(the weights are finite\)$")  # fmt: skip
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=said):
            getattr(stream, take)()
    stages.on = False
    got += [np.array(getattr(stream, take)()) for _ in range(16 - len(got))]
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


def test_an_overflow_of_the_vae_alone(pipeline):
    expected = [s.next_chunk() for s in [pipeline.stream(PROMPT, seed=2)] for _ in range(4)]
    stages = Overflow(pipeline.stages, pipeline.stages.vae.decoder.conv_out)
    stream = replace(pipeline, stages=stages).stream(PROMPT, seed=2)
    got = [stream.next_chunk(), stream.next_chunk()]
    stages.on = True
    with pytest.raises(
        FloatingPointError, match=r"^chunk 2, vae_steady decoder[.]conv_out: got -?(nan|inf) in float32"
    ):
        stream.next_chunk()
    stages.on = False
    got += [stream.next_chunk(), stream.next_chunk()]
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


def test_float16_that_overflows(pipeline):
    """Weights that float16 holds, and a product that it does not; bfloat16 holds both."""
    models = {}
    for role, model in pipeline.stages.models.items():
        models[role] = type(model)(model.config, model.condition_proj is not None)
        models[role].load_state_dict(model.state_dict())
        block = models[role].blocks[1].ffn.net[2]
        block.weight.data.mul_(3e4 / float(block.weight.detach().abs().max()))
        models[role].eval().requires_grad_(False).half()
    stages = TorchStages(models, pipeline.stages.vae, None)
    narrow = replace(pipeline, stages=stages, dtype=torch.float16)
    stream = narrow.stream(text_of())
    said = r"^chunk 0, step 1 of \d+ \(t = 1000\), \w+ blocks[.]1.* in float16 .*; try precision bf16 or fp32\)$"
    with pytest.raises(FloatingPointError, match=said):
        stream.next_latent()
    stages = TorchStages({role: model.bfloat16() for role, model in models.items()}, pipeline.stages.vae, None)
    wide = replace(pipeline, stages=stages, dtype=torch.bfloat16)
    assert wide.stream(text_of()).next_latent().isfinite().all()


def test_weights_that_float16_cannot_hold(spoil, tmp_path):
    pipeline = engine.load(spoil("transformer", "blocks.0.ffn.net.2.bias", 1e6), preset="self-forcing")
    for model in pipeline.stages.models.values():
        model.half()
    with pytest.raises(ValueError, match=r"^transformer dit: blocks[.]0[.]ffn[.]net[.]2[.]bias: got inf in float16"):
        replace(pipeline, dtype=torch.float16).stream(text_of()).next_latent()


def test_pixels_that_arrive_late(pipeline, monkeypatch):
    """On a GPU the answer travels with the pixels: after a look-ahead the stream ends, before one the chunk is free."""
    for ahead in (False, True):
        stages = Overflow(pipeline.stages, pipeline.stages.vae.decoder.conv_out)
        stream = replace(pipeline, stages=stages).stream(PROMPT, seed=2)
        stream.looks_ahead = ahead
        got = [stream.next_chunk()]
        stages.on = True
        monkeypatch.setattr(PythonStream, "_decode", late)
        with pytest.raises(FloatingPointError, match=r"^chunk 1"):
            stream.next_chunk()
        monkeypatch.undo()
        stages.on = False
        if ahead:
            for call in (stream.next_chunk, stream.next_latent, lambda: next(stream)):  # noqa: B023
                with pytest.raises(ValueError, match=r"got a closed one \(chunk \d failed after the caches"):
                    call()
        else:
            got.append(stream.next_chunk())
            plain = pipeline.stream(PROMPT, seed=2)
            assert all(np.array_equal(plain.next_chunk(), mine) for mine in got)


def late(self, x):
    """A decoding that does not look at its own result, as on a GPU."""
    now = self._now
    shown, cache = self._frames_of(x)
    self._now = replace(self._accepted(x), waiting=Waiting(shown, cache, now), started=now.started + len(shown))
    self._ahead = None


def test_graphs(pipeline):
    """The modules are named through CUDA graphs too: a diagnosis runs without them."""
    from bench.instruments.ways import StandIn

    stages = Overflow(pipeline.stages, pipeline.stages.models["sdd"].blocks[1].ffn.net[2])
    stream = replace(pipeline, stages=GraphedStages(stages, StandIn)).stream(PROMPT)
    stages.on = True
    with pytest.raises(
        FloatingPointError, match=r"^chunk 0, step 1 of \d+ \(t = 1000\), sdd blocks[.]1[.]ffn[.]net[.]"
    ):
        stream.next_chunk()


@pytest.mark.parametrize(("value", "status", "said"), [
    (NAN, 2, r"error: transformer \w+: blocks[.]1[.]ffn[.]net[.]2[.]weight: got nan"),
    (3e38, 1, r"error: chunk 0, step 1 of \d+ \(t = 1000\), \w+ blocks[.]1"),
])  # fmt: skip
def test_the_command_line(spoil, capfd, tmp_path, monkeypatch, value, status, said):
    folder = spoil("transformer", "blocks.1.ffn.net.2.weight", value)
    if value == 3e38:  # finite, and too large for any product
        (file,) = (folder / "transformer").glob("*.safetensors")
        tensors = load_file(file)
        tensors["blocks.1.ffn.net.2.weight"].fill_(value)
        save_file(tensors, file, {"format": "pt"})
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(folder), "--prompt", PROMPT, "--frames", "9", "--out", "clip.mp4", "--quiet"]
    assert engine.run.main(words) == status
    err = capfd.readouterr().err
    assert re.match(said, err), err
    assert err.count("\n") == 1
    assert not (tmp_path / "clip.mp4").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_kinds(dtype):
    x = torch.linspace(-3, 3, 1001).to(dtype)
    largest = torch.full((3,), torch.finfo(dtype).max).to(dtype)
    assert bad_number(x) is None
    assert bad_number(largest) is None
    for value in (NAN, INF, -INF):
        y = x.float().clone()
        y[7] = value
        z = y.to(dtype)
        expected = None if z.float().isfinite().all() else str(float(z[7]))
        assert (bad_number(z) or "").replace("-nan", "nan") == (expected or "")
    assert bad_number(torch.tensor([1, 2])) is None
    assert bad_number(torch.zeros(0)) is None
    assert bad_weight([("a", x), ("b", largest)], text=False) == ""


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_clamp_hides_nothing(pipeline, value):
    """The last convolution alone makes inf: diffusers' clamp would show it as white or black."""
    vae = pipeline.stages.vae
    bias = vae.decoder.conv_out.bias
    before = bias.data.clone()
    latent = torch.zeros(1, 8, 1, 4, 6)
    expected, _ = vae.first(latent)
    try:
        bias.data[1] = value
        frames, _ = vae.first(latent)
    finally:
        bias.data.copy_(before)
    assert frames[:, 1].isnan().all()
    assert torch.equal(frames[:, [0, 2]], expected[:, [0, 2]])
    assert math.isnan(float(frames.amax()))
    assert torch.equal(frames_to_uint8(vae.first(latent)[0]), frames_to_uint8(expected))
