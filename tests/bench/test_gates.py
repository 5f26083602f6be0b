"""The gates of the fast path pass what is right, and see every planted fault: at full size, and on recorded cases."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from faults import FAULTS, GRAPH_FAULTS

from bench.__main__ import main
from bench.instruments import gates, models, recordings
from bench.instruments.gates import ATTENTION_GAIN, LIMITS, exact, flows, gate
from bench.instruments.ways import WAYS, stages_through
from engine.config import Runtime, TransformerConfig
from engine.loader import FP8_KEEP
from engine.model.cache import FP8
from engine.model.quantized import quantized
from engine.model.vae import VAEConfig

CASES = Path(__file__).parents[1] / "data" / "causal"
ALL = FAULTS | GRAPH_FAULTS
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["greedy", "self-forcing"])
def streamed(request):
    """A deep, narrow pipeline in bf16 whose attention matters, and its exact flows."""
    shape = TransformerConfig(num_attention_heads=2, attention_head_dim=64, text_dim=64, ffn_dim=512, num_layers=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.SHAPES, "gate", (shape, VAEConfig(base_dim=16, num_res_blocks=1), (64, 96), True))
        runtime = Runtime(device="cpu", precision="bf16")
        pipeline = models.random_pipeline("gate", request.param, runtime, attention_gain=ATTENTION_GAIN)
    return pipeline, flows(exact(pipeline))


def in_precision(pipeline, precision):
    parts = pipeline.stages.models
    if precision != "bf16":
        parts = {role: quantized(model, "fp8", FP8_KEEP, role) for role, model in parts.items()}
    kv = FP8 if precision == "fp8-attention" else None
    return replace(pipeline, stages=stages_through("graphs", parts), kv_dtype=kv)


@pytest.mark.parametrize("precision", ["bf16", "fp8", "fp8-attention"])
def test_what_is_right_passes(streamed, precision):
    pipeline, truth = streamed
    assert len(truth) > pipeline.generator.steady(pipeline.preset) + 1  # the rings wrap
    found = gate(in_precision(pipeline, precision), truth, precision)
    print(precision, found)
    assert found.passed
    assert found.worst > 1e-3  # two roundings, not one pipeline twice


@pytest.mark.parametrize("fault", ALL)
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp8-attention", marks=pytest.mark.thorough)])
def test_every_fault_is_seen(streamed, precision, fault):
    pipeline, truth = streamed
    with ALL[fault]():
        found = gate(in_precision(pipeline, precision), truth, precision)
    assert not found.passed
    assert found.worst > 1.25 * LIMITS[precision]  # clearly


def test_a_gain_of_one_is_blind(streamed, monkeypatch):
    """Why the weights have a gain: without it a stuck rotation passes."""
    shape = streamed[0].config
    monkeypatch.setitem(models.SHAPES, "gate", (shape, VAEConfig(base_dim=16, num_res_blocks=1), (64, 96), True))
    plain = models.random_pipeline("gate", streamed[0].preset_name, Runtime(device="cpu", precision="bf16"))
    truth = flows(exact(plain))
    with ALL["rotation stuck"]():
        assert gate(in_precision(plain, "bf16"), truth, "bf16").passed


def test_numbers_that_are_none_do_not_pass():
    assert not gates.Gate("bf16", [1e-3, float("nan")], LIMITS["bf16"]).passed


@pytest.mark.parametrize("way", [way for way in WAYS if way != "plain"])  # test_parity.py has that one
def test_every_recorded_case_passes_every_way(way, capsys):
    assert main(["parity", "--cases", str(CASES), "--through", way]) == 0
    assert f"18 of 18 within tolerance, through {way}" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_recorded_cases_through_graphs_see_every_fault(dtype, fault):
    recording = recordings.read_recording(CASES)
    recorded = [case for case in recording.cases if case.dtype == dtype]
    seen = False
    for case in sorted(recorded, key=lambda case: case.tensors["output"].numel())[-4:]:  # the longest
        with ALL[fault]():
            error = recordings.replay(case, recording, torch.device("cpu"), "graphs") - case.tensors["output"].float()
        largest, rms = recordings.TOLERANCE[dtype]
        seen |= float(error.abs().max()) > largest or float(error.square().mean().sqrt()) > rms
    assert seen


def test_an_unknown_way_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["parity", "--cases", str(CASES), "--through", "air"])
    assert stopped.value.code == 2


def test_attentions_gain_is_the_only_difference():
    """And random weights are drawn where they are used: the meta device gets none."""
    shape = models.SHAPES["tiny"][0]
    with torch.device("meta"):
        model = models.WanTransformer(shape)
    plain = dict(models.RandomSource(model, "plain", 3).read())
    gained = dict(models.RandomSource(model, "gained", 3, attention_gain=4).read())
    changed = {name for name in plain if not torch.equal(plain[name], gained[name])}
    assert changed == {f"blocks.{layer}.attn1.norm_q.weight" for layer in range(shape.num_layers)}
    assert all(torch.equal(4 * plain[name], gained[name]) for name in changed)
    drawn = dict(models.RandomSource(model, "meta", 3, "meta").read())
    assert {tensor.device.type for tensor in drawn.values()} == {"meta"}
