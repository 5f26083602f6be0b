"""Strengths of adapters that change while streams run: always what a pipeline loaded at those strengths makes."""

import hashlib
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_streams import FAMILIES, OTHER, SHORT, TEXT, joined, name_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import CPU, models_of, pipeline_of, reference_of, transformer

import engine
from bench.instruments.ways import StandIn
from engine.config import Preset
from engine.loader import assemble
from engine.model.quantized import quantized
from engine.run import main
from engine.runtime.cuda_graphs import GraphedStages
from engine.runtime.stages import TorchStages
from engine.weights.adapters import Adapter, read_adapters
from engine.weights.sources import open_source


def lora_file(path, seed, wide=True):
    """LoRA of a tiny transformer: all linears of the blocks, time_projection; with `wide` also norms and modulation."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape):
        return torch.randn(shape, generator=generator) * 0.15

    tensors = {}
    sizes = {"ffn.0": (48, 32), "ffn.2": (32, 48)}
    names = [f"{a}_attn.{p}" for a in ("self", "cross") for p in "qkvo"] + list(sizes)
    for block in range(2):
        for name in names:
            out, into = sizes.get(name, (32, 32))
            key = f"diffusion_model.blocks.{block}.{name}"
            tensors |= {f"{key}.lora_down.weight": some(3, into), f"{key}.lora_up.weight": some(out, 3)}
            tensors |= {f"{key}.alpha": torch.tensor(6.0)} | ({f"{key}.diff_b": some(out)} if wide else {})
        if wide:
            tensors |= {f"diffusion_model.blocks.{block}.diff_m": some(1, 6, 32)}
            tensors |= {f"diffusion_model.blocks.{block}.self_attn.norm_q.diff": some(32)}
            tensors |= {f"diffusion_model.blocks.{block}.norm3.diff": some(32)}
    if wide:
        tensors |= {
            "diffusion_model.time_projection.1.diff": some(192, 32),
            "diffusion_model.head.diff_m": some(1, 2, 32),
        }
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return lora_file(folder / "a.safetensors", 1), lora_file(folder / "b.safetensors", 2, wide=False)


def adapted(preset, files, strengths, precision="fp32", join=False):
    """A pipeline of parts in memory, as loader.load assembles it."""
    plain, dtype = replace(preset, heads=None), torch.bfloat16 if precision == "fp8" else torch.float32
    models = models_of(plain)  # adapters know the heads in their own order
    config = next(iter(models.values())).config
    chosen = [Adapter(file, strength) for file, strength in zip(files, strengths, strict=True)]
    adapters = read_adapters(chosen, [], config)
    for role, model in models.items():
        model.to(dtype)
        adapters.merge(role, model)
        model.order_heads(preset.local_heads)
        model.fuse()
    if precision != "fp32":
        models = {role: quantized(model, precision, ("*.attn2.to_out.0",), role) for role, model in models.items()}
    stages = TorchStages(models, None, None)
    made = assemble(stages, config, preset, dtype, CPU, height=32, width=48, adapters=adapters)
    return joined(made) if join else made


def latents(stream, count=3):
    return torch.cat([stream.next_latent() for _ in range(count)], dim=2)


def weights(pipeline):
    """Every tensor that the forward pass reads."""
    found = {}
    for role, model in pipeline.stages.models.items():
        found |= {f"{role}.{name}": tensor for name, tensor in model.state_dict().items()}
        found[f"{role}.tables"] = model._tables
        for number, block in enumerate(model.blocks):
            if block.attn1._fused is not None:
                weight, bias = block.attn1._fused
                found |= {f"{role}.{number}.joint weight": weight, f"{role}.{number}.joint bias": bias}
    return found


def same(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name].float(), tensor.float()), name


STRENGTHS = [(0.0, 0.0), (1.0, 0.0), (0.0, 0.5), (-0.7, 1.3)]


@pytest.mark.parametrize("preset", FAMILIES[:2], ids=name_of)
@pytest.mark.parametrize("precision", ["fp32", "fp8", "int8"])
def test_merging_again_gives_the_bits_of_loading_in_place(preset, files, precision):
    pipeline = adapted(preset, files, (1.0, 1.0), precision)
    addresses = {name: tensor.data_ptr() for name, tensor in weights(pipeline).items()}
    stream = pipeline.stream(TEXT, seed=3)
    before = {name: tensor.clone() for name, tensor in weights(pipeline).items()}
    for strengths in [*STRENGTHS, (1.0, 1.0)]:
        stream.set_adapters(dict(zip("ab", strengths, strict=True)))
        fresh = adapted(preset, files, strengths, precision)
        same(weights(pipeline), weights(fresh))
        other = pipeline.stream(TEXT, seed=5)
        other.set_adapters(dict(zip("ab", strengths, strict=True)))
        assert torch.equal(latents(other, 2), latents(fresh.stream(TEXT, seed=5), 2))
    same(weights(pipeline), before)
    assert {name: tensor.data_ptr() for name, tensor in weights(pipeline).items()} == addresses


def test_strength_zero_is_no_adapter(files):
    preset = FAMILIES[0]
    pipeline, plain = adapted(preset, files, (0.0, 0.0)), pipeline_of(preset)
    for role, model in plain.stages.models.items():
        model.fuse()
        for name, tensor in model.state_dict().items():
            assert torch.equal(pipeline.stages.models[role].state_dict()[name], tensor)
    assert torch.equal(latents(pipeline.stream(TEXT, seed=3)), latents(plain.stream(TEXT, seed=3)))


@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("preset", FAMILIES, ids=name_of)
def test_a_change_before_the_first_chunk_is_another_pipeline(preset, files, join):
    pipeline = adapted(preset, files, (1.0, 1.0), join=join)
    stream = pipeline.stream(TEXT, seed=3)
    stream.set_adapters({"a": 0.25, "b": -0.5})
    fresh = adapted(preset, files, (0.25, -0.5), join=join)
    assert torch.equal(latents(stream, 5), latents(fresh.stream(TEXT, seed=3), 5))


def on_shared_latents(pipeline, strengths, recommit, at=4, more=2, ahead=False):
    """`at` chunks at the strengths of loading, then `more` after a change."""
    stream = pipeline.stream(TEXT, seed=4)
    for _ in range(at):
        stream.next_latent()
    if ahead:
        with torch.inference_mode():
            stream._look_ahead()
    if strengths is not None:
        stream.set_adapters(strengths, recommit)
    return latents(stream, more)


@pytest.mark.parametrize("preset", [FAMILIES[0], Preset("causal", chunk=2, window=6, steps=SHORT)], ids=name_of)
def test_recommit_gives_what_a_stream_of_the_new_strengths_would_hold(preset, files):
    """The window's latents, committed from the start with the new weights: a stream that was supplied with them."""
    pipeline, fresh = adapted(preset, files, (1.0, 1.0)), adapted(preset, files, (0.25, -0.5))
    old, new = pipeline.stream(TEXT, seed=4), fresh.stream(TEXT, seed=4)
    for _ in range(2):
        x = old.next_latent()
        with torch.inference_mode():  # the same latents, as if the other pipeline had made them
            new._latent()
            new._now = new._accepted(x)
    old.set_adapters({"a": 0.25, "b": -0.5})
    # The last chunk was not committed before, so both commit it; `new` rewrites nothing.
    assert (old.next_latent() - new.next_latent()).abs().max() < 1e-5


@pytest.mark.parametrize("preset", FAMILIES[:3], ids=name_of)
def test_without_recommit_the_past_stays_as_it_was(preset, files):
    pipeline = adapted(preset, files, (1.0, 1.0))
    other = {"a": 0.25, "b": -0.5}
    runs = [on_shared_latents(pipeline, other, True), on_shared_latents(pipeline, other, False),
            on_shared_latents(pipeline, None, False)]  # fmt: skip
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (runs[i] - runs[j]).abs().max() > 1e-4
    # The same strengths again, and nothing recomputed: no change at all.
    assert torch.equal(on_shared_latents(pipeline, {"a": 1.0}, False), runs[2])


@pytest.mark.parametrize("recommit", [True, False])
@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("preset", FAMILIES[:2], ids=name_of)
def test_a_latent_made_ahead_is_dropped(preset, files, join, recommit):
    pipeline = adapted(preset, files, (1.0, 1.0), join=join)
    ahead = on_shared_latents(pipeline, {"a": 0.25}, recommit, ahead=True)
    unchanged = on_shared_latents(pipeline, None, recommit, ahead=True)
    assert (ahead[:, :, :1] - unchanged[:, :, :1]).abs().max() > 1e-4
    if recommit:
        # Two chunks fill no window, so it makes no difference whether the second one is in it already.
        ahead = on_shared_latents(pipeline, {"a": 0.25}, recommit, at=2, ahead=True)
        later = on_shared_latents(pipeline, {"a": 0.25}, recommit, at=2)
        assert (ahead - later).abs().max() < 1e-4 * later.abs().max()


@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("preset", FAMILIES, ids=name_of)
def test_streams_that_take_turns_each_make_what_they_make_alone(preset, files, join):
    pipeline = adapted(preset, files, (1.0, 0.0), join=join)
    wanted = [{}, {"a": 0.0}, {"a": 0.5, "b": -1.0}]
    alone = []
    for strengths in wanted:
        own = adapted(preset, files, (1.0, 0.0), join=join).stream(TEXT, seed=3)
        own.set_adapters(strengths)
        first = latents(own, 3)
        own.set_prompt(TEXT.flip(1))
        alone.append(torch.cat([first, latents(own, 3)], dim=2))
    streams = [pipeline.stream(TEXT, seed=3) for _ in wanted]
    for stream, strengths in zip(streams, wanted, strict=True):
        stream.set_adapters(strengths)
    parts = [[] for _ in streams]
    for number in range(6):
        if number == 3:
            for stream in streams:
                stream.set_prompt(TEXT.flip(1))
        for stream, made in zip(streams, parts, strict=True):
            made.append(stream.next_latent())
    for made, expected in zip(parts, alone, strict=True):
        assert torch.equal(torch.cat(made, dim=2), expected)
    assert (alone[0] - alone[1]).abs().max() > 1e-3


def test_streams_in_threads_keep_their_strengths(files):
    preset = FAMILIES[0]
    pipeline = adapted(preset, files, (1.0, 0.0))
    strengths, made = [{"a": 1.0}, {"a": -0.5}, {"b": 1.0}], [None] * 3

    def make(number):
        stream = pipeline.stream(TEXT, seed=3)
        stream.set_adapters(strengths[number])
        made[number] = latents(stream, 6)

    threads = [threading.Thread(target=make, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(3):
        own = adapted(preset, files, (1.0, 0.0)).stream(TEXT, seed=3)
        own.set_adapters(strengths[number])
        assert torch.equal(made[number], latents(own, 6))


def test_weights_are_merged_again_only_where_strengths_differ(files, monkeypatch):
    from engine.model.transformer import WanTransformer

    pipeline = adapted(FAMILIES[1], files, (1.0, 0.5))
    written, inner = [], WanTransformer.write
    monkeypatch.setattr(
        WanTransformer, "write", lambda self, name, value: written.append(name) or inner(self, name, value)
    )
    stream, other = pipeline.stream(TEXT, seed=3), pipeline.stream(TEXT, seed=4)
    latents(stream), latents(other)
    assert not written
    stream.set_adapters({"b": 0.25})  # products alone
    assert len(written) == 20
    assert all(name.endswith("weight") for name in written)
    latents(stream)
    assert len(written) == 20
    other.next_latent()
    assert len(written) == 40


@pytest.mark.parametrize(
    ("strengths", "message"),
    [
        ({"c": 1.0}, r"adapters: got the name 'c', expected one of a, b"),
        ({"a": float("nan")}, r"adapter: got strength nan, expected a finite number"),
        ({"a": float("inf")}, r"adapter: got strength inf, expected a finite number"),
        ({"a": "1"}, r"adapter: got strength 1, expected a finite number"),
        ({"a": None}, r"adapter: got strength None, expected a finite number"),
        ({"a": 3e38, "b": 3e38}, r"got weights of .* that are not finite, expected numbers"),
    ],
    ids=str,
)
def test_refused_strengths_change_nothing(files, strengths, message):
    pipeline = adapted(FAMILIES[1], files, (1.0, 0.5))
    stream, plain = pipeline.stream(TEXT, seed=3), adapted(FAMILIES[1], files, (1.0, 0.5)).stream(TEXT, seed=3)
    assert torch.equal(stream.next_latent(), plain.next_latent())
    with pytest.raises(ValueError, match=message):
        stream.set_adapters(strengths)
    assert torch.equal(latents(stream), latents(plain))


def test_pipelines_without_adapters(pipeline):
    with pipeline.stream("a red circle") as stream, pytest.raises(ValueError, match=r"without any, expected load"):
        stream.set_adapters({"a": 1.0})


def test_closed_streams(files):
    stream = adapted(FAMILIES[0], files, (1.0, 0.5)).stream(TEXT)
    stream.close()
    with pytest.raises(ValueError, match="got a closed one"):
        stream.set_adapters({"a": 1.0})


def frames(stream, count=3):
    return [stream.next_chunk().tobytes() for _ in range(count)]


@pytest.mark.parametrize("preset", ["greedy", "self-forcing"])
def test_files_to_frames(model_dir, files, preset):
    """Loaded from files: set strengths give the frames of a pipeline loaded at them; base files stay as they are."""
    a, b = files
    pipeline = engine.load(model_dir, preset=preset, adapters=[f"{a}:1.0", (b, 0.5)])
    assert pipeline.adapters.strengths == {"a": 1.0, "b": 0.5}
    before = {file: file.read_bytes() for file in open_source(model_dir / "transformer").files}
    stream = pipeline.stream("a red circle", seed=1)
    stream.set_adapters({"a": -0.5, "b": 0})
    fresh = engine.load(model_dir, preset=preset, adapters=[Adapter(a, -0.5), f"{b}:0"])
    got = frames(stream)
    assert got == frames(fresh.stream("a red circle", seed=1))
    assert got != frames(pipeline.stream("a red circle", seed=1))
    assert {file: file.read_bytes() for file in before} == before
    same(weights(pipeline), weights(engine.load(model_dir, preset=preset, adapters=[a, (str(b), 0.5)])))
    role = "sdd" if preset == "greedy" else "dit"
    bare = engine.load(model_dir, preset=preset)
    zero = engine.load(model_dir, preset=preset, adapters=[f"{a}:0", f"{b}:-0.0"])
    same(weights(zero), weights(bare))
    base = pipeline.adapters._bases[role]["blocks.0.ffn.net.2.weight"]
    assert base.data_ptr() != pipeline.stages.models[role].blocks[0].ffn.net[2].weight.data_ptr()


def test_user_adapters_come_on_top_of_a_models_own(model_dir, files, tmp_path):
    """adapters/etm and adapters/sdd stay at 1; the user's are merged into both, and leave them alone at 0."""
    folder = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    for role, seed in (("etm", 1), ("sdd", 2)):
        model = get_peft_model(reference_of(transformer(0)), LoraConfig(r=2, target_modules=["to_q", "ffn.net.2"]))
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * 0.2
        model.save_pretrained(folder / "adapters" / role)
    own, both = engine.load(folder), engine.load(folder, adapters=[f"{files[0]}:0.5"])
    assert both.adapters.strengths == {"a": 0.5}
    lora = load_file(files[0])
    for role in ("etm", "sdd"):
        for block in range(2):
            key = f"diffusion_model.blocks.{block}.ffn.2.lora_"
            delta = lora[f"{key}up.weight"] @ lora[f"{key}down.weight"] * 0.5 * 6 / 3
            before, after = (p.stages.models[role].blocks[block].ffn.net[2].weight for p in (own, both))
            assert (after - before - delta).abs().max() < 1e-5
            assert delta.abs().max() > 1e-2
    stream = both.stream("a red circle", seed=1)
    stream.set_adapters({"a": 0})
    same(weights(both), weights(own))


def test_an_adapter_of_another_size_is_refused_before_weights_are_read(files, monkeypatch):
    """The embedded model is wider."""
    monkeypatch.setattr(engine.loader, "load_transformer", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=r"got LoRA of a transformer of width 32, expected width \d+"):
        engine.load(adapters=[files[0]])


def test_captured_graphs_read_the_merged_weights(model_dir, files):
    """bench's stand-in captures: a graph only ever sees its own tensors and the weights' addresses."""
    a, b = files
    pipeline = engine.load(model_dir, adapters=[a, f"{b}:0"])
    stages = pipeline.stages
    graphed = replace(
        pipeline, stages=GraphedStages(TorchStages(stages.models, stages.vae, stages.text_encoder), StandIn)
    )
    graphed.warm()
    streams = [graphed.stream("a red circle", seed=1) for _ in range(2)]
    streams[1].set_adapters({"a": -0.5, "b": 1})
    got = [[], []]
    for _ in range(6):
        for stream, made in zip(streams, got, strict=True):
            made.append(stream.next_chunk())
    assert graphed.stages.captured >= 8  # of both streams' caches
    for made, strengths in zip(got, ((1, 0), (-0.5, 1)), strict=True):
        fresh = engine.load(model_dir, adapters=[(a, strengths[0]), (b, strengths[1])]).stream("a red circle", seed=1)
        for chunk in made:
            assert np.abs(chunk.astype(int) - fresh.next_chunk()).max() <= 1  # static tensors: last bits
    assert np.abs(got[0][-1].astype(int) - got[1][-1]).max() > 3


def run(capfd, model_dir, *arguments):
    common = ["--prompt", "a red circle", "--seed", "1", "--model", str(model_dir), "--out", "checksum", "--json"]
    try:
        code = main([*common, *map(str, arguments)])
    except SystemExit as stopped:
        code = stopped.code
    out, err = capfd.readouterr()
    return code, json.loads(out.splitlines()[-1]) if out else None, err


def test_the_command_line(capfd, model_dir, files):
    a, b = files
    code, report, err = run(capfd, model_dir, "--frames", 17, "--adapter", f"{a}:0.5", "--adapter", b, "--adapter-at",
                            "9f", "b=-1", "--adapter-at", "9f", "b=0.25")  # fmt: skip
    assert code == 0, err
    assert report["notes"] == ["--adapter-at b=-1 has no effect: b=0.25 at 9f replaces it before a chunk begins"]
    stream = engine.load(model_dir, adapters=[(a, 0.5), b]).stream("a red circle", seed=1)
    frames = [stream.next_chunk() for _ in range(3)]
    stream.set_adapters({"b": 0.25})
    frames += [stream.next_chunk() for _ in range(2)]
    assert report["sha256"] == hashlib.sha256(np.concatenate(frames).tobytes()).hexdigest()


def test_the_command_line_prints_notes(capfd, model_dir, files, tmp_path):
    save_file(load_file(files[1]) | {"text_encoder.x.alpha": torch.tensor(1.0)}, tmp_path / "c.safetensors")
    code, report, err = run(capfd, model_dir, "--frames", 1, "--adapter", tmp_path / "c.safetensors")
    assert code == 0
    assert [f"note: {note}" for note in report["notes"]] == [line for line in err.splitlines() if "text_enc" in line]
    assert len(report["notes"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "{a}:nan"], "adapter: got strength nan, expected a finite number"),
        (["--adapter", "/nowhere.safetensors"], "adapter: got /nowhere.safetensors, expected a LoRA file"),
        (["--adapter", "{a}:much"], "a.safetensors:much, expected a LoRA file"),
        (["--adapter", "{a}", "--adapter", "{a}:0.5"], "got the name 'a' for"),
        (["--adapter-at", "1s", "a=1"], "--adapter-at: got 'a=1', expected --adapter as well"),
        (["--adapter", "{a}", "--adapter-at", "1s", "b=1"], "got 'b=1', expected NAME=STRENGTH, the name one of a"),
        (["--adapter", "{a}", "--adapter-at", "1s", "a"], "got 'a', expected NAME=STRENGTH"),
        (["--adapter", "{a}", "--adapter-at", "1s", "a=x"], "got 'a=x', expected NAME=STRENGTH, as in a=0.5"),
        (["--adapter", "{a}", "--adapter-at", "1s", "a=inf"], "got 'a=inf', expected NAME=STRENGTH, as in a=0.5"),
        (["--adapter", "{a}", "--adapter-at", "soon", "a=1"], "--adapter-at: got 'soon', expected a time"),
        (
            ["--adapter", "{a}", "--adapter-at", "99s", "a=1"],
            "--adapter-at 99s: got frame 792, expected one before the end at 17",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_line_refuses(capfd, model_dir, files, arguments, message):
    texts = [text.replace("{a}", str(files[0])) for text in arguments]
    code, report, err = run(capfd, model_dir, "--frames", 17, *texts)
    assert (code, report) == (2, None)
    assert message in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_notes_of_loading(model_dir, files, tmp_path):
    tensors = load_file(files[1]) | {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "c.safetensors")
    (note,) = engine.load(model_dir, adapters=[tmp_path / "c.safetensors"]).notes
    assert "skipped 1 tensors of the text encoder (lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha)" in note
    assert engine.load(model_dir, adapters=[files[1]]).notes == ()


def test_a_pipeline_on_other_modules_says_so(files):
    pipeline = adapted(FAMILIES[1], files, (1.0, 0.5))
    wrapped = {role: torch.nn.Sequential(model) for role, model in pipeline.stages.models.items()}
    other = replace(pipeline, stages=TorchStages(wrapped, None, None))
    with (
        pytest.raises(ValueError, match="got a Sequential, expected this project's transformer"),
        other.adapters.at({"a": 0.0, "b": 0.0}, wrapped),
    ):
        pass


@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("preset", FAMILIES[:2], ids=name_of)
def test_strengths_that_change_on_the_way_to_a_prompt(preset, files, join):
    """Each blend, and the target, get the weights of their chunk: as hard switches to the blends."""
    runs = []
    for soft in (True, False):
        stream, made = adapted(preset, files, (1.0, 1.0), join=join).stream(TEXT, seed=4), []
        for number in range(8):
            if number == 2 and soft:
                stream.set_prompt(OTHER, transition=4)
            if 2 <= number < 6 and not soft:
                stream.set_prompt(OTHER if number == 5 else torch.lerp(TEXT, OTHER, (number - 1) / 4))
            if number in (3, 5, 7):
                stream.set_adapters({"a": 0.25 * number, "b": -0.5})
            made.append(stream.next_latent())
        runs.append(made)
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
