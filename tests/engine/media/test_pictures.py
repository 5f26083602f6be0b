"""Pictures: upright, in sRGB, over black, scaled from 16 bits, and what is refused."""

import builtins
import io
import os
import re
import struct
import warnings
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from clip_files import grey, write
from PIL import Image, ImageCms, ImageOps

from engine.media.colour import to_sdr
from engine.media.pictures import read_image


def gradient(height, width):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), 0 * x + 128], -1).astype(np.uint8)


def read(path, height=16, width=24, notes=None):
    return read_image(path, height, width, notes)[0].astype(int)


@pytest.mark.parametrize("size", [(16, 24), (48, 40), (20, 90), (7, 5), (16, 100), (3, 9000), (9000, 3)])
def test_scaled_to_cover_and_cropped_in_the_middle(tmp_path, size):
    picture = Image.fromarray(gradient(*size))
    picture.save(tmp_path / "a.png")
    notes = []
    got = read_image(tmp_path / "a.png", 16, 24, notes)
    assert got.shape == (1, 16, 24, 3)
    assert got.dtype == np.uint8
    assert got.flags.writeable
    assert np.array_equal(got[0], ImageOps.fit(picture, (24, 16), Image.Resampling.LANCZOS))
    assert len(notes) == (size != (16, 24))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "heif", "avif"])
def test_orientation(tmp_path, kind, orientation):
    if kind == "heif":
        pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(gradient(64, 96))
    picture.save(tmp_path / "a.bin", format=kind, exif=exif.tobytes(), quality=100)
    expected = {
        1: [], 2: ["FLIP_LEFT_RIGHT"], 3: ["ROTATE_180"], 4: ["FLIP_TOP_BOTTOM"], 5: ["TRANSPOSE"],
        6: ["ROTATE_270"], 7: ["TRANSVERSE"], 8: ["ROTATE_90"],
    }[orientation]  # fmt: skip
    for name in expected:
        picture = picture.transpose(Image.Transpose[name])
    assert np.abs(read(tmp_path / "a.bin", picture.height, picture.width) - np.asarray(picture)).mean() < 4


def png16(path, values, colour):
    """A PNG with 16 bits per channel: colour 0 grey, 2 RGB. PIL writes no such RGB."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["grey.png", "rgb.png", "grey.tif", "float.tif", "grey.pgm"])
def test_deep_pixels_are_scaled(tmp_path, kind):
    values = np.linspace(0, 65535, 16 * 24).reshape(16, 24).round().astype(np.uint16)
    path = tmp_path / kind
    if kind == "grey.png":
        png16(path, values, 0)
    elif kind == "rgb.png":
        png16(path, np.repeat(values[..., None], 3, -1), 2)
    elif kind == "grey.tif":
        Image.fromarray(values).save(path)
    elif kind == "float.tif":
        Image.fromarray((values / 65535).astype(np.float32)).save(path)
    else:
        path.write_bytes(b"P5 24 16 65535\n" + values.astype(">u2").tobytes())
    assert np.abs(read(path) - values[..., None] / 257).max() <= 1


@pytest.mark.parametrize("values", [np.full((16, 24), 300.0), np.full((16, 24), np.nan), np.full((16, 24), -1.0)])
def test_floats_without_a_known_scale_are_refused(tmp_path, values):
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"image: got .*values from .*expected 0 to 1"):
        read(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA.tif", "RGB", "L", "webp"])
def test_transparent_parts_are_black(tmp_path, mode):
    """What is hidden stays hidden: every kind of transparency, alpha, palette or one transparent colour."""
    colours = gradient(16, 24)
    alpha = np.where(np.arange(24) < 12, 255, 0).astype(np.uint8)[None].repeat(16, 0)
    colours[:, 12:] = 77
    picture = Image.fromarray(np.dstack([colours, alpha]))
    options, name = {}, "a.png"
    if mode == "webp":
        name, options = "a.webp", {"lossless": True, "exact": True}
    elif mode == "LA":
        picture = picture.convert("LA")
    elif mode in ("RGB", "L"):
        colours[:, :12] = 200
        picture = Image.fromarray(colours).convert(mode)
        options = {"transparency": (77, 77, 77) if mode == "RGB" else 77}
    elif mode == "P":
        picture = Image.fromarray(colours).quantize(255)
        index = picture.getpixel((20, 8))
        options = {"transparency": index}
    elif mode == "PA.tif":
        name = "a.tif"
    picture.save(tmp_path / name, **options)
    notes = []
    got = read(tmp_path / name, notes=notes)
    assert np.all(got[:, 12:] == 0)
    assert got[:, :11].max() > 100
    assert notes == [f"{name}: transparent, laid over black"]


def test_half_transparent(tmp_path):
    Image.new("RGBA", (24, 16), (200, 100, 50, 128)).save(tmp_path / "a.png")
    assert np.abs(read(tmp_path / "a.png") - np.array([200, 100, 50]) * 128 / 255).max() <= 1


def display_p3():
    """An ICC profile with the primaries of Display P3 and the transfer curve of sRGB, built by hand."""

    def s15(*values):
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    # Columns adapted to D50, and the curve, as in Apple's "Display P3".
    columns = {
        b"rXYZ": (0.51512, 0.2412, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.1571, 0.06657, 0.78407),
    }
    curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + s15(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    text = "Display P3".encode("utf-16-be")
    words = b"mluc" + bytes(4) + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(text), 28) + text
    tags = {b"desc": words, b"cprt": words, b"wtpt": b"XYZ " + bytes(4) + s15(0.9642, 1.0, 0.8249)}
    tags |= {name: b"XYZ " + bytes(4) + s15(*values) for name, values in columns.items()}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body, at = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = at + len(body)
    head = struct.pack(">I4sI4s4s4s12x4s4s", size, bytes(4), 0x04000000, b"mntr", b"RGB ", b"XYZ ", b"acsp", b"APPL")
    head = head.ljust(68, b"\0") + s15(0.9642, 1.0, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def p3_to_srgb(pixels):
    """In float64, by the matrix between the primaries (CSS Color 4)."""
    matrix = np.array(
        [
            [1.2249401763, -0.2249401763, 0],
            [-0.0420569547, 1.0420569547, 0],
            [-0.0196375546, -0.0786360456, 1.0982736001],
        ]
    )
    code = pixels / 255
    light = np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
    light = np.clip(light @ matrix.T, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "heif"])
def test_display_p3_becomes_srgb(tmp_path, kind):
    if kind == "heif":
        pytest.importorskip("pillow_heif").register_heif_opener()
    blocks = np.array([[200, 60, 60], [60, 200, 60], [90, 90, 220], [255, 255, 255], [128, 128, 128], [180, 140, 120]])
    picture = blocks.astype(np.uint8).reshape(2, 3, 3).repeat(32, 0).repeat(32, 1)
    options = {"lossless": True} if kind == "webp" else {"quality": 100} if kind in ("jpeg", "heif") else {}
    Image.fromarray(picture).save(tmp_path / "a.bin", format=kind, icc_profile=display_p3(), **options)
    notes = []
    got = read(tmp_path / "a.bin", 64, 96, notes)[16::32, 16::32].reshape(6, 3)
    assert np.abs(got - p3_to_srgb(blocks)).max() <= 3
    assert np.abs(got - blocks).max() > 15
    assert notes == ["a.bin: colours converted from Display P3 to sRGB"]


def test_profiles_by_lcms(tmp_path):
    """sRGB changes no bit, a grey picture's RGB profile is not used, a broken one neither."""
    picture = Image.fromarray(gradient(16, 24))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, given, profile, noted in (
        ("a.png", picture, srgb, 0), ("b.png", picture, b"nonsense", 1),
        ("c.png", picture.convert("L"), display_p3(), 1),
    ):  # fmt: skip
        given.save(tmp_path / name, icc_profile=profile)
        notes = []
        assert np.array_equal(read(tmp_path / name, notes=notes), np.asarray(given.convert("RGB")))
        assert len(notes) == noted


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB"])
def test_other_modes(tmp_path, mode):
    picture = Image.fromarray(gradient(64, 96))
    if mode == "LAB":
        to = ImageCms.createProfile("LAB")
        lab = ImageCms.profileToProfile(picture, ImageCms.createProfile("sRGB"), to, outputMode="LAB")
        lab.save(tmp_path / "a.tif")
        assert np.abs(read(tmp_path / "a.tif", 64, 96) - np.asarray(picture)).mean() < 4
        return
    given = picture.convert(mode)
    name = {"CMYK": "a.jpg", "YCbCr": "a.jpg"}.get(mode, "a.png")
    given.save(tmp_path / name, **({"quality": 100} if name == "a.jpg" else {}))
    assert np.abs(read(tmp_path / name, 64, 96) - np.asarray(given.convert("RGB"))).mean() < 3


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_the_first_frame_of_an_animation(tmp_path, kind):
    pictures = [Image.fromarray(grey(10 * i)) for i in range(3)]
    pictures[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=pictures[1:])
    notes = []
    assert np.abs(read(tmp_path / f"a.{kind}", 32, 48, notes) - grey(0)).max() <= 2
    assert notes == [f"a.{kind}: the first of 3 frames is taken; --video continues an animation"]


def test_heic_without_its_package(tmp_path, monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.fromarray(gradient(64, 96))).save(tmp_path / "a.heic")
    assert np.abs(read(tmp_path / "a.heic", 64, 96) - gradient(64, 96)).mean() < 6
    real = builtins.__import__

    def absent(name, *rest, **named):
        if name == "pillow_heif":
            raise ImportError(name)
        return real(name, *rest, **named)

    def unknown(path, *rest, **named):
        raise Image.UnidentifiedImageError("unknown")

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.setattr(Image, "open", unknown)
    with pytest.raises(
        ImportError, match=r"image: got .*a.heic, a HEIC picture, expected the package pillow_heif .*extra heic"
    ):
        read(tmp_path / "a.heic")


def huge_png(path, width, height):
    png16(path, np.zeros((1, 1), np.uint16), 0)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(data)


def spoiled(folder, how):
    path = folder / how
    if how == "fifo":
        os.mkfifo(path)
    elif how == "directory":
        path.mkdir()
    elif how == "empty.png":
        path.touch()
    elif how == "text.png":
        path.write_text("hello")
    elif how == "400.png":
        huge_png(path, 20000, 20000)
    elif how == "150.png":  # PIL warns, and the pixels are missing
        huge_png(path, 15000, 10000)
    elif how == "zero.png":
        huge_png(path, 0, 10)
    elif how in ("cut.png", "cut.jpg", "cut.webp", "cut.gif"):
        data = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
        Image.fromarray(noise).save(data, format={"jpg": "jpeg"}.get(how[4:], how[4:]))
        path.write_bytes(data.getvalue()[: len(data.getvalue()) // 2])
    elif how in ("clip.mp4", "clip.webm", "clip.mpg", "clip.avi"):
        codec = {"webm": "libvpx-vp9", "mpg": "mpeg2video", "avi": "mpeg4"}.get(how[5:], "libx264")
        write(path, map(grey, range(5)), codec=codec, rate=25, times=range(5), tick=Fraction(1, 25))
    return path


REFUSED = {
    "fifo": "a pipe, expected a file", "directory": "a directory, expected a file", "empty.png": "an empty file",
    "text.png": "expected a readable picture", "400.png": "of 400 megapixels, expected at most 179 megapixels",
    "150.png": "expected a readable picture", "zero.png": "expected a readable picture",
    "cut.png": "expected a readable picture", "cut.jpg": "expected a readable picture",
    "cut.webp": "expected a readable picture", "cut.gif": "expected a readable picture",
    "clip.mp4": "pass it as --video", "clip.webm": "pass it as --video", "clip.mpg": "pass it as --video",
    "clip.avi": "pass it as --video", "missing.png": "an existing file",
}  # fmt: skip


@pytest.mark.parametrize("how", REFUSED)
def test_what_is_refused(tmp_path, how):
    path = spoiled(tmp_path, how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(REFUSED[how])) as raised:
            read_image(path, 16, 24)
    assert str(raised.value).startswith(f"image: got {path}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "words"), [("-", "standard input"), ("https://host/a.png", "a URL"), ("/dev/zero", "device")]
)
def test_what_is_no_file(given, words):
    with pytest.raises(ValueError, match=rf"image: got .*{words}"):
        read_image(Path(given), 16, 24)


def test_names_that_are_unusual(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-x.png", os.fsdecode(b"caf\xe9.png"), "http:x.png"):
        Image.fromarray(gradient(16, 24)).save(name, format="png")
        assert np.array_equal(read(Path(name)), gradient(16, 24))


def coded(path, pixels, primaries, transfer):
    """A picture that tells its code points: a PNG by cICP, AVIF and HEIC by their colr box."""
    picture = Image.fromarray(pixels)
    if path.suffix == ".png":
        picture.save(path)
        name = b"cICP" + bytes([primaries, transfer, 0, 1])
        chunk = struct.pack(">I", 4) + name + struct.pack(">I", zlib.crc32(name))
        content = path.read_bytes()
        path.write_bytes(content[:33] + chunk + content[33:])  # behind IHDR
        return
    if path.suffix == ".heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    picture.save(path, format="AVIF" if path.suffix == ".avif" else "HEIF", quality=100)
    content = path.read_bytes()
    at = content.index(b"colrnclx") + 8
    path.write_bytes(content[:at] + struct.pack(">HH", primaries, transfer) + content[at + 4 :])


# PQ and HLG codes of 203 cd/m2, of 8 bits (BT.2408: 58% and 75%), in grey; BT.2390 keeps what is that dark of PQ.
@pytest.mark.parametrize("suffix", [".png", ".avif", ".heic"])
@pytest.mark.parametrize(
    ("transfer", "code", "name", "least", "most"), [(16, 148, "PQ", 205, 245), (18, 191, "HLG", 205, 245)]
)
def test_hdr_stills_are_tone_mapped(tmp_path, suffix, transfer, code, name, least, most):
    path, notes = tmp_path / f"a{suffix}", []
    coded(path, np.full((16, 24, 3), code, np.uint8), 9, transfer)
    got = read(path, notes=notes)
    assert [note for note in notes if f"{name} tone-mapped to SDR" in note]
    assert least <= got.mean() <= most  # paper white stays light; untouched it would be mid-grey
    assert got.std() < 2
    expected = to_sdr(np.full((1, 1, 3), code * 257, np.uint16), transfer, 9, 1000.0)
    assert np.abs(got - expected.astype(int)).max() <= 3


@pytest.mark.parametrize("suffix", [".png", ".avif", ".heic"])
def test_code_points_of_a_wide_gamut(tmp_path, suffix):
    """Red of Display P3 is redder than a BT.709 display shows; SDR in BT.709 is left alone."""
    path, notes = tmp_path / f"a{suffix}", []
    pixels = np.full((16, 24, 3), (200, 100, 100), np.uint8)
    coded(path, pixels, 12, 13)
    got = read(path, notes=notes).mean((0, 1))
    assert [note for note in notes if "Display P3 converted to sRGB" in note]
    assert got[0] > 205
    assert got[1] < 97
    coded(path, pixels, 1, 13)
    assert np.abs(read(path).mean((0, 1)) - (200, 100, 100)).max() <= 3
