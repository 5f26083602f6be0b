"""H.264 units -> fragmented MP4: an init segment, and one fragment per chunk with absolute timestamps."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import av

from serve.core.encoders import Unit

# Each fragment comes from a muxer of its own: a muxer that stays open holds every fragment back until the next one.
_OPTIONS = {
    "movflags": "frag_custom+empty_moov+default_base_moof+frag_discont+skip_trailer",
    "use_editlist": "0",
    "avoid_negative_ts": "disabled",  # otherwise each fragment would begin at 0
}


class Fragmenter:
    """Makes the fragments of one video at `fps`. The first unit that it gets is a key frame."""

    def __init__(self, fps: float) -> None:
        self._time_base = 1 / Fraction(fps).limit_denominator(1001)
        self._like: Any = None  # a stream of the same size, SPS and PPS
        self._count = 0
        self.init = b""  # ftyp and moov, from the first fragment on

    def fragment(self, units: Sequence[Unit]) -> bytes:
        """moof and mdat of a chunk's units."""
        if self._like is None:
            self._like = av.open(io.BytesIO(units[0].data), format="h264")
        self._count += 1
        file = io.BytesIO()
        options = _OPTIONS | {"fragment_index": str(self._count)}
        with av.open(file, "w", format="mp4", options=options) as container:
            video = container.add_stream_from_template(self._like.streams.video[0], opaque=True)
            video.time_base = self._time_base
            for unit in units:
                packet = av.Packet(unit.data)
                packet.pts = packet.dts = unit.position
                packet.duration, packet.time_base, packet.stream = 1, self._time_base, video
                packet.is_keyframe = unit.key
                container.mux(packet)
        found = list(boxes(file.getvalue()))
        self.init = self.init or b"".join(box for name, box in found if name in (b"ftyp", b"moov"))
        return b"".join(box for name, box in found if name in (b"moof", b"mdat"))


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(type, whole box) of each top-level box of an MP4."""
    at = 0
    while at < len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        yield name, data[at : at + length]
        at += length
