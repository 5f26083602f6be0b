"""Captioned latents on disk: safetensors shards and an index, read in place.

    folder/00000.safetensors   "latents" [n, C, F, h, w]; the metadata hold the captions and, where clips switch their
                               prompt, `earlier`: per clip null, or the earlier caption and the first latent frame
                               of the later one, which is then the clip's caption
    folder/index.json          format, latent shape and, for every shard, its name, number of clips and bytes

A shard appears whole or not at all, so that a stopped writer resumes with the missing ones. The index comes last:
a folder without it is not finished. Opening a folder checks the header of every shard before any latent is read.
"""

import bisect
import json
from collections.abc import Sequence
from itertools import accumulate
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


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def write_shard(
    folder: Path, number: int, latents: Tensor, captions: Sequence[str], earlier: Sequence[Earlier] = ()
) -> None:
    """Write shard `number`: latents [n, C, F, h, w] in their dtype, one caption each and, if any, earlier captions."""
    if latents.ndim != 5 or len(latents) != len(captions) or not len(captions):
        raise ValueError(
            f"shard {number}: got latents {list(latents.shape)} and {len(captions)} captions, "
            "expected [n, C, F, h, w] and n of them"
        )
    metadata = {"captions": json.dumps(list(captions))}
    if any(earlier):
        metadata["earlier"] = json.dumps(list(earlier))
    with whole_file(shard_path(folder, number)) as part:
        save_file({"latents": latents.contiguous()}, part, metadata)


def write_index(folder: Path, shards: int, source: dict[str, Any]) -> None:
    """Finish a folder of `shards` shards. `source` tells readers what made them; no code reads it."""
    entries, shape = [], None
    for number in range(shards):
        path = shard_path(folder, number)
        count, shape = _header(path, shape)
        entries.append({"file": path.name, "clips": count, "bytes": path.stat().st_size})
    write_json(folder / INDEX, {"format": FORMAT, "latent": shape, "source": source, "shards": entries})


def _header(path: Path, shape: list[int] | None) -> tuple[int, list[int]]:
    """Number of clips and shape of one clip, from a shard's header. Both must fit `shape` and the captions."""
    if not path.is_file():
        raise FileNotFoundError(f"shard: got no {path}, expected it")
    try:
        with safe_open(path, "pt") as file:
            found = file.get_slice("latents").get_shape()
            captions = json.loads((file.metadata() or {}).get("captions", "[]"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: got a damaged file, expected a whole shard ({error})") from None
    if len(found) != 5 or (shape is not None and found[1:] != shape):
        raise ValueError(f"{path}: got latents {found}, expected [n, {', '.join(map(str, shape or 'CFhw'))}]")
    if len(captions) != found[0] or not all(isinstance(caption, str) and caption for caption in captions):
        said = sum(isinstance(caption, str) and bool(caption) for caption in captions)
        raise ValueError(f"{path}: got {said} captions, expected {found[0]}")
    return found[0], found[1:]


class Shards:
    """A finished folder, open for reading. Clip numbers run through all shards."""

    def __init__(self, folder: Path) -> None:
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(f"latents: got {folder} without {INDEX}, expected a finished folder")
        index = json.loads((folder / INDEX).read_text())
        if index.get("format") != FORMAT:
            raise ValueError(f"{folder / INDEX}: got format {index.get('format')}, expected {FORMAT}")
        self.folder, self.shape = folder, list(index["latent"])
        self.files: list[Path] = []
        counts = []
        for entry in index["shards"]:
            path = folder / entry["file"]
            if path.is_file() and path.stat().st_size != entry["bytes"]:
                raise ValueError(f"{path}: got {path.stat().st_size} bytes, expected {entry['bytes']}")
            count, _ = _header(path, self.shape)
            if count != entry["clips"]:
                raise ValueError(f"{path}: got {count} clips, expected {entry['clips']}")
            self.files.append(path)
            counts.append(count)
        self._ends = list(accumulate(counts))
        self._said: dict[tuple[int, str], list[Any]] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def frames(self) -> int:
        """Latent frames per clip."""
        return self.shape[1]

    def captions(self, clips: Sequence[int]) -> list[str]:
        """The captions of some clips."""
        return [self._metadata(shard, "captions")[row] for shard, row in map(self._place, clips)]

    def earlier(self, clips: Sequence[int]) -> list[Earlier]:
        """What the captions of some clips replaced, and when; None where they hold from the first frame on."""
        return [self._metadata(shard, "earlier")[row] for shard, row in map(self._place, clips)]

    def _metadata(self, shard: int, key: str) -> list[Any]:
        """One entry per clip of a shard."""
        if (shard, key) not in self._said:
            with safe_open(self.files[shard], "pt") as file:
                metadata = file.metadata()
            captions = json.loads(metadata["captions"])
            found = json.loads(metadata.get(key, "null")) or [None] * len(captions)
            self._said[shard, key] = [tuple(entry) if isinstance(entry, list) else entry for entry in found]
        return self._said[shard, key]

    def read(self, clips: Sequence[int], frames: int | None = None) -> tuple[Tensor, list[str]]:
        """The first `frames` latent frames of some clips, float32 [B, C, F, h, w], and their captions."""
        frames = self.frames if frames is None else frames
        if not 1 <= frames <= self.frames:
            raise ValueError(f"{self.folder}: got {frames} latent frames, expected 1 to {self.frames}")
        latents = []
        for shard, row in map(self._place, clips):
            with safe_open(self.files[shard], "pt") as file:
                latents.append(file.get_slice("latents")[row : row + 1, :, :frames].float())
        return torch.cat(latents), self.captions(clips)

    def _place(self, clip: int) -> tuple[int, int]:
        """Shard and row of a clip."""
        if not 0 <= clip < len(self):
            raise ValueError(f"{self.folder}: got clip {clip}, expected 0 to {len(self) - 1}")
        shard = bisect.bisect_right(self._ends, clip)
        return shard, clip - (self._ends[shard - 1] if shard else 0)
