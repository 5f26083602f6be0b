"""Streaming video diffusion: a prompt goes in, frames come out while they are made."""

from engine.threads import prepare

prepare()  # before anything imports torch

from engine.loader import load  # noqa: E402
from engine.stream import Pipeline, Stream  # noqa: E402

__all__ = ["Pipeline", "Stream", "load"]
__version__ = "0.1.0"
