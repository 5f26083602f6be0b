"""The parity tool on the recorded cases, and on cases that must not pass."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from faults import FAULTS
from safetensors.torch import load_file, save_file

from bench.__main__ import main
from bench.instruments import recordings
from bench.instruments.recordings import TOLERANCE, preset_of, read_recording, replay
from bench.instruments.ways import WAYS

DATA = Path(__file__).parents[1] / "data" / "causal"
WIDE = DATA.with_name("causal_128")
CASES = 18


def parity(folder, capsys, *more):
    code = main(["parity", "--cases", str(folder), *more])
    out, err = capsys.readouterr()
    return code, out, err


def copy_of(folder, only=None):
    """The recording with some cases alone."""
    folder.mkdir()
    for file in DATA.iterdir():
        shutil.copyfile(file, folder / file.name)
    if only is not None:
        for file in folder.glob("*.json"):
            content = json.loads(file.read_text())
            cases = content.get("cases", content)
            for name in [n for n, e in cases.items() if isinstance(e, dict) and "chunk" in e and n not in only]:
                del cases[name]
            file.write_text(json.dumps(content))
    return folder


@pytest.mark.slow
def test_every_recorded_case_passes(capsys):
    code, out, err = parity(DATA, capsys, "--json")
    assert code == 0
    assert err == ""
    report = json.loads(out.strip().splitlines()[-1])
    assert report["passed"] is True
    assert len(report["cases"]) == CASES
    assert len({case["name"] for case in report["cases"]}) == CASES
    for case in report["cases"]:
        assert case.keys() >= {"name", "dtype", "max_abs_error", "rms_error"}
        largest, rms = {"float32": (2e-5, 2e-5), "bfloat16": (2**-4, 1.2e-2)}[case["dtype"]]
        assert case["max_abs_error"] <= largest, case
        assert case["rms_error"] <= rms, case
    assert {case["dtype"] for case in report["cases"]} == {"float32", "bfloat16"}


@pytest.mark.parametrize("way", WAYS)
def test_cases_of_head_dim_128_pass_every_way(way, capsys):
    """Recorded with another engine in float32, replayed in float32 and in bf16."""
    code, out, _ = parity(WIDE, capsys, "--json", "--through", way)
    assert code == 0
    cases = json.loads(out.strip().splitlines()[-1])["cases"]
    assert [case["dtype"] for case in cases] == ["float32", "bfloat16"]
    assert read_recording(WIDE).config.attention_head_dim == 128


@pytest.mark.parametrize("fault", FAULTS)
def test_cases_of_head_dim_128_see_every_fault(fault):
    with FAULTS[fault]():
        assert not any(result.passed for result in recordings.run(WIDE, way="fused"))


def test_what_is_allowed():
    assert TOLERANCE[torch.float32] == (2e-5, 2e-5)
    assert TOLERANCE[torch.bfloat16] == (2**-4, 1.2e-2)


def test_table_for_people(tmp_path, capsys):
    folder = copy_of(tmp_path / "cases", ["chunk1_1step"])
    code, out, _ = parity(folder, capsys)
    assert code == 0
    assert "chunk1_1step" in out
    assert "1 of 1 within tolerance" in out


@pytest.mark.parametrize(
    ("tensor", "by"),
    [
        ("blocks.1.self_attn.norm_k.weight", 1e-3),
        ("blocks.2.cross_attn.v.bias", 1e-3),
        ("head.modulation", 1e-3),
    ],
)
def test_other_weights_fail(tmp_path, capsys, tensor, by):
    folder = copy_of(tmp_path / "cases", ["chunk1_local2_sink1"])
    weights = folder / "model_selfforcing_keys.safetensors"
    state = load_file(weights)
    state[tensor] = state[tensor] + by
    weights.unlink()
    save_file(state, weights)
    code, out, _ = parity(folder, capsys, "--json")
    assert code == 1
    assert '"passed": false' in out.splitlines()[-1]


def test_weights_that_are_not_finite_are_refused(tmp_path, capsys):
    folder = copy_of(tmp_path / "cases", ["chunk1_local2_sink1"])
    weights = folder / "model_selfforcing_keys.safetensors"
    state = load_file(weights)
    state["blocks.0.ffn.0.weight"] += float("nan")
    weights.unlink()
    save_file(state, weights)
    code, _, err = parity(folder, capsys, "--json")
    assert code == 2
    assert "blocks.0.ffn.net.0.proj.weight: got nan" in err


def test_another_schedule_fails(tmp_path, capsys):
    folder = copy_of(tmp_path / "cases", ["chunk1_local2_sink1"])
    content = json.loads((folder / "cases.json").read_text())
    case = content["cases"]["chunk1_local2_sink1"]
    del case["calls"]
    case["warped_steps"][1] -= 1
    (folder / "cases.json").unlink()
    (folder / "cases.json").write_text(json.dumps(content))
    assert parity(folder, capsys, "--json")[0] == 1


@pytest.mark.parametrize("case", ["chunk3_local6_sink1", "chunk3_global", "chunk1_local6_sink1", "chunk3_first1"])
def test_steps_without_the_list_of_calls(tmp_path, capsys, case):
    """A case may give its steps alone: warped ones, or ones still to be warped."""
    folder = copy_of(tmp_path / "cases", [case])
    content = json.loads((folder / "cases.json").read_text())
    entry = content["cases"][case]
    entry.pop("calls", None)
    for keep in ("warped_steps", "steps"):
        changed = {k: v for k, v in entry.items() if k == keep or k not in ("warped_steps", "steps")}
        content["cases"][case] = changed | {"steps": entry["steps"]}
        (folder / "cases.json").unlink()
        (folder / "cases.json").write_text(json.dumps(content))
        assert parity(folder, capsys, "--json")[0] == 0, keep


def break_recording(folder, how):
    if how == "no output":
        tensors = load_file(folder / "cases.safetensors")
        del tensors["chunk1_1step/output"]
        (folder / "cases.safetensors").unlink()
        save_file(tensors, folder / "cases.safetensors")
    elif how == "too few draws":
        tensors = load_file(folder / "cases.safetensors")
        tensors["chunk1_global/renoise"] = tensors["chunk1_global/renoise"][:5].clone()
        (folder / "cases.safetensors").unlink()
        save_file(tensors, folder / "cases.safetensors")
    elif how == "no tensors":
        (folder / "cases.safetensors").unlink()
    elif how == "no weights":
        (folder / "model_selfforcing_keys.safetensors").unlink()
    elif how == "wrong weights":
        state = load_file(folder / "model_selfforcing_keys.safetensors")
        state.pop("head.head.bias")
        (folder / "model_selfforcing_keys.safetensors").unlink()
        save_file(state, folder / "model_selfforcing_keys.safetensors")
    elif how == "no json":
        (folder / "cases.json").unlink()
        (folder / "cases.json").write_text("{")
    elif how == "dtype":
        content = json.loads((folder / "cases.json").read_text())
        content["cases"]["chunk1_1step"]["dtype"] = "torch.int8"
        (folder / "cases.json").unlink()
        (folder / "cases.json").write_text(json.dumps(content))
    elif how == "incomplete case":
        content = json.loads((folder / "cases.json").read_text())
        del content["cases"]["chunk1_1step"]["local_attn_size"]
        (folder / "cases.json").unlink()
        (folder / "cases.json").write_text(json.dumps(content))
    elif how == "incomplete model":
        content = json.loads((folder / "cases.json").read_text())
        del content["model_config"]["num_heads"]
        (folder / "cases.json").unlink()
        (folder / "cases.json").write_text(json.dumps(content))
    else:
        shutil.rmtree(folder)


BREAKS = ["no output", "too few draws", "no tensors", "no weights", "wrong weights", "no json", "dtype"]
BREAKS += ["incomplete case", "incomplete model", "no directory"]


@pytest.mark.parametrize("how", BREAKS)
def test_bad_recordings_give_one_line_and_exit_2(tmp_path, capsys, how):
    folder = copy_of(tmp_path / "cases", ["chunk1_global" if how == "too few draws" else "chunk1_1step"])
    break_recording(folder, how)
    code, out, err = parity(folder, capsys, "--json")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert "got" in err


def test_no_case_is_no_success(tmp_path, capsys):
    folder = copy_of(tmp_path / "cases", [])
    assert parity(folder, capsys, "--json")[0] == 1


@pytest.mark.parametrize("name", ["chunk3_local6_sink1", "chunk3_global"])
def test_every_denoising_call_and_the_cache_are_as_recorded(name, monkeypatch):
    """Not the result alone: where the recording holds flows or layer 0's keys, these too."""
    import bench.instruments.ways

    recording = read_recording(DATA)
    case = next(case for case in recording.cases if case.name == name)
    flows, states = [], []

    class Spy(bench.instruments.ways.TorchStages):
        def run(self, step, cache, text_kv):
            flow = super().run(step, cache, text_kv)
            flows.append(flow)
            states.append(cache)
            return flow

    monkeypatch.setattr(bench.instruments.ways, "TorchStages", Spy)
    replay(case, recording, torch.device("cpu"))
    if "call_flow" in case.tensors:
        expected = case.tensors["call_flow"].transpose(2, 3)  # [call, B, C, n, h, w]
        # The last context pass is only made when another chunk is asked for.
        assert len(expected) - len(flows) in (0, 1)
        for got, flow in zip(flows, expected, strict=False):
            assert (got - flow).abs().max() <= 2e-5
    if "kv0_k" in case.tensors:
        slots = preset_of(case, recording.shift).window
        k, v = states[-1].view(0)
        got = torch.cat([k[0].flatten(1), v[0].flatten(1)], dim=1).unflatten(0, (slots, -1))
        stored = torch.cat([case.tensors[f"kv0_{n}"][0].flatten(1) for n in "kv"], dim=1).unflatten(0, (slots, -1))
        # Slots may lie in another order; the newest chunk is there as its last denoising call left it.
        distance = torch.stack([(got - frame).abs().flatten(1).amax(1) for frame in stored])  # [stored, got]
        older = distance.amin(1)
        assert (older <= 2e-5).sum() >= slots - 3
