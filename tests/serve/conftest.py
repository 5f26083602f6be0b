"""What the tests of the server share."""

import pytest
from serving import app_on_a_thread, served

__all__ = ["served"]


@pytest.fixture(scope="session")
def sprites():
    """The embedded model: 32 x 32 pixels, 8 frames a second; 1 frame in chunk 0, then 4 per chunk."""
    import engine

    return engine.load()


@pytest.fixture(scope="module")
def server(pipeline):
    """A server of the tiny pipeline, in this process: three live sessions, two may wait."""
    from serve.build import make_server
    from serve.options import Network, Sessions

    return make_server(pipeline, "tiny", Network(rate=100_000), Sessions(sessions=3, waiting=2, lease=2.0))


@pytest.fixture(scope="module")
def url(server):
    """Its address, without a slash at its end."""
    from serve.web.app import make_app

    with app_on_a_thread(make_app(server), ws_max_size=32 << 20) as address:
        yield address
