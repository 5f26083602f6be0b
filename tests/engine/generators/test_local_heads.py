"""Heads that keep few frames: a stream equals dense passes with a mask per head, on every path of the engine."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from dense_streams import SHORT, TEXT, Spy, causal_sees, near, poison, runs_of
from tiny import CPU, dense, models_of, pipeline_of, text_of, transformer

from bench.instruments.ways import StandIn
from engine.config import LocalHeads, Preset, Reuse, TransformerConfig
from engine.loader import assemble, load
from engine.model.cache import RingCache
from engine.model.quantized import quantized
from engine.presets import check_preset, find_preset
from engine.runtime.cuda_graphs import GraphedStages
from engine.runtime.stages import TorchStages

HEADS = 4
PRESETS = {
    "chunk1": Preset("causal", chunk=1, window=5, attn_sink=1, steps=SHORT, heads=LocalHeads(3, 1, ((0, 2), (1,)))),
    "no sink": Preset("causal", chunk=1, window=5, steps=SHORT, heads=LocalHeads(2, 0, ((3,), (0, 1, 2)))),
    "all and none": Preset(
        "causal", chunk=3, window=9, attn_sink=3, steps=SHORT, heads=LocalHeads(6, 3, ((), (0, 1, 2, 3)))
    ),
    "wraps": Preset("causal", chunk=3, window=7, attn_sink=1, steps=SHORT, heads=LocalHeads(4, 0, ((1, 2), (0, 3)))),
    "context": Preset(
        "causal", chunk=2, window=8, attn_sink=2, steps=SHORT, context_timestep=40.0,
        heads=LocalHeads(4, 2, ((0, 1, 2), (2, 3))),
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)


def pipelines(preset, **stages):
    """A pipeline with the preset's heads in order, and its transformer as it was."""
    plain = transformer(num_attention_heads=HEADS)
    model = copy.deepcopy(plain)
    model.order_heads(preset.heads)
    spy = Spy({"dit": model}, **stages)
    return assemble(spy, model.config, preset, torch.float32, CPU, height=32, width=48), plain, spy


def sees_of(preset, runs):
    """[layers, heads, frames, frames]"""
    few = causal_sees(replace(preset, window=preset.heads.window, attn_sink=preset.heads.attn_sink), runs)
    wide = causal_sees(preset, runs)
    return [[few if head in local else wide for head in range(HEADS)] for local in preset.heads.layers]


@EVERY
@pytest.mark.parametrize("join", [False, True], ids=["alone", "joined"])
def test_a_stream_equals_dense_passes_with_a_mask_per_head(preset, join):
    pipeline, plain, spy = pipelines(preset, join_context=join)
    stream = pipeline.stream(text_of(), seed=3)
    poison(stream.state.cache)
    runs = runs_of(preset, 6)
    latents = torch.cat([stream.next_latent() for _ in runs], dim=2)
    calls = [call for call in spy.flows if call[1] != preset.context_timestep]
    for number, run in enumerate(runs):
        for x, t, flow in calls[2 * number : 2 * number + 2]:
            frames = torch.cat([latents[:, :, : run[0]], x], dim=2)
            ts = [preset.context_timestep] * run[0] + [t] * len(run)
            sees = sees_of(preset, runs[: number + 1])
            expected, _ = dense(plain, frames, ts, TEXT, list(range(run[-1] + 1)), sees)
            near(flow, expected[:, :, run[0] :])
    assert len(calls) == 2 * len(runs)


def streamed(pipeline, count=8):
    stream = pipeline.stream(text_of(), seed=3)
    return torch.cat([stream.next_latent() for _ in range(count)], dim=2)


@EVERY
def test_graphs_stream_the_same(preset):
    """The stand-in captures what a CUDA graph would: slots on the device, q, k and v straight into both rings."""
    pipeline, _, _ = pipelines(preset)
    expected = streamed(pipeline)
    stages = TorchStages(pipeline.stages.models, None, None, join_context=True)
    graphed = replace(pipeline, stages=GraphedStages(stages, StandIn))
    for _ in range(2):  # the second stream leases the caches of the first
        near(streamed(graphed), expected)
    assert graphed.stages.captured > 0


def test_with_reuse_and_in_int8():
    """A block is left out at step 2: the same latents however passes run. Integers move them by their rounding."""
    preset = replace(PRESETS["context"], steps=((1000, 750, 500),), reuse=Reuse((2,), 0, 1))
    pipeline, _, _ = pipelines(preset)
    expected, models = streamed(pipeline), pipeline.stages.models
    joint = TorchStages(models, None, None, join_context=True)
    for stages in (joint, GraphedStages(joint, StandIn)):
        near(streamed(replace(pipeline, stages=stages)), expected)
    assert not torch.equal(streamed(pipelines(replace(preset, reuse=None))[0]), expected)
    model = copy.deepcopy(models["dit"])
    model.fuse()
    narrow = TorchStages({"dit": quantized(model, "int8", (), "dit")}, None, None)
    found, plain = (streamed(replace(pipeline, stages=stages), 2) for stages in (narrow, pipeline.stages))
    assert 0 < (found - plain).norm() < 0.1 * plain.norm()


def test_a_window_that_is_written_again_has_all_frames_of_local_heads():
    """Sink frames must not pass for the newest ones of a ring without a sink."""
    fits = Preset("causal", window=6, attn_sink=4, heads=LocalHeads(3, 0, ((0,),)))
    assert check_preset(fits) == fits
    for changes in ({"heads": LocalHeads(4, 0, ((0,),))}, {"heads": LocalHeads(6, 0, ((0,),))}, {"window": 5}):
        with pytest.raises(ValueError, match=r"heads: got window \d, expected at most window - attn_sink \+ chunk"):
            check_preset(replace(fits, **changes))


def test_a_table_without_local_heads_changes_no_bit():
    preset = PRESETS["chunk1"]
    none = replace(preset, heads=LocalHeads(3, 1, ((), ())))
    found, expected = (streamed(pipeline_of(p)) for p in (none, replace(preset, heads=None)))
    assert torch.equal(found, expected)
    assert pipeline_of(none).stream(TEXT).state.cache.local is None


def test_local_heads_that_keep_the_whole_window_change_nothing_but_rounding():
    preset = replace(PRESETS["chunk1"], heads=LocalHeads(5, 1, ((0, 2), (1,))))
    pipeline, plain, _ = pipelines(preset)
    whole = assemble(TorchStages({"dit": plain}, None, None), plain.config, replace(preset, heads=None),
                     torch.float32, CPU, height=32, width=48)  # fmt: skip
    found, expected = streamed(pipeline), streamed(whole)
    near(found, expected)
    wider = replace(preset, heads=replace(preset.heads, window=9))  # never more than the others
    assert torch.equal(streamed(pipelines(wider)[0]), found)
    narrow, _, _ = pipelines(PRESETS["chunk1"])
    assert (streamed(narrow) - expected).abs().max() > 1e-2  # so the windows do matter here


def test_local_heads_take_less_memory():
    local, shape = LocalHeads(3, 1, ((0, 2), (1,))), (2, 1, 12, 6, 4, 16)
    whole, both = RingCache(*shape), RingCache(*shape, local=local)
    assert whole.nbytes == 2 * 2 * 12 * 6 * 4 * 16 * 4
    assert both.nbytes == whole.nbytes - 3 * (12 - 3) * 6 * 16 * 4 * 2
    with pytest.raises(ValueError, match="heads: got keys in FP8"):
        RingCache(*shape, dtype=torch.float8_e4m3fn, local=local)


@pytest.mark.parametrize("fused", [False, True])
def test_a_parameter_is_written_in_the_order_of_the_heads(fused):
    """As an adapter's new strength writes it."""
    local = PRESETS["chunk1"].heads
    first, other = (transformer(seed, num_attention_heads=HEADS) for seed in (0, 1))
    expected = copy.deepcopy(other)
    values = dict(other.named_parameters())
    for model in (first, expected):
        model.order_heads(local)
        if fused:
            model.fuse()
    for name, value in values.items():
        first.write(name, value)
    for one, two in zip(first.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first.blocks[0].attn1.to_q.weight, other.blocks[0].attn1.to_q.weight)
    assert torch.equal(first.blocks[0].attn2.to_q.weight, other.blocks[0].attn2.to_q.weight)


def test_transformers_must_be_loaded_with_the_table():
    preset = replace(PRESETS["chunk1"], heads=LocalHeads(3, 1, ((0,), (1,))))
    with pytest.raises(ValueError, match="heads: got transformers that were loaded with another table"):
        pipeline_of(preset, models_of(replace(preset, heads=None))).stream(TEXT)


FILE = {"window": 3, "attn_sink": 0, "layers": [[0], [], [1]]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"window": 0}, "window 0, expected 1 to"),
        ({"window": 2.5}, "got 2.5, expected a valid integer"),
        ({"window": 1, "attn_sink": 0, "chunk": 2}, r"window 1, expected at least its attn_sink \+ chunk \(2\)"),
        ({"attn_sink": 3}, "attn_sink 3, expected 0 to window - 1"),
        ({"attn_sink": 1}, r"attn_sink 1, expected at most attn_sink \(0\)"),
        ({"layers": []}, "expected 1 to 1024 layers"),
        ({"layers": [[1, 0]]}, "expected rising numbers"),
        ({"layers": [[0, 0]]}, "expected rising numbers"),
        ({"layers": [[-1]]}, "expected rising numbers"),
        ({"layers": 3}, "got 3, expected a list"),
        ({"more": 1}, "unknown key more"),
        ({"window": None}, "expected"),
    ],
)
def test_bad_tables(tmp_path, change, said):
    file = tmp_path / "heads.json"
    changes = {"window": 7, "chunk": change.get("chunk", 1)}
    file.write_text(json.dumps(FILE | {name: value for name, value in change.items() if name != "chunk"}))
    with pytest.raises(ValueError, match=said) as caught:
        find_preset("self-forcing-framewise", changes | {"heads": str(file)})
    assert "\n" not in str(caught.value)


def test_a_table_is_for_one_shape_of_the_causal_family(tmp_path):
    file = tmp_path / "heads.json"
    file.write_text(json.dumps(FILE))
    preset = find_preset("self-forcing-framewise", {"window": 7, "heads": str(file)})
    assert preset.heads == LocalHeads(3, 0, ((0,), (), (1,)))
    toml = tmp_path / "mine.toml"
    toml.write_text('base = "self-forcing-framewise"\nwindow = 7\n[heads]\nwindow = 3\nattn_sink = 0\n'
                    "layers = [[0], [], [1]]\n")  # fmt: skip
    assert find_preset(str(toml)).heads == preset.heads
    with pytest.raises(ValueError, match=r"^heads: got a table of 3 layers, expected one of 2 layers"):
        preset.heads.fit(TransformerConfig(num_layers=2))
    with pytest.raises(ValueError, match=r"^heads: got head 1, expected one of 3 layers of 1 heads"):
        preset.heads.fit(TransformerConfig(num_layers=3, num_attention_heads=1))
    with pytest.raises(ValueError, match="expected none for the greedy family"):
        check_preset(replace(find_preset("greedy"), heads=preset.heads))
    assert find_preset(str(toml), {"heads": "none"}).heads is None
    assert replace(preset, window=2).table()["heads"]["window"] == 2  # no more than the others keep
    with pytest.raises(FileNotFoundError):
        find_preset("self-forcing-framewise", {"heads": str(tmp_path / "none.json")})


def test_the_embedded_model_streams_with_local_heads():
    """All heads but one of every layer, of weights that were trained without: other frames, and finite ones."""
    config = load().config
    few = tuple(tuple(range(1, config.num_attention_heads)) for _ in range(config.num_layers))
    options = {"preset": "self-forcing-framewise", "overrides": {"window": 6, "attn_sink": 1}}
    frames = []
    for heads in (None, {"window": 3, "attn_sink": 1, "layers": few}):
        pipeline = load(**{**options, "overrides": options["overrides"] | ({"heads": heads} if heads else {})})
        with pipeline.stream("a red circle moving right", seed=1, frames=33) as stream:
            frames.append(np.stack(list(stream)))
    assert frames[0].shape == frames[1].shape
    assert np.array_equal(frames[0][:9], frames[1][:9])  # three latent frames: all keys are there
    assert not np.array_equal(frames[0][12:], frames[1][12:])
