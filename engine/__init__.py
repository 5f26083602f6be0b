"""Streaming video diffusion: a prompt goes in, frames come out while they are made."""

from engine.loader import load
from engine.stream import Pipeline, Stream

__all__ = ["Pipeline", "Stream", "load"]
__version__ = "0.1.0"
