"""What several tests of distill share: random latents, a small teacher, and students of a few steps."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.data.shards import INPUTS, TARGETS, Shards, write_index, write_shard
from distill.data.sprites import sample
from distill.models.student_file import NextChunkConfig
from distill.stages import next_chunk
from distill.stages.teacher import SPRITES, Teacher


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("latents")
    write_shard(folder, 0, torch.randn(8, 2, 4, 2, 2, generator=torch.Generator().manual_seed(0)), list("abcdefgh"))
    write_index(folder, 1, {})
    return Shards(folder)


@pytest.fixture
def double() -> Iterator[None]:
    """Everything in float64: finite differences need the digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random latents under real captions."""
    folder = tmp_path_factory.mktemp("bank")
    torch.manual_seed(0)
    captions = [spec.caption for spec in sample(16, torch.Generator().manual_seed(0))]
    for name, frames in (("images", 1), ("clips", 4)):
        for shard in range(2):
            latents = torch.randn(8, 8, frames, 8, 8).half()
            write_shard(folder / name, shard, latents, captions[8 * shard : 8 * shard + 8])
        write_index(folder / name, 2, {})
    for side in (INPUTS, TARGETS):
        write_shard(folder / "pairs" / side, 0, torch.randn(4, 8, 4, 8, 8).half(), captions[:4])
        write_index(folder / "pairs" / side, 1, {})
    return folder


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half as deep and half as wide as the real one, whose students the ablation's test trains."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    small = Teacher(replace(SPRITES, num_layers=2, num_attention_heads=2, ffn_dim=128))
    torch.nn.init.normal_(small.transformer.proj_out.weight, std=0.1)
    small.save(folder)
    return folder


@pytest.fixture(scope="session")
def next_chunk_config(bank: Path, small_teacher: Path) -> NextChunkConfig:
    return NextChunkConfig(
        teacher=str(small_teacher),
        data=str(bank / "clips"),
        pairs=str(bank / "pairs"),
        steps=4,
        batch=2,
        frames=3,
        first_batch=4,
        rank=2,
        roll_share=1.0,
        roll_from=0.0,
        context_noise=0.1,
        caption_dropout=0.5,
        save_every=2,
    )


@pytest.fixture(scope="session")
def student_file(next_chunk_config: NextChunkConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    next_chunk.train(next_chunk_config, folder)
    return folder / "student.pt"


@pytest.fixture(scope="session")
def causal_file(next_chunk_config: NextChunkConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("causal")
    chunks: dict[str, Any] = {"family": "causal", "chunk": 2, "window": 5, "attn_sink": 1, "frames": 4}
    next_chunk.train(replace(next_chunk_config, steps=1, solver="renoise", **chunks), folder)
    return folder / "student.pt"
