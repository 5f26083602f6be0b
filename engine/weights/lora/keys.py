"""The spellings of LoRA keys: which module of the transformer a key of a file belongs to, and which part it is.

A key is a prefix of the training tool, a module and a part: `diffusion_model.` + `blocks.0.self_attn.q` +
`.lora_A.weight`. The names of modules are Wan's own or diffusers', with dots or (kohya, LyCORIS) underscores.
"""

import re
from dataclasses import dataclass

from engine.weights.names import diffusers_name

PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "pipe.dit.", "dit.", "unet.",
    "generator.", "model.", "module.", "_forward_module.", "_fsdp_wrapped_module.", "_orig_mod.",
)  # fmt: skip
UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_")
TEXT_ENCODER = ("lora_te", "text_encoder", "text_model.", "cond_stage_model.", "conditioner.")
# Parts as files spell them, and what they are here. An adapter's name may stand inside: lora_A.default.weight.
_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|lora_magnitude_vector)"
    r"(?:\.(?!(?:weight|bias)$)(?P<name>[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
_DOWN = ("lora_A", "lora_down", "lora.down")
_PLAIN = {
    "alpha": "alpha", "diff": "diff", "w_norm": "diff", "diff_b": "diff_b", "b_norm": "diff_b", "diff_m": "diff_m",
}  # fmt: skip
# Methods other than LoRA, by the beginning of what follows the module.
_OTHERS = {
    "hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "kohya's DoRA", "lora_mid": "LoCon with a Tucker core",
    "oft_": "OFT", "boft_": "BOFT", "ia3_": "IA3", "lora_E": "AdaLoRA", "vera_": "VeRA", "lora_embedding_":
    "a LoRA of embeddings", "modules_to_save": "whole modules (modules_to_save)", "set_weight": "whole weights",
    "reshape_weight": "weights of another shape", "on_input": "IA3", "a1.": "GLoRA", "b1.": "GLoRA",
}  # fmt: skip
_IMAGE = re.compile(r"(^|\.)(k_img|v_img|norm_k_img|add_k_proj|add_v_proj|norm_added_k|img_emb|image_embedder)(\.|$)")

_ATTENTIONS = ("self_attn", "cross_attn")
_IN_ATTENTION = ("q", "k", "v", "o", "norm_q", "norm_k", "k_img", "v_img", "norm_k_img")
BLOCK_MODULES = (*(f"{a}.{p}" for a in _ATTENTIONS for p in _IN_ATTENTION), "norm3", "ffn.0", "ffn.2", "modulation")
TOP_MODULES = (
    "patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2",
    "time_projection.1", "head.head", "head.modulation", "head", "img_emb.proj.0", "img_emb.proj.1", "img_emb.proj.3",
    "img_emb.proj.4",
)  # fmt: skip


def _by_underscores() -> tuple[dict[str, str], dict[str, str]]:
    """Underscored names of modules -> dotted ones, in a block and outside, of both spellings."""
    in_block: dict[str, str] = {}
    top: dict[str, str] = {}
    for name in BLOCK_MODULES:
        ours = diffusers_name(f"blocks.0.{name}").removeprefix("blocks.0.")
        in_block |= {name.replace(".", "_"): name, ours.replace(".", "_"): ours}
    in_block |= {f"attn2_{name}": f"attn2.{name}" for name in ("add_k_proj", "add_v_proj", "norm_added_k")}
    for name in TOP_MODULES:
        ours = diffusers_name(name)
        top |= {name.replace(".", "_"): name, ours.replace(".", "_"): ours}
    return in_block, top


_IN_BLOCK, _TOP = _by_underscores()


_TO_WAN = {diffusers_name(f"blocks.0.{name}")[len("blocks.0.") :]: name for name in BLOCK_MODULES}
_TO_WAN |= {diffusers_name(name): name for name in TOP_MODULES}


def wan_name(module: str) -> str:
    """Wan's own name of a module; returns other names unchanged."""
    block = re.match(r"(blocks\.\d+\.)(.+)$", module)
    return block[1] + _TO_WAN.get(block[2], block[2]) if block else _TO_WAN.get(module, module)


_MODULES = sorted({name.split(".")[0] for name in (*_TO_WAN, *_TO_WAN.values(), *TOP_MODULES) if "attn" not in name}
                  - {"ffn", "norm2", "norm3"})  # fmt: skip
_BEGIN = re.compile(rf"(blocks[._]\d|({'|'.join(_MODULES)})([._]|$))")


def begins_module(name: str) -> bool:
    """Whether a name begins with a module of a transformer or a text encoder, behind prefixes of training tools."""
    prefix, rest = _prefix(name)
    return prefix.endswith(UNDERSCORED) or rest.startswith(TEXT_ENCODER) or _BEGIN.match(rest) is not None


@dataclass(frozen=True)
class Key:
    """What a key of a LoRA file stands for.

    module    the module's name in diffusers' spelling; with `part` "table" the name of a modulation table
    part      down, up, bias (of up), magnitude, alpha, diff, diff_b or table; `skipped` says why it is left out
    raw       the module's name as PEFT would know it: without `base_model.model.` and
              diffusers' `transformer.`
    spelling  prefix and part as they are written, for a summary
    """

    module: str
    part: str
    raw: str = ""
    spelling: tuple[str, str] = ("", "")
    skipped: str | None = None


def parse(key: str) -> Key:
    """The meaning of a key. ValueError naming the key, or the kind of a method that is no LoRA."""
    prefix, rest = _prefix(key)
    if rest.startswith(TEXT_ENCODER):
        return Key(rest, "", skipped="the text encoder")
    module, part, written = _part(rest, key)
    if prefix.endswith(UNDERSCORED):
        module = _dotted(module, key)
    if _IMAGE.search(module):
        return Key(module, part, skipped="the image branch, which a text-to-video model lacks")
    known = prefix.removeprefix("base_model.model.").removeprefix("transformer.")
    raw = known + module if "." in known else module
    if part == "diff_m":
        return Key(diffusers_name(f"{module}.modulation"), "table", raw, (prefix, written))
    name = diffusers_name(module)
    return Key(name, "table" if part == "diff" and name.endswith("scale_shift_table") else part, raw, (prefix, written))


def _prefix(key: str) -> tuple[str, str]:
    """The tool's prefixes and what follows them."""
    rest = key
    while found := next((prefix for prefix in PREFIXES if rest.startswith(prefix)), None):
        rest = rest.removeprefix(found)
    for prefix in UNDERSCORED:
        if rest.startswith(prefix):
            rest = rest.removeprefix(prefix).lstrip("_")
            return key[: len(key) - len(rest)].rstrip("_") + "_", rest
    return key[: len(key) - len(rest)], rest


def _part(rest: str, key: str) -> tuple[str, str, str]:
    """Module, part and the part's spelling."""
    if match := _PART.fullmatch(rest):
        written, leaf = match["part"], match["leaf"] or "weight"
        part = "down" if written in _DOWN else "magnitude" if "magnitude" in written else "up"
        if leaf == "weight" or part == "up":
            return match["module"], "bias" if leaf == "bias" else part, written
    module, _, last = rest.rpartition(".")
    if module and last in _PLAIN:
        return module, _PLAIN[last], last
    for start, kind in _OTHERS.items():
        if f".{start}" in rest:
            raise ValueError(f"got {key}, which is {kind}, expected LoRA")
    if last in ("weight", "bias", "modulation", "scale_shift_table"):
        raise ValueError(f"got {key}, a whole tensor, expected LoRA (--checkpoint takes whole weights)")
    raise ValueError(f"got the unknown key {key}, expected LoRA of a Wan2.1 transformer")


def _dotted(module: str, key: str) -> str:
    """The dotted name of an underscored one."""
    block = re.fullmatch(r"blocks_(\d+)_?(.*)", module)
    if block and block[2] in _IN_BLOCK:
        return f"blocks.{block[1]}.{_IN_BLOCK[block[2]]}"
    if block and not block[2]:
        return f"blocks.{block[1]}"
    if module in _TOP:
        return _TOP[module]
    if module.startswith("condition_embedder_image_embedder_"):
        return module.replace("condition_embedder_", "condition_embedder.").replace("embedder_", "embedder.")
    raise ValueError(f"got the unknown key {key}, expected LoRA of a Wan2.1 transformer")
