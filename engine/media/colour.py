"""Colours of HDR and of wide-gamut video as a BT.709 display shows them, in float32.

    PQ, HLG -> light of the display (BT.2100) -> tone curve (BT.2390) -> BT.709 primaries -> gamma 2.4 (BT.1886)

Reference white is 203 cd/m2 (BT.2408), which is also the peak of the SDR display.
"""

from functools import cache

import numpy as np

PQ, HLG = 16, 18  # transfer characteristics of ISO/IEC 23091-2
BT709, BT2020, P3 = 1, 9, 12  # primaries of ISO/IEC 23091-2
WHITE = 203.0  # cd/m2
HLG_PEAK = 1000.0  # cd/m2; there the system gamma is 1.2
_CHROMATICITIES = {
    BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    P3: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
_D65 = (0.3127, 0.3290)
_M1, _M2 = 2610 / 16384, 2523 / 32
_C1, _C2, _C3 = 3424 / 4096, 2413 / 128, 2392 / 128
_A, _B, _C = 0.17883277, 0.28466892, 0.55991073


def pq_to_light(code: np.ndarray) -> np.ndarray:
    """The EOTF of BT.2100 PQ: [0, 1] -> cd/m2."""
    root = np.power(code, 1 / _M2)
    return 1e4 * np.power(np.maximum(root - _C1, 0) / (_C2 - _C3 * root), 1 / _M1)


def light_to_pq(light: np.ndarray) -> np.ndarray:
    """cd/m2 -> [0, 1]."""
    power = np.power(np.maximum(light, 0) / 1e4, _M1)
    return np.power((_C1 + _C2 * power) / (1 + _C3 * power), _M2)


def hlg_to_scene(code: np.ndarray) -> np.ndarray:
    """The inverse OETF of BT.2100 HLG: [0, 1] -> light of the scene, [0, 1]."""
    return np.where(code <= 0.5, np.square(code) / 3, (np.exp((code - _C) / _A) + _B) / 12)


def tone_curve(light: np.ndarray, peak: float) -> np.ndarray:
    """The EETF of BT.2390 from a display of `peak` to one of 203 cd/m2: cd/m2 -> cd/m2."""
    if peak <= WHITE:
        return np.minimum(light, WHITE)
    top = light_to_pq(np.array(peak))
    given, most = np.minimum(light_to_pq(light) / top, 1), light_to_pq(np.array(WHITE)) / top
    knee = 1.5 * most - 0.5
    t = np.clip((given - knee) / (1 - knee), 0, 1)
    bent = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    return pq_to_light(np.where(given < knee, given, bent) * top)


@cache
def to_bt709(primaries: int) -> np.ndarray:
    """Linear RGB with these primaries -> linear RGB with those of BT.709, white D65: [3, 3]."""
    source, target = (_rgb_to_xyz(_CHROMATICITIES[which]) for which in (primaries, BT709))
    return np.linalg.inv(target) @ source


def _rgb_to_xyz(corners: tuple[tuple[float, float], ...]) -> np.ndarray:
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in corners]).T
    x, y = _D65
    return columns * np.linalg.solve(columns, np.array([x / y, 1, (1 - x - y) / y]))


@cache
def _table(transfer: int) -> np.ndarray:
    """Light of every 16-bit code: cd/m2 for PQ, of the scene for HLG, relative to white for gamma 2.4."""
    code = np.arange(65536) / 65535
    light = {PQ: pq_to_light, HLG: hlg_to_scene}.get(transfer, lambda c: np.power(c, 2.4))
    return light(code).astype(np.float32)


def to_sdr(pixels: np.ndarray, transfer: int, primaries: int, peak: float) -> np.ndarray:
    """R'G'B' of HDR or of a wide gamut, uint16 [H, W, 3] -> R'G'B' of BT.709, uint8 [H, W, 3].

    `peak` in cd/m2 is that of the display which PQ was graded on. The brightest of R, G and B goes through the tone
    curve, and all three are scaled alike, which keeps the hue. What lies outside BT.709 is clipped.
    """
    light = _table(transfer)[pixels]
    if transfer == HLG:
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light *= HLG_PEAK * np.power(luminance, 0.2)[..., None]
        peak = HLG_PEAK
    if transfer in (PQ, HLG):
        brightest = light.max(-1)
        steps = np.linspace(0, 1, 4096)  # of PQ, where the curve is smooth
        curve = np.interp(light_to_pq(brightest), steps, light_to_pq(tone_curve(pq_to_light(steps), peak)))
        light *= (pq_to_light(curve) / np.maximum(brightest, 1e-6) / WHITE)[..., None].astype(np.float32)
    shown = np.clip(light @ to_bt709(primaries).T.astype(np.float32), 0, 1)
    return np.rint(255 * np.power(shown, 1 / 2.4)).astype(np.uint8)
