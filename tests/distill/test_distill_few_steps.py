"""Students of few steps: adversarial self-distillation (gradients, what the discriminator learns) and consistency."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_distill_losses import STEP, Words, check_gradient, dmd, in_double, keep_double, spread
from torch import Tensor

from distill.data.shards import Shards, write_index, write_shard
from distill.models.rollout import roll_out
from distill.models.student_file import NextChunkConfig
from distill.stages import latents
from distill.stages.consistency import Consistency, ConsistencyConfig, clean
from distill.stages.dmd import Dmd, DmdConfig, train
from distill.stages.latents import BankConfig, BankOptions
from distill.training.draws import Draws

SPRITES = Path(__file__).parents[2] / "engine" / "assets" / "sprites"
ADVERSARIAL = {"adversarial": 0.5, "sampling_steps": (1, 2, 4), "head_width": 8, "features": (0, 1)}


def rivals(objective: Dmd, clip: Tensor, better: Tensor, number: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    emb = objective.base.encode(["a", "bb"])
    return objective.adversarial_loss(clip, better, emb, Draws(0, 0, [0, 1]), number)


@pytest.mark.parametrize("number", [0, 2])
def test_equal_clips_cannot_be_told_apart(data: Shards, number: int) -> None:
    clip = torch.randn(2, 2, 4, 2, 2, requires_grad=True)
    _, parts = rivals(dmd(data, **ADVERSARIAL), clip, clip.detach(), number)
    for name in ("generator", "discriminator"):
        assert parts[name].item() == pytest.approx(math.log(2), abs=1e-6)
    assert parts["gap"].item() == pytest.approx(0, abs=1e-6)


def test_adversarial_gradients_go_where_they_should(data: Shards) -> None:
    """The student learns from its own clip alone; the better clip gets exactly nothing; head and critic learn."""
    objective = dmd(data, **ADVERSARIAL)
    clip, better = (torch.randn(2, 2, 4, 2, 2, requires_grad=True) for _ in range(2))
    rivals(objective, clip, better)[1]["generator"].backward()
    assert clip.grad.any()
    assert better.grad is None
    assert all(p.grad is None for p in objective.parameters())
    loss, parts = rivals(objective, clip.detach(), better)
    assert "generator" not in parts
    loss.backward()
    assert better.grad is None
    assert objective.discriminator is not None
    learnt = [*objective.discriminator.trained().values(), objective.critic.model.blocks[0].attn1.to_q.weight]
    assert all(p.grad is not None and p.grad.any() for p in learnt)


def test_each_number_of_steps_has_its_logit(data: Shards) -> None:
    objective = dmd(data, **ADVERSARIAL)
    assert objective.discriminator is not None
    rivals(objective, *(torch.randn(2, 2, 4, 2, 2) for _ in range(2)), number=1)[0].backward()
    assert [bool(row.any()) for row in objective.discriminator.head[-1].weight.grad] == [False, True, False]


@pytest.mark.usefixtures("double")
def test_generator_gradient(data: Shards) -> None:
    """The student's adversarial loss by its clip, against central differences."""
    objective = dmd(data, **ADVERSARIAL).double()
    keep_double(objective)
    generator = torch.Generator().manual_seed(0)
    clip, better, way = (torch.randn(2, 2, 4, 2, 2, generator=generator) for _ in range(3))
    clip.requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return rivals(objective, x, better)[1]["generator"]

    loss(clip).backward()
    found = (loss(clip + STEP * way) - loss(clip - STEP * way)) / (2 * STEP)
    assert found.item() == pytest.approx(float((clip.grad * way).sum()), rel=5e-3)


@pytest.mark.usefixtures("double")
def test_discriminator_gradient(data: Shards) -> None:
    """The discriminator's loss with both penalties, by the weights of its head."""
    objective = dmd(data, **ADVERSARIAL).double()
    keep_double(objective)
    clip, better = (torch.randn(2, 2, 4, 2, 2, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    assert objective.discriminator is not None
    spread(objective.discriminator)
    parameters = list(objective.discriminator.trained().values())
    check_gradient(objective, parameters, lambda: rivals(objective, clip, better)[0])


def test_a_smooth_discriminator_pays_no_penalty(data: Shards) -> None:
    """One whose logits ignore the clips; another pays for what a nudge changes, around either kind of clips."""
    objective = dmd(data, **ADVERSARIAL)
    assert objective.discriminator is not None
    spread(objective.discriminator)
    clip, better = torch.randn(2, 2, 4, 2, 2), torch.randn(2, 2, 4, 2, 2)
    _, parts = rivals(objective, clip, better)
    _, others = rivals(objective, clip + 1, better)
    assert parts["r1"] == others["r1"] > 0
    assert parts["r2"] != others["r2"]
    for name in ("r1", "r2"):
        loss = rivals(dmd_with(objective, **{name: 1e3}), clip, better)[0]
        without = rivals(dmd_with(objective, **{name: 0.0}), clip, better)[0]
        assert (loss - without).item() == pytest.approx(1e3 * parts[name].item(), rel=1e-2)
    none = rivals(dmd_with(objective, r1=0.0, r2=0.0), clip, better)
    assert none[0].item() == pytest.approx(parts["discriminator"].item(), rel=1e-5)
    assert not {"r1", "r2"} & none[1].keys()
    with torch.no_grad():
        objective.discriminator.head[-1].weight.zero_()
    _, parts = rivals(objective, clip, better)
    assert parts["r1"] == parts["r2"] == 0


def dmd_with(objective: Dmd, **options: float) -> Dmd:
    """The same models under other options."""
    other = copy.copy(objective)
    other.config = replace(objective.config, **options)
    return other


@pytest.mark.parametrize("opponent", ["next", "data"])
@pytest.mark.parametrize("options", [{}, {"frames": 3, "rollout": 4}, {"first_steps": 4}])
def test_the_opponent(data: Shards, opponent: str, options: dict[str, object]) -> None:
    """The student's own stream with the next larger number of steps, or the data of the same captions."""
    objective, starts = dmd(data, **ADVERSARIAL, opponent=opponent, **options), set()
    emb = objective.base.encode(["a", "bb"])
    for step in range(6):
        draws, again = Draws(0, step, [0, 1]), Draws(0, step, [0, 1])
        turn = objective.turn(draws)
        with torch.no_grad():
            found = objective.better(emb, draws, turn)
        window = slice(turn.start, turn.start + objective.config.frames)
        starts.add(turn.start)
        if opponent == "next" and turn.number < 2:
            preset = objective.presets[turn.number + 1]
            expected = roll_out(objective.student, emb, 4, again.seeds(), preset, (2, 2))
        else:
            expected = data.read(again.clips(2, len(data)))[0]
        assert torch.equal(found, expected[:, :, window])
    assert len(starts) == 5 - objective.config.frames


def test_one_frame_of_a_clip_learns(data: Shards) -> None:
    """The same clips; each sample has the gradient of one frame, over the steps of every frame that has one."""
    for options, least in (({}, 0), ({"frames": 3, "rollout": 4}, 1)):
        whole, one, late = dmd(data, **options), dmd(data, gradient="one", **options), set()
        emb = whole.base.encode(["a", "bb"])
        for step in range(24):
            draws, again = Draws(0, step, [0, 1]), Draws(0, step, [0, 1])
            turn = one.turn(draws)
            if step < 2:
                assert torch.equal(one.generate(emb, draws, turn), whole.generate(emb, again, whole.turn(again)))
            clip = torch.randn(2, 2, one.config.frames, 2, 2, requires_grad=True)
            kept = one._one_frame_of(clip, draws, turn)
            assert torch.equal(kept, clip)
            kept.sum().backward()
            learns = clip.grad.any(1).all((2, 3))
            assert (learns.sum(1) == 1).all()
            if turn.start == least:
                late |= set(learns.nonzero()[:, 1].tolist())
        assert late == set(range(least, one.config.frames))


def test_what_does_not_fit_is_refused(data: Shards, tmp_path: Path) -> None:
    write_shard(tmp_path, 0, torch.randn(2, 2, 4, 2, 2), ["a", "bb"], [("b", 1), ("c", 2)])
    write_index(tmp_path, 1, {})
    with pytest.raises(ValueError, match="where every clip switches its prompt, expected some without"):
        dmd(Shards(tmp_path), **ADVERSARIAL)
    with pytest.raises(ValueError, match="rollout: got 6, expected at most the 4 of "):
        dmd(data, **ADVERSARIAL, rollout=6)
    with pytest.raises(ValueError, match="features: got block 2, expected 0 to 1"):
        dmd(data, **(ADVERSARIAL | {"features": (0, 2)}))


@pytest.mark.parametrize("opponent", ["next", "data"])
def test_a_discriminator_sees_clips_of_one_caption(tmp_path: Path, opponent: str) -> None:
    """Of a bank with switched prompts it gets the others, with their own captions."""
    latents = torch.randn(4, 2, 4, 2, 2)
    write_shard(tmp_path, 0, latents, ["a", "bb", "ccc", "d"], [None, ("e", 2), None, ("f", 1)])
    write_index(tmp_path, 1, {})
    options = ADVERSARIAL | {"opponent": opponent, "sampling_steps": (1, 2)}
    objective = dmd(Shards(tmp_path), **options)
    seen, last = set(), len(objective.presets) - 1
    for step in range(4):
        draws = Draws(0, step, [0, 1])
        captions = objective.captions(draws)
        better = objective.better(objective.base.encode(captions), draws, replace(objective.turn(draws), number=last))
        rows = [["a", "bb", "ccc", "d"].index(caption) for caption in captions]
        assert torch.equal(better, latents[rows])
        seen |= set(captions)
    assert seen == {"a", "ccc"}


def consistency(data: Shards, family: str = "greedy", **options: object) -> Consistency:
    torch.manual_seed(0)
    made = NextChunkConfig(family=family, rank=2, max_position=3, first=str(options.pop("first", "guided")))
    base = Words()
    student = made.student(base)  # type: ignore[arg-type]
    spread(student)
    config = ConsistencyConfig(batch=2, frames=4, **options)  # type: ignore[arg-type]
    return Consistency(config, made, base, student, data)  # type: ignore[arg-type]


FAMILIES = pytest.mark.parametrize("family", ["greedy", "causal"])


@FAMILIES
def test_at_the_last_level_the_target_is_the_data(data: Shards, family: str) -> None:
    objective = consistency(data, family, levels=5)
    latent, noise = torch.randn(2, 2, 4, 2, 2), torch.randn(2, 2, 4, 2, 2)
    emb = objective.base.encode(["a", "bb"])
    levels = [2 * t / (1 + t) for t in (1, 0.8, 0.6, 0.4, 0.2)]
    for index, level in enumerate(levels):
        sigma, noisy, target = objective.target(latent, noise, emb, index)
        assert sigma.flatten().tolist() == pytest.approx([level] * 8)
        torch.testing.assert_close(noisy, (1 - level) * latent + level * noise)
        assert torch.equal(target, latent) == (index == 4)


@FAMILIES
def test_the_target_is_the_average_after_a_step_of_the_teacher(data: Shards, family: str) -> None:
    """Three sets of weights in one student, against three students."""
    objective = consistency(data, family, levels=4, shift=1.0)
    teacher, average = copy.deepcopy(objective.student), copy.deepcopy(objective.student)
    for student in (average, objective.student):
        spread(student)
    objective.follow(average.trained())
    latent, noise = torch.randn(2, 2, 4, 2, 2), torch.randn(2, 2, 4, 2, 2)
    emb, past, t = objective.base.encode(["a", "bb"]), latent[:, :, :-1], torch.full((2, 4), 0.75)
    noisy = 0.25 * latent + 0.75 * noise
    with torch.no_grad():
        nearer = noisy - 0.25 * teacher.flow(past, noisy, t, teacher.stages.prepare_text(emb))
        after = torch.full_like(t, 0.5)
        expected = nearer - 0.5 * average.flow(past, nearer, after, average.stages.prepare_text(emb))
    torch.testing.assert_close(objective.target(latent, noise, emb, 1)[2], expected)
    assert not any(p.grad is not None for p in objective.parameters())


@FAMILIES
@pytest.mark.parametrize("first", ["guided", "data"])
def test_a_guided_first_frame_is_not_guided_again(data: Shards, family: str, first: str) -> None:
    objective = consistency(data, family, guidance=3.0, first=first)
    latent, emb, empty = torch.randn(2, 2, 4, 2, 2), *map(objective.base.encode, (["a", "bb"], ["", ""]))
    inputs = latent[:, :, :-1], latent, torch.full((2, 4), 0.5)
    with torch.no_grad():
        found = objective.teacher_flow(*inputs, emb)
        v_text, v_empty = objective.student(*inputs, emb), objective.student(*inputs, empty)
    expected = v_empty + 3 * (v_text - v_empty)
    if first == "guided":
        expected[:, :, 0] = v_text[:, :, 0]
    torch.testing.assert_close(found, expected)


@FAMILIES
def test_predictions_of_neighbouring_levels_come_together(data: Shards, family: str) -> None:
    """On held-out clips, |f(x_t) - f(x_t')| of the student itself falls while it is trained."""
    objective = consistency(data, family, levels=6)
    with torch.no_grad():
        for parameter in objective.student.trained().values():
            parameter.mul_(3)
    objective.teacher = {name: p.detach().clone() for name, p in objective.student.trained().items()}
    latent, noise = torch.randn(2, 2, 4, 2, 2), torch.randn(2, 2, 4, 2, 2)
    emb = objective.base.encode(["a", "b"])

    @torch.no_grad()
    def apart() -> float:
        objective.follow(dict(objective.student.trained()))
        total = 0.0
        for index in range(5):
            sigma, noisy, target = objective.target(latent, noise, emb, index)
            flow = objective.student(latent[:, :, :-1], noisy, sigma, emb)
            total += float((clean(noisy, sigma, flow) - target).abs().mean())
        return total

    before = apart()
    optimizer = torch.optim.Adam(objective.student.trained().values(), lr=3e-3)
    for step in range(20):
        optimizer.zero_grad()
        objective(Draws(0, step, [0, 1]))[0].backward()
        optimizer.step()
    assert apart() < 0.8 * before


@pytest.mark.usefixtures("double")
def test_consistency_gradient(data: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Consistency, "read", in_double(Consistency.read))
    objective = consistency(data, levels=3).double()
    keep_double(objective)
    objective.follow({name: p.detach().clone() for name, p in objective.student.trained().items()})
    objective.teacher = objective.average
    check_gradient(objective, list(objective.student.trained().values()), lambda: objective(Draws(0, 3, [0, 1]))[0])


@pytest.mark.parametrize("begins", [0, 2])
def test_frames_before_a_switch_teach_nothing(begins: int, tmp_path: Path) -> None:
    earlier = [("z", begins) if begins else None] * 2
    latent_clips = torch.randn(2, 2, 4, 2, 2)
    write_shard(tmp_path, 0, latent_clips, ["a", "bb"], earlier)
    write_index(tmp_path, 1, {})
    objective = consistency(Shards(tmp_path), levels=1)
    loss = objective(Draws(0, 0, [0, 1]))[0]
    draws = Draws(0, 0, [0, 1])
    latent, captions = objective.read(draws, 2, 4)
    noise = draws.normal(2, 4, 2, 2)
    with torch.no_grad():
        flow = objective.student(latent[:, :, :-1], noise, torch.ones(2, 4), objective.base.encode(captions))
    expected = (noise - flow - latent)[:, :, begins:].square().mean()
    torch.testing.assert_close(loss.detach(), expected)


def test_bad_configs_of_consistency(data: Shards) -> None:
    for options, match in (
        ({"levels": 0}, "levels: got 0, expected at least 1"),
        ({"frames": 0}, "frames: got 0, expected at least 1"),
        ({"shift": 0.0}, "shift: got 0.0, expected more than 0"),
    ):
        with pytest.raises(ValueError, match=match):
            ConsistencyConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="frames: got 5, expected at most the 4 of "):
        Consistency(ConsistencyConfig(frames=5), NextChunkConfig(), None, None, data)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_discriminator_tells_drawings_from_the_student(tmp_path: Path) -> None:
    """The embedded student of one step against drawn clips: the logits part within 24 updates."""
    latents.run(
        BankConfig(task="scenes", vae=str(SPRITES / "vae"), images=1, clips=16, frames=5), BankOptions(out=tmp_path)
    )
    config = DmdConfig(
        student=str(SPRITES), data=str(tmp_path / "clips"), steps=24, batch=2, frames=2, sampling_steps=(1,),
        critic_warmup=24, adversarial=1.0, opponent="data", lr=1e-3, r1=0.0, r2=0.0,
    )  # fmt: skip
    train(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    late = [sum(line[name] for line in lines[-8:]) / 8 for name in ("gap", "discriminator")]
    assert late[0] > 0.05
    assert late[1] < math.log(2) - 0.02
