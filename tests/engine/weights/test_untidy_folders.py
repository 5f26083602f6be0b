"""A model directory or a preset with other things in the place of its files: one line, and nothing waits."""

import json
import os
import shutil
from pathlib import Path

import pytest

import engine
from engine.files import MOST_TEXT
from engine.loader import EMBEDDED, settings_of
from engine.presets import find_preset

FILES = sorted(str(file.relative_to(EMBEDDED)) for file in EMBEDDED.rglob("*") if file.is_file())
INSTEAD = {
    "a folder": Path.mkdir, "a FIFO": os.mkfifo, "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"), "a device": lambda path: path.symlink_to("/dev/zero"),
}  # fmt: skip
TEXTS = {
    "empty": b"", "a byte order mark": b"\xef\xbb\xbf{}", "no UTF-8": b'{"a": "\xff"}', "a list": b"[]",
    "many levels": b'{"a":' * 100_000, "65 levels": b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}", "NaN": b'{"a": NaN}',
    "many digits": b'{"a": ' + b"9" * 10_000 + b"}", "a key twice": b'{"a": 1, "a": 1}', "cut": b'{"a": ',
    "half a surrogate pair": b'{"a": "\\ud800"}', "beyond floats": b'{"a": 1e999}',
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(EMBEDDED, tmp_path / "model"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", INSTEAD)
def test_something_else_in_the_place_of_a_file(model, name, kind):
    (model / name).unlink()
    INSTEAD[kind](model / name)
    with pytest.raises(ValueError, match=rf"{name}: got .*, expected a file[^\n]*$"):
        settings_of(model)


@pytest.mark.parametrize("name", ["engine.json", "model_index.json", "transformer/config.json", "vae/config.json",
                                  "text_encoder/config.json", "tokenizer/tokenizer_config.json"])  # fmt: skip
def test_texts_that_are_no_settings(model, name):
    for case, text in TEXTS.items():
        (model / name).write_bytes(text)
        with pytest.raises(ValueError, match=rf"^[^\n]*{name}: got [^\n]*, expected [^\n]*$") as caught:
            engine.plan_of(model)
        assert len(str(caught.value)) < 600, case


def test_a_file_of_settings_that_is_too_large(model):
    with (model / "engine.json").open("wb") as opened:
        opened.truncate(MOST_TEXT + 1)
    with pytest.raises(ValueError, match=rf"engine.json: got {MOST_TEXT + 1} bytes, expected at most {MOST_TEXT}$"):
        settings_of(model)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("transformer/config.json", '"patch_size": [1, Infinity, 2]', r"config.json: got Infinity, expected a finite"),
        ("transformer/config.json", '"patch_size": [1, 2]', r"patch_size: got .*, expected 3 values"),
        ("transformer/config.json", '"num_layers": [30]', r"num_layers: got \[30\], expected a valid integer"),
        ("transformer/config.json", '"num_layers": true', r"num_layers: got True, expected a valid integer"),
        ("transformer/config.json", '"num_layers": 1e1', r"num_layers: got 10.0, expected a valid integer"),
        ("transformer/config.json", '"eps": ' + "9" * 400, r"eps: got 9+\.\.\., expected a number in range"),
        (
            "tokenizer/tokenizer_config.json",
            '"model_max_length": [1]',
            r"got model_max_length '\[1\]', expected a positive number",
        ),
        ("tokenizer/tokenizer_config.json", '"model_max_length": -1', r"got model_max_length '-1', expected a pos"),
        ("tokenizer/tokenizer_config.json", '"pad_token": [1]', r"got pad_token '\[1\]', expected up to"),
        ("engine.json", '"fps": [16]', r"fps: got \[16\], expected a valid number"),
        ("engine.json", '"height": 3.5', r"height: got 3.5, expected a valid integer"),
        ("engine.json", '"overrides": [1]', r"overrides: got \[1\], expected a table"),
        ("engine.json", '"preset": "gredy"', r"engine.json: got preset 'gredy', expected one of greedy, "),
        ("engine.json", '"preset": "/etc/app.toml"', r"engine.json: got preset '/etc/app.toml', expected one of "),
    ],
)
def test_values_of_another_kind(model, name, change, match):
    content = json.loads((model / name).read_text())
    content.pop(change.split('"')[1], None)
    (model / name).write_text(f"{{{change}, {json.dumps(content)[1:]}")
    with pytest.raises(ValueError, match=match) as caught:
        engine.plan_of(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("chunk = [1]", r"chunk: got \[1\], expected a valid integer"),
        ("chunk = 1.0", r"chunk: got 1.0, expected a valid integer"),
        ("chunk = true", r"chunk: got True, expected a valid integer"),
        ("chunk = inf", r"chunk: got inf, expected a valid integer"),
        ("chunk = 0", r"got chunk 0, expected 1 to"),
        ("chunk = 9223372036854775808", r"got chunk 9223372036854775808, expected 1 to"),
        ("shift = inf", r"got shift inf, expected 0.001 to 1000"),
        ("shift = nan", r"got shift nan, expected 0.001 to 1000"),
        ("shift = 1e300", r"got shift 1e\+300, expected 0.001 to 1000"),
        ("shift = -1", r"got shift -1.0, expected 0.001 to 1000"),
        ("shift = [5.0]", r"shift: got \[5.0\], expected a valid number"),
        ("shift = " + "9" * 400, r"shift: got 9+\.\.\., expected a number in range"),
        ("chunk = " + "9" * 5000, r"expected TOML"),
        ("steps = [1000, inf]", r"got steps .*inf.*, expected"),
        ("steps = [nan]", r"got steps .*nan.*, expected"),
        ("steps = [500, 1000]", r"got steps .*, expected falling numbers"),
        ("steps = [[1000], 500]", r"steps: got .*, expected a list"),
        ("steps = [true]", r"steps: got .*, expected a valid number"),
        ("steps = {a = 1}", r"steps: got .*, expected a list"),
        ("context_timestep = inf", r"got context_timestep inf, expected 0 to 1000"),
        ("stop_after = -1", r"got stop_after -1, expected 0 to"),
        ("window = 3\nchunk = 2", r"got window 3, expected a multiple of chunk"),
        ("solver = ['unipc']", r"solver: got .*, expected a valid string"),
        ("solver = 'heun'", r"got solver 'heun', expected one of"),
        ("warped = 1", r"warped: got 1, expected a valid boolean"),
        ("windows = 3", r"got unknown key windows, expected one of"),
        ("base = ['greedy']", r"got base \['greedy'\], expected one of"),
        ("chunk = 1\nchunk = 1", r"expected TOML"),
        ("a = " + "[" * 65 + "]" * 65, r"expected TOML of at most 64 levels"),
        ("a = " + "[" * 100_000, r"expected TOML of at most 64 levels"),
        ("\ufeffchunk = 1", r"got a byte order mark, expected UTF-8 without one"),
        ("chunk = ", r"expected TOML"),
    ],
)  # fmt: skip
def test_presets_of_users(tmp_path, text, match):
    file = tmp_path / "own.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=match) as caught:
        find_preset(str(file))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("kind", INSTEAD)
def test_something_else_in_the_place_of_a_preset(tmp_path, kind):
    file = tmp_path / "own.toml"
    INSTEAD[kind](file)
    with pytest.raises(ValueError, match=r"own.toml: got .*, expected a file[^\n]*$"):
        find_preset(str(file))
