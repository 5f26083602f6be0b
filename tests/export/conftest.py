"""Bundles of these tests share their ONNX graphs, with each other and with later runs."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _exports_remembered() -> Iterator[None]:
    from bundles import exports_remembered

    with exports_remembered():
        yield
