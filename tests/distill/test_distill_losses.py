"""The losses' gradients against finite differences, and the RL loss against distributions whose scores are known."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from distill.data.shards import Shards
from distill.models.matching import direction, moving_loss, sid_loss
from distill.models.rollout import Exits, roll_exits
from distill.models.student_file import NextChunkConfig
from distill.stages.dmd import Dmd, DmdConfig
from distill.stages.next_chunk import NextChunk
from distill.stages.rl import Rl, RlConfig
from distill.training.draws import Draws
from engine.config import TransformerConfig
from engine.model.transformer import WanTransformer

TINY = TransformerConfig(
    patch_size=(1, 1, 1),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=2,
    out_channels=2,
    text_dim=8,
    freq_dim=16,
    ffn_dim=16,
    num_layers=2,
)


CHUNKS = {"family": "causal", "chunk": 2, "window": 3, "solver": "renoise"}  # the fields of a chunk-wise student
STEP = 3e-4  # of finite differences: norms and rotations inside the model are float32 whatever the rest is


class Words:
    """A teacher whose captions are fixed random embeddings."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.transformer = WanTransformer(TINY).eval().requires_grad_(False)

    def encode(self, captions: list[str]) -> Tensor:
        rows = [torch.randn(3, 8, generator=torch.Generator().manual_seed(len(caption))) for caption in captions]
        return torch.stack(rows)

    def prepare(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        return self.transformer.prepare_text(self.encode(captions))


def spread(module: nn.Module) -> None:
    """Trained parameters far from zero, so that every path carries a gradient."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)


def next_chunk(data: Shards, **options: object) -> NextChunk:
    torch.manual_seed(0)
    config = NextChunkConfig(batch=2, first_batch=2, frames=4, rank=2, max_position=3, **options)  # type: ignore[arg-type]
    objective = NextChunk(config, Words(), data)  # type: ignore[arg-type]
    spread(objective)
    return objective


def rl(data: Shards, fields: dict[str, object] | None = None, **options: object) -> Rl:
    torch.manual_seed(0)
    made = NextChunkConfig(rank=2, max_position=3, frames=4, **(fields or {}))  # type: ignore[arg-type]
    base = Words()
    student = made.student(base)  # type: ignore[arg-type]
    spread(student)
    config = RlConfig(batch=2, frames=4, **options)  # type: ignore[arg-type]
    return Rl(config, made, base, student, data)  # type: ignore[arg-type]


def check_gradient(module: nn.Module, parameters: list[nn.Parameter], loss: Callable[[], Tensor]) -> None:
    """Directional derivatives along five random directions, in float64 central differences."""
    module.zero_grad()
    loss().backward()
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        ways = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        pairs = [(p.grad, way) for p, way in zip(parameters, ways, strict=True) if p.grad is not None]
        expected = sum(float((grad * way).sum()) for grad, way in pairs)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, way in zip(parameters, ways, strict=True):
                    p.add_(way, alpha=sign * STEP)
                values.append(float(loss()))
                for p, way in zip(parameters, ways, strict=True):
                    p.add_(way, alpha=-sign * STEP)
        found = (values[0] - values[1]) / (2 * STEP)
        assert found == pytest.approx(expected, rel=5e-3, abs=1e-4)


@pytest.mark.parametrize(("first", "fields"), [("data", {}), ("guided", {}), ("data", CHUNKS), ("guided", CHUNKS)])
@pytest.mark.usefixtures("double")
def test_next_chunk_gradient(
    data: Shards, first: str, fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eq. 6, parallel over frames, and both targets of the first frame."""
    monkeypatch.setattr(NextChunk, "read", in_double(NextChunk.read))
    objective = next_chunk(data, first=first, roll_share=0.0, **fields).double()
    keep_double(objective)
    parameters = list(objective.student.trained().values())
    check_gradient(objective, parameters, lambda: objective(Draws(0, 3, [0, 1]))[0])


@pytest.mark.parametrize("fields", [{}, CHUNKS], ids=["greedy", "causal"])
def test_unified_training_trains_for_every_number_of_steps(data: Shards, fields: dict[str, object]) -> None:
    """Each loss is that of one of the numbers alone, with the same draws; all of them come up."""
    one_of, alone = (
        [next_chunk(data, roll_share=0.5, **counts, **fields) for counts in options]
        for options in (
            [{"sampling_steps": 4, "unified": (1, 2)}],
            [{"sampling_steps": count} for count in (4, 1, 2)],
        )
    )
    (unified,) = one_of
    for name in ("later", "first"):
        found = set()
        for step in range(12):
            got = unified(Draws(0, step, [0, 1]))[1][name]
            losses = [single(Draws(0, step, [0, 1]))[1][name] for single in alone]
            assert got in losses
            found.add(losses.index(got))
        assert found == {0, 1, 2}


@pytest.mark.parametrize("scores", ["renoised", "literal"])
@pytest.mark.usefixtures("double")
def test_rl_gradient(data: Shards, scores: str) -> None:
    """Eq. 10 with the stopped part held: the derivative of half the mean square of mu minus a constant."""
    objective = rl(data, scores=scores).double()
    keep_double(objective)
    generator = torch.Generator().manual_seed(2)
    past, noisy = torch.randn(2, 2, 2, 2, 2, generator=generator), torch.randn(2, 2, 1, 2, 2, generator=generator)
    away, t = torch.randn(noisy.shape, generator=generator), torch.full((2,), 0.6)
    emb = objective.base.encode(["a", "bb"])
    student = objective.student

    def mu() -> Tensor:
        flow = student.next_flow(past, noisy, t, student.stages.prepare_text(emb))
        return noisy - 0.6 * flow if scores == "renoised" else noisy - 0.2 * flow

    target = (mu() - away).detach()
    parameters = list(student.trained().values())
    check_gradient(objective, parameters, lambda: 0.5 * (mu() - target).square().mean())
    held = [p.grad.clone() for p in parameters if p.grad is not None]
    objective.zero_grad()
    moving_loss(mu(), away).backward()
    for p, value in zip([p for p in parameters if p.grad is not None], held, strict=True):
        assert torch.allclose(p.grad, value, atol=1e-12)


def in_double(read: Callable[..., tuple[Tensor, list[str]]]) -> Callable[..., tuple[Tensor, list[str]]]:
    def wrapped(self: NextChunk, *arguments: object) -> tuple[Tensor, list[str]]:
        latent, captions = read(self, *arguments)
        return latent.double(), captions

    return wrapped


def keep_double(objective: NextChunk | Rl) -> None:
    objective.base.transformer.double()


@pytest.mark.parametrize("fields", [{}, CHUNKS], ids=["greedy", "chunks"])
@pytest.mark.parametrize("options", [{}, {"scores": "literal"}, {"context": "noised"}, {"normalise": False}])
def test_no_gradient_where_the_scores_agree(
    data: Shards, options: dict[str, object], fields: dict[str, object]
) -> None:
    """A student without adapters is its teacher; on a frame without a past, unguided, their scores are equal."""
    objective = rl(data, fields, guidance=1.0, first_frame=True, **options)
    with torch.no_grad():
        for parameter in objective.student.trained().values():
            parameter.zero_()
        for name, parameter in objective.student.trained().items():
            if "lora_A" in name:
                parameter.normal_()
    mu, past = torch.randn(2, 2, objective.made.chunk, 2, 2), torch.zeros(2, 2, 0, 2, 2)
    emb = objective.base.encode(["a", "b"])
    away = objective.away(mu, past, 0.5, emb, ["a", "b"], Draws(0, 0, [0, 1]))
    assert away.abs().max() <= 1e-5
    emb = objective.base.encode(["a", "bb"])
    spread(objective.student)
    away = objective.away(mu, past, 0.5, emb, ["a", "bb"], Draws(0, 0, [0, 1]))
    assert away.abs().max() > 1e-3


def gaussian_flow(x: Tensor, t: Tensor, mean: Tensor | float, spread: float) -> Tensor:
    """E[noise - x_0 | x_t] where x_0 ~ N(mean, spread^2) and x_t = (1 - t) x_0 + t noise."""
    t = t.view(-1, 1, 1, 1, 1)
    variance = (1 - t) ** 2 * spread**2 + t**2
    residual = x - (1 - t) * mean
    return t / variance * residual - (mean + (1 - t) * spread**2 / variance * residual)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("spread_real", [0.5, 1.0])
def test_gaussian_toy_moves_to_the_teacher(normalise: bool, spread_real: float) -> None:
    """A generator N(theta, 0.5^2) with known scores on both sides: descent ends at the teacher's mean."""
    generator = torch.Generator().manual_seed(0)
    for begun in (-2.0, 3.0):
        theta = torch.full((1, 2, 1, 1, 1), begun, requires_grad=True)
        optimizer = torch.optim.SGD([theta], lr=1.0)
        for _ in range(400):
            mu = theta + 0.5 * torch.randn(64, 2, 1, 1, 1, generator=generator)
            t = 0.02 + 0.96 * torch.rand(64, generator=generator)
            level = t.view(-1, 1, 1, 1, 1)
            noisy = ((1 - level) * mu + level * torch.randn(mu.shape, generator=generator)).detach()
            v_real = gaussian_flow(noisy, t, 1.0, spread_real)
            v_gen = gaussian_flow(noisy, t, theta.detach(), 0.5)
            away = direction(v_real, v_gen, mu.detach(), noisy, t, normalise=normalise)
            optimizer.zero_grad()
            moving_loss(mu, away).backward()
            optimizer.step()
        assert (theta - 1.0).abs().max() <= 0.15, (begun, theta)


def test_the_sign_is_that_of_velocities() -> None:
    """With true scores in place of velocities the same step leads away: s = -(x_t + (1 - t) v) / t."""
    mu, t = torch.zeros(1, 1, 1, 1, 1), torch.tensor([0.5])
    noisy = torch.full_like(mu, 0.3)
    v_real, v_gen = gaussian_flow(noisy, t, 1.0, 0.5), gaussian_flow(noisy, t, 0.0, 0.5)
    moved = -direction(v_real, v_gen, mu, noisy, t, normalise=False)
    assert moved.item() > 0  # towards the teacher's mean of 1
    score = [-(noisy + 0.5 * v) / 0.5 for v in (v_real, v_gen)]
    assert (-(score[0] - score[1])).item() < 0


def test_equal_gaussians_have_no_gradient() -> None:
    noisy, t = torch.randn(8, 2, 1, 1, 1), torch.rand(8)
    flow = gaussian_flow(noisy, t, 0.7, 0.5)
    assert not direction(flow, flow, noisy, noisy, t, normalise=True).any()


def test_critic_learns_the_student(data: Shards) -> None:
    """The fake score's loss falls where only it is trained; the student's parameters get nothing from it."""
    objective = rl(data, critic="trained")
    assert objective.critic is not None
    emb = objective.base.encode(["a", "bb"])
    clean, past = torch.randn(2, 2, 1, 2, 2), torch.randn(2, 2, 2, 2, 2)
    optimizer = torch.optim.Adam(objective.critic.trained().values(), lr=1e-2)
    values = []
    for step in range(40):
        loss = objective.critic_loss(clean, past, emb, Draws(0, step % 4, [0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert sum(values[-4:]) < 0.7 * sum(values[:4])
    assert all(p.grad is None for p in objective.student.trained().values())


def test_rl_judges_a_whole_chunk(data: Shards) -> None:
    """Every step's frame and sampling step; all parameters learn, and a past that ends inside a chunk is refused."""
    objective = rl(data, CHUNKS, critic="trained", critic_every=1)
    for step in range(3):
        objective(Draws(0, step, [0, 1]))[0].backward()
    assert all(p.grad.any() for p in objective.student.trained().values())
    with pytest.raises(ValueError, match="rl: got 2 frames and a student with context 'clean', expected two chunks"):
        Rl(replace(objective.config, frames=2), objective.made, objective.base, objective.student, data)
    with pytest.raises(ValueError, match=r"frames: got 3, expected a multiple of the chunk \(2\)"):
        Rl(replace(objective.config, frames=3), objective.made, objective.base, objective.student, data)


def dmd(data: Shards, family: str = "greedy", **options: object) -> Dmd:
    torch.manual_seed(0)
    fields = {"greedy": {}, "causal": {"family": "causal", "solver": "renoise"}, "chunks": CHUNKS}[family]
    made = NextChunkConfig(rank=2, max_position=3, frames=4, **fields)  # type: ignore[arg-type]
    base = Words()
    student = made.student(base)  # type: ignore[arg-type]
    spread(student)
    config = DmdConfig(batch=2, **({"frames": 4} | options))  # type: ignore[arg-type]
    return Dmd(config, made, base, student, data)  # type: ignore[arg-type]


DIAGONAL = {"schedule": "diagonal", "context": "last", "motion": 0.5}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *product(("greedy", "causal", "chunks"), ({}, {"sampling_steps": (2,), "first_steps": 4}, {"rollout": 6})),
        *(("chunks", DIAGONAL | other) for other in ({}, {"rollout": 6}, {"context": "noised"}, {"context": "clean"})),
    ],
)
def test_the_parallel_pass_is_the_stream(data: Shards, family: str, options: dict[str, object]) -> None:
    """The clip that carries the gradient is the one that the engine streamed, whichever step its frames left at."""
    objective, streamed = dmd(data, family, **options), list[Tensor]()

    def kept(*arguments: object) -> Exits:
        found = roll_exits(*arguments)  # type: ignore[arg-type]
        streamed.append(found.clean)
        return found

    emb, windows = objective.base.encode(["a", "bb"]), set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.stages.dmd.roll_exits", kept)
        for step in range(8):
            draws = Draws(0, step, [0, 1])
            clip = objective.generate(emb, draws, objective.turn(draws))
            assert clip.requires_grad
            length = streamed[-1].shape[2]
            distances = [far(clip, streamed[-1][:, :, start : start + 4]) for start in range(length - 3)]
            assert min(distances) <= 1e-5
            windows.add(distances.index(min(distances)))
    assert len(windows) == length - 3


def far(first: Tensor, second: Tensor) -> float:
    return float((first - second).detach().abs().max())


@pytest.mark.parametrize("motion", [0.0, 0.5])
def test_a_student_that_its_critic_takes_for_the_teacher_stays(data: Shards, motion: float) -> None:
    objective = dmd(data, guidance=1.0, motion=motion)
    emb, clip = objective.base.encode(["a", "bb"]), torch.randn(2, 2, 4, 2, 2, requires_grad=True)
    loss = objective.student_loss(clip, emb, Draws(0, 0, [0, 1]))
    loss.backward()
    assert loss.item() == 0
    assert not clip.grad.any()
    spread(objective.critic)
    assert objective.student_loss(clip, emb, Draws(0, 0, [0, 1])).item() > 1e-3


@pytest.mark.parametrize("loss", ["dmd", "sid"])
def test_each_model_learns_from_its_own_loss(data: Shards, loss: str) -> None:
    objective = dmd(data, loss=loss)
    spread(objective.critic)
    emb, draws = objective.base.encode(["a", "bb"]), Draws(0, 0, [0, 1])
    clip = objective.generate(emb, draws, objective.turn(draws))
    objective.student_loss(clip, emb, draws).backward()
    assert all(p.grad is None for p in objective.critic.parameters())
    learnt = [name for name, p in objective.student.trained().items() if p.grad is not None and p.grad.any()]
    assert {name.partition(".")[0] for name in learnt} == {"etm", "sdd"}
    objective.zero_grad()
    objective.critic_loss(clip.detach(), emb, draws).backward()
    assert all(p.grad is None for p in objective.student.parameters())
    assert all(p.grad is not None for p in objective.critic.trained().values())


def test_sid_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through both predictions, against central differences; only the norm is held."""
    monkeypatch.setattr("distill.models.matching.teacher_error", lambda x, x_real: 2.0)
    generator = torch.Generator().manual_seed(0)
    x, way = (torch.randn(2, 2, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))

    def loss(clip: Tensor) -> Tensor:
        return sid_loss(clip, clip.sin(), (0.5 * clip).cos(), 0.7)

    x.requires_grad_()
    loss(x).backward()
    found = (loss(x + 1e-6 * way) - loss(x - 1e-6 * way)) / 2e-6
    assert found.item() == pytest.approx(float((x.grad * way).sum()), rel=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_gaussian_toy_moves_to_the_teacher_by_sid(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for begun in (-2.0, 3.0):
        theta = torch.full((1, 2, 1, 1, 1), begun, requires_grad=True)
        optimizer = torch.optim.SGD([theta], lr=0.5)
        for _ in range(400):
            x = theta + 0.5 * torch.randn(64, 2, 1, 1, 1, generator=generator)
            sigma = 0.02 + 0.96 * torch.rand(64, generator=generator)
            level = sigma.view(-1, 1, 1, 1, 1)
            noisy = (1 - level) * x + level * torch.randn(x.shape, generator=generator)
            x_real, x_gen = (noisy - level * gaussian_flow(noisy, sigma, mean, 0.5) for mean in (1.0, theta.detach()))
            optimizer.zero_grad()
            sid_loss(x, x_real, x_gen, alpha).backward()
            optimizer.step()
        assert (theta - 1.0).abs().max() <= 0.15, (begun, theta)


def test_bad_configs(data: Shards, tmp_path: Path) -> None:
    for options, match in (
        ({"loss": "gan"}, "got 'gan', expected one of dmd, sid"),
        ({"gradient": "none"}, "gradient: got 'none', expected one of all, one"),
        ({"adversarial": 1.0, "opponent": "data", "switch_share": 0.5}, "switch_share: got 0.5, expected 0 with"),
        ({"opponent": "last"}, "opponent: got 'last', expected one of next, data"),
        ({"adversarial": -1.0}, "adversarial: got -1.0, expected at least 0"),
        ({"features": (2, 1)}, r"features: got \[2, 1\], expected at most 3 block numbers from 0, rising"),
        ({"features": (0, 1, 2, 3)}, "features: got"),
        ({"adversarial": 1.0, "sampling_steps": (4,)}, r"sampling_steps: got \[4\], expected two or more, rising"),
        ({"adversarial": 1.0, "sampling_steps": (4, 2)}, r"sampling_steps: got \[4, 2\], expected two or more"),
        ({"clamp": 0.5}, "clamp: got 0.5, expected"),
        ({"rollout": 3, "frames": 4}, r"rollout: got 3, expected 0 or at least frames \(4\)"),
        ({"critic_every": 0}, "critic_every: got 0, expected at least 1"),
        ({"sampling_steps": (3,)}, "denoising steps: got 3, expected a divisor of 1000"),
        ({"first_steps": 7}, "denoising steps: got 7, expected a divisor of 1000"),
    ):
        with pytest.raises(ValueError, match=match):
            DmdConfig(**options)  # type: ignore[arg-type]
    for options, match in (
        ({"motion": 1.0, "loss": "sid"}, "motion: got 1.0 with loss 'sid' and 9 frames, expected 0"),
        ({"motion": 1.0, "frames": 1}, "motion: got 1.0 with loss 'dmd' and 1 frames, expected 0"),
        ({"context": "dirty"}, "context: got 'dirty', expected one of clean, noised, last"),
    ):
        with pytest.raises(ValueError, match=match):
            DmdConfig(**options)  # type: ignore[arg-type]
    for family, options, match in (
        ("greedy", {"schedule": "diagonal"}, "schedule: got 'diagonal', expected '' for family 'greedy'"),
        ("chunks", {"frames": 3}, r"frames: got 3, expected a multiple of the chunk \(2\)"),
        ("chunks", DIAGONAL | {"first_steps": 4}, "schedule: got 'diagonal', expected none beside"),
    ):
        with pytest.raises(ValueError, match=match):
            dmd(data, family, **options)
    with pytest.raises(ValueError, match="context: got 'last', expected 'clean': this stage"):
        next_chunk(data, **CHUNKS, context="last")
    for wrong in ({"scores": "true"}, {"critic": "none"}, {"context": "dirty"}):
        with pytest.raises(ValueError, match="expected one of"):
            RlConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clamp"):
        RlConfig(clamp=0.6)
    for fields, match in (
        ({"chunk": 3}, "chunk: got 3, expected 1 for family 'greedy'"),
        ({"context": "last"}, "context: got 'last', expected 'clean' for family 'greedy'"),
        ({"context": "dirty", "family": "causal"}, "context: got 'dirty', expected one of clean, noised, last"),
        ({"schedule": "greedy", "family": "causal"}, "schedule: got 'greedy', expected one of self-forcing"),
        ({"chunk": 2, "family": "causal"}, r"frames: got 9, expected a multiple of the chunk \(2\)"),
        ({"chunk": 3, "family": "causal", "window": 2}, "got window 2, expected at least attn_sink"),
        ({"sampling_steps": 3}, "sampling_steps: got 3, expected a divisor of 1000"),
        ({"unified": (2, 3)}, "unified: got 3, expected a divisor of 1000"),
        (
            {"unified": (2,), "family": "causal", "schedule": "diagonal"},
            r"unified: got \[2\], expected none with a sch",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            NextChunkConfig(**fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiple of batch"):
        NextChunkConfig(batch=4, first_batch=6)
    with pytest.raises(ValueError, match="expected at most the 4"):
        NextChunk(NextChunkConfig(frames=9), Words(), SimpleNamespace(frames=4, folder=tmp_path))  # type: ignore[arg-type]
