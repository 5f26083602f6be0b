"""Pairs for video-to-video: what is drawn, what the bank keeps, and what their loss teaches."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_distill_losses import CHUNKS, check_gradient, keep_double, next_chunk
from torch import Tensor

from distill.data.looks import LOOKS, Pair, draw_pair
from distill.data.scenes import Scene, path, render, seen
from distill.data.shards import Pairs, Shards, write_index, write_shard
from distill.data.sprites import Spec, held_out
from distill.models.codec import Codec, build_vae
from distill.models.rollout import noise_levels
from distill.models.student_file import NextChunkConfig
from distill.stages.latents import BankConfig, BankOptions
from distill.stages.latents import run as draw_bank
from distill.stages.next_chunk import NextChunk, draw_path
from distill.training.draws import Draws, generator


def drawn(count: int, change: tuple[str, ...] | None = None, *, hidden: bool = False) -> list[Pair]:
    generator = torch.Generator().manual_seed(3)
    return [draw_pair(change, generator, hidden=hidden) for _ in range(count)]


def differences(pair: Pair) -> set[str]:
    shown, wanted = pair
    looks = {name: (getattr(shown.mover, name), getattr(wanted.mover, name)) for name in ("colour", "shape")}
    looks["background"] = shown.background, wanted.background
    return {name for name, (one, other) in looks.items() if one != other}


@pytest.mark.parametrize("change", [(), ("colour",), ("background", "shape"), LOOKS])
def test_a_pair_has_one_motion_and_other_looks(change: tuple[str, ...]) -> None:
    for shown, wanted in drawn(30, change):
        assert differences(Pair(shown, wanted)) == set(change)
        assert torch.equal(path(shown, 33), path(wanted, 33))
        assert torch.equal(seen(shown, 33), seen(wanted, 33))
        assert shown.other == wanted.other


def test_pairs_of_training_are_of_the_training_side() -> None:
    pairs = drawn(200)
    assert not any(held_out(spec_of(scene)) for pair in pairs for scene in pair)
    assert all(held_out(spec_of(pair.wanted)) for pair in drawn(40, hidden=True))
    changed = [differences(pair) for pair in pairs]
    assert {len(names) for names in changed} == {1, 2, 3}
    assert set().union(*changed) == set(LOOKS)
    assert any(pair.shown.other != pair.wanted.other for pair in pairs)
    for scene in (scene for pair in pairs for scene in pair if scene.other is not None):
        assert scene.mover.colour != scene.other.colour  # a caption names two objects by their colours


def spec_of(scene: Scene) -> Spec:
    return Spec(scene.mover.colour, scene.mover.shape, scene.direction, scene.speed, scene.background)


def test_the_bank_keeps_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both folders in one order: the latents are those of the pair, the captions those of its sides."""
    torch.manual_seed(0)
    vae = build_vae()
    monkeypatch.setattr("distill.stages.latents.pretrained", lambda kind, path: vae)
    monkeypatch.setattr("distill.stages.latents.SHARD", 2)
    draw_bank(BankConfig(task="scenes", images=1, clips=1, frames=5, pairs=3), BankOptions(out=tmp_path))
    pairs = Pairs(tmp_path / "pairs")
    shown, wanted, captions = pairs.read(range(3))
    assert (len(pairs), pairs.frames, shown.shape) == (3, 2, wanted.shape)
    assert captions == pairs.targets.captions(range(3)) != pairs.inputs.captions(range(3))
    draws = generator(100, "pairs", 1)  # the second shard, of one pair
    pair = draw_pair(None, draws)
    assert (pairs.inputs.captions([2]), captions[2]) == ([pair.shown.caption], pair.wanted.caption)
    with torch.autocast("cpu", torch.bfloat16):
        expected = Codec(vae).encode(render([pair.shown], 5)[0]).half()
    assert torch.equal(shown[2:], expected.float())


def test_pairs_that_do_not_match_are_refused(tmp_path: Path) -> None:
    for side, count in (("inputs", 2), ("targets", 3)):
        write_shard(tmp_path / side, 0, torch.zeros(count, 2, 4, 2, 2), ["a"] * count)
        write_index(tmp_path / side, 1, {})
    with pytest.raises(ValueError, match=r"got inputs \[2, 2, 4, 2, 2\], expected targets' .*\[3, 2, 4, 2, 2\]"):
        Pairs(tmp_path)
    with pytest.raises(ValueError, match=r"pairs: got 3 of sprites, expected 0 or more, of scenes"):
        BankConfig(pairs=3)
    with pytest.raises(ValueError, match=r"pair_share: got 1.5"):
        NextChunkConfig(pair_share=1.5)


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    for number, side in enumerate(("inputs", "targets")):
        latents = torch.randn(4, 2, 4, 2, 2, generator=torch.Generator().manual_seed(number))
        write_shard(tmp_path / side, 0, latents, ["a", "bb", "ccc", "dddd"])
        write_index(tmp_path / side, 1, {})
    return Pairs(tmp_path)


def objective_of(data: Shards, pairs: Pairs, **options: object) -> NextChunk:
    objective = next_chunk(data, pair_share=1.0, **options)
    objective.pairs = pairs
    return objective


@pytest.mark.parametrize("fields", [{}, CHUNKS], ids=["greedy", "causal"])
def test_a_student_that_sees_the_target_has_no_loss(
    data: Shards, pairs: Pairs, fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one step from anywhere on the way ends at the target: x - sigma flow, as solvers compute it."""
    objective = objective_of(data, pairs, **fields)
    draws = Draws(0, 0, [0, 1])
    wanted = pairs.read(draws.clips(2, 4))[1]
    told: list[Tensor] = []

    def flow(context: Tensor, noisy: Tensor, sigma: Tensor, text: object) -> Tensor:
        told.append(sigma)
        assert torch.equal(context, wanted[:, :, : context.shape[2]])
        return (noisy - wanted) / sigma[:, None, :, None, None]

    monkeypatch.setattr(objective.student, "flow", flow)
    loss, parts = objective(draws)
    assert float(loss) <= 1e-9
    assert parts == {"pairs": loss}
    assert told[0].shape == (2, 4)
    monkeypatch.setattr(objective.student, "flow", lambda *a: flow(*a) + 0.1)
    assert float(objective(Draws(0, 0, [0, 1]))[0]) == pytest.approx(0.01, rel=1e-3)


def test_the_first_step_begins_at_the_input(data: Shards, pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sigma is the level of the beginning, the student gets the input noised, as streams with a source give."""
    objective = objective_of(data, pairs, context_noise=0.0)
    monkeypatch.setattr("distill.stages.next_chunk.draw_path", lambda *a: (torch.full((2, 4), 0.75),) * 2)
    shown, wanted, _ = pairs.read(Draws(0, 0, [0, 1]).clips(2, 4))
    noise = Draws(0, 0, [0, 1]).normal(*shown.shape[1:])
    got: list[Tensor] = []
    flow = objective.student.flow
    monkeypatch.setattr(objective.student, "flow", lambda *a: got.append(a[1]) or flow(*a))
    loss = objective.pair_loss(Draws(0, 0, [0, 1]))
    assert torch.allclose(got[0], 0.25 * shown + 0.75 * noise, atol=1e-6)
    assert float(loss.detach()) > 0
    assert not torch.allclose(shown, wanted)


def test_levels_on_the_way() -> None:
    config = NextChunkConfig(sampling_steps=4, sampling_shift=2.0)
    grid = noise_levels(config.preset)[:-1]
    begin, sigma = draw_path((9,), config, Draws(0, 0, list(range(64))))
    assert ((sigma <= begin) & (sigma > 0) & (begin >= grid[-1]) & (begin <= 1)).all()
    on_grid = (begin[..., None] == grid).any(-1).float().mean()
    assert 0.4 <= float(on_grid) <= 0.6
    assert 0.4 <= float((sigma == begin).float().mean()) <= 0.6


@pytest.mark.parametrize("fields", [{}, CHUNKS], ids=["greedy", "causal"])
@pytest.mark.usefixtures("double")
def test_gradient(data: Shards, pairs: Pairs, fields: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    read: Callable[..., tuple[Tensor, Tensor, list[str]]] = Pairs.read

    def in_double(self: Pairs, *arguments: object) -> tuple[Tensor, Tensor, list[str]]:
        shown, wanted, captions = read(self, *arguments)
        return shown.double(), wanted.double(), captions

    monkeypatch.setattr(Pairs, "read", in_double)
    objective = objective_of(data, pairs, context_noise=0.3, **fields).double()
    keep_double(objective)
    parameters = list(objective.student.trained().values())
    check_gradient(objective, parameters, lambda: objective(Draws(0, 3, [0, 1]))[0])


def test_the_share_of_the_steps(data: Shards, pairs: Pairs) -> None:
    """The other steps are those of a run without pairs, to the bit."""
    plain, mixed = next_chunk(data), objective_of(data, pairs)
    mixed.config = replace(mixed.config, pair_share=0.5)
    kinds = list[bool]()
    for step in range(24):
        loss, parts = mixed(Draws(0, step, [0, 1]))
        kinds.append("pairs" in parts)
        assert kinds[-1] or torch.equal(loss, plain(Draws(0, step, [0, 1]))[0])
    assert 6 <= sum(kinds) <= 18
