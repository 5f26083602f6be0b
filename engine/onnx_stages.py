"""The onnx backend: the stage functions of generators.Stages on ONNX Runtime sessions of a bundle.

Caches are the engine's own RingCache memory, bound as input and as output of the same call: a step copies nothing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from engine.bundle import BackendSpec, GraphSpec, Manifest, TensorSpec
from engine.cache import RingCache

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int64": torch.int64}
_ORT_TYPES = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16", "int64": "int64"}
_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise ImportError("onnx backend: got no package onnxruntime, expected it (extra `onnx`)") from None
    return onnxruntime


class Weights:
    """The bundle's weights, mapped once and shared by every session."""

    def __init__(self, file: Path) -> None:
        with safe_open(file, framework="pt") as opened:
            self.tensors: dict[str, Tensor] = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


class GraphSession:
    """One graph: inputs are checked against the manifest, outputs are new tensors or the inputs they replace."""

    def __init__(self, name: str, file: Path, spec: GraphSpec, weights: Weights, threads: int) -> None:
        ort = _runtime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Every session has threads of its own; while one works, those of the others would spin on the same cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        names, given = [], []
        for graph_name, key in spec.weights.items():
            if key not in weights.tensors:
                raise ValueError(f"{file.name}: got no weight {key!r} in the bundle, expected it")
            names.append(graph_name)
            given.append(ort.OrtValue.ortvalue_from_numpy(weights.tensors[key].numpy()))
        if names:
            options.add_external_initializers(names, given)
        try:
            self.session = ort.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ValueError(f"{file}: got a graph that does not load, expected ONNX ({str(error)[:200]})") from None
        self._kept = given  # the session reads this memory
        self.name, self.spec = name, spec
        self.inputs = {tensor.name: tensor for tensor in spec.inputs}
        # What is bound is memory of the manifest's shapes: a lie would let the runtime read or write past it.
        for specs, found in ((spec.inputs, self.session.get_inputs()), (spec.outputs, self.session.get_outputs())):
            told = {t.name: (t.shape, f"tensor({_ORT_TYPES[t.dtype]})") for t in specs}
            real = {t.name: (list(t.shape), t.type) for t in found}
            for key in sorted(told.keys() | real.keys()):
                if told.get(key) != real.get(key):
                    raise ValueError(f"{file}: {key}: got {told.get(key)} in the manifest, expected {real.get(key)}")
        if any(self.inputs.get(target) is None for target in spec.aliases.values()):
            raise ValueError(f"{file}: got an alias of no input, expected inputs only")

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run; an output with an alias is written over that input."""
        binding = self.session.io_binding()
        if inputs.keys() != self.inputs.keys():
            odd = sorted(inputs.keys() ^ self.inputs.keys())
            raise ValueError(f"{self.name}: got inputs that differ in {', '.join(odd[:3])}, expected the manifest's")
        kept = {name: tensor.contiguous() for name, tensor in inputs.items()}
        for name, tensor in kept.items():
            _check(self.name, self.inputs[name], tensor)
            binding.bind_input(name, "cpu", 0, _NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        outputs: dict[str, Tensor] = {}
        for spec in self.spec.outputs:
            alias = self.spec.aliases.get(spec.name)
            tensor = inputs[alias] if alias else torch.empty(spec.shape, dtype=_DTYPES[spec.dtype])
            outputs[spec.name] = tensor
            binding.bind_output(spec.name, "cpu", 0, _NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        self.session.run_with_iobinding(binding)
        return outputs


def _check(graph: str, spec: TensorSpec, tensor: Tensor) -> None:
    if list(tensor.shape) != spec.shape or tensor.dtype != _DTYPES[spec.dtype] or tensor.device.type != "cpu":
        got = f"{tensor.device.type} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise ValueError(f"{graph}: {spec.name}: got {got}, expected cpu {spec.dtype} {spec.shape}")


class OnnxStages:
    """Stages of a bundle's onnx backend. Every graph is opened at once, but those that only encode images."""

    name = "onnx"

    def __init__(self, folder: Path, manifest: Manifest, backend: BackendSpec, threads: int) -> None:
        self.folder, self.manifest, self.backend, self.threads = folder, manifest, backend, threads
        self.layers = manifest.transformer_value().num_layers
        roles = ("etm", "sdd") if manifest.preset_value().family == "greedy" else ("dit",)
        needed = {"encode_text", "vae_first", "vae_steady", "vae_encode_first", "vae_encode_steady", *roles}
        needed |= {f"prepare_text_{role}" for role in roles} | ({"sdd_context"} if "sdd" in roles else set())
        if missing := sorted(needed - backend.graphs.keys()):
            raise ValueError(f"bundle: got no graph {missing[0]}, expected {', '.join(sorted(needed))}")
        self.weights = Weights(folder / manifest.weights)
        self._sessions = {name: self._open(name) for name in backend.graphs if not name.startswith("vae_encode")}

    def _open(self, name: str) -> GraphSession:
        spec = self.backend.graphs[name]
        return GraphSession(name, self.folder / spec.file, spec, self.weights, self.threads)

    def _run(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if name not in self._sessions:
            self._sessions[name] = self._open(name)
        return self._sessions[name](inputs)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self._run("encode_text", {"ids": ids, "mask": mask})["text_emb"]

    def prepare_text(self, text_emb: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        prefix, text = "prepare_text_", {}
        for name in self.backend.graphs:
            if name.startswith(prefix):
                out = self._run(name, {"text_emb": text_emb})
                text[name.removeprefix(prefix)] = out["text_k"], out["text_v"]
        return text

    def _transformer(
        self, name: str, inputs: dict[str, Tensor], slot: int, valid: int, cache: RingCache,
        text: tuple[Tensor, Tensor],
    ) -> dict[str, Tensor]:  # fmt: skip
        inputs["write_idx"] = torch.tensor([slot * cache.tokens])
        inputs["kv_len"] = torch.tensor([valid * cache.tokens])
        for layer in range(self.layers):
            for side, whole, past in zip("kv", text, cache.view(layer), strict=True):
                inputs[f"text_{side}_{layer}"] = whole[layer]
                inputs[f"{side}_{layer}"] = past.flatten(2)
        return self._run(name, inputs)

    def etm(
        self, latent: Tensor, cos: Tensor, sin: Tensor, slot: int, valid: int, cache: RingCache,
        text_kv: dict[str, tuple[Tensor, Tensor]],
    ) -> Tensor:  # fmt: skip
        given = {"latent": latent, "rope_cos": cos, "rope_sin": sin}
        return self._transformer("etm", given, slot, valid, cache, text_kv["etm"])["hidden"]

    def sdd_context(
        self, latent: Tensor, cos: Tensor, sin: Tensor, slot: int, valid: int, cache: RingCache,
        text_kv: dict[str, tuple[Tensor, Tensor]],
    ) -> None:  # fmt: skip
        given = {"latent": latent, "rope_cos": cos, "rope_sin": sin}
        self._transformer("sdd_context", given, slot, valid, cache, text_kv["sdd"])

    def sdd(
        self, latent: Tensor, t: Tensor, c_f: Tensor | None, cos: Tensor, sin: Tensor, valid: int,
        cache: RingCache, text_kv: dict[str, tuple[Tensor, Tensor]],
    ) -> Tensor:  # fmt: skip
        if c_f is None:  # zero adds nothing: W_c rmsnorm(0) = 0
            spec = next(i for i in self.backend.graphs["sdd"].inputs if i.name == "c_f")
            c_f = torch.zeros(spec.shape, dtype=_DTYPES[spec.dtype])
        given = {"latent": latent, "t": t, "c_f": c_f, "rope_cos": cos, "rope_sin": sin}
        return self._transformer("sdd", given, 0, valid, cache, text_kv["sdd"])["flow"]

    def dit(
        self, latent: Tensor, t: Tensor, cos: Tensor, sin: Tensor, slot: int, valid: int, cache: RingCache,
        text_kv: dict[str, tuple[Tensor, Tensor]],
    ) -> Tensor:  # fmt: skip
        given = {"latent": latent, "t": t, "rope_cos": cos, "rope_sin": sin}
        return self._transformer("dit", given, slot, valid, cache, text_kv["dit"])["flow"]

    def vae_first(self, latent: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self._vae("vae_first", "latent", latent, [])

    def vae_steady(self, latent: Tensor, cache: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return self._vae("vae_steady", "latent", latent, cache)

    def vae_encode(self, video: Tensor) -> Tensor:
        latents: list[Tensor] = []
        cache: list[Tensor] = []
        for start, stop in _spans(video.shape[2], self.manifest.temporal):
            graph = "vae_encode_steady" if start else "vae_encode_first"
            latent, cache = self._vae(graph, "frames", video[:, :, start:stop], cache)
            latents.append(latent)
        return torch.cat(latents, dim=2)

    def _vae(self, name: str, what: str, x: Tensor, cache: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        out = list(self._run(name, {what: x} | {f"cache_{i}": c for i, c in enumerate(cache)}).values())
        return out[0], out[1:]


def _spans(frames: int, step: int) -> list[tuple[int, int]]:
    """The first frame alone, then `step` at a time."""
    return [(0, 1)] + [(start, start + step) for start in range(1, frames, step)]
