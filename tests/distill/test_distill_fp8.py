"""Training for FP8: the student's products are the engine's, and the gradient goes straight through the rounding."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from limits import HANG
from torch import Tensor, nn

import engine
from distill.__main__ import main
from distill.data.shards import Shards, write_index, write_shard
from distill.models.causal import CausalStudent
from distill.models.fp8 import compute_in_fp8
from distill.models.student import Student
from distill.models.student_file import NextChunkConfig, load_student
from distill.stages import consistency, dmd, next_chunk, rl
from distill.stages.consistency import Consistency, ConsistencyConfig
from distill.stages.dmd import DmdConfig
from distill.stages.rl import RlConfig
from engine.config import TransformerConfig
from engine.generators.base import Generator, Geometry
from engine.generators.greedy import GreedyGenerator
from engine.loader import EMBEDDED, FP8_KEEP
from engine.model.quantized import Fp8Linear, quantized
from engine.model.transformer import WanTransformer
from engine.weights.lora.form import Change
from engine.weights.lora.merge import merged

ROOT = Path(__file__).parents[2]
BF16 = torch.bfloat16
CAPTIONS = ["a red circle moving right slowly on a gray background", "a blue square moving down quickly"]
SHAPE = TransformerConfig(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
    text_dim=16, freq_dim=32, ffn_dim=48, num_layers=2,
)  # fmt: skip
KEEPS = [FP8_KEEP, ("sdd.blocks.1.*", "*.to_k", "*.ffn.net.2"), ()]


def embedded() -> Student:
    """The embedded student with weights in bf16, as the engine's FP8 has them."""
    student, _, _ = load_student(EMBEDDED, dtype=BF16)
    assert isinstance(student, Student)
    student.sdd.condition_proj.to(BF16)
    return student


def adapted(model: nn.Module) -> dict[str, Any]:
    """The layers with a LoRA, by name."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


def merge(layer: Any) -> Tensor:
    change = Change(layer.lora_A["default"].weight, layer.lora_B["default"].weight, 1.0)
    return merged(layer.base_layer.weight, [(change, 1.0)])


def stream(generator: Generator, stages: Any, config: TransformerConfig, emb: Tensor) -> Tensor:
    """Flows of four noisy frames, each after its clean past."""
    clean, noisy = torch.randn(2, 2, 8, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(BF16)
    state = generator.open(Geometry.of(config, 2, 8, 8), stages.prepare_text(emb))
    flows = []
    for frame in range(4):
        one = slice(frame, frame + 1)
        flows.append(generator.denoise(noisy[:, :, one], 600.0, state))
        generator.commit(clean[:, :, one], state)
    return torch.cat(flows, 2)


@pytest.fixture(scope="module")
def emb() -> Tensor:
    return load_student(EMBEDDED)[2].encode(CAPTIONS).to(BF16)


@torch.no_grad()
def test_the_engines_fp8_stream_to_the_bit(emb: Tensor) -> None:
    """With the LoRA of the other layers merged, too, as the engine does it before it streams."""
    pipeline = engine.load(EMBEDDED, precision="fp8")
    expected = stream(pipeline.generator, pipeline.stages, pipeline.config, emb)

    student = embedded()
    config, preset = student.sdd.config, load_student(EMBEDDED)[1].preset
    generator = GreedyGenerator(student.stages, config, preset, BF16, torch.device("cpu"))
    plain = stream(generator, student.stages, config, emb)
    compute_in_fp8(student, FP8_KEEP)
    rounded = stream(generator, student.stages, config, emb)
    for model in (student.sdd, student.etm):
        for layer in adapted(model).values():
            if "forward" not in vars(layer):
                weight, bias = merge(layer), layer.base_layer.bias
                layer.forward = lambda x, weight=weight, bias=bias: F.linear(x, weight, bias)
    assert torch.equal(stream(generator, student.stages, config, emb), expected)
    # Without that, roundings of bf16 move numbers over edges of e4m3; FP8 itself is further off.
    error, far = ((other - expected).float().norm() / expected.float().norm() for other in (rounded, plain))
    assert 0 < error < far < 0.06


@pytest.mark.parametrize("keep", KEEPS, ids=["default", "some", "none"])
@torch.no_grad()
def test_layers_weights_and_scales_are_the_engines(keep: tuple[str, ...]) -> None:
    """Which layers are rounded, and to which numbers; each product to the bit."""
    student = embedded()
    compute_in_fp8(student, keep)
    for role, model in student.stages.models.items():
        plain = WanTransformer(model.config, conditioned=role == "sdd").to(BF16)
        weights = {name: layer.base_layer for name, layer in adapted(model).items()}
        for name, layer in adapted(model).items():
            own = plain.get_submodule(name)
            own.weight.copy_(merge(layer))
            own.bias.copy_(weights[name].bias)
        plain.fuse()
        quantised = quantized(plain, "fp8", keep, role)
        for name, layer in adapted(model).items():
            path, _, leaf = name.rpartition(".")
            owner = quantised.get_submodule(path)
            rows = slice(None)
            other = getattr(owner, leaf)
            if other is None:  # to_q, to_k and to_v of self-attention are one
                other, dim = owner.joint, model.config.dim
                rows = slice(*(("to_q", "to_k", "to_v").index(leaf) * dim + step for step in (0, dim)))
            assert isinstance(other, Fp8Linear) == ("forward" in vars(layer)), name
            if isinstance(other, Fp8Linear):
                x = torch.randn(2, 5, other.weight.shape[1]).to(BF16)
                assert torch.equal(layer(x), other(x)[..., rows]), name
                assert torch.equal(layer(x.float()), other(x)[..., rows].float()), name


def straight(x: Tensor) -> Tensor:
    """x rounded to e4m3 with one scale per row, whose gradient passes unchanged; not the product's own code."""
    scale = x.detach().abs().amax(-1, keepdim=True) / 448
    return x + ((x / scale).to(torch.float8_e4m3fn).float() * scale - x).detach()


def through(x: Tensor) -> Tensor:
    return x + (x.to(BF16).float() - x).detach()


def reference(layer: Any) -> Callable[[Tensor], Tensor]:
    """The layer's product as a graph of torch's own operations that round, and pass gradients straight through."""

    def forward(x: Tensor) -> Tensor:
        down, up, base = (p.weight for p in (layer.lora_A["default"], layer.lora_B["default"], layer.base_layer))
        weight = through(through(base) + through(through(up) @ through(down)))
        return through(F.linear(straight(through(x)), straight(weight), through(layer.base_layer.bias)))

    return forward


def small_student(**options: Any) -> Student:
    torch.manual_seed(0)
    student = Student(WanTransformer(SHAPE), rank=4, **options)
    with torch.no_grad():
        for parameter in student.trained().values():
            parameter.normal_(std=0.2)
    return student


def test_gradient_of_a_product() -> None:
    """That of the rounded numbers: the same as torch's own graph with the rounding passed over."""
    student = small_student()
    layer = student.sdd.get_submodule("blocks.0.ffn.net.2")
    compute_in_fp8(student, ())
    x, grad = torch.randn(2, 7, 48, requires_grad=True), torch.randn(2, 7, 32)
    trained = x, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    results = []
    for forward in (layer, reference(layer)):
        out = forward(x)
        results.append((out, *torch.autograd.grad(out, trained, grad)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    unrounded = torch.autograd.grad(F.linear(x, layer.base_layer.weight), x, grad)[0]
    assert (results[0][1] - unrounded).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{}, {"etm": False}, {"recompute": True}], ids=str)
def test_gradients_of_a_student(options: dict[str, Any]) -> None:
    """Through both models and every block, with blocks recomputed and without an ETM."""
    results = []
    for ours in (True, False):
        student = small_student(**(options if ours else {**options, "recompute": False}))
        compute_in_fp8(student, FP8_KEEP)
        if not ours:
            for layer in [layer for model in (student.sdd, student.etm) for layer in adapted(model).values()]:
                if "forward" in vars(layer):
                    layer.forward = reference(layer)
        clean, noisy, emb = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 4, 3, 4, 4), torch.randn(1, 5, 16)
        flow = student.flow(clean, noisy, torch.full((1, 3), 0.6), student.stages.prepare_text(emb))
        flow.square().mean().backward()
        results.append({name: p.grad for name, p in student.trained().items() if p.grad is not None})
    got, expected = results
    assert got.keys() == expected.keys()
    moving = [name for name in got if expected[name].abs().max() > 0]
    assert len(moving) > 20
    pairs = [torch.cat([grads[name].flatten() for name in moving]) for grads in results]
    assert F.cosine_similarity(*pairs, dim=0) > 0.999  # the products sum in another order: a few numbers round apart


def test_a_causal_student_is_rounded_too() -> None:
    torch.manual_seed(0)
    student = CausalStudent(WanTransformer(SHAPE), rank=4, window=2)
    clean, noisy, emb = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 4, 3, 4, 4), torch.randn(1, 5, 16)
    given = clean, noisy, torch.full((1, 3), 0.6), student.stages.prepare_text(emb)
    plain = student.flow(*given)
    compute_in_fp8(student, FP8_KEEP)
    assert 0 < (student.flow(*given) - plain).norm() / plain.norm() < 0.1
    rounded = [name for name, layer in adapted(student.dit).items() if "forward" in vars(layer)]
    assert len(rounded) == 2 * 7  # of two blocks: all but the text's keys and values, and its kept output


@pytest.fixture(scope="module")
def config(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> NextChunkConfig:
    """Of a tiny random teacher, with data of its size."""
    folder = tmp_path_factory.mktemp("bank")
    latents = torch.randn(4, 8, 3, 4, 6, generator=torch.Generator().manual_seed(0)).half()
    write_shard(folder, 0, latents, CAPTIONS * 2)
    write_index(folder, 1, {})
    return NextChunkConfig(
        teacher=str(model_dir), data=str(folder), steps=4, batch=2, first_batch=2, frames=3, rank=2, save_every=2,
        roll_share=1.0, roll_from=0.0, fp8=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(config: NextChunkConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    next_chunk.train(config, folder)
    return folder


def losses(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_next_chunk_resumes_and_differs_from_a_run_without(
    config: NextChunkConfig, trained: Path, tmp_path: Path
) -> None:
    student = torch.load(trained / "student.pt")["student"]
    next_chunk.train(config, tmp_path / "cut", stop_at=3)
    assert_equal(next_chunk.train(config, tmp_path / "cut"), student)
    assert losses(tmp_path / "cut") == losses(trained)
    next_chunk.train(replace(config, fp8=False), tmp_path / "plain", stop_at=1)
    (plain,), (rounded, *_) = losses(tmp_path / "plain"), losses(trained)
    assert plain["loss"] != rounded["loss"]
    assert plain["loss"] == pytest.approx(rounded["loss"], rel=0.05)
    assert load_student(trained / "student.pt")[1] == config  # and its layers are ordinary ones
    assert not any("forward" in vars(layer) for layer in adapted(load_student(trained / "student.pt")[0]).values())


@pytest.mark.parametrize("stage", ["dmd", "rl", "consistency"])
def test_fine_tuning_resumes(stage: str, config: NextChunkConfig, trained: Path, tmp_path: Path) -> None:
    shared: dict[str, Any] = {
        "student": str(trained / "student.pt"), "data": config.data, "steps": 2, "batch": 1, "frames": 2,
        "save_every": 1, "fp8": True,
    }  # fmt: skip
    module: Any = {"dmd": dmd, "rl": rl, "consistency": consistency}[stage]
    tuned: Any = {
        "dmd": DmdConfig(**shared, critic_every=1, critic_warmup=0), "rl": RlConfig(**shared, critic_every=1),
        "consistency": ConsistencyConfig(**shared),
    }[stage]  # fmt: skip
    whole = module.train(tuned, tmp_path / "whole")
    module.train(tuned, tmp_path / "cut", stop_at=1)
    assert_equal(module.train(tuned, tmp_path / "cut"), whole)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    module.train(replace(tuned, fp8=False), tmp_path / "plain", stop_at=1)
    assert losses(tmp_path / "plain")[0]["loss"] != losses(tmp_path / "whole")[0]["loss"]


def test_the_teacher_of_consistency_is_not_rounded(config: NextChunkConfig, trained: Path) -> None:
    """Its flow is that of the student without FP8; afterwards the student's products round as before."""
    student, made, base = load_student(trained / "student.pt")
    data, tuned = Shards(Path(config.data)), ConsistencyConfig(batch=1, frames=3, guidance=1.5, fp8=True)
    objective = Consistency(tuned, made, base, student, data)
    latent, captions = data.read([0])
    given = latent[:, :, :-1], latent, torch.full((1, 3), 0.6), base.encode(captions)
    with torch.no_grad():
        plain, of_teacher = student(*given), objective.teacher_flow(*given)
        compute_in_fp8(student, FP8_KEEP)
        rounded = student(*given)
        assert torch.equal(objective.teacher_flow(*given), of_teacher)
        assert torch.equal(student(*given), rounded)
    assert (rounded - plain).norm() > 0


def test_bf16(config: NextChunkConfig, trained: Path, tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        next_chunk.train(replace(config, precision="bf16", recompute=True), tmp_path)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    for one, other in zip(losses(tmp_path), losses(trained), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.05)


@pytest.mark.thorough
def test_two_processes_with_spread_weights(config: NextChunkConfig, trained: Path, tmp_path: Path) -> None:
    """Frozen weights that the processes share are whole while a product reads them."""
    jobs = tmp_path / "jobs"
    jobs.write_bytes(pickle.dumps([("fp8", next_chunk.train, (replace(config, shard=True), tmp_path / "fp8"))]))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(ROOT / "tests" / "support" / "in_processes.py")
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support")))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    subprocess.run([*launcher, script, str(jobs)], cwd=ROOT, env=env, check=True, timeout=HANG, capture_output=True)
    assert "frozen layers spread" in Path(f"{jobs}.fp8.0").read_text()
    for two, one in zip(losses(tmp_path / "fp8"), losses(trained), strict=True):
        assert two == pytest.approx(one, rel=1e-3)  # without FP8 they are 6e-3 away


def test_the_plan_counts_the_rounded_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = EMBEDDED / "transformer" / "config.json"
    path = tmp_path / "c.toml"
    path.write_text(f'[next_chunk]\nbatch = 1\nfirst_batch = 1\n[cluster]\ngpus = 1\ntransformer = "{shape}"\n')
    plans = []
    for fp8 in ("false", "true"):
        assert main(["next_chunk", "--config", str(path), "--dry-run", "--set", f"fp8={fp8}"]) == 0
        plans.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    rounded = plans[1].pop("activations") - plans[0].pop("activations")
    assert rounded == plans[1].pop("memory") - plans[0].pop("memory")
    assert 2.4e6 < rounded < 2.6e6  # two models of 1.22 M weights, a byte each
    assert plans[0] == plans[1]
