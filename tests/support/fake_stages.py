"""Stages made of short formulas, equal to csrc/tests/fake_plugin.cpp, and a bundle for them.

Tests compare the C++ core with the engine's own loop, for every kind of stream, in seconds: graph inputs, kept state
and published slots.

`python tests/support/fake_stages.py` writes csrc/tests/fake.bundle, whose manifest keeps version 1.
"""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from engine.bundles.manifest import ROW_INPUTS
from engine.config import Preset, TransformerConfig
from engine.generators import FAMILIES
from engine.generators.base import Ring
from engine.model.cache import RingCache
from engine.model.text import Tokenizer
from engine.runtime.passes import Capabilities, Pass
from engine.stream import Pipeline

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "csrc" / "tests" / "fake.bundle"
TOKENIZER = ROOT / "engine" / "assets" / "sprites" / "tokenizer"
CONFIG = TransformerConfig(
    patch_size=(1, 1, 1), num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, text_dim=6,
    freq_dim=4, ffn_dim=8, num_layers=2,
)  # fmt: skip
HEIGHT, WIDTH, SPATIAL, TEMPORAL = 8, 16, 4, 4
HIGH, WIDE = HEIGHT // SPATIAL, WIDTH // SPATIAL
TOKENS = HIGH * WIDE


class FakeStages:
    """The formulas of csrc/tests/fake_plugin.cpp, computed in float64, with float32 results."""

    name = "fake"
    capabilities = Capabilities()
    make_cache = RingCache

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        values = (ids[..., None] * 31 + torch.arange(CONFIG.text_dim) * 7) % 97
        return torch.where(mask[..., None] > 0, values.float() / 97 - 0.5, 0)

    def modules(self) -> dict[str, torch.nn.Module]:
        return {}

    def named_weights(self) -> list[tuple[str, Tensor]]:
        return []

    def plain(self) -> "FakeStages":
        return self

    def prepare_text(self, text_emb: Tensor) -> list[tuple[float, float]]:
        """Means of every layer's keys and values; the formulas use nothing else."""
        i, emb, wide = torch.arange(CONFIG.dim), text_emb[0].double(), CONFIG.text_dim
        layers = range(CONFIG.num_layers)
        return [(emb[:, (n + i) % wide].mean().item(), emb[:, (2 * n + 3 * i) % wide].mean().item()) for n in layers]

    def _pass(self, step: Pass, cache: RingCache, text: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
        latent, t, c_f, cos, sin = step.latent, step.t, step.c_f, step.cos, step.sin
        level = latent[0].double().mean(0).flatten()[:, None]
        pair = torch.arange(CONFIG.dim) % cos.shape[1]
        seen = torch.zeros(CONFIG.dim, dtype=torch.float64)
        for layer, (text_k, text_v) in enumerate(text):
            k = 0.5 * level + 0.25 * cos[:, pair].double() + 4 * text_k + 0.01 * layer
            v = 0.25 * level + 0.25 * sin[:, pair].double() + 4 * text_v
            if c_f is not None:
                v = v + 0.1 * c_f[0].double()
            if t is not None:
                v = v + 1e-4 * t.double()
            heads = (1, -1, CONFIG.num_attention_heads, CONFIG.attention_head_dim)
            k, v, first = k.float().reshape(heads), v.float().reshape(heads), 0
            slots = (step.slot, step.valid), (step.local_slot, step.local_valid)
            for ring, (slot, valid) in zip(cache.rings, slots, strict=False):
                own, width = slice(first, first + ring.heads[layer]), CONFIG.attention_head_dim
                ring.write(layer, slot, k[:, :, own], v[:, :, own])
                for side in ring.view(layer):
                    mean = side[0, : valid * ring.tokens].flatten(1).double().mean(0)
                    seen[own.start * width : own.stop * width] += mean
                first = own.stop
        return level, seen

    def run(self, step: Pass, cache: RingCache, text_kv: list[tuple[float, float]]) -> Tensor:
        level, seen = self._pass(step, cache, text_kv)
        if step.kind.hidden:
            return (0.5 * level + 0.5 * seen).float()[None]
        share = seen[torch.arange(CONFIG.in_channels) % CONFIG.dim]
        return (0.7 * step.latent.double() + 0.3 * share[None, :, None, None, None]).float()

    def vae_first(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        return self._decode(latent, latent, 1), latent

    def vae_steady(self, latent: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        return self._decode(latent, cache, TEMPORAL), latent

    def _decode(self, latent: Tensor, before: Tensor, frames: int) -> Tensor:
        share = (torch.arange(frames, dtype=torch.float64) + 1)[:, None, None] / frames
        mixed = 0.3 * (share * latent[0, :3].double() + (1 - share) * before[0, :3].double())
        return mixed.float().repeat_interleave(SPATIAL, -2).repeat_interleave(SPATIAL, -1)[None]

    def vae_encode_step(self, frames: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        corner = 2 * frames.double()[:, :, :, ::SPATIAL, ::SPATIAL].mean(2, keepdim=True)
        new = corner[:, torch.arange(CONFIG.in_channels) % 3]
        latent = (new if cache is None else new + 0.5 * cache.double()).float()
        return latent, latent


def fake_pipeline(preset: Preset) -> Pipeline:
    return Pipeline(
        FakeStages(), Tokenizer(TOKENIZER), CONFIG, preset, "fake", torch.float32, torch.device("cpu"), HEIGHT, WIDTH,
        8.0, SPATIAL, TEMPORAL,
    )  # fmt: skip


def _tensors(**shapes: list[int]) -> list[dict[str, Any]]:
    whole = {"ids", "mask", *ROW_INPUTS[1], *ROW_INPUTS[2]}
    return [{"name": n, "shape": s, "dtype": "int64" if n.removeprefix("local_") in whole else "float32"}
            for n, s in shapes.items()]  # fmt: skip


def _graphs(preset: Preset, rows: int, version: int) -> dict[str, tuple[list, list]]:
    n, layers = preset.chunk * TOKENS, range(CONFIG.num_layers)
    heads = [CONFIG.num_attention_heads, CONFIG.attention_head_dim]
    latent, one = [1, CONFIG.in_channels, preset.chunk, HIGH, WIDE], [1, CONFIG.in_channels, 1, HIGH, WIDE]
    emb, text_kv = [1, rows, CONFIG.text_dim], [CONFIG.num_layers, 1, rows, *heads]
    hidden = [1, n, CONFIG.dim]

    def transformer(ring: Ring, **more: list[int]) -> list[dict[str, Any]]:
        angles = {f"rope_{side}": [n, CONFIG.attention_head_dim // 2] for side in ("cos", "sin")}
        text = {f"text_{side}_{i}": [1, rows, *heads] for side in "kv" for i in layers}
        groups = ring.groups(CONFIG)
        caches = {f"{group.prefix}{side}_{i}": [1, group.slots * TOKENS, group.heads[i] * heads[1]]
                  for group in groups for side in "kv" for i in layers if group.heads[i]}  # fmt: skip
        integers = {group.prefix + name: [1] for group in groups for name in ROW_INPUTS[version]}
        return _tensors(latent=latent, **more, **angles, **integers, **text, **caches)

    def vae(frames: int) -> list[int]:
        return [1, 3, frames, HEIGHT, WIDTH]

    family = FAMILIES[preset.family]
    graphs = {f"prepare_text_{role}": (_tensors(text_emb=emb), _tensors(text_k=text_kv, text_v=text_kv))
              for role in family.roles()}  # fmt: skip
    graphs["encode_text"] = _tensors(ids=[1, rows], mask=[1, rows]), _tensors(text_emb=emb)
    for kind in family.passes:
        more = ({"t": [1]} if kind.timed else {}) | ({"c_f": hidden} if kind.conditioned else {})
        result = _tensors(hidden=hidden) if kind.hidden else _tensors(flow=latent)
        graphs[kind.graph] = transformer(family.rings(preset)[kind.role], **more), result
    graphs["vae_first"] = _tensors(latent=one), _tensors(frames=vae(1), cache_0_out=one)
    graphs["vae_steady"] = _tensors(latent=one, cache_0=one), _tensors(frames=vae(TEMPORAL), cache_0_out=one)
    graphs["vae_encode_first"] = _tensors(frames=vae(1)), _tensors(latent=one, cache_0_out=one)
    graphs["vae_encode_steady"] = _tensors(frames=vae(TEMPORAL), cache_0=one), _tensors(latent=one, cache_0_out=one)
    return graphs


def _fields(preset: Preset, version: int) -> dict[str, Any]:
    """The preset's fields in a manifest. Version 1 counts a greedy window in chunks, without the current one."""
    chunks = version == 1 and preset.family == "greedy"
    return preset.table() | ({"window": preset.window // preset.chunk - 1} if chunks else {})


def write_fake_bundle(folder: Path, preset: Preset, version: int = 2) -> Path:
    """Write a bundle whose graphs are placeholders; only the fake plugin runs it. `version` is the manifest's."""
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    save_file({"nothing": np.zeros(1, np.float32)}, folder / "weights.safetensors")
    save_file({"frames": np.zeros((1, HEIGHT, WIDTH, 3), np.uint8)}, folder / "golden.safetensors")
    graphs = {}
    for name, (inputs, outputs) in _graphs(preset, Tokenizer(TOKENIZER).rows, version).items():
        file = folder / "graphs" / "aoti-cpu" / f"{name}.so"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{name}\n")
        mutates = [t["name"] for t in inputs if t["name"].removeprefix("local_")[:2] in ("k_", "v_")]
        graphs[name] = {"file": str(file.relative_to(folder)), "inputs": inputs, "outputs": outputs, "weights": {},
                        "aliases": {}, "mutates": mutates}  # fmt: skip
    written = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    files = {
        str(file.relative_to(folder)): {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in written
    }
    backend = {"backend": "aoti", "target": "cpu", "versions": {"torch": "2.13.0"}, "graphs": graphs}
    manifest = {
        "format": "greedy-bundle", "version": version, "preset_name": "fake", "preset": _fields(preset, version),
        "transformer": dataclasses.asdict(CONFIG), "precision": "fp32", "height": HEIGHT, "width": WIDTH, "fps": 8.0,
        "spatial": SPATIAL, "temporal": TEMPORAL, "text_rows": Tokenizer(TOKENIZER).rows,
        "weights": "weights.safetensors", "tokenizer": "tokenizer",
        "golden": {"file": "golden.safetensors", "prompt": "a", "seed": 0}, "files": files,
        "backends": {"aoti-cpu": backend},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return folder


if __name__ == "__main__":
    shutil.rmtree(RECORDED, ignore_errors=True)
    write_fake_bundle(RECORDED, Preset("greedy", solver="euler", shift=2.0, max_position=4), version=1)
