"""Typed options: one dataclass reads tables, key=value pairs and command lines, and refuses what does not fit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from engine.config import Preset, Runtime
from engine.options import Parser, add_options, chosen, option, options_of, pairs, read, read_table, replaced


@dataclass(frozen=True)
class Options:
    prompt: str = option(help="a text", metavar="TEXT")
    height: int = option(480, "pixels")
    fps: float | None = option(None, "frames per second")
    adapter: tuple[Path, ...] = option((), "may be repeated", metavar="PATH")
    at: tuple[tuple[str, str], ...] = option((), "a time and a text", metavar=("TIME", "TEXT"))
    eager: bool = option(False, "plainly")
    warped: bool = option(True, "on the grid")
    mode: Literal["clean", "noisy"] = option("clean", "what is kept")
    seed: int = option(0, "of the noise")
    image: Path | None = option(None, "a picture", exclusive="clip")
    video: Path | None = option(None, "a clip", exclusive="clip")


def parsed(*words):
    parser = Parser(prog="program")
    add_options(parser, Options)
    return parser.parse_args(["--prompt", "a", *words])


def test_a_command_line_is_typed():
    words = "--height 3 --fps 2 --adapter a --adapter b --at 1s x --at 2s y --eager --no-warped --mode noisy --image q"
    expected = Options(
        "a", 3, 2.0, (Path("a"), Path("b")), (("1s", "x"), ("2s", "y")), True, False, "noisy", image=Path("q")
    )
    assert options_of(parsed(*words.split()), Options) == expected


def test_what_the_user_did_not_set_is_not_chosen():
    assert chosen(parsed("--height", "480"), Options) == {"prompt": "a", "height": 480}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--height", "3.5"], "argument --height: got '3.5', expected a valid integer"),
        (["--mode", "none"], "argument --mode: invalid choice: 'none'"),
        (["--image", "a", "--video", "b"], "argument --video: not allowed with argument --image"),
        (["--hight", "3"], "unrecognized arguments: --hight 3"),
        (["--video", "--eager"], "argument --video: expected one argument; a value that begins with -"),
        (["--video", "-h"], "argument --video: expected one argument; a value that begins with -"),
        (["--at", "1s", "-x"], "argument --at: expected 2 arguments; a value that begins with -"),
        (["--at", "1s", "caf\udce9"], "argument --at: got 'caf\\udce9', expected text in UTF-8"),
        (["--height", "\udce9"], "argument --height: got '\\udce9', expected text in UTF-8"),
    ],
)
def test_a_bad_command_line_is_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(*words)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_values_may_begin_with_a_dash():
    made = options_of(parsed("--video", "-a.mp4", "--adapter", "-b", "--adapter", "-1", "--seed", "-3"), Options)
    assert made == Options("a", video=Path("-a.mp4"), adapter=(Path("-b"), Path("-1")), seed=-3)
    assert options_of(parsed("--image", "-"), Options).image == Path("-")
    assert options_of(parsed("--image", "caf\udce9.png"), Options).image == Path("caf\udce9.png")


def test_help_names_defaults(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    lines = capsys.readouterr().out
    assert "pixels (480)" in lines
    assert "of the noise (0)" in lines
    assert "--at TIME TEXT" in lines


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "file: got no prompt, expected it"),
        ({"prompt": "a", "hight": 3}, "file: got unknown key hight, expected one of prompt, height, "),
        ({"prompt": 3}, "file: prompt: got 3, expected a valid string"),
        ({"prompt": "a", "height": "3"}, "file: height: got '3', expected a valid integer"),
        ({"prompt": "a", "height": 3.0}, "file: height: got 3.0, expected a valid integer"),
        ({"prompt": "a", "height": True}, "file: height: got True, expected a valid integer"),
        ({"prompt": "a", "eager": 1}, "file: eager: got 1, expected a valid boolean"),
        ({"prompt": "a", "mode": "none"}, "file: mode: got 'none', expected 'clean' or 'noisy'"),
    ],
)
def test_a_bad_table_is_one_line(values, message):
    with pytest.raises(ValueError, match="got") as error:
        read(Options, values, "file")
    assert str(error.value).startswith(message)


def test_tables_pairs_and_replacements(tmp_path):
    file = tmp_path / "options.toml"
    file.write_text('[one]\nprompt = "a"\nfps = 8\nadapter = ["x"]\n')
    expected = Options("a", fps=8.0, adapter=(Path("x"),))
    assert read_table(Options, file, "one") == expected
    assert read_table(Options, file, "one", pairs(["height=32", "mode=noisy", "at=[['1s', 'b']]"])) == replaced(
        expected, {"height": 32, "mode": "noisy", "at": [["1s", "b"]]}, "test"
    )
    with pytest.raises(ValueError, match=r"got tables one, expected \[two\]"):
        read_table(Options, file, "two")
    with pytest.raises(ValueError, match="--set: got 'height', expected key=value"):
        pairs(["height"])
    file.write_text("[one\n")
    with pytest.raises(ValueError, match="expected TOML"):
        read_table(Options, file, "one")
    with pytest.raises(FileNotFoundError, match="expected an existing TOML file"):
        read_table(Options, tmp_path / "none.toml", "one")


def test_steps_are_read_from_everywhere():
    rows = ((1000.0, 500.0), (1000.0,))
    for steps in ("1000,500/1000", [[1000, 500], [1000]], rows):
        assert read(Preset, {"family": "causal", "steps": steps}, "preset").steps == rows
    assert read(Preset, {"family": "causal", "steps": [1000, 500]}, "preset").steps == rows[:1]
    with pytest.raises(ValueError, match=r"preset: steps: got 'x', expected numbers|steps: got 'x'"):
        read(Preset, {"family": "causal", "steps": "x"}, "preset")


def test_a_runtime_is_read_as_one_thing():
    assert replaced(Runtime(), {"precision": "fp8", "threads": 2}, "load") == Runtime(precision="fp8", threads=2)
    with pytest.raises(ValueError, match="load: got unknown key dtype, expected one of device, precision"):
        replaced(Runtime(), {"dtype": "fp8"}, "load")
    with pytest.raises(ValueError, match="threads: got 0, expected at least 1"):
        Runtime(threads=0)


@pytest.mark.parametrize("field", ["steps", "commit", "shift"])
def test_a_long_value_is_cut(field):
    long = {"steps": [1000.0] * 10_000, "commit": "x" * 100_000, "shift": 10**4000}[field]
    with pytest.raises(ValueError, match=f"{field}.* expected ") as error:
        read(Preset, {"family": "causal", field: long}, "preset")
    assert len(str(error.value)) < 400
