"""Writes clips with known timestamps, pixels and metadata by PyAV."""

from fractions import Fraction

import av
import numpy as np

LEVELS = 20, 4  # grey of frame 0, and step from frame to frame


def grey(number, height=32, width=48):
    """A frame whose number can be read off its mean."""
    return np.full((height, width, 3), LEVELS[0] + LEVELS[1] * (number % 50), np.uint8)


def numbers_of(clip):
    """The numbers of grey frames: list of int."""
    return [round((float(frame.mean()) - LEVELS[0]) / LEVELS[1]) for frame in clip]


def write(path, frames, times=None, codec="libx264", pixels="yuv420p", tick=Fraction(1, 1000), rate=10, **options):
    """Encode frames: uint8 [H, W, 3 or 4], or av.VideoFrame. `times` count ticks.

    options: held (ticks of the last packet), codec_options, muxer, prepare(stream), retag(frame), packets(list)
    """
    frames = list(frames)
    times = [round(i / rate / tick) for i in range(len(frames))] if times is None else times
    first = frames[0]
    height, width = (first.height, first.width) if isinstance(first, av.VideoFrame) else first.shape[:2]
    with av.open(str(path), "w", options=options.get("muxer", {})) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.options = options.get("codec_options", {"crf": "4"} if codec == "libx264" else {})
        stream.codec_context.time_base = tick
        options.get("prepare", lambda stream: None)(stream)
        packets = []
        for time, frame in zip(times, frames, strict=True):
            if not isinstance(frame, av.VideoFrame):
                frame = av.VideoFrame.from_ndarray(frame, format="rgba" if frame.shape[2] == 4 else "rgb24")
                frame = frame.reformat(format=pixels, threads=1)
            frame.pts, frame.time_base = time, tick
            options.get("retag", lambda frame: None)(frame)
            packets += stream.encode(frame)
        packets += stream.encode()
        if "held" in options:
            max(packets, key=lambda packet: packet.pts).duration = options["held"]
        for packet in packets:
            container.mux(packet)


def plain(pixels, *values, height=32, width=48):
    """An av.VideoFrame whose planes hold one value each."""
    frame = av.VideoFrame(width, height, pixels)
    for plane, value in zip(frame.planes, values, strict=True):
        wide = np.uint8 if frame.format.components[0].bits == 8 else np.uint16
        plane.update(np.full(plane.buffer_size // np.dtype(wide).itemsize, value, wide).tobytes())
    return frame
