"""greedy-stream: every program behind one name."""

import importlib

import pytest

from engine import cli


def test_every_command_has_a_main():
    for module, _ in cli.COMMANDS.values():
        assert callable(importlib.import_module(module).main)


def test_help_lists_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in cli.COMMANDS)
    assert cli.main([]) == 2


def test_an_unknown_command_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["serv"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: got command 'serv', expected one of run, ")


def test_commands_get_the_rest_of_the_line(model_dir, capsys):
    words = ["run", "--model", str(model_dir), "--prompt", "a red circle", "--frames", "2", "--out", "checksum"]
    assert cli.main([*words, "--quiet", "--json"]) == 0
    assert '"frames": 2' in capsys.readouterr().out
    assert cli.main([*words, "--window", "0"]) == 2
    assert "error: preset: got window 0, expected" in capsys.readouterr().err
    assert cli.main(["export"]) == 2
    assert "got no --out" in capsys.readouterr().err
    assert cli.main(["distill", "nothing"]) == 2
    assert "got 'nothing', expected one of train_vae" in capsys.readouterr().err
