"""The cost of next_chunk, consistency, rl or dmd at full size, without running it: models on the meta device, counted.

    python -m distill next_chunk --config distill/configs/wan2.1-1.3b.toml --dry-run

Parameters and optimiser states are exact counts. FLOPs follow the code: dense products and attention, two operations
per multiply-add. Activation memory is an estimate of the tensors kept for the backward pass. No number here is a
measurement on the hardware that the config names.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch

from distill.models.causal import causal_visible, noisy_visible
from distill.models.critic import Critic
from distill.models.student_file import NextChunkConfig, StudentConfig
from distill.stages.consistency import ConsistencyConfig
from distill.stages.dmd import DmdConfig, discriminator_of, presets_of, streamed_by
from distill.stages.rl import RlConfig
from distill.training.loop import FitConfig, split
from engine.config import Preset, TransformerConfig
from engine.model.transformer import WanTransformer
from engine.options import option, read_table

GIB = 1 << 30


@dataclass(frozen=True)
class ClusterConfig:
    """The table [cluster]: machine, model and data of a plan. Only --dry-run reads it."""

    gpus: int = option(64, "number of GPUs")
    memory_gib: float = option(80.0, "memory per GPU")
    tflops: float = option(400.0, "sustained 16-bit TFLOP/s per GPU: an assumption, not a measurement")
    transformer: str = option("", "config.json of the transformer; empty: Wan2.1-T2V-1.3B")
    text_encoder_gib: float = option(10.6, "UMT5-xxl's encoder in bf16")
    text_embedding_gib: float = option(2.0, "its embedding, which every GPU holds whole")
    text_rows: int = option(512, "text rows per prompt")
    height: int = option(60, "latent pixels")
    width: int = option(104, "latent pixels")
    frames: int = option(21, "latent frames per clip")
    clips: int = option(100_000, "clips of the data, for the length of an epoch")


@dataclass(frozen=True)
class Plan:
    """A stage's cost: memory in bytes per GPU, FLOPs per step over all GPUs."""

    parameters: int
    trained: int
    weights: int
    optimiser: int
    activations: int
    tokens: int
    flops: float
    seconds: float
    steps_an_epoch: int

    @property
    def memory(self) -> int:
        return self.weights + self.optimiser + self.activations


def forward_flops(config: TransformerConfig, tokens: int, pairs: int, rows: int, prompts: int) -> float:
    """One forward pass over `tokens` tokens in `prompts` clips, with `pairs` query-key pairs of self-attention."""
    dim, layers = config.dim, config.num_layers
    linear = 8 * dim * dim + 4 * dim * config.ffn_dim + 4 * dim * dim  # self-attention, feed-forward, cross q and o
    return layers * (tokens * linear + 4 * dim * (pairs + tokens * rows) + prompts * rows * 4 * dim * dim)


def _passes(config: TransformerConfig, made: NextChunkConfig, n: int, frames: int, rows: int) -> tuple[float, float]:
    """FLOPs of the teacher-forced student and of the teacher, for one clip of `frames` frames of n tokens."""
    joint = forward_flops(config, frames * n, frames * frames * n * n, rows, 1)
    if made.family == "causal":
        seen = causal_visible(frames, made.window, made.chunk, made.attn_sink)
        pairs = made.chunk * sum(map(len, seen)) * n * n
        return forward_flops(config, _sequence(made, frames) * n, pairs, rows, 1), joint
    etm = sum(min(i, made.window) + 1 for i in range(frames - 1)) * n * n
    sdd = (sum(min(i, 1) + 1 for i in range(frames - 1)) + sum(min(i, 2) + 1 for i in range(frames))) * n * n
    student = forward_flops(config, (2 * frames - 1) * n, sdd, rows, 1)
    if made.etm:
        student += forward_flops(config, (frames - 1) * n, etm, rows, 1)
    return student, joint


def _sequence(made: NextChunkConfig, frames: int) -> int:
    """Frames in the student's parallel pass over a clip: noisy ones, their context, and those of the ETM."""
    return 2 * frames - made.chunk if made.family == "causal" else 3 * frames - 2


def _one_frame(config: TransformerConfig, made: NextChunkConfig, n: int, rows: int, steps: float) -> float:
    """FLOPs to stream one frame: ETM, context and denoising steps, each over a nearly constant number of keys."""
    if made.family == "causal":
        keys = mean(map(len, noisy_visible(made.frames, made.window, made.chunk, made.attn_sink)))
        return (steps + (made.context != "last")) * forward_flops(config, n, int(keys * n) * n, rows, 0)
    etm = forward_flops(config, n, (made.window + 1) * n * n, rows, 0)
    sdd = forward_flops(config, n, 2 * n * n, rows, 0) + steps * forward_flops(config, n, 3 * n * n, rows, 0)
    return etm * made.etm + sdd


@dataclass(frozen=True)
class _Work:
    """A step's work on one clip: tokens whose activations are kept for the backward pass, and FLOPs."""

    sequence: int
    flops: float


def _next_chunk(config: NextChunkConfig, shape: TransformerConfig, n: int, frames: int, rows: int) -> _Work:
    (parallel, _), chunk = _passes(shape, config, n, frames, rows), config.chunk * n
    if config.target == "ode":
        pairs = chunk * n * sum(map(len, noisy_visible(frames, config.window, config.chunk, config.attn_sink)))
        return _Work(frames * n, forward_flops(shape, frames * n, pairs, rows, 1) * (1 + _backward(config)))
    first, alone = config.first_batch / config.batch, forward_flops(shape, chunk, chunk * chunk, rows, 1)
    guided = 2 * config.substeps * alone if config.first == "guided" else 0.0
    one = _one_frame(shape, config, n, rows, config.sampling_steps)
    rolled = config.roll_share * (1 - config.roll_from) * (frames - 2 * config.chunk) * one
    through = 1 + _backward(config)
    return _Work(_sequence(config, frames) * n, parallel * through + first * (alone * through + guided) + rolled)


def _next_pass(config: TransformerConfig, made: NextChunkConfig, n: int, past: int, rows: int) -> tuple[int, float]:
    """Frames whose activations are kept, and FLOPs, of the pass over the chunk that follows `past` frames."""
    if made.family == "causal":
        frames = past // made.chunk * made.chunk + made.chunk
        pairs = made.chunk * sum(map(len, noisy_visible(frames, made.window, made.chunk, made.attn_sink)))
        return frames, forward_flops(config, frames * n, pairs * n * n, rows, 1)
    etm = forward_flops(config, past * n, (made.window + 1) * past * n * n, rows, 1)
    return past + 3, etm * made.etm + forward_flops(config, 3 * n, 6 * n * n, rows, 1)


def _consistency(
    config: ConsistencyConfig, made: NextChunkConfig, shape: TransformerConfig, n: int, frames: int, rows: int
) -> _Work:
    parallel, _ = _passes(shape, made, n, frames, rows)
    target = (2 + (config.guidance != 1)) * (1 - 1 / config.levels)  # teacher and average; none at the last level
    return _Work(_sequence(made, frames) * n, parallel * (1 + _backward(config) + target))


def _rl(config: RlConfig, made: NextChunkConfig, shape: TransformerConfig, n: int, frames: int, rows: int) -> _Work:
    middle, (_, joint) = frames // 2, _passes(shape, made, n, frames, rows)
    sequence, step = _next_pass(shape, made, n, middle, rows)
    judge = step * (2 + _backward(config) if config.critic == "trained" else 1)
    real = 2 * joint * (middle + made.chunk) / frames
    rolled = (middle + made.chunk / 2) * _one_frame(shape, made, n, rows, made.sampling_steps)
    return _Work(sequence * n, rolled + step * (1 + _backward(config)) + judge + real)


def _dmd(config: DmdConfig, made: NextChunkConfig, shape: TransformerConfig, n: int, frames: int, rows: int) -> _Work:
    made, length = streamed_by(config, made), max(config.rollout, frames)
    parallel, _ = _passes(shape, made, n, length, rows)
    _, joint = _passes(shape, made, n, frames, rows)
    presets = presets_of(config, made)
    rolled = length * _one_frame(shape, made, n, rows, mean(_steps_taken(p, length // made.chunk) for p in presets))
    sid, through = config.loss == "sid", 1 + _backward(config)
    learning = parallel * through + 3 * joint * (through if sid else 1)
    judged = 0  # clips that the discriminator sees, whose activations are kept
    if config.adversarial:
        judged = 4 if config.r1 or config.r2 else 2
        learning += joint * through
        if config.opponent == "next":  # the smallest number of steps is nobody's next one
            finished = [len(preset.steps[-1]) for preset in presets[1:]]
            rolled += sum(length * _one_frame(shape, made, n, rows, count) for count in finished) / len(presets)
    flops = rolled + learning / config.critic_every + joint * through * (1 + judged)
    return _Work((_sequence(made, length) + frames * (1 + 3 * sid + judged + (judged > 0))) * n, flops)


def _steps_taken(preset: Preset, chunks: int) -> float:
    """Mean denoising steps of a chunk in a rollout that ends after a drawn step, or at the ends of all loops."""
    loops = [len(preset.steps[min(chunk, len(preset.steps) - 1)]) for chunk in range(chunks)]
    if preset.commit == "noisy":
        return mean(loops)
    return mean(min(exits, loop) for loop in loops for exits in range(1, max(loops) + 1))


def _backward(config: FitConfig) -> float:
    """A backward pass counts as two forward passes, and one more where blocks are recomputed."""
    return 3.0 if config.recompute else 2.0


def estimate(config: StudentConfig, made: NextChunkConfig, cluster: ClusterConfig) -> Plan:
    """The plan of a stage by its config. `made` is the next-chunk config of its student."""
    shape = TransformerConfig()
    if cluster.transformer:
        shape = TransformerConfig.from_dict(json.loads(Path(cluster.transformer).read_text()))
    with torch.device("meta"):
        teacher = WanTransformer(shape).to(config.dtype)
        critic = head = None
        if isinstance(config, DmdConfig):
            critic = Critic(teacher, config.critic_rank)
            head = discriminator_of(config, made, shape)
        student = made.student_of(teacher)
    frozen = sum(p.numel() for p in student.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in student.trained().values())
    base = sum(p.numel() for p in teacher.parameters())
    _, ph, pw = shape.patch_size
    n = (cluster.height // ph) * (cluster.width // pw)
    rows, frames = cluster.text_rows, min(config.frames, cluster.frames) // made.chunk * made.chunk  # type: ignore[attr-defined]
    micro = len(split(config.batch, config.micro, 0, cluster.gpus)[0])
    started = 0  # trained weights that are kept as they began
    if critic is not None:
        work = _dmd(config, made, shape, n, frames, rows)
        critic_trained = sum(p.numel() for p in critic.trained().values())
        critic_frozen = sum(p.numel() for p in critic.parameters()) - critic_trained
        if head is not None:
            critic_trained += sum(p.numel() for p in head.parameters())
    elif isinstance(config, RlConfig):
        work, beside = _rl(config, made, shape, n, frames, rows), config.critic == "trained"
        critic_trained, critic_frozen = trained * beside, frozen * beside
    elif isinstance(config, ConsistencyConfig):
        work, critic_trained, critic_frozen = _consistency(config, made, shape, n, frames, rows), 0, 0
        started = trained
    else:
        work, critic_trained, critic_frozen = _next_chunk(made, shape, n, frames, rows), 0, 0
    width, sequence, learnt = 2 if config.precision == "bf16" else 4, work.sequence, trained + critic_trained
    kept = sequence * shape.dim * shape.num_layers * width
    # Whole blocks keep norms, projections, attention and feed-forward; recomputed blocks keep only their input.
    kept *= 1 if config.recompute else 14 + 2 * shape.ffn_dim // shape.dim
    peak = sequence * (14 * shape.dim + 2 * shape.ffn_dim) * width if config.recompute else 0
    rounded = frozen if config.fp8 and not config.recompute else 0  # bytes of e4m3 weights, for the backward pass
    flops = work.flops * config.batch
    embedding = cluster.text_embedding_gib * GIB
    held = (frozen + critic_frozen + base) * width + cluster.text_encoder_gib * GIB - embedding
    return Plan(
        parameters=frozen + critic_frozen + base + learnt,
        trained=learnt,
        weights=int(held / (cluster.gpus if config.shard else 1) + embedding) + 4 * (learnt + started),
        # Gradient, two moments, and the buckets in which several processes average gradients; the moving average.
        optimiser=learnt * 4 * (3 + (cluster.gpus > 1)) + 4 * trained,
        activations=micro * (kept + peak) + rounded,
        tokens=sequence * config.batch,
        flops=flops,
        seconds=flops / (cluster.gpus * cluster.tflops * 1e12),
        steps_an_epoch=-(-cluster.clips // config.batch),
    )


def report(path: Path, stage: str, config: NextChunkConfig | ConsistencyConfig | RlConfig | DmdConfig) -> None:
    """Print the plan, last as JSON. A plan that does not fit raises ValueError."""
    cluster = read_table(ClusterConfig, path, "cluster")
    made = config if isinstance(config, NextChunkConfig) else read_table(NextChunkConfig, path, "next_chunk")
    plan = estimate(config, made, cluster)
    lines = {
        "parameters": f"{plan.parameters / 1e9:.2f} G held, {plan.trained / 1e6:.1f} M trained",
        "memory per GPU": f"{plan.memory / GIB:.1f} GiB = weights {plan.weights / GIB:.1f} + optimiser "
        f"{plan.optimiser / GIB:.1f} + activations {plan.activations / GIB:.1f} (estimated)",
        "tokens per step": f"{plan.tokens / 1e6:.2f} M",
        "FLOPs per step": f"{plan.flops / 1e15:.1f} P",
        "time per step": f"{plan.seconds:.1f} s at {cluster.tflops:g} TFLOP/s on each of {cluster.gpus} GPUs (assumed)",
        "epoch": f"{plan.steps_an_epoch} steps of {cluster.clips} clips; {config.steps} steps are "
        f"{config.steps / plan.steps_an_epoch:.1f} epochs, {config.steps * plan.seconds / 3600:.0f} h",
    }
    for name, text in lines.items():
        print(f"{name:>15}  {text}")
    print(json.dumps({"stage": stage, **asdict(plan), "memory": plan.memory}))
    if plan.memory > cluster.memory_gib * GIB:
        raise ValueError(
            f"memory: got {plan.memory / GIB:.1f} GiB per GPU, expected at most {cluster.memory_gib:g} "
            "(smaller micro, recompute = true, precision = 'bf16', shard = true)"
        )
