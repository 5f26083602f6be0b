"""One random pipeline a family, the same in every run."""

import pytest

from bench.models import random_pipeline
from engine.stream import Pipeline


@pytest.fixture(scope="session")
def greedy() -> Pipeline:
    return random_pipeline("tiny", "greedy", "cpu")


@pytest.fixture(scope="session")
def causal() -> Pipeline:
    return random_pipeline("tiny", "self-forcing-framewise", "cpu")
