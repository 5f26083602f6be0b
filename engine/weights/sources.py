"""Sources of tensors: one part of a model, in files of any container and spelling, under the engine's names.

Shapes are known before data is read. 8-bit weights with scales are expanded as they are read.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.model.scaled_linear import expand
from engine.weights.containers import Container, open_container
from engine.weights.finding import Chosen, part_files
from engine.weights.formats.tensors import Stored, expect_dense
from engine.weights.names import BUFFERS, TINY, WORDS, Found, Part, other_kind, recognise, unwrapped
from engine.weights.scaled import (
    FP8,
    check_scale_values,
    expansion,
    format_of,
    layers_of_metadata,
    refused_format,
    scales_of_plain,
)

ALIGNMENT = 64  # bytes; that of torch's own tensors
# States of training checkpoints, the preferred one first. A preset may prefer another (engine.presets.states_of).
STATES = ("generator_ema", "generator", "ema", "student", "model", "module", "state_dict", "model_state_dict", "")
# States that are never the student: they hold networks of the same shape.
_NO_STUDENTS = {"critic", "fake_score", "real_score", "teacher", "discriminator", "optimizer"}
_LORA = re.compile(r"(^|\.)lora_(A|B|up|down)(\.|$)")


class TensorSource(Protocol):
    """Named tensors. `shapes` reads no data, `read` yields (name, tensor)."""

    label: str
    files: list[Path]
    lora: Path | None  # file with LoRA weights to merge afterwards

    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def read(self) -> Iterator[tuple[str, Tensor]]: ...


class FileSource:
    """The tensors of one part: `found` in the containers, translated, expanded from 8 bits."""

    def __init__(
        self, containers: Sequence[Container], found: Found, label: str, lora: Path | None = None,
        others: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """lora: a file with LoRA weights to merge afterwards; others: prefixes of the parts beside this one."""
        self.label, self.found, self.lora, self._containers = label, found, lora, containers
        self.files = [container.file for container in containers]
        apart = tuple(prefix for prefix in others if prefix != found.prefix and prefix.startswith(found.prefix))
        self._keys: dict[str, tuple[Container, str]] = {}  # name in the file, unwrapped, without prefix -> where it is
        for container in containers:
            for key in container.tensors:
                name = unwrapped(key)
                if name.startswith(found.prefix) and not (apart and name.startswith(apart)):
                    self._add(name.removeprefix(found.prefix), container, key)
        stored = {name: container.tensors[key] for name, (container, key) in self._keys.items()}
        self._check_dense(stored)
        self._expansion = expansion(label, stored, self._descriptions(), self._ones(stored))
        self._names = self._translated(stored)  # the engine's name -> name in the file
        self.dtypes = sorted({_words(stored[name].dtype) for name in self._names.values()})
        eight = [stored[name] for name in self._names.values() if stored[name].dtype in (*FP8, torch.int8)]
        coarse = [stored[name] for name in self._names.values() if isinstance(stored[name].dtype, str)]
        self.notes: list[str] = []
        self._last: dict[str, int] = {}
        if eight or coarse:
            kinds = sorted({_words(one.dtype) for one in eight + coarse})
            self.notes.append(f"{label}: {len(eight + coarse)} weights are stored in {', '.join(kinds)}, "
                              "coarser than the original")  # fmt: skip

    def _add(self, name: str, container: Container, key: str) -> None:
        if name in self._keys:
            raise ValueError(f"{self.label}: got {name} twice ({container.file.name}), expected every tensor once")
        self._keys[name] = container, key

    def _check_dense(self, stored: Mapping[str, Stored]) -> None:
        if refused_format(stored):
            return  # whose name says more
        for name, one in stored.items():
            if not name.startswith(self.found.naming.ignored) and not BUFFERS.search(name):
                container, key = self._keys[name]
                expect_dense(container.file, key, one.problem)

    def _ones(self, stored: Mapping[str, Stored]) -> set[str]:
        """The scales beside plain weights that are exactly 1: they change nothing."""
        plain = scales_of_plain(stored)
        return {name for name, scale in self._stored_tensors(plain)
                if scale.dtype.is_floating_point and bool((scale.float() == 1).all())}  # fmt: skip

    def _descriptions(self) -> list[tuple[str, str]]:
        """(layer, format) that the files tell of quantised layers."""
        described = []
        for container in self._containers:
            for layer, format in layers_of_metadata(self.label, container.metadata).items():
                described.append((unwrapped(layer).removeprefix(self.found.prefix), format))
        told = [name for name in self._keys if name.endswith(".comfy_quant")]
        for name, tensor in self._stored_tensors(told):
            described.append((name.removesuffix(".comfy_quant"), format_of(self.label, name, tensor)))
        return described

    def _stored_tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by their names in the file; opens each container once."""
        wanted = list(names)
        for container in self._containers:
            here = {self._keys[name][1]: name for name in wanted if self._keys[name][0] is container}
            for key, tensor in container.read(here) if here else ():
                yield here[key], tensor
                del tensor  # before the next one is read

    def _translated(self, stored: Mapping[str, Stored]) -> dict[str, str]:
        names: dict[str, str] = {}
        naming = self.found.naming
        for name in stored:
            if name in self._expansion.dropped or name.startswith(naming.ignored) or BUFFERS.search(name):
                continue
            ours = naming.translate(name)
            # Two keys may hold one tensor: an embedding under `shared` and under its place in the encoder.
            if ours in names and not self._same(ours, name, names[ours]):
                raise ValueError(f"{self.label}: got {ours} twice ({name}, {names[ours]}), expected every tensor once")
            names.setdefault(ours, name)
        return names

    def _same(self, ours: str, *names: str) -> bool:
        """Whether two keys hold one table of tokens, as files of transformers may."""
        if self.found.naming.part != "text_encoder" or ours != "embed_tokens.weight":
            return False
        first, second = (tensor for _, tensor in self._stored_tensors(names))
        return torch.equal(first, second)

    def keep_last(self, rows: Mapping[str, int]) -> None:
        """Leave only the last rows of some tensors, by the engine's names."""
        self._last = dict(rows)
        self.notes += [f"{self.label}: the last {count} of {self._stored(self._names[name]).shape[0]} rows of {name} "
                       "are used" for name, count in rows.items()]  # fmt: skip

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {ours: stored.shape for ours, stored in self.stored().items()}

    def _stored(self, name: str) -> Stored:
        container, key = self._keys[name]
        return container.tensors[key]

    def read(self) -> Iterator[tuple[str, Tensor]]:
        return (
            (name, tensor if scale is None else expand(tensor, scale)) for name, tensor, scale in self.read_stored()
        )

    def read_stored(self, prefix: str = "") -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """(name, tensor, its scale or None), not expanded; of the names that begin with `prefix`."""
        ours = {name: mine for mine, name in self._names.items() if mine.startswith(prefix)}
        of_scale = {scale: weight for weight, scale in self._expansion.scales.items() if weight in ours}
        scales = {}
        for name, scale in self._stored_tensors(of_scale):
            check_scale_values(self.label, name, scale)
            scales[of_scale[name]] = scale.clone()
        for name, tensor in self._stored_tensors(ours):
            mine = ours[name]
            yield mine, tensor[-self._last[mine] :].clone() if mine in self._last else tensor, scales.get(name)
            del tensor

    def stored(self) -> dict[str, Stored]:
        """Every tensor's shape and its dtype in the file, by the engine's names."""
        found = {mine: self._stored(name) for mine, name in self._names.items()}
        for mine, rows in self._last.items():
            found[mine] = found[mine]._replace(shape=(rows, *found[mine].shape[1:]))
        return found

    def scaled(self) -> set[str]:
        """Names of the weights that have scales."""
        return {mine for mine, name in self._names.items() if name in self._expansion.scales}

    def mapped(self, dtype: torch.dtype) -> set[str]:
        """Names of the tensors that stay mapped to their file if a processor uses them as `dtype`. Reads no data."""
        found = set()
        for container in (one for one in self._containers if one.maps):
            ours = {self._keys[name][1]: mine for mine, name in self._names.items()
                    if self._keys[name][0] is container and self._stored(name).dtype == dtype}  # fmt: skip
            found |= {ours[key] for key, part in container.read(ours) if part.data_ptr() % ALIGNMENT == 0}
        return found - self.scaled() - set(self._last)

    @property
    def maps(self) -> bool:
        """Whether `read_stored` gives tensors that lie in mapped files."""
        return all(container.maps for container in self._containers)


def _words(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def open_source(
    path: Path, state: str | None = None, part: Part = "transformer", prefer: Sequence[str] = STATES,
    dtype: torch.dtype | None = None,
) -> FileSource:  # fmt: skip
    """Open a part of a model: a file in any container, a component folder, or a folder that holds the part somewhere.

    state   the state of a training checkpoint to take; None takes the first of `prefer` that holds the part
    part    what to look for
    dtype   that the weights will have: of several variants of the files the one in it is taken

    Raises FileNotFoundError, or ValueError for an unreadable file and one without the part.
    """
    if not path.exists():
        raise FileNotFoundError(f"{WORDS[part]}: got {path}, expected an existing file or folder")
    chosen = part_files(path, part, dtype) if path.is_dir() else Chosen([path])
    label = str(path if path in (chosen.files[0], chosen.files[0].parent) else chosen.files[0])
    source = source_of([open_container(file) for file in chosen.files], label, state, part, prefer)
    source.notes += chosen.notes
    return source


def source_of(
    containers: Sequence[Container], label: str, state: str | None = None, part: Part = "transformer",
    prefer: Sequence[str] = STATES,
) -> FileSource:  # fmt: skip
    """As `open_source`, from open containers."""
    names = [unwrapped(key) for container in containers for key in container.tensors]
    every = recognise(names)
    found = [one for one in every if one.naming.part == part]
    words = WORDS[part]
    if state is not None:
        found = [one for one in found if one.state == state or one.prefix.startswith(f"{state}.")]
    if state is not None and not found:
        heads = dict.fromkeys(one.state for one in every) or dict.fromkeys(name.partition(".")[0] for name in names)
        there = ", ".join(filter(None, list(heads)[:6])) or "none"
        raise ValueError(f"{label}: got states {there}, expected {state!r} among them")
    if not found:
        raise ValueError(f"{label}: got {what_instead(names, every)}, expected a {words}")
    if state is None:
        students = [one for one in found if not set(one.state.split(".")) & _NO_STUDENTS]
        if not students:
            states = ", ".join(one.state for one in found)
            raise ValueError(f"{label}: got states {states}, expected one of {', '.join(filter(None, prefer))}")
        found = students
    chosen = found[0] if len(found) == 1 else _chosen(found, label, prefer)
    kind = other_kind(name.removeprefix(chosen.prefix) for name in names if name.startswith(chosen.prefix))
    if kind is not None and part != "tiny_vae":
        raise ValueError(f"{label}: got {kind}, expected a {words} of Wan2.1's text-to-video models")
    own = next((container.file for container in containers for key in container.tensors if _LORA.search(key)), None)
    merged = own is not None and state is None and any(
        re.search(r"(^|\.)generator_lora\.", key) for container in containers for key in container.tensors
    )  # fmt: skip
    source = FileSource(containers, chosen, label, own if merged else None, [one.prefix for one in every])
    if own is not None and not merged and part == "transformer":
        source.notes.append(f"{label}: holds LoRA weights, which are not merged; pass it as an adapter as well")
    if len(found) > 1:
        others = ", ".join(one.state or "the rest" for one in found if one is not chosen)
        source.notes.insert(0, f"{label}: took {chosen.state or 'the plain tensors'} (also there: {others})")
    return source


def _chosen(found: Sequence[Found], label: str, prefer: Sequence[str]) -> Found:
    """The preferred state among several. ValueError if none of them is known."""
    for name in prefer:
        for one in found:
            if name in one.state.split("."):
                return one
    states = ", ".join(one.state for one in found)
    raise ValueError(f"{label}: got states {states}, expected one of {', '.join(filter(None, prefer))}: "
                     "choose with checkpoint_state")  # fmt: skip


def what_instead(names: Sequence[str], every: Sequence[Found]) -> str:
    """What a file is, where it is not the part that was looked for."""
    if every and every[0].naming.part == "tiny_vae":
        return TINY
    if every:
        return f"a {WORDS[every[0].naming.part]} ({every[0].naming.name} names)"
    if kind := refused_format(names) or other_kind(names):
        return kind
    return f"{len(names)} tensors with other names ({', '.join(names[:3]) or 'none'})"
