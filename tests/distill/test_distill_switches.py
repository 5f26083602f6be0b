"""Switched prompts: what is drawn, what the shards keep, which frames teach, and what a rollout shows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_distill_losses import Words, dmd, next_chunk

from distill.data import scenes, switches
from distill.data.scenes import path
from distill.data.shards import Shards, write_index, write_shard
from distill.data.sprites import DIRECTIONS, held_out
from distill.data.switches import FACTS, Switch, draw_switch, first_frame, heading
from distill.models.codec import build_vae
from distill.models.rollout import roll_exits
from distill.stages.dmd import DmdConfig
from distill.stages.latents import Bank, BankConfig, BankOptions
from distill.stages.latents import run as draw_bank
from distill.stages.vae import train_vae
from distill.stages.vae.train_vae import VaeConfig
from distill.training.draws import Draws


def drawn(count: int, changed: tuple[str, ...] | None = None, **options: int) -> list[Switch]:
    generator = torch.Generator().manual_seed(3)
    return [draw_switch(changed, generator, **options) for _ in range(count)]  # type: ignore[arg-type]


def facts(scene: scenes.Scene) -> dict[str, str]:
    mover = {"colour": scene.mover.colour, "shape": scene.mover.shape}
    return mover | {name: getattr(scene, name) for name in ("direction", "speed", "background")}


@pytest.mark.parametrize("changed", [("colour",), ("direction",), ("speed", "shape"), tuple(FACTS)])
def test_a_switch_changes_its_facts_alone(changed: tuple[str, ...]) -> None:
    for switch in drawn(40, changed):
        before, after = facts(switch.before), facts(switch.after)
        assert {name for name in FACTS if before[name] != after[name]} == set(changed)
        assert switch.before.relation == switch.after.relation
        assert switch.before.other == switch.after.other
        assert switch.before.mover.radius == switch.after.mover.radius


def test_the_mover_goes_on_from_its_place() -> None:
    """Also where it has bounced: then it goes on against the direction of both captions."""
    bounced = 0
    for switch in drawn(120, ("colour",)):
        way = path(switch.before, switch.frame + 6)
        assert torch.allclose(path(switch.after, 6), way[switch.frame :], atol=1e-4)
        bounced += heading(switch.before, switch.frame) < 0
    assert bounced > 5
    for switch in drawn(60, ("direction",)):
        step = path(switch.after, 2).diff(dim=0)[0]
        expected = torch.tensor(DIRECTIONS[switch.after.direction]) * abs(switch.before.pace)
        assert torch.allclose(step, expected.float(), atol=1e-4)
        assert torch.allclose(path(switch.after, 1)[0], path(switch.before, switch.frame + 1)[-1], atol=1e-4)


def test_prompts_are_of_the_right_side() -> None:
    def spec(scene: scenes.Scene) -> str:
        return replace(scene, other=None).caption

    unseen = {facts.caption for facts in switches.combinations(held_out=True)}
    assert held_out(switches.combinations(held_out=True)[0])
    for switch in drawn(60):
        assert not {spec(switch.before), spec(switch.after)} & unseen
    for switch in drawn(20, ("colour",), hidden=True):
        assert spec(switch.after) in unseen


def test_what_is_drawn_changes_at_the_latent_frame() -> None:
    switch = drawn(1, ("background",), begins=2)[0]
    assert (switch.frame, first_frame(1), first_frame(0)) == (5, 1, 0)
    video, cover = switches.render([switch, switch.before], 17)
    assert video.shape == (2, 3, 17, 32, 32)
    assert cover.shape == (2, 1, 17, 32, 32)
    same = (video[0] - video[1]).abs().amax((0, 2, 3)) == 0
    assert same.tolist() == [True] * 5 + [False] * 12


def test_shards_keep_earlier_captions(tmp_path: Path) -> None:
    earlier = [None, ("a red one", 3), None]
    write_shard(tmp_path, 0, torch.zeros(3, 2, 4, 2, 2), ["a", "b", "c"], earlier)
    write_shard(tmp_path, 1, torch.zeros(1, 2, 4, 2, 2), ["d"])
    write_index(tmp_path, 2, {})
    shards = Shards(tmp_path)
    assert shards.earlier([3, 1, 0]) == [None, ("a red one", 3), None]
    assert shards.captions([1, 3]) == ["b", "d"]
    written = {(tmp_path / "00000.safetensors").read_bytes()}
    for _ in range(8):
        write_shard(tmp_path, 0, torch.zeros(3, 2, 4, 2, 2), ["a", "b", "c"], earlier)
        written.add((tmp_path / "00000.safetensors").read_bytes())
    assert len(written) == 1


def test_shards_of_older_folders(tmp_path: Path) -> None:
    """Which have earlier captions in an entry of their own."""
    write_shard(tmp_path, 0, torch.zeros(3, 2, 4, 2, 2), ["a", "b", "c"])
    told = {"captions": json.dumps(["a", "b", "c"]), "earlier": json.dumps([None, ["a red one", 3], None])}
    save_file({"latents": torch.zeros(3, 2, 4, 2, 2)}, tmp_path / "00000.safetensors", told)
    write_index(tmp_path, 1, {})
    assert Shards(tmp_path).earlier(range(3)) == [None, ("a red one", 3), None]
    assert Shards(tmp_path).captions(range(3)) == ["a", "b", "c"]


def test_the_bank_has_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.stages.latents.pretrained", lambda kind, path: build_vae())
    config = BankConfig(task="scenes", images=2, clips=10, frames=9, switch_share=0.4)
    draw_bank(config, BankOptions(out=tmp_path))
    earlier = Shards(tmp_path / "clips").earlier(range(10))
    assert sum(entry is not None for entry in earlier) == 4
    assert Shards(tmp_path / "images").earlier(range(2)) == [None, None]
    with pytest.raises(ValueError, match=r"bank: got clips in .* whose prompt is switched"):
        Bank.load(tmp_path)  # of a teacher, which learns clips of one caption
    with pytest.raises(ValueError, match=r"switch_share: got 0.5 of sprites"):
        BankConfig(switch_share=0.5)


@pytest.fixture
def switched(tmp_path: Path) -> Shards:
    """Clips a and b; b's caption holds from latent frame 2 on."""
    latents = torch.randn(4, 2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    write_shard(tmp_path, 0, latents, ["a", "bb", "a", "bb"], [None, ("ccc", 2), None, ("ccc", 2)])
    write_index(tmp_path, 1, {})
    return Shards(tmp_path)


def test_frames_before_a_switch_teach_nothing(switched: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their targets do not reach the loss, as past they do; every clip counts alike."""
    objective = next_chunk(switched, first="data", roll_share=0.0, on_schedule=0.0)
    kinds = {switched.earlier(objective.clips(Draws(0, 0, [sample]), 2))[0]: sample for sample in range(4)}
    samples = [kinds[None], kinds["ccc", 2]]
    shown: list[torch.Tensor] = []
    flow = objective.student.flow

    def watched(context: torch.Tensor, noisy: torch.Tensor, sigma: torch.Tensor, text: object) -> torch.Tensor:
        result = flow(context, noisy, sigma, text)  # type: ignore[arg-type]
        result.retain_grad()
        shown.append(result)
        return result

    monkeypatch.setattr(objective.student, "flow", watched)
    for number, sample in enumerate(samples):
        objective.next_frame_loss(Draws(0, 0, [sample]), roll=False).backward()
        learnt = shown[-1].grad.abs().sum((0, 1, 3, 4)) > 0  # type: ignore[union-attr]
        assert learnt.tolist() == [False, number == 0, True, True]
    parts = [objective.next_frame_loss(Draws(0, 0, [sample]), roll=False) for sample in samples]
    whole = objective.next_frame_loss(Draws(0, 0, samples), roll=False)
    assert whole.item() == pytest.approx(sum(part.item() for part in parts) / 2, rel=1e-5)


def test_frame_0_of_a_switched_clip_has_its_own_caption(switched: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    encode = Words.encode
    monkeypatch.setattr(Words, "encode", lambda self, captions: said.extend(captions) or encode(self, captions))
    next_chunk(switched, first="data").first_frame_loss(Draws(1, 0, [0, 1]))
    assert set(said) <= {"a", "ccc", ""}
    assert "ccc" in said


@pytest.mark.parametrize("family", ["greedy", "causal"])
def test_one_pass_equals_the_stream_after_a_switch(switched: Shards, family: str) -> None:
    """A stream commits its past anew under the new prompt, and later frames take it for a past of that prompt."""
    objective = dmd(switched, family, steps=4)
    student, base = objective.student, objective.base
    first, then = base.encode(["ccc", "a"]), base.encode(["bb", "a"])
    begins, preset = 2, objective.presets[0]
    clean, noisy, sigma, *_ = roll_exits(student, then, 5, 1, [5, 6], preset, objective.size, (begins, first))
    plain, *_ = roll_exits(student, first, 5, 1, [5, 6], preset, objective.size)
    assert torch.equal(clean[:, :, :begins], plain[:, :, :begins])
    assert float((clean[0, :, begins:] - plain[0, :, begins:]).abs().max()) > 1e-2
    with torch.no_grad():
        flow = student.flow(clean[:, :, :-1], noisy, sigma, student.stages.prepare_text(then))
    predicted = noisy - sigma[:, None, :, None, None] * flow
    assert float((predicted - clean)[:, :, begins:].abs().max()) <= 1e-5


def test_a_step_switches_from_other_captions(switched: Shards) -> None:
    objective = dmd(switched, switch_share=1.0, frames=4)
    found = [objective.earlier(Draws(0, step, [0, 1])) for step in range(12)]
    assert {entry[0] for entry in found if entry} == {2, 3, 4, 5}
    assert dmd(switched).earlier(Draws(0, 0, [0, 1])) is None
    draws = Draws(0, 0, [0, 1])
    clip = objective.generate(objective.base.encode(["bb", "a"]), draws, objective.turn(draws))
    assert clip.shape == (2, 2, 4, 2, 2)
    weight = torch.zeros_like(clip)
    weight[:, :, 0] = 1
    trained = list(objective.student.trained().values())
    first = torch.autograd.grad((clip * weight).sum(), trained, retain_graph=True, allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in first)
    with pytest.raises(ValueError, match=r"switch_share: got 1.5"):
        DmdConfig(switch_share=1.5)


def test_a_decoder_learns_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vae = build_vae()
    monkeypatch.setattr(train_vae, "pretrained", lambda kind, path: vae)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    config = VaeConfig(
        task="scenes", start="given", steps=1, image_share=0.0, short_share=0.0, long=((9, 2),), decoder_only=True,
        switch_share=1.0, images=1, save_every=5,
    )  # fmt: skip
    train_vae.train(replace(config, steps=2), tmp_path, stop_at=2)
    moved = {name for name, value in vae.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert not {name for name in moved if name.startswith(("encoder.", "quant_conv."))}
