"""Teacher forcing computes exactly what streaming computes, for any clip length and past the position clamp."""

from itertools import pairwise

import pytest
import torch
from tiny import text_of, transformer

from distill.models.causal import CausalStudent, causal_visible
from distill.models.rollout import SampleNoise, noise_levels, roll_exits, roll_into, roll_out
from distill.models.student import (
    Student,
    checkpointed,
    etm_visible,
    frame_attention,
    rope_for,
    sdd_positions,
    sdd_visible,
)
from engine.config import TransformerConfig
from engine.generators.base import Geometry
from engine.generators.causal import CausalGenerator
from engine.generators.greedy import GreedyGenerator
from engine.model.layers import dense_attention
from engine.model.transformer import WanTransformer
from engine.presets import find_preset

SMALL = TransformerConfig(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=32,
    ffn_dim=32,
    num_layers=3,
)


def random_student(window: int, max_position: int, **options: bool) -> Student:
    """A student whose adapters and W_c are far from zero."""
    torch.manual_seed(0)
    student = Student(WanTransformer(SMALL), rank=4, window=window, max_position=max_position, **options).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return student


@pytest.mark.parametrize(("frames", "window", "max_position"), [(1, 3, 4), (2, 1, 2), (7, 2, 3), (9, 3, 8)])
@torch.no_grad()
def test_teacher_forcing_equals_streaming(frames: int, window: int, max_position: int) -> None:
    student = random_student(window, max_position)
    clean, noisy = (torch.randn(2, 4, frames, 4, 6) for _ in range(2))
    emb, level = torch.randn(2, 5, 16), 0.6
    text = student.stages.prepare_text(emb)
    parallel = student.flow(clean[:, :, :-1], noisy, torch.full((2, frames), level), text)

    preset = find_preset("greedy", {"window": window + 1, "max_position": max_position})
    generator = GreedyGenerator(student.stages, SMALL, preset, torch.float32, torch.device("cpu"))
    state = generator.open(Geometry.of(SMALL, 2, 4, 6), text)
    for frame in range(frames):
        one = slice(frame, frame + 1)
        flow = generator.denoise(noisy[:, :, one], level * 1000, state)
        assert (flow - parallel[:, :, one]).abs().max() <= 1e-5, frame
        generator.commit(clean[:, :, one], state)


def causal_student(window: int, chunk: int = 1, attn_sink: int = 0) -> CausalStudent:
    torch.manual_seed(0)
    student = CausalStudent(WanTransformer(SMALL), 4, window, chunk, attn_sink).eval()
    with torch.no_grad():
        for parameter in student.trained().values():
            parameter.normal_(std=0.2)
    return student


@pytest.mark.parametrize(
    ("preset", "frames", "window", "chunk", "attn_sink"),
    [
        ("self-forcing-framewise", 1, 3, 1, 0),
        ("self-forcing-framewise", 6, 2, 1, 0),
        ("self-forcing-framewise", 7, 4, 1, 0),
        ("self-forcing", 9, 21, 3, 0),
        ("causvid", 12, 6, 3, 0),
        ("self-forcing", 12, 7, 3, 0),  # no multiple of the chunk: the ring wraps inside one
        ("longlive", 15, 9, 3, 3),
        ("longlive", 10, 5, 2, 1),  # the sink ends inside a chunk
        ("longlive", 12, 5, 2, 3),
    ],
)
@torch.no_grad()
def test_causal_teacher_forcing_equals_streaming(
    preset: str, frames: int, window: int, chunk: int, attn_sink: int
) -> None:
    """The student to compare with: the engine's causal generator computes what its two passes compute."""
    student = causal_student(window, chunk, attn_sink)
    clean, noisy = (torch.randn(2, 4, frames, 4, 6) for _ in range(2))
    emb, levels = torch.randn(2, 5, 16), torch.rand(frames // chunk)
    text = student.stages.prepare_text(emb)
    parallel = student.flow(clean[:, :, :-chunk], noisy, levels.repeat_interleave(chunk).expand(2, -1), text)
    after = student.next_flow(clean[:, :, :-chunk], noisy[:, :, -chunk:], levels[-1:].expand(2), text)
    assert (after - parallel[:, :, -chunk:]).abs().max() <= 1e-5

    style = find_preset(preset, {"window": window, "chunk": chunk, "attn_sink": attn_sink})
    generator = CausalGenerator(student.stages, SMALL, style, torch.float32, torch.device("cpu"))
    state = generator.open(Geometry.of(SMALL, 2, 4, 6), text)
    for number, level in enumerate(levels.tolist()):
        own = slice(number * chunk, (number + 1) * chunk)
        flow = generator.denoise(noisy[:, :, own], level * 1000, state)
        assert (flow - parallel[:, :, own]).abs().max() <= 1e-5, number
        generator.commit(clean[:, :, own], state)


@torch.no_grad()
def test_fresh_student_is_its_teacher() -> None:
    torch.manual_seed(0)
    teacher = WanTransformer(SMALL)
    student = Student(teacher, rank=4)
    noisy, emb, t = torch.randn(2, 4, 1, 4, 4), torch.randn(2, 5, 16), torch.rand(2, 1)
    from distill.models.sampling import joint_flow

    expected = joint_flow(teacher, noisy, t, teacher.prepare_text(emb))
    got = student.flow(noisy[:, :, :0], noisy, t, student.stages.prepare_text(emb))
    assert (got - expected).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("visible", "chunk"), [(etm_visible(6, 2), 1), (sdd_visible(4), 1), (causal_visible(6, 5, 2, 1), 2)]
)
def test_frame_attention_is_masked_attention(visible: list[list[int]], chunk: int) -> None:
    torch.manual_seed(0)
    tokens, frames = 3, len(visible) * chunk
    q, k, v = torch.randn(3, 2, frames * tokens, 2, 8)
    mask = torch.zeros(frames, frames, dtype=torch.bool)
    for frame in range(frames):
        mask[frame, visible[frame // chunk]] = True
    mask = mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    expected = dense_attention(mask)(0, q, k, v)
    assert (frame_attention(visible, chunk)(0, q, k, v) - expected).abs().max() <= 1e-6


def test_masks_and_positions_by_hand() -> None:
    assert etm_visible(5, 2) == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert sdd_visible(3) == [[0], [0, 1], [2], [0, 3], [0, 1, 4]]
    assert sdd_positions(6, 3) == [0, 1, 2, 2, 2, 0, 1, 2, 3, 3, 3]
    assert causal_visible(3, 2) == [[0], [0, 1], [2], [0, 3], [1, 4]]
    assert causal_visible(6, 5, 2, 1) == [[0, 1], [0, 1, 2, 3], [4, 5], [0, 1, 6, 7], [0, 2, 3, 8, 9]]


def test_rollout_is_seeded_and_keeps_what_is_given() -> None:
    student = random_student(3, 4)
    preset = find_preset("greedy", {"shift": 2.0, "solver": "euler", "max_position": 4})
    emb, start = torch.randn(2, 5, 16), torch.randn(2, 4, 2, 4, 4)
    first, again = (roll_out(student, emb, 5, [7, 9], preset, size=(4, 4), start=start) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first[:, :, :2], start)
    assert not torch.equal(first, roll_out(student, emb, 5, [7, 8], preset, size=(4, 4), start=start))
    assert noise_levels(preset).tolist() == pytest.approx([1, 6 / 7, 2 / 3, 2 / 5, 0])
    alone = roll_out(student, emb[1:], 5, [9], preset, size=(4, 4), start=start[1:])
    assert (alone - first[1:]).abs().max() <= 1e-5  # a sample does not depend on its batch
    with pytest.raises(ValueError, match="expected 1"):
        SampleNoise([1]).draw(0, 1, (2, 3))


@pytest.mark.parametrize("frames", [1, 2, 5, 7])
@pytest.mark.parametrize("etm", [True, False])
def test_next_flow_is_the_last_frame_of_flow(frames: int, etm: bool) -> None:
    student = random_student(2, 3, etm=etm)
    past, noisy = torch.randn(2, 4, frames - 1, 4, 6), torch.randn(2, 4, frames, 4, 6)
    text, t = student.stages.prepare_text(torch.randn(2, 5, 16)), torch.rand(2, frames)
    expected = student.flow(past, noisy, t, text)[:, :, -1:]
    got = student.next_flow(past, noisy[:, :, -1:], t[:, -1], text)
    assert (got - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("steps", [0, 2, 4])
@torch.no_grad()
def test_rolling_into_a_frame_is_the_stream(steps: int) -> None:
    """Denoising steps taken on the way equal the stream's; all of them give its next latent."""
    student = random_student(3, 4)
    preset = find_preset("greedy", {"shift": 2.0, "solver": "euler", "max_position": 4})
    emb, seeds = torch.randn(2, 5, 16), [3, 4]
    past, x = roll_into(student, emb, 3, steps, seeds, preset, size=(4, 4))
    whole = roll_out(student, emb, 4, seeds, preset, size=(4, 4))
    assert torch.equal(past, whole[:, :, :3])
    levels, text = noise_levels(preset), student.stages.prepare_text(emb)
    for step in range(steps, 4):  # the differentiable pass goes on where the stream stopped
        t = levels[step].expand(2)
        x = x + (levels[step + 1] - levels[step]) * student.next_flow(past, x, t, text)
    assert (x - whole[:, :, 3:]).abs().max() <= 1e-4


@torch.no_grad()
def test_rollouts_take_whole_chunks() -> None:
    """All steps into a chunk give the stream's next one; a clip may end inside a chunk, a past may not."""
    student, emb, seeds = causal_student(7, 3), torch.randn(2, 5, 16), [3, 4]
    preset = find_preset("self-forcing", {"window": 7, "shift": 2.0})
    past, x = roll_into(student, emb, 6, 4, seeds, preset, size=(4, 4))
    whole = roll_out(student, emb, 9, seeds, preset, size=(4, 4))
    assert torch.equal(torch.cat([past, x], 2), whole)
    assert torch.equal(roll_out(student, emb, 7, seeds, preset, size=(4, 4)), whole[:, :, :7])
    on = roll_out(student, emb, 9, seeds, preset, size=(4, 4), start=whole[:, :, :3])
    assert torch.equal(on, whole)
    assert torch.equal(roll_exits(student, emb, 9, 3, seeds, preset, size=(4, 4)).clean, whole)
    for roll in (roll_into, roll_exits):
        with pytest.raises(ValueError, match=r"frames: got 7, expected a multiple of the chunk \(3\)"):
            roll(student, emb, 7, 1, seeds, preset, size=(4, 4))


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_reach_everything_that_is_trained(recompute: bool) -> None:
    student = random_student(3, 4, recompute=recompute)
    text = student.stages.prepare_text(torch.randn(2, 5, 16))
    past, noisy = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 4, 1, 4, 4)
    student.next_flow(past, noisy, torch.tensor([0.4, 0.8]), text).square().mean().backward()
    # The ETM's last feed-forward belongs to c_f as all its blocks do; nothing frozen gets a gradient.
    assert not [name for name, p in student.trained().items() if p.grad is None or not p.grad.any()]
    assert not [name for name, p in student.named_parameters() if not p.requires_grad and p.grad is not None]


def test_recomputing_changes_no_gradient() -> None:
    grads = []
    for recompute in (False, True):
        student = random_student(3, 4, recompute=recompute)
        torch.manual_seed(1)
        text = student.stages.prepare_text(torch.randn(2, 5, 16))
        clean, noisy = torch.randn(2, 4, 4, 4, 4), torch.randn(2, 4, 4, 4, 4)
        student.flow(clean[:, :, :-1], noisy, torch.full((2, 4), 0.5), text).square().mean().backward()
        grads.append([p.grad for p in student.trained().values()])
    for kept, again in zip(*grads, strict=True):
        assert torch.allclose(kept, again, atol=1e-6)


@torch.no_grad()
def test_guidance_in_the_stream() -> None:
    """Both halves stay one video; its first frame is v_free + s (v_given - v_free), integrated step by step."""
    student = random_student(3, 4)
    preset = find_preset("greedy", {"shift": 2.0, "solver": "euler", "max_position": 4})
    emb, empty, seeds = torch.randn(2, 5, 16), torch.randn(2, 5, 16), [3, 4]
    both = torch.cat([emb, empty])
    with student.guided(1.7):
        made = roll_out(student, both, 3, seeds * 2, preset, size=(4, 4))
    assert torch.equal(made[:2], made[2:])
    x, text, levels = (
        SampleNoise(seeds).draw(0, 1, (2, 4, 1, 4, 4))[0],
        student.stages.prepare_text(both),
        noise_levels(preset),
    )
    for now, then in pairwise(levels.tolist()):
        flow = student.next_flow(
            x.repeat(2, 1, 1, 1, 1)[:, :, :0], x.repeat(2, 1, 1, 1, 1), torch.full((4,), now), text
        )
        given, free = flow.chunk(2)
        x = x + (then - now) * (free + 1.7 * (given - free))
    assert (made[:2, :, :1] - x).abs().max() <= 1e-4
    assert (roll_out(student, emb, 3, seeds, preset, size=(4, 4)) - made[:2]).abs().max() > 1e-3  # switched off again


@torch.no_grad()
def test_without_etm_the_stream_ignores_it() -> None:
    """W_c stays zero, so what the engine streams is what the decoder alone computes."""
    student = random_student(3, 4, etm=False)
    assert not student.sdd.condition_proj.weight.any()
    assert not [name for name in student.trained() if name.startswith("etm.")]
    preset = find_preset("greedy", {"shift": 2.0, "solver": "euler", "max_position": 4})
    emb = torch.randn(1, 5, 16)
    first = roll_out(student, emb, 4, [5], preset, size=(4, 4))
    for parameter in student.etm.parameters():
        parameter.normal_(std=0.3)
    assert torch.equal(first, roll_out(student, emb, 4, [5], preset, size=(4, 4)))


def test_bad_input() -> None:
    student = random_student(3, 4)
    with pytest.raises(ValueError, match="expected 1"):
        student.flow(torch.zeros(1, 4, 2, 4, 4), torch.zeros(1, 4, 2, 4, 4), torch.zeros(1, 2), {})
    with pytest.raises(ValueError, match="expected chunks of 3"):
        causal_student(7, 3).flow(torch.zeros(1, 4, 3, 4, 4), torch.zeros(1, 4, 5, 4, 4), torch.zeros(1, 5), {})
    with pytest.raises(ValueError, match="window: got 4 with chunks of 3, expected at least 5"):
        causal_student(4, 3, 2)
    with pytest.raises(ValueError, match="max_position"):
        Student(WanTransformer(SMALL), rank=4, max_position=1)


def test_checkpointed_blocks_keep_one_hidden_state_each():
    """The residual sum is made inside the checkpoint: outside, both addends would be kept."""
    model = checkpointed(transformer(num_layers=6))
    latent = torch.randn(1, 8, 2, 4, 6)
    cos, sin = rope_for(model, range(2), latent)
    text = model.prepare_text(text_of())
    parameters, kept = {p.data_ptr() for p in model.parameters()}, []

    def keep(tensor):
        if tensor.data_ptr() not in parameters and tensor.numel() == 12 * model.config.dim:
            kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(latent, torch.tensor([500.0]), text, cos, sin, dense_attention())
    assert len(set(kept)) < model.config.num_layers  # the blocks' inputs are kept by the checkpoints themselves
