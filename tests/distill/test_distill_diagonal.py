"""Causal students in chunks: Diagonal Distillation's rollouts and motion, and the initialisation by trajectories."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from distill.data.shards import Shards, write_index, write_shard
from distill.models.causal import CausalStudent
from distill.models.matching import motion_loss
from distill.models.rollout import PhiloxNoise, roll_exits, roll_out
from distill.models.sampling import guided_flow, sample_joint, sample_path
from distill.models.student_file import NextChunkConfig
from distill.stages.next_chunk import NextChunk, points_of
from distill.training.draws import Draws
from engine.config import Preset, TransformerConfig
from engine.generators.base import Geometry
from engine.generators.causal import CausalGenerator
from engine.model.transformer import WanTransformer
from engine.presets import find_preset

TINY = TransformerConfig(
    patch_size=(1, 1, 1),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=8,
    freq_dim=16,
    ffn_dim=16,
    num_layers=2,
)
SIZE, SEEDS = (3, 4), [3, 4]


def student_of(preset: Preset) -> CausalStudent:
    torch.manual_seed(0)
    student = CausalStudent(WanTransformer(TINY), 2, preset.window, preset.chunk, preset.attn_sink).eval()
    with torch.no_grad():
        for parameter in student.trained().values():
            parameter.normal_(std=0.3)
    return student


def diagonal(commit: str = "noisy", **fields: object) -> Preset:
    """The preset with a shorter window, so that four chunks slide it."""
    return find_preset("diagonal", {"window": 7, "attn_sink": 1, "commit": commit} | fields)


@torch.no_grad()
def test_the_last_inputs_are_what_noisy_commits_leave() -> None:
    """The engine's generator against the parallel passes, on inputs of any level."""
    preset = diagonal()
    student, generator = student_of(preset), None
    noisy, levels = torch.randn(2, 4, 12, *SIZE), torch.tensor([0.9, 0.3, 0.6, 0.2])
    text, sigma = student.stages.prepare_text(torch.randn(2, 5, 8)), levels.repeat_interleave(3).expand(2, -1)
    last = student.flow_on_noisy(noisy, sigma, text)
    both = student.flow(noisy[:, :, :-3], noisy, sigma, text, sigma[:, :-3])
    first = student.flow(noisy[:, :, :-3], noisy.flip(0), torch.full((2, 12), 0.8), text, sigma[:, :-3])
    generator = CausalGenerator(student.stages, TINY, preset, torch.float32, torch.device("cpu"))
    state = generator.open(Geometry.of(TINY, 2, *SIZE), text)
    for number, level in enumerate(levels.tolist()):
        own = slice(3 * number, 3 * number + 3)
        early = generator.denoise(noisy[:, :, own].flip(0), 800.0, state)
        flow = generator.denoise(noisy[:, :, own], 1000 * level, state)
        generator.commit(torch.full_like(flow, torch.nan), state)  # whose frames nobody reads
        assert (early - first[:, :, own]).abs().max() <= 1e-5
        for parallel in (last, both):
            assert (flow - parallel[:, :, own]).abs().max() <= 1e-5


@pytest.mark.parametrize("exit_step", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "context", [{"commit": "clean"}, {"commit": "clean", "context_timestep": 100.0}, {"commit": "noisy"}]
)
@torch.no_grad()
def test_the_pass_with_gradients_is_the_stream(context: dict[str, object], exit_step: int) -> None:
    preset = diagonal(**context)
    student, emb = student_of(preset), torch.randn(2, 5, 8)
    rolled = roll_exits(student, emb, 12, exit_step, SEEDS, preset, SIZE)
    text = student.stages.prepare_text(emb)
    clip = rolled.predicted(student.flow(rolled.past, rolled.noisy, rolled.sigma, text, rolled.past_sigma))
    assert (clip - rolled.clean).abs().max() <= 1e-5
    steps = [preset.steps[min(number, 2)] for number in range(4)]  # of 4, 3, 2 and 2
    told = [row[min(exit_step, len(row) - 1)] / 1000 for row in steps]
    assert rolled.sigma[0, ::3].tolist() == pytest.approx(told)
    level = {"clean": [0.0] * 3, "noisy": [row[-1] / 1000 for row in steps[:-1]]}[preset.commit]
    assert rolled.past_sigma[0, ::3].tolist() == pytest.approx([0.1] * 3 if preset.context_timestep else level)
    if not preset.context_timestep and exit_step == 3:
        assert torch.equal(rolled.clean, roll_out(student, emb, 12, SEEDS, preset, SIZE))


@pytest.mark.parametrize("context", [{"commit": "clean"}, {"commit": "clean", "context_timestep": 100.0}, {}])
@torch.no_grad()
def test_chunks_after_a_switch_of_the_prompt(context: dict[str, object]) -> None:
    """The stream commits its past anew, and what it then sees is the past of the pass with gradients."""
    preset = diagonal(**context)
    student, emb, before = student_of(preset), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    rolled = roll_exits(student, emb, 9, 3, SEEDS, preset, SIZE, (3, before))
    text = student.stages.prepare_text(emb)
    clip = rolled.predicted(student.flow(rolled.past, rolled.noisy, rolled.sigma, text, rolled.past_sigma))
    assert (clip - rolled.clean)[:, :, 3:].abs().max() <= 1e-5
    unswitched = roll_exits(student, before, 9, 3, SEEDS, preset, SIZE)
    assert torch.equal(unswitched.clean[:, :, :3], rolled.clean[:, :, :3])
    assert (unswitched.clean - rolled.clean)[:, :, 3:].abs().max() > 0.01
    with pytest.raises(ValueError, match=r"frames: got 4, expected a multiple of the chunk \(3\)"):
        roll_exits(student, emb, 9, 3, SEEDS, preset, SIZE, (4, before))


@torch.no_grad()
def test_a_noised_past_has_noise_of_its_own() -> None:
    preset = diagonal("clean", context_timestep=100.0)
    student, emb = student_of(preset), torch.randn(2, 5, 8)
    rolled = roll_exits(student, emb, 9, 3, SEEDS, preset, SIZE)
    noise = (rolled.past - 0.9 * rolled.clean[:, :, :6]) / 0.1
    assert 0.8 < noise.std() < 1.2
    drawn = [PhiloxNoise(seed).draw(chunk, 4, (1, 4, 3, *SIZE)) for seed in SEEDS for chunk in range(3)]
    for fresh in noise.unflatten(2, (2, 3)).permute(0, 2, 1, 3, 4, 5).flatten(0, 1):
        assert all((fresh - taken).abs().max() > 1 for draws in drawn for taken in draws[:, 0])
    alone = roll_exits(student, emb[1:], 9, 3, SEEDS[1:], preset, SIZE)
    assert (alone.past - rolled.past[1:]).abs().max() <= 1e-5  # a sample does not depend on its batch
    earlier = roll_exits(student, emb, 9, 0, SEEDS, preset, SIZE)
    assert ((earlier.past - 0.9 * earlier.clean[:, :, :6]) / 0.1 - noise).abs().max() <= 1e-4  # nor on the exit


def scores(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A clip, two flows and the noised clip [2, 3, 4, 2, 2], and sigma [2]."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(4, 2, 3, 4, 2, 2, generator=generator, dtype=torch.float64)
    return *parts, torch.tensor([0.3, 0.8], dtype=torch.float64)


def test_motion_gradient_by_hand() -> None:
    """(dfake - dreal) / mean|dx - dreal|, whose adjoint differences are the gradient."""
    clip, v_real, v_gen, noisy, sigma = scores()
    level = sigma.view(-1, 1, 1, 1, 1)
    real, fake = noisy - level * v_real, noisy - level * v_gen
    moves = [part[:, :, 1:] - part[:, :, :-1] for part in (clip, real, fake)]
    wanted = (moves[2] - moves[1]) / (moves[0] - moves[1]).abs().mean((1, 2, 3, 4), keepdim=True)
    still = torch.zeros_like(wanted[:, :, :1])
    clip.requires_grad_()
    loss = motion_loss(clip, v_real, v_gen, noisy, sigma)
    loss.backward()
    assert loss.item() == pytest.approx(wanted.square().mean().item() / 2)
    expected = (torch.cat([still, wanted], 2) - torch.cat([wanted, still], 2)) / wanted.numel()
    torch.testing.assert_close(clip.grad, expected)
    assert clip.grad.sum(2).abs().max() <= 1e-12  # along a shift of all frames
    assert clip.grad.abs().max() > 1e-3


def test_motion_gradient_by_differences() -> None:
    """Half the mean square of the differences and a held target, by central differences."""
    clip, v_real, v_gen, noisy, sigma = scores(1)
    way = torch.randn_like(clip)
    clip.requires_grad_()
    motion_loss(clip, v_real, v_gen, noisy, sigma).backward()
    moves = [part.diff(dim=2) for part in (clip.detach(), noisy - sigma.view(-1, 1, 1, 1, 1) * v_real)]
    away = sigma.view(-1, 1, 1, 1, 1) * (v_real - v_gen).diff(dim=2)
    target = moves[0] - away / (moves[0] - moves[1]).abs().mean((1, 2, 3, 4), keepdim=True)
    values = [0.5 * ((clip.detach() + s * way).diff(dim=2) - target).square().mean() for s in (1e-5, -1e-5)]
    found = (values[0] - values[1]) / 2e-5
    assert found.item() == pytest.approx(float((clip.grad * way).sum()), rel=1e-6)
    shifted = motion_loss(clip.detach() + 7, v_real, v_gen, noisy, sigma)  # a still picture more
    torch.testing.assert_close(shifted, motion_loss(clip.detach(), v_real, v_gen, noisy, sigma))


LEVELS = (1.0, 6 / 7, 2 / 3, 2 / 5)  # of four steps at shift 2


def trajectories(folder: Path, levels: tuple[float, ...] = LEVELS) -> Shards:
    """Clips of four frames with random latents on the way to them, or without."""
    generator = torch.Generator().manual_seed(0)
    for number in range(2):
        latents = torch.randn(3, 4, 4, *SIZE, generator=generator)
        path = torch.randn(3, len(levels), *latents.shape[1:]) if levels else None
        write_shard(folder, number, latents, [f"{number}{row}" for row in "abc"], trajectory=path)
    write_index(folder, 2, {}, levels)
    return Shards(folder)


def words() -> SimpleNamespace:
    """A teacher whose captions are fixed random embeddings."""
    torch.manual_seed(0)
    transformer = WanTransformer(TINY).eval().requires_grad_(False)

    def encode(captions: list[str]) -> Tensor:
        found = [torch.Generator().manual_seed(sum(map(ord, caption))) for caption in captions]
        return torch.stack([torch.randn(3, 8, generator=own) for own in found])

    return SimpleNamespace(device=torch.device("cpu"), transformer=transformer, encode=encode, models=[transformer])


ODE = NextChunkConfig(
    family="causal", chunk=2, window=3, rank=2, frames=4, batch=2, first_batch=2, solver="renoise", target="ode"
)


def ode_objective(data: Shards, config: NextChunkConfig = ODE) -> NextChunk:
    objective = NextChunk(config, words(), data)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in objective.student.trained().values():
            parameter.normal_(std=0.3)
    return objective


def test_shards_keep_trajectories(tmp_path: Path) -> None:
    data = trajectories(tmp_path)
    assert data.levels == list(LEVELS)
    path = data.read_trajectory([5, 0], 3)
    assert path.shape == (2, 4, 4, 3, *SIZE)
    assert torch.equal(path, data.read_trajectory([5, 0])[:, :, :, :3])
    latents, captions = data.read([5, 0])
    assert (latents.shape, captions) == ((2, 4, 4, *SIZE), ["1c", "0a"])
    old = trajectories(tmp_path / "old", ())
    assert (old.levels, len(old)) == ([], 6)
    assert "levels" not in (tmp_path / "old" / "index.json").read_text()
    with pytest.raises(ValueError, match="got latents alone, expected trajectories"):
        old.read_trajectory([0])
    for wrong in (LEVELS[1:], (*LEVELS, 0.2)):
        with pytest.raises(ValueError, match=r"got trajectories \[3, 4, 4, 4, 3, 4\], expected \[3, "):
            write_index(tmp_path, 2, {}, wrong)
    with pytest.raises(ValueError, match="does not contain tensor trajectory"):
        write_index(tmp_path / "old", 2, {}, LEVELS)


@torch.no_grad()
def test_the_teachers_path_leads_to_its_clip() -> None:
    """From every kept level on, plain Euler steps end where the sampler ended; without levels the clip is the same."""
    torch.manual_seed(0)
    model, noise, scale = WanTransformer(TINY).eval(), torch.randn(2, 4, 3, *SIZE), 2.0
    text, empty = (model.prepare_text(torch.randn(2, 3, 8)) for _ in range(2))
    how = {"steps": 3, "scale": scale, "shift": 3.0}
    clip, path = sample_path(model, text, empty, noise, LEVELS, **how)
    assert torch.equal(path[0], noise)
    grid = sorted({*LEVELS, 6 / 7, 3 / 5}, reverse=True)  # three steps at shift 3: 1, 6/7, 3/5
    for start, latent in zip(LEVELS, path, strict=True):
        below = [level for level in grid if level <= start]
        for now, then in zip(below, [*below[1:], 0.0], strict=True):
            flow = guided_flow(model, latent, torch.full((2, 3), now), text, empty, scale)
            latent = latent + (then - now) * flow
        assert (latent - clip).abs().max() <= 1e-5
    plain, nothing = sample_path(model, text, empty, noise, (), **how)
    assert torch.equal(plain, sample_joint(model, text, empty, noise, **how))
    assert not nothing
    assert (plain - clip).abs().max() > 1e-4  # the kept levels are steps of their own


def test_ode_loss_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = trajectories(tmp_path)
    objective, draws = ode_objective(data), Draws(0, 2, [0, 1])
    clips = draws.clips(2, 6)
    index = torch.tensor([[0, 3], [2, 4]])  # chunk 1 of sample 1 is the clip itself
    monkeypatch.setattr(Draws, "choice", lambda self, options, *shape: index if (options, *shape) == (5, 2) else None)
    loss, parts = objective(Draws(0, 2, [0, 1]))
    assert parts.keys() == {"ode"}
    (clip, captions), path, errors = data.read(clips), data.read_trajectory(clips), []
    student = objective.student
    for row in range(2):
        text = student.stages.prepare_text(objective.base.encode([captions[row]]))
        places = [path[row, :, :, 2 * c : 2 * c + 2] for c in range(2)]  # of the two chunks
        ends = [clip[row, :, 2 * c : 2 * c + 2] for c in range(2)]
        points = [torch.cat([places[c], ends[c][None]])[index[row, c]] for c in range(2)]
        sigma = torch.tensor([*LEVELS, 0.0])[index[row]]
        noisy = torch.cat(points, 1)[None]
        flow = student.flow_on_noisy(noisy, sigma.repeat_interleave(2)[None], text)[0]
        for c in range(2):
            predicted = points[c] - sigma[c] * flow[:, 2 * c : 2 * c + 2]
            errors.append((predicted - ends[c]).square().mean())
    assert errors[3] == 0  # at the last level the target is the clip, and so is the prediction
    assert min(errors[:3]) > 0.1
    assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)
    loss.backward()
    assert all(p.grad.any() for p in student.trained().values())


def test_points_of_a_path() -> None:
    path, index = torch.arange(2 * 3 * 1 * 4).view(2, 3, 1, 4, 1, 1), torch.tensor([[0, 2, 1, 1], [2, 0, 0, 1]])
    expected = [[12 * row + 4 * level + frame for frame, level in enumerate(own)] for row, own in enumerate(index)]
    assert points_of(path, index)[:, 0, :, 0, 0].tolist() == expected


def test_ode_overfits_and_data_stays(tmp_path: Path) -> None:
    """Its own loss falls; the fields of trajectories change nothing for the other target."""
    data = trajectories(tmp_path)
    objective = ode_objective(data)
    optimizer, values = torch.optim.Adam(objective.student.trained().values(), lr=1e-2), []
    for _ in range(30):
        loss, _ = objective(Draws(0, 0, [0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.8 * values[0]
    plain = replace(ODE, target="data", roll_share=0.0, first="data")
    both = [ode_objective(each, plain)(Draws(0, 1, [0, 1]))[0] for each in (data, trajectories(tmp_path / "old", ()))]
    assert torch.equal(*both)


@pytest.mark.parametrize(
    ("levels", "fields", "match"),
    [
        ((), {}, r"with trajectories at levels \[\], expected those of the sampling steps, \[1.0, 0.857143"),
        (LEVELS[:3], {}, r"expected those of the sampling steps, \[1.0, 0.857143, 0.666667, 0.4\]"),
        (LEVELS, {"schedule": "diagonal"}, r"expected those of the sampling steps, \[1.0, 0.93"),
        (LEVELS, {"sampling_steps": 2}, r"expected those of the sampling steps, \[1.0, 0.666667\]"),
    ],
)
def test_data_without_the_trajectories(
    tmp_path: Path, levels: tuple[float, ...], fields: dict[str, object], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        ode_objective(trajectories(tmp_path, levels), replace(ODE, **fields))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target: got 'ode', expected 'data' for family 'greedy'"):
        NextChunkConfig(target="ode")


def test_a_chunk_has_one_prompt(tmp_path: Path) -> None:
    """Where the prompt switches inside a chunk, no frame after the switch is learnt before the next chunk begins."""
    config = replace(ODE, target="data", roll_share=0.0, first="data")
    generator = torch.Generator().manual_seed(0)
    latents, found = torch.randn(6, 4, 4, *SIZE, generator=generator), dict[int, tuple[Tensor, Tensor]]()
    for begins in (0, 1, 2, 3):
        earlier = [("before", begins) if begins else None] * 6
        write_shard(tmp_path / str(begins), 0, latents, list("abcdef"), earlier)
        write_index(tmp_path / str(begins), 1, {})
        objective, draws = ode_objective(Shards(tmp_path / str(begins)), config), Draws(0, 1, [0, 1])
        found[begins] = objective.next_frame_loss(draws, roll=False), objective.first_frame_loss(draws)
    later, first = ({begins: losses[i].item() for begins, losses in found.items()} for i in (0, 1))
    assert later[0] == later[1] == later[2] > 0.1  # chunk 1 is whole after each of these
    assert later[3] == 0
    assert first[2] == first[3] != first[0]  # the earlier caption
    assert 0 < first[1] < first[2]  # of frame 0 alone
