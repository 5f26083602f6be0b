"""Merges adapters into transformers, and merges them anew at other strengths while streams run.

Weights are always computed from the base, never by subtracting. So strengths that come back bring the same bits back.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.transformer import WanTransformer
from engine.weights.lora.form import Change, LoRA


def merged(base: Tensor, steps: Sequence[tuple[Change, float]]) -> Tensor:
    """`base` with each change at its strength, one after the other, in base's dtype: a new tensor, unless all are 0."""
    weight = base
    for change, strength in steps:
        if strength != 0:
            weight = _changed(weight, base, change, strength)
    return weight


def merge_into(model: WanTransformer, adapters: Sequence[tuple[LoRA, float]]) -> dict[str, Tensor]:
    """Merge adapters into the parameters that they change, before `model.fuse`; returns those parameters' base.

    Each of these parameters becomes a new tensor, because the old one may be mapped to its file. ValueError for an
    adapter that does not fit, or a result that is not finite; nothing has changed then.
    """
    for lora, _ in adapters:
        lora.fit({name: tuple(p.shape) for name, p in model.named_parameters()})
    touched = dict.fromkeys(name for lora, _ in adapters for name in lora.changes)
    bases = {name: model.get_parameter(name).detach() for name in touched}
    values = {name: _checked(name, base, adapters) for name, base in bases.items()}
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        own = value.clone() if value is bases[name] else value
        setattr(model.get_submodule(path), leaf, nn.Parameter(own, requires_grad=False))
    return bases


class Adapters:
    """A pipeline's adapters: their names, the strengths of its loading, and those at which the weights stand now.

    All streams share the weights, and captured graphs hold their addresses. So `at` writes them in place, from a base
    that is kept: on a processor the tensors of loading (mapped to their file where dtypes agree), elsewhere copies in
    host memory.
    """

    def __init__(self, loras: Mapping[str, LoRA], strengths: Mapping[str, float]) -> None:
        self.loras, self.strengths = dict(loras), dict(strengths)
        self._bases: dict[str, dict[str, Tensor]] = {}  # by role and parameter
        self._current: dict[str, float] | None = dict(strengths)  # None: a failure left the weights at no strengths
        self._lock = threading.RLock()

    @property
    def notes(self) -> list[str]:
        """What was skipped in the adapters' files."""
        return [note for lora in self.loras.values() for note in lora.notes]

    def merge(self, role: str, model: WanTransformer) -> None:
        """Merge all adapters into one role's transformer, before `model.fuse`; ValueError as `merge_into`."""
        bases = merge_into(model, [(lora, self.strengths[name]) for name, lora in self.loras.items()])
        self._bases[role] = {name: base.to("cpu") for name, base in bases.items()}

    def checked(self, strengths: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
        """`before` with new strengths. ValueError for an unknown name or a strength that is not finite."""
        for name, strength in strengths.items():
            if name not in self.loras:
                raise ValueError(f"adapters: got the name {name!r}, expected one of {', '.join(self.loras)}")
            check_strength(strength)
        return {**before, **{name: float(strength) for name, strength in strengths.items()}}

    @contextmanager
    def at(self, strengths: Mapping[str, float], models: Mapping[str, nn.Module]) -> Iterator[None]:
        """Within the block the weights are those of these strengths, and no other thread changes them.

        Where another stream has left others, this computes every parameter of the adapters that differ, of all roles:
        it reads their base (from host memory, if the weights are on a GPU), multiplies and writes. ValueError for a
        result that is not finite.
        """
        with self._lock:
            if self._current != strengths:
                before, self._current = self._current, None
                changed = [name for name, s in strengths.items() if before is None or before[name] != s]
                for role, bases in self._bases.items():
                    self._write(bases, models[role], strengths, changed)
                self._current = dict(strengths)
            yield

    @torch.inference_mode()
    def _write(
        self, bases: Mapping[str, Tensor], model: nn.Module, strengths: Mapping[str, float], changed: Sequence[str]
    ) -> None:
        if not isinstance(model, WanTransformer):
            raise ValueError(f"adapters: got a {type(model).__name__}, expected this project's transformer")
        device = model.proj_out.weight.device
        adapters = [(lora, strengths[name]) for name, lora in self.loras.items()]
        _wait(device)  # other threads' streams may still read the weights
        for name, base in bases.items():
            if any(name in self.loras[one].changes for one in changed):
                model.write(name, _checked(name, base.to(device), adapters))
        _wait(device)


def check_strength(strength: object) -> None:
    """ValueError unless it is a finite number."""
    try:
        finite = isinstance(strength, Real) and not isinstance(strength, bool) and isfinite(strength)
    except OverflowError:  # an integer beyond the floats
        finite = False
    if not finite:
        raise ValueError(f"adapter: got strength {str(strength)[:40]}, expected a finite number")


def _checked(name: str, base: Tensor, adapters: Sequence[tuple[LoRA, float]]) -> Tensor:
    """The merged parameter. ValueError if it is not finite."""
    steps = [(lora, strength) for lora, strength in adapters if name in lora.changes]
    value = merged(base, [(lora.changes[name], strength) for lora, strength in steps])
    if value is not base and not value.isfinite().all():
        used = ", ".join(f"{lora.path} at {strength:g}" for lora, strength in steps)
        raise ValueError(
            f"adapter {used}: got weights of {name.removesuffix('.weight')} that are not finite, expected numbers"
        )
    return value


def _changed(weight: Tensor, base: Tensor, change: Change, strength: float) -> Tensor:
    """One change with PEFT's bits: A and B in W's dtype, the product in float32, rounded before the sum."""
    if change.up is not None and change.down is not None:
        a, b = (matrix.to(weight).float() for matrix in (change.down, change.up))
        delta = _product(a, b) * (change.scale * strength)
        if change.magnitude is None:
            weight = weight + delta.to(weight.dtype)
        else:  # PEFT takes the norm of the base with this adapter alone
            factor = change.magnitude.flatten().to(weight).float() / (base + delta).flatten(1).norm(dim=1)
            weight = (factor.view(-1, *(1 for _ in weight.shape[1:])) * (weight + delta)).to(weight.dtype)
    if change.diff is not None:
        diff = change.diff.to(weight.device).float() * (change.diff_scale * strength)
        weight = weight + diff.to(weight.dtype)
    return weight


def _product(a: Tensor, b: Tensor) -> Tensor:
    """B A. Of a convolution A [rank, in, t, h, w] and B [out, rank, 1, 1, 1], with PEFT's order of sums."""
    return b @ a if a.ndim == 2 else F.conv3d(a.transpose(0, 1), b).transpose(0, 1)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
