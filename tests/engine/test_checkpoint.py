"""Weights from every layout they are published in, merged adapters against PEFT, and files that must be refused."""

import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from diffusers import WanTransformer3DModel
from limits import HANG
from safetensors.torch import load_file, save_file
from tiny import CPU, TRANSFORMER, latents_of, reference_of, text_of, transformer

import engine
from engine.config import TransformerConfig
from engine.model.layers import dense_attention
from engine.model.rope import rope_tables
from engine.weights.adapters import base_hash, merge_adapter
from engine.weights.checkpoint import load_transformer
from engine.weights.sources import open_source

ROOT = Path(__file__).parents[2]
CONFIG = TransformerConfig(**TRANSFORMER)
# Wan's own names, as public checkpoints spell them, written down here a second time.
TO_WAN = [
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    (".attn1.to_q", ".self_attn.q"),
    (".attn1.to_k", ".self_attn.k"),
    (".attn1.to_v", ".self_attn.v"),
    (".attn1.to_out.0", ".self_attn.o"),
    (".attn1.", ".self_attn."),
    (".attn2.to_q", ".cross_attn.q"),
    (".attn2.to_k", ".cross_attn.k"),
    (".attn2.to_v", ".cross_attn.v"),
    (".attn2.to_out.0", ".cross_attn.o"),
    (".attn2.", ".cross_attn."),
    (".ffn.net.0.proj", ".ffn.0"),
    (".ffn.net.2", ".ffn.2"),
    (".norm2.", ".norm3."),
    ("proj_out.", "head.head."),
]


def wan_name(name):
    if name == "scale_shift_table":
        return "head.modulation"
    if name.endswith(".scale_shift_table"):
        return name.replace("scale_shift_table", "modulation")
    for ours, theirs in TO_WAN:
        if ours in name:
            return name.replace(ours, theirs)
    return name


@pytest.fixture(scope="module")
def state():
    return {name: tensor.clone() for name, tensor in transformer(0).state_dict().items()}


@pytest.fixture(scope="module")
def wan(state):
    names = {name: wan_name(name) for name in state}
    assert len(set(names.values())) == len(state)
    return {names[name]: tensor for name, tensor in state.items()}


def same(model, state):
    got = model.state_dict()
    assert got.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(got[name], tensor), name


def loaded(path, which=None, dtype=torch.float32):
    return load_transformer(CONFIG, open_source(path, which), dtype, CPU)


def other(state):
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


@pytest.mark.parametrize("shard", [None, "8KB"])
def test_diffusers_directory(tmp_path, state, shard):
    reference = reference_of(transformer(0))
    reference.save_pretrained(tmp_path, **({"max_shard_size": shard} if shard else {}))
    assert len(list(tmp_path.glob("*.safetensors"))) > 3 if shard else True
    same(loaded(tmp_path), state)


def test_index_decides_which_files_count(tmp_path, state):
    reference_of(transformer(0)).save_pretrained(tmp_path, max_shard_size="8KB")
    save_file(other(state), tmp_path / "left-over.safetensors")
    same(loaded(tmp_path), state)
    next(tmp_path.glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=r"got no .*00002.*, expected the weights"):
        open_source(tmp_path)


@pytest.mark.parametrize("prefix", ["", "model.", "model._fsdp_wrapped_module.", "_fsdp_wrapped_module.model."])
@pytest.mark.slow
def test_self_forcing_file(tmp_path, state, wan, prefix):
    tensors = {prefix + name: tensor for name, tensor in wan.items()}
    zero = other(tensors)
    for content, which in (
        ({"generator": zero, "critic": zero, "generator_ema": tensors}, None),
        ({"generator": tensors, "critic": zero, "generator_ema": zero}, "generator"),
        ({"generator": tensors, "critic": zero}, None),
        (tensors, None),
    ):
        torch.save(content, tmp_path / "checkpoint.pt")
        same(loaded(tmp_path / "checkpoint.pt", which), state)


def test_wrapped_blocks(tmp_path, state, wan):
    """FSDP and activation checkpointing leave their names inside the path too."""
    wrapped = {
        f"model._fsdp_wrapped_module.{name}".replace(".self_attn.", "._checkpoint_wrapped_module.self_attn.", 1): tensor
        for name, tensor in wan.items()
    }
    torch.save({"generator": wrapped}, tmp_path / "checkpoint.pt")
    same(loaded(tmp_path / "checkpoint.pt"), state)


def test_flat_safetensors(tmp_path, state, wan):
    tensors = {f"model.{name}": tensor for name, tensor in wan.items()} | {"model.freqs": torch.zeros(1024, 8)}
    save_file(tensors, tmp_path / "krea.safetensors")
    same(loaded(tmp_path / "krea.safetensors"), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_arrive_in_the_dtype_asked_for(tmp_path, state, dtype):
    save_file(state, tmp_path / "weights.safetensors")
    same(loaded(tmp_path / "weights.safetensors", dtype=dtype), {k: t.to(dtype) for k, t in state.items()})


def changed(wan, how):
    tensors = dict(wan)
    if how == "missing":
        del tensors["blocks.1.cross_attn.norm_k.weight"]
    elif how == "extra":
        tensors["blocks.2.self_attn.q.weight"] = torch.zeros(1)
    elif how == "misshapen":
        tensors["head.head.bias"] = torch.zeros(31)
    return tensors


NAMES = {
    "missing": "blocks.1.attn2.norm_k.weight",
    "extra": "blocks.2.attn1.to_q.weight",
    "misshapen": r"proj_out.bias \[31\] instead of \[32\]",
}


@pytest.mark.parametrize("how", NAMES)
@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pt"])
def test_tensors_that_do_not_fit_are_named(tmp_path, wan, how, file):
    tensors = changed(wan, how)
    if file.endswith(".pt"):
        torch.save({"generator": tensors}, tmp_path / file)
    else:
        save_file(tensors, tmp_path / file)
    with pytest.raises(ValueError, match=f"{how} {NAMES[how]}") as raised:
        loaded(tmp_path / file)
    message = str(raised.value)
    assert file in message
    assert "got" in message
    assert "expected" in message
    assert "\n" not in message


def test_all_that_is_wrong_is_said_at_once_and_briefly(tmp_path, wan):
    tensors = {k: t for k, t in wan.items() if ".ffn." not in k} | {"head.head.bias": torch.zeros(3)}
    save_file(tensors | {f"extra.{i}": torch.zeros(1) for i in range(50)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"missing .* and 5 more; extra .* and 47 more; misshapen") as raised:
        loaded(tmp_path / "weights.safetensors")
    assert len(str(raised.value)) < 800


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("pwned"),)


def broken(folder, how, wan):
    """A checkpoint file that cannot be read."""
    if how == "truncated safetensors":
        save_file(wan, folder / "w.safetensors")
        data = (folder / "w.safetensors").read_bytes()
        (folder / "w.safetensors").write_bytes(data[: len(data) // 2])
        return folder / "w.safetensors"
    if how == "no safetensors":
        (folder / "w.safetensors").write_bytes(b"<html>404</html>" * 100)
        return folder / "w.safetensors"
    file = folder / "w.pt"
    if how == "truncated":
        buffer = io.BytesIO()
        torch.save({"generator": wan}, buffer)
        file.write_bytes(buffer.getvalue()[:-2000])
    elif how == "text":
        file.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif how == "empty":
        file.touch()
    elif how == "code":
        torch.save({"generator": {"model.x": Payload()}}, file)
    elif how == "plain pickle with code":
        file.write_bytes(pickle.dumps(Payload()))
    elif how == "list":
        torch.save([torch.zeros(1)], file)
    elif how == "no tensors":
        torch.save({"generator": {"step": 3}}, file)
    elif how == "no state":
        torch.save({"optimizer": {"x": torch.zeros(1)}, "step": 3}, file)
    elif how == "suffix":
        file = folder / "w.bin"
        file.touch()
    elif how == "missing":
        return folder / "nowhere.pt"
    elif how == "empty directory":
        return folder
    return file


BROKEN = ["truncated safetensors", "no safetensors", "truncated", "text", "empty", "code", "plain pickle with code"]
BROKEN += ["list", "no tensors", "no state", "suffix", "missing", "empty directory"]


@pytest.mark.parametrize("how", BROKEN)
def test_files_that_cannot_be_read(tmp_path, wan, how, monkeypatch):
    path = broken(tmp_path, how, wan)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=r"got .*expected") as raised:
        loaded(path)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "pwned").exists()


def test_a_state_that_is_not_there(tmp_path, wan):
    torch.save({"generator": wan}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"got states generator, expected 'generator_ema' among them"):
        loaded(tmp_path / "w.pt", "generator_ema")


LINEARS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


def adapter(folder, rank=4, alpha=8, targets=LINEARS, seed=0, **options):
    """A PEFT adapter, trained a little on diffusers' transformer; and that transformer."""
    options = {"r": rank, "lora_alpha": alpha, "target_modules": targets} | options
    wrapped = peft.get_peft_model(reference_of(transformer(0)), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.2
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def ours_and_theirs(model, reference):
    latent, text, t = latents_of(1, 2), text_of(), torch.tensor([500.0])
    with torch.no_grad():
        ours = model(latent, t, model.prepare_text(text), *rope_tables(range(2), 2, 3, 16), dense_attention())
        theirs = reference(latent, t, text, return_dict=False)[0]
    return ours, theirs


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("targets", [LINEARS, ["to_v", "ffn.net.2"]], ids=len)
def test_peft_adapter_equals_pefts_own_forward(tmp_path, targets, fused):
    reference = adapter(tmp_path, targets=targets)
    model = transformer(0)
    before, _ = ours_and_theirs(model, reference)
    merge_adapter(model, tmp_path, [])
    assert not any("lora" in name for name, _ in model.named_modules())
    assert model.state_dict().keys() == transformer(0).state_dict().keys()
    assert not any(p.requires_grad for p in model.parameters())
    if fused:
        model.fuse()
    ours, theirs = ours_and_theirs(model, reference)
    assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()
    assert (ours - before).abs().max() > 1e-2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "r": 3},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
        {"target_modules": ["blocks.1.attn2.to_k"]},
        {"target_modules": r"blocks\.0\.attn1\.to_[qk]"},
        {"rank_pattern": {"to_q": 2}},
        {"rank_pattern": {"ffn.net.2": 2, "to_q": 3}, "alpha_pattern": {"to_q": 32}, "use_rslora": True},
        {"alpha_pattern": {"to_q": 32}},
        {"layers_to_transform": [1], "layers_pattern": "blocks"},
        {"exclude_modules": ["to_k"]},
        {"use_dora": True},
        {"lora_bias": True},
        {"target_modules": ["to_v", "proj_out", "patch_embedding"]},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.filterwarnings("ignore")
def test_merged_weights_have_pefts_bits(tmp_path, options):
    adapter(tmp_path / "lora", **{"targets": ["to_q", "to_k", "ffn.net.2"]} | options)
    reference_of(transformer(0)).save_pretrained(tmp_path / "base")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        base = loaded(tmp_path / "base", dtype=dtype)
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "lora", low_cpu_mem_usage=True)
        expected = theirs.merge_and_unload(safe_merge=True).state_dict()
        model = loaded(tmp_path / "base", dtype=dtype)
        merge_adapter(model, tmp_path / "lora", [])
        same(model, expected)
        assert any(not torch.equal(expected[name], tensor) for name, tensor in before.items())


def test_merged_weights_that_are_not_finite_are_refused(tmp_path):
    adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.blocks.1.attn1.to_q.lora_B.weight"][0, 0] = torch.inf
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"got weights of blocks\.1\.attn1\.to_q that are not finite"):
        merge_adapter(transformer(0), tmp_path, [])


def test_peft_adapters_add_up(tmp_path):
    first, second = adapter(tmp_path / "a", seed=1), adapter(tmp_path / "b", seed=2, rank=2)
    model, base = transformer(0), transformer(0).state_dict()
    merge_adapter(model, tmp_path / "a", [])
    merge_adapter(model, tmp_path / "b", [])
    name = "blocks.1.ffn.net.2.weight"
    deltas = [
        wrapped.get_submodule("base_model.model.blocks.1.ffn.net.2").get_delta_weight("default")
        for wrapped in (first, second)
    ]
    assert (model.state_dict()[name] - base[name] - sum(deltas)).abs().max() < 1e-5


def test_mapped_base_files_are_not_written(tmp_path):
    """Weights stay mapped to their file; merging must not reach through."""
    reference = reference_of(transformer(0))
    reference.save_pretrained(tmp_path / "base")
    adapter(tmp_path / "lora")
    files = sorted((tmp_path / "base").glob("*.safetensors"))
    before = base_hash(files)
    model = loaded(tmp_path / "base")
    merge_adapter(model, tmp_path / "lora", files)
    model.fuse()
    assert base_hash(files) == before
    same(loaded(tmp_path / "base"), transformer(0).state_dict())


def test_condition_weights_belong_to_the_sdd(tmp_path):
    adapter(tmp_path)
    weight = torch.randn(32, 32)
    save_file({"condition_proj.weight": weight}, tmp_path / "condition.safetensors")
    model = transformer(0, conditioned=True)
    merge_adapter(model, tmp_path, [])
    assert torch.equal(model.condition_proj.weight, weight)
    with pytest.raises(ValueError, match=r"got condition weights, expected none"):
        merge_adapter(transformer(0), tmp_path, [])
    save_file({"condition_proj.weight": weight[:3].clone()}, tmp_path / "condition.safetensors")
    with pytest.raises(ValueError, match=r"misshapen condition_proj.weight \[3, 32\] instead of \[32, 32\]"):
        merge_adapter(transformer(0, conditioned=True), tmp_path, [])


def test_an_adapter_knows_its_base(tmp_path):
    reference_of(transformer(0)).save_pretrained(tmp_path / "base")
    adapter(tmp_path / "lora")
    files = sorted((tmp_path / "base").glob("*.safetensors"))
    (tmp_path / "lora" / "base.json").write_text(json.dumps({"base_sha256": base_hash(files)}))
    merge_adapter(transformer(0), tmp_path / "lora", files)
    state = load_file(files[0])
    state["proj_out.bias"][0] += 1e-3
    files[0].unlink()
    save_file(state, files[0])
    with pytest.raises(ValueError, match=r"got a base with sha256 [0-9a-f]{12}, expected [0-9a-f]{12}"):
        merge_adapter(transformer(0), tmp_path / "lora", files)


def test_base_hash_is_sha256_of_the_files_in_order(tmp_path):
    import hashlib

    (tmp_path / "b").write_bytes(b"second")
    (tmp_path / "a").write_bytes(b"first")
    assert base_hash([tmp_path / "b", tmp_path / "a"]) == hashlib.sha256(b"firstsecond").hexdigest()


def spoil(folder, how):
    if how == "no config":
        (folder / "adapter_config.json").unlink()
    elif how == "no weights":
        (folder / "adapter_model.safetensors").unlink()
    elif how == "truncated":
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:500])
    else:
        tensors = load_file(folder / "adapter_model.safetensors")
        name = next(name for name in tensors if "blocks.1.attn1.to_q.lora_B" in name)
        tensor = tensors.pop(name)
        if how == "misshapen":
            tensors[name] = tensor[:-1].clone()
        elif how == "extra":
            tensors[name] = tensor
            tensors[name.replace("blocks.1", "blocks.7")] = tensor.clone()
        save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("how", ["no config", "no weights", "truncated", "missing", "misshapen", "extra"])
@pytest.mark.filterwarnings("ignore")
def test_adapters_that_do_not_fit_are_refused(tmp_path, how):
    adapter(tmp_path)
    spoil(tmp_path, how)
    with pytest.raises((ValueError, FileNotFoundError), match=r"got .*expected") as raised:
        merge_adapter(transformer(0), tmp_path, [])
    assert "\n" not in str(raised.value)


def longlive(path, seed=5, rank=3, spell="{}.lora_{}.weight", base=None):
    """A checkpoint with generator_lora, and the weights it stands for: W + B A."""
    generator = torch.Generator().manual_seed(seed)
    tensors, merged = {}, {k: t.clone() for k, t in transformer(0).state_dict().items()}
    for name, module in transformer(0).named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("blocks."):
            a = torch.randn(rank, module.in_features, generator=generator)
            b = torch.randn(module.out_features, rank, generator=generator) * 0.1
            merged[f"{name}.weight"] += b @ a
            stem = wan_name(f"{name}.weight").removesuffix(".weight")
            tensors[spell.format(stem, "A")], tensors[spell.format(stem, "B")] = a, b
    content = {"generator_lora": tensors}
    if base is not None:
        content["generator"] = base
    torch.save(content, path)
    return merged, tensors


def near(model, merged):
    got = model.state_dict()
    assert got.keys() == merged.keys()
    for name, tensor in merged.items():
        assert (got[name] - tensor).abs().max() < 1e-5, name


@pytest.mark.parametrize(
    "spell",
    ["{}.lora_{}.weight", "base_model.model.{}.lora_{}.weight", "base_model.model.model.{}.lora_{}.default.weight"],
)
def test_longlive_lora_is_w_plus_ba(tmp_path, spell):
    merged, tensors = longlive(tmp_path / "lora.pt", spell=spell)
    assert len(tensors) == 2 * 2 * 10
    model = transformer(0)
    merge_adapter(model, tmp_path / "lora.pt", [])
    near(model, merged)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.slow
def test_longlive_checkpoint_with_base_and_lora(tmp_path, model_dir, wan):
    merged, _ = longlive(tmp_path / "both.pt", base={f"model.{k}": t for k, t in wan.items()})
    pipeline = engine.load(model_dir, preset="longlive", checkpoint=tmp_path / "both.pt")
    near(pipeline.stages.models["dit"], merged)
    torch.save({"generator": wan}, tmp_path / "base.pt")
    longlive(tmp_path / "lora.pt")
    pipeline = engine.load(
        model_dir, preset="longlive", checkpoint=tmp_path / "base.pt", adapters=[tmp_path / "lora.pt"]
    )
    near(pipeline.stages.models["dit"], merged)


@pytest.mark.parametrize("how", ["unknown layer", "half", "misshapen", "empty", "no lora"])
def test_longlive_files_that_do_not_fit_are_refused(tmp_path, how):
    _, tensors = longlive(tmp_path / "lora.pt")
    name = "blocks.1.ffn.0.lora_B.weight"
    if how == "unknown layer":
        tensors["blocks.9.ffn.0.lora_A.weight"] = torch.zeros(3, 32)
    elif how == "half":
        del tensors["blocks.1.ffn.0.lora_A.weight"]
    elif how == "misshapen":
        tensors[name] = tensors[name][:-1]
    elif how == "empty":
        tensors = {}
    torch.save({"generator_lora": tensors} if how != "no lora" else {"critic": tensors}, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=r"got .*expected") as raised:
        merge_adapter(transformer(0), tmp_path / "lora.pt", [])
    assert "\n" not in str(raised.value)


def copied(model_dir, tmp_path):
    """The pipeline directory with the transformer that the adapters here are made for."""
    folder = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    reference_of(transformer(0)).save_pretrained(folder / "transformer")
    return folder


@pytest.mark.slow
def test_adapters_of_a_model_reach_their_roles(model_dir, tmp_path):
    folder = copied(model_dir, tmp_path)
    wrapped = {role: adapter(folder / "adapters" / role, seed=seed) for seed, role in enumerate(("etm", "sdd"))}
    weight = torch.randn(32, 32)
    save_file({"condition_proj.weight": weight}, folder / "adapters" / "sdd" / "condition.safetensors")
    pipeline = engine.load(folder)
    for role, reference in wrapped.items():
        model = pipeline.stages.models[role]
        ours, theirs = ours_and_theirs(model, reference)
        assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()
    assert torch.equal(pipeline.stages.models["sdd"].condition_proj.weight, weight)
    assert pipeline.stages.models["etm"].condition_proj is None
    causal = engine.load(folder, preset="self-forcing")
    same(causal.stages.models["dit"], transformer(0).state_dict())


def test_memory_is_checked_before_weights_are_read(model_dir, monkeypatch):
    import engine.loader
    import engine.memory

    def never(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(engine.memory, "free_memory", lambda device: 1000)
    monkeypatch.setattr(engine.loader, "load_transformer", never)
    with pytest.raises(MemoryError, match=r"memory: got .*expected"):
        engine.load(model_dir)


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from engine.weights.checkpoint import load_transformer
from engine.weights.sources import open_source
from engine.config import TransformerConfig

config = TransformerConfig(num_layers=2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_transformer(config, open_source(Path(sys.argv[1])), torch.bfloat16, torch.device("cpu"))
model.fuse()
weights = sum(p.numel() * p.element_size() for p in model.parameters())
for p in model.parameters():
    p.sum()  # a page that nobody touched would not count
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((peak - before) * 1024 / weights, weights, {p.dtype for p in model.parameters()} == {torch.bfloat16})
"""


@pytest.mark.parametrize(
    "stored", [pytest.param(torch.float32, marks=pytest.mark.thorough), torch.bfloat16], ids=["fp32", "bf16"]
)
@pytest.mark.slow
def test_full_width_loads_within_its_memory(tmp_path, stored):
    """Wan2.1-T2V-1.3B's width (two layers), built on the meta device, in diffusers' sharded layout."""
    with torch.device("meta"):
        model = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=2)
    state = {name: torch.full(p.shape, 0.02, dtype=stored) for name, p in model.state_dict().items()}
    assert sum(t.numel() for t in state.values()) > 110e6
    names = list(state)
    half = len(names) // 2
    where = {}
    for i, group in enumerate((names[:half], names[half:]), start=1):
        file = f"diffusion_pytorch_model-{i:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in group}, tmp_path / file)
        where |= dict.fromkeys(group, file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    del state
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=HANG,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ratio, weights, right = done.stdout.split()
    assert right == "True"
    assert int(weights) == sum(p.numel() for p in model.parameters()) * 2
    assert float(ratio) <= 1.3


def test_weights_that_are_there_twice(model_dir, tmp_path):
    """Without an index the standard name goes first, as diffusers reads it, and a note names what is not used."""
    folder = tmp_path / "transformer"
    shutil.copytree(model_dir / "transformer", folder)
    file = next(folder.glob("*.safetensors"))
    shutil.copy(file, folder / "diffusion_pytorch_model.fp16.safetensors")
    assert open_source(folder).files == [file]
    shutil.copy(file, folder / "second.safetensors")
    source = open_source(folder)
    assert source.files == [file]
    assert any("not used: second.safetensors" in note for note in source.notes)
    file.rename(folder / "first.safetensors")
    (folder / "diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(ValueError, match=r"several files with a transformer \(first.safetensors, second.safetensors"):
        open_source(folder)
