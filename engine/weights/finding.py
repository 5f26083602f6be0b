"""Which files of a folder hold a part of a model: by their keys where there are several, never by their names alone.

A name tells two things: which files are numbered pieces of one set, and which sets are variants of one
(model.fp16.safetensors, model.bf16.safetensors). Of variants one is taken: the plain one, else the one in the dtype
that the weights will have, else bf16, fp16, fp32, else the first by name.

Files that are neither numbered nor in an index belong together where their keys say so: each has tensors of the part
and of nothing else, and no tensor is there twice.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.files import read_json
from engine.weights.containers import open_container
from engine.weights.names import WORDS, Found, Part, other_kind, recognise, unwrapped

# What a directory's weight files are called. A file that the user names may be called anything.
SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt", ".gguf")
MOST_FILES = 1000  # of weights in a folder, and in an index
_SAFE = (".safetensors", ".sft")
_STANDARD = ("diffusion_pytorch_model", "model")  # names that go first where two hold the same part
_VARIANT = re.compile(r"(.+)\.(fp32|fp16|bf16|fp8\w*|ema|non_ema)")
_VARIANTS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_PIECE = re.compile(r"-(\d+)-of-(\d+)(?=\.|$)")
# Folders of a pipeline, and of ComfyUI, that hold a part.
_PLACES: dict[Part, tuple[str, ...]] = {
    "transformer": ("transformer", "diffusion_models", "unet", "checkpoints"), "vae": ("vae",),
    "text_encoder": ("text_encoder", "text_encoders", "clip"), "tiny_vae": ("tiny_vae", "vae_approx"),
}  # fmt: skip
_ROOTS = (".", "models", "split_files")  # of ComfyUI's folders: in its own folder, in its models, as published
OPTIONS: dict[Part, str] = {
    "transformer": "checkpoint", "vae": "vae", "text_encoder": "text-encoder", "tiny_vae": "vae-decoder",
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Files that belong together: one file, numbered ones, or those of an index. `variant` is fp16 or the like."""

    stem: str
    variant: str
    files: tuple[Path, ...]
    index: Path | None = None

    @property
    def safe(self) -> bool:
        return self.files[0].suffix in _SAFE

    @property
    def name(self) -> str:
        return (self.index or self.files[0]).name

    def check(self) -> None:
        """FileNotFoundError where a file is missing."""
        folder = self.files[0].parent
        if missing := [file.name for file in self.files if not file.is_file()]:
            named = f" that {self.index.name} names" if self.index else ""
            raise FileNotFoundError(f"{folder}: got no {', '.join(missing)}, expected the weights{named}")
        if self.index is None:
            _check_numbers(self.files)


@dataclass(frozen=True)
class Contents:
    """What is in a file: the names of its tensors, the parts, and what it is if the engine does not run it."""

    names: list[str] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)
    other: str | None = None

    @property
    def parts(self) -> set[Part]:
        return {one.naming.part for one in self.found}


@dataclass(frozen=True)
class Chosen:
    """The files of a part, and notes about others that are left aside."""

    files: Sequence[Path]
    notes: list[str] = field(default_factory=list)


class Folder:
    """The weight files beside each other in a folder. Opens each file once, and only where it has to."""

    def __init__(self, path: Path, dtype: torch.dtype | None = None) -> None:
        self.path = path
        self.notes: list[str] = []
        self.unreadable: list[str] = []
        self._contents: dict[Path, Contents] = {}
        self.groups = self._without_variants(groups_of(path), dtype)

    def _without_variants(self, groups: Sequence[Group], dtype: torch.dtype | None) -> list[Group]:
        """One variant per stem, in one container; a note names the variants that are left aside."""
        order = list(filter(None, (_VARIANTS.get(dtype) if dtype else None, "bf16", "fp16", "fp32")))

        def rank(group: Group) -> tuple[object, ...]:
            place = order.index(group.variant) if group.variant in order else len(order)
            # The same weights are often there a second time, as .bin.
            return group.variant != "", place, group.variant, not group.safe, group.index is None

        kept: dict[str, Group] = {}
        left: list[Group] = []
        aside: dict[str, list[str]] = {}
        for group in sorted(groups, key=rank):
            first = kept.setdefault(group.stem, group)
            if first.variant != group.variant:
                aside.setdefault(group.stem, []).append(group.name)
            elif first is group or (first.safe == group.safe and first.index is None):
                left.append(group)  # two sets of one name: nothing tells which one is meant
        self.notes += [f"{self.path}: took {kept[stem].name} (not used: {', '.join(names)})"
                       for stem, names in aside.items()]  # fmt: skip
        return [group for group in groups if group in left]

    def holding(self, part: Part) -> list[Group]:
        """The groups with a part. Of several that do not belong together, the one with a standard name, with a note."""
        found = [group for group in self.groups if any(part in self.contents(file).parts for file in group.files)]
        if (whole := self._joined(part, found)) is not None:
            return [whole]
        standard = [group for group in found if group.stem in _STANDARD]
        if len(found) > 1 and len(standard) == 1:
            others = ", ".join(group.name for group in found if group not in standard)
            self.notes.append(f"{self.path}: took {standard[0].name} (not used: {others})")
            return standard
        return found

    def _joined(self, part: Part, found: Sequence[Group]) -> Group | None:
        """The groups that hold a part together as one; None where they do not, and where it is one already."""
        every = {one for group in found for file in group.files for one in self.contents(file).found}
        if len(every) != 1:
            return None
        (one,) = every
        pieces = [group for group in self.groups
                  if all(one.owns(name) for file in group.files for name in self.contents(file).names)]  # fmt: skip
        pieces = [group for group in pieces if all(self.contents(file).names for file in group.files)]
        names = [name for group in pieces for file in group.files for name in self.contents(file).names]
        if len(pieces) < 2 or not {*found} <= {*pieces} or len({*names}) < len(names):
            return None
        return Group(found[0].stem, "", tuple(sorted(file for group in pieces for file in group.files)))

    def contents(self, file: Path) -> "Contents":
        """What a file holds; nothing for one that is missing or unreadable. Remembers unreadable files."""
        if file not in self._contents:
            self._contents[file] = Contents()
            try:
                self._contents[file] = contents_of(file) if file.is_file() else Contents()
            except (ValueError, OSError, ImportError) as error:
                self.unreadable.append(str(error))
        return self._contents[file]

    def seen(self) -> str:
        """The names of the files, in words."""
        kinds = [(group.name, self.contents(group.files[0]).other) for group in self.groups]
        return ", ".join(f"{name}: {kind}" if kind else name for name, kind in kinds)


def part_files(path: Path, part: Part, dtype: torch.dtype | None = None) -> Chosen:
    """The files with a part: in a component folder, Wan's own folder, a pipeline directory or ComfyUI's folders.

    ValueError where several hold it or a file cannot be read, FileNotFoundError where none does.
    """
    folders = [Folder(place, dtype) for place in (path, *_places(path, part))]
    filled = [folder for folder in folders if folder.groups]
    if len(filled) == 1 and len(filled[0].groups) == 1:  # to open it tells what else it is
        return _chosen(filled[0], filled[0].groups[0])
    return choose(path, part, folders)


def choose(path: Path, part: Part, folders: Sequence[Folder]) -> Chosen:
    """The files with a part in the first of several folders, else in the others together. Errors as `part_files`."""
    found = [(folders[0], group) for group in folders[0].holding(part)]
    found = found or [(folder, group) for folder in folders[1:] for group in folder.holding(part)]
    return _chosen(*found[0]) if len(found) == 1 else _refuse(path, part, found, folders)


def _chosen(folder: Folder, group: Group) -> Chosen:
    group.check()
    return Chosen(group.files, [note for note in folder.notes if f"took {group.name} " in note])


def _refuse(path: Path, part: Part, found: Sequence[tuple[Folder, Group]], folders: Sequence[Folder]) -> Chosen:
    """Raise what `part_files` says where it does not find exactly one."""
    words = WORDS[part]
    if found:
        names = ", ".join(sorted(str((folder.path / group.name).relative_to(path)) for folder, group in found))
        raise ValueError(f"{path}: got several files with a {words} ({names}), expected one, or "
                         f"--{OPTIONS[part]} FILE")  # fmt: skip
    for folder in folders:
        if folder.unreadable:
            raise ValueError(f"{folder.unreadable[0]}; it may be the {words}")
    if seen := ", ".join(filter(None, (folder.seen() for folder in folders))):
        raise FileNotFoundError(f"{path}: got no {words} ({seen}), expected one, or --{OPTIONS[part]} FILE")
    raise FileNotFoundError(f"{path}: got no file of {', '.join(SUFFIXES)}, expected the weights of a {words}")


def _places(path: Path, part: Part) -> list[Path]:
    """Folders inside a folder that are there for a part, with those inside them."""
    tops = [path / root / name for root in _ROOTS for name in _PLACES[part] if (path / root / name).is_dir()]
    return [place for top in tops for place in (top, *_inside(top), *(deep for one in _inside(top)
                                                                      for deep in _inside(one)))]  # fmt: skip


def _inside(folder: Path) -> list[Path]:
    return sorted(place for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))


def contents_of(file: Path) -> Contents:
    """What a file holds. ValueError if it is unreadable."""
    names = [unwrapped(key) for key in open_container(file).tensors]
    found = recognise(names)
    tiny = all(one.naming.part == "tiny_vae" for one in found)  # beside a model's parts it is another file
    return Contents(names, found, other_kind(names) if tiny else None)


def groups_of(folder: Path) -> list[Group]:
    """The weight files of a folder; those of an index, and those that are numbered, belong together."""
    groups: list[Group] = []
    for index in sorted(folder.glob("*.json")):
        words = index.name.split(".")
        if "index" in words and not index.name.startswith("."):
            base = ".".join(word for word in words if word not in ("json", "index", "safetensors", "bin"))
            if files := files_of_index(index):
                groups.append(Group(*_stem_and_variant(base), tuple(files), index))
    indexed = {file for group in groups for file in group.files}
    sets: dict[tuple[str, str, str, str], list[Path]] = {}
    for file in candidates(folder):
        if file not in indexed:
            piece = _PIECE.search(file.stem)
            stem, variant = _stem_and_variant(_PIECE.sub("", file.stem))
            sets.setdefault((stem, variant, file.suffix, piece[2] if piece else ""), []).append(file)
    return groups + [Group(stem, variant, tuple(files)) for (stem, variant, *_), files in sets.items()]


def files_of_index(index: Path) -> list[Path]:
    """The files that an index names, sorted. ValueError for one without a weight_map, or with files elsewhere.

    A link beside the index is followed: download caches are made of links.
    """
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"{index}: got no weight_map of file names, expected the index of a model's files")
    names = sorted({*named.values()})
    elsewhere = [name for name in names if name in ("", ".", "..") or re.search(r"[/\\\0]", name)]
    if elsewhere:
        raise ValueError(f"{index}: got the file {elsewhere[0][:60]!a}, expected names of files beside the index")
    _check_count(index, len(names))
    return [index.parent / name for name in names]


def _check_count(where: Path, count: int) -> None:
    if count > MOST_FILES:
        raise ValueError(f"{where}: got {count} files of weights, expected at most {MOST_FILES}")


def candidates(folder: Path) -> list[Path]:
    """The files of a folder that may hold weights, sorted; not the hidden ones that macOS writes beside them."""
    found = sorted(file for file in folder.iterdir()
                   if file.is_file() and file.suffix in SUFFIXES and not file.name.startswith("."))  # fmt: skip
    _check_count(folder, len(found))
    return found


def _stem_and_variant(base: str) -> tuple[str, str]:
    base = re.sub(r"^pytorch_model(?=\.|$)", "model", base)  # transformers' name of the same weights as .bin
    match = _VARIANT.fullmatch(base)
    return (match[1], match[2]) if match else (base, "")


def _check_numbers(files: Sequence[Path]) -> None:
    """FileNotFoundError where a numbered file is missing. Numbers begin at 1 or at 0."""
    sets: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if piece := _PIECE.search(file.stem):
            sets.setdefault((_PIECE.sub("", file.stem), int(piece[2])), set()).add(int(piece[1]))
    for (stem, count), there in sets.items():
        first = 0 if 0 in there else 1
        # The count is only what a name says: the first gap is among as many numbers as there are files.
        missing = next((number for number in range(first, first + count) if number not in there), None)
        if missing is not None:
            raise FileNotFoundError(f"{files[0].parent}: got {len(there)} of {count} files of {stem}, "
                                    f"expected number {missing} as well")  # fmt: skip
