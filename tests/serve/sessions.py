"""Sessions without a network, for tests."""

import time

import numpy as np

from serve.core.messages import Chunk, Notice, Wish
from serve.core.session import Limits, Place, Session
from serve.core.turns import Turns
from serve.core.viewers import Viewer

PROMPT = "a red circle moving right"
OTHER = "a blue square moving up"
HANG = 60.0  # seconds after which a test gives up


def words(text):
    return ((text, 1.0),)


def wish(text=PROMPT, **fields):
    return Wish(words(text), **{"seed": 3, "speed": 0.0} | fields)


def place(pipeline, limits=None, parallel=1, chunks=None, ended=None):
    return Place(
        pipeline, Turns(parallel), 8, limits or Limits(),
        lambda session, chunk: chunks is not None and chunks.append(chunk),
        lambda session: ended is not None and ended.append(session),
    )  # fmt: skip


def opened(pipeline, asked, viewer=None, **about):
    """A session that runs, and a viewer of its raw frames."""
    viewer = viewer or Viewer(None)
    session = Session("one", place(pipeline, **about), asked)
    session.watch(viewer)
    session.start()
    return session, viewer


def items(viewer, until=lambda item: False):
    """What a viewer gets, up to the end or to an item that `until` takes."""
    found, end = [], time.monotonic() + HANG
    while time.monotonic() < end:
        if (item := viewer.take(1.0)) is None:
            continue
        found.append(item)
        if until(item) or (isinstance(item, Notice) and item.kind == "done"):
            return found
    raise AssertionError(f"no end after {len(found)} items: {found[-3:]}")


def after(number):
    """Takes the chunk of that number, for `items`."""
    return lambda item: isinstance(item, Chunk) and item.number == number


def chunks(found):
    return [item for item in found if isinstance(item, Chunk)]


def notices(found, kind):
    return [dict(item.about) for item in found if isinstance(item, Notice) and item.kind == kind]


def frames(found):
    return np.concatenate([chunk.frames for chunk in chunks(found)])


def plain(pipeline, count, changes=(), **stream):
    """The frames of the engine's own stream; changes: (chunk, prompt) before that chunk."""
    made, changes = [], dict(changes)
    with pipeline.stream(PROMPT, **{"seed": 3} | stream) as one:
        for number in range(count):
            if number in changes:
                one.set_prompt(changes[number])
            made.append(one.next_chunk())
    return np.concatenate(made)
