"""Reads a picture as a viewer shows it: upright, in sRGB, over black where it is transparent."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from engine.media.colour import BT709, BT2020, HLG, HLG_PEAK, P3, PQ, to_sdr
from engine.media.decoding import Decoder
from engine.media.inputs import add_once, check_file, note_crop, reason

MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # where PIL refuses: 178,956,970
_PROGRAMS = ("EPS",)  # PostScript, which PIL lets Ghostscript run
_ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
# Code points of ISO/IEC 23091-2: primaries and transfer, in AVIF and HEIC of 16 bits, in PNG of 8.
_CODE_POINTS = re.compile(rb"colrnclx\x00(.)\x00(.)|\x00\x00\x00\x04cICP(.)(.)", re.DOTALL)
_HEAD = 1 << 20  # bytes of a file in which they are looked for
_HEIF = re.compile(rb"....ftyp(?:heic|heix|heim|heis|hevc|hevx|mif1|msf1)", re.DOTALL)


def read_image(path: Path, height: int, width: int, notes: list[str] | None = None, crop: bool = True) -> np.ndarray:
    """A picture as a clip of one frame: uint8 [1, height, width, 3], scaled to cover and cropped in the middle.

    Without `crop` it is stretched. Orientation comes from EXIF, colours go through the ICC profile to sRGB. Alpha is
    laid over black. The first frame of an animation is taken. 16-bit grey and floats in [0, 1] are scaled to 8 bits.
    `notes` receives a line for each change that a user may want to know. FileNotFoundError; ValueError for what is no
    readable picture of at most 178 megapixels; ImportError for HEIC without pillow_heif.
    """
    check_file(path, "image")
    notes = [] if notes is None else notes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns of large pictures and odd metadata
        try:
            with _opened(path) as image:
                if image.format in _ANIMATED and (count := getattr(image, "n_frames", 1)) > 1:
                    notes.append(f"{path.name}: the first of {count} frames is taken; --video continues an animation")
                return _shown(image, path.name, height, width, notes, _code_points(path), crop)[None]
        except Image.DecompressionBombError as error:
            pixels = re.search(r"\d+", str(error))
            got = f"of {int(pixels[0]) / 1e6:.0f} megapixels" if pixels else "too large"
            most = f"{MOST_PIXELS / 1e6:.0f} megapixels"
            raise ValueError(f"image: got {path} {got}, expected at most {most}: scale it down") from None
        except ImportError:
            raise
        except Exception as error:  # PIL's readers raise whatever a damaged file leads them to
            why = "it is no picture" if isinstance(error, UnidentifiedImageError) else reason(error)
            if isinstance(error, UnidentifiedImageError) and _is_video(path):
                raise ValueError(f"image: got {path}, a video, expected a picture: pass it as --video") from None
            raise ValueError(f"image: got {path}, expected a readable picture ({why})") from None


def kind_of(path: Path) -> str:
    """What PIL takes a file for: "picture", "animation", or "" for neither."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _open(path) as image:
                if image.format == "MPEG":  # known by name, but never decoded
                    return ""
                return "animation" if image.format in _ANIMATED and getattr(image, "n_frames", 1) > 1 else "picture"
    except Image.DecompressionBombError:
        return "picture"
    except Exception:
        with path.open("rb") as file:
            return "picture" if _HEIF.match(file.read(12)) else ""


def frames_of(
    path: Path, height: int, width: int, notes: list[str], crop: bool = True
) -> Iterator[tuple[Fraction, float, np.ndarray]]:
    """Frames of an animation: how long each is shown in seconds, the share read, uint8 [height, width, 3].

    `crop` as in `read_image`. ValueError for a damaged file. A GIF's delay below 20 ms means 100 ms, as in browsers.
    """
    try:
        with warnings.catch_warnings(), _open(path) as image:
            warnings.simplefilter("ignore")
            count = getattr(image, "n_frames", 1)
            for number in range(count):
                image.seek(number)
                image.load()
                told = Fraction(image.info.get("duration") or 0)  # ms
                length = Fraction(100) if told < 20 and image.format == "GIF" else max(told, Fraction(1))
                made: list[str] = []
                pixels = _shown(image, path.name, height, width, made, crop=crop)
                add_once(notes, made)
                yield length / 1000, (number + 1) / count, pixels
    except Exception as error:
        raise ValueError(reason(error)) from None


def shown_size(path: Path) -> tuple[int, int]:
    """Height and width of an animation's frames."""
    with warnings.catch_warnings(), _open(path) as image:
        warnings.simplefilter("ignore")
        return ImageOps.exif_transpose(image).size[::-1]


def _opened(path: Path) -> Image.Image:
    """The picture, its pixels not yet decoded."""
    try:
        return _open(path)
    except UnidentifiedImageError:
        with path.open("rb") as file:
            if not _HEIF.match(file.read(12)):
                raise
    try:
        import pillow_heif
    except ImportError:
        raise ImportError(
            f"image: got {path}, a HEIC picture, expected the package pillow_heif to read it (extra heic)"
        ) from None
    pillow_heif.register_heif_opener()
    return _open(path)


def _open(path: Path) -> Image.Image:
    """What PIL opens a file as; never as a program that another program runs."""
    Image.init()
    return Image.open(path, formats=[name for name in Image.ID if name not in _PROGRAMS])


def _code_points(path: Path) -> tuple[int, int]:
    """Primaries and transfer that a file tells by number; (0, 0) if it does not."""
    with path.open("rb") as file:
        found = _CODE_POINTS.search(file.read(_HEAD))
    primaries, transfer = [value[0] for value in found.groups() if value is not None] if found else (0, 0)
    return primaries, transfer


def _shown(
    image: Image.Image, name: str, height: int, width: int, notes: list[str], points: tuple[int, int] = (0, 0),
    crop: bool = True,
) -> np.ndarray:  # fmt: skip
    """What a viewer shows of an opened picture: uint8 [height, width, 3]. points: primaries and transfer."""
    image.load()
    profile = image.info.get("icc_profile")
    upright = image
    with suppress(Exception):  # EXIF that cannot be parsed says nothing
        upright = ImageOps.exif_transpose(image)
        if (turned := image.getexif().get(0x0112, 1)) in range(2, 9):
            notes.append(f"{name}: turned upright (EXIF orientation {turned})")
    flat = _in_srgb(_in_8_bits(upright), profile, name, notes, points)
    if not crop:
        return np.array(flat.resize((width, height), Image.Resampling.LANCZOS))  # torch needs a writable array
    note_crop(notes, name, flat.size, width, height)
    return np.array(ImageOps.fit(flat, (width, height), Image.Resampling.LANCZOS))


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, or floats in [0, 1], as grey of 8 bits. PIL's convert would clip them at 255."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    top = 1.0 if image.mode == "F" else 65535.0
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= top):  # also NaN
        raise ValueError(f"got values from {low:g} to {high:g}, expected 0 to {top:g}")
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


def _in_srgb(
    image: Image.Image, profile: bytes | None, name: str, notes: list[str], points: tuple[int, int]
) -> Image.Image:
    """RGB of 8 bits in sRGB; alpha is laid over black."""
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    if image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("RGB")
    if points[1] in (PQ, HLG) or (points[0] in (BT2020, P3) and not profile):
        image = _numbered(image, points, name, notes)
    else:
        image = _through_profile(image, profile, name, notes)
    if alpha is not None and alpha.getextrema() != (255, 255):
        notes.append(f"{name}: transparent, laid over black")
        image = Image.composite(image, Image.new("RGB", image.size), alpha)
    return image


def _numbered(image: Image.Image, points: tuple[int, int], name: str, notes: list[str]) -> Image.Image:
    """RGB of HDR or of a wide gamut, as a clip of the same code points is shown. PIL has cut it to 8 bits.

    PQ is taken for graded on a display of 1000 cd/m2, as HDR10 without metadata.
    """
    primaries, transfer = points
    pixels = np.asarray(image.convert("RGB")).astype(np.uint16) * 257
    primaries = primaries if primaries in (BT709, P3) else BT2020  # also where HDR does not tell
    gamut = "BT.2020" if primaries == BT2020 else "Display P3"
    hdr = {PQ: "PQ tone-mapped to SDR", HLG: "HLG tone-mapped to SDR"}
    notes.append(f"{name}: {hdr.get(transfer, f'colours of {gamut} converted to sRGB')}")
    return Image.fromarray(to_sdr(pixels, transfer, primaries, HLG_PEAK))


_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "LAB"}


def _through_profile(image: Image.Image, profile: bytes | None, name: str, notes: list[str]) -> Image.Image:
    """RGB, from the profile's colours to sRGB. A picture without a profile is in sRGB already."""
    srgb = ImageCms.createProfile("sRGB")
    if image.mode == "LAB":  # its own definition of colours
        return _converted(image, ImageCms.createProfile("LAB"), srgb)
    if not profile:
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() == _SPACES[image.mode]:
            about = (source.profile.profile_description or "").strip()
            if about.startswith("sRGB"):
                return image.convert("RGB")
            made = _converted(image, source, srgb)
            notes.append(f"{name}: colours converted from {about or 'its profile'} to sRGB")
            return made
    except (ImageCms.PyCMSError, OSError):
        pass
    notes.append(f"{name}: its colour profile cannot be used; taken for sRGB")
    return image.convert("RGB")


def _converted(image: Image.Image, source: object, srgb: object) -> Image.Image:
    made = ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")  # type: ignore[arg-type]
    assert made is not None  # None only in place
    return made


def _is_video(path: Path) -> bool:
    """Whether a file that PIL does not know holds a video."""
    try:
        with Decoder(path, threads=False) as decoder:
            still = decoder.container.format.name.endswith(("_pipe", "image2"))
            return not still and next(decoder.frames(None, lambda share: None), None) is not None
    except Exception:  # whatever it is, it is no video
        return False
