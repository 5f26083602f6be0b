"""The spellings of parameter names that people have on disk, and their translation to the engine's, diffusers' names.

NAMINGS is the one table. A spelling is recognised by a key that only it has, behind any prefix: never by a file name.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Part = Literal["transformer", "vae", "text_encoder", "tiny_vae"]
WORDS: dict[Part, str] = {
    "transformer": "transformer", "vae": "VAE", "text_encoder": "text encoder", "tiny_vae": "tiny VAE",
}  # fmt: skip

# Wan's own names of a transformer -> diffusers'.
_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{
        f"{theirs}.{a}": f"{ours}.{b}"
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for a, b in (
            ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"),
            ("norm_q", "norm_q"), ("norm_k", "norm_k"),
        )
    },
}  # fmt: skip
_TOP = {
    "patch_embedding": "patch_embedding",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
}
# Wan's own names of the VAE -> diffusers'.
_VAE_TOP = {
    "conv1": "quant_conv", "conv2": "post_quant_conv",
    **{f"{side}.{theirs}": f"{side}.{ours}" for side in ("encoder", "decoder") for theirs, ours in (
        ("conv1", "conv_in"), ("head.0", "norm_out"), ("head.2", "conv_out"), ("middle.0", "mid_block.resnets.0"),
        ("middle.1", "mid_block.attentions.0"), ("middle.2", "mid_block.resnets.1"),
    )},
}  # fmt: skip
_VAE_RESIDUAL = {
    "residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}  # fmt: skip
_VAE_LEVEL = 4  # entries of decoder.upsamples per level: three residual blocks and an upsampling
# Wan's own names of the text encoder, and llama.cpp's -> the engine's (transformers' without `encoder.`).
_T5_LAYER = {
    **{f"attn.{x}": f"layer.0.SelfAttention.{x}" for x in "qkvo"},
    "norm1": "layer.0.layer_norm", "norm2": "layer.1.layer_norm",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0", "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}  # fmt: skip
_T5_TOP = {"token_embedding": "embed_tokens", "norm": "final_layer_norm"}
_LLAMA_LAYER = {
    **{f"attn_{x}": f"layer.0.SelfAttention.{x}" for x in "qkvo"},
    "attn_norm": "layer.0.layer_norm", "ffn_norm": "layer.1.layer_norm",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_gate": "layer.1.DenseReluDense.wi_0", "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}  # fmt: skip
_LLAMA_TOP = {"token_embd": "embed_tokens", "enc.output_norm": "final_layer_norm"}

_WRAPPERS = re.compile(r"(^|\.)(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)(?=\.)")
BUFFERS = re.compile(r"(^|\.)freqs$")  # position tables that some checkpoints carry


def unwrapped(name: str) -> str:
    """A name without what torch's wrappers insert: FSDP, activation checkpoints, torch.compile."""
    return _WRAPPERS.sub("", name).lstrip(".")


def diffusers_name(name: str) -> str:
    """diffusers' name of a transformer's parameter or module; returns other names unchanged."""
    name = unwrapped(name).removeprefix("model.")
    block = re.match(r"blocks\.(\d+)\.(.+)$", name)
    return f"blocks.{block[1]}.{_renamed(block[2], _BLOCK)}" if block else _renamed(name, _TOP)


def _renamed(name: str, table: dict[str, str]) -> str:
    """Replace the beginning that the table knows, if it ends at a dot."""
    for theirs, ours in table.items():
        if name == theirs or name.startswith(theirs + "."):
            return ours + name[len(theirs) :]
    return name


def _vae_name(name: str) -> str:
    name = _renamed(name, _VAE_TOP)
    place = re.match(r"(encoder\.downsamples|decoder\.upsamples)\.(\d+)\.(.+)$", name)
    if place:
        number, rest = int(place[2]), _renamed(place[3], _VAE_RESIDUAL)
        level, entry = divmod(number, _VAE_LEVEL)
        if place[1].startswith("encoder"):
            return f"encoder.down_blocks.{number}.{rest}"
        inner = "upsamplers.0" if entry == _VAE_LEVEL - 1 else f"resnets.{entry}"
        return f"decoder.up_blocks.{level}.{inner}.{rest}"
    block = re.match(r"((?:encoder|decoder)\.mid_block\.\w+\.\d)\.(.+)$", name)
    return f"{block[1]}.{_renamed(block[2], _VAE_RESIDUAL)}" if block else name


def _t5_name(name: str) -> str:
    block = re.match(r"blocks\.(\d+)\.(.+)$", name)
    return f"block.{block[1]}.{_renamed(block[2], _T5_LAYER)}" if block else _renamed(name, _T5_TOP)


def _llama_name(name: str) -> str:
    block = re.match(r"enc\.blk\.(\d+)\.(.+)$", name)
    return f"block.{block[1]}.{_renamed(block[2], _LLAMA_LAYER)}" if block else _renamed(name, _LLAMA_TOP)


def _transformers_name(name: str) -> str:
    """The embedding is stored as `shared`, or under its place in the encoder, or as both."""
    return "embed_tokens.weight" if name == "shared.weight" else name.removeprefix("encoder.")


@dataclass(frozen=True)
class Naming:
    """One spelling of one part's names."""

    name: str
    part: Part
    anchors: tuple[str, ...]  # keys of this spelling alone; one of them suffices, so that a damaged file is recognised
    translate: Callable[[str], str]  # a name without prefix -> the engine's
    ignored: tuple[str, ...] = ()  # beginnings of names that the engine has no use for


def _of_block(prefix: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{number}.{name}.weight" for number in (0, 1) for name in names)


NAMINGS = (
    Naming("Wan", "transformer", _of_block("blocks", "self_attn.q", "self_attn.k"), diffusers_name),
    Naming("diffusers", "transformer", _of_block("blocks", "attn1.to_q", "attn1.to_k"), diffusers_name),
    Naming("Wan", "vae", ("decoder.middle.0.residual.0.gamma", "encoder.middle.0.residual.0.gamma"), _vae_name),
    Naming("diffusers", "vae", ("decoder.mid_block.resnets.0.norm1.gamma", "encoder.mid_block.resnets.0.norm1.gamma"),
           _vae_name),
    Naming("Wan", "text_encoder", _of_block("blocks", "attn.q", "attn.k"), _t5_name),
    Naming("llama.cpp", "text_encoder", _of_block("enc.blk", "attn_q", "attn_k"), _llama_name, ("dec.",)),
    Naming("transformers", "text_encoder", _of_block("encoder.block", "layer.0.SelfAttention.q",
           "layer.0.SelfAttention.k"), _transformers_name, ("decoder.", "lm_head.")),
    Naming("transformers", "text_encoder", _of_block("block", "layer.0.SelfAttention.q", "layer.0.SelfAttention.k"),
           _transformers_name),
    # The layers that multiply frames; the number of blocks ahead of the first one differs.
    Naming("TAEHV", "tiny_vae", tuple(f"decoder.{number}.conv.weight" for number in range(5, 13)), lambda name: name,
           ("encoder.",)),
)  # fmt: skip


# The beginnings of a part's names in the engine's spelling.
_OWN: dict[Part, re.Pattern[str]] = {
    "transformer": re.compile(
        r"blocks\.\d+\.(attn[12]\.|ffn\.net\.|norm2\.|scale_shift_table$)"
        r"|(patch_embedding|condition_embedder|proj_out|condition_proj)\.|scale_shift_table$"
    ),
    "vae": re.compile(
        r"(encoder|decoder)\.(conv_in|conv_out|norm_out|mid_block|up_blocks|down_blocks)\.|(post_)?quant_conv\."
    ),
    "text_encoder": re.compile(r"block\.\d+\.layer\.|(embed_tokens|final_layer_norm)\."),
    "tiny_vae": re.compile(r"decoder\.\d+\."),
}


@dataclass(frozen=True)
class Found:
    """A part inside a file: its spelling, and what stands before its names."""

    naming: Naming
    prefix: str

    @property
    def state(self) -> str:
        """The prefix as a user names it: generator_ema, model.diffusion_model, or nothing."""
        return self.prefix.rstrip(".")

    def owns(self, name: str) -> bool:
        """Whether an unwrapped name is one of this part's: a tensor, or what the engine has no use for."""
        rest = name.removeprefix(self.prefix)
        unused = rest == "scaled_fp8" or rest.startswith(self.naming.ignored) or BUFFERS.search(rest) is not None
        own = unused or _OWN[self.naming.part].match(self.naming.translate(rest)) is not None
        return own and name.startswith(self.prefix) and not is_adapter([name])


def recognise(names: Iterable[str]) -> list[Found]:
    """Every part among unwrapped names, in the order of NAMINGS."""
    found = set()
    for name in names:
        for naming in NAMINGS:
            anchor = next((a for a in naming.anchors if name == a or name.endswith(f".{a}")), None)
            prefix = name[: len(name) - len(anchor)] if anchor else ""
            # The short spelling of transformers ends the long one, and the decoder of a whole UMT5.
            if (
                anchor
                and not (anchor.startswith("block.") and prefix.endswith(("encoder.", "decoder.")))
                and not (
                    prefix.endswith("textual.")  # of CLIP
                )
            ):
                found.add(Found(naming, prefix))
    return sorted(found, key=lambda one: (NAMINGS.index(one.naming), one.prefix))


_ADAPTER = r"(^|\.)lora(_|\.)(A|B|up|down)(\.|$)|\.(hada|lokr)_|\.diff(_b|_m)?$"
TINY = "a tiny VAE (TAEHV, TAEW, LightTAE or the like); pass it as --vae-decoder"
# Keys of models that are built otherwise, and what they are.
_OTHERS = (
    (r"(^|\.)(k_img|v_img|add_k_proj|img_emb|image_embedder)\.", "an image-to-video model (Wan I2V or FLF2V)"),
    (r"(^|\.)vace_", "a VACE model"),
    (r"(^|\.)(control_adapter|ref_conv|control_conv)\.", "a Fun-Control model"),
    (r"(^|\.)(face_adapter|motion_encoder|pose_patch_embedding)", "a Wan-Animate model"),
    (r"(^|\.)(casual_audio_encoder|audio_injector|audio_proj)", "a speech-to-video model"),
    (r"(^|\.)fps_(embedding|projection)\.", "a SkyReels-V2 model"),
    (r"(^|\.)encoder\.downsamples\.\d+\.downsamples\.", "the VAE of Wan2.2-5B"),
    (r"(^|\.)double_blocks\.", "a model of another family (FLUX or HunyuanVideo)"),
    (r"(^|\.)(down|up)_blocks\.\d+\.attentions\.\d+\.transformer_blocks\.", "a U-Net (Stable Diffusion)"),
    (r"(^|\.)joint_blocks\.", "a model of another family (SD3)"),
    (r"(^|\.)visual\.transformer\.|textual\.", "CLIP"),
    (_ADAPTER, "an adapter (LoRA); pass it as --adapter"),
    (r"(^|\.)(encoder|decoder)\.\d+\.conv\.weight$", TINY),
    (
        r"(^|\.)(encoder|decoder)\.\d+\.(conv\.(\d+\.)?|skip\.)?(weight|bias)$",
        "a tiny autoencoder of another layout than TAEHV's",
    ),
)


def other_kind(names: Iterable[str]) -> str | None:
    """What a file is, in words, where its names say that the engine cannot run it."""
    names = list(names)
    return next((words for pattern, words in _OTHERS if any(re.search(pattern, name) for name in names)), None)


def is_adapter(names: Iterable[str]) -> bool:
    """Whether names are those of a LoRA and its relatives."""
    return any(re.search(_ADAPTER, name) for name in names)
