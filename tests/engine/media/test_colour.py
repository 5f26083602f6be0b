"""HDR and wide gamut on a BT.709 display, against float64 formulae and published numbers."""

import numpy as np
import pytest
from clip_files import plain, write

from engine.media.clips import read_clip
from engine.media.colour import (
    BT2020,
    HLG,
    P3,
    PQ,
    hlg_to_scene,
    light_to_pq,
    pq_to_light,
    to_bt709,
    to_sdr,
    tone_curve,
)


def test_published_numbers():
    """BT.2408: 203 cd/m2 are 58 % of PQ and 75 % of HLG; 18 % grey is 26 cd/m2, 38 % of both. BT.2100: 10,000 at 1."""
    assert pq_to_light(np.array([0.0, 1.0])) == pytest.approx([0, 10000], abs=1e-6)
    assert light_to_pq(np.array([203.0, 26.0])) == pytest.approx([0.58, 0.38], abs=0.005)
    assert 1000 * hlg_to_scene(np.array([0.75, 0.38])) ** 1.2 == pytest.approx([203, 26], rel=0.03)
    assert hlg_to_scene(np.array([0.0, 0.5, 1.0])) == pytest.approx([0, 1 / 12, 1], abs=1e-6)
    codes = np.linspace(0, 1, 101)
    assert light_to_pq(pq_to_light(codes)) == pytest.approx(codes, abs=1e-6)


def test_matrices():
    """BT.2087 for BT.2020; CSS Color 4 for Display P3."""
    bt2087 = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    assert to_bt709(BT2020) == pytest.approx(np.array(bt2087), abs=1e-4)
    p3 = [[1.22494, -0.22494, 0], [-0.042057, 1.042057, 0], [-0.019638, -0.078636, 1.098274]]
    assert to_bt709(P3) == pytest.approx(np.array(p3), abs=1e-4)


def test_tone_curve():
    """BT.2390: nothing below the knee changes, the source's peak becomes the display's, and the curve grows."""
    light = np.array([0.0, 1, 10, 50, 75, 203, 500, 1000])
    mapped = tone_curve(light, 1000)
    assert mapped[:5] == pytest.approx(light[:5], rel=1e-4, abs=1e-6)
    assert mapped[-1] == pytest.approx(203, rel=1e-4)
    assert np.all(np.diff(mapped) > 0)
    assert tone_curve(light, 203) == pytest.approx(np.minimum(light, 203))


def expected(rgb, transfer, primaries, peak):
    """One colour in float64: BT.2100, BT.2390 on the brightest channel, the primaries' matrix, BT.1886."""
    rgb = np.array(rgb, np.float64)
    if transfer == PQ:
        p = rgb ** (32 / 2523)
        light = 1e4 * (np.maximum(p - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * p)) ** (16384 / 2610)
    elif transfer == HLG:
        scene = np.where(rgb <= 0.5, rgb**2 / 3, (np.exp((rgb - 0.55991073) / 0.17883277) + 0.28466892) / 12)
        light, peak = 1000 * scene * (scene @ [0.2627, 0.6780, 0.0593]) ** 0.2, 1000
    else:
        light = 203 * rgb**2.4
    if transfer in (PQ, HLG) and light.max() > 0:
        light = light * tone_curve(light.max()[None], peak)[0] / light.max()
    return 255 * np.clip(to_bt709(primaries) @ light / 203, 0, 1) ** (1 / 2.4)


COLOURS = [(0, 0, 0), (0.25, 0.25, 0.25), (0.5, 0.5, 0.5), (0.75, 0.75, 0.75), (1, 1, 1), (0.75, 0, 0), (0.6, 0.5, 0.4)]


@pytest.mark.parametrize("transfer", [PQ, HLG, 1])
@pytest.mark.parametrize("primaries", [BT2020, P3])
@pytest.mark.parametrize("peak", [600.0, 1000.0, 4000.0])
def test_one_colour(transfer, primaries, peak):
    code = (np.array(COLOURS) * 65535).round().astype(np.uint16)[None]
    want = [expected(colour, transfer, primaries, peak) for colour in COLOURS]
    assert np.abs(to_sdr(code, transfer, primaries, peak)[0] - want).max() <= 1


def coded(rgb, kr=0.2627, kb=0.0593):
    """R'G'B' as Y'CbCr of 10 bits and limited range, BT.2020."""
    r, g, b = rgb
    y = kr * r + (1 - kr - kb) * g + kb * b
    values = 64 + 876 * y, 512 + 896 * (b - y) / (2 - 2 * kb), 512 + 896 * (r - y) / (2 - 2 * kr)
    return [round(value) for value in values]


@pytest.mark.parametrize(("transfer", "words"), [
    (PQ, "PQ tone-mapped to SDR"), (HLG, "HLG tone-mapped to SDR"), (14, "colours of BT.2020 converted to BT.709"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_a_clip(tmp_path, transfer, words, name):
    colours = [(0.58, 0.58, 0.58), (0.5, 0.3, 0.2), (0.25, 0.25, 0.25), (0.2, 0.45, 0.3)]

    def prepare(stream):
        context = stream.codec_context
        context.colorspace, context.color_trc, context.color_primaries, context.color_range = 9, transfer, 9, 1

    def retag(frame):
        frame.colorspace, frame.color_trc, frame.color_primaries, frame.color_range = 9, transfer, 9, 1

    frames = [plain("yuv420p10le", *coded(colour)) for colour in colours]
    codec, options = ("ffv1", {}) if name == "a.mkv" else ("libx265", {"x265-params": "lossless=1:log-level=none"})
    write(
        tmp_path / name, frames, codec=codec, pixels="yuv420p10le", prepare=prepare, retag=retag, codec_options=options
    )
    notes = []
    got = read_clip(tmp_path / name, 32, 48, 10, 9, notes=notes)
    for frame, colour in zip(got, colours, strict=True):
        assert np.abs(frame[16, 24] - expected(colour, transfer, 9, 1000)).max() <= 3
        assert np.abs(frame - frame[16, 24].astype(int)).max() <= 1
    assert notes == [f"{name}: {words}"]


def test_red_of_bt709_inside_hlg_is_red(tmp_path):
    """Primary red of a BT.709 display at reference white, packed into BT.2020 and HLG, comes back red."""
    light = np.linalg.inv(to_bt709(BT2020)) @ [203, 0, 0]
    scene = light / 1000
    scene *= (scene @ [0.2627, 0.6780, 0.0593]) ** (-0.2 / 1.2)
    rgb = np.where(
        scene <= 1 / 12, np.sqrt(3 * scene), 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    )

    def tag(what):
        what.colorspace, what.color_trc, what.color_primaries, what.color_range = 9, HLG, 9, 1

    write(tmp_path / "a.mkv", [plain("yuv444p10le", *coded(rgb))], codec="ffv1", pixels="yuv444p10le", retag=tag,
          prepare=lambda stream: tag(stream.codec_context))  # fmt: skip
    red, green, blue = read_clip(tmp_path / "a.mkv", 32, 48, 10, 9)[0, 16, 24]
    assert red > 230
    assert green < 25
    assert blue < 25
