"""Fixtures of the server's tests."""

import pytest
from serving import served

import engine
from engine.stream import Pipeline

__all__ = ["served"]


@pytest.fixture(scope="session")
def sprites() -> Pipeline:
    """The embedded model: 32 x 32 pixels, 8 frames a second; 1 frame in chunk 0, then 4 per chunk."""
    return engine.load()
