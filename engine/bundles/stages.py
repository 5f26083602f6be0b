"""Stages over the named graphs of a bundle, for every runtime.

A backend only opens one graph. This file defines which tensors go into which graph, and under which name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.bundles.hashes import check_hash, check_hashes, used_files
from engine.bundles.manifest import BackendSpec, GraphSpec, Manifest, TensorSpec
from engine.bundles.memory import plan_bundle
from engine.model.cache import RingCache
from engine.runtime.memory_plan import MemoryPlan
from engine.runtime.passes import Capabilities, Pass

DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn, "int64": torch.int64,
}  # fmt: skip


class NotHere(ValueError):
    """The bundle is intact, but this machine cannot run these graphs."""


class StageGraph(Protocol):
    """One opened graph: takes and returns named tensors."""

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


class Weights:
    """The bundle's weights, memory-mapped once and shared by every graph."""

    def __init__(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as opened:
                self.tensors: dict[str, Tensor] = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(f"{file}: got an unreadable file, expected safetensors ({error})") from None

    def of(self, graph: str, spec: GraphSpec) -> dict[str, Tensor]:
        """A graph's constants: its own names -> values. ValueError for a missing weight."""
        for key in spec.weights.values():
            if key not in self.tensors:
                raise ValueError(f"{graph}: got no weight {key!r} in the bundle, expected it")
        return {name: self.tensors[key] for name, key in spec.weights.items()}


def check_inputs(graph: str, specs: list[TensorSpec], inputs: Mapping[str, Tensor], device: torch.device) -> None:
    """ValueError unless names, shapes, dtypes and device match the manifest. No runtime checks all of them."""
    if inputs.keys() != {spec.name for spec in specs}:
        odd = sorted(inputs.keys() ^ {spec.name for spec in specs})
        raise ValueError(f"{graph}: got inputs that differ in {', '.join(odd[:3])}, expected the manifest's")
    for spec in specs:
        x = inputs[spec.name]
        if list(x.shape) != spec.shape or x.dtype != DTYPES[spec.dtype] or x.device.type != device.type:
            got = f"{x.device.type} {str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
            raise ValueError(f"{graph}: {spec.name}: got {got}, expected {device.type} {spec.dtype} {spec.shape}")


def slots_in(
    step: Pass, ring: RingCache, slot: int | Tensor | None, valid: int | Tensor | None
) -> tuple[int | Tensor, int | Tensor]:
    """slot and valid in a ring. ValueError unless the chunk fits without wrapping, which no graph checks."""
    if slot is None or valid is None or not 0 <= slot <= ring.slots - step.frames or not 0 < valid <= ring.slots:
        raise ValueError(f"{step.kind.graph}: got slot {slot} and {valid} valid ones for "
                         f"{step.frames} frames, expected room in {ring.slots} slots")  # fmt: skip
    return slot, valid


class GraphStages(ABC):
    """Stages of one backend of a bundle. The constructor opens every graph, except those that encode images."""

    name: str
    capabilities = Capabilities(whole_chunks=True)
    make_cache = RingCache
    packs = False  # True: the runtime copies weights into a layout of its own
    executable = False  # True: graphs are machine code, whose sha256 is always compared

    def __init__(
        self, folder: Path, manifest: Manifest, backend: BackendSpec, threads: int, device: torch.device,
        verify: bool = True, planned: Callable[[MemoryPlan], object] | None = None,
    ) -> None:  # fmt: skip
        """verify compares the sha256 of weights and graphs with the manifest before anything is opened.

        planned gets the memory plan before that; what it raises ends the call. MemoryError where it does not fit.
        """
        self.plan = plan_bundle(folder, manifest, backend, device, self.packs)
        if planned is not None:
            planned(self.plan)
        self.plan.check()
        self.folder, self.manifest, self.backend = folder, manifest, backend
        self.threads, self.device = threads, device
        self.layers = manifest.transformer_value().num_layers
        if verify:
            check_hashes(folder, manifest, used_files(manifest, backend))
        elif self.executable:
            check_hashes(folder, manifest, (graph.file for graph in backend.graphs.values()))
        self.weights = Weights(folder / manifest.weights)
        for name, graph in backend.graphs.items():
            self.weights.of(name, graph)
        self._graphs = {name: self._open(name) for name in backend.graphs if not name.startswith("vae_encode")}

    @abstractmethod
    def open_graph(self, name: str, file: Path, spec: GraphSpec) -> StageGraph:
        """Load one graph; ValueError if it differs from the manifest."""

    def _open(self, name: str) -> StageGraph:
        spec = self.backend.graphs[name]
        return self.open_graph(name, self.folder / spec.file, spec)

    def run_graph(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one graph by its name in the manifest; opens it on first use."""
        if name not in self._graphs:
            if self.executable:  # it may have changed since
                check_hash(self.folder, self.manifest, self.backend.graphs[name].file)
            self._graphs[name] = self._open(name)
        return self._graphs[name](inputs)

    def modules(self) -> dict[str, nn.Module]:
        return {}

    def mapped_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.weights.tensors.values())

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        return ((f"{self.folder / self.manifest.weights}: {name}", x) for name, x in self.weights.tensors.items())

    def plain(self) -> "GraphStages":
        return self

    @property
    def token_rows(self) -> int | None:
        """Rows of the text encoder's table; None if the bundle names none."""
        for key in self.backend.graphs["encode_text"].weights.values():
            table = self.weights.tensors[key]
            if table.ndim == 2 and key.replace(".", "_").endswith(("embed_tokens_weight", "shared_weight")):
                return len(table)
        return None

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        # A graph may abort at a token outside the table.
        rows, least, largest = self.token_rows, int(ids.min()), int(ids.max())
        if rows is not None and not (least >= 0 and largest < rows):
            raise ValueError(f"encode_text: got tokens {least} to {largest}, expected 0 to {rows - 1}")
        return self.run_graph("encode_text", {"ids": ids, "mask": mask})["text_emb"]

    def prepare_text(self, text_emb: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        prefix, text = "prepare_text_", {}
        for name in self.backend.graphs:
            if name.startswith(prefix):
                out = self.run_graph(name, {"text_emb": text_emb})
                text[name.removeprefix(prefix)] = out["text_k"], out["text_v"]
        return text

    def run(self, step: Pass, cache: RingCache, text_kv: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        kind = step.kind
        slots = (step.slot, step.valid), (step.local_slot, step.local_valid)
        groups = [(prefix, ring, slots_in(step, ring, *own))
                  for prefix, ring, own in zip(("", "local_"), cache.rings, slots, strict=False)]  # fmt: skip
        inputs = {"latent": step.latent, "rope_cos": step.cos, "rope_sin": step.sin}
        if step.t is not None:
            inputs["t"] = step.t
        if kind.conditioned:  # zero adds nothing: W_c rmsnorm(0) = 0
            inputs["c_f"] = self._zero_of(kind.graph, "c_f") if step.c_f is None else step.c_f
        for side, whole in zip("kv", text_kv[kind.role], strict=True):
            inputs |= {f"text_{side}_{layer}": whole[layer] for layer in range(self.layers)}
        for prefix, ring, own in groups:
            for name, slot in zip(self.manifest.row_inputs, own, strict=True):
                inputs[prefix + name] = torch.tensor([slot * ring.tokens], device=self.device)
            for layer in (layer for layer, heads in enumerate(ring.heads) if heads):
                for side, past in zip("kv", ring.view(layer), strict=True):
                    # Graphs take rows [B, rows, dim]. Only V in FP8 keeps its layout, with rows as the last axis.
                    inputs[f"{prefix}{side}_{layer}"] = past if ring.fp8 and side == "v" else past.flatten(2)
        return self.run_graph(kind.graph, inputs)["hidden" if kind.hidden else "flow"]

    def _zero_of(self, graph: str, name: str) -> Tensor:
        spec = next(i for i in self.backend.graphs[graph].inputs if i.name == name)
        return torch.zeros(spec.shape, dtype=DTYPES[spec.dtype], device=self.device)

    def vae_first(self, latent: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self._vae("vae_first", "latent", latent, [])

    def vae_steady(self, latent: Tensor, cache: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return self._vae("vae_steady", "latent", latent, cache)

    def vae_encode_step(self, frames: Tensor, cache: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        name = "vae_encode_first" if cache is None else "vae_encode_steady"
        return self._vae(name, "frames", frames, cache or [])

    def _vae(self, name: str, what: str, x: Tensor, cache: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        out = list(self.run_graph(name, {what: x} | {f"cache_{i}": c for i, c in enumerate(cache)}).values())
        return out[0], out[1:]
