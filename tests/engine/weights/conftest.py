"""One tiny model in the layouts of public files. Tests that change a folder copy it."""

import pytest
from layouts import Published


@pytest.fixture(scope="package")
def published():
    return Published()


@pytest.fixture(scope="package")
def folders(published, tmp_path_factory):
    """The same model in diffusers' layout and in Wan's own."""
    root = tmp_path_factory.mktemp("models")
    return {"diffusers": published.write_diffusers(root / "diffusers"), "wan": published.write_wan(root / "wan")}
