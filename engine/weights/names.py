"""Translates Wan's own parameter names, and those of training code's wrappers, to diffusers' names."""

import re

# Wan's own parameter names, used by every public Self-Forcing-family checkpoint -> diffusers' names.
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
_WRAPPERS = re.compile(r"(^|\.)(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)(?=\.)")
BUFFERS = re.compile(r"(^|\.)freqs$")  # position tables that some checkpoints carry


def diffusers_name(name: str) -> str:
    """diffusers' name of a Wan parameter or module; returns other names unchanged."""
    name = _WRAPPERS.sub("", name).lstrip(".")
    name = name.removeprefix("model.")
    block = re.match(r"blocks\.(\d+)\.(.+)$", name)
    table, prefix, rest = (_BLOCK, f"blocks.{block[1]}.", block[2]) if block else (_TOP, "", name)
    for theirs, ours in table.items():
        if rest == theirs or rest.startswith(theirs + "."):
            return prefix + ours + rest[len(theirs) :]
    return name
