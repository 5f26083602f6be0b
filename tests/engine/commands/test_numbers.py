"""Numbers on the command line of engine.run: decimal digits in ASCII alone, within the range of each option."""

import re
from dataclasses import fields
from typing import get_type_hints

import pytest

import engine.run
from engine.commands.job import Model, Output, Video
from engine.commands.prompts import frame_of
from engine.config import MOST, MOST_SHIFT, Preset, Runtime, TransformerConfig, parse_steps
from engine.media.sinks import open_sink
from engine.model.umt5 import UMT5Config
from engine.model.vae import VAEConfig
from engine.options import real_number, whole_number
from engine.presets import find_preset
from engine.sampling.schedule import Schedule

WRONG = [
    "", " ", "+", "-", "--1", " 1", "1 ", "1\n", "\t1", " -1", "0x10", "0b1", "1_000", "１", "١", "²", "1,0", "1e",
    "e1",    "nan", "-nan", "inf", "-inf", "infinity", "1e400", "-1e400", "1.2.3", "1d3", "0x1p3", "1 000",
]  # fmt: skip
WHOLE = {"1": 1, "+1": 1, "-1": -1, "-0": 0, "007": 7, str(2**63): 2**63, str(2**64): 2**64, str(2**64 + 1): 2**64 + 1}
REAL = {"1e3": 1000.0, "1E+3": 1000.0, ".5": 0.5, "5.": 5.0, "-0": 0.0, "+1.5e-1": 0.15, str(2**64): 2.0**64}


def options_of_type(kind):
    for options in (Video, Model, Preset, Runtime, Output):
        for name, hint in get_type_hints(options).items():
            if hint in (kind, kind | None) and name in {f.name for f in fields(options)}:
                yield "--" + name.replace("_", "-")


WHOLES, REALS = list(options_of_type(int)), list(options_of_type(float))


def said(capfd, *words):
    """The last words of a run of a model that is not there: what is checked first is refused first."""
    try:
        code = engine.run.main(["--prompt", "a", "--model", "nowhere", "--out", "null", *words])
    except SystemExit as stopped:
        code = stopped.code
    err = capfd.readouterr().err
    assert code == 2, err
    assert len(err.splitlines()) == 1, err
    return err


def test_readers():
    for text in WRONG:
        for read in (whole_number, real_number):
            with pytest.raises(ValueError, match=r"^got .*, expected (an integer|a finite number)$"):
                read(text)
    for text in ("1.0", "1e3", ".5"):
        with pytest.raises(ValueError, match="expected an integer"):
            whole_number(text)
    assert {text: whole_number(text) for text in WHOLE} == WHOLE
    assert {text: real_number(text) for text in REAL | WHOLE} == REAL | {text: float(text) for text in WHOLE}


@pytest.mark.parametrize("option", [*WHOLES, *REALS])
def test_every_option_refuses_other_spellings(capfd, option):
    assert {"--seed", "--frames", "--threads", "--crf", "--chunk"} <= set(WHOLES)
    assert {"--seconds", "--fps", "--shift"} <= set(REALS)
    for text in [*WRONG, *(["1.0", "1e3"] if option in WHOLES else [])]:
        err = said(capfd, f"{option}={text}")
        assert f"argument {option}: got {text!r}, expected a valid" in err


@pytest.mark.parametrize("option", [*WHOLES, *REALS])
def test_no_number_wraps_or_ends_in_a_traceback(capfd, option):
    for text in ("-1", str(-(2**64) + 1), str(2**63), str(2**64), str(2**64 + 1), "9" * 300):
        said(capfd, f"{option}={text}")


@pytest.mark.parametrize(
    ("words", "got"),
    [
        (["--seed=-1"], "--seed: got -1, expected 0 to 2^64 - 1"),
        (["--seed", str(2**64)], f"--seed: got {2**64}, expected 0 to 2^64 - 1"),
        (["--frames", str(2**53)], f"--frames: got {2**53}, expected 1 to 2^53 - 1"),
        (["--frames", "0"], "--frames: got 0, expected 1 to 2^53 - 1"),
        (["--video-frames", str(2**64)], f"--video-frames: got {2**64}, expected at most 2^53 - 1"),
        (["--threads", str(2**64)], f"threads: got {2**64}, expected at most 1024"),
        (["--height", str(2**64)], f"--height: got {2**64}, expected 1 to 16384"),
        (["--scale", str(2**64)], f"--scale: got {2**64}, expected 1 to 16384"),
    ],
)
def test_ranges(capfd, words, got):
    assert said(capfd, *words) == f"error: {got}\n"


@pytest.mark.parametrize("text", [*WRONG, "-1", "1f5", f"{2**53}f", "1e300s", "1e17"])
def test_times(text):
    for when in {text, f"{text}s", f"{text}f"} - {f"{2**53}ff"}:
        with pytest.raises(ValueError, match=r"^--prompt-at: got .*, expected a time such as 3.0s"):
            frame_of(when if when != "-1f5f" else "-1", 8, "--prompt-at")


@pytest.mark.parametrize("text", ["1000,nan", "1e400", "1_000", "１０００", "0x3e8", "1000,", "inf"])
def test_steps(text):
    with pytest.raises(ValueError, match="expected numbers as in 1000,500"):
        parse_steps(text)


@pytest.mark.parametrize("size", [(16385, 16), (16, 16385), (2**40, 2**40)])
@pytest.mark.parametrize("target", ["null", "checksum", "-", "v.mp4", "v.y4m", "v.gif", "v.webp", "v/"])
def test_sizes_that_no_output_has(tmp_path, target, size):
    place = target if target in ("null", "checksum", "-") else f"{tmp_path}/{target}"
    with pytest.raises(ValueError, match=r"size: got .* pixels, expected at most 16384 each way"):
        open_sink(place, 8, size)


def test_webp_ends_at_16383(tmp_path):
    with pytest.raises(ValueError, match="webp output: got 16384x16 pixels, expected at most 16383 each way"):
        open_sink(tmp_path / "v.webp", 8, (16, 16384))
    open_sink(tmp_path / "v.webp", 8, (16, 16383)).abort()
    assert not list(tmp_path.iterdir())


ABSURD = [
    ("chunk", 2**20 + 1), ("window", 2**20 + 1), ("window", 2**31), ("attn_sink", 2**31), ("max_position", 10**20),
    ("stop_after", 10**20), ("shift", 1e4), ("shift", 1e-9), ("context_timestep", 1e9),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), ABSURD)
def test_absurd_presets_are_refused_before_anything_is_sized_by_them(tmp_path, name, value):
    """On the command line, in TOML and in a manifest alike."""
    family = "causal" if name == "attn_sink" else "greedy"
    with pytest.raises(ValueError, match=f"^preset: got {name} {re.escape(repr(value))}, expected .* to"):
        Preset(family, **{name: value})
    file = tmp_path / "mine.toml"
    file.write_text(f"{name} = {value}\n")
    with pytest.raises(ValueError, match=f"got {name} {re.escape(repr(value))}, expected .* to"):
        find_preset(str(file))


def test_the_largest_presets():
    assert Preset("causal", chunk=MOST, window=MOST, first_chunk=MOST, max_position=MOST, stop_after=MOST).chunk == MOST
    for shift in (1 / MOST_SHIFT, MOST_SHIFT):
        sigmas = Schedule(Preset("causal", shift=shift)).sigmas
        assert bool(((sigmas > 0) & (sigmas < 1 + 1e-3)).all())


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("transformer", "num_layers"),
        ("text_encoder", "num_layers"),
        ("vae", "num_res_blocks"),
        ("vae", "base_dim"),
        ("transformer", "ffn_dim"),
    ],
)
def test_absurd_configs_build_nothing(part, key):
    kind = {"transformer": TransformerConfig, "text_encoder": UMT5Config, "vae": VAEConfig}[part]
    for value in (2**31, 10**20):
        with pytest.raises(ValueError, match=r"expected (sizes|1 to)"):
            kind.from_dict({key: value})
    for value in ("4", 1.5, None, [2]):
        with pytest.raises(ValueError, match="got"):
            kind.from_dict({key: value})
