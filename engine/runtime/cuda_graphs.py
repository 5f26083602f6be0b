"""The torch backend's stages as CUDA graphs: captured once per set of caches, then replayed from static buffers.

A pass of a full-size transformer has some 500 launches. A GPU finishes them faster than the host can issue them. A
graph reads its changing arguments from device memory: latent, timestep, tables, prompt, slot and valid. So a running
stream captures nothing again.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from engine.model.cache import RingCache
from engine.model.transformer import TextKV
from engine.runtime.passes import Pass
from engine.runtime.stages import TorchStages, need

_FIXED = ("reuse", "short")  # fields of a pass that its graph is made for; the cache holds the residual


class Capture(Protocol):
    """Captures functions of static tensors."""

    def __call__(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Returns the outputs of `run`, and a function that computes them again in place."""
        ...

    def in_turn(self) -> AbstractContextManager[None]:
        """Within the block, the work that earlier blocks queued is done before what this one queues."""
        ...


class Capturer:
    """Captures passes that never overlap, so that their graphs share one memory pool.

    Overlapping passes need separate Capturers: libraries keep one workspace per stream of capture.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self._device, self._last = device, torch.cuda.Event()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Threads may call on CUDA streams of their own; without this they overwrite each other's static tensors."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._last)  # at first it waits for nothing
        try:
            yield
        finally:
            self._last.record(torch.cuda.current_stream(self._device))

    def __call__(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        before, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        self._stream.wait_stream(before)
        with torch.cuda.stream(before):  # restores it even if a capture fails half-way
            with torch.cuda.stream(self._stream):
                for _ in range(2):  # compile kernels and set up libraries now: a capture cannot contain that
                    run()
            before.wait_stream(self._stream)
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                outputs = run()
        return outputs, graph.replay


class _Graph:
    """One captured pass and its static arguments. Numbers are int32 scalars on the device."""

    def __init__(
        self, function: Callable[..., Any], args: tuple[Tensor | int, ...], advances: Sequence[Tensor], capture: Capture
    ) -> None:
        """advances: tensors that the function updates in place on every run. Capturing restores them."""
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        self._static = tuple(
            arg.clone() if isinstance(arg, Tensor) else torch.tensor(arg, dtype=torch.int32, device=device)
            for arg in args
        )
        before = [part.clone() for part in advances]
        try:
            self._output, self._replay = capture(lambda: function(*self._static))
        finally:
            _fill(advances, before)

    def __call__(self, *args: Tensor | int) -> Any:
        for static, arg in zip(self._static, args, strict=True):
            static.copy_(arg) if isinstance(arg, Tensor) else static.fill_(arg)
        self._replay()
        # The next replay overwrites the graph's own memory, so copy the output.
        return self._output.clone() if isinstance(self._output, Tensor) else self._output


class _VaeCache(list[Tensor]):
    """One stream's VAE caches. They keep a graph's addresses until the stream drops them."""


class GraphedStages:
    """Stages of one pipeline. Streams lease their caches here, so that a later stream reuses them and their graphs.

    vae_steady updates its cache in place.
    """

    name = "torch"

    def __init__(self, stages: TorchStages, capturer: Callable[[torch.device], Capture] = Capturer) -> None:
        if stages.eager:
            raise ValueError("cuda graphs: got eager stages, expected kernels (slots are on the device)")
        self._stages = stages
        self.capabilities = replace(stages.capabilities, moves_vae_cache=True)
        self.models, self.vae, self.text_encoder = stages.models, stages.vae, stages.text_encoder
        self.encode_text, self.prepare_text = stages.encode_text, stages.prepare_text
        self.vae_encode_step, self.modules = stages.vae_encode_step, stages.modules
        self.mapped_bytes = stages.mapped_bytes
        self.named_weights, self.plain = stages.named_weights, stages.plain
        self._lock = threading.RLock()  # streams in several threads share the graphs' static tensors
        device = next(iter(stages.models.values())).proj_out.weight.device
        self._capture, self._capture_vae = capturer(device), capturer(device)  # VAE and transformers overlap
        self._graphs: dict[Any, _Graph | None] = {}  # None: called once so far, eagerly
        self._text: dict[Any, list[Any]] = {}  # (role, shape) -> static K, static V, the prompt that they hold
        self._caches: dict[Any, list[RingCache]] = defaultdict(list)  # free ones, by constructor arguments
        self._vae_caches: dict[Any, list[list[Tensor]]] = defaultdict(list)  # free ones, by the first tensor's shape

    @property
    def captured(self) -> int:
        """Number of graphs captured so far; constant once warm."""
        return sum(graph is not None for graph in self._graphs.values())

    def make_cache(self, *args: Any, **options: Any) -> RingCache:
        """An empty RingCache of these arguments. Its memory is reused after the caller drops it."""
        with self._lock:
            free = self._caches[args, tuple(options.items())]
            whole = free.pop() if free else RingCache(*args, **options)
        lease = copy.copy(whole)
        lease.reset()
        weakref.finalize(lease, free.append, whole)
        return lease

    def run(self, step: Pass, cache: RingCache, text_kv: dict[str, TextKV]) -> Tensor:
        passes = [p for p in (step.context, step) if p is not None]
        if any(_wraps(p, cache) for p in passes):  # fused kernels cannot write it
            if step.context is not None:
                self.run(step.context, cache, text_kv)
                return self.run(replace(step, context=None), cache, text_kv)
            return self._stages.run(step, cache, text_kv)
        role, whole = step.kind.role, copy.copy(cache)  # a graph must not keep the lease itself
        if step.kind.conditioned and step.c_f is None:  # zero adds nothing: W_c rmsnorm(0) = 0
            latent, width = step.latent, self.models[role].config.dim
            passes[-1] = replace(step, c_f=latent.new_zeros(latent.shape[0], len(step.cos), width))
        changing = [_changing(p) for p in passes]
        with self._lock, self._capture.in_turn():
            text = self._static_text(role, text_kv[role])
            what = [(p.kind.graph, p.latent.shape, p.reuse, p.short) for p in passes]
            key = *what, cache.address, text[0].data_ptr()

            def again(*static: Any) -> Tensor:
                values, again = iter(static), None
                for p, names in zip(passes, changing, strict=True):
                    fixed: dict[str, Any] = {name: getattr(p, name) for name in _FIXED} | {"context": again}
                    again = Pass(p.kind, **{name: next(values) for name in names}, **fixed)
                return self._stages.run(cast(Pass, again), whole, {role: text})

            args = tuple(value for names in changing for value in names.values())
            return self._graph(key, again, args, lambda: _lost(step, whole), self._capture)

    def _graph(
        self, key: Any, function: Callable[..., Any], args: tuple[Tensor | int, ...],
        advances: Callable[[], Sequence[Tensor]], capture: Capture,
    ) -> Any:  # fmt: skip
        """Run function(*args): eagerly on the first call; capture on the second, then replay."""
        if key not in self._graphs:
            self._graphs[key] = None
            return function(*args)
        graph = self._graphs[key]
        if graph is None:
            graph = self._graphs[key] = _Graph(function, args, advances(), capture)
        return graph(*args)

    def _static_text(self, role: str, text: Any) -> tuple[Tensor, Tensor]:
        """Copy the prompt to the addresses that graphs read: K and V, each [layers, B, rows, heads, d]."""
        key = role, text[0].shape
        if key not in self._text:
            self._text[key] = [*map(torch.empty_like, text), None]
        static = self._text[key]
        if static[2] is not text:
            static[2] = None  # until both are filled: an interrupted call must not pass for a whole one
            _fill(static[:2], text)
            static[2] = text
        return static[0], static[1]

    def vae_first(self, latent: Tensor) -> tuple[Tensor, list[Tensor]]:
        with self._lock, self._capture_vae.in_turn(), _best_convolutions():
            frames, cache = self._stages.vae_first(latent)
            free = self._vae_caches[cache[0].shape]
            whole = free.pop() if free else [torch.empty_like(part) for part in cache]
            lease = _VaeCache(whole)
            weakref.finalize(lease, free.append, whole)
            _fill(whole, cache)
        return frames, lease

    def vae_steady(self, latent: Tensor, cache: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        vae, static = need(self.vae, "VAE"), list(cache)  # a graph must not keep the lease itself
        key = "vae_steady", cache[0].data_ptr(), latent.shape
        run = lambda latent: vae.steady(latent, tuple(static), in_place=True)[0]  # noqa: E731
        with self._lock, self._capture_vae.in_turn(), _best_convolutions():
            return self._graph(key, run, (latent,), lambda: static, self._capture_vae), cache


def _wraps(step: Pass, cache: RingCache) -> bool:
    """Whether the pass writes beyond the end of a ring, and goes on after its attention sink."""
    slots = zip((step.slot, step.local_slot), cache.rings, strict=False)
    return any(slot is not None and slot + step.frames > ring.slots for slot, ring in slots)


def _lost(step: Pass, cache: RingCache) -> list[Tensor]:
    """Rows of a full ring that the step writes over and its context reads: a capture's runs must start alike."""
    context, found = step.context, list[Tensor]()
    if context is None:
        return found
    slots = (step.slot, context.valid), (step.local_slot, context.local_valid)
    for ring, (slot, valid) in zip(cache.rings, slots, strict=False):
        if slot is not None and valid is not None and slot < valid:
            found += ring.slots_from(int(slot), step.frames)
    return found


def _changing(step: Pass) -> dict[str, Tensor | int]:
    """The fields of a pass that differ between two runs of its graph."""
    values = {f.name: getattr(step, f.name) for f in fields(step) if f.name not in ("kind", "context", *_FIXED)}
    return {name: value for name, value in values.items() if value is not None}


def _best_convolutions() -> AbstractContextManager[Any]:
    """Let cuDNN benchmark its algorithms on the first call of each shape, which precedes the capture."""
    cudnn = torch.backends.cudnn
    return cudnn.flags(
        enabled=True, benchmark=True, deterministic=cudnn.deterministic, allow_tf32=cudnn.allow_tf32
    )  # fmt: skip


def _fill(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
