"""Frame masses against full softmax matrices in float64, of queries and keys that diffusers' transformer computes."""

from contextlib import contextmanager

import pytest
import torch
from dense_streams import causal_sees, etm_sees, greedy, runs_of, sdd_flow
from diffusers.models.transformers import transformer_wan
from frames import FRAMES, TOKENS, normal, student_of
from tiny import dense, latents_of, pipeline_of, text_of, transformer

from distill.attention.probe import Probe, frame_mass, level_of, watching
from distill.models.causal import noisy_visible
from distill.models.sampling import joint_flow
from distill.models.student import sdd_visible
from engine.config import Preset


@contextmanager
def captured(monkeypatch):
    """The self-attention of every layer that diffusers runs: [(q, k, mask)], each tensor [B, rows, heads, d]."""
    plain, found = transformer_wan.dispatch_attention_fn, []

    def spy(query, key, value, attn_mask=None, **options):
        if query.shape[1] == key.shape[1]:
            found.append((query, key, attn_mask))
        return plain(query, key, value, attn_mask=attn_mask, **options)

    with monkeypatch.context() as patch:
        patch.setattr(transformer_wan, "dispatch_attention_fn", spy)
        yield found


def by_hand(q, k, mask=None):
    """[heads, I, J] of one sample, from one float64 matrix of all weights."""
    scores = torch.einsum("qhd,khd->hqk", q[0].double(), k[0].double()) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = torch.softmax(scores, -1)
    return weights.unflatten(2, (-1, TOKENS)).sum(-1).unflatten(1, (-1, TOKENS)).mean(2)


def of_layers(calls):
    """[layers, heads, I, J] of the layers that one call of diffusers' transformer ran."""
    return torch.stack([by_hand(*call) for call in calls])


def assert_near(got, expected):
    assert got.shape == expected.shape
    assert (got.double() - expected).abs().max() < 2e-6


def test_the_teacher_on_a_clip(monkeypatch):
    """Every frame sees all; levels are measured one by one, and others are left out."""
    model, latent, text = transformer(1), latents_of(1, FRAMES, seed=2), text_of()
    probe = Probe(FRAMES, (0.3, 0.9), 2)
    with torch.no_grad(), watching({"teacher": model}, {"teacher": probe}):
        for level in (0.3, 0.6, 0.9):
            joint_flow(model, latent, torch.full((1, FRAMES), level), model.prepare_text(text))
    assert set(probe.mass) == {0.3, 0.9}
    for level, mass in probe.mass.items():
        with captured(monkeypatch) as calls:
            dense(model, latent, [1000 * level] * FRAMES, text, list(range(FRAMES)))
        assert_near(mass, of_layers(calls))
        assert_near(mass.sum(-1), torch.ones(2, 2, FRAMES))


def test_streams_of_etm_and_sdd(monkeypatch):
    """The keys of a stream are those of one pass over the whole clip, where frames see what the paper says."""
    preset = greedy(w=3, max_position=4)
    student, frames = student_of(preset), 6
    mass = {role: found[0] for role, found in student.mass(None).items()}
    latents = torch.cat([finished for finished, _ in student.passes(0)], 2)
    etm, sdd = student.models["etm"], student.models["sdd"]

    with captured(monkeypatch) as calls:
        _, hidden = dense(etm, latents, [0.0] * frames, text_of(), list(range(frames)), etm_sees(3, 1, frames))
    expected = of_layers(calls)
    assert student.levels["etm"] == (0.0,)
    unseen = ~torch.tensor(etm_sees(3, 1, frames))
    assert_near(mass["etm"][0].nan_to_num(), expected)
    assert (mass["etm"][0].isnan() == unseen).all()

    sees = {frame: sorted([*seen[:-1], frame]) for frame, seen in enumerate(sdd_visible(frames)[frames - 1 :])}
    for frame, (_, steps) in enumerate(student.passes(0)):
        c_f = hidden[:, (frame - 1) * TOKENS : frame * TOKENS] if frame else None
        for step in steps:
            with captured(monkeypatch) as calls:
                sdd_flow(sdd, preset, step.latent, float(step.t[0]), c_f, latents, frame, text_of())
            own = [frame, *([0] if frame else []), *([frame - 1] if frame > 1 else [])]  # the order of `sdd_flow`
            row = mass["sdd"][student.levels["sdd"].index(level_of(float(step.t[0]))), :, :, frame]
            assert sorted(own) == sees[frame] == (~row[0, 0].isnan()).nonzero().flatten().tolist()
            assert_near(row[..., own], of_layers(calls)[:, :, 0])


@pytest.mark.parametrize(
    "shape",
    [{"chunk": 1, "window": 3}, {"chunk": 1, "window": 4, "attn_sink": 1}, {"chunk": 2, "window": 5, "attn_sink": 1}],
    ids=str,
)
def test_streams_of_one_causal_transformer(monkeypatch, shape):
    """Rings go round, and keys of an attention sink stay: the frames are those of the training masks."""
    preset = Preset("causal", steps=((1000, 500),), **shape)
    student, frames = student_of(preset), 6
    (mass,) = student.mass(None)["dit"]
    chunks, runs = student.passes(0), runs_of(preset, 6 // preset.chunk)
    latents = torch.cat([finished for finished, _ in chunks], 2)
    for (_, steps), run, visible in zip(chunks, runs, noisy_visible(frames, **shape), strict=True):
        for step in steps:
            level = student.levels["dit"].index(level_of(float(step.t[0])))
            upto = torch.cat([latents[:, :, : run[0]], step.latent], 2)
            ts = [0.0] * run[0] + [float(step.t[0])] * len(run)
            sees = [row[: upto.shape[2]] for row in causal_sees(preset, runs)[: upto.shape[2]]]
            with captured(monkeypatch) as calls:
                dense(student.models["dit"], upto, ts, text_of(), list(range(upto.shape[2])), sees)
            row = mass[level][:, :, run]
            assert (~row[0, 0, 0].isnan()).nonzero().flatten().tolist() == visible
            assert_near(row[..., visible], of_layers(calls)[:, :, run][..., visible])


def test_a_list_of_visible_frames():
    """The mask of one call over the sequence of clean and noisy frames; rows sum to 1."""
    visible = sdd_visible(4)
    q, k = normal(1, 7 * TOKENS, 3, 8), normal(1, 7 * TOKENS, 3, 8, seed=1)
    mask = torch.tensor([[j in seen for j in range(7)] for seen in visible])
    got = frame_mass(q, k, TOKENS, visible=visible)[0]
    assert_near(got, by_hand(q, k, mask.repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)))
    assert_near(got.sum(-1), torch.ones(3, 7))
    assert (got[:, ~mask] == 0).all()


def test_known_masses():
    """Zero queries look everywhere alike. A query along one axis gives frames the masses that their keys state."""
    k = normal(2, 4 * TOKENS, 2, 9)
    assert_near(frame_mass(torch.zeros(2, 3 * TOKENS, 2, 9), k, TOKENS), torch.full((2, 2, 3, 4), 0.25))
    wanted = torch.tensor([0.5, 0.3, 0.15, 0.05])
    q, k = torch.zeros(1, 2 * TOKENS, 1, 9), torch.zeros(1, 4 * TOKENS, 1, 9)
    q[..., 0], k[..., 0] = 3.0, wanted.log().repeat_interleave(TOKENS)[None, :, None]  # 3 / sqrt(9) = 1
    assert_near(frame_mass(q, k, TOKENS), wanted.double().expand(1, 1, 2, 4))


def test_drawn_queries_estimate_without_bias():
    """Draws of 2 of 6 queries: their mean over many seeds is the mean over all, within four standard errors."""
    q, k = 3 * normal(1, 2 * TOKENS, 2, 8), normal(1, 3 * TOKENS, 2, 8, seed=1)
    exact, draws = frame_mass(q, k, TOKENS), torch.Generator().manual_seed(5)
    found = torch.stack([frame_mass(q, k, TOKENS, queries=2, draws=draws) for _ in range(600)])
    error = found.std(0) / len(found) ** 0.5
    assert (error > 0).all()
    assert error.max() < 0.02
    assert ((found.mean(0) - exact).abs() < 4 * error).all()
    for all_of_them in (TOKENS, TOKENS + 1, None):
        assert frame_mass(q, k, TOKENS, queries=all_of_them).equal(exact)


def test_a_seed_gives_the_same_draws():
    preset = greedy()
    first, again = (student_of(preset, 3).mass(2) for _ in range(2))
    exact = student_of(preset, 3).mass(TOKENS)
    for role in first:
        assert first[role].nan_to_num().equal(again[role].nan_to_num())
        assert not first[role].nan_to_num().equal(exact[role].nan_to_num())


def test_the_model_is_as_before_afterwards():
    """Streams after the probe have the same bits, and a stream under it the same numbers up to rounding."""
    pipeline = pipeline_of(greedy())

    def latents():
        with pipeline.stream(text_of(), seed=1) as stream:
            return torch.cat([stream.next_latent() for _ in range(4)], 2)

    before, probe = latents(), Probe(4, (0.0,), 2)
    with watching(pipeline.stages.models, {"etm": probe, "sdd": probe}, lambda: 0):
        under = latents()
    assert (under - before).abs().max() < 1e-5
    assert latents().equal(before)


def test_flows_are_those_of_the_stream():
    """What runs again on a stream's inputs gives the stream's own flows: Euler's steps lead to its latents."""
    student = student_of(greedy(steps=((1000,),)))
    (flow,) = student.flows(0, {}).values()
    noise = torch.cat([steps[0].latent for _, steps in student.passes(0)], 2)
    latents = torch.cat([finished for finished, _ in student.passes(0)], 2)
    assert (noise - flow - latents).abs().max() < 1e-5
