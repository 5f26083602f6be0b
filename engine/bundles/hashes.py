"""The sha256 of a bundle's files, compared with its manifest before they are used."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.bundles.manifest import BackendSpec, Manifest

MOST_THREADS = 8  # of them each hashes one file: storage rarely reads more at once


def check_hashes(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Check the sha256 of these files, by default of all; ValueError for the first that differs.

    Files are hashed side by side: hashlib releases Python's lock.
    """
    wanted = list(manifest.files if names is None else dict.fromkeys(names))
    threads = min(MOST_THREADS, os.cpu_count() or 1, len(wanted) or 1)
    with ThreadPoolExecutor(threads, "greedy-hash") as pool:
        for name, got in zip(wanted, pool.map(lambda name: file_hash(folder / name), wanted), strict=True):
            expect_hash(folder, manifest, name, got)


def check_hash(folder: Path, manifest: Manifest, name: str) -> None:
    """Check one file's sha256; ValueError if it differs."""
    expect_hash(folder, manifest, name, file_hash(folder / name))


def expect_hash(folder: Path, manifest: Manifest, name: str, got: str) -> None:
    """ValueError unless `got` is the file's sha256 in the manifest."""
    if got != (expected := manifest.files[name].sha256):
        raise ValueError(f"{folder / name}: got sha256 {got[:12]}, expected {expected[:12]}")


def used_files(manifest: Manifest, backend: BackendSpec) -> list[str]:
    """Weights and graphs that a stream on one backend reads, the largest first."""
    names = {manifest.weights, *(graph.file for graph in backend.graphs.values())}
    return sorted(names, key=lambda name: -manifest.files[name].bytes)


def tokenizer_files(manifest: Manifest) -> list[str]:
    return [name for name in manifest.files if name.startswith(f"{manifest.tokenizer}/")]


def file_hash(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
