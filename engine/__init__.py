"""Streaming video diffusion: a prompt goes in, frames come out while they are made."""

from pathlib import Path

from engine.kernels_folder import join
from engine.program import begin
from engine.threads import prepare

begin()  # before the imports below, which take seconds
prepare()  # before anything imports torch
join(Path(__file__).resolve().parents[1] / "kernels")

from engine.config import Runtime  # noqa: E402
from engine.loader import load, load_bundle, plan_of  # noqa: E402
from engine.runtime.streams import Cancelled, Serial, SourceEnded, Stream  # noqa: E402
from engine.stream import Pipeline  # noqa: E402
from engine.weights.adapters import Adapter  # noqa: E402

__all__ = [
    "Adapter", "Cancelled", "Pipeline", "Runtime", "Serial", "SourceEnded", "Stream", "load", "load_bundle", "plan_of",
]  # fmt: skip
__version__ = "0.1.0"
