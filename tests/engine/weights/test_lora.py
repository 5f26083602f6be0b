"""LoRA files in every spelling against diffusers' own loading and fusing; and files that must be refused."""

import json
import shutil

import peft
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from safetensors.torch import load_file, save_file
from tiny import TRANSFORMER, reference_of, transformer

from engine.config import TransformerConfig
from engine.weights.adapters import Adapter, describe, merge_adapter, read_adapters
from engine.weights.lora.form import read_lora
from engine.weights.lora.merge import merge_into

CONFIG = TransformerConfig(**TRANSFORMER)
RANK, ALPHA = 4, 6.0
# Wan's own names of the linears of a block beside diffusers', written down here a second time.
BLOCK = {
    "self_attn.q": "attn1.to_q", "self_attn.k": "attn1.to_k", "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0", "cross_attn.q": "attn2.to_q", "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v", "cross_attn.o": "attn2.to_out.0", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
}  # fmt: skip
TOP = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
}
IN_BLOCKS = {f"blocks.{i}.{wan}": f"blocks.{i}.{ours}" for i in range(2) for wan, ours in BLOCK.items()}
ALL = IN_BLOCKS | TOP


def matrices(names=ALL, rank=RANK, seed=0):
    """A and B by Wan's name; the rank may be a function of the number of the module."""
    model, generator = transformer(0), torch.Generator().manual_seed(seed)
    made = {}
    for number, (wan, ours) in enumerate(names.items()):
        layer = model.get_submodule(ours)
        r = rank(number) if callable(rank) else rank
        a = torch.randn(r, layer.in_features, generator=generator) * 0.3
        b = torch.randn(layer.out_features, r, generator=generator) * 0.3
        made[wan] = a, b
    return made


def spelled(made, prefix="", names="wan", pair=("lora_A", "lora_B"), infix="", alpha=None, leaf=".weight"):
    """The tensors of a file."""
    tensors = {}
    for wan, (a, b) in made.items():
        name = ALL[wan] if "diffusers" in names else wan
        name = prefix + (name.replace(".", "_") if "underscored" in names else name)
        tensors[f"{name}.{pair[0]}{infix}{leaf}"], tensors[f"{name}.{pair[1]}{infix}{leaf}"] = a.clone(), b.clone()
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def diffusers_weights(tensors, strength=1.0, path=None, base=None):
    """The weights after diffusers has loaded and fused the file or its tensors."""
    model = reference_of(base or transformer(0))
    source = str(path) if path else {key: tensor.clone() for key, tensor in tensors.items()}
    state, metadata = WanLoraLoaderMixin.lora_state_dict(source, return_lora_metadata=True)
    WanLoraLoaderMixin.load_lora_into_transformer(state, model, metadata=metadata)
    model.fuse_lora(lora_scale=strength)
    merged = model.state_dict()
    return {key.replace(".base_layer", ""): tensor for key, tensor in merged.items() if ".lora_" not in key}


def merged(path, strength=1.0, base=None):
    model = base or transformer(0)
    merge_into(model, [(read_lora(path), strength)])
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def near(got, expected, least=1e-2):
    """Equal to 1e-5, and far from where the merge began."""
    base = transformer(0).state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name] - tensor).abs().max() <= 1e-5, name
    assert max(float((got[name] - base[name]).abs().max()) for name in got) > least


SPELLINGS = {
    "diffusers": {"prefix": "transformer.", "names": "diffusers"},
    "diffusers default": {"prefix": "transformer.", "names": "diffusers", "infix": ".default"},
    "comfy": {"prefix": "diffusion_model."},
    "comfy down up": {"prefix": "diffusion_model.", "pair": ("lora_down", "lora_up")},
    "comfy model": {"prefix": "model.diffusion_model.", "pair": ("lora_down", "lora_up")},
    "comfy, diffusers' names": {"prefix": "diffusion_model.", "names": "diffusers"},
    "bare": {},
    "bare diffusers": {"names": "diffusers"},
    "bare default": {"infix": ".default"},
    "bare another name": {"infix": ".student"},
    "dots": {"pair": ("lora.down", "lora.up")},
    "pipe.dit": {"prefix": "pipe.dit.", "infix": ".default"},
    "peft": {"prefix": "base_model.model."},
    "peft nested": {"prefix": "base_model.model.model.", "infix": ".default"},
    "peft, diffusers' names": {"prefix": "base_model.model.", "names": "diffusers"},
    "fsdp": {"prefix": "model._fsdp_wrapped_module."},
    "no leaf": {"leaf": ""},
    "kohya": {"prefix": "lora_unet_", "names": "underscored", "pair": ("lora_down", "lora_up")},
    "kohya twice": {"prefix": "lora_unet__", "names": "underscored", "pair": ("lora_down", "lora_up")},
    "kohya, diffusers' names": {
        "prefix": "lora_unet_", "names": "underscored diffusers", "pair": ("lora_down", "lora_up")
    },
    "lycoris": {"prefix": "lycoris_", "names": "underscored", "pair": ("lora_down", "lora_up")},
    "lycoris, diffusers' names": {"prefix": "lycoris_", "names": "underscored diffusers",
                                  "pair": ("lora_down", "lora_up")},
}  # fmt: skip
READ_BY_DIFFUSERS = ("diffusers", "comfy", "comfy down up")


@pytest.mark.parametrize("strength", [1.0, 0.8, -0.5])
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_equals_diffusers(tmp_path, name, strength):
    made = matrices()
    tensors = spelled(made, **SPELLINGS[name])
    save_file(tensors, tmp_path / "lora.safetensors")
    own = name if name in READ_BY_DIFFUSERS else "diffusers"
    expected = diffusers_weights(spelled(made, **SPELLINGS[own]), strength)
    near(merged(tmp_path / "lora.safetensors", strength), expected)


@pytest.mark.parametrize("name", [name for name in SPELLINGS if "another" not in name])
def test_alpha_scales_by_alpha_over_rank(tmp_path, name):
    """diffusers reads alpha in Wan's names; in the linears of blocks alone."""
    made = matrices(IN_BLOCKS, rank=lambda number: 2 + number % 3)
    save_file(spelled(made, alpha=ALPHA, **SPELLINGS[name]), tmp_path / "lora.safetensors")
    expected = diffusers_weights(spelled(made, alpha=ALPHA, **SPELLINGS["comfy down up"]), 0.7)
    near(merged(tmp_path / "lora.safetensors", 0.7), expected)


def test_musubi_equals_diffusers(tmp_path):
    tensors = spelled(matrices(IN_BLOCKS), alpha=ALPHA, **SPELLINGS["kohya"])
    save_file(tensors, tmp_path / "lora.safetensors")
    near(merged(tmp_path / "lora.safetensors", 0.7), diffusers_weights(tensors, 0.7))


def saved(tensors, file, kind):
    if kind == "flat":
        torch.save(tensors, file)
    elif kind == "legacy":
        torch.save(tensors, file, _use_new_zipfile_serialization=False)
    elif kind == "safetensors":
        save_file(tensors, file)
    else:
        torch.save({kind: tensors, "critic_lora": {}, "step": torch.tensor(3)}, file)


CONTAINERS = ["flat", "legacy", "safetensors", "generator_lora", "state_dict", "lora", "model", "module"]


@pytest.mark.parametrize("suffix", [".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt", ""])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_contents_decide_and_not_the_file_name(tmp_path, kind, suffix):
    made = matrices()
    saved(spelled(made), tmp_path / f"lora{suffix}", kind)
    expected = diffusers_weights(spelled(made, **SPELLINGS["diffusers"]))
    near(merged(tmp_path / f"lora{suffix}"), expected)


def nested(tensors, *names):
    for name in reversed(names):
        tensors = {name: tensors}
    return tensors


def by_module(tensors):
    """A dictionary for every module, and in it one for every part."""
    made = {}
    for name, tensor in tensors.items():
        module, part, leaf = name.rsplit(".", 2)
        made.setdefault(module, {}).setdefault(part, {})[leaf] = tensor
    return made


STATES = {
    "one": lambda t: nested(t, "generator_lora"), "two": lambda t: nested(t, "model", "generator_lora"),
    "state_dict lora": lambda t: nested(t, "state_dict", "lora"),
    "module model": lambda t: nested(t, "module", "model"),
    "three": lambda t: nested(t, "checkpoint", "state_dict", "generator_lora"),
    "any name": lambda t: nested(t, "run_7", "student"), "generator": lambda t: nested(t, "generator"),
    "a dictionary per module": by_module, "per module in two": lambda t: nested(by_module(t), "model", "lora"),
    "beside others": lambda t: {"model": {"generator_lora": t, "critic_lora": spelled(matrices(seed=9)), "step": 3},
                                "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "beside the base": lambda t: {"state_dict": {"generator": transformer(3).state_dict(), "generator_lora": t}},
    "beside the moving average": lambda t: {"generator_lora": t, "generator_lora_ema": spelled(matrices(seed=9))},
    "empty ones": lambda t: {"model": {"generator_lora": {}, "lora": t}, "lora": {}},
}  # fmt: skip


def flattened(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value.clone()


@pytest.mark.parametrize("spelling", ["comfy", "bare", "peft", "diffusers", "kohya"])
@pytest.mark.parametrize("container", ["pt", "safetensors"])
@pytest.mark.parametrize("states", STATES)
def test_states_at_any_depth(tmp_path, states, container, spelling):
    """As deep as a checkpoint of whole weights may have them; safetensors have the states in their names."""
    tensors = spelled(matrices(), **SPELLINGS[spelling])
    save_file(tensors, tmp_path / "flat.safetensors")
    content = STATES[states](tensors)
    file = tmp_path / f"lora.{container}"
    torch.save(content, file) if container == "pt" else save_file(dict(flattened(content)), file)
    expected, found = merged(tmp_path / "flat.safetensors"), merged(file)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    if spelling in READ_BY_DIFFUSERS:
        near(found, diffusers_weights(tensors))
    several = states in ("beside others", "beside the moving average")
    assert any("took" in note and "generator_lora" in note for note in read_lora(file).notes) == several


def test_states_of_which_none_is_known(tmp_path):
    tensors = spelled(matrices())
    for content, said in (
        ({"one": tensors, "two": tensors}, "got LoRA in one, two, expected it in one of generator_lora"),
        ({"critic_lora": tensors}, "got LoRA in critic_lora, expected"),
        ({"lora": tensors | {"surplus.lora_A.weight": torch.ones(2, 2)}}, "surplus"),
        ({"model": {"lora": tensors | {"blocks.0.surplus": torch.ones(2, 2)}}}, "surplus"),
    ):
        torch.save(content, tmp_path / "lora.pt")
        with pytest.raises(ValueError, match=said):
            merged(tmp_path / "lora.pt")


def test_what_training_leaves_in_a_file_is_no_weight(tmp_path):
    made = matrices()
    expected = diffusers_weights(spelled(made, **SPELLINGS["diffusers"]))
    torch.save(spelled(made) | {"global_step": 100, "config": {"rank": 4}, "note": "mine"}, tmp_path / "flat.pt")
    torch.save({"generator_lora": {}, "lora": spelled(made)}, tmp_path / "empty.pt")
    for name in ("flat.pt", "empty.pt"):
        near(merged(tmp_path / name), expected)


def test_alpha_may_be_a_plain_number(tmp_path):
    made = matrices(IN_BLOCKS)
    tensors = spelled(made) | {f"{wan}.alpha": 6 for wan in IN_BLOCKS}
    torch.save(tensors, tmp_path / "lora.pt")
    near(merged(tmp_path / "lora.pt"), diffusers_weights(spelled(made, alpha=ALPHA, **SPELLINGS["comfy"])))


def test_biases_equal_diffusers(tmp_path):
    """X.diff_b of the modules in which diffusers reads it."""
    tensors = spelled(matrices(), **SPELLINGS["comfy"])
    generator = torch.Generator().manual_seed(5)
    for wan, ours in ALL.items():
        bias = transformer(0).get_submodule(ours).bias
        tensors[f"diffusion_model.{wan}.diff_b"] = torch.randn(bias.shape, generator=generator)
    save_file(tensors, tmp_path / "lora.safetensors")
    expected = diffusers_weights(tensors, 0.6)
    near(merged(tmp_path / "lora.safetensors", 0.6), expected, least=0.5)


def test_the_heads_difference_equals_diffusers(tmp_path):
    """LightX2V's files have head.head.diff with its bias, beside products in the blocks."""
    tensors = spelled(matrices(IN_BLOCKS), **SPELLINGS["comfy"])
    tensors["diffusion_model.head.head.diff"] = torch.randn(32, 32)
    tensors["diffusion_model.head.head.diff_b"] = torch.randn(32)
    save_file(tensors, tmp_path / "lora.safetensors")
    near(merged(tmp_path / "lora.safetensors", 0.6), diffusers_weights(tensors, 0.6), least=0.5)


DIFFERENCES = {
    "blocks.1.self_attn.norm_q.diff": "blocks.1.attn1.norm_q.weight",
    "blocks.0.self_attn.norm_k.diff": "blocks.0.attn1.norm_k.weight",
    "blocks.1.cross_attn.norm_q.diff": "blocks.1.attn2.norm_q.weight",
    "blocks.0.norm3.diff": "blocks.0.norm2.weight",
    "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
    "blocks.1.diff_m": "blocks.1.scale_shift_table",
    "blocks.0.modulation.diff": "blocks.0.scale_shift_table",
    "head.diff_m": "scale_shift_table",
    "blocks.0.ffn.0.diff": "blocks.0.ffn.net.0.proj.weight",
    "blocks.0.ffn.0.diff_b": "blocks.0.ffn.net.0.proj.bias",
    "patch_embedding.diff": "patch_embedding.weight",
    "patch_embedding.diff_b": "patch_embedding.bias",
    "time_projection.1.diff": "condition_embedder.time_proj.weight",
    "head.head.diff_b": "proj_out.bias",
    "text_embedding.2.diff_b": "condition_embedder.text_embedder.linear_2.bias",
}


@pytest.mark.parametrize("underscored", [False, True])
def test_differences_are_added_at_the_strength(tmp_path, underscored):
    """diffusers drops those of norms and modulation."""
    base, generator = transformer(0).state_dict(), torch.Generator().manual_seed(1)
    expected, tensors = {name: tensor.clone() for name, tensor in base.items()}, {}
    for key, name in DIFFERENCES.items():
        module, _, part = key.rpartition(".")
        diff = torch.randn(base[name].shape, generator=generator)
        key = f"lora_unet_{module.replace('.', '_')}.{part}" if underscored else f"diffusion_model.{key}"
        tensors[key] = diff
        expected[name] += -0.25 * diff
    save_file(tensors, tmp_path / "lora.safetensors")
    near(merged(tmp_path / "lora.safetensors", -0.25), expected)


def test_norms_as_lycoris_spells_them(tmp_path):
    tensors = {
        "lycoris_blocks_0_norm3.w_norm": torch.ones(32),
        "lycoris_blocks_0_norm3.b_norm": torch.full((32,), 2.0),
        "lycoris_blocks_1_self_attn_norm_q.w_norm": torch.full((32,), 3.0),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    base = transformer(0).state_dict()
    expected = base | {
        "blocks.0.norm2.weight": base["blocks.0.norm2.weight"] + 0.5,
        "blocks.0.norm2.bias": base["blocks.0.norm2.bias"] + 1,
        "blocks.1.attn1.norm_q.weight": base["blocks.1.attn1.norm_q.weight"] + 1.5,
    }
    near(merged(tmp_path / "lora.safetensors", 0.5), expected)


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", "lora_unet_", ""])
def test_a_convolutions_lora_equals_diffusers(tmp_path, prefix):
    a, b = torch.randn(3, 8, 1, 2, 2), torch.randn(32, 3, 1, 1, 1)
    save_file(
        {f"{prefix}patch_embedding.lora_A.weight": a, f"{prefix}patch_embedding.lora_B.weight": b},
        tmp_path / "lora.safetensors",
    )
    tensors = {"transformer.patch_embedding.lora_A.weight": a, "transformer.patch_embedding.lora_B.weight": b}
    near(merged(tmp_path / "lora.safetensors", 0.6), diffusers_weights(tensors, 0.6))


def trained(folder, save=True, seed=0, **options):
    """diffusers' transformer with a PEFT adapter far from zero; its folder."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_out.0", "ffn.net.2"]} | options
    wrapped = peft.get_peft_model(reference_of(transformer(0)), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.2 + ("magnitude" in name)
    wrapped.save_pretrained(folder)
    return wrapped


OPTIONS = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"to_q": 2, "blocks.1.ffn.net.2": 3}, "alpha_pattern": {"attn1.to_q": 5}},
    {"use_dora": True},
    {"lora_bias": True},
    {"target_modules": r"blocks\.\d\.attn[12]\.to_[qk]"},
    {"target_modules": "all-linear"},
    {"target_modules": ["patch_embedding", "proj_out", "time_proj"]},
]


@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.filterwarnings("ignore")
def test_peft_folders_at_a_strength_equal_peft(tmp_path, options, strength):
    wrapped = trained(tmp_path, **options)
    for module in wrapped.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scale_layer(strength)
    expected = wrapped.merge_and_unload().state_dict()
    near(merged(tmp_path, strength), expected)


@pytest.mark.parametrize("inner", ["", "model."])
@pytest.mark.parametrize("container", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.filterwarnings("ignore")
def test_peft_folders_in_wans_names(tmp_path, inner, container):
    """As a training tool writes them that wraps Wan's own module: same numbers, other names."""
    options = {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"net.2": 3}, "use_rslora": True}
    expected = trained(tmp_path / "diffusers", **options).merge_and_unload().state_dict()
    folder = tmp_path / "wan"
    folder.mkdir()
    config = json.loads((tmp_path / "diffusers" / "adapter_config.json").read_text())
    config |= {"rank_pattern": {"q": 2}, "alpha_pattern": {"ffn.2": 3}, "target_modules": ["q", "o", "ffn.2"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    names = {ours: wan for wan, ours in ALL.items()}
    tensors = {}
    for key, tensor in load_file(tmp_path / "diffusers" / "adapter_model.safetensors").items():
        module, part = key.removeprefix("base_model.model.").split(".lora_")
        tensors[f"base_model.model.{inner}{names[module]}.lora_{part}"] = tensor
    saved(tensors, folder / container, "safetensors" if container.endswith("safetensors") else "flat")
    near(merged(folder), expected)
    del tensors[f"base_model.model.{inner}blocks.1.ffn.2.lora_A.weight"]
    del tensors[f"base_model.model.{inner}blocks.1.ffn.2.lora_B.weight"]
    saved(tensors, folder / container, "safetensors" if container.endswith("safetensors") else "flat")
    with pytest.raises(ValueError, match=rf"got no weights of {inner}blocks\.1\.ffn\.2, expected all of target_mod"):
        merged(folder)


@pytest.mark.parametrize("where", ["file", "folder"])
@pytest.mark.filterwarnings("ignore")
def test_what_diffusers_saves_with_its_metadata(tmp_path, where):
    """save_lora_weights stores PEFT's configuration in the file: lora_alpha is nowhere else."""
    from diffusers import WanPipeline

    model = reference_of(transformer(0))
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "to_v"], rank_pattern={"to_v": 2}))
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.2
    WanPipeline.save_lora_weights(
        tmp_path, peft.get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict() | {"target_modules": ["to_q", "to_v"]},
    )  # fmt: skip
    file = tmp_path / "pytorch_lora_weights.safetensors"
    got = merged(file if where == "file" else tmp_path, 0.9)
    near(got, diffusers_weights(None, 0.9, path=tmp_path))
    model.fuse_lora(lora_scale=0.9)
    near(got, {k.replace(".base_layer", ""): t for k, t in model.state_dict().items() if ".lora_" not in k})


def image_keys(prefix="diffusion_model."):
    names = ["blocks.0.cross_attn.k_img", "blocks.1.cross_attn.v_img", "img_emb.proj.1", "img_emb.proj.3"]
    if prefix == "transformer.":
        names = ["blocks.0.attn2.add_k_proj", "blocks.1.attn2.add_v_proj",
                 "condition_embedder.image_embedder.ff.net.0.proj"]  # fmt: skip
    if prefix == "lora_unet_":
        names = [name.replace(".", "_") for name in names]
    keys = {f"{prefix}{name}.lora_{x}.weight": torch.ones(2, 2) for name in names for x in ("down", "up")}
    if prefix == "diffusion_model.":
        keys["diffusion_model.blocks.0.cross_attn.norm_k_img.diff"] = torch.ones(32)
    return keys


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", "lora_unet_", ""])
def test_the_image_branch_is_skipped_with_a_note(tmp_path, prefix):
    tensors = spelled(matrices(), **SPELLINGS["diffusers"])
    extra = image_keys(prefix)
    save_file(tensors | extra, tmp_path / "lora.safetensors")
    near(merged(tmp_path / "lora.safetensors"), diffusers_weights(tensors))
    (note,) = read_lora(tmp_path / "lora.safetensors").notes
    assert f"skipped {len(extra)} tensors" in note
    assert "image branch" in note
    assert any(key in note for key in extra)


@pytest.mark.parametrize(
    "key",
    [
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_te_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight",
        "text_encoder.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
        "text_encoders.t5.transformer.shared.lora_B.weight",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.alpha",
    ],
)
def test_text_encoders_are_skipped_with_a_note_that_names_them(tmp_path, key):
    tensors = spelled(matrices(), **SPELLINGS["diffusers"])
    save_file(tensors | {key: torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    near(merged(tmp_path / "lora.safetensors"), diffusers_weights(tensors))
    (note,) = read_lora(tmp_path / "lora.safetensors").notes
    assert key in note
    assert "text encoder" in note
    save_file({key: torch.ones(2, 2)}, tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match=r"got no LoRA of a transformer \(.*text encoder.*expected some"):
        read_lora(tmp_path / "alone.safetensors")


Q = "diffusion_model.blocks.0.self_attn.q"
UNKNOWN = {
    "hada_w1_a": (f"{Q}.hada_w1_a", r"hada_w1_a, which is LoHa, expected LoRA"),
    "lokr_w1": ("lycoris_blocks_0_self_attn_q.lokr_w1", r"lokr_w1, which is LoKr, expected LoRA"),
    "lokr_w2_a": (f"{Q}.lokr_w2_a", r"LoKr"),
    "dora_scale": (f"{Q}.dora_scale", r"DoRA"),
    "lora_mid": (f"{Q}.lora_mid.weight", r"Tucker"),
    "oft": ("lora_unet_blocks_0_self_attn_q.oft_blocks", r"OFT"),
    "whole weights": (f"{Q}.weight", r"whole tensor.*--checkpoint"),
    "modules to save": ("base_model.model.proj_out.modules_to_save.default.weight", "modules_to_save"),
    "another network": ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "unknown key lora_unet_down"),
    "vace": ("diffusion_model.vace_blocks.0.self_attn.q.diff", r"vace_blocks\.0\.self_attn\.q"),
    "second transformer": ("transformer_2.blocks.0.attn1.to_q.diff", r"transformer_2\.blocks\.0"),
    "nonsense": ("diffusion_model.blocks.0.self_attn.q.rubbish", r"unknown key .*rubbish"),
    "no module": ("alpha", "unknown key alpha"),
    "no linear": ("diffusion_model.blocks.0.norm1.diff", r"blocks\.0\.norm1"),
    "half A": ("diffusion_model.head.head.lora_A.weight", r"without up of proj_out, expected both"),
    "half B": ("diffusion_model.head.head.lora_up.weight", r"without down of proj_out, expected both"),
    "alpha alone": ("diffusion_model.head.head.alpha", r"alpha without down and up of proj_out, expected both"),
}


@pytest.mark.parametrize("how", UNKNOWN)
def test_other_keys_are_refused_by_name(tmp_path, how):
    key, message = UNKNOWN[how]
    value = torch.tensor(4.0) if key.endswith("alpha") else torch.ones(4, 32)
    save_file(spelled(matrices(IN_BLOCKS), **SPELLINGS["comfy"]) | {key: value}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=message) as raised:
        merged(tmp_path / "lora.safetensors")
    assert "got " in str(raised.value)
    assert "expected" in str(raised.value)
    assert "\n" not in str(raised.value)


def spoiled(how):
    tensors = spelled(matrices(), **SPELLINGS["comfy"])
    a, b = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
    if how == "rank":
        tensors[b] = tensors[b][:, :3].clone()
    elif how == "bias shape":
        tensors[f"{Q}.diff_b"] = torch.ones(31)
    elif how == "integers":
        tensors[a] = tensors[a].int()
    elif how == "twice":
        tensors["blocks.0.attn1.to_q.lora_down.weight"] = tensors[a].clone()
    elif how == "alpha nan":
        tensors[f"{Q}.alpha"] = torch.tensor(torch.nan)
    elif how == "alpha of two":
        tensors[f"{Q}.alpha"] = torch.ones(2)
    elif how == "ffn":
        tensors["diffusion_model.blocks.1.ffn.0.lora_B.weight"] = torch.ones(96, RANK)
    elif how == "nothing":
        tensors = {}
    return tensors


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("rank", r"got A \[4, 32\] and B \[32, 3\] of blocks.0.attn1.to_q, expected one rank"),
        ("bias shape", r"got a difference of blocks.0.attn1.to_q.bias \[31\], expected \[32\]"),
        ("integers", r"got diffusion_model.blocks.0.self_attn.q.lora_A.weight of torch.int32, expected floating"),
        ("twice", r"got blocks.0.attn1.to_q.lora_down.weight and another spelling of it, expected"),
        ("alpha nan", r"got diffusion_model.blocks.0.self_attn.q.alpha tensor\(nan\), expected one finite number"),
        ("alpha of two", r"alpha tensor\(\[1., 1.\]\), expected one finite number"),
        ("ffn", r"got B of blocks.1.ffn.net.0.proj.weight \[96, 4\], expected \[48, 4\]"),
        ("nothing", r"got no LoRA of a transformer \(empty\), expected some"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, how, message):
    torch.save(spoiled(how), tmp_path / "lora.pt")
    if how == "nothing":
        save_file({}, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=message):
        merged(tmp_path / "lora.pt")


@pytest.mark.parametrize("name", ["comfy", "kohya", "diffusers", "bare"])
def test_another_size_is_refused_with_both_widths(tmp_path, name):
    other = transformer(0, num_attention_heads=4)
    tensors = {}
    for key, tensor in spelled(matrices(IN_BLOCKS), **SPELLINGS[name]).items():
        tensors[key] = torch.ones([64 if size == 32 else size for size in tensor.shape])
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"got LoRA of a transformer of width 64, expected width 32"):
        merged(tmp_path / "lora.safetensors")
    merged(tmp_path / "lora.safetensors", base=other)


def test_more_blocks_are_refused(tmp_path):
    tensors = {
        f"blocks.5.self_attn.q.lora_{x}.weight": t for x, t in (("A", torch.ones(2, 32)), ("B", torch.ones(32, 2)))
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"got LoRA of a transformer of 6 blocks, expected 2"):
        merged(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize(
    ("key", "name"),
    [
        (f"{Q}.lora_B.weight", "blocks.0.attn1.to_q"),
        ("diffusion_model.blocks.1.diff_m", "blocks.1.scale_shift_table"),
        ("diffusion_model.head.head.diff_b", "proj_out.bias"),
    ],
)
def test_results_that_are_not_finite_are_refused(tmp_path, key, name, value):
    tensors = spelled(matrices(IN_BLOCKS), **SPELLINGS["comfy"])
    shapes = {f"{Q}.lora_B.weight": (32, 4), "diffusion_model.blocks.1.diff_m": (1, 6, 32)}
    tensors[key] = torch.full(shapes.get(key, (32,)), value)
    save_file(tensors, tmp_path / "lora.safetensors")
    model = transformer(0).to(torch.float16)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"lora.safetensors.*got weights of {name} that are not finite"):
        merged(tmp_path / "lora.safetensors", base=model)
    assert all(torch.equal(tensor, before[k]) for k, tensor in model.state_dict().items())


def broken(tmp_path, how):
    file = tmp_path / "lora.safetensors"
    if how == "missing":
        return tmp_path / "nothing.safetensors"
    if how == "empty":
        file.write_bytes(b"")
    elif how == "text":
        file.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif how == "list":
        torch.save([torch.ones(2)], file)
    elif how == "cut":
        save_file(spelled(matrices()), file)
        file.write_bytes(file.read_bytes()[:-200])
    elif how == "other state":
        torch.save({"optimizer": {"a": torch.ones(1)}}, file)
    elif how == "folder":
        return tmp_path
    elif how == "weights alone":
        save_file(spelled(matrices()), tmp_path / "adapter_model.safetensors")
        return tmp_path
    else:
        import pickle

        class Code:
            def __reduce__(self):
                return (open, (str(tmp_path / "pwned"), "w"))

        file.write_bytes(pickle.dumps(Code()))
    return file


@pytest.mark.parametrize(
    "how", ["missing", "empty", "text", "list", "cut", "other state", "folder", "weights alone", "code"]
)
def test_files_that_cannot_be_read(tmp_path, how):
    with pytest.raises((ValueError, FileNotFoundError), match=r"got .*expected") as raised:
        read_lora(broken(tmp_path, how))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"modules_to_save": ["proj_out"]}, r"got modules_to_save \"\['proj_out'\]\", expected it unset"),
        ({"peft_type": "LOHA"}, r"got peft_type 'LOHA', expected 'LORA'"),
        ({"bias": "all"}, r"got bias 'all', expected 'none'"),
        ({"init_lora_weights": "pissa"}, r"got init_lora_weights 'pissa', expected"),
        ({"layer_replication": [[0, 1]]}, r"got layer_replication"),
        ({"fan_in_fan_out": True}, r"got fan_in_fan_out 'True', expected it unset"),
        ({"a_later_method": {"on": 1}}, r"got a_later_method"),
        ({"r": 3}, r"got rank 4 of blocks.0.attn1.to_out.0, expected 3"),
        ({"rank_pattern": {"blocks.1.attn1.to_q": 2}}, r"got rank 4 of blocks.1.attn1.to_q, expected 2"),
        ({"lora_alpha": None}, r"got lora_alpha None, expected a positive number"),
        ({"alpha_pattern": {"to_q": "x"}}, r"got alpha_pattern"),
        ({"rank_pattern": {"(": 2}}, r"expected a regular expression"),
        ({"target_modules": "("}, r"expected a regular expression"),
        ({"target_modules": ["to_q"]}, r"got weights of blocks.*expected those of target_modules alone"),
        ({"use_dora": True}, r"got no magnitude of blocks.0.attn1.to_out.0, expected it"),
        ({"lora_bias": True}, r"got no bias of blocks.0.attn1.to_out.0, expected it"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_configurations_that_ask_for_more(tmp_path, entry, message):
    trained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entry))
    with pytest.raises(ValueError, match=message) as raised:
        merged(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        ("a.safetensors:0", "a.safetensors", 0.0),
        ("a.safetensors:.5", "a.safetensors", 0.5),
        ("a.safetensors:1e-2", "a.safetensors", 0.01),
        ("with:colon/a.safetensors", "with:colon/a.safetensors", 1.0),
        ("with:colon/a.safetensors:0.8", "with:colon/a.safetensors", 0.8),
        ("with:2/a", "with:2/a", 1.0),
        ("taken:0.5", "taken:0.5", 1.0),
        ("taken:0.5:0.25", "taken:0.5", 0.25),
        ("folder:0.5", "folder", 0.5),
        ("a.safetensors:strong", "a.safetensors:strong", 1.0),
        (":0.8", ":0.8", 1.0),
    ],
)
def test_strengths_behind_a_colon(tmp_path, monkeypatch, text, path, strength):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "taken:0.5").touch()
    got = Adapter.of(text)
    assert (str(got.path), got.strength) == (path, strength)


@pytest.mark.parametrize("text", ["a:nan", "a:inf", "a:-inf", "a:1e999", "a:-Infinity"])
def test_strengths_that_are_not_finite(text):
    with pytest.raises(ValueError, match=r"adapter: got strength -?(nan|inf), expected a finite number"):
        Adapter.of(text)


@pytest.mark.parametrize(
    "value", [("a", float("nan")), ("a", "0.5"), ("a", True), ("a", None), ("a", 10**400), ("a",), ("a", 1, 2)]
)
def test_pairs_that_are_no_path_and_strength(value):
    with pytest.raises(ValueError, match=r"adapter: got .*expected"):
        Adapter.of(value)


def test_names(tmp_path):
    save_file(spelled(matrices()), tmp_path / "style.v2.safetensors")
    trained(tmp_path / "motion")
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "style.v2.safetensors", tmp_path / "b")
    values = [f"{tmp_path}/style.v2.safetensors:0.5", (f"{tmp_path}/motion/", 2)]
    assert read_adapters(values, [], CONFIG).strengths == {"style.v2": 0.5, "motion": 2.0}
    with pytest.raises(ValueError, match=r"got the name 'style.v2' for .* and .*, expected different names"):
        read_adapters([*values, tmp_path / "b" / "style.v2.safetensors"], [], CONFIG)
    named = Adapter(tmp_path / "b" / "style.v2.safetensors", 0.25, "other")
    assert read_adapters([*values, named], [], CONFIG).strengths == {"style.v2": 0.5, "motion": 2.0, "other": 0.25}
    assert read_adapters([], [], CONFIG) is None
    for alone in ("a.safetensors", tmp_path, named):
        with pytest.raises(ValueError, match=r"adapters: got .*, expected a list"):
            read_adapters(alone, [], CONFIG)
    (tmp_path / "linked.safetensors").symlink_to(tmp_path / "style.v2.safetensors")  # as in the cache of a hub
    assert Adapter(tmp_path / "linked.safetensors").name == "linked"


def test_strength_zero_is_no_adapter(tmp_path):
    save_file(spelled(matrices()), tmp_path / "lora.safetensors")
    got = merged(tmp_path / "lora.safetensors", 0.0)
    for name, tensor in transformer(0).state_dict().items():
        assert torch.equal(got[name], tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64], ids=str)
def test_files_of_other_dtypes_merge_in_the_models(tmp_path, dtype):
    made = {wan: (a.to(dtype), b.to(dtype)) for wan, (a, b) in matrices().items()}
    save_file(spelled(made), tmp_path / "lora.safetensors")
    wide = {wan: (a.float(), b.float()) for wan, (a, b) in made.items()}
    near(merged(tmp_path / "lora.safetensors"), diffusers_weights(spelled(wide, **SPELLINGS["diffusers"])))


def test_descriptions(tmp_path):
    made = matrices(IN_BLOCKS, rank=lambda number: 2 + number % 2)
    tensors = spelled(made, alpha=1.0, **SPELLINGS["kohya"]) | image_keys("lora_unet_")
    save_file(tensors, tmp_path / "lora.safetensors")
    got = describe(tmp_path / "lora.safetensors", CONFIG)
    assert (got.layout, got.parameters, got.ranks, got.width, got.blocks) == ("file", 20, (2, 3), 32, 2)
    assert set(got.spelling) == {"lora_unet_", "lora_down", "lora_up", "alpha"}
    assert got.problem is None
    assert len(got.notes) == 1
    wide = describe(tmp_path / "lora.safetensors", TransformerConfig())
    assert wide.problem == "got LoRA of a transformer of width 32, expected width 1536"
    trained(tmp_path / "peft")
    got = describe(tmp_path / "peft", CONFIG)
    assert (got.layout, got.ranks, got.problem) == ("PEFT folder", (4,), None)


def test_merge_adapter_takes_files_too(tmp_path):
    tensors = spelled(matrices(), **SPELLINGS["diffusers"])
    save_file(tensors, tmp_path / "lora.safetensors")
    model = transformer(0)
    assert merge_adapter(model, tmp_path / "lora.safetensors", []) == []
    near(model.state_dict(), diffusers_weights(tensors))


def test_the_names_here_are_diffusers_own():
    names = dict(WanTransformer3DModel(**TRANSFORMER).named_modules())
    assert all(ours in names for ours in ALL.values())


def test_a_scale_outside_of_the_state_is_named(tmp_path):
    """Trainers differ in what it means, so it is not guessed; alpha inside the state counts."""
    module, file = "blocks.0.self_attn.q", tmp_path / "a.pt"
    pair = {f"{module}.lora_A.weight": torch.ones(2, 128), f"{module}.lora_B.weight": torch.ones(128, 2)}
    cases = [
        ({"lora": pair, "alpha": 4.0, "rank": 2}, 1.0, "alpha 4 is not used"),
        ({"config": {"lora_alpha": 8}, "generator_lora": pair}, 1.0, "config.lora_alpha 8 is not used"),
        ({"generator_lora": {**pair, f"{module}.alpha": 4}, "critic_lora": {**pair, f"{module}.alpha": 6}}, 2.0, None),
    ]
    for content, scale, note in cases:
        torch.save(content, file)
        found = read_lora(file)
        assert [change.scale for change in found.changes.values()] == [scale]
        assert [one for one in found.notes if "not used" in one] == [one for one in found.notes if note and note in one]
        assert any(note in one for one in found.notes) if note else True
