"""Replacements against PyTorch's own attention with a mask or a bias, and what they leave alone."""

import pytest
import torch
import torch.nn.functional as F
from dense_streams import greedy
from frames import FRAMES, TOKENS, normal, student_of
from tiny import latents_of, text_of, transformer

from distill.attention.measures import errors, replacements, summary
from distill.attention.probe import Seen, frame_mass, watching
from distill.attention.replacements import KINDS, Replacement, Table, replaced_entries
from distill.models.sampling import joint_flow

ALL = Seen(tuple(range(FRAMES)), tuple(range(FRAMES)), 0.5)


def example(seed=0):
    """q, k, v of two heads, the plain result, and a table of four drawn samples of M around theirs."""
    q, k, v = (normal(1, FRAMES * TOKENS, 2, 8, seed=seed + n) for n in range(3))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    mass = frame_mass(q, k, TOKENS)[:, None]
    samples = (mass + 0.05 * normal(4, *mass.shape[1:], seed=9) * normal(*mass.shape[1:], seed=8)).clamp_min(0.01)
    return q, k, v, out, Table.of(samples)


def biased(q, k, v, bias):
    """Attention with a bias [heads, query frames * tokens, keys] on its scores, by PyTorch, in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None]).transpose(1, 2)


def by_token(frames):
    return frames.repeat_interleave(TOKENS, -1)


@pytest.mark.parametrize("kind", ["steady", "varying"])
def test_masses_become_means_and_patterns_stay(kind):
    """Adding log(mean / own mass) to the scores of a block does the same: softmax scales the row."""
    q, k, v, out, table = example()
    replacement = Replacement(kind, table, (0.5,))
    assert 0.2 < replacement.share < 0.8
    scores = torch.einsum("qhd,khd->hqk", q[0].double(), k[0].double()) / 8**0.5
    own = torch.softmax(scores, -1).unflatten(2, (FRAMES, TOKENS)).sum(-1)  # [heads, queries, frames]
    mean, entries = (x[0].repeat_interleave(TOKENS, 1) for x in (table.mean.double(), replacement.entries))
    bias = by_token(torch.where(entries, (mean / own).log(), 0))
    got = replacement(0, q, k, v, out.clone(), ALL)
    assert (got - biased(q, k, v, bias)).abs().max() < 1e-5
    assert (got - out).abs().max() > 1e-3


@pytest.mark.parametrize("near", [0, 1, 3])
def test_distant_blocks_are_masked(near):
    q, k, v, out, table = example()
    seen = torch.tensor([[abs(i - j) <= near or j == 0 for j in range(FRAMES)] for i in range(FRAMES)])
    mask = by_token(seen.repeat_interleave(TOKENS, 0))
    expected = biased(q, k, v, torch.where(mask, 0.0, -torch.inf).double().expand(2, -1, -1))
    got = Replacement("distant", table, (0.5,), near=near)(0, q, k, v, out.clone(), ALL)
    assert (got - expected).abs().max() < 1e-5


def test_constant_heads_weigh_all_keys_alike():
    """One of two heads exceeds a threshold that lies between their deviations; the other keeps its bits."""
    q, k, v, out, table = example()
    deviations = torch.stack([table.mean[0, head].flatten().std() for head in range(2)])
    assert torch.allclose(table.of_heads()[0], deviations)
    high = int(deviations.argmax())
    got = Replacement("constant", table, (0.5,), float(deviations.mean()))(0, q, k, v, out.clone(), ALL)
    assert torch.allclose(got[:, :, high], v[:, :, high].mean(1, keepdim=True).expand(-1, FRAMES * TOKENS, -1))
    assert got[:, :, 1 - high].equal(out[:, :, 1 - high])


def test_tables_leave_out_what_is_not_seen():
    """Mean and deviation of what is known equal torch's own on it."""
    mass = normal(6, 1, 2, 3, 3)
    mass[:, :, :, 0, 2] = mass[0, 0, 0, 1, 1] = torch.nan
    table = Table.of(mass)
    assert table.mean[0, :, 0, 2].isnan().all()
    assert table.std[0, :, 0, 2].isnan().all()
    assert torch.allclose(table.std[0, 0, 1, 1], mass[1:, 0, 0, 1, 1].std())
    assert torch.allclose(table.mean[0, 1], mass[:, 0, 1].mean(0), equal_nan=True)
    assert torch.allclose(table.std[0, 1, 2], mass[:, 0, 1, 2].std(0))
    for kind in KINDS:
        assert not replaced_entries(kind, table, 0.0, 0)[0, :, 0, 2].any()
    steady, varying = (replaced_entries(kind, table, 1.0, 0) for kind in ("steady", "varying"))
    assert (steady ^ varying).equal(~table.mean.isnan())
    with pytest.raises(ValueError, match="got 'all', expected one of steady"):
        replaced_entries("all", table, 0.02, 1)


IDENTITIES = {
    "steady": {"threshold": -1.0},
    "varying": {"threshold": 9.0},
    "distant": {"near": 9},
    "constant": {"threshold": 9.0},
}


def test_a_replacement_of_nothing_changes_nothing():
    """In a stream its error is exactly 0; that of a replacement of something is not."""
    student = student_of(greedy(), 4)
    tables = {role: Table.of(mass.flatten(0, 1)) for role, mass in student.mass(None).items()}
    found = errors(student, {kind: replacements(student, kind, tables, **IDENTITIES[kind]) for kind in KINDS})
    moved = errors(student, {kind: replacements(student, kind, tables, threshold=0.01, near=0) for kind in KINDS})
    for kind in KINDS:
        assert len(found[kind]) == len(student.levels["sdd"]) == 2
        assert set(found[kind].values()) == {0.0}
        assert min(moved[kind].values()) > 1e-4


def test_a_mass_replaced_by_itself_is_the_same():
    """With one token per frame M has every query's own masses: to replace all of them changes nothing but rounding."""
    model, latent, text = transformer(1, patch_size=(1, 4, 6)), latents_of(1, FRAMES, seed=2), text_of()

    def flow(watch):
        with torch.no_grad(), watching({"teacher": model}, {"teacher": watch}):
            return joint_flow(model, latent, torch.full((1, FRAMES), 0.5), model.prepare_text(text))

    masses = torch.zeros(1, 2, 2, FRAMES, FRAMES)

    def keep(layer, q, k, v, out, seen):
        masses[0, layer] = frame_mass(q, k, 1)[0]
        return out

    plain, table = flow(keep), Table.of(masses)
    replacement = Replacement("steady", table, (0.5,))
    assert replacement.share == 1
    assert replacement.mass == pytest.approx(1)
    assert (flow(replacement) - plain).norm() / plain.norm() < 1e-6
    assert flow(Replacement("steady", table, (0.4,))).equal(plain)  # another noise level


def test_a_summary_of_known_masses():
    """M[i, j] = 10 |i - j| + [j = 0]: what a distance, frame 0 and the others get can be counted."""
    frame = torch.arange(4.0)
    mass = (10 * (frame[:, None] - frame).abs() + (frame == 0)).expand(2, 1, 1, 1, 4, 4).clone()
    found = summary(mass, (0.5,))
    assert found["by_distance"] == [0.25, pytest.approx(10 + 1 / 6, abs=1e-4), 20.25, 30.5]
    assert found["on_frame_0"] == [1.0, 11.0, 21.0, 31.0]
    assert found["on_other_frames"] == [0.0, 10.0, 20.0, None]
    assert (found["far_on_frame_0"], found["far_on_other_frames"]) == (21.0, 20.0)
    assert found["received"] == [21.0, pytest.approx(40 / 3, abs=1e-4), pytest.approx(40 / 3, abs=1e-4), 20.0]
    assert found["near_share_by_head"] == [[pytest.approx((1 + 10 + 11 + 10 + 10 + 10 + 10) / 4)]]
    mass[..., 1:] = torch.nan  # only frame 0 is seen
    found = summary(mass, (0.5,))
    assert found["on_other_frames"] == [None] * 4
    assert found["far_on_frame_0"] is None
