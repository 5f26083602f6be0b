"""Shards: what was written comes back, a stopped writer goes on, and damage is named before anything is read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distill.data.shards import Shards, shard_path, write_index, write_shard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        latents = torch.arange(2 * 4 * 3 * 4).view(2, 4, 3, 2, 2) + 1000.0 * number
        write_shard(tmp_path, number, latents.half(), [f"caption {number}{row}" for row in "ab"])
    write_index(tmp_path, 3, {"made by": "a test"})
    return tmp_path


def test_round_trip(folder: Path) -> None:
    shards = Shards(folder)
    assert (len(shards), shards.shape, shards.frames) == (6, [4, 3, 2, 2], 3)
    latents, captions = shards.read([5, 0, 2], frames=2)
    assert captions == ["caption 2b", "caption 0a", "caption 1a"]
    assert latents.shape == (3, 4, 2, 2, 2)
    assert latents.dtype == torch.float32
    assert latents[:, 0, 0, 0, 0].tolist() == [2048.0, 0.0, 1000.0]  # 2000 + 48
    assert shards.captions([1]) == ["caption 0b"]


def test_truncated_shard(folder: Path) -> None:
    path = shard_path(folder, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=f"got {len(whole) - 10} bytes, expected {len(whole)}"):
        Shards(folder)
    with pytest.raises(ValueError, match="damaged"):
        write_index(folder, 3, {})


def test_missing_shard(folder: Path) -> None:
    shard_path(folder, 2).unlink()
    with pytest.raises(FileNotFoundError, match=r"00002\.safetensors"):
        Shards(folder)


def test_wrong_shape(folder: Path) -> None:
    write_shard(folder, 1, torch.zeros(2, 4, 3, 2, 5).half(), ["a", "b"])
    with pytest.raises(ValueError, match=r"expected \[n, 4, 3, 2, 2\]"):
        write_index(folder, 3, {})
    index = json.loads((folder / "index.json").read_text())
    index["shards"][1]["bytes"] = shard_path(folder, 1).stat().st_size
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"got latents \[2, 4, 3, 2, 5\]"):
        Shards(folder)


@pytest.mark.parametrize("captions", [["one"], ["one", ""], ["one", 2]])
def test_missing_caption(folder: Path, captions: list[object]) -> None:
    latents = torch.zeros(2, 4, 3, 2, 2).half()
    save_file({"latents": latents}, shard_path(folder, 1), {"captions": json.dumps(captions)})
    with pytest.raises(ValueError, match="got 1 captions, expected 2"):
        write_index(folder, 3, {})


@pytest.mark.parametrize(("metadata", "said"), [
    ({"captions": ["a", "b"], "earlier": [["c", 1]]}, "got 1 earlier captions, expected 2"),
    ({"captions": ["a", []]}, "got an empty entry among its captions"),
    ({"captions": ["a", ["b", "c"]]}, "got damaged captions"),
    ({"captions": ["a", ["b", 3, "c"]]}, "got damaged captions"),
    ({"captions": 7}, "got damaged captions"),
    ({"captions": ["a", "b"], "earlier": {"a": 1}}, "got damaged captions"),
])  # fmt: skip
def test_damaged_captions(folder: Path, metadata: dict[str, object], said: str) -> None:
    """The message names the file."""
    save_file({"latents": torch.zeros(2, 4, 3, 2, 2).half()}, shard_path(folder, 1),
              {name: json.dumps(value) for name, value in metadata.items()})  # fmt: skip
    with pytest.raises(ValueError, match=rf"00001\.safetensors: {said}"):
        write_index(folder, 3, {})


def test_unfinished_folder_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, torch.zeros(1, 4, 3, 2, 2), ["a"])
    with pytest.raises(FileNotFoundError, match="finished"):
        Shards(tmp_path)


def test_bad_requests(folder: Path, tmp_path: Path) -> None:
    shards = Shards(folder)
    with pytest.raises(ValueError, match="expected 0 to 5"):
        shards.read([6])
    with pytest.raises(ValueError, match="expected 1 to 3"):
        shards.read([0], frames=4)
    with pytest.raises(ValueError, match="2 captions"):
        write_shard(tmp_path, 9, torch.zeros(3, 4, 3, 2, 2), ["a", "b"])
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "format": 99}))
    with pytest.raises(ValueError, match="format 99, expected 1"):
        Shards(folder)
