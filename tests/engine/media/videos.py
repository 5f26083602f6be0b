"""Frames to write, and readers of what was written that are not this project's."""

import struct
from itertools import takewhile
from pathlib import Path

import av
import numpy as np


def moving_square(count, size=(48, 64)):
    """A bright square on a dark red ground, another place in every frame; uint8 [H, W, 3] each."""
    frames = []
    for i in range(count):
        frame = np.full((*size, 3), (150, 40, 60), np.uint8)
        left = 4 * i % (size[1] - 16)
        frame[8:24, left : left + 16] = (20, 180, 230)
        frames.append(frame)
    return frames


def grey_steps(count, size=(48, 64)):
    """Frame i has the grey level 10 i mod 256 all over."""
    return [np.full((*size, 3), 10 * i % 256, np.uint8) for i in range(count)]


def is_grey_steps(frames, tolerance=4):
    """Whether decoded frames are those of `grey_steps`, from the first one on."""
    return all(abs(int(frame[20, 20, 0]) - 10 * i % 256) <= tolerance for i, frame in enumerate(frames))


def decode(path):
    """All frames, uint8 [H, W, 3], and the frame rate."""
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)], rate


def packets(path):
    """(pts in seconds, is a key frame, bytes) of every packet."""
    with av.open(str(path)) as container:
        return [(p.pts * p.time_base, p.is_keyframe, bytes(p)) for p in container.demux(video=0) if p.size]


HOLDERS = {"moov": 0, "trak": 0, "mdia": 0, "minf": 0, "stbl": 0, "stsd": 8}
HOLDERS |= dict.fromkeys(("avc1", "hvc1", "vp09", "av01"), 78)  # what stands before the boxes inside


def boxes(data, place=""):
    """(path, content) of all boxes of an mp4 in their order, such as ("moov/mvhd", bytes)."""
    found, at = [], 0
    while at + 8 <= len(data):
        size, name = struct.unpack(">I4s", data[at : at + 8])
        assert 8 <= size <= len(data) - at, f"{place}{name}: a box of {size} bytes at {at} of {len(data)}"
        path, content = place + name.decode("latin-1"), data[at + 8 : at + size]
        found.append((path, content))
        if name.decode("latin-1") in HOLDERS:
            found += boxes(content[HOLDERS[name.decode("latin-1")] :], path + "/")
        at += size
    return found


def box(path, name):
    """The content of the only box whose path ends with `name`."""
    (content,) = [content for place, content in boxes(Path(path).read_bytes()) if place.endswith(name)]
    return content


def is_ordinary_mp4(path):
    """Whether all pictures are in one mdat behind one moov that indexes them."""
    top = [place for place, _ in boxes(Path(path).read_bytes()) if "/" not in place]
    ahead = list(takewhile(lambda name: name != "mdat", top))
    return top[0] == "ftyp" and ahead.count("moov") == top.count("moov") == top.count("mdat") == 1 and "moof" not in top


def files_in(folder):
    """Paths of all files below a folder, as text."""
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
