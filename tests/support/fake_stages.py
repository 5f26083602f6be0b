"""Stages that are short formulas, the same as csrc/tests/fake_plugin.cpp, and a bundle for them.

What the C++ core feeds its graphs with, keeps and publishes is then compared with the engine's own loop, for every kind
of stream, in seconds.

`python tests/support/fake_stages.py` writes csrc/tests/fake.bundle.
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

from engine.config import Preset, TransformerConfig
from engine.model.cache import RingCache
from engine.model.text import Tokenizer
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
    """The formulas of csrc/tests/fake_plugin.cpp in float64, results in float32."""

    name = "fake"

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        values = (ids[..., None] * 31 + torch.arange(CONFIG.text_dim) * 7) % 97
        return torch.where(mask[..., None] > 0, values.float() / 97 - 0.5, 0)

    def prepare_text(self, text_emb: Tensor) -> list[tuple[float, float]]:
        """Means of every layer's keys and values: all that the formulas use."""
        i, emb, wide = torch.arange(CONFIG.dim), text_emb[0].double(), CONFIG.text_dim
        layers = range(CONFIG.num_layers)
        return [(emb[:, (n + i) % wide].mean().item(), emb[:, (2 * n + 3 * i) % wide].mean().item()) for n in layers]

    def _pass(
        self, latent: Tensor, t: Tensor | None, c_f: Tensor | None, cos: Tensor, sin: Tensor, slot: int, valid: int,
        cache: RingCache, text: list[tuple[float, float]],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
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
            cache.write(layer, slot, k.float().reshape(heads), v.float().reshape(heads))
            for side in cache.view(layer):
                seen += side[0, : valid * cache.tokens].flatten(1).double().mean(0)
        return level, seen

    def _hidden(self, *args: Any) -> Tensor:
        level, seen = self._pass(*args)
        return (0.5 * level + 0.5 * seen).float()[None]

    def _flow(self, latent: Tensor, *args: Any) -> Tensor:
        _, seen = self._pass(latent, *args)
        share = seen[torch.arange(CONFIG.in_channels) % CONFIG.dim]
        return (0.7 * latent.double() + 0.3 * share[None, :, None, None, None]).float()

    def etm(self, latent, cos, sin, slot, valid, cache, text_kv) -> Tensor:
        return self._hidden(latent, None, None, cos, sin, slot, valid, cache, text_kv)

    def sdd_context(self, latent, cos, sin, slot, valid, cache, text_kv) -> None:
        self._hidden(latent, None, None, cos, sin, slot, valid, cache, text_kv)

    def sdd(self, latent, t, c_f, cos, sin, valid, cache, text_kv) -> Tensor:
        return self._flow(latent, t, c_f, cos, sin, 0, valid, cache, text_kv)

    def dit(self, latent, t, cos, sin, slot, valid, cache, text_kv) -> Tensor:
        return self._flow(latent, t, None, cos, sin, slot, valid, cache, text_kv)

    def vae_first(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        return self._decode(latent, latent, 1), latent

    def vae_steady(self, latent: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        return self._decode(latent, cache, TEMPORAL), latent

    def _decode(self, latent: Tensor, before: Tensor, frames: int) -> Tensor:
        share = (torch.arange(frames, dtype=torch.float64) + 1)[:, None, None] / frames
        mixed = 0.3 * (share * latent[0, :3].double() + (1 - share) * before[0, :3].double())
        return mixed.float().repeat_interleave(SPATIAL, -2).repeat_interleave(SPATIAL, -1)[None]

    def vae_encode(self, video: Tensor) -> Tensor:
        latents: list[Tensor] = []
        for frames in video.double().split([1] + [TEMPORAL] * ((video.shape[2] - 1) // TEMPORAL), dim=2):
            corner = 2 * frames[:, :, :, ::SPATIAL, ::SPATIAL].mean(2, keepdim=True)
            new = corner[:, torch.arange(CONFIG.in_channels) % 3]
            latents.append((new + 0.5 * latents[-1].double() if latents else new).float())
        return torch.cat(latents, dim=2)


def fake_pipeline(preset: Preset) -> Pipeline:
    return Pipeline(
        FakeStages(), Tokenizer(TOKENIZER), CONFIG, preset, "fake", torch.float32, torch.device("cpu"), HEIGHT, WIDTH,
        8.0, SPATIAL, TEMPORAL,
    )  # fmt: skip


def _tensors(**shapes: list[int]) -> list[dict[str, Any]]:
    whole = {"ids", "mask", "write_idx", "kv_len"}
    return [{"name": n, "shape": s, "dtype": "int64" if n in whole else "float32"} for n, s in shapes.items()]


def _graphs(preset: Preset, rows: int) -> dict[str, tuple[list, list]]:
    n, layers = preset.chunk * TOKENS, range(CONFIG.num_layers)
    heads = [CONFIG.num_attention_heads, CONFIG.attention_head_dim]
    latent, one = [1, CONFIG.in_channels, preset.chunk, HIGH, WIDE], [1, CONFIG.in_channels, 1, HIGH, WIDE]
    emb, text_kv = [1, rows, CONFIG.text_dim], [CONFIG.num_layers, 1, rows, *heads]
    hidden = [1, n, CONFIG.dim]

    def transformer(slots: int, **more: list[int]) -> list[dict[str, Any]]:
        angles = {f"rope_{side}": [n, CONFIG.attention_head_dim // 2] for side in ("cos", "sin")}
        text = {f"text_{side}_{i}": [1, rows, *heads] for side in "kv" for i in layers}
        caches = {f"{side}_{i}": [1, slots * TOKENS, CONFIG.dim] for side in "kv" for i in layers}
        return _tensors(latent=latent, **more, **angles, write_idx=[1], kv_len=[1], **text, **caches)

    def vae(frames: int) -> list[int]:
        return [1, 3, frames, HEIGHT, WIDTH]

    greedy = preset.family == "greedy"
    graphs = {f"prepare_text_{role}": (_tensors(text_emb=emb), _tensors(text_k=text_kv, text_v=text_kv))
              for role in (("etm", "sdd") if greedy else ("dit",))}  # fmt: skip
    graphs["encode_text"] = _tensors(ids=[1, rows], mask=[1, rows]), _tensors(text_emb=emb)
    if greedy:
        graphs["etm"] = transformer((preset.window + 1) * preset.chunk), _tensors(hidden=hidden)
        graphs["sdd_context"] = transformer(3 * preset.chunk), _tensors(hidden=hidden)
        graphs["sdd"] = transformer(3 * preset.chunk, t=[1], c_f=hidden), _tensors(flow=latent)
    else:
        graphs["dit"] = transformer(preset.window, t=[1]), _tensors(flow=latent)
    graphs["vae_first"] = _tensors(latent=one), _tensors(frames=vae(1), cache_0_out=one)
    graphs["vae_steady"] = _tensors(latent=one, cache_0=one), _tensors(frames=vae(TEMPORAL), cache_0_out=one)
    graphs["vae_encode_first"] = _tensors(frames=vae(1)), _tensors(latent=one, cache_0_out=one)
    graphs["vae_encode_steady"] = _tensors(frames=vae(TEMPORAL), cache_0=one), _tensors(latent=one, cache_0_out=one)
    return graphs


def write_fake_bundle(folder: Path, preset: Preset) -> Path:
    """A bundle whose graphs are empty files; only the fake plugin runs it."""
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    save_file({"nothing": np.zeros(1, np.float32)}, folder / "weights.safetensors")
    save_file({"frames": np.zeros((1, HEIGHT, WIDTH, 3), np.uint8)}, folder / "golden.safetensors")
    graphs = {}
    for name, (inputs, outputs) in _graphs(preset, Tokenizer(TOKENIZER).rows).items():
        file = folder / "graphs" / "aoti-cpu" / f"{name}.so"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{name}\n")
        mutates = [t["name"] for t in inputs if t["name"][:2] in ("k_", "v_")]
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
        "format": "greedy-bundle", "version": 1, "preset_name": "fake", "preset": dataclasses.asdict(preset),
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
    write_fake_bundle(RECORDED, Preset("greedy", solver="euler", shift=2.0, max_position=4))
