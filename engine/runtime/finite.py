"""Whether numbers are finite, and where they first were not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from engine.model.cache import RingCache
from engine.runtime.passes import Pass, Stages, TextKV

_WIDER = {torch.float16: "bf16 or fp32", torch.bfloat16: "fp32"}  # precisions to try after an overflow
_WATCHED = ("encode_text", "vae_first", "vae_steady", "vae_encode_step")


def bad_number(x: Tensor) -> str | None:
    """nan, inf or -inf if x has such a number, else None. It reads x once, and waits for the device."""
    if not x.is_floating_point() or x.numel() == 0 or x.is_meta:
        return None
    if (local := getattr(x, "to_local", None)) is not None:  # a sharded weight in training
        x = local()
    ends = torch.stack(torch.aminmax(x.float() if x.dtype.itemsize == 1 else x)).tolist()
    return next((str(end) for end in ends if not math.isfinite(end)), None)


def numbers(x: Tensor) -> str:
    """Such as `float16 [1, 16, 3, 60, 104]`."""
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def named_weights(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of modules by role, under names such as `transformer sdd: blocks.7.ffn.net.2.weight`."""
    for role, module in modules.items():
        if not isinstance(module, nn.Module):  # a compiled function around one
            continue
        part = role if role in ("vae", "text_encoder") else f"transformer {role}:"
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            yield f"{part} {name}", tensor


def bad_weight(weights: Iterable[tuple[str, Tensor]], text: bool) -> str:
    """A message that names the first weight which is not finite; empty if all are.

    text  look at the text encoder, else at everything else; a bundle does not tell them apart
    """
    for name, tensor in weights:
        # The table of tokens is large, and most rows are never read: those that are show in the embedding.
        wanted = name.startswith("text_encoder ") == text and not name.endswith("embed_tokens.weight")
        if wanted and (got := bad_number(tensor)) is not None:
            return f"{name}: got {got} in {numbers(tensor)}, expected finite numbers"
    return ""


def first_bad(
    stages: Stages, where: str, work: Callable[[Stages], object] | None = None, steps: Sequence[float] = ()
) -> Exception:
    """The error that tells why the numbers of `where` (such as "chunk 3") are not finite.

    A ValueError names the weight that is not. If all are, `work` runs once more on watched stages, and a
    FloatingPointError names the first step and module whose result is not.

    work   what gave these numbers; None if it cannot be repeated
    steps  timesteps of the denoising calls in it
    """
    if bad := bad_weight(stages.named_weights(), text=where == "text"):
        return ValueError(bad)
    if work is not None:
        watched = _WatchedStages(stages.plain(), steps)
        try:
            with watched.hooked():
                work(cast(Stages, watched))
        except _Found as found:
            hint = f"; try precision {_WIDER[found.dtype]}" if found.dtype in _WIDER else ""
            return FloatingPointError(f"{where}, {found}, expected finite numbers (the weights are finite{hint})")
    return FloatingPointError(f"{where}: got numbers that are not finite, expected finite ones; the weights are")


class _Found(Exception):
    def __init__(self, where: str, got: str, x: Tensor) -> None:
        super().__init__(f"{where}: got {got} in {numbers(x)}")
        self.dtype = x.dtype


class _WatchedStages:
    """A backend that raises _Found at the first result which is not finite.

    Modules are known in the torch backend alone; of a bundle, the graph is.
    """

    def __init__(self, stages: Stages, steps: Sequence[float]) -> None:
        self._stages, self._steps, self._during = stages, list(steps), ""

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._stages, name)
        return self._watching(name, found) if name in _WATCHED else found

    def run(self, step: Pass, cache: RingCache, text_kv: TextKV) -> Tensor:
        self._during = f"{step.kind.graph} "
        if step.kind.timed and step.t is not None:
            t = float(step.t[0])
            number = [at for at, known in enumerate(self._steps, 1) if abs(known - t) < 1e-3]
            count = f"step {number[0]} of {len(self._steps)}" if number else "context pass"
            self._during = f"{count} (t = {t:g}), {step.kind.graph} "
        self._look("latent", step.latent)
        result = self._stages.run(step, cache, text_kv)
        self._look("result", result)
        return result

    def _watching(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self._during = f"{name} "
            result = call(*args)
            self._look("result", result[0] if isinstance(result, tuple) else result)
            return result

        return run

    def _look(self, what: str, x: Tensor) -> None:
        if (got := bad_number(x)) is not None:
            raise _Found(self._during + what, got, x)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Inside, the output of every module is looked at as well."""
        with ExitStack() as hooks:
            for root in self._stages.modules().values():
                for name, module in root.named_modules():
                    hooks.callback(module.register_forward_hook(self._hook(name)).remove)
            yield

    def _hook(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            for x in output if isinstance(output, tuple | list) else (output,):
                if isinstance(x, Tensor):
                    self._look(name, x)

        return look
