"""A server of the embedded model for the tests of a file, in their own process."""

from collections.abc import Iterator

import pytest
from serving import app_on_a_thread
from webrtc_client import sprites

from serve.web.app import make_app
from serve.web.server import Server


@pytest.fixture(scope="module")
def server() -> Server:
    return sprites()


@pytest.fixture(scope="module")
def url(server: Server) -> Iterator[str]:
    with app_on_a_thread(make_app(server)) as address:
        yield address
