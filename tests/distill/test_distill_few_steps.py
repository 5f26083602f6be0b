"""Adversarial self-distillation: which way its gradients go, and what the discriminator learns."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_distill_losses import STEP, check_gradient, dmd, keep_double, spread
from torch import Tensor

from distill.data.shards import Shards
from distill.models.rollout import roll_out
from distill.stages import latents
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
    for step in range(12):
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


def test_what_does_not_fit_is_refused(data: Shards) -> None:
    with pytest.raises(ValueError, match="rollout: got 6, expected at most the 4 of "):
        dmd(data, **ADVERSARIAL, rollout=6)
    with pytest.raises(ValueError, match="features: got block 2, expected 0 to 1"):
        dmd(data, **(ADVERSARIAL | {"features": (0, 2)}))


@pytest.mark.slow
def test_the_discriminator_tells_drawings_from_the_student(tmp_path: Path) -> None:
    """The embedded student of one step against drawn clips: the logits part within 30 updates."""
    latents.run(
        BankConfig(task="scenes", vae=str(SPRITES / "vae"), images=1, clips=16, frames=5), BankOptions(out=tmp_path)
    )
    config = DmdConfig(
        student=str(SPRITES), data=str(tmp_path / "clips"), steps=30, batch=2, frames=2, sampling_steps=(1,),
        critic_warmup=30, adversarial=1.0, opponent="data", lr=1e-3, r1=0.0, r2=0.0,
    )  # fmt: skip
    train(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    late = [sum(line[name] for line in lines[-10:]) / 10 for name in ("gap", "discriminator")]
    assert late[0] > 0.05
    assert late[1] < math.log(2) - 0.02
