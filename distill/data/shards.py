"""Captioned latents on disk: safetensors shards and an index, read in place.

    folder/00000.safetensors   "latents" [n, C, F, h, w]; the metadata hold `captions`: per clip its caption, or, where
                               it switches its prompt, [caption, earlier caption, first latent frame of the later
                               one]. "trajectory" [n, K, C, F, h, w], where there is one, holds the latents on
                               their way to the clips, at K noise levels
    folder/index.json          format, latent shape and, for every shard, its name, number of clips and bytes; `levels`,
                               the falling noise levels in (0, 1] of trajectories

A shard appears whole or not at all, so that a stopped writer resumes with the missing ones. The index comes last:
a folder without it is not finished. Opening a folder checks the header of every shard before any latent is read.
"""

import bisect
import json
from collections.abc import Sequence
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.files import whole_file, write_json

FORMAT = 1
Earlier = tuple[str, int] | None  # an earlier caption, and the first latent frame at which it does not hold any more
INDEX = "index.json"
INPUTS, TARGETS = "inputs", "targets"  # folders of shards in a folder of pairs


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def write_shard(
    folder: Path,
    number: int,
    latents: Tensor,
    captions: Sequence[str],
    earlier: Sequence[Earlier] = (),
    trajectory: Tensor | None = None,
) -> None:
    """Write shard `number`: latents [n, C, F, h, w] in their dtype, one caption each and, if any, earlier captions.

    trajectory  [n, K, C, F, h, w], if the folder has levels
    """
    if latents.ndim != 5 or len(latents) != len(captions) or not len(captions):
        raise ValueError(
            f"shard {number}: got latents {list(latents.shape)} and {len(captions)} captions, "
            "expected [n, C, F, h, w] and n of them"
        )
    said = [(caption, *switch) if switch else caption for caption, switch in zip_longest(captions, earlier)]
    # One entry alone: safetensors writes several in an order that differs from file to file.
    metadata = {"captions": json.dumps(said)}
    tensors = {"latents": latents} | ({} if trajectory is None else {"trajectory": trajectory})
    with whole_file(shard_path(folder, number)) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata)


def write_index(folder: Path, shards: int, source: dict[str, Any], levels: Sequence[float] = ()) -> None:
    """Finish a folder of `shards` shards. `source` tells readers what made them; no code reads it."""
    entries, shape = [], None
    for number in range(shards):
        path = shard_path(folder, number)
        count, shape = _header(path, shape, len(levels))
        entries.append({"file": path.name, "clips": count, "bytes": path.stat().st_size})
    kept = {"levels": list(levels)} if levels else {}
    write_json(folder / INDEX, {"format": FORMAT, "latent": shape, **kept, "source": source, "shards": entries})


def _header(path: Path, shape: list[int] | None, levels: int = 0) -> tuple[int, list[int]]:
    """Number of clips and shape of one clip, from a shard's header. Both must fit `shape`, captions and trajectory."""
    if not path.is_file():
        raise FileNotFoundError(f"shard: got no {path}, expected it")
    try:
        with safe_open(path, "pt") as file:
            found = file.get_slice("latents").get_shape()
            kept = file.get_slice("trajectory").get_shape() if levels else []
            captions = [caption for caption, _ in _said(path, file.metadata() or {})]
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: got a damaged file, expected a whole shard ({error})") from None
    if len(found) != 5 or (shape is not None and found[1:] != shape):
        raise ValueError(f"{path}: got latents {found}, expected [n, {', '.join(map(str, shape or 'CFhw'))}]")
    if levels and kept != [found[0], levels, *found[1:]]:
        raise ValueError(f"{path}: got trajectories {kept}, expected {[found[0], levels, *found[1:]]}")
    if len(captions) != found[0] or not all(isinstance(caption, str) and caption for caption in captions):
        said = sum(isinstance(caption, str) and bool(caption) for caption in captions)
        raise ValueError(f"{path}: got {said} captions, expected {found[0]}")
    return found[0], found[1:]


def _said(path: Path, metadata: dict[str, str]) -> list[tuple[str, Earlier]]:
    """Caption and earlier caption of every clip. Older folders have the earlier ones in an entry of their own."""
    captions, earlier = (json.loads(metadata.get(name, "[]")) for name in ("captions", "earlier"))
    switches = earlier if earlier else [e[1:] for e in captions if isinstance(e, list)] if _is_list(captions) else None
    if not _is_list(captions) or not _is_list(switches) or not all(map(_is_switch, switches)):
        raise ValueError(f"{path}: got damaged captions, expected texts, or [caption, earlier caption, frame]")
    if earlier and len(earlier) != len(captions):
        raise ValueError(f"{path}: got {len(earlier)} earlier captions, expected {len(captions)}")
    if [] in captions:
        raise ValueError(f"{path}: got an empty entry among its captions, expected texts")
    if earlier:
        return [(caption, switch and tuple(switch)) for caption, switch in zip(captions, earlier, strict=True)]
    pairs = (entry if isinstance(entry, list) else [entry] for entry in captions)
    return [(caption, tuple(switch) or None) for caption, *switch in pairs]


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_switch(value: Any) -> bool:
    """Nothing, or an earlier caption and a frame."""
    return not value or (_is_list(value) and [type(part) for part in value] == [str, int])


class Shards:
    """A finished folder, open for reading. Clip numbers run through all shards."""

    def __init__(self, folder: Path) -> None:
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(f"latents: got {folder} without {INDEX}, expected a finished folder")
        index = json.loads((folder / INDEX).read_text())
        if index.get("format") != FORMAT:
            raise ValueError(f"{folder / INDEX}: got format {index.get('format')}, expected {FORMAT}")
        self.folder, self.shape = folder, list(index["latent"])
        self.levels: list[float] = list(index.get("levels", []))  # of trajectories
        self.files: list[Path] = []
        counts = []
        for entry in index["shards"]:
            path = folder / entry["file"]
            if path.is_file() and path.stat().st_size != entry["bytes"]:
                raise ValueError(f"{path}: got {path.stat().st_size} bytes, expected {entry['bytes']}")
            count, _ = _header(path, self.shape, len(self.levels))
            if count != entry["clips"]:
                raise ValueError(f"{path}: got {count} clips, expected {entry['clips']}")
            self.files.append(path)
            counts.append(count)
        self._ends = list(accumulate(counts))
        self._known: dict[int, list[tuple[str, Earlier]]] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def frames(self) -> int:
        """Latent frames per clip."""
        return self.shape[1]

    def captions(self, clips: Sequence[int]) -> list[str]:
        """The captions of some clips."""
        return [self._metadata(shard)[row][0] for shard, row in map(self._place, clips)]

    def earlier(self, clips: Sequence[int]) -> list[Earlier]:
        """What the captions of some clips replaced, and when; None where they hold from the first frame on."""
        return [self._metadata(shard)[row][1] for shard, row in map(self._place, clips)]

    def _metadata(self, shard: int) -> list[tuple[str, Earlier]]:
        """Caption and earlier caption of every clip of a shard."""
        if shard not in self._known:
            with safe_open(self.files[shard], "pt") as file:
                self._known[shard] = _said(self.files[shard], file.metadata())
        return self._known[shard]

    def read(self, clips: Sequence[int], frames: int | None = None) -> tuple[Tensor, list[str]]:
        """The first `frames` latent frames of some clips, float32 [B, C, F, h, w], and their captions."""
        return self._tensor("latents", clips, frames), self.captions(clips)

    def read_trajectory(self, clips: Sequence[int], frames: int | None = None) -> Tensor:
        """The latents of some clips at every one of `levels`, as `read`: float32 [B, K, C, F, h, w]."""
        if not self.levels:
            raise ValueError(f"{self.folder}: got latents alone, expected trajectories (sample_teacher with levels)")
        return self._tensor("trajectory", clips, frames)

    def _tensor(self, name: str, clips: Sequence[int], frames: int | None) -> Tensor:
        frames = self.frames if frames is None else frames
        if not 1 <= frames <= self.frames:
            raise ValueError(f"{self.folder}: got {frames} latent frames, expected 1 to {self.frames}")
        found = []
        for shard, row in map(self._place, clips):
            with safe_open(self.files[shard], "pt") as file:
                found.append(file.get_slice(name)[row : row + 1, ..., :frames, :, :].float())
        return torch.cat(found)

    def _place(self, clip: int) -> tuple[int, int]:
        """Shard and row of a clip."""
        if not 0 <= clip < len(self):
            raise ValueError(f"{self.folder}: got clip {clip}, expected 0 to {len(self) - 1}")
        shard = bisect.bisect_right(self._ends, clip)
        return shard, clip - (self._ends[shard - 1] if shard else 0)


class Pairs:
    """Two folders of shards below one, inputs and targets: clip i of both has one motion and two looks."""

    def __init__(self, folder: Path) -> None:
        """ValueError unless both have the same clips, by number and shape."""
        self.inputs, self.targets = Shards(folder / INPUTS), Shards(folder / TARGETS)
        got, expected = ([len(side), *side.shape] for side in (self.inputs, self.targets))
        if got != expected:
            raise ValueError(f"{folder}: got {INPUTS} {got}, expected {TARGETS}' [n, C, F, h, w], {expected}")

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def frames(self) -> int:
        """Latent frames per clip."""
        return self.targets.frames

    def read(self, clips: Sequence[int], frames: int | None = None) -> tuple[Tensor, Tensor, list[str]]:
        """Inputs and targets, float32 [B, C, F, h, w], and the targets' captions."""
        wanted, captions = self.targets.read(clips, frames)
        return self.inputs.read(clips, frames)[0], wanted, captions
