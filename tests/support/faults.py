"""Faults of a streaming engine, planted on purpose: every gate must see each of them.

A fault changes what the stages are asked to do, as a wrong kernel or a wrong loop would.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch

from engine.model.cache import CachedAttention
from engine.runtime import cuda_graphs
from engine.runtime.cuda_graphs import GraphedStages
from engine.runtime.stages import TorchStages


def _changed_pass(change):
    """A patch under which every pass is changed before it runs."""

    @contextmanager
    def planted() -> Iterator[None]:
        inside: list[int] = []
        with (
            mock.patch.object(TorchStages, "run", _before(TorchStages.run, change, inside)),
            mock.patch.object(GraphedStages, "run", _before(GraphedStages.run, change, inside)),
        ):
            yield

    return planted


def _before(run, change, inside):
    """`run` of a changed pass. GraphedStages calls TorchStages: the pass is changed once."""

    def wrapped(self, step, cache, text_kv):
        if inside:
            return run(self, step, cache, text_kv)
        inside.append(1)
        try:
            return run(self, change(step), cache, text_kv)
        finally:
            inside.pop()

    return wrapped


def _forget(step):
    """The last written slot is not attended to."""
    return replace(step, valid=step.valid - 1) if step.valid > step.frames else step


_first: dict[tuple, tuple] = {}


def _stuck(step):
    """Every chunk is rotated as if it were at the first position."""
    tables = _first.setdefault((step.kind.role, step.cos.shape, step.cos.device), (step.cos, step.sin))
    return replace(step, cos=tables[0], sin=tables[1])


@contextmanager
def _attention_zero() -> Iterator[None]:
    def zero(self, layer, q, k, v):
        self.cache.write(layer, self.slot, k, v)
        return torch.zeros_like(q)

    def fused(self, layer, qkv, *rest):
        return torch.zeros_like(inner(self, layer, qkv, *rest))

    inner = CachedAttention.fused
    with mock.patch.multiple(CachedAttention, __call__=zero, fused=fused):
        yield


@contextmanager
def _frozen() -> Iterator[None]:
    """A graph keeps the slot numbers of its capture."""

    def call(self, *args):
        for static, arg in zip(self._static, args, strict=True):
            if isinstance(arg, torch.Tensor):
                static.copy_(arg)
        self._replay()
        return self._output.clone() if isinstance(self._output, torch.Tensor) else self._output

    with mock.patch.object(cuda_graphs._Graph, "__call__", call):
        yield


# name -> a context in which the fault is there
FAULTS = {
    "last slot forgotten": _changed_pass(_forget),
    "rotation stuck": _changed_pass(_stuck),
    "keys to slot 0": _changed_pass(lambda step: replace(step, slot=0)),
    "attention zero": _attention_zero,
}
GRAPH_FAULTS = {"slot numbers frozen": _frozen}
