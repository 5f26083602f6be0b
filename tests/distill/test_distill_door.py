"""python -m distill STAGE: every stage has a door, its help names every option, and bad input is one line."""

import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import torch

from distill import __main__ as door
from distill.__main__ import STAGES, main
from distill.stages import latents
from distill.stages.latents import BankConfig, BankOptions
from distill.training.stage import Options, Stage, TableOptions
from engine.options import read_table, read_toml

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "distill" / "configs").glob("*.toml"))


def stage_of(name: str) -> Stage:
    return import_module(f"distill.{STAGES[name][0]}").STAGE


def test_help_lists_the_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, about) in STAGES.items():
        assert f"  {name:<21}{about}" in lines
    assert main([]) == 2


def test_help_of_the_first_word_lists_the_stages_that_begin_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["questionnaire", "--help"]) == 0
    listed = capsys.readouterr().out.partition("stages:\n")[2].splitlines()
    assert [line.split()[:2] for line in listed] == [["questionnaire", verb] for verb in ("make", "serve", "score")]
    assert main(["questionnaire"]) == 2


@pytest.mark.parametrize("name", STAGES)
def test_help_of_a_stage_names_every_entry(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every option and every field of the config has a line, and every field a help text."""
    stage = stage_of(name)
    with pytest.raises(SystemExit) as ended:
        main([*name.split(), "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert issubclass(stage.options, TableOptions if stage.config else Options)
    for f in fields(stage.options):
        assert f"--{f.name.replace('_', '-')}" in shown
        assert f.metadata["help"], f.name
    for f in fields(stage.config) if stage.config else ():
        assert f"\n  {f.name} " in shown
        assert f.metadata["help"], f.name
    assert ("--dry-run" in shown) == (name in door.PLANNED)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_are_read(config: Path) -> None:
    found = 0
    for stage in map(stage_of, STAGES):
        if stage.table in read_toml(config):
            found += isinstance(read_table(stage.config, config, stage.table), stage.config)
    assert found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[BankConfig, BankOptions]]:
    """Config and options of every run of stage latents, which then does nothing."""
    found = []

    def run(config: BankConfig, options: BankOptions) -> None:
        if config.clips == 0:
            raise ValueError("clips: got 0, expected\nmore")
        found.append((config, options))

    monkeypatch.setattr(latents, "STAGE", Stage(BankOptions, run, BankConfig, "bank"))
    run.__module__ = latents.__name__
    return found


def test_set_replaces_entries(seen: list[tuple[BankConfig, BankOptions]], tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[bank]\nclips = 7\nframes = 9\n")
    words = ["--config", str(path), "--set", "clips=5", "--set", "vae=runs/my vae", "--out", str(tmp_path)]
    assert main(["latents", *words, "--threads", "2"]) == 0
    (config, options), threads = seen[0], torch.get_num_threads()
    torch.set_num_threads(1)
    assert config == BankConfig(clips=5, frames=9, vae="runs/my vae")
    assert (options.out, threads) == (tmp_path, 2)


def test_hyphens_are_underscores(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample-teacher", "--config", "none.toml"]) == 2
    assert capsys.readouterr().err == "error: config: got none.toml, expected an existing TOML file\n"


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("clip = 3", [], "got unknown key clip, expected one of task, vae"),
        ("clips = 'three'", [], "clips: got 'three', expected a valid integer"),
        ("", ["--set", "clip=3"], "got unknown key clip, expected one of task, vae"),
        ("", ["--set", "clips=1.5"], "clips: got 1.5, expected a valid integer"),
        ("", ["--set", "clips"], "--set: got 'clips', expected key=value"),
        ("[teacher]", ["--set", "clips=0"], "clips: got 0, expected"),
        ("x", [], "expected TOML"),
    ],
)
@pytest.mark.usefixtures("seen")
def test_bad_input_is_one_line(
    text: str, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f"[bank]\n{text}\n")
    assert main(["latents", "--config", str(path), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    with pytest.raises(ValueError, match="expected"):
        main(["latents", "--config", str(path), *words, "--debug"])


def test_a_missing_table_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[vae]\n")
    assert main(["latents", "--config", str(path)]) == 2
    assert "got tables vae, expected [bank]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["paint"], ["questionnaire", "paint"], ["latents", "--dry-run"], ["evaluate", "--prompts", "two"]]
)
def test_bad_words_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(words)
    except SystemExit as ended:  # argparse ends by itself
        status = ended.code
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_bad_numbers_of_evaluate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--prompts", "0"]) == 2
    assert "got 0 prompts and 33 frames, expected at least 1" in capsys.readouterr().err
    assert main(["evaluate", "--preset", "[1]"]) == 2
    assert "--preset: got '[1]', expected a JSON object" in capsys.readouterr().err


def test_every_former_command_has_a_shim() -> None:
    # These had no commands of their own.
    never = {"attention", "consistency", "dataset", "dmd", "following", "heads", "reuse", "tiny_decoder"}
    for name in {name for name in STAGES if " " not in name} - never:
        assert f'former("{name}")' in (ROOT / "distill" / f"{name}.py").read_text()


@pytest.mark.slow
def test_a_former_command_names_the_new_one() -> None:
    """The old command still runs; the status is the new one's."""
    done = subprocess.run(
        [sys.executable, "-m", "distill.rl", "--config", "none.toml"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "python -m distill.rl: this command is now `python -m distill rl`",
        "error: config: got none.toml, expected an existing TOML file",
    ]
