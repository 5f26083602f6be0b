"""bench backends: every variant right before any of them is fast."""

import json

import pytest
import torch

import kernels.table
from bench.__main__ import main
from bench.commands import backends
from bench.instruments import ceilings
from engine.model.layers import Block

pytestmark = pytest.mark.slow

SMALL = ["backends", "--random", "tiny", "--rounds", "1", "--burst", "1", "--chunks", "8", "--threads", "1"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Ceilings given, and torch.compile left out: it takes longer than all the rest."""
    monkeypatch.setattr(ceilings, "measure", lambda *_: ceilings.Ceilings(1e11, 1e10))
    monkeypatch.setattr(torch, "compile", lambda function: function)


def test_variants_errors_and_reports(capsys):
    assert main(SMALL) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = found["variants"]
    gpu = ["graphs"] if torch.cuda.is_available() else []
    assert [*rows] == [
        *("eager", "compile", "kernels"), *gpu, *("fp8", "fp8-attention", "self-forcing-framewise"),
    ]  # fmt: skip
    assert rows["eager"]["ratio"]["median"] == 1
    assert rows["eager"]["error"] == 0
    assert (
        rows["kernels"]["error"] < rows["fp8"]["error"] < rows["fp8-attention"]["error"] < backends.check.FP8_TOLERANCE
    )
    assert all(row["ms_per_chunk"]["median"] > 0 and row["ttff_from_embedding_ms"] > 0 for row in rows.values())
    (report,) = found["reports"].values() if not gpu else [found["reports"]["graphs"]]
    assert report["chunks"] >= 8
    assert report["stream"]["precision"] == "bfloat16"


def test_a_wrong_kernel_gives_no_numbers(monkeypatch, capsys):
    right = Block._self_attention

    def wrong(*args):
        out = right(*args)
        return out if kernels.table._setting.get() == "reference" else out.flip(1)  # eager pipelines ask for that

    monkeypatch.setattr(Block, "_self_attention", wrong)
    assert main(SMALL) == 1
    out, err = capsys.readouterr()
    assert "so there are no numbers" in err
    assert "ms/chunk" not in out


@pytest.mark.parametrize("bad", [["--rounds", "0"], ["--chunks", "3"], ["--burst", "0"]])
def test_refused(bad, capsys):
    assert main([*SMALL, *bad]) == 2
    assert capsys.readouterr().err.startswith("error: got ")
