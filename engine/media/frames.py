"""Turns decoded video frames into pixels as a viewer shows them: upright, square pixels, BT.709 colours, no alpha."""

import struct
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from engine.media.colour import BT709, BT2020, HLG, P3, PQ, to_sdr
from engine.media.inputs import add_once, note_crop

Frame = Any  # av.VideoFrame; PyAV is imported where a clip is read
MOST_PIXELS = 8192 * 8192
# Matrix coefficients of ISO/IEC 23091-2 by the names of FFmpeg's scale filter. 0 is RGB, 2 and 3 say nothing.
_MATRICES = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020"}
_UNTAGGED = (0, 2, 3)
_FULL_RANGE = 2
_SCALING = "flags=lanczos+accurate_rnd+full_chroma_int+bitexact"


def too_large(width: int, height: int) -> str:
    return f"got {width}x{height} pixels, expected at most {MOST_PIXELS / 1e6:.0f} megapixels: scale it down"


class Look(NamedTuple):
    """What decides how a frame is shown. A filter graph serves all frames with the same look."""

    width: int
    height: int
    pixels: str  # FFmpeg's name of the pixel format
    matrix: int
    full_range: bool
    transfer: int
    primaries: int
    interlaced: bool
    turn: tuple[int, int, int, int]  # of the display matrix: how x and y of a stored pixel count on the display
    peak: float  # cd/m2


def look_of(frame: Frame) -> Look:
    """Reads a frame's own tags and side data."""
    entries: Iterable[Any] = frame.side_data
    side = {data.type.name: bytes(data) for data in entries}
    return Look(
        frame.width, frame.height, frame.format.name, frame.colorspace,
        frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj"), frame.color_trc,
        frame.color_primaries, frame.interlaced_frame, _turn(side.get("DISPLAYMATRIX")), _peak(side),
    )  # fmt: skip


def _turn(matrix: bytes | None) -> tuple[int, int, int, int]:
    """a, b, c, d of x' = a x + c y, y' = b x + d y, each -1, 0 or 1; the nearest multiple of 90 degrees."""
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d = struct.unpack_from("5i", matrix)
    if abs(b) + abs(c) > abs(a) + abs(d):
        return 0, 1 if b > 0 else -1, 1 if c > 0 else -1, 0
    return 1 if a >= 0 else -1, 0, 0, 1 if d >= 0 else -1


def _peak(side: dict[str, bytes]) -> float:
    """Peak of HDR10 in cd/m2: MaxCLL, else the mastering display's, else 1000."""
    light = side.get("CONTENT_LIGHT_LEVEL", b"")
    level = struct.unpack_from("I", light)[0] if len(light) >= 4 else 0
    display = side.get("MASTERING_DISPLAY_METADATA", b"")
    if not level and len(display) >= 88:  # AVMasteringDisplayMetadata: ten rationals, then what is known
        numerator, denominator, _, known = struct.unpack_from("4i", display, 72)
        level = numerator / denominator if known and denominator else 0
    return float(min(max(level, 203), 10000)) if level else 1000.0


def matrix_of(look: Look) -> str:
    """The colour matrix by FFmpeg's name.

    An untagged frame has that of its primaries if those are tagged, else BT.709 from 1280 pixels of width or 720 of
    height on, and BT.601 below. ValueError for a matrix that cannot be decoded.
    """
    if look.matrix in _MATRICES:
        return _MATRICES[look.matrix]
    if look.matrix not in _UNTAGGED:
        raise ValueError(f"got colour matrix {look.matrix} of ISO/IEC 23091-2, expected BT.601, BT.709 or BT.2020")
    if look.primaries == BT2020:
        return "bt2020"
    return "bt709" if look.width >= 1280 or look.height >= 720 or look.primaries == BT709 else "bt601"


def size_of(frame: Frame, aspect: Fraction) -> tuple[int, int]:
    """Height and width of a frame on the display, with square pixels."""
    return _on_display(look_of(frame), aspect)[::-1]


def _on_display(look: Look, aspect: Fraction) -> tuple[int, int]:
    """Width and height on the display."""
    wide, high = max(round(look.width * aspect), 1), look.height
    return (high, wide) if look.turn[0] == 0 else (wide, high)


def crop_box(
    width: int, height: int, aspect: Fraction, across: int, down: int, raster: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Width, height, left and top of the middle part that has the shape across : down on the display.

    aspect is a stored pixel's width divided by its height; raster is how many pixels share a chroma sample, each way.
    A part that is cropped lies on the raster.
    """

    def part(kept: Fraction, whole: int, step: int) -> tuple[int, int]:
        if kept >= whole:
            return whole, 0
        size = min(max(step * round(kept / step), step), whole)
        return size, (whole - size) // 2 // step * step

    w, x = part(height * Fraction(across, down) / aspect, width, raster[0])
    h, y = part(width * aspect * down / across, height, raster[1])
    return w, h, x, y


class Renderer:
    """Frames -> uint8 [height, width, 3], scaled to cover and cropped in the middle; stretched without `crop`."""

    def __init__(
        self, height: int, width: int, aspect: Fraction | None, name: str, notes: list[str], crop: bool = True
    ) -> None:
        self.height, self.width, self.name, self.notes, self.crop = height, width, name, notes, crop
        self.aspect = aspect or Fraction(1)  # a stored pixel's width divided by its height
        self.look: Look | None = None

    def __call__(self, frame: Frame) -> np.ndarray:
        """ValueError for a frame that is too large, or in colours that cannot be decoded."""
        if frame.width * frame.height > MOST_PIXELS:
            raise ValueError(
                f"got {frame.width}x{frame.height} pixels, expected at most {MOST_PIXELS / 1e6:.0f} megapixels"
            )
        look = look_of(frame)
        if look != self.look:
            self.look = look
            self.graph = self._graph(frame, look)
        self.graph.vpush(frame)
        pixels = self.graph.vpull().to_ndarray()
        if self.deep:
            pixels = to_sdr(pixels, look.transfer, look.primaries, look.peak)
        return np.ascontiguousarray(_turned(pixels, look.turn))

    def _graph(self, frame: Frame, look: Look) -> Any:
        """An av.filter.Graph for frames of one look. Their colours stay as coded if `self.deep`."""
        import av

        form = av.VideoFormat(look.pixels)
        rgb = form.is_rgb or form.has_palette
        wide_gamut = look.primaries in (BT2020, P3) and not (rgb and look.primaries == BT709)
        self.deep = look.transfer in (PQ, HLG) or wide_gamut
        components = form.components
        alpha = form.has_palette or any(part.is_alpha for part in components)
        sideways = look.turn[0] == 0
        across, down = (self.height, self.width) if sideways else (self.width, self.height)
        high, aspect, steps = look.height, self.aspect, []
        if look.interlaced:
            steps.append(("field", "type=top"))
            high, aspect = (look.height + 1) // 2, aspect / 2
        tags = "" if rgb else f":in_color_matrix={matrix_of(look)}:in_range={'full' if look.full_range else 'limited'}"
        raster = (1, 1) if rgb else (8 // form.chroma_width(8), 8 // form.chroma_height(8))
        if alpha or look.width < raster[0] or high < raster[1]:
            steps.append(("scale", _SCALING + tags))
            steps.append(("format", ("gbrap" if alpha else "gbrp") + ("16le" if self.deep else "")))
            tags, raster = "", (1, 1)
        if alpha:  # laid over black before it is scaled, so that hidden colours do not bleed into shown ones
            steps.append(("premultiply", "inplace=1"))
        if self.crop:
            w, h, x, y = crop_box(look.width, high, aspect, across, down, raster)
            steps.append(("crop", f"{w}:{h}:{x}:{y}"))
        steps.append(("scale", f"{across}:{down}:{_SCALING}{tags}"))
        steps.append(("format", "rgb48le" if self.deep else "rgb24"))
        self._note(look, alpha)

        graph = av.filter.Graph()
        last = graph.add_buffer(
            width=look.width, height=look.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
        )
        for name, arguments in [*steps, ("buffersink", "")]:
            node = graph.add(name, arguments) if arguments else graph.add(name)
            last.link_to(node)
            last = node
        graph.configure()
        return graph

    def _note(self, look: Look, alpha: bool) -> None:
        """Note what of a look a user may want to know."""
        found = []
        if look.turn != (1, 0, 0, 1):
            mirrored = look.turn[0] * look.turn[3] - look.turn[1] * look.turn[2] < 0
            degrees = "180 degrees" if look.turn[0] else f"90 degrees {'' if look.turn[1] > 0 else 'counter'}clockwise"
            found.append(
                "mirrored, as its metadata says" if mirrored else f"rotated by {degrees}, as its metadata says"
            )
        if look.transfer in (PQ, HLG):
            found.append(f"{'PQ' if look.transfer == PQ else 'HLG'} tone-mapped to SDR")
        elif self.deep:
            found.append(f"colours of {'BT.2020' if look.primaries == BT2020 else 'Display P3'} converted to BT.709")
        if alpha:
            found.append("alpha laid over black")
        if look.interlaced:
            found.append("interlaced, only the upper field is used")
        add_once(self.notes, [f"{self.name}: {text}" for text in found])
        if not self.crop:
            return
        if self.aspect != 1:
            add_once(self.notes, [f"{self.name}: pixels of {self.aspect} made square"])
        note_crop(self.notes, self.name, _on_display(look, self.aspect), self.width, self.height)


def _turned(pixels: np.ndarray, turn: tuple[int, int, int, int]) -> np.ndarray:
    """Pixels [H, W, 3] as the display matrix places them: [H, W, 3] or [W, H, 3]."""
    a, b, c, d = turn
    if a == 0:  # x' comes from y, and y' from x
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: 1 if d > 0 else -1, :: 1 if a > 0 else -1]
