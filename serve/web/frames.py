"""Pictures that a viewer sends: decoded on a thread, the newest first, and given to its session."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from serve.core.session import Session
from serve.web.desk import Desk
from serve.web.wire import Invalid

MOST_PIXELS = 1 << 24
KINDS = ("JPEG", "PNG", "WEBP")
_MARKS = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF")


class Intake:
    """Between a connection and the session that follows its pictures. It belongs to the event loop.

    A picture that comes before the last one was decoded takes its place, so nothing piles up; the session's input
    counts it as dropped.
    """

    def __init__(self, desk: Desk, session: Session, decode: Callable[[Any], np.ndarray]) -> None:
        """desk: is told of a picture that cannot be read, once for each that comes after a good one."""
        self._desk, self._session, self._decode = desk, session, decode
        self._newest: tuple[Any, float] | None = None
        self._came = asyncio.Event()

    def put(self, picture: Any) -> None:
        """A picture that came now. Of a viewer whose session another one has taken over, it counts for nothing."""
        if not self._desk.owns:
            return
        if self._newest is not None and self._session.input is not None:
            self._session.input.dropped += 1
        self._newest = picture, time.monotonic()
        self._came.set()

    async def run(self) -> None:
        """Decode and give, until it is cancelled."""
        bad, given = False, self._session.input
        assert given is not None
        while True:
            await self._came.wait()
            self._came.clear()
            newest, self._newest = self._newest, None
            if newest is None:
                continue
            try:
                frame = await asyncio.to_thread(self._decode, newest[0])
            except Exception as error:
                if not bad:
                    said = str(error) if isinstance(error, Invalid) else f"frame: got {error}, expected a picture"
                    self._desk.error("invalid_request", said)
                bad = True
                continue
            bad = False
            given.put(frame, newest[1])
            self._session.wake()


def picture_of_bytes(data: bytes, height: int, width: int) -> np.ndarray:
    """A JPEG, PNG or WebP picture, or RGB bytes of just this size, as uint8 [height, width, 3]. Invalid.

    It is scaled to cover and cropped in the middle.
    """
    if len(data) == height * width * 3 and not data.startswith(_MARKS):
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)
    expected = f"a picture in JPEG, PNG or WebP, or {height * width * 3} bytes of RGB"
    try:
        with Image.open(io.BytesIO(data), formats=KINDS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Invalid(
                    f"frame: got {image.width}x{image.height}, expected at most {MOST_PIXELS >> 20} megapixels"
                )
            image.draft("RGB", (2 * width, 2 * height))  # a JPEG is decoded no larger than needed
            return np.asarray(ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS))
    except Invalid:
        raise
    except Exception:  # PIL's readers raise whatever damaged data leads them to
        raise Invalid(f"frame: got {len(data)} bytes, expected {expected}") from None
