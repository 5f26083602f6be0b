"""The memory plan: its numbers against real processes, against diffusers' own counts, and what it says of no room."""

import json
import re
import subprocess
import sys
import time
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from limits import HANG
from safetensors.torch import save_file
from tiny import transformer
from transformers import UMT5Config as TheirConfig
from transformers import UMT5EncoderModel

import engine
import engine.memory
import engine.run
from bench.instruments.random_weights import write_tokenizer
from engine.config import MOST, Runtime, TransformerConfig
from engine.memory import Case, plan_memory
from engine.model import quantized
from engine.model.activations import umt5_activations
from engine.model.cache import RingCache
from engine.model.transformer import WanTransformer
from engine.model.umt5 import UMT5Config, UMT5Encoder
from engine.model.vae import VAE, VAEConfig
from engine.presets import find_preset
from engine.runtime import device as devices
from engine.weights.folders import Given, find_parts

ROOT = Path(__file__).parents[2]
PROMPT = ["--prompt", "a red circle"]


def write(folder, config, vae, encoder, dtype, sparse=False):
    """A pipeline directory of these shapes. Sparse files have room for the weights and no data."""
    with torch.device("meta"):
        parts = {"transformer": WanTransformer(config), "vae": VAE(vae), "text_encoder": UMT5Encoder(encoder)}
    settings = {"transformer": {"_class_name": "WanTransformer3DModel"} | asdict(config),
                "vae": {"_class_name": "AutoencoderKLWan"} | asdict(vae),
                "text_encoder": {"model_type": "umt5"} | asdict(encoder)}  # fmt: skip
    values = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
    for part, module in parts.items():
        place = folder / part
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(settings[part]))
        shapes = {f"encoder.{n}" if part == "text_encoder" else n: t.shape for n, t in module.state_dict().items()}
        file = place / ("model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors")
        if sparse:
            write_sparse(file, shapes, dtype)
            continue
        tensors = {}
        for name, shape in shapes.items():
            tensor = values.repeat(-(-shape.numel() // len(values)))[: shape.numel()].reshape(shape)
            gain = "norm" in name and name.endswith(("weight", "gamma"))
            tensors[name] = (1 + tensor if gain else tensor).to(dtype)
        save_file(tensors, file)
    write_tokenizer(folder / "tokenizer")
    return folder


def write_sparse(file, shapes, dtype):
    words, end, header = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype], 0, {}
    for name, shape in shapes.items():
        size = shape.numel() * dtype.itemsize
        header[name] = {"dtype": words, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)


# In a process of its own: how much resident memory grows, from the imports to the peak, and what the plan said.
MEASURE = """
import json, sys
from pathlib import Path
import engine, engine.run, tokenizers

def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))

before = kilobytes("VmRSS")
options = json.loads(sys.argv[2])
chunks = options.pop("chunks")
pipeline = engine.load(sys.argv[1], **options)
with pipeline.stream("a of") as stream:
    for _ in range(chunks):
        stream.next_chunk()
    stream.set_prompt("of a")
    stream.next_chunk()
plan = pipeline.plan
print(1024 * (kilobytes("VmHWM") - before), plan.peak("cpu"), plan.peak("cpu", mapped=False), plan.phase("cpu"))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    config = TransformerConfig(num_attention_heads=8, attention_head_dim=64, text_dim=512, ffn_dim=2048, num_layers=12)
    encoder = UMT5Config(20000, d_model=512, d_kv=64, d_ff=2048, num_layers=8, num_heads=8)
    made = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        folder = tmp_path_factory.mktemp("weights") / name
        made[name] = write(folder, config, VAEConfig(base_dim=16), encoder, dtype)
    return made


GREEDY, CAUSAL = {"chunks": 5, "preset": "greedy"}, {"chunks": 3, "preset": "self-forcing"}
TINY, SMALL = {"height": 64, "width": 96}, {"height": 96, "width": 160}
LARGE = {"height": 160, "width": 256}
CASES = {
    "greedy, fp32": ("fp32", GREEDY | SMALL | {"precision": "fp32"}),
    "greedy, int8": ("fp32", GREEDY | SMALL | {"precision": "int8"}),
    "greedy, bf16, released": ("bf16", GREEDY | LARGE | {"precision": "bf16", "text_encoder_device": "release"}),
    "greedy, bf16 of fp32": ("fp32", GREEDY | SMALL | {"precision": "bf16"}),
    "causal, fp32 of bf16, released": ("bf16", CAUSAL | TINY | {"precision": "fp32",
                                                                "text_encoder_device": "release"}),
    "causal, bf16, low memory": ("bf16", CAUSAL | SMALL | {"precision": "bf16", "low_memory": True}),
}  # fmt: skip
LONGEST = ("greedy, fp32", "greedy, int8", "greedy, bf16, released")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.thorough) if case in LONGEST else case for case in CASES]
)
def test_a_process_needs_what_was_planned(folders, case):
    stored, options = CASES[case]
    window = {"window": 6} if options["preset"] != "greedy" else {}
    options = options | {"overrides": {"steps": [[1000]]} | window}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folders[stored]), json.dumps(options)], capture_output=True, text=True,
        timeout=HANG, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak, planned, allocated, *_ = done.stdout.split()
    assert int(peak) > 200 << 20  # weights and activations, not libraries
    assert int(peak) == pytest.approx(int(planned), rel=0.1), done.stdout
    assert int(allocated) <= int(planned)


def on_gpu(folder, preset="greedy", free=1 << 40, size=(480, 832), encoder="kept", **options):
    parts = find_parts(folder, Given())
    runtime = Runtime(**options)
    return Case(parts, find_preset(preset), *size, torch.device("cuda"), runtime, 512, ("*.attn2.to_out.0",),
                encoder=encoder, free={"cuda": free, "cpu": 1 << 40})  # fmt: skip


def line(plan, what, device="cuda"):
    return sum(need.bytes for need in plan.needs if (need.what, need.device) == (what, device))


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """Directories in the sizes of Wan2.1, without data."""
    sizes = {"1.3B": TransformerConfig(), "14B": TransformerConfig(num_attention_heads=40, ffn_dim=13824,
                                                                   num_layers=40)}  # fmt: skip
    return {name: write(tmp_path_factory.mktemp("wan") / name, config, VAEConfig(), UMT5Config(), torch.bfloat16, True)
            for name, config in sizes.items()}  # fmt: skip


def test_streams_on_an_h100_took_what_the_plan_counts(wan):
    """What torch allocated while streams ran, without text encoder and CUDA's own share: bench/results."""
    measured = {}
    for file in sorted((Path(__file__).parents[2] / "bench" / "results").glob("gpu-check-nvidia-h100-*.jsonl")):
        lines = map(json.loads, file.read_text().splitlines())
        measured |= {line["variant"]: line["peak_mb"] for line in lines if line["kind"] == "speed"}
    ours = {"greedy bf16": {}, "self-forcing bf16": {}, "longlive bf16": {}, "diagonal bf16": {},
            "greedy eager": {"eager": True}}  # fmt: skip
    others = {"text encoder", "activations of a prompt", "libraries (estimate)", "trying convolutions (estimate)"}
    for variant, options in ours.items():
        plan = plan_memory(on_gpu(wan["1.3B"], variant.split()[0], precision="bf16", **options))
        peak = max(sum(n.bytes for n in plan.needs if n.device == "cuda" and phase in n.during and n.what not in others)
                   for phase in ("running a transformer", "decoding"))  # fmt: skip
        assert measured[variant] * 2**20 == pytest.approx(peak, rel=0.08), variant


# GB: what torch allocated from the first chunk on, and CUDA's own share, 1.3B at 832x480 with a text encoder of 4 MB.
@pytest.mark.parametrize(("options", "measured"), [
    ({"precision": "bf16"}, 15.43), ({"precision": "fp8"}, 13.27), ({"precision": "fp8", "fp8_attention": True}, 12.34),
    ({"precision": "bf16", "low_memory": True}, 13.37), ({"precision": "bf16", "eager": True}, 15.62),
])  # fmt: skip
def test_runs_on_an_h100_took_the_peak_of_the_plan(wan, options, measured):
    plan = plan_memory(on_gpu(wan["1.3B"], **options))
    text = line(plan, "text encoder") + line(plan, "activations of a prompt")
    peak = max(plan._sum(phase, "cuda", True) for phase in ("running a transformer", "decoding"))
    assert measured * 2**30 == pytest.approx(peak - text, rel=0.05)
    assert plan_memory(on_gpu(wan["1.3B"], free=plan.needed("cuda"), **options)).fits()  # the trials need not fit
    trials = line(plan, "trying convolutions (estimate)")
    assert (plan.needed("cuda") < plan.peak("cuda")) == (trials > 0)


@pytest.mark.parametrize("size", ["1.3B", "14B"])
def test_weights_are_those_that_diffusers_and_transformers_count(wan, size):
    plan = plan_memory(on_gpu(wan[size], precision="bf16"))
    shape = {} if size == "1.3B" else {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
    with torch.device("meta"):
        model, encoder = WanTransformer3DModel(**({"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30} |
                                                  shape)), UMT5EncoderModel(TheirConfig(
            d_model=4096, d_kv=64, d_ff=10240, num_heads=64, num_layers=24, vocab_size=256384,
            feed_forward_proj="gated-gelu"))  # fmt: skip
    count = sum(p.numel() for p in model.parameters())
    assert line(plan, "weights of etm") == pytest.approx(2 * count, rel=1e-3)
    assert line(plan, "weights of sdd") == pytest.approx(2 * (count + model.config.num_attention_heads**2 * 128**2),
                                                         rel=1e-3)  # fmt: skip
    assert line(plan, "text encoder") == 2 * sum(p.numel() for p in encoder.parameters())
    tokens, dim = 30 * 52, model.config.num_attention_heads * 128
    assert line(plan, "K/V caches") == 2 * 2 * model.config.num_layers * (4 + 3) * tokens * dim


def test_fp8_counts_its_own_weights_and_one_role_that_waits_in_full(wan):
    plain, small = (plan_memory(on_gpu(wan["1.3B"], precision=kind)) for kind in ("bf16", "fp8"))
    with torch.device("meta"):
        model = WanTransformer(TransformerConfig())
    model.fuse()
    saved = 0
    for block in model.blocks:  # e4m3 and a float32 scale for every output
        for layer in (*(getattr(block.attn1, f"to_{x}") for x in "qkv"), block.attn1.to_out[0], block.attn2.to_q,
                      block.ffn.net[0].proj, block.ffn.net[2]):  # fmt: skip
            saved += layer.weight.numel() - 4 * len(layer.weight)
    assert line(plain, "weights of etm") - line(small, "weights of etm") == saved
    assert line(small, "weights to quantise") == saved  # of one role, while the other is there in FP8


def test_quantising_lets_every_weight_go_at_once(monkeypatch):
    """So a role never needs more than its weights in bf16."""
    given = [transformer(0)]
    given[0].fuse()
    alive, most, before = weakref.WeakSet(), [], quantized.Fp8Linear.__init__

    def counted(self, weight, bias):
        before(self, weight, bias)
        alive.add(weight)
        most.append(len(alive))

    monkeypatch.setattr(quantized.Fp8Linear, "__init__", counted)
    quantised = quantized.quantized(given.pop(), "fp8", (), "sdd")
    assert len(most) == 6 * len(quantised.blocks)
    assert max(most) <= 2
    again = quantized.quantized(quantised, "fp8", (), "sdd")
    assert len(most) == 6 * len(quantised.blocks)
    assert all(a is b for a, b in zip(again.buffers(), quantised.buffers(), strict=True))


def test_a_prompts_activations_are_counted():
    config = UMT5Config(100, d_model=128, d_kv=16, d_ff=512, num_layers=2, num_heads=8)
    encoder = UMT5Encoder(config).eval().requires_grad_(False)
    ids, mask = torch.ones(1, 256, dtype=torch.int64), torch.ones(1, 256, dtype=torch.int64)
    with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as found:
        encoder(ids, mask)
    live = peak = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 0.7 * peak < umt5_activations(config, 256, torch.float32) < 1.4 * peak


def test_what_would_fit_is_named_and_fits(wan, monkeypatch):
    monkeypatch.setattr(engine.memory, "check_fp8", lambda device: None)
    free = plan_memory(on_gpu(wan["14B"], precision="bf16")).needed("cuda") - (5 << 30)
    kept = on_gpu(wan["14B"], precision="bf16", free=free)
    plan = plan_memory(kept)
    assert not plan.fits()
    with pytest.raises(
        MemoryError, match=r"memory: got \d+\.\d GB free on cuda, expected \d+\.\d .*fits with: --"
    ) as why:
        plan.check()
    assert "\n" not in str(why.value)
    assert plan.ways[0] == "--text-encoder-device cpu"
    assert plan_memory(replace(kept, encoder="cpu")).fits()


@pytest.mark.parametrize("gigabytes", [6, 8, 12, 24, 40])
def test_every_way_fits(wan, monkeypatch, gigabytes):
    monkeypatch.setattr(engine.memory, "check_fp8", lambda device: None)
    case = on_gpu(wan["1.3B"], "self-forcing", gigabytes << 30, precision="bf16")
    plan = plan_memory(case)
    assert plan.fits() == (not plan.ways)
    for way in plan.ways:
        args = engine.run.parser().parse_args([*PROMPT, *way.split()])
        job = engine.commands.job.Job.of(args)
        changed = replace(
            case, runtime=replace(job.runtime, precision=job.runtime.precision.replace("auto", "bf16")),
            preset=find_preset("self-forcing", job.overrides), height=job.model.height or 480,
            width=job.model.width or 832, encoder={"auto": "release" if job.runtime.low_memory else "kept"}.get(
                job.runtime.text_encoder_device, job.runtime.text_encoder_device),
        )  # fmt: skip
        assert plan_memory(changed).fits(), way
        assert changed.height % 16 == changed.width % 16 == 0
        assert changed.width / changed.height == pytest.approx(832 / 480, rel=0.25)


def test_a_window_or_a_size_is_offered_last(wan, monkeypatch):
    monkeypatch.setattr(engine.memory, "check_fp8", lambda device: None)
    need = plan_memory(on_gpu(wan["1.3B"], "self-forcing", encoder="release", low_memory=True, precision="fp8",
                              fp8_attention=True, text_encoder_device="release")).needed("cuda")  # fmt: skip
    plan = plan_memory(on_gpu(wan["1.3B"], "self-forcing", need - (200 << 20), precision="bf16"))
    assert re.fullmatch(r"--text-encoder-device release --precision fp8 --fp8-attention --low-memory --window \d+",
                        plan.ways[0])  # fmt: skip
    assert re.fullmatch(r".*--low-memory --height \d+ --width \d+", plan.ways[1])


def test_the_window_that_fits_is_found_at_once(wan, monkeypatch):
    """Of a million windows: the largest one that fits, on a GPU without FP8."""

    def no_fp8(device):
        raise ValueError("precision: got fp8 on a GPU of compute capability 8.6, expected 8.9 or more")

    monkeypatch.setattr(engine.memory, "check_fp8", no_fp8)
    case = on_gpu(wan["1.3B"], "self-forcing", 40 << 30, encoder="release", low_memory=True, precision="bf16")
    case = replace(case, preset=replace(case.preset, window=MOST))
    begun = time.perf_counter()
    words = next(way.split()[-1] for way in plan_memory(case).ways if "--window" in way)
    assert time.perf_counter() - begun < 10
    for window, fits in ((int(words), True), (int(words) + case.preset.chunk, False)):
        assert plan_memory(replace(case, preset=replace(case.preset, window=window))).fits() is fits


def test_a_plan_without_loading(model_dir, monkeypatch):
    monkeypatch.setattr("engine.loader.load_transformer", lambda *_: 1 / 0)
    plan = engine.plan_of(model_dir, height=32, width=48)
    assert plan.fits()
    assert plan.peak("cpu") > plan_bytes(model_dir)
    with pytest.raises(ValueError, match="height"):
        engine.plan_of(model_dir, height=33)


@pytest.mark.parametrize(("preset", "chunk"), [("greedy", 1), ("self-forcing", 3)])
def test_the_residual_of_reuse_is_counted(model_dir, preset, chunk):
    given = {"preset": preset, "device": "cpu"}
    plain = {need.what: need.bytes for need in engine.plan_of(model_dir, **given).needs}
    reused = {need.what: need.bytes for need in engine.plan_of(model_dir, **given, overrides={"reuse": "3:1:0"}).needs}
    pipeline = engine.load(model_dir, **given, overrides={"reuse": "3:1:0"})
    state = pipeline.stream("a red circle").state
    kept = [
        part.residual.nbytes
        for part in vars(state).values()
        if isinstance(part, RingCache) and part.residual is not None
    ]
    assert reused == plain | {"residual of skipped blocks": sum(kept)}
    assert kept == [4 * chunk * 6 * 32]
    with pytest.raises(ValueError, match=r"^reuse: got first 1 and last 1 of 2 layers, expected at least one between"):
        engine.plan_of(model_dir, **given, overrides={"reuse": "3"})


def plan_bytes(folder):
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def test_the_caches_of_local_heads_are_counted(model_dir):
    """What a stream's rings take, less than without: two of four heads keep 6 latent frames of 9."""
    overrides = {"window": 9, "attn_sink": 3}
    heads = {"window": 6, "attn_sink": 3, "layers": [[0, 1], []]}
    counted, held = [], []
    for table in ({}, {"heads": heads}):
        pipeline = engine.load(model_dir, preset="self-forcing", overrides=overrides | table)
        counted.append(next(need.bytes for need in pipeline.plan.needs if need.what == "K/V caches"))
        with pipeline.stream("a red circle") as stream:
            held.append(stream.state.cache.nbytes)
    assert counted == held
    assert held[1] * 12 == held[0] * 10


def test_the_command_line_prints_it(model_dir, capfd, monkeypatch):
    arguments = [*PROMPT, "--model", str(model_dir), "--out", "null"]
    assert engine.run.main([*arguments, "--frames", "1", "--json"]) == 0
    out, err = capfd.readouterr()
    assert err.count("memory plan (MB)") == 1
    plan = json.loads(out.splitlines()[-1])["memory_plan"]["cpu"]
    assert plan["peak"] == engine.plan_of(model_dir).peak("cpu")
    assert {"weights of etm", "text encoder", "K/V caches"} <= {need["what"] for need in plan["needs"]}
    assert engine.run.main([*arguments, "--frames", "1", "--quiet"]) == 0
    assert "memory plan" not in capfd.readouterr().err

    monkeypatch.setattr("engine.loader.load_transformer", lambda *_: 1 / 0)
    assert engine.run.main([*arguments, "--plan", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["memory_plan"]["cpu"] == plan | {"free": json.loads(out)["memory_plan"]["cpu"]["free"]}
    assert "peak" in err
    monkeypatch.setattr(engine.memory, "free_memory", lambda device: 1000)
    assert engine.run.main([*arguments, "--plan"]) == 1
    assert re.search(r"^error: memory: got 0\.00 GB free on cpu", capfd.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize("option", [["--low-memory"], ["--text-encoder-device", "release"]])
def test_a_bundle_fixes_them(tmp_path, capfd, option):
    assert engine.run.main([*PROMPT, "--bundle", str(tmp_path), *option]) == 2
    assert re.search(rf"got --(bundle|{option[0][2:]}) as well, expected", capfd.readouterr().err)


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_control_groups_count(tmp_path, version):
    """A container of 3 GB that uses 1 GB, of which half are pages of files, inside one of 8 GB."""
    mount = tmp_path / "memory" if version == 1 else tmp_path
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    stat = "total_inactive_file" if version == 1 else "inactive_file"
    for folder, limit in ((mount / "outer", 8 << 30), (mount / "outer" / "inner", 3 << 30)):
        folder.mkdir(parents=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{1 << 30}\n")
        (folder / "memory.stat").write_text(f"cache 5\n{stat} {1 << 29}\n")
    own = tmp_path / "cgroup"
    own.write_text("9:memory:/outer/inner\n8:pids:/\n" if version == 1 else "0::/outer/inner\n")
    assert min(devices._granted(tmp_path, own)) == (3 << 30) - (1 << 30) + (1 << 29)
    if version == 2:
        (tmp_path / "outer" / "inner" / "memory.max").write_text("max\n")
        assert devices._granted(tmp_path, own) == [(8 << 30) - (1 << 30) + (1 << 29)]


def test_a_failed_decoding_in_place_ends_the_stream(model_dir, monkeypatch):
    """With low_memory the VAE's cache is overwritten, so a chunk cannot be decoded a second time."""
    pipeline = engine.load(model_dir, low_memory=True)
    with pipeline.stream("red", seed=1) as stream:
        first = stream.next_chunk()
        monkeypatch.setattr(pipeline.stages.vae, "steady", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stream.next_chunk()
        with pytest.raises(ValueError, match="closed"):
            stream.next_chunk()
    assert np.isfinite(first).all()
