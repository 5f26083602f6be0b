"""The meter explains a chunk's time and changes nothing; checks that are red stop the numbers."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.__main__ import main
from bench.commands import stream
from bench.instruments import check
from bench.instruments.meter import Meter, MeteredPipeline, metered, metered_chunks
from engine.loader import load
from engine.runtime.stages import TorchStages

PROMPT = "a red circle"


@pytest.mark.parametrize("family", ["pipeline", "causal"])
def test_every_moment_has_one_part(request, family):
    chunks, opening, meter = metered_chunks(request.getfixturevalue(family), PROMPT, 8)
    assert opening["text"] > 0
    # Other programs may take the processor between two readings of the clock; they spare most chunks.
    assert abs(np.median([chunk.residual for chunk in chunks])) < 0.05
    model = {"etm", "sdd_context", "sdd"} if family == "pipeline" else {"dit", "dit_context"}
    assert chunks[-1].parts.keys() >= model | {"noise", "solver", "cache", "vae", "transfer", "sink", "other"}
    assert all(value >= 0 for value in chunks[-1].parts.values())
    assert meter.vae_cache_bytes > 0


def test_nothing_is_committed_before_the_first_chunk(pipeline, causal):
    for made, label in ((pipeline, "etm"), (causal, "dit_context")):
        chunks, _, _ = metered_chunks(made, PROMPT, 2)
        assert label not in chunks[0].parts
        assert len(chunks[1].calls[label]) == 1


def test_calls_are_denoising_steps(pipeline, causal):
    for made, label in ((pipeline, "sdd"), (causal, "dit")):
        chunks, _, _ = metered_chunks(made, PROMPT, 3)
        assert [len(c.calls[label]) for c in chunks] == [4, 4, 4]
        assert len(stream.step_times(chunks)) == 4


def test_a_joined_pass_is_a_part_of_its_own(pipeline, causal):
    for made, label in ((pipeline, "sdd"), (causal, "dit")):
        stages = TorchStages(made.stages.models, made.stages.vae, made.stages.text_encoder, join_context=True)
        chunks, _, _ = metered_chunks(replace(made, stages=stages), PROMPT, 3)
        assert [len(chunks[2].calls.get(part, [])) for part in (label, f"{label}+context")] == [3, 1]
        assert f"{label}_context" not in stream.part_table(chunks[1:])[0]
        assert len(stream.step_times(chunks[1:])) == 4


class SlowVAE(TorchStages):
    def vae_steady(self, latent, cache):
        time.sleep(0.1)
        return super().vae_steady(latent, cache)


def test_time_goes_to_the_stage_that_spends_it(pipeline):
    parts = pipeline.stages
    slow = replace(pipeline, stages=SlowVAE(parts.models, parts.vae, parts.text_encoder))
    chunks, _, _ = metered_chunks(slow, PROMPT, 4)
    before, _, _ = metered_chunks(pipeline, PROMPT, 4)
    for label in ("vae", "sdd", "transfer"):
        grew = min(c.parts[label] for c in chunks[1:]) - min(c.parts[label] for c in before[1:])
        assert (grew > 0.05) == (label == "vae")


def test_the_parts_add_up(pipeline):
    chunks, _, _ = metered_chunks(pipeline, PROMPT, 8)
    calm = sorted(chunks[1:], key=lambda chunk: abs(chunk.residual))[:4]
    parts, unexplained = stream.part_table(calm)
    assert sum(parts.values()) == pytest.approx(1e3 * np.mean([c.total for c in calm]))
    assert abs(unexplained) < stream.UNEXPLAINED
    assert "dit" not in parts


def test_a_table_with_a_hole_is_refused(pipeline):
    chunks, _, _ = metered_chunks(pipeline, PROMPT, 3)
    for chunk in chunks:
        chunk.total *= 1.5
    with pytest.raises(RuntimeError, match="expected 95% to 105%"):
        stream.part_table(chunks)


def test_a_failing_stage_leaves_the_meter_whole(pipeline):
    class Failing(TorchStages):
        fail = True

        def vae_first(self, latent):
            if self.fail:
                self.fail = False
                raise RuntimeError("once")
            return super().vae_first(latent)

    parts = pipeline.stages
    meter = Meter(pipeline.device)
    broken = replace(pipeline, stages=Failing(parts.models, parts.vae, parts.text_encoder))
    with MeteredPipeline.of(broken, meter).stream(PROMPT) as timed, pipeline.stream(PROMPT) as plain:
        with pytest.raises(RuntimeError, match="once"):
            timed.next_chunk()
        meter.take()
        assert np.array_equal(timed.next_chunk(), plain.next_chunk())
        assert meter.take()[0]["vae"] > 0


@pytest.mark.parametrize("family", ["pipeline", "causal"])
def test_checks_pass(request, family):
    found = check.run(request.getfixturevalue(family), PROMPT)
    assert [c.passed for c in found] == [True] * len(found)
    assert len(found) == 2 + check.CASES.is_dir()


@pytest.mark.parametrize("window", [2, 3, 5])
def test_streams_with_local_heads_equal_a_dense_pass(model_dir, window):
    """Of as many chunks as every head keeps."""
    heads = {"window": window, "attn_sink": 0, "layers": [[0, 1], [1]]}
    made = load(model_dir, preset="self-forcing-framewise", overrides={"window": 5, "heads": heads})
    assert check.streaming_equals_dense(made).passed


def test_a_wrong_cache_is_red(pipeline, causal):
    class Forgetful(TorchStages):
        """Sees one slot less than it should."""

        def run(self, step, cache, text_kv):
            if step.kind.timed:
                step = replace(step, valid=max(step.frames, step.valid - 1))
            return super().run(step, cache, text_kv)

    for made in (pipeline, causal):
        parts = made.stages
        wrong = replace(made, stages=Forgetful(parts.models, parts.vae, parts.text_encoder))
        assert not check.streaming_equals_dense(wrong).passed


def test_a_standing_picture_is_red(pipeline):
    class Still(TorchStages):
        def vae_steady(self, latent, cache):
            frames, cache = super().vae_steady(latent, cache)
            return torch.zeros_like(frames), cache

    parts = pipeline.stages
    still = replace(pipeline, stages=Still(parts.models, parts.vae, parts.text_encoder))
    assert not check.metered_equals_plain(still, PROMPT, 0).passed


@pytest.mark.parametrize("command", ["stream", "compare", "scaling", "load"])
@pytest.mark.slow
def test_red_means_no_numbers(model_dir, capsys, monkeypatch, command):
    monkeypatch.setattr(check, "metered_equals_plain", lambda *_: check.Check("broken on purpose", False, "by a test"))
    assert main([command, "--model", str(model_dir), "--json", *(["--adapter", "none"] * (command == "compare"))]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "no numbers" in err


def test_cuda_would_wait(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    meter = Meter(torch.device("cuda"))
    with meter.span("sdd", "sdd"):
        pass
    assert len(waited) == 3
    assert json.dumps(meter.take()[0])


def test_a_stream_is_metered_for_a_while(pipeline, causal):
    for made in (pipeline, causal):
        meter = Meter(made.device)
        with made.stream(PROMPT) as plain, made.stream(PROMPT) as timed:
            expected = [plain.next_chunk() for _ in range(6)]
            found = [timed.next_chunk() for _ in range(2)]
            meter.take()
            with metered(timed, meter):
                found += [timed.next_chunk() for _ in range(2)]
            parts, calls = meter.take()
            found += [timed.next_chunk() for _ in range(2)]
            assert timed.pipeline is made
            assert not meter.take()[1]  # nothing more was charged
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        assert len(calls["vae"]) == 2 * made.preset.chunk
        assert parts["vae"] > 0
