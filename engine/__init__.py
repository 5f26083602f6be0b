"""Streaming video diffusion: a prompt goes in, frames come out while they are made."""

from engine.config import Runtime
from engine.loader import load, load_bundle
from engine.stream import Pipeline, Stream

__all__ = ["Pipeline", "Runtime", "Stream", "load", "load_bundle"]
__version__ = "0.1.0"
