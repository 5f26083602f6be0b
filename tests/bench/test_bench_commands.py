"""The commands end to end on the tiny pipeline: keys of the last line, one-line errors; adapters as toy processes."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from bench.__main__ import COMMANDS, main, parse
from bench.adapters.protocol import Adapter
from bench.commands import everything
from bench.instruments import ceilings, models
from bench.instruments.flops import Cost
from bench.instruments.header import ROOT
from engine.model.transformer import WanTransformer
from engine.model.vae import VAEConfig
from engine.options import command_line

TOY = """
import sys, time
sys.path.insert(0, {root!r})
from bench.adapters.protocol import serve

class Toy:
    def generate(self, prompt, seed, frames):
        print("noise on stdout")
        for made in range(1, frames + 1, 4):
            time.sleep(0.001)
            yield made

serve(lambda settings: (Toy(), {{"about": f"toy of {{settings['height']}}"}}))
"""
INDEX = {
    "_class_name": "WanPipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"], "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"], "vae": ["diffusers", "AutoencoderKLWan"],
}  # fmt: skip
LIMITS = ceilings.Ceilings(1e11, 1e10)
SETTINGS = {"height": 16, "width": 24, "threads": 1}


@pytest.fixture
def limits(monkeypatch) -> None:
    """Ceilings given, not measured: seconds saved, and numbers to check against."""
    monkeypatch.setattr(ceilings, "measure", lambda *_: LIMITS)


@pytest.fixture
def toy(tmp_path) -> list[str]:
    path = tmp_path / "toy.py"
    path.write_text(TOY.format(root=str(ROOT)))
    return [sys.executable, str(path)]


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.slow
def test_stream(model_dir, capsys, limits):
    assert main(["stream", "--model", str(model_dir), "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert "ok               streaming equals a dense masked pass" in out
    found = json.loads(out.splitlines()[-1])
    assert found.keys() >= {
        "fps", "fps_without_vae", "fps_without_text", "ttff_ms", "ttff_split_ms", "ms_per_chunk", "stages_ms",
        "peak_memory_mb", "memory_mb", "mfu", "mbu", "floor_ms", "ceilings", "jitter_ms", "commit", "device",
    }  # fmt: skip
    assert found["ms_per_chunk"].keys() == {"mean", "p50", "p90", "p99", "max"}
    assert found["ttff_split_ms"].keys() == {"load", "text", "first_chunk", "decode"}
    assert sum(found["stages_ms"].values()) == pytest.approx(found["metered_ms_per_chunk"])
    split = found["ttff_split_ms"]
    assert split["text"] + split["first_chunk"] + split["decode"] == pytest.approx(found["ttff_ms"], rel=0.05)
    assert found["fps_without_vae"] > found["fps"]
    assert found["memory_mb"]["caches"] > 0
    assert found["frames"] == 1 + 4 * (found["chunks"] - 1)
    assert found["floor_ms"] > 0
    assert found["mfu"] == pytest.approx(10 * found["gflop_per_chunk"] / found["ms_per_chunk"]["p50"])


@pytest.mark.slow
def test_stream_saves_what_it_says(model_dir, capsys, limits, tmp_path):
    command = ["stream", "--model", str(model_dir), "--preset", "self-forcing", "--frames", "40", "--rounds", "1"]
    assert main([*command, "--json", "--save", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("stream-self-forcing-cpu-")
    found = last_line(capsys)
    assert json.loads(path.read_text()) == found
    again = parse(found["arguments"].split())[1]
    assert (again.preset, again.frames, again.rounds, again.json) == ("self-forcing", 40, 1, True)


@pytest.mark.slow
@pytest.mark.thorough
def test_compare_races_an_adapter(model_dir, capsys, toy, tmp_path):
    command = ["compare", "--model", str(model_dir), "--presets", "greedy,self-forcing-framewise", "--frames", "17",
               "--rounds", "2", "--pairs", "3", "--adapter", f"toy={' '.join(toy)}", "--json"]  # fmt: skip
    pytest.importorskip("matplotlib")
    assert main([*command, "--plot", str(tmp_path / "plots")]) == 0
    found = last_line(capsys)
    rows = {v["name"]: v for v in found["variants"]}
    assert rows.keys() == {"greedy", "self-forcing-framewise", "toy"}
    assert rows["toy"]["about"] == "toy of 16"
    assert [frames for frames, _ in rows["toy"]["cumulative"]] == [9, 17] or rows["toy"]["cumulative"][-1][0] == 17
    assert rows["self-forcing-framewise"]["ratio"]["median"] == 1
    assert found["claim"]["time_ratio"]["pairs"] == 3
    assert found["claim"]["flops_ratio_without_vae"] < 1
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"compare-growth.png", "compare-speed.png"}


@pytest.mark.slow
def test_scaling_sweeps_and_claim(model_dir, capsys):
    command = ["scaling", "--model", str(model_dir), "--chunks", "40", "--rounds", "2", "--json"]
    assert main([*command, "--sweep", "window,steps,resolution,streams"]) == 0
    found = last_line(capsys)
    assert found.keys() >= {"time_ratio", "memory_growth_mb", "loop_overhead", "sweeps", "claim"}
    flops = found["claim"]["flops"]
    assert flops["formula_exact"]
    assert flops["L_exponent_attention"] == pytest.approx(2)
    assert flops["bidirectional_F_exponent_attention"] == pytest.approx(2)
    assert flops["F"]["r2"] == pytest.approx(1)
    assert flops["T"]["r2"] == pytest.approx(1)
    assert flops["w"]["r2"] == pytest.approx(1)
    assert [p["value"] for p in found["sweeps"]["streams"]] == [1, 2, 4]


@pytest.mark.slow
def test_load(model_dir, capsys):
    command = ["load", "--model", str(model_dir), "--seconds", "0.2", "--max-streams", "2", "--json"]
    assert main([*command, "--target-fps", "0.01"]) == 0
    found = last_line(capsys)
    assert (found["streams_at_target"], found["capped"]) == (2, True)
    assert found["points"][1].keys() >= {"fps", "slowest_fps", "worst_p99_ms", "fairness", "state_mb", "growth_mb"}
    assert main([*command, "--target-fps", "1000000", "--mode", "turns"]) == 0
    assert last_line(capsys)["streams_at_target"] == 0


@pytest.mark.slow
def test_kernels(capsys, limits):
    assert main(["kernels", "--rounds", "2", "--json", "--device", "cpu"]) == 0
    found = last_line(capsys)
    assert {case["op"] for case in found["cases"]} >= {"ring_attention", "norm_modulate", "fp8_linear", "vae_norm_silu"}
    assert all(case["passed"] and case["time_ratio"]["pairs"] == 2 for case in found["cases"])


def test_a_wrong_kernel_has_no_speed(capsys, limits, monkeypatch):
    from bench.operations import attention as attention_cases

    right = attention_cases.ring_attention
    monkeypatch.setattr(attention_cases, "ring_attention", lambda q, k, v, rows: right(q, k, v, rows - 1))
    assert main(["kernels", "--rounds", "2", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert "expected at most twice the library's" in err
    rows = json.loads(out.splitlines()[-1])["cases"]
    assert {row["op"] for row in rows if not row["passed"]} == {"ring_attention"}
    assert all(("ms" in row) == row["passed"] for row in rows)  # the others keep their numbers


@pytest.mark.parametrize("command", [
    ["stream", "--random", "wan2.1-1.3b", "--device", "cpu"],
    ["stream", "--random", "tiny", "--height", "33"],
    ["stream", "--random", "tiny", "--frames", "0"],
    ["stream", "--random", "tiny", "--rounds", "0"],
    ["stream", "--random", "tiny", "--backend", "onnx"],
    ["stream", "--random", "tiny", "--sink", "x.doc"],
    ["stream", "--model", "/nowhere"],
    ["stream", "--bundle", "/nowhere"],
    ["stream", "--random", "huge"],
    ["compare", "--random", "tiny", "--frames", "16"],
    ["compare", "--random", "tiny", "--adapter", "diffusers"],
    ["compare", "--random", "tiny", "--presets", "greedy,gredy"],
    ["scaling", "--random", "tiny", "--chunks", "39"],
    ["scaling", "--random", "tiny", "--sweep", "width"],
    ["load", "--random", "tiny", "--seconds", "0"],
    ["kernels", "--op", "gelu"],
    ["kernels", "--rounds", "0"],
    ["nothing"],
])  # fmt: skip
def test_bad_input_gets_one_line(capsys, command):
    try:
        status = main(command)
    except SystemExit as error:  # argparse's own
        status = error.code
    assert status == 2
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("ok ")]
    assert len(err) == 1
    assert err[0].startswith("error: ")


@pytest.mark.parametrize("name", [*COMMANDS])
def test_every_command_has_help(capsys, name):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"python -m bench {name}" in capsys.readouterr().out


def test_options_become_the_same_command_line():
    asked = ["compare", "--random", "tiny", "--presets", "greedy,diagonal", "--adapter", "a=b c", "--adapter", "none",
             "--with-bundle", "b", "--guidance", "3.5", "--eager", "--json"]  # fmt: skip
    module, options = parse(asked)
    assert options.adapters == ["a=b c"]
    assert parse(["compare", *command_line(options)]) == (module, options)


def test_full_size_shape():
    config, vae, size, anywhere = models.SHAPES["wan2.1-1.3b"]
    assert (size, anywhere, vae) == ((480, 832), False, VAEConfig())
    with torch.device("meta"):
        assert sum(p.numel() for p in WanTransformer(config).parameters()) == 1_418_996_800


def test_ceilings_are_measured():
    found = ceilings.measure(torch.device("cpu"), torch.float32, repeats=1)
    assert found.flops > 1e8
    assert found.bytes > 1e8
    # The rates are whatever the machine gave: 3 * x / x may miss 3 by a bit.
    assert found.floor(Cost(2 * found.flops, found.bytes)) == pytest.approx(2)
    assert found.floor(Cost(found.flops, 3 * found.bytes)) == pytest.approx(3)
    assert found.mfu(Cost(found.flops), 4) == pytest.approx(0.25)


@pytest.mark.parametrize("quick", [True, False])
def test_everything_asks_for_what_exists(monkeypatch, tmp_path, quick):
    asked = []

    def note(command, check):
        asked.append(command[3:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(everything.subprocess, "run", note)
    given = ["--model", "m", "--threads", "2", "--bundle", "b", *["--quick"] * quick]
    assert main(["all", *given, "--save", "--results", str(tmp_path), "--out", str(tmp_path / "p.md")]) == 0
    assert {command[0] for command in asked} == {"stream", "compare", "scaling", "load", "kernels"}
    for command in asked:
        options = parse(command)[1]
        assert (options.threads, options.save, options.results) == (2, True, tmp_path)
        assert command[0] == "kernels" or options.bundle or str(options.model) == "m"
        assert command[0] != "compare" or [str(b) for b in options.with_bundle] == ["b"]
    assert (tmp_path / "p.md").is_file()


def test_everything_stops_at_the_first_failure(monkeypatch, capsys):
    monkeypatch.setattr(everything.subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 1))
    assert main(["all", "--quick"]) == 1
    assert "bench stream ended with status 1" in capsys.readouterr().err


@pytest.mark.slow
def test_adapter_answers(toy):
    with Adapter("toy", toy, SETTINGS) as adapter:
        assert adapter.about["about"] == "toy of 16"
        video = adapter.generate("a", 0, 9)
        assert video.frames == 9
        assert [frames for _, frames in video.progress] == [1, 5, 9]
        assert 0 < video.first_frame <= video.progress[-1][0] <= video.seconds
        with pytest.raises(ValueError, match="got 9 frames, expected 10"):
            adapter.generate("a", 0, 10)
        assert adapter.generate("a", 0, 5).frames == 5
    assert adapter._process.returncode == 0


@pytest.mark.parametrize(("body", "message"), [
    ("import sys; sys.exit(3)", "got no answer to open"),
    ("print('hello')", "got 'hello', expected JSON"),
    ("print('[1]')", "expected a JSON object"),
    ("import json; input(); print(json.dumps({'error': 'no weights'}))", "toy: no weights"),
])  # fmt: skip
def test_adapter_that_fails(body, message):
    with pytest.raises(ValueError, match=message):
        Adapter("toy", [sys.executable, "-c", body], SETTINGS)


def test_adapter_that_does_not_start():
    with pytest.raises(ValueError, match="expected a command that starts"):
        Adapter("toy", ["/nowhere/engine"], SETTINGS)


@pytest.mark.slow
def test_server_reports_what_it_cannot_do(toy):
    lines = [{"op": "generate", "prompt": "a", "seed": 0, "frames": 1}, {"op": "fly"}, {"op": "close"}]
    given = "".join(json.dumps(line) + "\n" for line in lines) + "not json\n"
    done = subprocess.run(toy, input=given, capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert ["error" in a for a in answers] == [True, True, False]


@pytest.mark.thorough
def test_diffusers_adapter(model_dir, tmp_path):
    command = [sys.executable, "-m", "bench.adapters.diffusers_wan"]
    settings = {"height": 32, "width": 48, "threads": 1, "device": "cpu", "dtype": "fp32", "steps": 2, "guidance": 5.0}
    whole = tmp_path / "model"
    shutil.copytree(model_dir, whole)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(whole / "scheduler")
    (whole / "model_index.json").write_text(json.dumps(INDEX))
    settings["model"] = str(whole)
    with Adapter("diffusers", command, settings) as adapter:
        assert "WanPipeline, 2 steps, CFG 5" in adapter.about["about"]
        assert adapter.generate("a red circle", 0, 9).frames == 9
