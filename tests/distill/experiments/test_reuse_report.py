"""`python -m distill reuse`: which ways it compares, its counts against bench's, and a whole run in miniature."""

import json
import shutil
from pathlib import Path

import pytest

from bench.instruments.flops import chunk_cost, total
from distill.__main__ import main
from distill.experiments import reuse
from distill.experiments.reuse import ReuseConfig, Way, counted_flops, full_size, psnr, ways_of
from distill.models.student_file import read_student
from engine.config import TransformerConfig
from engine.loader import EMBEDDED

SMALL = TransformerConfig(num_attention_heads=2, attention_head_dim=16, ffn_dim=64, text_dim=24, num_layers=5)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "TransformerConfig", lambda: SMALL)


def test_a_pattern_is_compared_with_the_same_steps_without_its_own() -> None:
    config = ReuseConfig(patterns=("3:1:1", "2,4:1:0", "3:0:0 renoise"), trained=((1000, 500),))
    found = {way.name: (way.kind, way.full, way.control) for way in ways_of(config)}
    full, few = "1000,750,500,250", "1000,500"
    assert found == {
        full: ("full", "", ""),
        few: ("trained", full, ""),
        "1000,750,250": ("dropped", full, ""),
        "reuse 3:1:1": ("reuse", full, "1000,750,250"),
        "reuse 2,4:1:0": ("reuse", full, few),
        f"{full} renoise": ("full", "", ""),
        "1000,750,250 renoise": ("dropped", f"{full} renoise", ""),
        "reuse 3:0:0 renoise": ("reuse", f"{full} renoise", "1000,750,250 renoise"),
    }
    with pytest.raises(ValueError, match=r"\[reuse\] patterns: got 'none', expected STEP"):
        ways_of(ReuseConfig(patterns=("none",)))


@pytest.mark.parametrize("fields", [{}, {"reuse": "3:1:1"}, {"reuse": "2,3:0:2"}, {"steps": [1000, 750, 250]}])
def test_flops_are_those_that_bench_counts(fields: dict) -> None:
    pipeline, way = full_size(), Way("", "full", fields)
    found = counted_flops(pipeline, way)
    assert found == total(chunk_cost(reuse.streamed(pipeline, way), reuse.TEXT_ROWS)).flops
    assert found == counted_flops(pipeline, way)


def test_psnr() -> None:
    clips, reference = (reuse.np.full((2, 3, 4, 2, 2), value, reuse.np.float16) for value in (0.5, 0.25))
    reference[1] = 0.5
    assert psnr(clips, reference) == [pytest.approx(20 * 0.90309, abs=1e-3), None]


@pytest.mark.slow
def test_a_run_in_miniature_goes_on_where_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reuse, "WARM", 1)
    words = ["reuse", "--out", str(tmp_path), "--results", str(tmp_path / "results")]
    for entry in ("prompts=2", "frames=5", "rounds=1", "trained=[]", 'patterns=["3:1:1"]'):
        words += ["--set", entry]
    assert main(words) == 0
    content = json.loads((tmp_path / "results" / "reuse.json").read_text())
    first = {way["name"]: way for way in content["ways"]}
    assert first["reuse 3:1:1"]["to_control"]["error"] >= 0
    flops = [first[name]["flops"] for name in ("1000,750,250", "reuse 3:1:1", "1000,750,500,250")]
    assert flops == sorted(flops)
    assert (tmp_path / "results" / "reuse.md").read_text().count("\n|") == 5
    assert (tmp_path / "results" / "reuse.png").is_file()

    monkeypatch.setattr(reuse, "clips_of", lambda *_: pytest.fail("streams again"))
    assert main(words) == 0
    again = {way["name"]: way for way in json.loads((tmp_path / "results" / "reuse.json").read_text())["ways"]}
    assert [way["total"] for way in again.values()] == [way["total"] for way in first.values()]
    capsys.readouterr()
    assert main([*words, "--set", "seed=1"]) == 2
    assert "got scores of other settings, expected those of this run" in capsys.readouterr().err


def test_a_student_that_streams_with_reuse_is_not_trained(tmp_path: Path) -> None:
    """No stage knows reuse, so a student would be trained for another stream than its own."""
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED, model)
    settings = json.loads((model / "engine.json").read_text())
    settings["overrides"]["reuse"] = {"steps": [3], "first": 1, "last": 1}
    (model / "engine.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"^student: got .*model with Preset\(.*reuse=Reuse\(") as error:
        read_student(model)
    assert "\n" not in str(error.value)
